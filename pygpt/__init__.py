"""Fused GPT kernels for PyTorch: attention, MLP and norms, as drop-in ops, modules and a model."""

import sys
from pathlib import Path

from . import threads

if threads.is_command_line(sys.argv, sys.orig_argv):
    threads.bound_spinning()  # before torch is imported

if not (Path(__file__).parent / "triton_kernels").is_dir():  # in a checkout that folder is beside this one
    __path__.append(str(Path(__file__).parents[1]))

try:
    from . import backends, functional, nn  # noqa: F401 (backends fills the table)
    from .dispatch import Choice, backend, chosen, explain
    from .inspect import audit, doctor, report
    from .integrations.aten import disable, enable, register_flash_attention
    from .integrations.modules import patch, unpatch
    from .model import GPT, GPTConfig

    register_flash_attention()
    chosen()  # raises where PYGPT_BACKEND is unknown or not available
except (RuntimeError, ValueError) as e:  # the command line reports a wrong environment variable in one line
    if "PYGPT_" not in str(e) or not threads.is_command_line(sys.argv, sys.orig_argv):
        raise
    print(f"pygpt: error: {str(e).removeprefix('pygpt: ')}", file=sys.stderr)
    sys.exit(2)

__version__ = "0.2.0"
__all__ = [
    "GPT", "Choice", "GPTConfig", "audit", "backend", "disable", "doctor", "enable", "explain", "functional", "nn",
    "patch", "report", "unpatch",
]  # fmt: skip
