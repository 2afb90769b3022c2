"""The ops, a file a family: the mathematics in plain torch, its autograd Function, its public function, its `Spec`.

Read one from top to bottom. <op>_composite is PyTorch's ordinary expression; <op>_fwd and <op>_bwd are written out, and
their signatures are those of every backend: the oracle of the tests in float64, the shape functions of torch.ops.pygpt on
meta tensors. Sums and statistics are float32 (float64 for float64), as in the kernels. ``needs`` says which gradients are
wanted, in the order in which they are returned; an unwanted one comes back with no elements.
"""

from . import attention, mlp, norm, activation  # noqa: I001 (in the order in which they are shown)

__all__ = ["activation", "attention", "mlp", "norm"]
