"""The ops, one file for each family: mathematics in PyTorch, autograd Function, public function and `Spec`.

Read a file from top to bottom. <op>_composite is PyTorch's ordinary expression. <op>_fwd and <op>_bwd spell out the
mathematics with the signatures that every backend has. They are the oracle of the tests in float64 and, on meta
tensors, the fake kernels of torch.ops.pygpt. Sums and statistics are float32 (float64 for float64), as in the kernels.
``needs`` says which gradients are wanted, in the order in which they are returned. An unwanted gradient is returned
without elements.

Of the longest families, <family>_arguments.py checks the public arguments, and attention_specs.py has the specs.
"""

# In the order in which they are shown:
from . import attention, attention_specs  # noqa: I001
from . import qkv_attention, varlen_attn, rope, mlp, norm, dropout_norm, activation, loss

__all__ = [
    "activation", "attention", "attention_specs", "dropout_norm", "loss", "mlp", "norm", "qkv_attention", "rope",
    "varlen_attn",
]  # fmt: skip
