"""`pygpt bench`: speed and memory of every op and of the GPT's training step, beside PyTorch and other libraries.

Needs matplotlib for the figures, and nothing else. Exit codes: 0; 1 where one of ours failed, a bar was missed
(--check) or something became slower (--compare); 2 bad input or no GPU; 130 interrupted.
"""

import argparse
import math
import os
import signal
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

import pygpt
from pygpt import threads
from pygpt.data import UsageError
from pygpt.dispatch import TABLE, chosen
from pygpt.files import locked, must_be_folder

from .cases import gpt, ops, peers, rows, shapes
from .cases.ops import DIRECTIONS, DTYPES
from .show import compare, page, plots, readme, table
from .timing import results
from .timing.machine import VARIABLES
from .timing.processes import search_path
from .timing.run import Run

EVERY_OP, EVERY_DIRECTION = (*ops.OPS, *gpt.DIRECTIONS), (*DIRECTIONS, *gpt.DIRECTIONS.values())
QUICK_BUDGET = 90  # seconds; the last row begins before, and a run ends within two minutes
SECONDS = {"cpu": (0.75, 0.2), "cuda": (0.1, 0.04)}  # for a candidate of a row; with --quick
ISA = {  # the values of VARIABLES with which all libraries use the same instructions
    "avx2": dict(zip(VARIABLES, ("avx2", "avx2", "AVX2", "AVX2", "x86-64-v3"), strict=True)),
    "baseline": dict(zip(VARIABLES, ("baseline", "default", "SSE41", "SSE4_2", "x86-64"), strict=True)),
}
OUT = Path("out/bench")
ATTEMPTS = 3  # how often --check measures a failing row again, each time longer, before it believes it


# ------------------------------------------------------------------------------- options
def some_of(names, alone=()):
    """The type of an option that takes a comma-separated list; those in ``alone`` only by themselves."""

    def parse(text):
        given = list(dict.fromkeys(name.strip() for name in text.split(",")))
        if unknown := [name for name in given if name not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(names)}")
        if len(given) > 1 and (lone := [name for name in given if name in alone]):
            raise argparse.ArgumentTypeError(f"{lone[0]} goes with no other name")
        return given

    return parse


def positive(kind):
    """The type of an option that takes a finite number above zero."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
        return value

    return parse


def add_row_options(add):
    """The options that choose the rows. ``add`` is ArgumentParser.add_argument, or pytest's."""
    known = some_of((*peers.PEERS, "default", "all", "none"), alone=("all", "none"))
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are (default: cpu)")
    for name, names in (("ops", EVERY_OP), ("dtypes", tuple(DTYPES)), ("directions", EVERY_DIRECTION)):
        add(f"--{name}", type=some_of(names), default=None, metavar="A,B", help=f"some of {', '.join(names)}")
    add("--shape", action="append", metavar="KEY=VALUE,...", help="your own sizes instead of the suite's, such as "
        "B=2,L=512,E=64,causal=1 or M=8x128,C=768, for each op that has them, named as in pygpt verify; may be "
        "repeated")  # fmt: skip
    add("--backends", metavar="A,B", help="some of cpp, cuda, triton, torch; default: ours for the device")
    add("--peers", type=known, default=None, metavar="A,B", help=f"some of {', '.join(peers.PEERS)}, or all, or none; "
        "default: those that are installed and compile quickly")  # fmt: skip
    add("--only-standard", action="store_true", default=False, help="only the standard rows, those that --check judges")
    add("--sweep", nargs="?", type=positive(int), const=shapes.SWEEP[-1], metavar="T", help="instead: causal attention "
        f"at sequence lengths {shapes.SWEEP[0]}, {shapes.SWEEP[1]}, ... up to T ({shapes.SWEEP[-1]})")  # fmt: skip
    add("--quick", action="store_true", default=False, help="each op's first shape in one dtype; ends in 2 minutes")
    add("--seconds", type=positive(float), metavar="S", help="time for a candidate of a row (0.75; a GPU: 0.1)")
    add("--budget", type=positive(float), metavar="S", help="begin no row after so long; what is left out is listed")
    add("--busy", nargs="?", type=positive(int), const=1, metavar="N", help="measure every row also beside N busy "
        "processes (1); on a CPU, eager-default is among the peers")  # fmt: skip
    add("--threads", type=positive(int), metavar="N", help=threads.HELP)
    add("--rehearse", action="store_true", default=False, help="the GPU's rows in tiny sizes on the CPU, where the "
        "emulator and Triton's interpreter play the GPU")  # fmt: skip
    add("--prepare", action="store_true", default=False, help="time nothing; fills the compilers' caches")


def add_arguments(parser):
    add_row_options(parser.add_argument)
    add = parser.add_argument
    add("--isa", choices=ISA, help="run all sides with at most this instruction set")
    add("--check", action="store_true", help="hold the standard rows to the first bar; exit code 1 if below")
    add("--out", type=Path, metavar="FOLDER", help="bench.json (written after every row), report.html and the plots "
        f"(default: {OUT}; none where --json is given)")  # fmt: skip
    add("--json", type=Path, metavar="PATH", help="the JSON file, elsewhere")
    add("--save", nargs="?", const="", metavar="KIND", help="also replace bench/results/<machine>[-KIND].json; "
        "a run of some rows only needs a KIND")  # fmt: skip
    add("--training", type=Path, action="append", metavar="LOG", help="log.jsonl of `pygpt train`, or its folder: a "
        "training curve among the plots; may be repeated")  # fmt: skip
    add("--list", action="store_true", help="print the rows, our backends and the peers, and stop")
    add("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="what B made slower or faster than A, and "
        "stop; exit code 1 where ours became slower by more than the measured spread")  # fmt: skip
    add("--render", type=Path, metavar="JSON", help="table, plots and page of an earlier run's file, and stop")
    add("--update-readme", action="store_true", help="rewrite the speed table and plots of README.md or "
        "docs/performance.md from the newest run in bench/results/, and stop")  # fmt: skip


def complete(options):
    """Fills in what follows from other options and finds out what is available. UsageError names what is not."""
    o = options
    if o.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: torch {torch.__version__} sees no GPU here")
    if o.rehearse and o.device == "cuda":
        raise UsageError("--rehearse runs on the CPU")
    if o.shape and o.sweep:
        raise UsageError("--shape and --sweep exclude each other")
    if o.sweep:
        if o.sweep < shapes.SWEEP[0] or (o.ops and "attention" not in o.ops):
            raise UsageError(f"--sweep measures attention, from T = {shapes.SWEEP[0]} on")
        o.ops = ["attention"]
        o.dtypes = o.dtypes or ["float32"]
    o.ops, o.directions = o.ops or list(EVERY_OP), o.directions or list(EVERY_DIRECTION)
    quick_dtype = "bfloat16" if o.device == "cuda" or o.rehearse else "float32"
    o.dtypes = o.dtypes or ([quick_dtype] if o.quick else list(DTYPES))
    for text in o.shape or ():
        try:
            shapes.custom(text, o.ops)
        except ValueError as e:
            raise UsageError(f"--shape: {e}") from None
    o.seconds = o.seconds or SECONDS[o.device][o.quick]
    o.budget = o.budget or (QUICK_BUDGET if o.quick else None)
    if o.rehearse and "cuda" in (o.backends or ""):
        play_cuda_on_the_cpu()
    o.backends = _backends(o.backends, o.device)
    named = o.peers or ["default", *(["eager-default"] if o.busy and o.device == "cpu" else ())]
    requested = {"all": list(peers.PEERS), "none": []}.get(named[0], named)
    o.peers, o.absent = peers.chosen(requested, o.device)
    if missing := [f"{name}: {why}" for name, why in o.absent.items() if name in named]:
        raise UsageError(f"--peers: {'; '.join(missing)}")
    if o.threads:
        torch.set_num_threads(o.threads)
    return o


def _backends(text: str | None, device: str) -> list[str]:
    """Our backends: those named, else all that are meant for the device, which Triton's interpreter is not."""
    if text is None and (name := chosen()):  # by PYGPT_BACKEND
        return [name]
    if text is None:
        ours = [row.name for row in TABLE.values() if row.name != "torch" and not row.missing and device in row.devices]
        if names := [name for name in ours if (name, device) != ("triton", "cpu")]:
            return names
        why = "; ".join(f"{row.name}: {row.missing}" for row in TABLE.values() if row.missing)
        raise UsageError(f"none of ours serves {device} here ({why}); --backends torch measures plain PyTorch")
    try:
        names = some_of(tuple(TABLE))(text)
    except argparse.ArgumentTypeError as e:
        raise UsageError(f"--backends: {e}") from None
    for row in (TABLE[name] for name in names):
        why = row.missing
        if row.devices and device not in row.devices:
            why = why or f"it serves {', '.join(row.devices)} tensors, not {device}"
        if why:
            raise UsageError(f"--backends: {row.name} is not available: {why}")
    return names


def play_cuda_on_the_cpu():
    """Lets the emulator take the place of the CUDA kernels, for a rehearsal."""
    from tests import emulator

    TABLE["cuda"] = replace(TABLE["cuda"], kernels=emulator.kernels(), missing="", devices=("cpu",))


# ------------------------------------------------------------------------------- the command
def run(o) -> int:
    if o.compare:
        return compare.show(*o.compare)
    if o.update_readme:
        return readme.update()
    curves = {label: curve for path in o.training or () for label, curve in plots.training_curves(path).items()}
    if o.out is None and (o.render or not o.json):
        o.out = OUT
    if o.render:
        document = results.read(o.render)
        with locked(o.out):
            return finish(document, o, curves)
    return measure(o, curves)


def measure(o, curves) -> int:
    """Everything that can be wrong with a run is said before it begins."""
    o.given = sys.argv[2:] if o.given is None else o.given
    if o.isa and not ISA[o.isa].items() <= os.environ.items():
        _with_isa(o)
    o.only_standard |= o.check
    complete(o)
    if o.check and "eager" not in o.peers:
        raise UsageError("--check judges by PyTorch eager, which --peers leaves out")
    wanted = rows.rows(o)
    if not wanted:
        raise UsageError("no row is left: these ops have no such dtype, direction or standard row")
    if o.list:
        return listing(o, wanted)
    torch.set_float32_matmul_precision("highest")  # float32 stays float32, on both sides
    if o.prepare:
        return session(o, wanted, lambda document: None)[0]
    if o.save is not None and (o.rehearse or not results.RESULTS.is_dir()):
        why = "a rehearsal is no result" if o.rehearse else f"only a checkout has {results.RESULTS}"
        raise UsageError(f"--save: {why}; --json PATH writes elsewhere")
    if o.save == "" and not _is_whole(o):
        raise UsageError("--save would replace the machine's whole run by a part; name the part: --save KIND")
    path = o.json or o.out / "bench.json"
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by the file
        raise UsageError(f"--json {path} is no regular file")
    must_be_folder(path.parent)
    with locked(o.out) if o.out else nullcontext():
        for folder in filter(None, (o.out, path.parent)):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # an OSError now rather than after the measurement
                pass
        return _measure(o, wanted, curves, path)


def _is_whole(o) -> bool:
    """Tells whether the options leave out no op, direction or shape."""
    narrowed = o.shape or o.sweep or o.quick or o.only_standard
    return not narrowed and set(o.ops) == set(EVERY_OP) and set(o.directions) == set(EVERY_DIRECTION)


def _measure(o, wanted: list[rows.Row], curves, path: Path) -> int:
    """The run itself, once it is known that its files can be written."""
    code, document = session(o, wanted, lambda document: results.write(path, document))
    if document is None:
        return code or 1
    if o.check:
        code, document = check(o, wanted, code, document)
    about = document["pygpt"]
    results.write(path, document)
    print(f"\nwrote {path}")
    if o.save is not None and about["left_out"]:
        print("not saved among the results: rows were not reached")
    elif o.save is not None:
        saved = results.saved_path(about["machine"], o.save)
        results.write(saved, document)
        print(f"wrote {saved}")
    failed, measured = finish(document, o, curves), results.results(document)
    if o.check or o.device == "cuda":
        print("\n".join(table.judged(measured, about)))
    print(f"{len(measured)} rows in {about['machine']['used_s']:.0f} s, {len(about['failed'])} FAILED")
    return code if code == 130 else failed or code


def _with_isa(o):
    """Starts this process again, under the variables that lower the instruction set."""
    available = pygpt._C.cpu_capabilities() if hasattr(pygpt, "_C") else ISA
    if o.isa not in available:
        raise UsageError(f"--isa {o.isa}: this machine has {', '.join(available)}")
    os.environ |= ISA[o.isa] | {"PYTHONPATH": search_path()}
    os.execv(sys.executable, [sys.executable, "-m", "pygpt", "bench", *o.given])


def session(o, wanted: list[rows.Row], save) -> tuple[int, dict | None]:
    """Measures the rows -> exit code, document. SIGTERM ends it as Ctrl-C does: what is measured is kept."""
    run = Run(o, save)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run.measure(wanted)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 130 if run.stopped == "interrupted" else int(bool(run.about["failed"])), run.document


def check(o, wanted: list[rows.Row], code: int, document: dict) -> tuple[int, dict]:
    """Measures the rows below the first bar again, up to ATTEMPTS times."""

    def below() -> set[str]:
        return {str(row) for row in table.below_the_bar(results.results(document), document["pygpt"]["machine"])}

    seconds, o.budget = o.seconds, None
    for attempt in range(1, ATTEMPTS + 1):
        if not below() or code == 130:
            break
        print(f"\n{len(below())} rows below the bar, measured again ({attempt} of {ATTEMPTS})")
        o.seconds = seconds * 2 * attempt
        again, newer = session(o, [row for row in wanted if str(row) in below()], lambda document: None)
        document, code = results.merge(document, newer) if newer else document, max(code, again)
    return max(code, int(bool(below() or document["pygpt"]["left_out"]))), document


def listing(o, wanted) -> int:
    for row in wanted:
        print(row)
    print(f"\n{len(wanted)} rows; ours: {', '.join(o.backends)}; peers: {', '.join(o.peers) or 'none'}")
    for name, why in o.absent.items():
        print(f"not used: {name}: {why}")
    return 0


def finish(document: dict, o, curves) -> int:
    """Shows what was measured -> exit code."""
    measured, about = results.results(document), document["pygpt"]
    table.show(measured, about)
    if o.out is not None:
        draw(measured, about, o.out, curves)
    return 1 if about["failed"] or not measured else 0


def draw(measured, about: dict, out: Path, curves):
    """Writes the plots and the page."""
    figures = plots.all_figures(measured, about["machine"], curves)
    if figures is None:
        print("no plots: matplotlib is not installed, or NumPy")
    for name, figure in (figures or {}).items():
        for suffix in ("svg", "png"):
            plots.write(figure, out / f"{name}.{suffix}")
    if find_spec("jinja2"):  # PyTorch depends on it
        page.write(out / "report.html", measured, about, figures or {})
        print(f"wrote {out / 'report.html'}" + (f" and {len(figures)} plots (PNG and SVG)" if figures else ""))
