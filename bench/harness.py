"""How a row is measured: our op and PyTorch eager, turn by turn, in one benchmark.

Machines drift, so two numbers taken a minute apart say nothing about each other. `compare` times
pairs: a block of our calls and a block of PyTorch's, in an order drawn anew for each pair. The ratio
is that of the two medians; beside it stands the median over the pairs of each pair's own ratio.
Every call takes the next of several input sets, so that data comes from where a model would find it.
"""

import glob
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import pygpt
from pygpt.backend import choose

BLOCK = 0.004  # seconds: short calls are repeated to fill a block, far above the timer's resolution
MIN_PAIRS = {1.0: 5, 10.0: 3, math.inf: 1}  # a pair takes less than so many seconds: pairs at least
MAX_PAIRS = 200
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
    if direction == "forward":
        calls = [partial(function, *ts) for ts in tensors]
    else:
        calls = [_backward(function, ts) for ts in tensors]
    ring = itertools.cycle(calls[skip:] + calls[:skip])

    def call():
        next(ring)()  # the result is dropped here: its release is part of the time, on both sides alike

    return call


def _backward(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(o) for o in outputs]
    return partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True)


# ------------------------------------------------------------------------------- how
def compare(benchmark, ours: Callable, eager: Callable, seconds: float) -> dict | None:
    """Times both for about ``seconds``; pytest-benchmark times ours, its teardown the other half of each pair."""
    if benchmark.disabled:
        benchmark.pedantic(ours)
        return None
    estimate = _estimate(ours), _estimate(eager)
    calls = max(1, math.ceil(BLOCK / min(estimate)))
    pair = calls * sum(estimate)
    least = next(pairs for limit, pairs in MIN_PAIRS.items() if pair < limit)
    pairs = min(MAX_PAIRS, max(least, int(seconds / pair)))
    eager_times, turns = [], random.Random(0)

    def eager_turns():
        """Advanced before and after each of our blocks."""
        for _ in range(pairs):
            eager_first = turns.random() < 0.5
            if eager_first:
                eager_times.append(_block(eager, calls))
            yield
            if not eager_first:
                eager_times.append(_block(eager, calls))

    turn = eager_turns()
    next(turn)
    benchmark.pedantic(ours, rounds=pairs, iterations=calls, teardown=lambda: next(turn, None))
    return _summary(benchmark.stats.stats.data, eager_times, calls)


def _block(call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _estimate(call) -> float:
    """Seconds of a call, warm: the best of the calls that fit into a twentieth of a second, at least two if quick."""
    best = first = _block(call, 1)
    end = time.perf_counter() + 0.05
    while first < 0.5 and (best == first or time.perf_counter() < end):
        best = min(best * (1 - 1e-9), _block(call, 1))
    return best


def _summary(ours: list[float], eager: list[float], calls: int) -> dict:
    assert len(ours) == len(eager)
    mid, peer = statistics.median(ours), statistics.median(eager)
    return {
        "ours_ms": mid * 1e3,
        "eager_ms": peer * 1e3,
        "ratio": peer / mid,
        "paired_ratio": statistics.median(e / o for o, e in zip(ours, eager, strict=True)),
        "pairs": len(ours),
        "calls_per_block": calls,
    }


def measure(
    benchmark, op: str, setup: Callable[[], Work], direction: str, seconds: float, peaks: "Peaks"
) -> dict | None:
    """One row: the comparison, and its rates against the machine's peaks."""
    sets = input_sets(setup)
    tensors, work = [w.tensors for w in sets], sets[0]
    ours = caller(work.ours, tensors, direction)
    eager = caller(work.eager, tensors, direction, skip=len(sets) // 2)
    row = compare(benchmark, ours, eager, seconds)
    if row is None:
        return None
    amount = work.amount[direction == "backward"]
    if work.bound == "memory":
        rates(row, amount * work.tensors[0].element_size() / 1e9, "GB/s", peaks.copy)
    else:
        rates(row, amount / 1e9, "GFLOP/s", peaks.fma)
    return row | {"input_sets": len(sets), "backend": choose(op, work.tensors).backend}


def rates(row: dict, amount: float, unit: str, peak: float):
    """Adds both rates in ``unit`` and our share of ``peak``."""
    row |= {"unit": unit, "rate": amount / row["ours_ms"] * 1e3, "eager_rate": amount / row["eager_ms"] * 1e3}
    row["share_of_peak"] = row["rate"] / peak


# ------------------------------------------------------------------------------- the machine
@dataclass(frozen=True)
class Peaks:
    """The best this machine did in this run, all threads."""

    fma: float  # float32 multiply-adds, GFLOP/s
    fma_by: str
    copy: float  # Tensor.copy_ of memory far larger than the caches, read plus write, GB/s
    cpu_share: float  # of the cores' time, what this process got while measuring the first


def measure_peaks(quick: bool = False) -> Peaks:
    seconds = 0.3 if quick else 1.0
    a, b = torch.randn(2, 2048, 2048)
    wall, cpu = time.perf_counter(), time.process_time()
    matmul = 2 * 2048**3 / _best(lambda: torch.mm(a, b), seconds) / 1e9
    cpu_share = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
    fma = max(fma_rate(100) for _ in range(3 if quick else 10))
    source = torch.ones(max(128 << 20, 4 * last_level_cache()) // 4)
    target = torch.empty_like(source).fill_(0.0)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source), seconds) / 1e9
    return Peaks(max(fma, matmul), "multiply-add loop" if fma >= matmul else "2048 x 2048 matmul", copy, cpu_share)


def fma_rate(milliseconds: int) -> float:
    """GFLOP/s of the extension's multiply-add loop; 0 where it isn't built."""
    return pygpt._C.fma_rate(milliseconds) if hasattr(pygpt, "_C") else 0.0


def _best(call, seconds: float) -> float:
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(_block(call, 1))
    return min(times)
