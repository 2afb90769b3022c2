"""y = x W + b for a weight W (K, N) that lies transposed, as GPT-2's Conv1D has it, by the kernels of linear.

Those want W^T (N, K) with contiguous rows, so each call would copy W. But linear's gradient dx = dy W reads W as it
lies, and is this product; dx = dy W^T is linear's own forward; and dW = x^T dy is linear's dW with the operands
exchanged. So no kernel is missing, and nothing is copied.
"""

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autocast import autocast
from ..dispatch import Call
from ..functional import linear
from ..ops.common import backward_kernels, composite_gradients, only

_NAME = "transposed_linear"  # in the dispatch cache
FEW_ROWS = 4  # for fewer, torch's addmm is as fast or faster (docs/measured.md P4)


def _composite(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight)


def _product(kernels: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    like_y = weight[:1].expand(len(x), -1)  # its shape alone is read, as dW is not wanted
    return kernels.linear_bwd(x, like_y, weight, [True, False, False])[0].add_(bias)


class TransposedLinear(torch.autograd.Function):
    """(kernels, x (M, K), weight (K, N), bias (N,)) -> y (M, N)."""

    @staticmethod
    def forward(ctx, kernels, x, weight, bias):
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, bias)
        ctx.set_materialize_grads(False)
        return _product(kernels, x, weight, bias)

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
    if weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == len(weight) and bias.shape == weight.shape[1:]:
        kernels, tensors = _resolved(x, weight, bias)
        if kernels is not None:
            rows, *parameters = tensors
            run = TransposedLinear.apply if dispatch._needs_gradient(list(tensors)) else _product
            y = run(kernels, rows.reshape(-1, rows.shape[-1]), *parameters)
            return y.view(*x.shape[:-1], y.shape[-1])
    return linear(x, weight.t(), bias)


def _resolved(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, tuple]:
    """The kernels that serve the call, or None, and the tensors as autocast has them.

    The dispatch cache holds the kernels of fast calls, as for the ops (dispatch.py).
    """
    tensors = x, weight, bias
    if dispatch._traced(tensors):
        return None, tensors
    key = dispatch.call_key(dispatch._ALLOWED["linear"], *tensors)
    kernels = dispatch.state.cache.get((_NAME, key))
    if key is None or kernels is None:
        tensors = autocast(dispatch.OPS["linear"], Call(tensors)).args
        kernels = dispatch.pick("linear", list(tensors)).kernels
        kernels = None if kernels is dispatch.REFERENCE else kernels
        if key is not None:
            dispatch.state.cache[_NAME, key] = kernels
    return kernels, tensors
