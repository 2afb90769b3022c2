"""Plants the faults of mutants.py, one at a time, in a copy of the tree, and tells which of them the tests notice.

    python -m tests.mutate                   all of them
    python -m tests.mutate cuda "one warp"   those whose name contains one of these
    python -m tests.mutate --list

The tests that must notice a fault have to pass without it first. What a fault changes is rebuilt: the emulator for a
file of csrc/cuda; the CPU library, of one instruction set, for a file of csrc/cpu or csrc/bind; nothing for Python.
Exit code 1 if a fault survives, 2 if one cannot be planted or judged.
"""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "c++")
NOTICED, SURVIVED = 1, 0  # pytest's exit codes: tests failed, all passed; a crash has a negative one


class Broken(Exception):
    """A fault that cannot be planted, built or judged."""


def place(mutant: Mutant, tree: Path) -> tuple[Path, str]:
    """The file that has the mutant's line, which must be there once, and the file's text with the fault."""
    texts = {path: path.read_text() for path in sorted(tree.glob(mutant.file))}
    counts = {path: len(re.findall(mutant.old, text, re.MULTILINE)) for path, text in texts.items()}
    if sum(counts.values()) != 1:
        raise Broken(f"{mutant.name}: {mutant.file} has {sum(counts.values())} times {mutant.old!r}")
    path = max(counts, key=counts.get)
    return path, re.sub(mutant.old, mutant.new, texts[path], flags=re.MULTILINE)


def copy_tree(to: Path) -> None:
    """Every file of the checkout that git knows or does not ignore, and the built libraries."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    libraries = [str(path.relative_to(ROOT)) for path in (ROOT / "pygpt").glob("*.so")]
    for name in filter(None, (*names, *libraries)):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


# ------------------------------------------------------------------------------- the CPU library
def _one_instruction_set(tree: Path, setup) -> list[str]:
    """Leaves csrc/cpu with one table of kernels, called baseline. Returns the flags to compile it with."""
    file = tree / "csrc" / "cpu" / "dispatch.cpp"
    file.write_text(file.read_text().replace("#if defined(__x86_64__)", "#if 0"))
    has = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    avx2 = setup["ISAS"].get("avx2", [])
    return avx2 if has.issuperset(flag.removeprefix("-m") for flag in avx2) else []


def cpu_library(tree: Path) -> None:
    """Writes the ninja file of pygpt/_C with the kernels of one instruction set."""
    from torch.utils import cpp_extension

    setup = runpy.run_path(str(tree / "setup.py"), run_name="setup")
    isa = _one_instruction_set(tree, setup)
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    flags = [
        *setup["FLAGS"],
        "-O2",  # below that GCC fuses no products and sums
        "-fPIC",
        *(f"-isystem{folder}" for folder in includes),
        "-DPy_LIMITED_API=0x030a0000",
    ]
    sources = {"csrc/bind/bind_cpu.cpp": [setup["STABLE"]], "csrc/cpu/dispatch.cpp": []}
    sources |= {f"csrc/cpu/{name}.cpp": ["-DPYGPT_ISA=baseline", *isa] for name in setup["CPU"]}
    compiled = [
        f"build build/one/{Path(source).stem}.o: compile {source}\n  more = {' '.join(more)}"
        for source, more in sources.items()
    ]
    objects = " ".join(f"build/one/{Path(source).stem}.o" for source in sources)
    (tree / "cpu.ninja").write_text("\n".join([
        "rule compile",
        f"  command = {CXX} {' '.join(flags)} $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {CXX} -shared $in -o $out {' '.join(libraries)} -ltorch -ltorch_cpu -lc10",
        *compiled, f"build pygpt/_C.abi3.so: link {objects}", "",
    ]))  # fmt: skip


def build_cpu(tree: Path) -> None:
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    done = subprocess.run([ninja, "-f", "cpu.ninja"], cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Broken(f"the CPU library does not build:\n{done.stdout[-3000:]}")


# ------------------------------------------------------------------------------- as a plugin of pytest
def pytest_addoption(parser):
    parser.addoption(
        "--only", action="append", default=[], help="words, with | between, that a test's name must contain"
    )


def pytest_collection_modifyitems(config, items):
    """Leaves the tests that one of the options names. (-k does not take the signs in the names of parameters.)"""
    kept = []
    for words in config.getoption("only"):
        named = [item for item in items if all(word in item.nodeid for word in words.split("|"))]
        if not named:
            raise pytest.UsageError(f"no test's name contains {words.replace('|', ' and ')}")
        kept += named
    items[:] = dict.fromkeys(kept)


# ------------------------------------------------------------------------------- planting and judging
def run_tests(tree: Path, *tests: tuple[str, ...]) -> subprocess.CompletedProcess:
    # no cache: a file changed twice within a second would be taken for unchanged
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "PYGPT_CPU_CAPABILITY": ""}
    environment |= {"PYGPT_EMULATOR_FLAGS": "-O1", "PYGPT_TEST_SEED": "1"}  # compiles faster; the same in every run
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "tests.mutate", "-p", "no:cacheprovider"]
    command += [*dict.fromkeys(words[0] for words in tests), *(f"--only={'|'.join(words)}" for words in tests)]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def judge(mutant: Mutant, tree: Path) -> bool:
    """Whether the mutant's tests notice it."""
    file, wrong = place(mutant, tree)
    right = file.read_text()
    file.write_text(wrong)
    try:
        if mutant.builds_cpu_library:
            build_cpu(tree)
        done = run_tests(tree, mutant.tests)
    finally:
        file.write_text(right)
    if "building the emulator failed" in done.stdout:
        raise Broken(f"{mutant.name}: the emulator does not build:\n{done.stdout[-3000:]}")
    if done.returncode not in (NOTICED, SURVIVED) and done.returncode > 0:
        raise Broken(f"{mutant.name}: pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return done.returncode != SURVIVED


def check_unchanged(mutants, tree: Path) -> None:
    """Without a fault, every test that is to notice one passes."""
    done = run_tests(tree, *dict.fromkeys(mutant.tests for mutant in mutants))
    if done.returncode:
        raise Broken(f"tests fail without a fault:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")


def run(mutants: list[Mutant], out=print) -> list[Mutant]:
    """Those of the mutants that survive."""
    for mutant in mutants:
        place(mutant, ROOT)
    survivors = []
    with TemporaryDirectory(prefix="pygpt-mutants-") as folder:
        tree = Path(folder).resolve()
        copy_tree(tree)
        if any(mutant.builds_cpu_library for mutant in mutants) or not list((tree / "pygpt").glob("_C.*")):
            cpu_library(tree)
            build_cpu(tree)
        check_unchanged(mutants, tree)
        for mutant in mutants:
            start = time.monotonic()
            noticed = judge(mutant, tree)
            out(f"{'noticed ' if noticed else 'SURVIVED'} {time.monotonic() - start:5.0f} s  {mutant.name}", flush=True)
            survivors += [] if noticed else [mutant]
    return survivors


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="*", help="of a name; default: all")
    parser.add_argument("--list", action="store_true", help="print the faults, and plant none")
    args = parser.parse_args(argv)
    mutants = [m for m in MUTANTS if not args.part or any(part in m.name for part in args.part)]
    if args.list:
        print(*(f"{m.name}  ({m.file}: {' '.join(m.tests)})" for m in mutants), sep="\n")
        return 0
    try:
        survivors = run(mutants)
    except Broken as e:
        print(e, file=sys.stderr)
        return 2
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} faults were noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
