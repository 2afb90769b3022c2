"""`pygpt bench`: speed and memory of every op and of the GPT's training step, beside PyTorch and other libraries.

Needs pytest-benchmark; matplotlib for the plots and the HTML page's figures. Exit codes: 0; 1 where one of ours
failed, a bar was missed (--check) or something became slower (--compare); 2 bad input; 130 interrupted.
"""

import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

from pygpt.data import UsageError
from pygpt.files import locked, must_be_folder

from .options import add_row_options, complete
from .show.report import VARIABLES

FOLDER = Path(__file__).parent
ISA = {  # what each library is told (report.VARIABLES), so that all sides use the same instructions
    "avx2": dict(zip(VARIABLES, ("avx2", "avx2", "AVX2", "AVX2", "x86-64-v3"), strict=True)),
    "baseline": dict(zip(VARIABLES, ("baseline", "default", "SSE41", "SSE4_2", "x86-64"), strict=True)),
}
ATTEMPTS = 3  # how often --check measures a failing row again, each time longer, before it believes it
PYTEST = ("-s", "-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging", "-o", "addopts=")


def add_arguments(parser):
    add_row_options(parser.add_argument)
    add = parser.add_argument
    add("--isa", choices=ISA, help="run all sides with at most this instruction set")
    add("--check", action="store_true", help="hold the standard rows to the first bar; exit code 1 if below")
    add("--out", type=Path, default=Path("out/bench"), metavar="FOLDER",
        help="bench.json (written after every row), report.html and the plots (default: %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="PATH", help="the JSON file, elsewhere")
    add("--save", action="store_true", help="also write bench/results/<cpu>-<instruction set>-<date>.json")
    add("--training", type=Path, action="append", metavar="LOG", help="log.jsonl of `pygpt train`, or its folder: a "
        "training curve among the plots; may be repeated")  # fmt: skip
    add("--list", action="store_true", help="print the rows, our backends and the peers, and stop")
    add("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="what B made slower or faster than A, and "
        "stop; exit code 1 where ours became slower by more than the measured spread")  # fmt: skip
    add("--render", type=Path, metavar="JSON", help="table, plots and page of an earlier run's file, and stop")
    add("--update-readme", action="store_true", help="rewrite the README's speed table and plots from the newest run "
        "in bench/results/, and stop")  # fmt: skip


def run(o) -> int:
    if o.compare:
        from .show import compare

        return compare.show(*o.compare)
    if o.update_readme:
        from .show import readme

        return readme.update()
    curves = training_curves(o.training or [])
    if o.render:
        from .show import results

        document = results.read(o.render)
        with locked(o.out):
            return finish(document, o, curves)
    return measure(o, curves)


def training_curves(paths: list[Path]) -> dict[str, tuple[list, list]]:
    if not paths:
        return {}
    from .show import plots

    return {label: curve for path in paths for label, curve in plots.training_curves(path).items()}


# ------------------------------------------------------------------------------- a run
def measure(o, curves) -> int:
    if missing := [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{missing[0]} is not installed: pip install pytest-benchmark")
    o.given = sys.argv[2:] if o.given is None else o.given
    if o.isa and not ISA[o.isa].items() <= os.environ.items():
        with_isa(o)
    o.only_standard |= o.check
    complete(o)
    if o.check and "eager" not in o.peers:
        raise UsageError("--check judges by PyTorch eager, which --peers leaves out")
    from . import suite
    from .show import report

    if not suite.rows(o):
        raise UsageError("no row is left: these ops have no such dtype, direction or standard row")
    if o.list:
        return listing(o, suite.rows(o))
    if o.save and not report.RESULTS.is_dir():
        raise UsageError(f"--save writes to {report.RESULTS}, which only a checkout has; --json PATH writes elsewhere")
    path = o.json or o.out / "bench.json"
    if path.is_dir():
        raise UsageError(f"--json {path} is a folder")
    must_be_folder(path.parent)
    with locked(o.out):
        for folder in (o.out, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # or OSError now, not when all is measured
                pass
        return _measure(o, curves, path)


def _measure(o, curves, path: Path) -> int:
    """The run itself, once it is known that its files can be written."""
    from .show import report, results

    code, document = session(o, lambda document: results.write(path, document))
    if document is None:
        return code or 1
    if o.check:
        code, document = check(o, code, document)
    results.write(path, document)
    print(f"\nwrote {path}")
    if o.save and document["pygpt"]["left_out"]:
        print("not saved among the results: rows were not reached")
    elif o.save:
        saved = report.default_path(document["pygpt"]["machine"])
        results.write(saved, document)
        print(f"wrote {saved}")
    failed = finish(document, o, curves)
    return code if code == 130 else failed or code


def with_isa(o):
    """This process again, under the variables that lower the instruction set."""
    import pygpt

    here = pygpt._C.cpu_capabilities() if hasattr(pygpt, "_C") else ISA
    if o.isa not in here:
        raise UsageError(f"--isa {o.isa}: this machine has {', '.join(here)}")
    paths = (str(Path(pygpt.__file__).parents[1]), os.environ.get("PYTHONPATH"))
    os.environ |= ISA[o.isa] | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execv(sys.executable, [sys.executable, "-m", "pygpt", "bench", *o.given])


def session(o, save, items=("",)) -> tuple[int, dict | None]:
    """One pytest run of suite.py, or of some of its ``items`` -> exit code, document."""
    import pytest

    from .timing.run import Run

    run = Run(o, save)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to stop: as Ctrl-C, keep what there is
    try:
        what = [f"{FOLDER / 'suite.py'}{item}" for item in items]
        code = pytest.main([*PYTEST, f"--rootdir={FOLDER.parent}", *what], plugins=[run])
    finally:
        signal.signal(signal.SIGTERM, previous)
    return {0: 0, 2: 130}.get(int(code), 1), run.document


def check(o, code: int, document: dict) -> tuple[int, dict]:
    """Measures the rows below the first bar again, up to ATTEMPTS times; then says which stay there."""
    from .show import report, results
    from .suite import row_id

    def below():
        return [row for row in results.rows(document) if not report.passes(row)]

    seconds, o.budget = o.seconds, None
    for attempt in range(1, ATTEMPTS + 1):
        if not below() or code == 130:
            break
        print(f"\n{len(below())} rows below the bar, measured again ({attempt} of {ATTEMPTS})")
        o.seconds = seconds * 2 * attempt
        items = [f"::test_row[{row_id(row)}]" for row in below()]
        again, newer = session(o, lambda document: None, items)
        document, code = results.merge(document, newer) if newer else document, max(code, again)
    rows = results.rows(document)
    for row in below():
        ratios = [ratio for entry in row.ours if (ratio := row.ratio(entry)) is not None]
        found = f"{min(ratios):.2f}" if ratios else "not measured beside eager"
        print(f"below the bar: {row}: {found}, wanted {report.bar(row):.0f}")
    judged, unreached = sum(report.bar(row) is not None for row in rows), len(document["pygpt"]["left_out"])
    print(f"first bar: {judged - len(below())} of {judged} rows pass" + f"; {unreached} not reached" * bool(unreached))
    return max(code, int(bool(below() or unreached))), document


def listing(o, rows) -> int:
    for row in rows:
        print(row)
    print(f"\n{len(rows)} rows; ours: {', '.join(o.backends)}; peers: {', '.join(o.peers) or 'none'}")
    for name, why in o.absent.items():
        print(f"not used: {name}: {why}")
    return 0


# ------------------------------------------------------------------------------- what it leaves
def finish(document: dict, o, curves) -> int:
    """Table, plots and page -> exit code."""
    from .show import page, plots, report, results

    rows, about = results.rows(document), results.about(document)
    report.show(rows, about)
    o.out.mkdir(parents=True, exist_ok=True)
    figures = plots.all_figures(rows, about["machine"], curves)
    if figures is None:
        print("no plots: matplotlib is not installed, or NumPy")
    for name, figure in (figures or {}).items():
        for suffix in ("svg", "png"):
            plots.write(figure, o.out / f"{name}.{suffix}")
    page.write(o.out / "report.html", rows, about, figures or {})
    print(f"wrote {o.out / 'report.html'}" + (f" and {len(figures)} plots (PNG and SVG)" if figures else ""))
    return 1 if about["failed"] or not rows else 0
