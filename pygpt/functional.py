"""The public ops. Names, argument order, meaning and errors follow torch.nn.functional.

Every function checks its arguments, brings them to the op's canonical shape and passes them to the backend that serves
the call (see `pygpt.explain`). A call that torch's function of the same name accepts and no kernel serves goes to
PyTorch. All functions accept float64, float32, bfloat16 and float16, any strides, empty tensors, autocast and
torch.compile, and can be differentiated any number of times. Sums and row statistics are float32 (float64 for float64).
Bad arguments raise ValueError or TypeError before anything is computed. As with torch.from_dlpack, `resize_` may not be
able to enlarge a result on the CPU. The functions are defined in pygpt/ops/.
"""

from .ops.activation import gelu, relu
from .ops.attention import scaled_dot_product_attention
from .ops.dropout_norm import dropout_add_layer_norm, dropout_add_rms_norm
from .ops.loss import cross_entropy, linear_cross_entropy
from .ops.mlp import linear, mlp
from .ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .ops.qkv_attention import qkv_attention
from .ops.rope import rope
from .ops.varlen_attn import varlen_attn

__all__ = [
    "add_layer_norm", "add_rms_norm", "cross_entropy", "dropout_add_layer_norm", "dropout_add_rms_norm", "gelu",
    "layer_norm", "linear", "linear_cross_entropy", "mlp", "qkv_attention", "relu", "rms_norm", "rope",
    "scaled_dot_product_attention", "varlen_attn",
]  # fmt: skip
