"""The options that choose what is measured: one list for `pygpt bench` and for `pytest bench/suite.py`."""

import argparse
import math

import torch

from pygpt.data import UsageError

from .cases import gpt
from .cases.ops import DIRECTIONS, DTYPES, OPS, SWEEP, custom

EVERY_OP, EVERY_DIRECTION = (*OPS, *gpt.DIRECTIONS), (*DIRECTIONS, *gpt.DIRECTIONS.values())
QUICK_BUDGET = 90  # seconds; the last row begins before, and a run ends within two minutes


def some_of(names, alone=()):
    """The type of an option that takes a comma-separated list; those in ``alone`` only by themselves."""

    def parse(text):
        found = [name.strip() for name in text.split(",")]
        if unknown := [name for name in found if name not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(names)}")
        if len(set(found)) > 1 and (lone := [name for name in found if name in alone]):
            raise argparse.ArgumentTypeError(f"{lone[0]} goes with no other name")
        return list(dict.fromkeys(found))

    return parse


def positive(kind):
    """The type of an option that takes a number above zero."""

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
    """``add`` is ArgumentParser.add_argument, or the like of pytest."""
    from .cases.peers import PEERS

    peers = some_of((*PEERS, "all", "none"), alone=("all", "none"))
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are (default: cpu)")
    for name, names in (("ops", EVERY_OP), ("dtypes", tuple(DTYPES)), ("directions", EVERY_DIRECTION)):
        add(f"--{name}", type=some_of(names), default=None, metavar="A,B", help=f"some of {', '.join(names)}")
    add("--shape", action="append", metavar="KEY=VALUE,...", help="your own sizes instead of the suite's, such as "
        "B=2,T=512,D=64,causal=1 or N=1000,C=768, for each op that has them; may be repeated")  # fmt: skip
    add("--backends", metavar="A,B", help="some of cpp, cuda, triton, torch; default: ours for the device")
    add("--peers", type=peers, default=None, metavar="A,B", help=f"some of {', '.join(PEERS)}, or all, or none; "
        "default: all that are installed and don't compile for each shape")  # fmt: skip
    add("--only-standard", action="store_true", default=False, help="only the standard rows, those that --check judges")
    add("--sweep", nargs="?", type=positive(int), const=SWEEP[-1], metavar="T", help="instead: causal attention at "
        f"sequence lengths {SWEEP[0]}, {SWEEP[1]}, ... up to T ({SWEEP[-1]}), time and memory")  # fmt: skip
    add("--quick", action="store_true", default=False, help="each op's first shape in float32; ends in 2 minutes")
    add("--seconds", type=positive(float), metavar="S", help="time for a candidate of a row (0.75; --quick: 0.2)")
    add("--budget", type=positive(float), metavar="S", help="begin no row after so long; what is left out is listed")
    add("--threads", type=positive(int), metavar="N", help="torch.set_num_threads (default: PyTorch's own choice)")


def complete(options):
    """Fills in what follows from other options and looks up who is there. UsageError names what can't be had."""
    from .cases import gpu as gpu_rows
    from .cases import peers

    o = options
    if o.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: torch {torch.__version__} sees no GPU here")
    if o.shape and o.sweep:
        raise UsageError("--shape and --sweep exclude each other")
    if o.sweep:
        if o.sweep < SWEEP[0] or (o.ops and "attention" not in o.ops):
            raise UsageError(f"--sweep measures attention, from T = {SWEEP[0]} on")
        o.ops = ["attention"]
        o.dtypes = o.dtypes or ["float32"]
    o.ops, o.directions = o.ops or list(EVERY_OP), o.directions or list(EVERY_DIRECTION)
    o.dtypes = o.dtypes or (["float32"] if o.quick else list(DTYPES))
    for text in o.shape or ():
        try:
            custom(text, o.ops)
        except ValueError as e:
            raise UsageError(f"--shape: {e}") from None
    o.seconds = o.seconds or (0.2 if o.quick else 0.75)
    o.budget = o.budget or (QUICK_BUDGET if o.quick else None)
    o.backends = _backends(o.backends, o.device, gpu_rows.backends(o.device)[0])
    everybody = {("all",): list(peers.PEERS), ("none",): []}
    wanted = everybody.get(tuple(o.peers or ()), o.peers)
    named = wanted is o.peers and wanted is not None
    o.peers, o.absent = peers.chosen(wanted, o.device)
    if named and o.absent:
        raise UsageError("--peers: " + "; ".join(f"{name}: {why}" for name, why in o.absent.items()))
    if o.threads:
        torch.set_num_threads(o.threads)
    return o


def _backends(text: str | None, device: str, here: list[str]) -> list[str]:
    """Ours to measure: those named, else all that are meant for the device (Triton's interpreter is not)."""
    from pygpt.dispatch import TABLE, chosen

    if text is None and (name := chosen()):  # by PYGPT_BACKEND
        return [name]
    if text is None:
        found = [name for name in here if not (name == "triton" and device == "cpu")]
        if not found:
            why = "; ".join(f"{row.name}: {row.missing}" for row in TABLE.values() if row.missing)
            raise UsageError(f"none of ours serves {device} here ({why}); --backends torch measures plain PyTorch")
        return found
    try:
        names = some_of(tuple(TABLE))(text)
    except argparse.ArgumentTypeError as e:
        raise UsageError(f"--backends: {e}") from None
    for name in names:
        row = TABLE[name]
        if row.missing or (row.devices and device not in row.devices):
            why = row.missing or f"it serves {', '.join(row.devices)} tensors, not {device}"
            raise UsageError(f"--backends: {name} is not available: {why}")
    return names
