"""How calls are timed, turn by turn, and what the machine itself can do.

Machines drift, so two numbers taken a minute apart say nothing about each other. A race goes round its
candidates, a block of calls each, in an order drawn anew for each round; what is compared are medians.
Every call takes the next of several input sets, so that data comes from where a model would find it.
"""

import glob
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

import pygpt
from pygpt import verify

BLOCK = 0.004  # seconds: short calls are repeated to fill a block, far above the timer's resolution
LEAST = {0.5: 5, 5.0: 3, math.inf: 1}  # a candidate's block takes less than so many seconds: rounds at least
MOST = 200  # rounds
SLOW, PATIENCE = 10, 0.1  # times the fastest block, and seconds: a candidate that is in its fewest rounds only
MAX_SETS = 8


# ------------------------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Work:
    """One op on one set of inputs, as its set-up function in ops.py describes it."""

    ours: Callable  # ours(*tensors) -> a tensor or a tuple of them
    eager: Callable  # the same in plain PyTorch
    tensors: tuple
    amount: tuple[float, float]  # forward, backward: FLOPs, or elements read and written
    bound: str = "compute"  # or "memory"


def last_level_cache() -> int:
    """Bytes of the largest cache a core can reach; 32 MiB where the system doesn't say."""
    sizes = [0]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        with open(path) as file:
            sizes.append(int(file.read().strip().removesuffix("K") or 0) * 1024)
    return max(sizes) or 32 << 20


def input_sets(setup: Callable[[], Work]) -> list[Work]:
    """Two to MAX_SETS sets of inputs, together twice the last-level cache where that many suffice."""
    first = setup()
    size = sum(t.nbytes for t in first.tensors)
    count = min(MAX_SETS, max(2, math.ceil(2 * last_level_cache() / max(size, 1))))
    return [first, *(setup() for _ in range(count - 1))]


def caller(function: Callable, tensors: list[tuple], direction: str, skip: int = 0) -> Callable:
    """Called without arguments, runs ``function`` on the next set; "backward": only its gradients."""
    calls = [prepared(function, ts, direction) for ts in tensors]
    ring = itertools.cycle(calls[skip:] + calls[:skip])

    def call():
        next(ring)()  # the result is dropped here: its release is part of the time, on all sides alike

    return call


def prepared(function: Callable, tensors: tuple, direction: str) -> Callable:
    """A call without arguments -> its results: the outputs, or the gradients of all ``tensors``."""
    if direction == "forward":
        return partial(function, *tensors)
    outputs, leaves = _forward(function, tensors)
    grads = [torch.empty_like(o).copy_(torch.randn(o.shape, device=o.device)) for o in outputs]  # laid out as outputs
    return partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True)


def once(function: Callable, tensors: tuple, direction: str) -> Callable:
    """A call without arguments that keeps nothing: forward, or forward and backward."""
    if direction == "forward":
        return partial(function, *tensors)

    def both():
        outputs, leaves = _forward(function, tensors)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

    return both


def _forward(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return verify.as_tuple(function(*leaves)), leaves


# ------------------------------------------------------------------------------- how
@dataclass
class Times:
    """Seconds per call of one candidate, block by block."""

    calls: int  # in a block
    seconds: list[float] = field(default_factory=list)


class CpuClock:
    device = "cpu"

    def estimate(self, call: Callable) -> float:
        """Seconds of a call, warm: the best of those that fit into a twentieth of a second, at least two if quick."""
        best = first = _block(call, 1)
        end = time.perf_counter() + 0.05
        while first < 0.5 and (best == first or time.perf_counter() < end):
            best = min(best * (1 - 1e-9), _block(call, 1))
        return best

    def race(self, calls: dict[str, Callable], estimates: dict[str, float], seconds: float) -> dict[str, Times]:
        """Times the candidates turn by turn in blocks for about ``seconds`` each. They must be warm."""
        times = {name: Times(max(1, math.ceil(BLOCK / estimates[name]))) for name in calls}
        rounds = rounds_of({name: times[name].calls * estimates[name] for name in calls}, seconds)
        turns = random.Random(0)
        for i in range(max(rounds.values())):
            here = [name for name in calls if i < rounds[name]]
            for name in turns.sample(here, len(here)):
                times[name].seconds.append(_block(calls[name], times[name].calls))
        return times

    def peaks(self, dtypes, quick: bool) -> "Peaks":
        return measure_peaks(dtypes, quick)


class GpuClock:
    """The same face over gpu_timer.py: events on the stream, a cold L2 cache, a full queue."""

    device = "cuda"

    def __init__(self):
        from . import cuda as gpu_timer

        self.by, self.timer = gpu_timer, gpu_timer.CudaTimer()

    def estimate(self, call):
        return self.timer.time([(call, 0.0)])[0][0] / 1e3

    def race(self, calls, estimates, seconds):
        timings = self.by.race(self.timer, calls, seconds * len(calls))
        return {name: Times(1, [ms / 1e3 for ms in timing.device]) for name, timing in timings.items()}

    def peaks(self, dtypes, quick):
        limits = self.by.limits(self.timer, dtypes)
        copy = limits["copy"] * 1e3  # a plain read's too
        return Peaks({name: limits[name] * 1e3 for name in dtypes}, f"{self.by.GEMM}^3 matmul", copy, copy)


def rounds_of(cost: dict[str, float], seconds: float) -> dict[str, int]:
    """How many rounds each candidate is in, by the seconds of its block: all in as many, the slow in their fewest."""
    least = lambda block: next(rounds for limit, rounds in LEAST.items() if block < limit)
    slow = max(PATIENCE, SLOW * min(cost.values()))
    mean = statistics.mean(block for block in cost.values() if block <= slow)
    usual = min(MOST, max(least(mean), int(seconds / mean)))
    return {name: usual if block <= slow else least(block) for name, block in cost.items()}


def _block(call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


# ------------------------------------------------------------------------------- the machine
@dataclass(frozen=True)
class Peaks:
    """The best this machine did in this run, all threads."""

    flops: dict[str, float]  # dtype -> GFLOP/s; CPU: float32 multiply-adds, the yardstick for every dtype
    flops_by: str
    copy: float  # Tensor.copy_ of memory far larger than the caches, read plus write, GB/s
    read: float  # Tensor.sum of it, GB/s
    cpu_share: float | None = None  # of the cores' time, what this process got while measuring the first


def measure_peaks(dtypes, quick: bool = False) -> Peaks:
    seconds = 0.3 if quick else 1.0
    a, b = torch.randn(2, 2048, 2048)
    wall, cpu = time.perf_counter(), time.process_time()
    matmul = 2 * 2048**3 / _best(lambda: torch.mm(a, b), seconds) / 1e9
    cpu_share = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
    fma = max(fma_rate(100) for _ in range(3 if quick else 10))
    source = torch.ones(max(128 << 20, 4 * last_level_cache()) // 4)
    target = torch.empty_like(source).fill_(0.0)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source), seconds) / 1e9
    read = source.nbytes / _best(source.sum, seconds) / 1e9
    by = "multiply-add loop" if fma >= matmul else "2048 x 2048 matmul"
    return Peaks(dict.fromkeys(dtypes, max(fma, matmul)), by, copy, read, cpu_share)


def fma_rate(milliseconds: int) -> float:
    """GFLOP/s of the extension's multiply-add loop; 0 where it isn't built."""
    return pygpt._C.fma_rate(milliseconds) if hasattr(pygpt, "_C") else 0.0


def _best(call, seconds: float) -> float:
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(_block(call, 1))
    return min(times)
