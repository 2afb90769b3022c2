"""The public arguments of the losses, checked and made canonical, and PyTorch's own expressions of them."""

import math
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import autocasting
from ..dispatch import Call
from .common import acc_dtype, check_tensors, checked_integer

_torchs, _torchs_linear = F.cross_entropy, F.linear  # bound now, because a user may replace them by ours later
_torchs_both = getattr(F, "linear_cross_entropy", None)  # torch 2.13 and later


class Options(NamedTuple):
    """The arguments of the kernels after the leading ones, in the order of their schema."""

    ignore_index: int
    weight: Tensor | None  # (V,), float32 (float64 for float64)
    reduction: str
    label_smoothing: float
    z_loss: float

    def scalars(self) -> dict[str, Any]:
        """Those that are no tensors, as keyword arguments of the public functions."""
        return {name: value for name, value in self._asdict().items() if name != "weight"}


REDUCTIONS = ("none", "mean", "sum")
_LEAST, _MOST = -(2**63), 2**63 - 1  # of int64


def known_reduction(op: str, reduction: str) -> str:
    """The same name. Raises what the compiled kernels raise for another value."""
    if reduction not in REDUCTIONS:
        raise RuntimeError(f"pygpt.{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return reduction


# ------------------------------------------------------------------------------- PyTorch's own expressions
def expression(input: Tensor, target: Tensor, o: Options) -> Tensor:
    """The loss of any input and target that torch's own function takes, in input's dtype.

    Ignored rows are masked, as a gradient of 0 times one of torch's NaN would be NaN.
    """
    at = min(1, input.dim() - 1)
    kept = None  # for probabilities, and where the shapes do not fit, of which torch's function says so
    if target.shape != input.shape and target.shape == (*input.shape[:at], *input.shape[at + 1 :]):
        kept = target.long() != o.ignore_index
        input = torch.where(kept.unsqueeze(at), input, 0)
    loss = _torchs(
        input, target, o.weight,
        ignore_index=o.ignore_index, reduction=o.reduction, label_smoothing=o.label_smoothing,
    )  # fmt: skip
    if not o.z_loss:
        return loss
    squares = o.z_loss * torch.logsumexp(input, at).square()
    if kept is not None:
        squares = torch.where(kept, squares, 0)
    if o.reduction == "none":
        return loss + squares
    count = squares.numel() if kept is None else kept.sum()
    return loss + (squares.sum() / count if o.reduction == "mean" else squares.sum())


def linear_expression(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, o: Options):
    """The same of a linear layer's output, whose weight may be (V, d1, ..., K)."""
    V, *between, _ = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = _torchs_linear(input, linear_weight.flatten(0, -2), bias)
    return expression(logits.reshape(*input.shape[:-1], V, *between), target, o)


# ------------------------------------------------------------------------------- checks
def _checked_options(op: str, weight, reduction, ignore_index, label_smoothing, z_loss) -> Options:
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"pygpt.{op}: weight must be a Tensor, got {type(weight).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"pygpt.{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    ignore_index = checked_integer(f"pygpt.{op}", "ignore_index", ignore_index)
    if not _LEAST <= ignore_index <= _MOST:
        raise ValueError(f"pygpt.{op}: ignore_index must be an int64, got {ignore_index}")
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        if not isinstance(value, Real):
            raise TypeError(f"pygpt.{op}: {name} must be a number, got {type(value).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"pygpt.{op}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if not -math.inf < z_loss < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"pygpt.{op}: z_loss must be finite, got {z_loss}")
    return Options(ignore_index, weight, reduction, float(label_smoothing), float(z_loss))


def _objection(op: str, input, target, weight, shape, classes: int) -> Exception | None:
    """Why no kernel takes the target or the weight of ``classes`` classes. shape: what a target of classes has."""
    start = f"pygpt.{op}:"
    if weight is not None and weight.device != input.device:
        raise ValueError(f"{start} weight is on {weight.device}, input on {input.device}")
    if target.is_floating_point():
        return TypeError(f"{start} target must be int64, got {target.dtype}; PyTorch serves probabilities")
    if target.dtype != torch.int64:
        return TypeError(f"{start} target must be int64, got {target.dtype}")
    if target.shape != shape:
        return ValueError(f"{start} target must have shape {tuple(shape)}, got {tuple(target.shape)}")
    if classes == 0:
        return ValueError(f"{start} input must have at least 1 class, got 0")
    if weight is None:
        return None
    if weight.shape != (classes,):
        return ValueError(f"{start} weight must have shape ({classes},), got {tuple(weight.shape)}")
    if weight.dtype != input.dtype and not autocasting(input.device.type):
        return TypeError(f"{start} weight is {weight.dtype}, input is {input.dtype}; they must be equal")
    if weight.requires_grad and torch.is_grad_enabled():
        return ValueError(f"{start} weight must not require a gradient, as the loss has none for it")
    return None


def _finish(input: Tensor, target: Tensor, reduction: str):
    """Gives a loss torch's shape and dtype. Under autocast, torch's losses are float32."""
    dtype = acc_dtype(input) if autocasting(input.device.type) else input.dtype

    def finish(loss):
        return (loss.reshape(target.shape) if reduction == "none" else loss).to(dtype)

    return finish


def prepare_cross_entropy(
    input, target, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0
) -> Call:
    op = "cross_entropy"
    error = check_tensors(op, (input, target))
    options = _checked_options(op, weight, reduction, ignore_index, label_smoothing, z_loss)
    torchs = partial(expression, input, target, options)
    if error is None and input.dim() == 0:
        error = ValueError(f"pygpt.{op}: input needs at least 1 dimension, got a scalar")
    if error is None:
        at = min(1, input.dim() - 1)
        error = _objection(op, input, target, weight, (*input.shape[:at], *input.shape[at + 1 :]), input.shape[at])
    if error is not None:
        return Call((input, target, *options), torch=torchs, error=error)
    x = input.movedim(at, -1)
    x = x.reshape(-1, x.shape[-1]) if target.numel() else x.reshape(0, x.shape[-1])
    plain = fits(input, target, *options)
    weight = None if weight is None else weight.to(acc_dtype(input))
    args = x, target.reshape(-1), *options._replace(weight=weight)
    fast = (input, target) if plain else None
    return Call(args, finish=_finish(input, target, reduction), torch=torchs, fast=fast)


def fits(input, target, ignore_index, weight, reduction, label_smoothing, z_loss) -> bool:
    """Whether `prepare_cross_entropy` would change nothing and raise nothing."""
    return (
        weight is None
        and type(ignore_index) is int
        and _LEAST <= ignore_index <= _MOST
        and input.dim() == 2
        and input.shape[1] > 0
        and input.dtype == acc_dtype(input)
        and target.dtype == torch.int64
        and target.shape == input.shape[:1]
        and reduction in REDUCTIONS
        and isinstance(label_smoothing, float)
        and isinstance(z_loss, float)
        and 0.0 <= label_smoothing <= 1.0
        and -math.inf < z_loss < math.inf
    )


def prepare_linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None,
    label_smoothing=0.0, options=None, z_loss=0.0,
) -> Call:  # fmt: skip
    op = "linear_cross_entropy"
    index = -100 if ignore_index is None else ignore_index
    tensors = input, linear_weight, target, linear_bias
    error = check_tensors(op, tensors, one_dtype=True)
    o = _checked_options(op, weight, reduction, index, label_smoothing, z_loss)
    torchs = partial(linear_expression, *tensors, o)
    if _torchs_both is not None and not z_loss:
        index = None if ignore_index is None else o.ignore_index  # torch refuses one beside probabilities
        scalars = {"reduction": reduction, "ignore_index": index, "label_smoothing": label_smoothing}
        torchs = partial(_torchs_both, *tensors[:3], linear_bias=linear_bias, weight=weight, **scalars)
    if error is None:
        error = _misfit(op, input, linear_weight, linear_bias)
    if error is None:
        error = _objection(op, input, target, weight, input.shape[:-1], linear_weight.shape[0])
    trained = input, linear_weight, linear_bias
    needs = tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in trained)
    if error is not None:
        return Call((input, linear_weight, target, linear_bias, needs, *o), torch=torchs, error=error)
    weight = None if weight is None else weight.to(acc_dtype(input))
    x = input if input.dim() == 2 else input[None]
    args = x, linear_weight, target.reshape(-1), linear_bias, needs, *o._replace(weight=weight)
    return Call(args, finish=_finish(input, target, reduction), torch=torchs)


def _misfit(op: str, input, linear_weight, linear_bias) -> Exception | None:
    start = f"pygpt.{op}:"
    if linear_weight.dim() != 2:
        return ValueError(f"{start} linear_weight must be a matrix, got shape {tuple(linear_weight.shape)}")
    if input.dim() not in (1, 2):
        return ValueError(f"{start} input must have 1 or 2 dimensions, got {input.dim()}")
    V, K = linear_weight.shape
    if input.shape[-1] != K:
        return ValueError(
            f"{start} input has {input.shape[-1]} features, linear_weight {tuple(linear_weight.shape)} wants {K}"
        )
    if linear_bias is not None and linear_bias.shape != (V,):
        return ValueError(f"{start} linear_bias must have shape ({V},), got {tuple(linear_bias.shape)}")
    return None
