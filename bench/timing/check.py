"""Checks that a candidate computes what PyTorch computes: a wrong kernel must not look fast.

The yardstick is PyTorch in a wider dtype: float64 for float32, float32 for the 16-bit types. Results are compared by
blocks of rows, because a defect has a place, and because the size of a causal row depends on its place. Ours is wrong
where its error exceeds FACTOR times PyTorch's own plus the allowance of `pygpt verify`, which judges exactness more
strictly. Another library is rejected where its error exceeds both OFF and PyTorch's own, which can be larger than OFF
(docs/measured.md B5).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pygpt import verify

from ..cases.ops import Work
from ..cases.refusal import Refused
from .calls import drawn, prepared

FACTOR = 4.0
OFF = 0.05  # far above any rounding
BLOCKS, ROWS = 64, 4  # blocks at most, and their rows at least: in one row, all but rounding can cancel


@dataclass(frozen=True)
class Errors:
    """The worst tensor's, relative to the size of PyTorch's result in the wider dtype."""

    ours: float
    eager: float
    wrong: bool  # by the strict rule


class Reference:
    """PyTorch's results of one direction of a row, in its dtype and in the wider one."""

    def __init__(self, work: Work, direction: str):
        self.tensors, self.direction = work.tensors, direction
        self.originals = tuple(t.clone() for t in work.tensors)
        self.random, eager = work.same_bits is not None, work.same_bits or work.eager
        wider = torch.float64 if work.tensors[0].dtype == torch.float32 else torch.float32
        self.grads = drawn(verify.as_tuple(eager(*work.tensors))) if direction == "backward" else None
        self.eager = self.results(eager, work.tensors)
        self.wide = self.results(eager, tuple(t.to(wider) for t in work.tensors))

    def results(self, function: Callable, tensors: tuple) -> tuple:
        torch.manual_seed(0)
        return tuple(t.detach() for t in verify.as_tuple(prepared(function, tensors, self.direction, self.grads)()))

    def judge(self, function: Callable, tensors: tuple, ours: bool) -> Errors:
        """Raises Refused where the function's results are wrong, or where it wrote to the row's inputs."""
        results = self.results(function, tensors)
        if not all(map(torch.equal, self.tensors, self.originals)):
            for t, original in zip(self.tensors, self.originals, strict=True):
                t.copy_(original)  # for the candidates that follow
            raise Refused("it writes to its inputs")
        shapes, expected = ([tuple(t.shape) for t in each] for each in (results, self.eager))
        if shapes != expected:
            raise Refused(f"its results have shapes {shapes}, PyTorch's {expected}")
        each = [compare(*three) for three in zip(results, self.eager, self.wide, strict=True)]
        worst = max(each, key=lambda e: (e.wrong, e.ours / max(e.eager, 1e-12)))
        if ours and worst.wrong:
            raise Refused(f"WRONG: error {worst.ours:.1e}, PyTorch's {worst.eager:.1e}")
        if not all(e.ours <= max(OFF, e.eager) for e in each):
            raise Refused(f"its result is {max(e.ours for e in each):.0%} off PyTorch's: another computation")
        return worst


def compare(x: torch.Tensor, eager: torch.Tensor, wide: torch.Tensor) -> Errors:
    """Judges one tensor."""
    x = x.to(wide.device)
    error, theirs = (_squares(t.to(wide.dtype) - wide) for t in (x, eager))
    scale = _squares(wide)
    right = error.sqrt() <= FACTOR * theirs.sqrt() + verify.allowance(eager.dtype) * scale.sqrt()  # False for NaN
    size = scale.sum().clamp_min(1e-60)
    relative = [(part.sum() / size).sqrt().item() for part in (error, theirs)]
    return Errors(*relative, wrong=x.dtype != eager.dtype or not right.all().item())


def _squares(t: torch.Tensor) -> torch.Tensor:
    """Sums of squares over blocks of rows (of all heads together), in float64."""
    t = t.movedim(-2, 0).flatten(1) if t.dim() > 1 else t.reshape(1, -1)
    blocks = min(BLOCKS, max(1, len(t) // ROWS))
    return torch.stack([block.sum() for block in t.square().sum(1, dtype=torch.float64).chunk(blocks)])


def same_model(results: tuple, eager: tuple):
    """Raises Refused where a model's loss and gradient, or its logits, are not those of the eager model."""
    for x, expected in zip(results, eager, strict=True):
        if not (error := ((x.float() - expected.float()).norm() / expected.float().norm()).item()) <= OFF:
            raise Refused(f"its result is {error:.0%} off PyTorch's: another computation")
