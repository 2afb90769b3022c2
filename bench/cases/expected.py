"""What bfloat16 on an H100 is expected to reach: first bars, goals, the best rates seen elsewhere, estimates by hand.

TFLOP/s, of norms TB/s. The goals and first bars are this project's own. `by_hand` was estimated on 2026-11-28 from the
compiled loops (Triton 3.6, nvcc 13.0), before anything had run on a GPU.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..show.report import RESULTS

# (op, part of the shape) -> forward, backward, on Hopper. Bars in TB/s were set for the H200's copy rate.
H200_COPY = 4.3
BARS = {
    ("attention", "T1024 D64 causal"): (290, 200),
    ("attention", "T8192 D128 causal"): (480, 380),
    ("mlp", "C768"): (520, 520),
    ("mlp", "C1600"): (600, 600),
    ("mlp", "C4096"): (600, 600),
    ("layer_norm", ""): (3.4, 2.3),
    ("rms_norm", ""): (3.4, 2.3),
}


@dataclass(frozen=True)
class Expected:
    """One op, shape and direction."""

    op: str
    shape: str  # as bench.gpu writes it
    direction: str
    by_hand: dict[str, float]  # backend -> rate
    goal: float
    peer: float
    peer_is: str


_DATA = (  # op, shape, direction, by hand: Triton and CUDA C++, goal, the best rate seen elsewhere and whose it is
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

EXPECTED = tuple(
    Expected(op, shape, direction, {"triton": triton, "cuda": cuda}, goal, peer, whose)
    for op, shape, direction, triton, cuda, goal, peer, whose in _DATA
)


def bar(op: str, shape: str, dtype: str, direction: str, gpu: str, copy: float) -> float | None:
    """The first bar. Where memory is slower than the H200's, bars in TB/s are scaled by the copy rates."""
    if dtype != "bfloat16" or not any(name in gpu for name in ("H100", "H200", "GH200")):
        return None
    for (name, part), (forward, backward) in BARS.items():
        if name == op and part in shape:
            wanted = forward if direction == "forward" else backward
            return wanted * min(1.0, copy / H200_COPY) if "norm" in op and "H200" not in gpu else wanted
    return None


def newest() -> Path | None:
    """The last result of bench.gpu on an H100 in bench/results."""
    found = [path for path in RESULTS.glob("*.json") if "h100" in path.name]
    return max(found, key=lambda path: json.loads(path.read_text())["machine"]["date"], default=None)


def measured(path: Path) -> dict[tuple[str, ...], float]:
    """(op, shape, direction, backend) -> rate, of the rows in bfloat16 of a result of bench.gpu."""

    def rows() -> Iterator[dict]:
        for row in json.loads(path.read_text())["rows"]:
            if row["dtype"] == "bfloat16" and row.get("rate") and not row.get("wrong"):
                yield row

    return {(row["op"], row["shape"], row["direction"], row["backend"]): row["rate"] for row in rows()}


def beside(result: Path) -> Iterator[tuple[Expected, str, float | None]]:
    """Every row on each of our backends, and the rate that a result of bench.gpu has for it."""
    rates = measured(result)
    for row in EXPECTED:
        for backend in row.by_hand:
            yield row, backend, rates.get((row.op, row.shape, row.direction, backend))


def main() -> int:
    """``python -m bench.cases.expected RESULT``: what was measured beside what was expected."""
    parser = argparse.ArgumentParser(prog="python -m bench.cases.expected", description=main.__doc__)
    parser.add_argument("result", type=Path, help="a result of bench.gpu, as JSON")
    result = parser.parse_args().result
    try:
        found = list(beside(result))
    except (OSError, ValueError, KeyError, TypeError) as e:
        parser.error(f"{result} is no result of bench.gpu: {e!r}")
    for row, backend, rate in found:
        got = f"measured {rate:.3g}, {rate / row.by_hand[backend]:.2f} of the estimate" if rate else "not measured"
        expectation = f"estimate {row.by_hand[backend]:g}, goal {row.goal:g}, {row.peer_is} {row.peer:g}"
        print(f"{row.op} {row.shape} {row.direction} {backend}: {expectation}; {got}")
    print(f"{sum(rate is not None for *_, rate in found)} of {len(found)} expectations measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
