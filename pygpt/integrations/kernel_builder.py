"""The sources that Hugging Face's kernel-builder compiles: `python -m pygpt.integrations.kernels FOLDER --sources`.

    build.toml                  which sources there are, with the flags that setup.py gives them
    flake.nix                   what Nix reads first
    csrc/                       the sources
    torch-ext/pygpt_kernels/    what Python imports

kernel-builder makes one library of each variant. Its CMake compiles a source once, so a CPU kernel, which we compile
once per instruction set, has a copy for each: csrc/cpu/norm.avx2.cpp and so on for csrc/cpu/norm.cpp. The instruction
sets are those of the architecture that this runs on. The library of the CUDA variant holds the CPU kernels, too.

kernel-builder checks the layout and the library: nothing in torch-ext/pygpt_kernels has that name again, and the
library needs no more than the stable ABI of Python 3.9 and of the torch that build.toml names.
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from .. import __version__
from .kernels import OLDEST_TORCH, OWNER, write_package

ROOT = Path(__file__).parents[2]
ARCHS = ["80", "90"]  # with PTX of the last one for newer GPUs
BINDING = """#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""
FLAKE = """{
  description = "pygpt";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs {
    inherit self;
    path = ./.;
  };
}
"""
GENERAL = """# Written by python -m pygpt.integrations.kernels, from setup.py of pygpt {version}.
[general]
name = "pygpt-kernels"
version = 0
edition = 5
license = "MIT"
backends = ["cpu", "cuda"]

[torch]
src = ["torch-ext/binding.cpp"]

[torch.stable-abi]
cpu = "{stable}"
cuda = "{stable}"
"""


def write(folder: Path) -> Path:
    """Writes the sources to ``folder``, which is new or empty, and returns its build.toml.

    FileNotFoundError outside of a checkout; FileExistsError if there is anything in the folder.
    """
    if not (ROOT / "csrc").is_dir():
        raise FileNotFoundError(f"{OWNER}: the sources are in a checkout of pygpt, not in {ROOT}")
    setup = _setup()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{OWNER}: {folder} is not empty")
    with tempfile.TemporaryDirectory(prefix=".pygpt-", dir=folder) as temporary:
        new = Path(temporary)
        build = _write_csrc(new / "csrc", setup)
        write_package(new / "torch-ext" / "pygpt_kernels", without=("_C.*", "_cuda.*"))
        (new / "torch-ext" / "binding.cpp").write_text(BINDING)
        (new / "flake.nix").write_text(FLAKE)
        (new / "build.toml").write_text(build)
        for name in ("csrc", "torch-ext", "flake.nix", "build.toml"):
            (new / name).rename(folder / name)
    return folder / "build.toml"


def _setup() -> ModuleType:
    """setup.py, which knows the flags and instruction sets."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


def _write_csrc(to: Path, setup: ModuleType) -> str:
    """Copies the sources and returns the text of build.toml."""

    def copy(path: str, name: str = "", before: str = "") -> str:
        target = to / Path(path).relative_to("csrc").with_name(name or Path(path).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(before + (ROOT / path).read_text())
        return str(target.relative_to(to.parent))

    code = " ".join(setup.cuda_code(ARCHS))
    headers = [copy(path) for path in setup.sources("csrc/**/*.h", "csrc/**/*.cuh")]
    binding = [copy("csrc/bind/bind_cpu.cpp"), copy(setup.DISPATCH), *headers]
    of_cuda = [copy("csrc/bind/bind_cuda.cpp", before=f'#define PYGPT_CUDA_CODE "{code}"\n')]
    of_cuda += [copy(path) for path in setup.sources("csrc/cuda/**/*.cu")]
    kernels = {
        isa: [copy(f"csrc/cpu/{name}.cpp", f"{Path(name).name}.{isa}.cpp") for name in setup.CPU] for isa in setup.ISAS
    }
    sections = []
    archs = [f"{arch[:-1]}.{arch[-1]}" for arch in ARCHS]
    of_backend = {"cpu": {}, "cuda": {"cuda_capabilities": [*archs[:-1], f"{archs[-1]}+PTX"]}}
    for backend, options in of_backend.items():
        sections.append(_section(f"{backend}_binding", backend, binding, cxx_flags=setup.FLAGS, **options))
        for isa, flags in setup.ISAS.items():
            flags = [*setup.FLAGS, f"-DPYGPT_ISA={isa}", *flags]
            sections.append(_section(f"{backend}_{isa}", backend, kernels[isa], cxx_flags=flags, **options))
    flags = {"cxx_flags": setup.FLAGS, "cuda_flags": setup.CUDA_FLAGS}
    sections.append(_section("cuda", "cuda", of_cuda, **flags, **of_backend["cuda"]))
    return "\n".join([GENERAL.format(version=__version__, stable=OLDEST_TORCH), *sections])


def _section(name: str, backend: str, sources: Iterable[str], **options: list[str]) -> str:
    """One [kernel.<name>] of build.toml. A JSON string, or list of strings, is one of TOML."""
    entries = {"backend": backend, "depends": ["torch"], **options, "src": list(sources)}
    lines = (f"{key.replace('_', '-')} = {json.dumps(value, indent=2)}" for key, value in entries.items())
    return "\n".join([f"[kernel.{name}]", *lines, ""])
