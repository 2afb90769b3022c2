"""pygpt: fused GPT kernels for PyTorch - attention, MLP, norms - as drop-in ops, modules and a model."""

from . import functional, nn
from .backend import Choice, backend
from .functional import explain
from .model import GPT, GPTConfig

__version__ = "0.1.0"
__all__ = ["GPT", "Choice", "GPTConfig", "backend", "explain", "functional", "nn"]
