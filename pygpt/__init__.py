"""pygpt: fused GPT kernels for PyTorch - attention, MLP, norms - as drop-in ops, modules and a model."""

import sys
from pathlib import Path

if not (Path(__file__).parent / "triton_kernels").is_dir():  # a checkout: the folder lies beside this one
    __path__.append(str(Path(__file__).parents[1]))

try:
    from . import backends, functional, nn  # noqa: F401 (backends fills the table)
    from .dispatch import Choice, backend, chosen, explain
    from .model import GPT, GPTConfig

    chosen()  # refuses a PYGPT_BACKEND that is unknown or not there
except (RuntimeError, ValueError) as e:  # the command line says in one line what is wrong with an environment variable
    command_line = Path(*sys.argv[:1]).stem in ("-m", "pygpt")  # "-m": python -m pygpt, at this point
    if "PYGPT_" not in str(e) or not command_line:
        raise
    print(f"pygpt: error: {str(e).removeprefix('pygpt: ')}", file=sys.stderr)
    sys.exit(2)

__version__ = "0.2.0"
__all__ = ["GPT", "Choice", "GPTConfig", "backend", "explain", "functional", "nn"]
