"""Builds the emulator with the kernels of csrc/cuda, and imports it.

`load()` returns the Python module pygpt_emulator, whose import registers torch.ops.pygpt_emulator.*. `load_tests(file)`
returns the same module with the kernels of other .cu files instead, without torch; they are called through ctypes.
ninja compiles what has changed since the last build.

With sanitizer="undefined" an error stops the launch like any other error. The sanitizers "address" and "thread" must be
in the process from its start: run Python with `environment(sanitizer)`.
"""

import ctypes
import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "emulator"
CXX = os.environ.get("CXX", "c++")

# -ffp-contract=off: the compiler must not fuse a * b + c where the source has two operations.
FLAGS = "-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -march=native"
EXTRA_FLAGS = os.environ.get("PYGPT_EMULATOR_FLAGS", "")  # such as -O0, for a debugger
WARNINGS = "-Wall -Wno-unknown-pragmas -Wno-maybe-uninitialized -Wno-attributes"
KERNEL_FLAGS = "-fstack-clash-protection"  # a stack frame larger than the guard page faults too
MACHINE_FLAGS = "-O3 -fno-tree-loop-distribute-patterns"  # loops must not become memset, which sanitizers intercept

# Without a name, misaligned vectors are an error of the launch: x86 itself takes many of them.
SANITIZERS = {  # name: (flags of the kernels, flags of the machine, which is told of the sanitizer but not checked)
    None: ("-fsanitize=alignment", ""),
    "contracted": ("-fsanitize=alignment -ffp-contract=fast", ""),  # a * b + c is fused wherever the compiler can
    "undefined": ("-fsanitize=bounds-strict,alignment", ""),
    "address": ("-fsanitize=address", "-DPYGPT_ADDRESS_SANITIZER"),
    "thread": ("-fsanitize=thread", "-DPYGPT_THREAD_SANITIZER"),
}
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}


def environment(sanitizer: str) -> dict[str, str]:
    """The environment variables that a Python process needs for load(sanitizer)."""
    if sanitizer not in LIBRARIES:
        return {}
    job = [CXX, f"-print-file-name={LIBRARIES[sanitizer]}"]
    library = subprocess.run(job, capture_output=True, text=True, check=True).stdout.strip()
    options = {
        "address": {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
        "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:suppress_equal_addresses=0"},
    }[sanitizer]
    return {"LD_PRELOAD": os.path.realpath(library), **options}


def _missing_preload(sanitizer: str | None) -> None:
    library = LIBRARIES.get(sanitizer)
    if library and library.removesuffix(".so") not in Path("/proc/self/maps").read_text():
        variables = " ".join(f"{k}={v}" for k, v in environment(sanitizer).items())
        raise RuntimeError(f"the {sanitizer} sanitizer must be loaded before Python: start it with {variables}")


@contextmanager
def _locked(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _includes(torch: bool) -> str:
    import pybind11

    folders = [sysconfig.get_paths()["include"], pybind11.get_include()]
    if torch:
        from torch.utils import cpp_extension

        folders = cpp_extension.include_paths()
    return " ".join(f"-isystem {shlex.quote(f)}" for f in folders)


def _torch_libraries() -> str:
    from torch.utils import cpp_extension

    (folder, *_) = cpp_extension.library_paths()
    return f"-L{shlex.quote(folder)} -Wl,-rpath,{shlex.quote(folder)} -ltorch -ltorch_cpu -lc10"


def _compile(source: Path, sanitizer: str | None) -> tuple[str, str]:
    """The name of a source's object file, and its own compiler flags. Builds share objects whose flags are equal."""
    kernel_flags, machine_flags = SANITIZERS[sanitizer]
    if source.suffix == ".cu":
        inside = source.relative_to(KERNELS) if source.is_relative_to(KERNELS) else Path(source.name)
        name = "-".join(inside.with_suffix("").parts)
        return f"{sanitizer or 'plain'}-{name}.o", f"{KERNEL_FLAGS} {kernel_flags} {machine_flags}"
    flags = {
        "module.cpp": f"-O1 -g0 {_includes(torch=False)}",
        "ops.cpp": f"-O1 -DTORCH_TARGET_VERSION=0x020a000000000000 {_includes(torch=True)}",
    }
    name = f"{sanitizer if machine_flags else 'plain'}-{source.stem}.o"
    return name, f"{flags.get(source.name, MACHINE_FLAGS)} {machine_flags}"


def _ninja_file(name: str, sources: list[Path], sanitizer: str | None, arch: int, libraries: str) -> str:
    compiled = {source: _compile(source, sanitizer) for source in sources}
    return "\n".join(
        [
            f"cxx = {CXX}",
            f"flags = {FLAGS} {WARNINGS} -I{HERE} -I{KERNELS} -DPYGPT_ARCH={arch}",
            f"last = {EXTRA_FLAGS}",
            "rule compile",
            "  command = $cxx $flags $more $last -MMD -MF $out.d -x c++ -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared $in -o $out $libraries",
            *(f"build {out}: compile {source}\n  more = {more}" for source, (out, more) in compiled.items()),
            f"build {name}: link {' '.join(out for out, _ in compiled.values())}",
            f"  libraries = {libraries}",
            "",
        ]
    )


def _build(name: str, sources: list[Path], sanitizer: str | None, arch: int, libraries: str = "") -> Path:
    folder = BUILD / f"sm_{arch // 10}"
    name = f"{sanitizer or 'plain'}-{name}.so"
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    with _locked(folder):
        (folder / f"{name}.ninja").write_text(_ninja_file(name, sources, sanitizer, arch, libraries))
        job = [ninja, "-C", str(folder), "-f", f"{name}.ninja", name]
        done = subprocess.run(job, capture_output=True, text=True, check=False, env={**os.environ, "LD_PRELOAD": ""})
    if done.returncode:
        raise RuntimeError(f"building the emulator failed:\n{done.stdout}{done.stderr}")
    return folder / name


def _import(path: Path):
    # Each build needs a module name of its own: for a name that it has seen, pybind11 returns the earlier module.
    loader = importlib.machinery.ExtensionFileLoader(f"{path.stem}.pygpt_emulator", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def _machine() -> list[Path]:
    return sorted(p for p in HERE.glob("*.cpp") if p.name != "ops.cpp")


@functools.cache
def load(sanitizer: str | None = None, kernels: tuple[str, ...] | None = None, arch: int = 900):
    """The kernels of csrc/cuda, or of the named files, as torch.ops.pygpt_emulator.*; once per process."""
    from pygpt.backends import define_ops  # this also imports torch, to which the module is linked

    _missing_preload(sanitizer)
    define_ops("pygpt_emulator")
    files = sorted(KERNELS.rglob("*.cu")) if kernels is None else [KERNELS / f"{k}.cu" for k in kernels]
    name = "-".join(["kernels", *(kernels or ())]).replace("/", "-")
    return _import(_build(name, [*files, *_machine(), HERE / "ops.cpp"], sanitizer, arch, _torch_libraries()))


@functools.cache
def load_tests(*files: str | Path, sanitizer: str | None = None, arch: int = 900):
    """The kernels of .cu files (of this folder, unless given as paths), without torch. Returns a module whose
    `library` is the ctypes.CDLL."""
    _missing_preload(sanitizer)
    sources = [(HERE / f).with_suffix(".cu") for f in files]
    name = "-".join(source.stem for source in sources)
    module = _import(_build(name, [*sources, *_machine()], sanitizer, arch))
    module.library = ctypes.CDLL(module.__file__)
    return module
