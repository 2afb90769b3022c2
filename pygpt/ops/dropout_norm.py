"""dropout_add_layer_norm and dropout_add_rms_norm: what ends a block of a transformer and begins the next one.

    s = dropout(x) + residual,   y = norm(s)          one pass over memory; x, residual (..., N), weight, bias (N,)

s has residual's dtype and y has x's, so that the residual stream can be float32 where the branches have 16 bits. The
product and the sum are formed in the dtype of statistics, and s is rounded once, before it is normalised. Backward
keeps s and the norm's statistics, and draws dropout's factors again from the seed: dx = ds factor, dresidual = ds.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..dispatch import Call, Op, call, lookup, new_seed, register
from .common import (
    Spec,
    acc,
    acc_dtype,
    backward_kernels,
    check_tensors,
    composite_gradients,
    dropout_factors,
    lead,
    only,
    savable,
    unread,
)
from .norm import (
    layer_norm_composite,
    layer_norm_fwd,
    norm_bwd,
    rms_norm_composite,
    rms_norm_fwd,
    with_offset,
    without_statistics,
)
from .norm_arguments import check_norm, checked_offset, fitting_dims, fitting_offset, flat, machine_eps


# ------------------------------------------------------------------------------- the mathematics
def _dropped(t, seed, dropout_p):
    """t (..., N) times dropout's factors, in the dtype of statistics. Without a seed there is no dropout."""
    if seed is None:
        return acc(t)
    if type(t) in dispatch.SHARDED:  # the rows of a rank have no numbers, so the bits are PyTorch's
        return F.dropout(acc(t), dropout_p)
    row = torch.arange(math.prod(t.shape[:-1]), device=t.device).view(*t.shape[:-1], 1)
    return acc(t) * dropout_factors(seed, dropout_p, t.shape[-1], row).to(acc_dtype(t))


def _sum(x, residual, seed, dropout_p):
    return (_dropped(x, seed, dropout_p) + acc(residual)).to(residual.dtype)


def _in_one_dtype(norm, dtype, s, *args):
    """The composite ``norm`` in the widest dtype of the statistics, rounded to ``dtype``."""
    of_statistics = {acc_dtype(t) for t in (s, *args) if isinstance(t, Tensor)}
    widest = torch.float64 if torch.float64 in of_statistics else torch.float32
    return norm(*(t.to(widest) if isinstance(t, Tensor) else t for t in (s, *args))).to(dtype)


def _bwd(dy, ds, s, weight, mean, rstd, needs, seed, dropout_p):
    """-> dx like dy, dresidual like s, dweight and dbias in weight's dtype, or without a weight in the statistics'."""
    d, *of_parameters = norm_bwd(dy, ds, s, weight, mean, rstd)
    without_weight = rstd.dtype if any(needs[2:]) else dy.dtype
    dtypes = dy.dtype, s.dtype, *[without_weight if weight is None else weight.dtype] * 2
    dx = d.clone() if seed is None else _dropped(d, seed, dropout_p)  # results of an op may not share memory
    return tuple(
        g.to(dtype).contiguous() if need else s.new_empty(0, dtype=dtype)
        for need, g, dtype in zip(needs, (dx, d, *of_parameters), dtypes, strict=False)
    )


def dropout_add_layer_norm_composite(x, residual, weight, bias, eps, seed, dropout_p):
    """-> layer_norm(s), s."""
    s = _sum(x, residual, seed, dropout_p)
    return _in_one_dtype(layer_norm_composite, x.dtype, s, weight, bias, eps), s


def dropout_add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y like x, s like residual, mean and rstd of s. seed (1,) int64: the key of dropout's random bits, or None."""
    s = _sum(x, residual, seed, dropout_p).contiguous()
    y, mean, rstd = layer_norm_fwd(acc(s), weight, bias, eps)
    return y.to(x.dtype), s, mean, rstd


def dropout_add_layer_norm_bwd(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool],
    seed: Tensor | None, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dresidual, dweight, dbias. ds: the gradient from the sum's other consumer, or None."""
    return _bwd(dy, ds, s, weight, mean, rstd, needs, seed, dropout_p)


def dropout_add_rms_norm_composite(x, residual, weight, eps, seed, dropout_p, weight_offset):
    """-> rms_norm(s), s."""
    s = _sum(x, residual, seed, dropout_p)
    return _in_one_dtype(rms_norm_composite, x.dtype, s, weight, eps, weight_offset), s


def dropout_add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, seed: Tensor | None, dropout_p: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y like x, s like residual, rstd of s."""
    s = _sum(x, residual, seed, dropout_p).contiguous()
    y, rstd = rms_norm_fwd(acc(s), weight, eps, weight_offset)
    return y.to(x.dtype), s, rstd


def dropout_add_rms_norm_bwd(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, rstd: Tensor, needs: list[bool],
    seed: Tensor | None, dropout_p: float, weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dresidual, dweight."""
    scale = with_offset(weight, weight_offset)
    dx, dresidual, dw = _bwd(dy, ds, s, scale, None, rstd, needs, seed, dropout_p)
    return dx, dresidual, dw if weight is None else dw.to(weight.dtype)


# ------------------------------------------------------------------------------- autograd
def _saved(ctx, kernels, x, weight, seed, dropout_p, options, y, s, *statistics):
    """The results, after saving what `_backward` reads. ``options``: eps, and a weight's offset."""
    ctx.kernels, ctx.dtype, ctx.dropout_p, ctx.options = kernels, x.dtype, dropout_p, options
    ctx.save_for_backward(s, weight, savable(seed), *statistics)
    ctx.set_materialize_grads(False)
    return y, s


def _backward(ctx, name, norm, parameters, dy, ds):
    """The gradients of the Function's arguments. ``name``: the backward kernel. ``norm``: the composite on the sum."""
    of_inputs, of_parameters = ctx.needs_input_grad[1:3], ctx.needs_input_grad[3 : 3 + parameters]
    others = len(ctx.needs_input_grad) - 3 - parameters
    s, weight, seed, *statistics = ctx.saved_tensors
    kernels = backward_kernels(ctx)
    if dy is not None and kernels is not None:
        dropout = seed, ctx.dropout_p, *ctx.options[1:]
        alike = seed is None and ctx.dtype == s.dtype  # both inputs have one gradient
        needs = ((False, any(of_inputs)) if alike else of_inputs) + of_parameters
        dx, d, *rest = getattr(kernels, name)(dy, ds, s, weight, *statistics, needs, *dropout)
        dx, rest = d if alike else dx, only(of_parameters, tuple(rest))
    else:
        d, rest = ds, (None,) * parameters  # only the sum was used, or neither result
        if dy is not None:
            bias = (unread(s, s.shape[-1]) if need else None for need in of_parameters[1:])
            args, needs = (s, weight, *bias, *ctx.options), (any(of_inputs), *of_parameters)
            d, *rest = composite_gradients(
                lambda s, *args: (_in_one_dtype(norm, ctx.dtype, s, *args), s), args, needs, (dy, ds)
            )
        dx = _dropped(d, seed, ctx.dropout_p).to(ctx.dtype) if d is not None and of_inputs[0] else None
    return None, *only(of_inputs, (dx, d)), *rest, *(None,) * others


class DropoutAddLayerNorm(torch.autograd.Function):
    """(kernels, x, residual, weight, bias, eps, seed, dropout_p) -> layer_norm(s), s."""

    @staticmethod
    def forward(ctx, kernels, x, residual, weight, bias, eps, seed, dropout_p):
        results = kernels.dropout_add_layer_norm_fwd(x, residual, weight, bias, eps, seed, dropout_p)
        return _saved(ctx, kernels, x, weight, seed, dropout_p, (eps,), *results)

    @staticmethod
    def backward(ctx, dy, ds):
        return _backward(ctx, "dropout_add_layer_norm_bwd", layer_norm_composite, 2, dy, ds)


class DropoutAddRMSNorm(torch.autograd.Function):
    """(kernels, x, residual, weight, eps, seed, dropout_p, weight_offset) -> rms_norm(s), s."""

    @staticmethod
    def forward(ctx, kernels, x, residual, weight, eps, seed, dropout_p, weight_offset):
        results = kernels.dropout_add_rms_norm_fwd(x, residual, weight, eps, seed, dropout_p, weight_offset)
        return _saved(ctx, kernels, x, weight, seed, dropout_p, (eps, weight_offset), *results)

    @staticmethod
    def backward(ctx, dy, ds):
        return _backward(ctx, "dropout_add_rms_norm_bwd", rms_norm_composite, 1, dy, ds)


# ------------------------------------------------------------------------------- the public functions
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns layer_norm(dropout(input) + residual) in input's dtype, and the sum in residual's.

    ``input`` and ``residual`` have one shape, ``(..., *normalized_shape)``, and so have both results. Each element of
    input is dropped with probability ``p`` and otherwise divided by 1 - p; without ``training`` none is. The seed of
    dropout's bits is drawn from torch's generator (Philox; Salmon et al. 2011), and the bits are the same on every
    backend. ``weight``, ``bias`` and ``eps`` are those of `layer_norm`.

    Kernels serve four dtypes of all tensors alike. Where input is bfloat16 or float16, residual may be float32, and so
    may weight and bias together. PyTorch serves other mixtures. Shapes and values that do not fit raise ValueError,
    wrong types, such as integer tensors, TypeError.
    """
    kernel = lookup("dropout_add_layer_norm", input, residual, weight, bias)
    if kernel is not None and _fits(input, residual, p):
        n = fitting_dims(input, normalized_shape, eps, weight, bias)
        if n > 0:
            seed = new_seed(input) if p and training else None
            results = kernel(*flat(n, input, residual, weight, bias), eps, seed, p if seed is not None else 0.0)
            return results if n == 1 else _shaped(results, input)
    return call("dropout_add_layer_norm", input, residual, normalized_shape, weight, bias, eps, p=p, training=training)


def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    p: float = 0.0,
    training: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns rms_norm(dropout(input) + residual) in input's dtype, and the sum in residual's.

    ``weight``, ``eps`` and ``weight_offset`` are those of `rms_norm` (Zhang and Sennrich 2019), but ``eps`` is by
    default the machine epsilon of residual's dtype. Everything else is as in `dropout_add_layer_norm`.
    """
    kernel = lookup("dropout_add_rms_norm", input, residual, weight)
    if kernel is not None and _fits(input, residual, p) and fitting_offset(weight, weight_offset):
        epsilon = machine_eps(residual) if eps is None else eps
        n = fitting_dims(input, normalized_shape, epsilon, weight)
        if n > 0:
            seed = new_seed(input) if p and training else None
            dropout = seed, p if seed is not None else 0.0
            results = kernel(*flat(n, input, residual, weight), epsilon, *dropout, weight_offset)
            return results if n == 1 else _shaped(results, input)
    return call(
        "dropout_add_rms_norm", input, residual, normalized_shape, weight, eps, p=p, training=training,
        weight_offset=weight_offset,
    )  # fmt: skip


def _fits(input, residual, p) -> bool:
    return input.shape == residual.shape and isinstance(p, float) and 0.0 <= p <= 1.0


def _shaped(results, input) -> tuple[Tensor, Tensor]:
    y, s = results
    return y.view(input.shape), s.view(input.shape)


def takes_dtypes(dtypes: Sequence[torch.dtype]) -> bool:
    """Whether kernels take input, residual and parameters of these dtypes: where input has 16 bits, the residual may be
    float32, and so may the parameters together."""
    input, residual, *parameters = dtypes
    allowed = (input, torch.float32) if input in (torch.bfloat16, torch.float16) else (input,)
    return residual in allowed and all(dtype in allowed and dtype == parameters[0] for dtype in parameters)


def _prepare(op, input, residual, normalized_shape, eps, p, training, *parameters, options=()) -> Call:
    """options: the arguments after dropout_p."""
    tensors = input, residual, *parameters
    if error := check_tensors(op, tensors):
        raise error
    if input.shape != residual.shape:
        want, got = tuple(input.shape), tuple(residual.shape)
        raise ValueError(f"pygpt.{op}: residual must have shape {want}, got {got}")
    shape = check_norm(op, input, normalized_shape, eps, *parameters)
    if not isinstance(p, Real):
        raise TypeError(f"pygpt.{op}: p must be a number, got {type(p).__name__}")
    if not 0.0 <= float(p) <= 1.0:
        raise ValueError(f"pygpt.{op}: p must be in [0, 1], got {p}")
    dropout_p = float(p) if training else 0.0
    canonical = flat(len(shape), *tensors)
    return Call(
        (*canonical, float(eps), None, dropout_p, *options),
        features=("dropout_p",) if dropout_p else (),
        finish=lambda results: _shaped(results, input),
        fast=tensors,
        seed=len(canonical) + 1 if dropout_p else None,
    )


def prepare_dropout_add_layer_norm(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, p=0.0, training=True
) -> Call:
    return _prepare("dropout_add_layer_norm", input, residual, normalized_shape, eps, p, training, weight, bias)


def prepare_dropout_add_rms_norm(
    input, residual, normalized_shape, weight=None, eps=None, *, p=0.0, training=True, weight_offset=0.0
) -> Call:
    op = "dropout_add_rms_norm"
    options = (checked_offset(op, weight, weight_offset),)
    eps = machine_eps(residual) if eps is None and isinstance(residual, Tensor) else eps
    return _prepare(op, input, residual, normalized_shape, eps, p, training, weight, options=options)


# ------------------------------------------------------------------------------- verify
def _draw(params):
    def draw(random, d):
        xs = [random(*lead(d["M"]), d["N"]) + d["mean"] for _ in range(2)]
        weights = [random(d["N"]) if d["affine"] else None for _ in range(params)]
        seed = (random(1) * 2**60).long() if d["dropout"] else None
        return *xs, *weights, 1e-5, seed, d["dropout"], *((d["offset"],) if "offset" in d else ())

    return draw


def _call(op, seed_at):
    """The public function on canonical arguments, but the seed is given, not drawn."""

    def call(x, residual, *args):
        tensors = [a for a in (x, residual, *args) if isinstance(a, Tensor)]
        row = dispatch.pick(op, tensors, ["dropout_p"] if args[seed_at] is not None else [])
        return dispatch._run(dispatch.OPS[op], row, Call((x, residual, *args)), tensors)

    return call


def _cancelled(centre):
    def terms(args, grads):
        x, residual, weight, *rest = args
        eps, seed, dropout_p = rest[centre : centre + 3]
        weight = weight if centre else with_offset(weight, rest[3])
        s = _sum(x, residual, seed, dropout_p)
        d = without_statistics(grads[0], s, weight, eps, centre)
        return {"dx": _dropped(d, seed, dropout_p), "dresidual": d}

    return terms


_DIMS: dict[str, Any] = {"M": 64, "N": 768, "affine": 1, "mean": 0.0, "dropout": 0.2}
_SHAPES: tuple[dict, ...] = ({}, {"N": 1000, "mean": 10.0}, {"affine": 0, "dropout": 0.0})

register(
    Op(
        "dropout_add_layer_norm",
        public=dropout_add_layer_norm,
        prepare=prepare_dropout_add_layer_norm,
        composite=dropout_add_layer_norm_composite,
        fwd=dropout_add_layer_norm_fwd,
        bwd=dropout_add_layer_norm_bwd,
        function=DropoutAddLayerNorm,
        results=2,
        float32_on_cuda=True,
        takes_dtypes=takes_dtypes,
        specs={
            "dropout_add_layer_norm": Spec(
                "dropout_add_layer_norm",
                inputs=("x", "residual", "weight", "bias"),
                dims=_DIMS,
                draw=_draw(2),
                call=_call("dropout_add_layer_norm", 3),
                shapes=_SHAPES,
                outputs=("fwd", "sum"),
                cancelled=_cancelled(True),
            )
        },
    )
)
register(
    Op(
        "dropout_add_rms_norm",
        public=dropout_add_rms_norm,
        prepare=prepare_dropout_add_rms_norm,
        composite=dropout_add_rms_norm_composite,
        fwd=dropout_add_rms_norm_fwd,
        bwd=dropout_add_rms_norm_bwd,
        function=DropoutAddRMSNorm,
        results=2,
        float32_on_cuda=True,
        takes_dtypes=takes_dtypes,
        specs={
            "dropout_add_rms_norm": Spec(
                "dropout_add_rms_norm",
                inputs=("x", "residual", "weight"),
                dims=_DIMS | {"offset": 0.0},
                draw=_draw(1),
                call=_call("dropout_add_rms_norm", 2),
                shapes=(*_SHAPES, {"offset": 1.0}),
                outputs=("fwd", "sum"),
                cancelled=_cancelled(False),
            )
        },
    )
)
