"""Plants the faults of tests/mutants, one at a time, in a copy of the tree, and tells which of them the tests notice.

    python -m tests.mutate                   all of them
    python -m tests.mutate cuda "one warp"   those whose name contains one of these
    python -m tests.mutate --list

Only tests that `make test` runs count, and they have to pass without the fault first. What a fault changes is rebuilt:
the emulator for a file of csrc/cuda; the CPU library, of one instruction set, for a file of csrc/cpu or csrc/bind;
nothing for Python. A fault with which the tests take far longer than without it counts as noticed: they did not end.
Exit code 1 if a fault survives, 2 if one cannot be planted or judged.
"""

import argparse
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
FAILED, PASSED = 1, 0  # pytest's exit codes; a crash has a negative one
DID_NOT_END = 1000
# The seconds that tests have: to start Python and to compile on a busy machine, and how many times as long as without a
# fault they may take. (A test that fails draws up to verify.MOST = 96 times, where one that passes may draw once.)
START, SLOWER = 600, 100
NOTICED, SURVIVED, NOT_JUDGED = "noticed", "SURVIVED", "NOT JUDGED"


class Broken(Exception):
    """A fault that cannot be planted, built or judged."""


def place(mutant: Mutant, tree: Path) -> tuple[Path, str]:
    """The file that has the mutant's line, which must be there once, and the file's text with the fault."""
    texts = {path: path.read_text() for path in sorted(tree.glob(mutant.file))}
    counts = {path: len(re.findall(mutant.old, text, re.MULTILINE)) for path, text in texts.items()}
    if sum(counts.values()) != 1:
        raise Broken(f"{mutant.file} has {sum(counts.values())} times {mutant.old!r}")
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


# ------------------------------------------------------------------------------- processes
def run_process(command: list[str], tree: Path, seconds: float | None = None, **environment: str) -> tuple[int, str]:
    """A command's exit code, or DID_NOT_END after so many seconds, and its output. None of its children stays."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    how = {"cwd": tree, "env": os.environ | environment, "start_new_session": True}  # a process group of its own
    with subprocess.Popen(command, **pipes, **how) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            return DID_NOT_END, ""
        finally:
            with suppress(ProcessLookupError):  # raised if nothing is left of the process and its children
                os.killpg(process.pid, signal.SIGTERM)
                time.sleep(0.5)  # ninja ends its compilers, which have groups of their own
                os.killpg(process.pid, signal.SIGKILL)


def one_instruction_set(tree: Path) -> None:
    """Leaves the tree's CPU library with one table of kernels, called baseline: those of AVX2 where there is AVX2."""
    setup, dispatch = tree / "setup.py", tree / "csrc" / "cpu" / "dispatch.cpp"
    avx2 = runpy.run_path(str(setup))["ISAS"].get("avx2", [])
    has = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    flags = avx2 if has.issuperset(flag.removeprefix("-m") for flag in avx2) else []
    quick = setup.read_text().replace('"-O3"', '"-O2"')  # compiles faster; below that GCC fuses no products and sums
    setup.write_text(quick.replace("\nSTABLE = ", f'\nISAS = {{"baseline": {flags}}}\nSTABLE = '))
    dispatch.write_text(dispatch.read_text().replace("#if defined(__x86_64__)", "#if 0"))


def build_cpu(tree: Path) -> None:
    code, output = run_process([sys.executable, "setup.py", "build_ext", "--inplace"], tree, PYGPT_BUILD_CUDA="0")
    if code:
        raise Broken(f"the CPU library does not build:\n{output[-3000:]}")


# ------------------------------------------------------------------------------- as a plugin of pytest
def pytest_addoption(parser):
    parser.addoption(
        "--only", action="append", default=[], help="words, with | between, that a test's name must contain"
    )


def pytest_collection_modifyitems(config, items):
    """Leaves the tests that one of the options names. (-k does not take the signs in the names of parameters.)"""
    only = [words.split("|") for words in config.getoption("only")]
    items[:] = [item for item in items if any(is_named(item.nodeid, words) for words in only)]


# ------------------------------------------------------------------------------- planting and judging
def is_named(test: str, words: Sequence[str]) -> bool:
    return all(word in test for word in words)


def run_tests(tree: Path, tests: Iterable[tuple[str, ...]], *options: str, seconds: float | None = None):
    # no cache: a file changed twice within a second would be taken for unchanged
    environment = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "PYGPT_CPU_CAPABILITY": ""}
    environment |= {"PYGPT_EMULATOR_FLAGS": "-O1", "PYGPT_TEST_SEED": "1"}  # compiles faster; the same in every run
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "tests.mutate", "-p", "no:cacheprovider"]
    command += [
        *options,
        *dict.fromkeys(words[0] for words in tests),
        *(f"--only={'|'.join(words)}" for words in tests),
    ]
    return run_process(command, tree, seconds, **environment)


def limits(mutants: list[Mutant], tree: Path) -> dict[Mutant, float]:
    """For each mutant whose tests pass without a fault, the seconds after which they will not end with it."""
    tests = dict.fromkeys(mutant.tests for mutant in mutants)
    code, output = run_tests(tree, tests, "--durations=0", "--durations-min=0")
    if code not in (FAILED, PASSED):
        raise Broken(f"pytest ends with {code} without a fault:\n{output[-3000:]}")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)", output, re.MULTILINE)
    durations = re.findall(r"^ *([\d.]+)s (?:call|setup|teardown) +(.+)", output, re.MULTILINE)
    return {
        mutant: START + SLOWER * sum(float(duration) for duration, test in durations if is_named(test, mutant.tests))
        for mutant in mutants
        if not any(is_named(test, mutant.tests) for test in failed)
    }


def judge(mutant: Mutant, tree: Path, seconds: float) -> str:
    """Whether the mutant's tests notice it, within a limit of seconds."""
    file, wrong = place(mutant, tree)
    right = file.read_text()
    file.write_text(wrong)
    try:
        if mutant.builds_cpu_library:
            build_cpu(tree)
        code, output = run_tests(tree, [mutant.tests], "-x", seconds=seconds)
    finally:
        file.write_text(right)
    if "building the emulator failed" in output:
        raise Broken(f"the emulator does not build:\n{output[-3000:]}")
    if code not in (FAILED, PASSED, DID_NOT_END) and code > 0:
        raise Broken(f"pytest ended with {code}:\n{output[-3000:]}")
    if code == PASSED and not re.search(r"\d+ passed", output):
        raise Broken("its tests are skipped on this machine")
    return {PASSED: SURVIVED, DID_NOT_END: f"{NOTICED} (did not end)"}.get(code, NOTICED)


def run(mutants: list[Mutant], out=print) -> dict[Mutant, str]:
    """What became of each mutant."""
    verdicts = {}
    with TemporaryDirectory(prefix="pygpt-mutants-") as folder:
        tree = Path(folder).resolve()
        copy_tree(tree)
        if any(mutant.builds_cpu_library for mutant in mutants) or not list((tree / "pygpt").glob("_C.*")):
            one_instruction_set(tree)
            build_cpu(tree)
        seconds = limits(mutants, tree)
        for mutant in sorted(mutants, key=lambda m: m.builds_cpu_library):  # last, for the library keeps its fault
            start, reason = time.monotonic(), ""
            try:
                if mutant not in seconds:
                    raise Broken("its tests fail without a fault")
                verdicts[mutant] = judge(mutant, tree, seconds[mutant])
            except Broken as e:
                verdicts[mutant], reason = NOT_JUDGED, f": {e}"
            out(f"{verdicts[mutant]:21} {time.monotonic() - start:4.0f} s  {mutant.name}{reason}", flush=True)
    return verdicts


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="*", help="of a name; default: all")
    parser.add_argument("--list", action="store_true", help="print the faults, and plant none")
    args = parser.parse_args(argv)
    mutants = [m for m in MUTANTS if not args.part or any(part in m.name for part in args.part)]
    if args.list:
        print(*(f"{m.name}  ({m.file}: {' '.join(m.tests)})" for m in mutants), sep="\n")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's "&" may have the first ignored
        signal.signal(number, signal.default_int_handler)
    try:
        verdicts = list(run(mutants).values())
    except Broken as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{sum(v.startswith(NOTICED) for v in verdicts)} of {len(mutants)} faults were noticed")
    return 2 if NOT_JUDGED in verdicts else 1 if SURVIVED in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
