"""What the files of this folder share: accumulation, the checks of tensors, and the autograd Functions' habits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dispatch


# ------------------------------------------------------------------------------- mathematics
def acc_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def acc(t):
    """In the dtype that sums and statistics have."""
    return None if t is None else t.to(acc_dtype(t))


def rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def wanted(needs, grads, like: Tensor):
    """Casts the wanted gradients to ``like.dtype``; an unwanted one is returned empty."""
    return tuple(
        g.to(like.dtype).contiguous() if need else like.new_empty(0) for need, g in zip(needs, grads, strict=True)
    )


def dense_strides(shape, *strides) -> tuple[int, ...]:
    """Those that torch gives an elementwise result of tensors of this shape and these strides: dense, in their order."""
    tensors = [torch.empty_strided(shape, each, device="meta") for each in strides]
    return torch.add(tensors[0], tensors[-1]).stride()


def laid_out(t: Tensor, strides, dtype: torch.dtype) -> Tensor:
    """The same values in another dtype, with these strides."""
    return t.new_empty_strided(t.shape, strides, dtype=dtype).copy_(t)


def as_tuple(result) -> tuple:
    """What an op returns, one tensor or several, as several."""
    return result if isinstance(result, tuple) else (result,)


# ------------------------------------------------------------------------------- checks
def check_tensors(op: str, tensors, one_dtype: bool = False) -> TypeError | None:
    """The error that the tensors deserve unless PyTorch serves them. Raises for what is no tensor or elsewhere.

    tensors: in the order of the public function's own. one_dtype: of them all, outside autocast.
    """
    public = f"pygpt.{dispatch.OPS[op].public.__name__}"
    pairs = zip(dispatch.OPS[op].tensors, tensors, strict=True)
    named = [(name, t) for (name, optional), t in pairs if t is not None or not optional]
    first, lead = named[0]
    error = None
    for name, t in named:
        if not isinstance(t, Tensor):
            raise TypeError(f"{public}: {name} must be a Tensor, got {type(t).__name__}")
        if t.device != lead.device:
            raise ValueError(f"{public}: {name} is on {t.device}, the first argument on {lead.device}")
        if error is None and t.is_nested:
            error = TypeError(f"{public}: {name} is a nested tensor")
        if error is None and not t.is_floating_point():
            error = TypeError(f"{public}: {name} must be floating point, got {t.dtype}")
    if error is None and one_dtype and not dispatch.autocasting(lead.device.type):
        for name, t in named:
            if t.dtype != lead.dtype:
                return TypeError(f"{public}: {name} is {t.dtype}, {first} is {lead.dtype}; they must be equal")
    return error


# ------------------------------------------------------------------------------- autograd
def create_graph() -> bool:
    """Whether a backward pass is itself to be differentiated."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Function(torch.autograd.Function):
    """An op over any namespace of kernels. A subclass has three static methods; the last two serve the registered op too.

    forward(ctx, kernels, *args) -> what the public function returns, by kernels.<op>_fwd
    save(ctx, args, results): keeps of <op>_fwd's arguments and results what `gradients` reads
    gradients(ctx, needs, *grads) -> one for each of ``args``, None where it isn't needed
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)

        def backward(ctx, *grads):
            return None, *cls.gradients(ctx, ctx.needs_input_grad[1:], *grads)

        cls.backward = staticmethod(backward)


def backward_kernels(ctx):
    """Those of the forward pass; while backward is traced (compiled autograd), ops of the dispatcher, which can be."""
    return getattr(ctx.kernels, "registered", ctx.kernels) if torch.compiler.is_compiling() else ctx.kernels


def composite_gradients(composite: Callable, args, needs, grads) -> tuple:
    """Differentiable gradients of ``composite(*args)`` by PyTorch's own autograd, None where one isn't needed.

    With respect to views of the arguments: one tensor may be several of them, or what another was computed from.
    """
    with torch.enable_grad():
        args = [a.view_as(a) if isinstance(a, Tensor) else a for a in args]
        outputs = as_tuple(composite(*args))
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    sources = [a for a, need in zip(args, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], sources, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if need else None for need in needs)


def unread(like: Tensor, *shape) -> Tensor:
    """What stands for an argument of <op>_bwd that was not saved, as no gradient that is wanted depends on it: one row."""
    return like.new_zeros(shape[-1]).expand(shape).requires_grad_(create_graph())


def only(needs, grads) -> tuple:
    """None in the place of gradients that aren't needed."""
    return grads if all(needs) else tuple(g if need else None for need, g in zip(needs, grads, strict=True))


# ------------------------------------------------------------------------------- for pygpt.verify
@dataclass(frozen=True)
class Spec:
    """How to draw, call and judge one op. ``inputs`` name the tensors at the front of its canonical arguments."""

    op: str
    inputs: tuple[str, ...]
    dims: dict  # the keys of --shape and their defaults; a default may name another key
    draw: Callable  # (random, dims) -> canonical arguments, in float64
    call: Callable  # the public function on canonical arguments
    shapes: tuple = ({},)  # what `pygpt verify` runs without --shape
    outputs: tuple[str, ...] = ("fwd",)
    cancelled: Callable = lambda args, grads: {}  # in float64 -> {direction: the terms that cancel in it}
    yardstick: Callable | None = None  # PyTorch's own expression, where it is not the op's composite
    settled: Callable = lambda args: True  # whether the arguments leave nothing to be decided by rounding
    choices: dict | None = None  # key of dims -> its values, where they are names


def lead(m) -> tuple:
    """The leading dimensions that M stands for, one number or several."""
    return tuple(m) if isinstance(m, (tuple, list)) else (m,)
