"""silu, y = x sigmoid(x): an op that only PyTorch serves, in one file as in pygpt/ops/. See test_new_op.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.dispatch import Call, Op, call, lookup, register
from pygpt.ops.common import (
    Spec,
    acc,
    backward_kernels,
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


class SiLU(torch.autograd.Function):
    """(kernels, x) -> y."""

    @staticmethod
    def forward(ctx, kernels, x):
        ctx.kernels = kernels
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return kernels.silu_fwd(x)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None
        (x,) = ctx.saved_tensors
        kernels = backward_kernels(ctx)
        if kernels is None:
            return None, *composite_gradients(silu_composite, (x,), (True,), (dy,))
        return None, kernels.silu_bwd(dy, x)


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
