"""What takes part in a row: our backends and their peers, each as a call that is warm, right, and weighed.

Whoever cannot take part says why. Results are held against PyTorch eager's before anything is timed: a call
that computes something else must not look fast. (How exact ours are is for `pygpt verify` to judge.)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from pygpt import verify
from pygpt.dispatch import TABLE, choose

from ..cases import gpt, ops
from ..cases import gpu as gpu_rows
from ..cases.gpu import Refused
from ..cases.peers import Peer
from . import clocks as harness
from . import memory
from .clocks import Peaks, Work

OFF = 0.05  # a distance far above any rounding: another computation


@dataclass(frozen=True)
class Row:
    """One line of the table: a case, in a dtype and a direction."""

    case: ops.Case
    dtype: str
    direction: str

    @property
    def about(self) -> dict:
        c = self.case
        return {"op": c.op, "shape": c.shape, "dtype": self.dtype, "direction": self.direction, "dims": c.dims,
                "standard": self.dtype in c.standard}  # fmt: skip

    def __str__(self):
        return f"{self.case.op} {self.case.shape} {self.dtype} {self.direction}"


@dataclass
class Field:
    """Who takes part in a row, and what the row's work is."""

    unit: str
    amount: float  # of units, per call: 1e9 FLOPs or bytes, or tokens
    peak: float  # the machine's, in ``unit``
    calls: dict[str, Callable] = field(default_factory=dict)  # name -> a call without arguments
    about: dict[str, dict] = field(default_factory=dict)  # name -> {"ours", "memory"}
    refused: dict[str, str] = field(default_factory=dict)  # peer -> why
    failed: dict[str, str] = field(default_factory=dict)  # our backend -> why
    input_sets: int = 0
    intensity: float | None = None  # operations per byte that must move
    rotate: list[tuple] = field(default_factory=list)
    estimates: dict[str, float] = field(default_factory=dict)  # seconds of a call

    def refuse(self, name: str, why: str):
        (self.refused if self.about.get(name, {}).get("ours") is False else self.failed)[name] = why
        self.calls.pop(name, None)


def prepare(row: Row, backends: list[str], peers: dict[str, Peer], peaks: Peaks, clock, say=lambda name: None) -> Field:
    """``say`` gets the candidate whose turn it is, which may take a while."""
    if row.case.op in gpt.DIRECTIONS:
        return whole_model(row, backends, peers, peaks, clock, say)
    device, dtype = clock.device, ops.DTYPES[row.dtype]
    sets = harness.input_sets(lambda: row.case.setup(partial(_draw, dtype, device), *row.case.args))
    work = sets[0]
    found = field_of(row, work, peaks)
    found.input_sets, found.rotate = len(sets), [w.tensors for w in sets]
    theirs = results(work.eager, work.tensors, row.direction)
    reference = theirs, results(work.eager, tuple(t.float() for t in work.tensors), row.direction)
    upstream = verify.as_tuple(work.eager(*work.tensors)) if row.direction == "backward" else ()
    found.intensity = intensity(work, (*theirs, *upstream), row.direction)
    functions = {}
    for name in backends:
        found.about[name] = {"ours": True}
        if why := TABLE[name].objections(row.case.op, work.tensors, {}):
            found.refuse(name, f"not served: {'; '.join(why)}")
        else:
            served = choose(row.case.op, work.tensors).backend == name  # then the call need not be told
            functions[name] = work.ours if served else gpu_rows.ours(name, work)
    for name, peer in peers.items():
        if not peer.serves(row.case.op):
            continue
        found.about[name] = {"ours": False}
        try:
            adapt = partial(peer.function, row.case.op, row.direction, work, row.case.dims)
            functions[name] = gpu_rows.trying(adapt)
        except Refused as e:
            found.refuse(name, str(e))
    for place, (name, function) in enumerate(functions.items()):
        say(name)
        try:
            enter(found, name, function, peers.get(name), row, reference, clock, place)
        except Refused as e:
            found.refuse(name, str(e))
    return found


def _draw(dtype, device, *shape):
    return torch.randn(shape, device=device).to(dtype)


def field_of(row: Row, work: Work, peaks: Peaks) -> Field:
    amount = work.amount[row.direction == "backward"]
    if work.bound == "memory":
        return Field("GB/s", amount * work.tensors[0].element_size() / 1e9, peaks.copy)
    return Field("GFLOP/s", amount / 1e9, peaks.flops[row.dtype])


def intensity(work: Work, others: tuple, direction: str) -> float:
    """FLOPs per byte that must move at least: inputs, and ``others``, which are the results and the gradients that come in.

    A norm or an activation counts one per element.
    """
    if work.bound == "memory":
        return 1.0 / work.tensors[0].element_size()
    return work.amount[direction == "backward"] / sum(t.nbytes for t in (*work.tensors, *others))


def results(function: Callable, tensors: tuple, direction: str) -> tuple:
    """Outputs, or gradients for upstream gradients that are always the same."""
    torch.manual_seed(0)
    return verify.as_tuple(harness.prepared(function, tensors, direction)())


def enter(found: Field, name: str, function, peer: Peer | None, row: Row, reference: tuple, clock, place: int):
    """Checks and adds one candidate. Raises Refused. PyTorch's results are there, and a call of it can take a minute."""
    convert, export = (peer.convert, peer.export) if peer else (lambda t: t,) * 2
    tensors = gpu_rows.trying(lambda: [convert(ts) for ts in found.rotate])
    if name != "eager":
        got = gpu_rows.trying(lambda: results(lambda *ts: export(function(*ts)), tensors[0], row.direction))
        if why := difference(got, *reference):
            raise Refused(why)
    skip = place * len(tensors) // max(len(found.about), 1)  # no two candidates are at the same set
    call = gpu_rows.trying(lambda: harness.caller(function, tensors, row.direction, skip))
    weigh(found, name, call, harness.once(function, tensors[0], row.direction), clock)


def weigh(found: Field, name: str, call: Callable, once: Callable, clock):
    """Adds a warm candidate: how long a call takes, about, and the memory of ``once``."""
    found.estimates[name] = gpu_rows.trying(lambda: clock.estimate(call))
    found.about[name]["memory"] = gpu_rows.trying(lambda: memory.peak_bytes(once, clock.device))
    found.calls[name] = call


def difference(got: tuple, theirs: tuple, exact: tuple) -> str:
    """Why the results are not PyTorch's; empty if they are.

    ``theirs`` are PyTorch's, ``exact`` are too, but in float32: what is farther from these than OFF and than ``theirs``
    is another computation. (PyTorch's own bfloat16 layer_norm is 50 % off in dw over 8192 rows, which it sums in bfloat16.)
    """
    if [g.shape for g in got] != [t.shape for t in theirs]:
        return f"its results have shapes {[tuple(g.shape) for g in got]}, PyTorch's {[tuple(t.shape) for t in theirs]}"
    for g, t, e in zip(got, theirs, exact, strict=True):
        if not distance(g, e) <= max(OFF, distance(t, e)):
            return f"its result is {distance(g, e):.0%} off PyTorch's in float32: another computation"
    return ""


def distance(x, exact) -> float:
    """||x - exact|| / ||exact||"""
    return ((x.to(exact.device).float() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def whole_model(row: Row, backends, peers, peaks: Peaks, clock, say) -> Field:
    """Of the GPT: one candidate is one model, in training with its optimizer. The first call's results are compared."""
    found = exact = None
    for name in sorted((*backends, *gpt.names(row.case.op, peers)), key=lambda name: name != "eager"):
        say(name)
        call, tokens, peak = gpt.candidate(row, clock.device, name, peaks)
        found = found or Field("tok/s", tokens, peak, input_sets=gpt.BATCHES if row.case.op == "gpt" else 1)
        found.about[name] = {"ours": name in backends}
        try:
            first = gpu_rows.trying(call)
            exact = exact or first
            if why := difference(first, exact, exact):
                raise Refused(why)
            weigh(found, name, call, call, clock)
        except Refused as e:
            found.refuse(name, str(e))
    return found
