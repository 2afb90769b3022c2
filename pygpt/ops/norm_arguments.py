"""The public arguments of the norms, checked and made canonical."""

import math
from collections.abc import Sequence
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

from ..dispatch import Call
from .common import check_tensors

torchs_layer_norm, torchs_rms_norm = F.layer_norm, F.rms_norm  # bound now: a user may replace them by ours later


_EPS32, _EPS64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


def machine_eps(input) -> float:
    return _EPS64 if input.dtype == torch.float64 else _EPS32


def fitting_dims(input, normalized_shape, eps, weight, bias=None) -> int:
    """The length of normalized_shape if it fits input and the parameters and eps is a float, else 0."""
    shape = _as_tuple(normalized_shape)
    n = len(shape)
    fits = (
        n > 0
        and input.shape[-n:] == shape
        and (weight is None or weight.shape == shape)
        and (bias is None or bias.shape == shape)
        and isinstance(eps, float)
    )
    return n if fits else 0


def fitting_offset(weight, offset) -> bool:
    """Whether this is a weight's offset that a kernel takes."""
    return offset == 0.0 or (isinstance(offset, float) and weight is not None)


def _as_tuple(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def check_norm(op, input, normalized_shape, eps, weight, bias=None) -> tuple:
    """normalized_shape as a tuple, after checking input and parameters against it."""
    if not isinstance(eps, Real):
        raise TypeError(f"pygpt.{op}: eps must be a number, got {type(eps).__name__}")
    shape = _as_tuple(normalized_shape)
    n = len(shape)
    if n < 1:
        raise ValueError(f"pygpt.{op}: normalized_shape must have at least one dimension")
    if input.shape[-n:] != shape:
        got = tuple(input.shape)
        raise ValueError(f"pygpt.{op}: normalized_shape {shape} is not the end of the input's shape {got}")
    if weight is not None and weight.shape != shape:
        raise ValueError(f"pygpt.{op}: weight must have shape {shape}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != shape:
        raise ValueError(f"pygpt.{op}: bias must have shape {shape}, got {tuple(bias.shape)}")
    return shape


def checked_offset(op, weight, offset) -> float:
    if not isinstance(offset, Real):
        raise TypeError(f"pygpt.{op}: weight_offset must be a number, got {type(offset).__name__}")
    if offset and weight is None:
        raise ValueError(f"pygpt.{op}: weight_offset {offset} needs a weight, got None")
    return float(offset)


def flat(n, *tensors) -> tuple:
    """The tensors with their last n dimensions as one."""
    if n == 1:
        return tensors
    return tuple(
        t if t is None else t.reshape(*t.shape[: t.dim() - n], math.prod(t.shape[t.dim() - n :])) for t in tensors
    )


def prepare_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Call:
    torchs = partial(torchs_layer_norm, input, _as_tuple(normalized_shape), weight, bias, eps)
    if error := check_tensors("layer_norm", (input, weight, bias)):
        return Call((input, weight, bias, eps), torch=torchs, error=error)
    shape = check_norm("layer_norm", input, normalized_shape, eps, weight, bias)
    x, w, b = flat(len(shape), input, weight, bias)
    return Call((x, w, b, float(eps)), finish=lambda y: y.view(input.shape), torch=torchs, fast=(input, weight, bias))


def _prepare_sum(op, input, residual, normalized_shape, eps, *parameters, options=()) -> Call:
    """eps is a number, or the function that gives it for the promoted tensors. options: the arguments after it."""
    if error := check_tensors(op, (input, residual, *parameters)):
        if any(options):
            raise error
        return Call((input, residual, *parameters, eps, *options), error=error)
    if input.shape != residual.shape:
        want, got = tuple(input.shape), tuple(residual.shape)
        raise ValueError(f"pygpt.{op}: residual must have shape {want}, got {got}")
    common = torch.promote_types(input.dtype, residual.dtype)  # as in x + residual; autocast mixes them in every block
    x, r = input.to(common), residual.to(common)
    eps = eps(x) if callable(eps) else eps
    shape = check_norm(op, input, normalized_shape, eps, *parameters)

    def finish(results):
        return tuple(t.view(input.shape) for t in results)

    fast = (input, residual, *parameters) if input.dtype == residual.dtype else None
    return Call((*flat(len(shape), x, r, *parameters), float(eps), *options), finish=finish, fast=fast)


def prepare_add_layer_norm(input, residual, normalized_shape, weight=None, bias=None, eps=1e-5) -> Call:
    return _prepare_sum("add_layer_norm", input, residual, normalized_shape, eps, weight, bias)


def prepare_add_rms_norm(input, residual, normalized_shape, weight=None, eps=None, *, weight_offset=0.0) -> Call:
    options = (checked_offset("add_rms_norm", weight, weight_offset),)
    eps = machine_eps if eps is None else eps
    return _prepare_sum("add_rms_norm", input, residual, normalized_shape, eps, weight, options=options)


def prepare_rms_norm(input, normalized_shape, weight=None, eps=None, *, weight_offset=0.0) -> Call:
    offset = checked_offset("rms_norm", weight, weight_offset)
    torchs = None if offset else partial(torchs_rms_norm, input, _as_tuple(normalized_shape), weight, eps)
    if error := check_tensors("rms_norm", (input, weight)):
        if offset:  # which PyTorch's function does not have
            raise error
        return Call((input, weight, eps, offset), torch=torchs, error=error)
    if eps is None:
        eps = machine_eps(input)
    shape = check_norm("rms_norm", input, normalized_shape, eps, weight)
    x, w = flat(len(shape), input, weight)

    def finish(y):
        y = y.view(input.shape)
        return y if input.is_contiguous() else y.contiguous(memory_format=suggest_memory_format(input))

    return Call((x, w, float(eps), offset), finish=finish, torch=torchs, fast=(input, weight))
