"""The candidates of a row: our backends and their peers, each as a call that is warm and was checked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

import pygpt
from pygpt import verify
from pygpt.dispatch import TABLE, choose

from ..cases import gpt, ops
from ..cases.peers import Peer
from ..cases.refusal import Refused, trying
from ..cases.rows import Row
from .calls import caller, once
from .check import Reference, same_model
from .clocks import Block, Peaks
from .memory import peak_bytes


@dataclass
class RowRun:
    """One row while it is measured: its work, who takes part, and who does not."""

    row: Row
    clock: object
    unit: str
    amount: float  # of units, per call: 1e9 FLOPs or bytes, or tokens
    peak: float | None  # the machine's, in ``unit``; None where the row is not bound by it
    blocks: dict[str, Block] = field(default_factory=dict)
    facts: dict[str, dict] = field(default_factory=dict)  # name -> ours, memory, error, eager_error, unchecked
    refused: dict[str, str] = field(default_factory=dict)  # peer -> why
    failed: dict[str, str] = field(default_factory=dict)  # our backend -> why
    input_sets: int = 1
    intensity: float | None = None  # operations per byte that must move

    def refuse(self, name: str, why: str):
        (self.failed if self.facts[name]["ours"] else self.refused)[name] = why

    def add_candidate(self, name: str, call: Callable, single: Callable):
        """``call`` is timed; the memory of ``single``, which keeps nothing, is measured. Both are warm."""
        block = self.clock.block(call)
        self.facts[name]["memory"] = peak_bytes(single, self.clock.device)
        self.blocks[name] = block


def prepare(
    row: Row, backends: list[str], peers: dict[str, Peer], peaks: Peaks, clock, log=lambda name: None
) -> RowRun:
    """``log`` gets the name of the candidate that is prepared next, which may take a while."""
    if row.case.op in gpt.DIRECTIONS:
        return _whole_model(row, backends, peers, peaks, clock, log)
    make = lambda *shape: torch.randn(shape, device=clock.device).to(ops.DTYPES[row.dtype])
    work = row.case.setup(make, *row.case.args)
    count, from_memory = clock.input_sets(sum(t.nbytes for t in work.tensors))
    sets = [work.tensors, *(row.case.setup(make, *row.case.args).tensors for _ in range(count - 1))]
    run = _row_run(row, work, peaks, from_memory, clock)
    run.input_sets = count
    reference = None
    try:
        reference = trying(lambda: Reference(work, row.direction))
        run.intensity = _intensity(work, (*reference.eager, *(reference.grads or ())), row.direction)
    except Refused as e:
        run.refused["the check"] = str(e)
    functions = _functions(work, backends, peers, run)
    for place, (name, function) in enumerate(functions.items()):
        log(name)
        start = place * count // len(functions)  # no two candidates are at the same input set
        try:
            trying(partial(_add_op, run, name, function, peers.get(name), sets, start, reference))
        except Refused as e:
            run.refuse(name, str(e))
            clock.release()
    return run


def _add_op(run: RowRun, name: str, function, peer, sets, start: int, reference):
    """Checks a candidate, and adds it."""
    tensors = [peer.convert(each) for each in sets] if peer else sets
    checked = reference and (run.facts[name]["ours"] or not reference.random)  # others draw random bits of their own
    if checked and name != "eager":
        exported = (lambda *ts: peer.export(function(*ts))) if peer else function
        errors = reference.judge(exported, tensors[0], run.facts[name]["ours"])
        run.facts[name] |= {"error": errors.ours, "eager_error": errors.eager}
    run.facts[name]["unchecked"] = not checked
    direction = run.row.direction
    call = caller(function, tensors, direction, start)
    run.add_candidate(name, call, once(function, tensors[0], direction))


def _row_run(row: Row, work: ops.Work, peaks: Peaks, from_memory: bool, clock) -> RowRun:
    amount = work.amount_of(row.direction)
    if work.bound == "memory":
        return RowRun(row, clock, "GB/s", amount / 1e9, peaks.memory if from_memory else None)
    return RowRun(row, clock, "GFLOP/s", amount / 1e9, peaks.flops[row.dtype])


def _intensity(work: ops.Work, others: tuple, direction: str) -> float:
    """FLOPs per byte that must move: the inputs and ``others``, which are results and upstream gradients.

    A norm or an activation counts one per element.
    """
    if work.bound == "memory":
        return 1.0 / work.tensors[0].element_size()
    return work.amount_of(direction) / sum(t.nbytes for t in (*work.tensors, *others))


def _functions(work: ops.Work, backends, peers: dict[str, Peer], run: RowRun) -> dict[str, Callable]:
    """Name -> function of the op's tensors, for every backend and peer that serves the op."""
    functions, case = {}, run.row.case
    for name in backends:
        run.facts[name] = {"ours": True}
        spec = verify.SPECS[case.op]
        if why := TABLE[name].objections(spec.op, work.tensors, spec.features):
            run.refuse(name, f"not served: {'; '.join(why)}")
        else:
            by_default = choose(spec.op, work.tensors, spec.features).backend == name
            functions[name] = work.ours if by_default else on_backend(name, work.ours)
    for name, peer in peers.items():
        if peer.serves(case.op):
            run.facts[name] = {"ours": False}
            try:
                functions[name] = trying(partial(peer.function, case.op, run.row.direction, work, case.dims))
            except Refused as e:
                run.refuse(name, str(e))
    return functions


def on_backend(name: str, function: Callable) -> Callable:
    """The function on one of our backends, whatever the table would choose."""

    def call(*tensors):
        with pygpt.backend(name):
            return function(*tensors)

    return call


def _whole_model(row: Row, backends, peers, peaks: Peaks, clock, log) -> RowRun:
    """Prepares a row of the GPT: each candidate has a model of its own. The results of the first call are compared."""
    run = eager = None
    for name in sorted((*backends, *gpt.names(row.case.op, peers)), key=lambda name: name != "eager"):
        log(name)
        call, tokens, peak = gpt.candidate(row, clock.device, name, peaks)
        run = run or RowRun(row, clock, "tok/s", tokens, peak, input_sets=gpt.BATCHES if row.case.op == "gpt" else 1)
        run.facts[name] = {"ours": name in backends}
        try:
            first = trying(call)
            eager = eager or first
            same_model(first, eager)
            trying(partial(run.add_candidate, name, call, call))
        except Refused as e:
            run.refuse(name, str(e))
    return run
