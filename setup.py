"""Builds pygpt/_C.abi3.so: every kernel of csrc/cpu once per instruction set, and the binding.

One library serves every Python >= 3.10 and torch >= 2.10 (limited API, LibTorch stable ABI); the
instruction set is chosen when it is loaded, so nothing is tuned to the machine that builds.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU = ("attention", "mlp", "norm", "activation", "peak")
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    ISAS["avx512"] = [*ISAS["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")), "-mprefer-vector-width=512"]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
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
    if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        sys.exit(f"pygpt: building needs torch >= 2.10, found {torch.__version__}")
    return cpp_extension.include_paths(), cpp_extension.library_paths()


class BuildKernels(build_ext):
    """setuptools compiles a source once; kernels are compiled once per instruction set, in parallel."""

    def build_extension(self, ext):
        include, library = torch_paths()
        ext.library_dirs += library
        objects = Path(self.build_temp)
        jobs = [("csrc/bind_cpu.cpp", "binding", ["-DTORCH_TARGET_VERSION=0x020a000000000000"])]
        jobs += [("csrc/cpu/dispatch.cpp", "dispatch", [])]
        jobs += [
            (f"csrc/cpu/{op}.cpp", isa, [f"-DPYGPT_ISA={isa}", *flags]) for isa, flags in ISAS.items() for op in CPU
        ]

        def compile_one(job):
            source, folder, flags = job
            return self.compiler.compile(
                [source], str(objects / folder), include_dirs=include, extra_postargs=FLAGS + flags, depends=ext.depends
            )

        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        try:
            with ThreadPoolExecutor(workers) as pool:
                ext.extra_objects = [o for found in pool.map(compile_one, jobs) for o in found]
            ext.sources = []
            super().build_extension(ext)
        except Exception as e:
            sys.exit(
                f"pygpt: building the kernels failed: {e}\n"
                "  A C++17 compiler is needed (g++ >= 9 or clang >= 11): on Debian or Ubuntu, apt install g++;\n"
                "  on Fedora, dnf install gcc-c++; on macOS, xcode-select --install. CXX=... names another."
            )


extension = Extension(
    "pygpt._C",
    sources=["csrc/bind_cpu.cpp"],
    depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")],
    libraries=["torch", "torch_cpu", "c10"],
    py_limited_api=True,
    language="c++",
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
