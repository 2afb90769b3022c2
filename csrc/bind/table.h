// The table of ops. The signature of an op is that of its body, and of the Python function of the same name.
#pragma once
#include "activation.h"
#include "attention.h"
#include "loss.h"
#include "mlp.h"
#include "norm.h"
#include "qkv_attention.h"
#include "rope.h"
#include "varlen_attn.h"

#define PYGPT_OPS(X, device)         \
  PYGPT_ATTENTION_OPS(X, device)     \
  PYGPT_QKV_ATTENTION_OPS(X, device) \
  PYGPT_VARLEN_ATTN_OPS(X, device)   \
  PYGPT_ROPE_OPS(X, device)          \
  PYGPT_MLP_OPS(X, device) PYGPT_NORM_OPS(X, device) PYGPT_ACTIVATION_OPS(X, device) PYGPT_LOSS_OPS(X, device)
