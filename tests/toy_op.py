"""silu, y = x sigmoid(x): an op that only PyTorch serves, in one file as in pygpt/ops/. See test_new_op.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.dispatch import Call, Op, call, lookup, register
from pygpt.ops.common import (
    Function,
    Spec,
    acc,
    check_tensors,
    composite_gradients,
    lead,
)


def silu_composite(x):
    return F.silu(x)


def silu_fwd(x: Tensor) -> Tensor:
    return (acc(x) * torch.sigmoid(acc(x))).to(x.dtype)


def silu_bwd(dy: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(acc(x))
    return (acc(dy) * s * (1 + acc(x) * (1 - s))).to(x.dtype)


class SiLU(Function):
    """(kernels, x) -> y."""

    @staticmethod
    def forward(ctx, kernels, x):
        ctx.kernels = kernels
        SiLU.save(ctx, (x,))
        return kernels.silu_fwd(x)

    @staticmethod
    def save(ctx, args, results=()):
        ctx.save_for_backward(*args)
        ctx.set_materialize_grads(False)

    @staticmethod
    def gradients(ctx, kernels, needs, dy):
        if dy is None:
            return (None,)
        (x,) = ctx.saved_tensors
        if kernels is None:
            return composite_gradients(silu_composite, (x,), needs, (dy,))
        return (kernels.silu_bwd(dy, x),)


def silu(input: Tensor) -> Tensor:
    """x sigmoid(x) (Elfwing et al. 2017)."""
    kernel = lookup("silu", input)
    return call("silu", input) if kernel is None else kernel(input)


def _prepare(input) -> Call:
    error = check_tensors("silu", (input,))
    return Call((input,), error=error, fast=(input,) if error is None else None)


register(
    Op(
        "silu",
        public=silu,
        prepare=_prepare,
        composite=silu_composite,
        fwd=silu_fwd,
        bwd=silu_bwd,
        function=SiLU,
        specs={
            "silu": Spec(
                "silu",
                inputs=("x",),
                dims={"M": 4096, "gain": 1.0},
                draw=lambda random, d: (random(*lead(d["M"])) * d["gain"],),
                call=silu,
            )
        },
    )
)
