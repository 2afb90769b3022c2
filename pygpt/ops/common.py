"""What the ops share: accumulation, checks of tensors, and the base of the autograd Functions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from .. import dispatch
from ..autocast import autocasting


# ------------------------------------------------------------------------------- mathematics
def acc_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def acc(t):
    """``t`` in the dtype of sums and statistics. None stays None."""
    return None if t is None else t.to(acc_dtype(t))


def rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def wanted(needs, grads, like: Tensor):
    """Casts the wanted gradients to ``like.dtype``. An unwanted one is returned empty."""
    return tuple(
        g.to(like.dtype).contiguous() if need else like.new_empty(0) for need, g in zip(needs, grads, strict=True)
    )


def dense_strides(shape, *strides) -> tuple[int, ...]:
    """The strides of torch's elementwise result of inputs with these strides: dense, in the same order."""
    tensors = [torch.empty_strided(shape, each, device="meta") for each in strides]
    return torch.add(tensors[0], tensors[-1]).stride()


def laid_out(t: Tensor, strides, dtype: torch.dtype) -> Tensor:
    """A copy of ``t`` in another dtype, with these strides."""
    return t.new_empty_strided(t.shape, strides, dtype=dtype).copy_(t)


def as_tuple(result) -> tuple:
    """The results of an op as a tuple, also where there is only one."""
    return result if isinstance(result, tuple) else (result,)


# ------------------------------------------------------------------------------- dropout
def dropout_factors(seed: Tensor, p: float, columns: int, row: Tensor, head: Tensor | int = 0) -> Tensor:
    """(..., columns) in float64: 0 where dropout drops the element (row, column) of a head, else 1 / (1 - p).

    The bits are those of Philox4x32-10 (Salmon et al. 2011) with ``seed`` as its key. The counter is
    (column // 4, row, head, 0), and the column takes word column % 4. An element is dropped if its word is below
    floor(p 2^32). ``row`` and ``head`` broadcast, with 1 in the place of the columns.
    """
    group = torch.arange((columns + 3) // 4, device=seed.device)
    words = torch.stack(_philox(seed, (group, row, head, 0)), -1).flatten(-2)[..., :columns]
    return (words >= math.floor(p * 2**32)).double() * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def _philox(seed: Tensor, counter) -> list[Tensor]:
    """The four words, 32 bits each in int64, that Philox4x32-10 makes of a counter."""
    mask = 0xFFFFFFFF
    key = [seed & mask, seed >> 32 & mask]
    c = list(torch.broadcast_tensors(*(torch.as_tensor(x, device=seed.device) for x in counter)))
    for _ in range(10):
        # A product of 64 bits overflows int64, but its bits are right.
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 & mask ^ c[1] ^ key[0], second & mask, first >> 32 & mask ^ c[3] ^ key[1], first & mask]
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return c


# ------------------------------------------------------------------------------- checks
def check_module(caller: str, model: Any, name: str = "model") -> None:
    """TypeError for what is no module; ``caller`` is the public function's name, ``name`` the argument's."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"pygpt.{caller}: {name} must be a torch.nn.Module, got {type(model).__name__}")


def checked_integer(owner: str, name: str, n: Any) -> int:
    """``n`` as an int, also where it is NumPy's. TypeError for a bool, and for what is no integer."""
    if isinstance(n, torch.SymInt):
        return n  # type: ignore[return-value]
    try:
        if not isinstance(n, bool):
            return index(n)
    except TypeError:
        pass
    raise TypeError(f"{owner}: {name} must be an integer, got {n!r}")


def check_tensors(op: str, tensors, one_dtype: bool = False) -> Exception | None:
    """The error for tensors that no kernel takes, or None. Raises for a non-tensor and for unequal devices.

    tensors: the leading ones of the public function's arguments. one_dtype: all dtypes must be equal outside autocast.
    Those that the op wants to be integers are left to it.
    """
    integers = dispatch.OPS[op].integers
    public = f"pygpt.{dispatch.OPS[op].public.__name__}"
    pairs = zip(dispatch.OPS[op].tensors, tensors, strict=False)
    named = [(name, t) for (name, optional), t in pairs if t is not None or not optional]
    first, lead = named[0]
    error: Exception | None = None
    for name, t in named:
        if not isinstance(t, Tensor):
            raise TypeError(f"{public}: {name} must be a Tensor, got {type(t).__name__}")
        if t.device != lead.device:
            raise ValueError(f"{public}: {name} is on {t.device}, the first argument on {lead.device}")
        if error is None and t.is_nested:
            error = TypeError(f"{public}: {name} is a nested tensor")
        if error is None and name not in integers and not t.is_floating_point():
            error = TypeError(f"{public}: {name} must be floating point, got {t.dtype}")
    if error is None and one_dtype and not autocasting(lead.device.type):
        for name, t in named:
            if t.dtype != lead.dtype and name not in integers:
                return TypeError(f"{public}: {name} is {t.dtype}, {first} is {lead.dtype}; they must be equal")
    return error


# ------------------------------------------------------------------------------- autograd
# The autograd Function of an op works for any namespace of kernels. forward(ctx, kernels, *args) computes the public
# function's results by kernels.<op>_fwd, and keeps ``kernels`` as ctx.kernels. The registered ops get their gradients
# from the same two methods (backends.py).
def backward_kernels(ctx):
    """The kernels of the forward pass; None where this backward pass is itself to be differentiated, in either mode.

    While a backward pass is traced (compiled autograd), they are the registered ops, which a graph can hold.
    """
    if torch.compiler.is_compiling():
        return getattr(ctx.kernels, "registered", ctx.kernels)
    return None if torch.is_grad_enabled() or forward_ad._current_level >= 0 else ctx.kernels


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are taken, which PyTorch's fused attention does not have."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def composite_gradients(composite: Callable, args, needs, grads) -> tuple:
    """Differentiable gradients of ``composite(*args)`` by PyTorch's own autograd.

    needs: for each of the leading arguments, whether it needs a gradient. The result has a gradient or None for each.

    They are taken with respect to views of the arguments, because one tensor may be passed as several arguments, or may
    have been computed from another argument. The choice of the backend "torch" keeps `pygpt.enable` from running the
    composite on the kernels whose derivatives are wanted here.
    """
    sources = [a for a, need in zip(args, needs, strict=False) if need]
    upstream = tuple(g for g in grads if g is not None)

    def outputs(*sources):
        rest = iter(sources)
        full = [next(rest) if need else a for a, need in zip_longest(args, needs)]
        return tuple(o for o, g in zip(as_tuple(composite(*full)), grads, strict=True) if g is not None)

    if _are_functorch_transforms_active():  # in which a tensor from outside requires no gradient
        with dispatch.backend("torch"):
            gradients = iter(torch.func.vjp(outputs, *sources)[1](upstream))
    else:
        with torch.enable_grad(), dispatch.backend("torch"):
            views = [a.view_as(a) for a in sources]
            pairs = [(o, g) for o, g in zip(outputs(*views), upstream, strict=True) if o.requires_grad]
        if not pairs:
            return (None,) * len(needs)
        results, upstream = zip(*pairs, strict=True)
        gradients = iter(torch.autograd.grad(results, views, upstream, create_graph=True, allow_unused=True))
    return tuple(next(gradients) if need else None for need in needs)


def savable(t: Tensor | None) -> Tensor | None:
    """``t``, or a copy where it is an inference tensor, which cannot be saved for backward."""
    return t.clone() if t is not None and t.is_inference() else t


def unread(like: Tensor, *shape) -> Tensor:
    """A stand-in for a tensor that was not saved, as no wanted gradient reads it. One row, expanded.

    The composite can be differentiated with respect to it.
    """
    return like.new_zeros(shape[-1], requires_grad=True).expand(shape)


def only(needs, grads) -> tuple:
    """The gradients, with None in the place of those that aren't needed."""
    return grads if all(needs) else tuple(g if need else None for need, g in zip(needs, grads, strict=True))


# ------------------------------------------------------------------------------- for pygpt.verify
@dataclass(frozen=True)
class Spec:
    """How `pygpt.verify` draws, calls and judges one op. ``inputs``: the names of its leading canonical arguments.

    An argument that is None, or no floating tensor, has no gradient, and may have any name.
    """

    op: str
    inputs: tuple[str, ...]
    dims: dict  # the keys of --shape and their defaults; a default may be a function of the other dims
    draw: Callable  # (random, dims) -> canonical arguments, in float64
    call: Callable  # the public function on canonical arguments
    shapes: tuple = ({},)  # the dims that `pygpt verify` runs without --shape
    outputs: tuple[str, ...] = ("fwd",)
    cancelled: Callable = lambda args, grads: {}  # in float64 -> {direction: the terms that cancel in it}
    yardstick: Callable | None = None  # PyTorch's own expression, where it is not the op's composite
    settled: Callable = lambda args: True  # whether no result is decided by rounding, as at the kink of relu
    choices: dict | None = None  # key of dims -> its allowed values, where those are names
    canonical: Callable = lambda *args: args  # drawn arguments -> canonical ones, where they differ
    features: tuple[str, ...] = ()  # the optional features that every call uses, which not every backend serves


def lead(m) -> tuple:
    """The leading dimensions that M gives as one integer or several."""
    return tuple(m) if isinstance(m, (tuple, list)) else (m,)
