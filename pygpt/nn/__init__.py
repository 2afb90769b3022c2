"""Modules on `pygpt.functional`: torch's norms and Linear with another forward, and the two halves of a GPT block.

State dicts are interchangeable with torch.nn (LayerNorm, RMSNorm, Linear, the losses) and nanoGPT (MLP,
CausalSelfAttention). Under torch.jit.script the norms and Linear compute with PyTorch's kernels.
"""

from .. import functional  # noqa: F401 (as torch.nn has it)
from .attention import CausalSelfAttention, KVCache
from .layers import LayerNorm, Linear, RMSNorm, _layer_norm, _rms_norm  # noqa: F401 (older pickles of traced norms)
from .losses import CrossEntropyLoss, LinearCrossEntropyLoss
from .mlp import MLP, fuse_gate, split_gate
from .rotary import RotaryEmbedding

__all__ = [
    "MLP", "CausalSelfAttention", "CrossEntropyLoss", "KVCache", "LayerNorm", "Linear", "LinearCrossEntropyLoss",
    "RMSNorm", "RotaryEmbedding", "fuse_gate", "split_gate",
]  # fmt: skip
