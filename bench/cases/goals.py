"""First bars, goals, and what bfloat16 on an H100 is expected to reach.

The rates are TFLOP/s, of norms TB/s. `by_hand` was estimated from the compiled loops (Triton 3.6, nvcc 13.0), before
anything had run on a GPU.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from pygpt.data import UsageError

from ..timing import results
from ..timing.results import NOISE, Entry, Result

H200_COPY = 4.3  # TB/s
# (op, part of the shape) -> forward, backward, on Hopper. Bars in TB/s were set for the H200's copy rate.
BARS = {
    ("attention", "T1024 D64 causal"): (290, 200),
    ("attention", "T8192 D128 causal"): (480, 380),
    ("mlp", "C768"): (520, 520),
    ("mlp", "C1600"): (600, 600),
    ("mlp", "C4096"): (600, 600),
    ("layer_norm", ""): (3.4, 2.3),
    ("rms_norm", ""): (3.4, 2.3),
}


# ------------------------------------------------------------------------------- the first bar
@dataclass(frozen=True)
class Bar:
    """What a row has to reach at least."""

    wanted: float
    unit: str  # "x eager": times PyTorch eager's speed; else a rate

    @property
    def least(self) -> float:
        """A ratio is allowed its noise."""
        return self.wanted * (1 - NOISE) if self.unit == "x eager" else self.wanted

    def value(self, result: Result, ours: Entry) -> float | None:
        return result.ratio(ours) if self.unit == "x eager" else ours.rate


def first_bar(result: Result, machine: dict) -> Bar | None:
    """The bar of a quiet row is on a CPU a ratio to PyTorch eager, of standard rows; on a Hopper GPU it is a rate."""
    if result.busy:
        return None
    if "gpu" in machine:
        wanted = hopper_bar(result.op, result.shape, result.dtype, result.direction, machine["gpu"],
                            machine["copy_peak_gbs"] / 1000)  # fmt: skip
        return wanted and Bar(1000 * wanted, "GB/s" if "norm" in result.op else "GFLOP/s")
    if not result.standard:
        return None
    if result.dtype == "float32":
        return Bar(1.0, "x eager")
    four = result.op == "mlp" or (result.op, result.direction) == ("attention", "backward")
    return Bar(4.0, "x eager") if result.dtype == "bfloat16" and four else None


def passes(result: Result, machine: dict) -> bool | None:
    """Tells whether all of ours meet the first bar; None without a bar."""
    if (bar := first_bar(result, machine)) is None:
        return None
    values = [bar.value(result, ours) for ours in result.ours]
    return all(value is not None and value >= bar.least for value in values)


def hopper_bar(op: str, shape: str, dtype: str, direction: str, gpu: str, copy: float) -> float | None:
    """Where memory is slower than the H200's, bars in TB/s are scaled by the copy rates, of which ``copy`` is one."""
    if dtype != "bfloat16" or not any(name in gpu for name in ("H100", "H200", "GH200")):
        return None
    for (name, part), rates in BARS.items():
        if name == op and part in shape:
            wanted = rates[direction == "backward"]
            return wanted * min(1.0, copy / H200_COPY) if "norm" in op and "H200" not in gpu else wanted
    return None


# ------------------------------------------------------------------------------- expectations
@dataclass(frozen=True)
class Expected:
    """What an op should reach in one shape and direction."""

    op: str
    shape: str
    direction: str
    triton: float  # by hand
    cuda: float  # by hand
    goal: float
    peer: float  # the best rate seen elsewhere
    peer_is: str

    @property
    def by_hand(self) -> dict[str, float]:
        return {"triton": self.triton, "cuda": self.cuda}


_EXPECTED = (
    ("attention", "B16 H12 T1024 D64 causal", "forward", 270, 210, 370, 291, "Triton, fp16, in flash-attention's plot"),
    ("attention", "B16 H12 T1024 D64 causal", "backward", 190, 160, 320, 264, "cuDNN, H200, window of 1024"),
    ("attention", "B2 H32 T8192 D128 causal", "forward", 420, 280, 660, 685, "FlashAttention-3; cuDNN 644"),
    ("attention", "B2 H32 T8192 D128 causal", "backward", 220, 190, 540, 541, "cuDNN, H200; deterministic 474"),
    ("mlp", "B16 T1024 C768 gelu_tanh", "forward", 400, 400, 620, 590, "cuBLAS alone at K = 768"),
    ("mlp", "B16 T1024 C768 gelu_tanh", "backward", 410, 380, 600, 590, "cuBLAS alone at K = 768"),
    ("mlp", "B16 T1024 C4096 gelu_tanh", "forward", 540, 480, 700, 786, "cuBLAS alone, H200"),
    ("mlp", "B16 T1024 C4096 gelu_tanh", "backward", 540, 460, 680, 786, "cuBLAS alone, H200"),
    ("layer_norm", "16384 x 768", "forward", 2.3, 2.3, 2.85, 2.99, "quack, 32768 x 32768"),
    ("layer_norm", "16384 x 4096", "forward", 2.7, 2.7, 2.85, 2.99, "quack, 32768 x 32768"),
    ("layer_norm", "16384 x 768", "backward", 1.7, 2.2, 2.7, 1.77, "torch.compile, H200, 1024 x 12288"),
    ("layer_norm", "16384 x 4096", "backward", 2.3, 2.4, 2.7, 1.77, "torch.compile, H200, 1024 x 12288"),
)  # norms' goals: 0.95 (forward) and 0.9 of a copy at 3.0 TB/s
EXPECTED = tuple(Expected(*row) for row in _EXPECTED)


def newest() -> Path | None:
    """The file of an H100's run in bench/results."""
    return results.newest(results.RESULTS, lambda path, rows: "h100" in path.name)


def measured(path: Path) -> dict[tuple[str, ...], float]:
    """(op, shape, direction, backend) -> rate, of a run's rows in bfloat16."""
    rows = [row for row in results.results(results.read(path)) if row.dtype == "bfloat16"]
    return {(row.op, row.shape, row.direction, ours.name): ours.rate / 1000 for row in rows for ours in row.ours}


def beside(path: Path) -> list[tuple[Expected, str, float | None]]:
    """Every expectation on each of our backends, and the rate that a run measured for it."""
    rates = measured(path)
    pairs = [(row, backend) for row in EXPECTED for backend in row.by_hand]
    return [(row, backend, rates.get((row.op, row.shape, row.direction, backend))) for row, backend in pairs]


def main() -> int:
    """``python -m bench.cases.goals RESULT``: what was measured beside what was expected."""
    parser = argparse.ArgumentParser(prog="python -m bench.cases.goals", description=main.__doc__)
    parser.add_argument("result", type=Path, help="the file of a run")
    try:
        compared = beside(parser.parse_args().result)
    except UsageError as e:
        parser.error(str(e))
    for row, backend, rate in compared:
        result = f"measured {rate:.3g}, {rate / row.by_hand[backend]:.2f} of the estimate" if rate else "not measured"
        expectation = f"estimate {row.by_hand[backend]:g}, goal {row.goal:g}, {row.peer_is} {row.peer:g}"
        print(f"{row.op} {row.shape} {row.direction} {backend}: {expectation}; {result}")
    print(f"{sum(rate is not None for *_, rate in compared)} of {len(compared)} expectations measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
