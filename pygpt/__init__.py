"""pygpt: fused GPT kernels for PyTorch - attention, MLP, norms - as drop-in ops, modules and a model."""

from pathlib import Path

if not (Path(__file__).parent / "triton_kernels").is_dir():  # a checkout: the folder lies beside this one
    __path__.append(str(Path(__file__).parents[1]))

from . import backends, functional, nn  # noqa: F401 (backends fills the table)
from .dispatch import Choice, backend, explain
from .model import GPT, GPTConfig

__version__ = "0.1.0"
__all__ = ["GPT", "Choice", "GPTConfig", "backend", "explain", "functional", "nn"]
