"""The folder that Hugging Face's loader `kernels` takes: `python -m pygpt.integrations.kernels FOLDER` writes it.

The loader looks in FOLDER/build for the variant that fits the machine. A variant is named after the oldest torch whose
stable ABI it needs, the device and the platform, such as torch-stable-abi210-cpu-x86_64-linux. Ours holds

    metadata.json   what the loader reads first
    __init__.py     what it imports; this imports the copy of pygpt beside it
    pygpt/          this package with its compiled libraries

The CUDA variant holds the CPU kernels, too. torch.ops.pygpt exists once in a process, so a second version of pygpt is
refused with an ImportError, and the same version, installed and imported already, is taken instead of the copy.
"""

import argparse
import importlib.util
import json
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .. import __version__

OLDEST_TORCH = "210"  # the stable ABI that csrc/ is written against
ENTRY = '''"""pygpt {version}: fused GPT kernels for PyTorch, as the package kernels loads them."""

import sys
from pathlib import Path

VERSION, FOLDER = "{version}", str(Path(__file__).parent)
sys.path.insert(0, FOLDER)
try:
    import pygpt
finally:
    sys.path.remove(FOLDER)
if pygpt.__version__ != VERSION:
    raise ImportError(
        f"pygpt {{pygpt.__version__}} of {{Path(pygpt.__file__).parent}} is in this process, and this kernel is "
        f"{{VERSION}}; torch.ops.pygpt exists once in a process"
    )

from pygpt.functional import *  # noqa: E402, F403
from pygpt.integrations import hub_layers as layers  # noqa: E402, F401

__all__ = [*pygpt.functional.__all__, "layers", "pygpt"]
'''


def write(folder: Path, cuda: str | None = torch.version.cuda) -> list[Path]:
    """Writes the variants of the compiled libraries at hand to folder/build -> their folders.

    ``cuda`` is the version of CUDA that the CUDA kernels were compiled with, such as "13.0"; without one there is no
    CUDA variant. A variant that is there is replaced. FileNotFoundError without compiled CPU kernels; ValueError for a
    version of another form, or where there are no CUDA kernels for it.
    """
    cpu_library, cuda_library = (importlib.util.find_spec(f"pygpt.{name}") for name in ("_C", "_cuda"))
    if cpu_library is None:
        raise FileNotFoundError("pygpt.integrations.kernels: the CPU kernels were not built; see pygpt info")
    backends = {"cpu": "cpu"}
    if cuda is not None:
        if re.fullmatch(r"\d+\.\d", cuda) is None:
            raise ValueError(f"pygpt.integrations.kernels: cuda must be a version such as 13.0, got {cuda!r}")
        if cuda_library is None:
            raise ValueError("pygpt.integrations.kernels: the CUDA kernels were not built; see pygpt info")
        backends["cuda"] = f"cu{cuda.replace('.', '')}"
    system = f"{platform.machine()}-{platform.system().lower()}"
    build = folder / "build"
    build.mkdir(parents=True, exist_ok=True)
    return [
        _write_variant(build / f"torch-stable-abi{OLDEST_TORCH}-{name}-{system}", device)
        for device, name in backends.items()
    ]


def _write_variant(variant: Path, device: str) -> Path:
    """Writes a variant's folder beside its place and moves it there when it is complete."""
    number = __version__.replace(".", "_")
    metadata = {
        "id": f"pygpt_{device}_{number}", "name": "pygpt", "version": 0, "license": "MIT", "python-depends": [],
        "backend": {"type": device},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".pygpt-", dir=variant.parent) as temporary:
        new = Path(temporary, "new")
        _copy_package(new / "pygpt", with_cuda=device == "cuda")
        (new / "__init__.py").write_text(ENTRY.format(version=__version__))
        (new / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        if variant.exists():
            variant.rename(Path(temporary, "old"))
        new.rename(variant)
    return variant


def _copy_package(to: Path, with_cuda: bool) -> None:
    """The package without its benchmark. In a checkout, its Triton kernels lie beside it."""
    unwanted = ["__pycache__", "bench", "triton_kernels", *([] if with_cuda else ["_cuda.*"])]
    shutil.copytree(Path(__file__).parents[1], to, ignore=shutil.ignore_patterns(*unwanted))
    of_triton: Any = importlib.util.find_spec("pygpt.triton_kernels")
    shutil.copytree(Path(of_triton.origin).parent, to / "triton_kernels", ignore=shutil.ignore_patterns("__pycache__"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pygpt.integrations.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument(
        "--cuda", metavar="VERSION", default=torch.version.cuda,
        help="of CUDA that the CUDA kernels were compiled with (default: torch's, which is %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        variants = write(args.folder, args.cuda)
    except (OSError, ValueError) as e:
        print(f"pygpt: error: {e}", file=sys.stderr)
        return 2
    for variant in variants:
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
