"""The ops' torch.autograd.Functions, blind to the backend; each is written in its op's file in pygpt/ops/.

``Function.apply(kernels, *args)``: ``kernels`` is any namespace holding ``<op>_fwd`` and ``<op>_bwd`` with the signatures
of `pygpt.reference`; ``args`` are the op's canonical arguments. Under ``create_graph=True`` a backward pass differentiates
the op's ordinary PyTorch expression instead, so that gradients of any order are right; the kernels serve the first.
"""

from . import ops  # noqa: F401 (registers them)
from .dispatch import OPS

globals().update({op.function.__name__: op.function for op in OPS.values()})
__all__ = [op.function.__name__ for op in OPS.values()]
