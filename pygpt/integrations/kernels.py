"""The folder that Hugging Face's loader `kernels` takes: `python -m pygpt.integrations.kernels FOLDER` writes it.

The loader looks in FOLDER/build for the variant that fits the machine. A variant is named after the oldest torch whose
stable ABI it needs, the device and the platform, such as torch-stable-abi210-cpu-x86_64-linux. Ours holds

    metadata.json   what the loader reads first
    __init__.py     what it imports; this imports the copy of pygpt beside it
    pygpt/          this package with its compiled libraries

The CUDA variant holds the CPU kernels, too. torch.ops.pygpt exists once in a process, so a second version of pygpt is
refused with an ImportError. The same version, imported already and with its kernels, is taken instead of the copy.
"""

import argparse
import importlib.util
import json
import platform
import re
import shutil
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import cast

import torch

from .. import __version__

OWNER = "pygpt.integrations.kernels"
OLDEST_TORCH = "2.10"  # the stable ABI that csrc/ is written against
ENTRY = '''"""pygpt {version}: fused GPT kernels for PyTorch, as the package kernels loads them."""

import sys
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path

VERSION, FOLDER = "{version}", Path(__file__).parent
libraries = [path.name.partition(".")[0] for path in FOLDER.glob("pygpt/_*.so")]
for path in FOLDER.glob("_pygpt_kernels_*.so"):  # kernel-builder's: one library with all of ours
    libraries = ["_C", "_cuda"] if path.name.startswith("_pygpt_kernels_cuda_") else ["_C"]
    for name in libraries if "pygpt" not in sys.modules else []:
        loader = ExtensionFileLoader(f"pygpt.{{name}}", str(path))
        sys.modules[loader.name] = module_from_spec(spec_from_loader(loader.name, loader))
        loader.exec_module(sys.modules[loader.name])
sys.path.insert(0, str(FOLDER))
try:
    import pygpt
finally:
    sys.path.remove(str(FOLDER))
missing = [name for name in libraries if find_spec(f"pygpt.{{name}}") is None]
if pygpt.__version__ != VERSION or missing:
    raise ImportError(
        f"pygpt {{pygpt.__version__}} of {{Path(pygpt.__file__).parent}} is in this process"
        + (f", without its library {{missing[0]}}" if missing else "")
        + f"; this kernel is {{VERSION}}, and torch.ops.pygpt exists once in a process"
    )

import_module("pygpt._C")  # the error of a library that does not load: without it, PyTorch would serve

from pygpt.functional import *  # noqa: E402, F403
from pygpt.integrations import hub_layers as layers  # noqa: E402, F401

__all__ = [*pygpt.functional.__all__, "layers", "pygpt"]
'''


def has_cuda() -> bool:
    return importlib.util.find_spec("pygpt._cuda") is not None


def write(folder: Path, cuda: str | None = None) -> list[Path]:
    """Writes the variants of the compiled libraries at hand to folder/build -> their folders.

    ``cuda`` is the version of CUDA that the CUDA kernels were compiled with, such as "13.0", by default torch's. Where
    there are no CUDA kernels, or neither names a version, there is no CUDA variant. An old variant is replaced.
    FileNotFoundError without compiled CPU kernels; ValueError for a version of another form, or without CUDA kernels.
    """
    if cuda is not None and re.fullmatch(r"[0-9]+\.[0-9]", cuda) is None:
        raise ValueError(f"{OWNER}: cuda must be a version such as 13.0, got {cuda!r}")
    if cuda is not None and not has_cuda():
        raise ValueError(f"{OWNER}: the CUDA kernels were not built; see pygpt info")
    if importlib.util.find_spec("pygpt._C") is None:
        raise FileNotFoundError(f"{OWNER}: the CPU kernels were not built; see pygpt info")
    backends, version = {"cpu": "cpu"}, cuda or (torch.version.cuda if has_cuda() else None)
    if version is not None:
        backends["cuda"] = f"cu{version.replace('.', '')}"
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())  # the loader's names
    system = f"{machine}-{platform.system().lower()}"
    build = folder / "build"
    build.mkdir(parents=True, exist_ok=True)
    return [
        _write_variant(build / f"torch-stable-abi{OLDEST_TORCH.replace('.', '')}-{name}-{system}", device)
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
        write_package(new, without=() if device == "cuda" else ("_cuda.*",))
        (new / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        old = Path(temporary, "old")
        if variant.exists():
            variant.rename(old)
        try:
            new.rename(variant)
        except OSError:
            if old.exists():
                old.rename(variant)
            raise
    return variant


def write_package(folder: Path, without: tuple[str, ...]) -> None:
    """What Python imports: the package, but for its benchmark and the files ``without``, and `ENTRY` beside it.

    In a checkout, the Triton kernels lie beside the package; here they are in it.
    """
    package, of_triton = folder / "pygpt", cast(ModuleSpec, importlib.util.find_spec("pygpt.triton_kernels"))
    unwanted = ("__pycache__", "bench", "triton_kernels", *without)
    shutil.copytree(Path(__file__).parents[1], package, ignore=shutil.ignore_patterns(*unwanted))
    triton = Path(cast(str, of_triton.origin)).parent
    shutil.copytree(triton, package / "triton_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__init__.py").write_text(ENTRY.format(version=__version__))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pygpt.integrations.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cuda", metavar="VERSION", help="of CUDA, for the CUDA kernels (default: torch's)")
    kind.add_argument("--sources", action="store_true", help="write what kernel-builder builds from, in a checkout")
    args = parser.parse_args()
    try:
        if args.sources:
            from . import kernel_builder

            print(kernel_builder.write(args.folder))
            return 0
        variants = write(args.folder, args.cuda)
    except (ImportError, OSError, ValueError) as e:
        print(f"pygpt: error: {str(e).removeprefix(OWNER + ': ')}", file=sys.stderr)
        return 2
    for variant in variants:
        print(variant)
    if has_cuda() and len(variants) == 1:
        print("pygpt: wrote the CPU kernels alone; with --cuda VERSION, the CUDA kernels too", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
