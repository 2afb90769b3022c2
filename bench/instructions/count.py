"""Counts what the CPU kernels execute: `python -m bench.instructions`, a guard against slow-downs without a clock.

driver.cpp calls every kernel at small fixed shapes on one thread; valgrind's callgrind counts the instructions of
each call. The kernels are the library's own object files, so that what is counted is what ships. A busy machine
changes nothing: one compiler's code gives the same counts in every run. They are held against figures.json, which
has figures per compiler (by major version) and instruction set. Exit code 1 where a case executes more than MARGIN
above its figure, or has none; where the figures lack the compiler, nothing is held.

The margin is such that one instruction more in a step of the GEMM's inner loop fails (docs/measured.md B1).
Instructions are not time: cache misses, long latencies and threads are for the benchmarks to find, and so is AVX-512,
which valgrind does not know.
"""

import argparse
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from pygpt.files import atomic
from pygpt.progress import table as aligned

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("driver.cpp")
FIGURES = Path(__file__).with_name("figures.json")
CXX = shlex.split(os.environ.get("CXX") or "g++")
MARGIN = 0.02


@dataclass(frozen=True)
class Case:
    name: str
    work: int  # multiply-adds of attention, linear and mlp; elements of the others
    instructions: int


def missing() -> str:
    """Says why nothing can be counted here; empty if it can."""
    if sys.platform != "linux" or not (ROOT / "setup.py").exists():
        return "instructions are counted on Linux, in a checkout"
    tools = [tool for tool in ("valgrind", CXX[0]) if not shutil.which(tool)]
    tools += [] if find_spec("setuptools") else ["setuptools"]
    return f"counting instructions needs {' and '.join(tools)}" if tools else ""


def recipe() -> SimpleNamespace:
    """setup.py's names, such as FLAGS and ISAS."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def instruction_set(isas: dict[str, list[str]]) -> str:
    """The last that this machine has and valgrind knows."""
    has = set(Path("/proc/cpuinfo").read_text().split())
    known = {isa: flags for isa, flags in isas.items() if not isa.startswith(("avx512", "amx"))}
    return [isa for isa, flags in known.items() if has.issuperset(f[2:] for f in flags)][-1]


def target() -> str:
    """What figures depend on, such as "g++ 12 x86_64 avx2"."""
    macros = subprocess.run([*CXX, "-dM", "-E", "-xc++", os.devnull], capture_output=True, text=True, check=True).stdout
    majors = dict(re.findall(r"(__clang_major__|__GNUC__) (\d+)", macros))  # clang defines both
    name, major = ("clang", majors["__clang_major__"]) if "__clang_major__" in majors else ("g++", majors["__GNUC__"])
    return f"{name} {major} {platform.machine()} {instruction_set(recipe().ISAS)}"


def build(folder: Path, *more: str) -> Path:
    """The driver with the library's kernels of the instruction set that is counted.

    With ``more``, which are further flags, the kernels are compiled anew.
    """
    isa = instruction_set(recipe().ISAS)
    return build_program(folder, DRIVER, isa, *more, kernels=() if more else kernels_of_library(isa))


def kernels_of_library(isa: str) -> list[Path]:
    """The object files of the library's kernels of one instruction set. setup.py compiles what is out of date."""
    from setuptools import Distribution, Extension

    setup, files = recipe(), []

    class Kernels(setup.BuildKernels):
        def build_extension(self, ext):
            files.extend(map(Path, self.objects(self.kernel_jobs(isa))))

    command = Kernels(Distribution({"ext_modules": [Extension("pygpt._C", [])]}))
    command.ensure_finalized()
    command.run()
    return files


def build_program(folder: Path, driver: Path, isa: str, *more: str, compiler=CXX, link=(), kernels=()) -> Path:
    """A program without torch: the driver with the kernels of one instruction set.

    Compiles the driver, and the kernels unless their object files are given, with setup.py's flags and then ``more``,
    without the flags of the Python that runs it.
    """
    setup = recipe()
    flags = [*setup.FLAGS, f"-DPYGPT_ISA={isa}", *setup.ISAS[isa], *more]

    def compiled(source: Path) -> Path:
        result = folder / f"{source.stem}.o"
        subprocess.run([*compiler, *flags, "-c", source, "-o", result], check=True)
        return result

    sources = [driver] if kernels else [*(ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in setup.CPU), driver]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [*kernels, *pool.map(compiled, sources)]
    subprocess.run([*compiler, *link, *objects, "-o", folder / driver.stem], check=True)
    return folder / driver.stem


def count(driver: Path, part: str = "") -> list[Case]:
    """The cases whose name contains ``part``. Alone, one may differ by some instructions: its memory lies elsewhere."""
    profile = driver.with_suffix(".callgrind")
    tool = ["valgrind", "-q", "--tool=callgrind", "--toggle-collect=counted", "--dump-after=counted"]
    tool += ["--combine-dumps=yes", f"--callgrind-out-file={profile}"]
    printed = subprocess.run([*tool, driver, part], stdout=subprocess.PIPE, text=True, check=True).stdout
    *totals, rest = re.findall(r"^totals: (\d+)", profile.read_text(), re.MULTILINE)  # a dump per case, and the end's
    profile.unlink()
    if int(rest):
        raise RuntimeError("callgrind did not take counted() for what it is")
    lines = (line.split("\t") for line in printed.splitlines())
    return [Case(name, int(work), int(total)) for (name, work), total in zip(lines, totals, strict=True)]


def figures() -> dict[str, dict[str, int]]:
    """Committed: {target: {case: instructions}}."""
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def save(key: str, cases: list[Case]) -> None:
    """Replaces the figures of one target."""
    text = json.dumps(figures() | {key: {case.name: case.instructions for case in cases}}, indent=1, sort_keys=True)
    with atomic(FIGURES) as path:
        path.write_text(text + "\n")


def verdict(case: Case, committed: dict[str, int]) -> str:
    if case.name not in committed:
        return "NO FIGURE"
    ratio = case.instructions / committed[case.name]
    return "SLOWER" if ratio > 1 + MARGIN else "faster" if ratio < 1 - MARGIN else ""


def faults(cases: list[Case], committed: dict[str, int]) -> list[str]:
    """What the guard objects to: cases that became slower, or are on one side only."""
    bad = [f"{case.name}: {word}" for case in cases if (word := verdict(case, committed)).isupper()]
    return bad + [f"{name}: GONE" for name in committed.keys() - {case.name for case in cases}]


def table(cases: list[Case], committed: dict[str, int]) -> str:
    lines = []
    for case in cases:
        figure = committed.get(case.name)
        before = (f"{figure:,}", f"{case.instructions / figure:.3f}") if figure else ("-", "-")
        word = verdict(case, committed) if committed else ""
        lines.append((case.name, f"{case.instructions:,}", *before, f"{case.instructions / case.work:.2f}", word))
    figures = ("instructions", "committed", "ratio", "per multiply-add or element")
    return aligned({"case": "<", **dict.fromkeys(figures, ">"), "": "<"}, lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.split("\n\n")[0])
    parser.add_argument("part", nargs="?", default="", help="only cases with this in their name: 'mlp_fwd bf16'")
    parser.add_argument("--save", action="store_true", help=f"write the counts to {FIGURES.name}, for this compiler")
    options = parser.parse_args(arguments)
    if why := missing():
        parser.error(why)
    if options.save and options.part:
        parser.error("--save takes all cases")
    key = target()
    with TemporaryDirectory() as folder:
        cases = count(build(Path(folder)), options.part)
    if not cases:
        parser.error(f"no case is called {options.part!r}")
    every = figures()
    committed = {name: figure for name, figure in every.get(key, {}).items() if options.part in name}
    print(f"{key}\n{table(cases, committed)}\n")
    if options.save:
        save(key, cases)
        print(f"written to {FIGURES}")
        return 0
    if key not in every:
        print(f"{FIGURES.name} has no figures of {key}, so that nothing is held: record them with --save")
        return 0
    if any(verdict(case, committed) == "faster" for case in cases):
        print("Some became faster: keep it so with --save")
    bad = faults(cases, committed)
    print("\n".join(bad) or f"{len(cases)} cases, none above {MARGIN:.0%}")
    return 1 if bad else 0
