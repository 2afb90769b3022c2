"""y = x W + b for a weight W (K, N) that lies transposed, as GPT-2's Conv1D has it, by the kernels of linear.

Those want W^T (N, K) with contiguous rows, so each call would copy W. But linear's gradient dx = dy W reads W as it
lies, and is this product; dx = dy W^T is linear's own forward; and dW = x^T dy is linear's dW with the operands
exchanged. So no kernel is missing, and nothing is copied.
"""

import torch
from torch import Tensor

from .. import dispatch
from ..autocast import autocast
from ..dispatch import Call
from ..functional import linear
from ..ops.common import backward_kernels, composite_gradients, only, unread

FEW_ROWS = 4  # for fewer, torch's addmm is as fast or faster (docs/measured.md P4)


def _composite(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight)


class TransposedLinear(torch.autograd.Function):
    """(kernels, x (M, K), weight (K, N), bias (N,)) -> y (M, N)."""

    @staticmethod
    def forward(ctx, kernels, x, weight, bias):
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, bias)
        ctx.set_materialize_grads(False)
        y, _, _ = kernels.linear_bwd(x, unread(x, len(x), weight.shape[1]), weight, [True, False, False])
        return y.add_(bias)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 4
        x, weight, bias = ctx.saved_tensors
        kernels, needs = backward_kernels(ctx), ctx.needs_input_grad[1:]
        if kernels is None:
            return None, *composite_gradients(_composite, (x, weight, bias), needs, (dy,))
        dx = kernels.linear_fwd(dy, weight, None) if needs[0] else None
        dweight = kernels.linear_bwd(x, dy, weight, [False, True, False])[1] if needs[1] else None
        return None, *only(needs, (dx, dweight, dy.sum(0) if needs[2] else None))


def transposed_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns x weight + bias; ``x (..., K)``, ``weight (K, N)`` and ``bias (N,)`` give ``(..., N)``.

    Calls that are traced, transformed or served by PyTorch go to `pygpt.functional.linear`, with its errors.
    """
    op, tensors = dispatch.OPS["linear"], (x, weight, bias)
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == len(weight) and bias.shape == weight.shape[1:]
    if fits and not dispatch._traced(tensors):
        x, weight, bias = autocast(op, Call(tensors)).args
        row = dispatch.pick("linear", [x, weight, bias])
        if row.kernels is not dispatch.REFERENCE:
            y = TransposedLinear.apply(row.kernels, x.reshape(-1, x.shape[-1]), weight, bias)
            return y.view(*x.shape[:-1], y.shape[-1])
    return linear(tensors[0], tensors[1].t(), tensors[2])
