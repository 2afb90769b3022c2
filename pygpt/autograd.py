"""The torch.autograd.Functions of the ops, independent of the backend. Each one is written in its op's file.

``Function.apply(kernels, *args)``: ``kernels`` is any namespace with ``<op>_fwd`` and ``<op>_bwd`` that have the
signatures of `pygpt.reference`, and ``args`` are the op's canonical arguments. Under ``create_graph=True`` the backward
pass differentiates the op's ordinary PyTorch expression, so that gradients of any order are right.
"""

from typing import TYPE_CHECKING

from torch.autograd import Function

from . import ops  # noqa: F401 (registers them)
from .dispatch import OPS

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Function]: ...


globals().update({op.function.__name__: op.function for op in OPS.values()})
__all__ = [op.function.__name__ for op in OPS.values()]
