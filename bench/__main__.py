"""Measures pygpt beside PyTorch eager: the ops, the GPT's training step, or all."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import pytest

from . import report
from .conftest import PEAKS, ROWS
from .options import add_options, complete

FOLDER = Path(__file__).parent
VARIABLES = ("PYGPT_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
ISA = {  # what each library is told, so that both sides use the same instructions
    "avx2": dict(zip(VARIABLES, ("avx2", "avx2", "AVX2", "AVX2"), strict=True)),
    "baseline": dict(zip(VARIABLES, ("baseline", "default", "SSE41", "SSE4_2"), strict=True)),
}
ATTEMPTS = 3  # how often --check measures a failing row again, each time longer, before it believes it


def parse():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suite", nargs="?", choices=("ops", "gpt", "all"), default="ops")
    add = parser.add_argument
    add("--check", action="store_true", help="hold the standard rows to the first bar; exit code 1 if below")
    add("--isa", choices=ISA, help="run both sides with at most this instruction set")
    add("--json", type=Path, metavar="PATH", help="write the rows to this file")
    add("--save", action="store_true", help="write them to bench/results/<cpu>-<instruction set>-<date>.json")
    add_options(add)
    options = parser.parse_args()
    complete(options)
    options.only_standard |= options.check
    return options


def with_isa(name: str):
    """This process again, under the variables that lower the instruction set."""
    paths = (str(FOLDER.parent), os.environ.get("PYTHONPATH"))
    os.environ |= ISA[name] | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execv(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]])


class Session:
    """One pytest run and what it left."""

    def __init__(self, what: list[str], options, seconds: float):
        lists = [f"--{name}={','.join(getattr(options, name))}" for name in ("ops", "dtypes", "directions")]
        flags = [f"--{name}" for name in ("quick", "only-standard") if getattr(options, name.replace("-", "_"))]
        numbers = [f"--seconds={seconds}"] + ([f"--threads={options.threads}"] if options.threads else [])
        ours = ["-v", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
        self.rows, self.machine = {}, None
        where = f"--rootdir={FOLDER.parent}"
        self.code = int(pytest.main([*ours, where, *lists, *flags, *numbers, *what], plugins=[self]))

    def pytest_sessionfinish(self, session):
        self.rows = session.config.stash[ROWS]
        if self.rows:
            self.machine = report.machine(session.config.stash[PEAKS])


def check(session: Session, options) -> list[dict]:
    """The rows below the first bar, after measuring each of them again up to ATTEMPTS times."""

    def failing():
        return {node: row for node, row in session.rows.items() if not report.passes(row)}

    for attempt in range(1, ATTEMPTS + 1):
        again = [node for node, row in failing().items() if row["backend"] != "torch"]
        if not again:
            break
        print(f"\n{len(again)} rows below the bar, measured again ({attempt} of {ATTEMPTS})")
        what = [str(FOLDER.parent / node) for node in again]
        session.rows |= Session(what, options, options.seconds * 2 * attempt).rows
    return list(failing().values())


def main() -> int:
    options = parse()
    if options.isa and not ISA[options.isa].items() <= os.environ.items():
        with_isa(options.isa)
    os.environ["PYGPT_BENCH_COMMAND"] = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    files = [str(FOLDER / f"{name}.py") for name in ("ops", "gpt") if options.suite in (name, "all")]
    session = Session(files, options, options.seconds)
    if not session.rows:
        return session.code
    below = check(session, options) if options.check else []
    for path in (options.json, report.default_path(session.machine) if options.save else None):
        if path:
            report.save(path, list(session.rows.values()), session.machine)
            print(f"wrote {path}")
    if options.check:
        print()
        for row in below:
            ratio = f"{row['ratio']:.2f}, wanted {report.bar(row):.0f}"
            why = "served by PyTorch" if row["backend"] == "torch" else ratio
            print(f"below the bar: {row['op']} {row['shape']} {row['dtype']} {row['direction']}: {why}")
        judged = sum(report.bar(row) is not None for row in session.rows.values())
        print(f"first bar: {judged - len(below)} of {judged} rows pass")
    return 1 if below else session.code


if __name__ == "__main__":
    sys.exit(main())
