"""Every op in plain PyTorch: ``<op>``, ``<op>_fwd`` and ``<op>_bwd`` on canonical arguments. See `pygpt.ops`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import ops  # noqa: F401 (registers them)
from .dispatch import REFERENCE
from .ops.activation import ACTIVATIONS, GATED, SAVES_INPUT

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...


globals().update(vars(REFERENCE))
__all__ = ["ACTIVATIONS", "GATED", "SAVES_INPUT", *vars(REFERENCE)]  # noqa: PLE0604 (the names are strings)
