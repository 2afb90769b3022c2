"""layer_norm, add_layer_norm, rms_norm and add_rms_norm over the last dimension of x (..., N).

    layer_norm: xhat = (x - mean) rstd, rstd = 1 / sqrt(var + eps), y = xhat weight + bias    (Ba et al. 2016)
    rms_norm:   xhat = x rstd, rstd = 1 / sqrt(mean(x^2) + eps), y = xhat (weight + offset)   (Zhang and Sennrich 2019)
    add_layer_norm, add_rms_norm: s = x + residual and the norm of s, in one pass over memory

weight, bias (N,) or None. Backward keeps x (or s) and the statistics mean and rstd (...), and recomputes xhat. The
offset of a weight is 0, or 1 in Gemma, whose weights are stored around 0; the sum is formed in the statistics' dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Op, call, lookup, register
from .common import (
    Spec,
    acc,
    backward_kernels,
    composite_gradients,
    lead,
    only,
    rows,
    savable,
    unread,
    wanted,
)
from .norm_arguments import (
    fitting_dims,
    fitting_offset,
    flat,
    machine_eps,
    prepare_add_layer_norm,
    prepare_add_rms_norm,
    prepare_layer_norm,
    prepare_rms_norm,
    torchs_layer_norm,
    torchs_rms_norm,
)


# ------------------------------------------------------------------------------- the mathematics
def layer_norm_composite(x, weight, bias, eps):
    return torchs_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _affine(xhat, weight, bias):
    y = xhat if weight is None else xhat * acc(weight)
    return y if bias is None else y + acc(bias)


def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> y like x, mean and rstd with x's leading shape."""
    xa = acc(x)
    mean = xa.mean(-1)
    centred = xa - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    return _affine(centred * rstd[..., None], weight, bias).to(x.dtype).contiguous(), mean, rstd


def norm_bwd(dy, ds, x, weight, mean, rstd):
    """dx = rstd (g - mean(g) - xhat mean(g xhat)) + ds with g = dy weight, dweight and dbias. rms_norm has no mean."""
    dya, xa = acc(dy), acc(x)
    xhat = (xa if mean is None else xa - mean[..., None]) * rstd[..., None]
    g = dya if weight is None else dya * acc(weight)
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    dx = (dx if mean is None else dx - g.mean(-1, keepdim=True)) * rstd[..., None]
    return dx if ds is None else dx + acc(ds), rows(dya * xhat).sum(0), rows(dya).sum(0)


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return wanted(needs, norm_bwd(dy, None, x, weight, mean, rstd), x)


def add_layer_norm_composite(x, residual, weight, bias, eps):
    """-> layer_norm(x + residual), x + residual."""
    s = x + residual
    return layer_norm_composite(s, weight, bias, eps), s


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, s = x + residual rounded to the input's dtype, mean and rstd of s."""
    s = (x + residual).contiguous()
    y, mean, rstd = layer_norm_fwd(s, weight, bias, eps)
    return y, s, mean, rstd


def add_layer_norm_bwd(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the gradient of x and of residual, dweight, dbias. ds: the gradient from the sum's other consumer, or None."""
    return wanted(needs, norm_bwd(dy, ds, s, weight, mean, rstd), s)


def with_offset(weight, offset):
    """weight + offset in the dtype of sums. None stays None, and a weight without an offset stays itself."""
    return acc(weight) + offset if offset and weight is not None else weight


def rms_norm_composite(x, weight, eps, weight_offset=0.0):
    if not weight_offset:
        return torchs_rms_norm(x, x.shape[-1:], weight, eps)
    xhat = torchs_rms_norm(acc(x), x.shape[-1:], None, eps)
    return _affine(xhat, with_offset(weight, weight_offset), None).to(x.dtype)


def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """-> y like x, rstd with x's leading shape."""
    xa = acc(x)
    rstd = torch.rsqrt(xa.square().mean(-1) + eps)
    y = _affine(xa * rstd[..., None], with_offset(weight, weight_offset), None)
    return y.to(x.dtype).contiguous(), rstd


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, needs: list[bool], weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return wanted(needs, norm_bwd(dy, None, x, with_offset(weight, weight_offset), None, rstd)[:2], x)


def add_rms_norm_composite(x, residual, weight, eps, weight_offset=0.0):
    """-> rms_norm(x + residual), x + residual."""
    s = x + residual
    return rms_norm_composite(s, weight, eps, weight_offset), s


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, s = x + residual rounded to the input's dtype, rstd of s."""
    s = (x + residual).contiguous()
    y, rstd = rms_norm_fwd(s, weight, eps, weight_offset)
    return y, s, rstd


def add_rms_norm_bwd(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, rstd: Tensor, needs: list[bool],
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> the gradient of x and of residual, dweight. ds: the gradient from the sum's other consumer, or None."""
    return wanted(needs, norm_bwd(dy, ds, s, with_offset(weight, weight_offset), None, rstd)[:2], s)


# ------------------------------------------------------------------------------- autograd
class LayerNorm(torch.autograd.Function):
    """(kernels, x, weight, bias, eps) -> y."""

    @staticmethod
    def forward(ctx, kernels, x, weight, bias, eps):
        ctx.kernels, ctx.eps = kernels, eps
        y, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 5
        x, weight, mean, rstd = ctx.saved_tensors
        kernels, needs = backward_kernels(ctx), ctx.needs_input_grad[1:4]
        if kernels is None:
            bias = unread(x, x.shape[-1]) if needs[2] else None
            args = x, weight, bias, ctx.eps
            return None, *composite_gradients(layer_norm_composite, args, needs, (dy,)), None
        return None, *only(needs, kernels.layer_norm_bwd(dy, x, weight, mean, rstd, needs)), None


class RMSNorm(torch.autograd.Function):
    """(kernels, x, weight, eps, weight_offset) -> y."""

    @staticmethod
    def forward(ctx, kernels, x, weight, eps, weight_offset=0.0):
        ctx.kernels, ctx.eps, ctx.weight_offset = kernels, eps, weight_offset
        y, rstd = kernels.rms_norm_fwd(x, weight, eps, weight_offset)
        ctx.save_for_backward(savable(x), weight, rstd)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        count = len(ctx.needs_input_grad)  # of a registered op, arguments that have their defaults are left out
        if dy is None:
            return (None,) * count
        x, weight, rstd = ctx.saved_tensors
        kernels, needs = backward_kernels(ctx), ctx.needs_input_grad[1:3]
        if kernels is None:
            args = x, weight, ctx.eps, ctx.weight_offset
            grads = composite_gradients(rms_norm_composite, args, needs, (dy,))
        else:
            grads = only(needs, kernels.rms_norm_bwd(dy, x, weight, rstd, needs, ctx.weight_offset))
        return None, *grads, *(None,) * (count - 3)


def _saved_sum(ctx, kernels, weight, options, y, s, *statistics):
    """The results of a norm of a sum, after saving what `_sum_backward` reads. options: eps, and a weight's offset."""
    ctx.kernels, ctx.options = kernels, options
    ctx.save_for_backward(s, weight, *statistics)
    ctx.set_materialize_grads(False)
    return y, s


def _sum_backward(ctx, name, norm, parameters, dy, ds):
    """The gradients of the Function's arguments. ``name``: the backward kernel. ``norm``: the composite on the sum."""
    need_x, need_residual, *need_parameters = ctx.needs_input_grad[1 : 3 + parameters]
    others = len(ctx.needs_input_grad) - 3 - parameters  # of a registered op, defaults at the end are left out
    needs = need_x or need_residual, *need_parameters
    if dy is None:  # only the sum was used, or neither result
        dx, *of_parameters = ds, *(None for _ in need_parameters)
    else:
        s, weight, *statistics = ctx.saved_tensors
        kernels = backward_kernels(ctx)
        if kernels is None:
            bias = (unread(s, s.shape[-1]) if need else None for need in need_parameters[1:])
            args = s, weight, *bias, *ctx.options
            dx, *of_parameters = composite_gradients(lambda s, *rest: (norm(s, *rest), s), args, needs, (dy, ds))
        else:
            backward = getattr(kernels, name)
            dx, *of_parameters = only(needs, backward(dy, ds, s, weight, *statistics, needs, *ctx.options[1:]))
    return None, *only((need_x, need_residual), (dx, dx)), *of_parameters, *(None,) * others


class AddLayerNorm(torch.autograd.Function):
    """(kernels, x, residual, weight, bias, eps) -> layer_norm(x + residual), x + residual."""

    @staticmethod
    def forward(ctx, kernels, x, residual, weight, bias, eps):
        return _saved_sum(ctx, kernels, weight, (eps,), *kernels.add_layer_norm_fwd(x, residual, weight, bias, eps))

    @staticmethod
    def backward(ctx, dy, ds):
        return _sum_backward(ctx, "add_layer_norm_bwd", layer_norm_composite, 2, dy, ds)


class AddRMSNorm(torch.autograd.Function):
    """(kernels, x, residual, weight, eps, weight_offset) -> rms_norm(x + residual), x + residual."""

    @staticmethod
    def forward(ctx, kernels, x, residual, weight, eps, weight_offset=0.0):
        options = eps, weight_offset
        return _saved_sum(ctx, kernels, weight, options, *kernels.add_rms_norm_fwd(x, residual, weight, *options))

    @staticmethod
    def backward(ctx, dy, ds):
        return _sum_backward(ctx, "add_rms_norm_bwd", rms_norm_composite, 1, dy, ds)


# ------------------------------------------------------------------------------- the public functions
def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Returns (x - mean) / sqrt(var + eps) * weight + bias over the last dimensions (Ba et al. 2016).

    ``input`` has shape ``(..., *normalized_shape)``, and so has the result, in input's dtype. ``weight`` and ``bias``
    have shape ``normalized_shape`` or are None. Mean and variance are float32 (float64 for float64). Shapes that do not
    fit raise ValueError, wrong types, such as integer tensors, TypeError.
    """
    kernel = lookup("layer_norm", input, weight, bias)
    n = 0 if kernel is None else fitting_dims(input, normalized_shape, eps, weight, bias)
    if n == 1:
        return kernel(input, weight, bias, eps)
    if n == 0:
        return call("layer_norm", input, normalized_shape, weight, bias, eps)
    return kernel(*flat(n, input, weight, bias), eps).view(input.shape)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Returns layer_norm(input + residual) and input + residual, in one pass over memory.

    ``input`` and ``residual`` have one shape, ``(..., *normalized_shape)``, and so have both results. Their dtypes are
    promoted as by addition. ``weight``, ``bias`` and ``eps`` are those of `layer_norm`. Shapes that do not fit raise
    ValueError, wrong types, such as integer tensors, TypeError.
    """
    kernel = lookup("add_layer_norm", input, residual, weight, bias)
    if kernel is None or input.shape != residual.shape:
        return call("add_layer_norm", input, residual, normalized_shape, weight, bias, eps)
    n = fitting_dims(input, normalized_shape, eps, weight, bias)
    if n == 1:
        return kernel(input, residual, weight, bias, eps)
    if n == 0:
        return call("add_layer_norm", input, residual, normalized_shape, weight, bias, eps)
    y, s = kernel(*flat(n, input, residual, weight, bias), eps)
    return y.view(input.shape), s.view(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over the last dimensions (Zhang and Sennrich 2019).

    ``input`` has shape ``(..., *normalized_shape)``, and so has the result, in input's dtype and channels_last where
    the input is. ``weight`` has shape ``normalized_shape`` or is None. ``eps`` is by default the machine epsilon of the
    dtype, of float32 for the 16-bit types, as torch's. ``weight_offset`` is 1.0 in Gemma, whose weights are stored
    around 0; the sum is formed in float32 (float64 for float64), and weight has its ordinary gradient. An offset
    without a weight, and shapes that do not fit, raise ValueError, wrong types, such as integer tensors, TypeError.
    """
    kernel = lookup("rms_norm", input, weight)
    if kernel is None or (input.dim() > 3 and not input.is_contiguous()):  # the input may be channels_last
        return call("rms_norm", input, normalized_shape, weight, eps, weight_offset=weight_offset)
    epsilon = machine_eps(input) if eps is None else eps
    n = fitting_dims(input, normalized_shape, epsilon, weight) if fitting_offset(weight, weight_offset) else 0
    if n == 1:
        return kernel(input, weight, epsilon, weight_offset)
    if n == 0:
        return call("rms_norm", input, normalized_shape, weight, eps, weight_offset=weight_offset)
    return kernel(*flat(n, input, weight), epsilon, weight_offset).view(input.shape)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns rms_norm(input + residual) and input + residual, in one pass over memory (Zhang and Sennrich 2019).

    ``input`` and ``residual`` have one shape, ``(..., *normalized_shape)``, and so have both results. Their dtypes are
    promoted as by addition. ``weight``, ``eps`` and ``weight_offset`` are those of `rms_norm`; ``eps`` is by default
    the machine epsilon of the promoted dtype. Shapes that do not fit raise ValueError, wrong types, such as integer
    tensors, TypeError.
    """
    kernel = lookup("add_rms_norm", input, residual, weight)
    if kernel is None or input.shape != residual.shape:
        return call("add_rms_norm", input, residual, normalized_shape, weight, eps, weight_offset=weight_offset)
    epsilon = machine_eps(input) if eps is None else eps
    n = fitting_dims(input, normalized_shape, epsilon, weight) if fitting_offset(weight, weight_offset) else 0
    if n == 1:
        return kernel(input, residual, weight, epsilon, weight_offset)
    if n == 0:
        return call("add_rms_norm", input, residual, normalized_shape, weight, eps, weight_offset=weight_offset)
    y, s = kernel(*flat(n, input, residual, weight), epsilon, weight_offset)
    return y.view(input.shape), s.view(input.shape)


# ------------------------------------------------------------------------------- verify
def _draw(params, inputs=1, eps=1e-5):
    def draw(random, d):
        xs = [random(*lead(d["M"]), d["N"]) + d["mean"] for _ in range(inputs)]
        weights = [random(d["N"]) if d["affine"] else None for _ in range(params)]
        offset = (d["offset"],) if "offset" in d else ()
        return *xs, *weights, eps, *offset

    return draw


def without_statistics(dy, s, weight, eps, centre):
    """The gradient that the norm's input would have if the statistics were constants."""
    *_, rstd = layer_norm_fwd(s, None, None, eps) if centre else rms_norm_fwd(s, None, eps)
    return (dy if weight is None else dy * weight) * rstd[..., None]


def _cancelled(names, centre):
    def terms(args, grads):
        x, weight, *rest = args if len(names) == 1 else (args[0] + args[1], *args[2:])
        eps, offset = rest[-1:] + [0.0] if centre else (*rest, 0.0)[:2]
        return dict.fromkeys(names, without_statistics(grads[0], x, with_offset(weight, offset), eps, centre))

    return terms


def _call_rms_norm(x, weight, eps, weight_offset=0.0):
    return rms_norm(x, x.shape[-1:], weight, eps, weight_offset=weight_offset)


def _call_add_rms_norm(x, residual, weight, eps, weight_offset=0.0):
    return add_rms_norm(x, residual, x.shape[-1:], weight, eps, weight_offset=weight_offset)


_DIMS: dict[str, Any] = {"M": 64, "N": 768, "affine": 1, "mean": 0.0}
_SHAPES: tuple[dict, ...] = ({}, {"N": 1000, "mean": 10.0}, {"affine": 0})
_HOW: dict[str, Any] = {"dims": _DIMS, "shapes": _SHAPES}
_HOW_RMS: dict[str, Any] = {"dims": _DIMS | {"offset": 0.0}, "shapes": (*_SHAPES, {"offset": 1.0})}

register(
    Op(
        "layer_norm",
        public=layer_norm,
        prepare=prepare_layer_norm,
        composite=layer_norm_composite,
        fwd=layer_norm_fwd,
        bwd=layer_norm_bwd,
        function=LayerNorm,
        float32_on_cuda=True,
        specs={
            "layer_norm": Spec(
                "layer_norm",
                inputs=("x", "weight", "bias"),
                draw=_draw(2),
                call=lambda x, weight, bias, eps: layer_norm(x, x.shape[-1:], weight, bias, eps),
                cancelled=_cancelled(("dx",), True),
                **_HOW,
            )
        },
    )
)
register(
    Op(
        "add_layer_norm",
        public=add_layer_norm,
        prepare=prepare_add_layer_norm,
        composite=add_layer_norm_composite,
        fwd=add_layer_norm_fwd,
        bwd=add_layer_norm_bwd,
        function=AddLayerNorm,
        results=2,
        float32_on_cuda=True,
        specs={
            "add_layer_norm": Spec(
                "add_layer_norm",
                inputs=("x", "residual", "weight", "bias"),
                draw=_draw(2, inputs=2),
                call=lambda x, r, weight, bias, eps: add_layer_norm(x, r, x.shape[-1:], weight, bias, eps),
                outputs=("fwd", "sum"),
                cancelled=_cancelled(("dx", "dresidual"), True),
                **_HOW,
            )
        },
    )
)
register(
    Op(
        "rms_norm",
        public=rms_norm,
        prepare=prepare_rms_norm,
        composite=rms_norm_composite,
        fwd=rms_norm_fwd,
        bwd=rms_norm_bwd,
        function=RMSNorm,
        float32_on_cuda=True,
        specs={
            "rms_norm": Spec(
                "rms_norm",
                inputs=("x", "weight"),
                draw=_draw(1),
                call=_call_rms_norm,
                cancelled=_cancelled(("dx",), False),
                **_HOW_RMS,
            )
        },
    )
)
register(
    Op(
        "add_rms_norm",
        public=add_rms_norm,
        prepare=prepare_add_rms_norm,
        composite=add_rms_norm_composite,
        fwd=add_rms_norm_fwd,
        bwd=add_rms_norm_bwd,
        function=AddRMSNorm,
        results=2,
        float32_on_cuda=True,
        specs={
            "add_rms_norm": Spec(
                "add_rms_norm",
                inputs=("x", "residual", "weight"),
                draw=_draw(1, inputs=2),
                call=_call_add_rms_norm,
                outputs=("fwd", "sum"),
                cancelled=_cancelled(("dx", "dresidual"), False),
                **_HOW_RMS,
            )
        },
    )
)
