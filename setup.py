"""Builds pygpt/_C.abi3.so, the CPU kernels, and where there is nvcc pygpt/_cuda.abi3.so, the CUDA kernels.

Each library serves every Python >= 3.10 and torch >= 2.10 (limited API, LibTorch stable ABI). CPU kernels are
compiled once per instruction set and chosen when the library is loaded, so nothing is tuned to the machine
that builds. CUDA kernels need no GPU to be built, and no CUDA build of torch.

  PYGPT_BUILD_CUDA=0|1         never | or fail without nvcc; by default if nvcc is found
  PYGPT_CUDA_ARCHS="80 90"     the GPUs to build for, 80 and newer; by default the one that is there, if nvcc knows it,
                               else 80 and 90. Newer ones run the PTX of the last
  MAX_JOBS                     compilers at a time; by default one per core
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU = sorted(p.stem for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if p.stem != "dispatch")  # once per instruction set
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    ISAS["avx512"] = [*ISAS["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")), "-mprefer-vector-width=512"]
    ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
    ISAS["amx"] = [*ISAS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-warning-option",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]


def torch_paths():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(
            "pygpt: building needs torch >= 2.10 in this environment, and the build must see it:\n"
            "  pip install torch && pip install --no-build-isolation ."
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        sys.exit(
            "pygpt: building needs Python's own headers (Python.h), and this Python has none: on Debian or Ubuntu,\n"
            "  apt install python3-dev; on Fedora, dnf install python3-devel"
        )
    if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        sys.exit(f"pygpt: building needs torch >= 2.10, found {torch.__version__}")
    return cpp_extension.include_paths(), cpp_extension.library_paths()


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or where the toolkit is usually installed."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes]
    return next(filter(None, [*places, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)


def cuda_compiler() -> str | None:
    wish = os.environ.get("PYGPT_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"pygpt: PYGPT_BUILD_CUDA must be 0 or 1, got {wish!r}")
    nvcc = None if wish == "0" else find_nvcc()
    if wish == "1" and nvcc is None:
        sys.exit("pygpt: PYGPT_BUILD_CUDA=1, but nvcc is neither in CUDA_HOME/bin, PATH nor /usr/local/cuda/bin")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """Compute capabilities without the point, oldest first."""
    archs = os.environ.get("PYGPT_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").replace(".", "").split()
    if not archs and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        there = found.stdout.replace(".", "").split() if found.returncode == 0 else []
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
        archs = [arch for arch in there if arch.isdigit() and int(arch) >= 80 and f"compute_{arch}" in known]
    if any(not arch.isdigit() or int(arch) < 80 for arch in archs):
        sys.exit(
            f"pygpt: PYGPT_CUDA_ARCHS must be compute capabilities from 80 on, as '80 90', got {' '.join(archs)!r}"
        )
    return sorted(set(archs), key=int) or ["80", "90"]


class BuildKernels(build_ext):
    """setuptools compiles a source once; CPU kernels are compiled once per instruction set, CUDA's by nvcc."""

    def build_extensions(self):
        self.include, self.library = torch_paths()
        self.pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)))
        with self.pool:
            super().build_extensions()

    def build_extension(self, ext):
        build = {"pygpt._C": self.build_cpu, "pygpt._cuda": self.build_cuda}[ext.name]
        try:
            build(ext)
        except Exception as e:  # noqa: BLE001 - a compiler can fail in any way
            advice = (
                "A C++17 compiler is needed (g++ >= 11 or clang >= 11): on Debian or Ubuntu, apt install g++;\n"
                "  on Fedora, dnf install gcc-c++; on macOS, xcode-select --install. CXX=... names another."
                if ext.name == "pygpt._C"
                else "NVCC_CCBIN=... names another host compiler, PYGPT_CUDA_ARCHS other GPUs;\n"
                "  PYGPT_BUILD_CUDA=0 leaves the CUDA kernels out."
            )
            sys.exit(f"pygpt: building {ext.name} failed: {e}\n  {advice}")

    def compile_host(self, source, folder, flags, depends):
        return self.compiler.compile(
            [source], str(Path(self.build_temp) / folder), include_dirs=self.include, extra_postargs=FLAGS + flags,
            depends=depends,
        )  # fmt: skip

    def build_cpu(self, ext):
        jobs = [("csrc/bind_cpu.cpp", "binding", [STABLE]), ("csrc/cpu/dispatch.cpp", "dispatch", [])]
        jobs += [
            (f"csrc/cpu/{op}.cpp", isa, [f"-DPYGPT_ISA={isa}", *flags]) for isa, flags in ISAS.items() for op in CPU
        ]
        found = self.pool.map(lambda job: self.compile_host(*job, ext.depends), jobs)
        ext.extra_objects = [o for objects in found for o in objects]
        ext.library_dirs += self.library
        ext.sources = []
        super().build_extension(ext)

    def build_cuda(self, ext):
        nvcc, archs = NVCC, CUDA_ARCHS
        objects = Path(self.build_temp) / f"cuda-{'-'.join(archs)}"
        objects.mkdir(parents=True, exist_ok=True)
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        code += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        newest = max(Path(name).stat().st_mtime for name in [*ext.depends, "setup.py"])

        def compile_kernels(source):
            result = objects / f"{Path(source).stem}.o"
            if self.force or not result.exists() or result.stat().st_mtime < max(newest, Path(source).stat().st_mtime):
                partial = result.with_suffix(".partial.o")  # an interrupted compiler leaves nothing that looks whole
                subprocess.run([nvcc, *CUDA_FLAGS, *code, "-c", source, "-o", partial], check=True)
                partial.replace(result)
            return str(result)

        flags = [STABLE, f'-DPYGPT_CUDA_ARCHS="{" ".join(archs)}"']
        binding = self.pool.submit(self.compile_host, "csrc/bind_cuda.cpp", objects.name, flags, ext.depends)
        kernels = list(self.pool.map(compile_kernels, sorted(s for s in ext.sources if s.endswith(".cu"))))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [
            *(f"-L{path}" for path in self.library),
            "-Xlinker=--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ]
        partial = target.with_suffix(".partial")
        link = [nvcc, "-shared", "-cudart=static", "-o", partial, *binding.result(), *kernels, *libraries]
        subprocess.run(link, check=True)
        partial.replace(target)


def sources(pattern):
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


extensions = [
    Extension(
        "pygpt._C",
        sources=["csrc/bind_cpu.cpp"],
        depends=sources("csrc/*.h") + sources("csrc/cpu/*.h"),
        libraries=["torch", "torch_cpu", "c10"],
        py_limited_api=True,
        language="c++",
    )
]
NVCC = cuda_compiler()
if NVCC:
    CUDA_ARCHS = cuda_archs(NVCC)
    extensions.append(
        Extension(
            "pygpt._cuda",
            sources=["csrc/bind_cuda.cpp", *sources("csrc/cuda/*.cu")],
            depends=sources("csrc/*.h") + sources("csrc/cuda/*.cuh"),
            py_limited_api=True,
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
