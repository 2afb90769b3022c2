// Every op that a front offers. The signature of each is that of its body, and of the function of its name in Python.
#pragma once
#include "activation.h"
#include "attention.h"
#include "linear.h"
#include "norm.h"

namespace pygpt::bind {

// X(op, the kernel that it runs, how many of its results are not for the backward pass alone)
#define PYGPT_OPS(X, device)                            \
  X(attention_fwd, device::attention_fwd, 1)            \
  X(attention_bwd, device::attention_bwd, 3)            \
  X(linear_fwd, device::linear_fwd, 1)                  \
  X(linear_bwd, device::linear_bwd, 3)                  \
  X(mlp_fwd, device::mlp_fwd, 1)                        \
  X(mlp_bwd, device::mlp_bwd, 5)                        \
  X(layer_norm_fwd, device::norm_fwd, 1)                \
  X(layer_norm_bwd, device::norm_bwd, 3)                \
  X(add_layer_norm_fwd, device::norm_fwd, 2)            \
  X(add_layer_norm_bwd, device::norm_bwd, 3)            \
  X(rms_norm_fwd, device::norm_fwd, 1)                  \
  X(rms_norm_bwd, device::norm_bwd, 2)                  \
  X(gelu_fwd, device::activation_fwd, 1)                \
  X(gelu_bwd, device::activation_bwd, 1)                \
  X(relu_fwd, device::activation_fwd, 1)                \
  X(relu_bwd, device::activation_bwd, 1)

}  // namespace pygpt::bind
