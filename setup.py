"""Builds pygpt/_C.abi3.so, the CPU kernels, and where there is nvcc pygpt/_cuda.abi3.so, the CUDA kernels.

Each library serves every Python >= 3.10 and torch >= 2.10 (limited API, LibTorch stable ABI). CPU kernels are
compiled once per instruction set and chosen when the library is loaded, so nothing is tuned to the machine
that builds. CUDA kernels need no GPU to be built, and no CUDA build of torch.

  PYGPT_BUILD_CUDA=0|1         never | or fail without nvcc; by default if nvcc is found
  PYGPT_CUDA_ARCHS="80 90"     the GPUs to build for, 80 and newer; by default the one that is there, if nvcc knows it,
                               else 80 and 90. 90a is for 9.0 alone, 100f for the family of 10.0. GPUs newer than
                               the newest without such a letter run the PTX of that one
  MAX_JOBS                     compilers at a time; by default one per core
  CXX, CFLAGS, CXXFLAGS        as setuptools takes them; FLAGS below come last and win

Object files stay in build/objects. A source is compiled again when it, a header that it includes or this file is newer
than its object file, or when torch, a compiler, its version or its flags have changed. Libraries are always linked.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OBJECTS = ROOT / "build" / "objects"
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
    "-fno-wrapv",  # Python's flags, which setuptools adds, define signed overflow, at up to 20 % more instructions
    "-fstrict-overflow",  # (docs/measured.md C20). Python 3.12's do it by -fno-strict-overflow, older ones by -fwrapv.
    "-Wall",
    "-Wno-unknown-warning-option",
    "-Wno-unused-command-line-argument",  # clang's, of the second of the two above
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


def jobs() -> int:
    """How many compilers run at a time: MAX_JOBS; one per core where it is not set, or empty."""
    requested = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not re.fullmatch("0*[1-9][0-9]{0,5}", requested.strip(), re.ASCII):
        print(f"pygpt: MAX_JOBS must be a number from 1 on, got {requested!r}", file=sys.stderr)
        sys.exit(2)
    return int(requested)


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or where the toolkit is usually installed."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    of_homes = [shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes]
    return next(filter(None, [*of_homes, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)


def cuda_compiler() -> str | None:
    requested = os.environ.get("PYGPT_BUILD_CUDA", "")
    if requested not in ("", "0", "1"):
        sys.exit(f"pygpt: PYGPT_BUILD_CUDA must be 0 or 1, got {requested!r}")
    nvcc = None if requested == "0" else find_nvcc()
    if requested == "1" and nvcc is None:
        sys.exit("pygpt: PYGPT_BUILD_CUDA=1, but nvcc is neither in CUDA_HOME/bin, PATH nor /usr/local/cuda/bin")
    return nvcc


def split_arch(arch: str) -> tuple[int, str]:
    """ "90a" -> (90, "a"). Archs sort by it."""
    return int(arch.rstrip("af")), arch.lstrip("0123456789")


def known_archs(nvcc: str) -> list[int]:
    """The compute capabilities from 80 on that nvcc compiles for, without the point."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    return sorted(arch for arch in map(int, re.findall(r"compute_(\d+)\b", listed)) if arch >= 80)


def archs_here(known: list[int]) -> list[str]:
    """The archs of this machine's GPUs, from nvidia-smi. Hopper is built as 90a, which has all its instructions."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    listed = re.findall(r"^(\d+)\.(\d)$", result.stdout, re.MULTILINE) if result.returncode == 0 else []
    archs = [major + minor for major, minor in listed if int(major + minor) in known]
    return ["90a" if arch == "90" else arch for arch in archs]


def tools(compiler) -> list:
    """torch and the compilers, with their versions and the variables that they read."""
    import torch

    commands = [compiler.compiler_so, [*shlex.split(os.environ.get("CXX") or "c++")], [find_nvcc() or "no nvcc"]]
    versions = []
    for command in commands:
        try:
            versions.append(subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout)
        except OSError:
            versions.append("")
    variables = [os.environ.get(name) for name in ("CC", "CFLAGS", "CXX", "CXXFLAGS", "CPPFLAGS", "NVCC_CCBIN")]
    return [torch.__version__, variables, find_nvcc(), versions]


def cuda_archs(nvcc: str) -> list[str]:
    """What to compile for, oldest first: compute capabilities without the point, and those with a letter."""
    known = known_archs(nvcc)
    archs = os.environ.get("PYGPT_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").replace(".", "").split()
    for arch in archs:
        number, letter = split_arch(arch) if re.fullmatch(r"[1-9][0-9]+[af]?", arch) else (0, "")
        if number not in known or number < {"": 80, "a": 90, "f": 100}[letter]:
            sys.exit(
                f"pygpt: PYGPT_CUDA_ARCHS must be compute capabilities from 80 on, such as '80 90', got {arch!r}.\n"
                f"  {nvcc} knows {' '.join(map(str, known))}; those from 90 on with an a behind them, too, which is\n"
                "  for that GPU alone, and those from 100 on with an f, for its family"
            )
    return sorted(set(archs or archs_here(known)), key=split_arch) or ["80", "90"]


def cuda_code(archs: list[str]) -> list[str]:
    """The machine code to build, and PTX for later GPUs, which only archs without a letter can give."""
    general = [arch for arch in archs if arch.isdigit()]
    return [*(f"sm_{arch}" for arch in archs), *(f"compute_{arch}" for arch in general[-1:])]


def is_current(result: Path, source: str) -> bool:
    """Whether an object file is newer than this file, its source and the headers, which the compiler has listed."""
    listed = result.with_suffix(".d")
    if not (result.exists() and listed.exists()):
        return False
    names = re.findall(r"(?:\\.|[^\s\\])+", listed.read_text().partition(": ")[2].replace("\\\n", " "))
    names = [re.sub(r"\\(.)", r"\1", name).replace("$$", "$") for name in names]  # as make reads them
    paths = [ROOT / name for name in [*names, "setup.py"]]
    built = result.stat().st_mtime
    return source in names and all(path.exists() and path.stat().st_mtime <= built for path in paths)


class BuildKernels(build_ext):
    """setuptools compiles a source once; CPU kernels are compiled once per instruction set, CUDA's by nvcc."""

    def build_extensions(self):
        self.include, self.library = torch_paths()
        self.tools = tools(self.compiler)
        self.pool = ThreadPoolExecutor(jobs())
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

    def objects(self, jobs) -> list[str]:
        """The object files of the jobs (source, name of a folder, compiler, flags); compiles what is out of date."""
        return list(self.pool.map(lambda job: self.object_file(*job), jobs))

    def object_file(self, source: str, folder: str, compiler: Callable, flags: list[str]) -> str:
        """compiler: a method (source, folder, flags) -> an object file there, with a list of what it was made of."""
        command = repr((self.tools, self.include, self.compiler.include_dirs, flags))
        folder = OBJECTS / f"{folder}-{zlib.crc32(command.encode()):08x}"
        result = folder / Path(source).with_suffix(".o")
        if self.force or not is_current(result, source):
            result.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder) as partial:  # an interrupted compiler leaves no whole object file
                started = time.time()
                new = Path(compiler(source, Path(partial), flags))
                os.utime(new, (started, started))  # what is saved meanwhile is newer
                result.unlink(missing_ok=True)
                new.with_suffix(".d").replace(result.with_suffix(".d"))
                new.replace(result)
        return str(result)

    def host_compiler(self, source: str, folder: Path, flags: list[str]) -> str:
        flags = [*flags, "-MMD"]
        return self.compiler.compile([source], str(folder), include_dirs=self.include, extra_postargs=flags)[0]

    def device_compiler(self, source: str, folder: Path, flags: list[str]) -> Path:
        result = folder / Path(source).with_suffix(".o")
        result.parent.mkdir(parents=True, exist_ok=True)
        listed = ["-MMD", "-MF", result.with_suffix(".d")]
        subprocess.run([NVCC, *flags, *listed, "-c", source, "-o", result], check=True)
        return result

    def kernel_jobs(self, isa: str) -> list:
        flags = [*FLAGS, f"-DPYGPT_ISA={isa}", *ISAS[isa]]
        return [(f"csrc/cpu/{name}.cpp", isa, self.host_compiler, flags) for name in CPU]

    def build_cpu(self, ext):
        jobs = [
            ("csrc/bind/bind_cpu.cpp", "binding", self.host_compiler, [*FLAGS, STABLE]),
            (DISPATCH, "dispatch", self.host_compiler, FLAGS),
        ]
        jobs += [job for isa in ISAS for job in self.kernel_jobs(isa)]
        ext.extra_objects = ext.depends = self.objects(jobs)
        ext.library_dirs += self.library
        ext.sources = []
        forced, self.force = self.force, True  # the last library may be newer, but of other object files
        super().build_extension(ext)
        self.force = forced

    def build_cuda(self, ext):
        code = cuda_code(CUDA_ARCHS)
        targets = [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in code]
        host_flags = [*FLAGS, STABLE, f'-DPYGPT_CUDA_CODE="{" ".join(code)}"']
        device_flags = [*CUDA_FLAGS, *targets]
        jobs = [("csrc/bind/bind_cuda.cpp", "binding", self.host_compiler, host_flags)]
        jobs += [
            (source, "cuda", self.device_compiler, device_flags) for source in ext.sources if source.endswith(".cu")
        ]
        objects = self.objects(jobs)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        paths = [f"-L{path}" for path in self.library]
        libraries = ["-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        subprocess.run([NVCC, "-shared", "-cudart=static", "-o", partial, *objects, *paths, *libraries], check=True)
        partial.replace(target)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


DISPATCH = "csrc/cpu/dispatch.cpp"
CPU = [  # what is compiled once per instruction set: names under csrc/cpu
    name.removeprefix("csrc/cpu/").removesuffix(".cpp") for name in sources("csrc/cpu/**/*.cpp") if name != DISPATCH
]

if __name__ == "__main__":  # a test imports what is above
    extensions = [
        Extension(
            "pygpt._C",
            sources=["csrc/bind/bind_cpu.cpp"],
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
                sources=["csrc/bind/bind_cuda.cpp", *sources("csrc/cuda/**/*.cu")],
                py_limited_api=True,
            )
        )

    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
