"""One autograd.Function per op, blind to the backend.

``Function.apply(k, *args)``: ``k`` is any namespace holding ``<op>_fwd`` and ``<op>_bwd`` with the
signatures of `pygpt.reference`; ``args`` are the op's arguments in its order. Each Function calls
``k.<op>_fwd``, saves what ``k.<op>_bwd`` wants, and remembers ``k``.

Under ``create_graph=True`` a backward pass differentiates the ordinary PyTorch expression of the op
instead (`reference.<op>`), so that gradients of any order are right; the kernels serve the first.
"""

from functools import partial

import torch
from torch.autograd import Function

from . import reference

_RESULTS = {"mlp": 0, "layer_norm": 0, "add_layer_norm": slice(2), "rms_norm": 0}  # of <op>_fwd; the rest is saved


def _forward(op: str, fwd):
    """``fwd`` without what it returns for the backward pass."""
    results = _RESULTS.get(op)
    return fwd if results is None else lambda *args: fwd(*args)[results]


def apply(op: str, function: type[Function], k, tensors, args):
    """``function.apply(k, *args)``, without its cost (5 us) where none of the ``tensors`` needs a gradient."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return function.apply(k, *args)
    return _forward(op, getattr(k, f"{op}_fwd"))(*args)


def bound(op: str, function: type[Function], k, needs_gradient: bool):
    """`apply` as a function of ``args``, for calls outside torch.func and torch.compile.

    Left out is what those need: Function.apply's walk over its arguments (2 us).
    """
    if needs_gradient:
        return partial(super(Function, function).apply, k)
    return getattr(k, f"{op}_fwd_results", None) or _forward(op, getattr(k, f"{op}_fwd"))


def _create_graph() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _kernels(ctx):
    """Those of the forward pass; while backward is traced (compiled autograd), of the dispatcher, which can be."""
    return getattr(ctx.k, "dispatched", ctx.k) if torch.compiler.is_compiling() else ctx.k


def _higher_order(expression, args, grads, needs):
    """Differentiable gradients of ``expression(*args)`` by PyTorch's own autograd.

    With respect to views of the arguments: one tensor may be several of them, or what another was computed from.
    """
    with torch.enable_grad():
        args = [a.view_as(a) if isinstance(a, torch.Tensor) else a for a in args]
        outputs = reference.as_tuple(expression(*args))
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [a for a, need in zip(args, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return None, *(next(found) if need else None for need in needs)


def _only(needs, grads):
    return grads if all(needs) else tuple(g if need else None for need, g in zip(needs, grads, strict=True))


def _reference_attention(q, k, v, is_causal, scale):
    return reference.attention(q, k, v, is_causal, scale, return_lse=True)


class Attention(Function):
    """(q, k, v, is_causal, scale) -> out, lse."""

    @staticmethod
    def forward(ctx, k, query, key, value, is_causal, scale):
        out, lse = k.attention_fwd(query, key, value, is_causal, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.k, ctx.is_causal, ctx.scale = k, is_causal, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        if _create_graph():
            args = q, k, v, ctx.is_causal, ctx.scale
            return _higher_order(_reference_attention, args, (dout, dlse), ctx.needs_input_grad[1:])
        if dout is None and dlse is None:
            return (None,) * 6
        dout = torch.zeros_like(out) if dout is None else dout
        needs = ctx.needs_input_grad[1:4]
        grads = _kernels(ctx).attention_bwd(dout, dlse, q, k, v, out, lse, ctx.is_causal, ctx.scale, needs)
        return None, *_only(needs, grads), None, None


class Linear(Function):
    """(x, weight, bias) -> y."""

    @staticmethod
    def forward(ctx, k, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        ctx.k = k
        return k.linear_fwd(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if _create_graph():
            return _higher_order(reference.linear, (x, weight, bias), (dy,), needs)
        return None, *_only(needs, _kernels(ctx).linear_bwd(dy, x, weight, needs))


class MLP(Function):
    """(x, fc_weight, fc_bias, proj_weight, proj_bias, activation) -> y."""

    @staticmethod
    def forward(ctx, k, x, fc_weight, fc_bias, proj_weight, proj_bias, activation):
        y, hidden, pre = k.mlp_fwd(x, fc_weight, fc_bias, proj_weight, proj_bias, activation)
        ctx.save_for_backward(x, fc_weight, fc_bias, proj_weight, proj_bias, hidden, pre)
        ctx.k, ctx.activation = k, activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, fc_weight, fc_bias, proj_weight, proj_bias, hidden, pre = ctx.saved_tensors
        if _create_graph():
            args = x, fc_weight, fc_bias, proj_weight, proj_bias, ctx.activation
            return _higher_order(reference.mlp, args, (dy,), ctx.needs_input_grad[1:])
        needs = ctx.needs_input_grad[1:6]
        grads = _kernels(ctx).mlp_bwd(dy, x, fc_weight, proj_weight, hidden, pre, ctx.activation, needs)
        return None, *_only(needs, grads), None


class LayerNorm(Function):
    """(x, weight, bias, eps) -> y, over the last dimension."""

    @staticmethod
    def forward(ctx, k, x, weight, bias, eps):
        y, mean, rstd = k.layer_norm_fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.k, ctx.eps = k, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if _create_graph():
            return _higher_order(reference.layer_norm, (x, weight, bias, ctx.eps), (dy,), ctx.needs_input_grad[1:])
        needs = ctx.needs_input_grad[1:4]
        return None, *_only(needs, _kernels(ctx).layer_norm_bwd(dy, x, weight, mean, rstd, needs)), None


def _norm_and_sum(s, weight, bias, eps):
    return reference.layer_norm(s, weight, bias, eps), s


class AddLayerNorm(Function):
    """(x, residual, weight, bias, eps) -> layer_norm(x + residual), x + residual."""

    @staticmethod
    def forward(ctx, k, x, residual, weight, bias, eps):
        y, s, mean, rstd = k.add_layer_norm_fwd(x, residual, weight, bias, eps)
        ctx.save_for_backward(s, weight, bias, mean, rstd)
        ctx.k, ctx.eps = k, eps
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx, dy, ds):
        s, weight, bias, mean, rstd = ctx.saved_tensors
        _, need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
        needs = need_x or need_residual, need_weight, need_bias
        if dy is None:  # only the sum was used
            dx, dw, db = ds, None, None
        elif _create_graph():
            args = s, weight, bias, ctx.eps
            _, dx, dw, db, _ = _higher_order(_norm_and_sum, args, (dy, ds), (*needs, False))
        else:
            dx, dw, db = _only(needs, _kernels(ctx).add_layer_norm_bwd(dy, ds, s, weight, mean, rstd, needs))
        return None, *_only((need_x, need_residual), (dx, dx)), dw, db, None


class RMSNorm(Function):
    """(x, weight, eps) -> y, over the last dimension."""

    @staticmethod
    def forward(ctx, k, x, weight, eps):
        y, rstd = k.rms_norm_fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.k, ctx.eps = k, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        if _create_graph():
            return _higher_order(reference.rms_norm, (x, weight, ctx.eps), (dy,), ctx.needs_input_grad[1:])
        needs = ctx.needs_input_grad[1:3]
        return None, *_only(needs, _kernels(ctx).rms_norm_bwd(dy, x, weight, rstd, needs)), None


class GELU(Function):
    """(x, approximate) -> y."""

    @staticmethod
    def forward(ctx, k, x, approximate):
        ctx.save_for_backward(x)
        ctx.k, ctx.approximate = k, approximate
        return k.gelu_fwd(x, approximate)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if _create_graph():
            return _higher_order(reference.gelu, (x, ctx.approximate), (dy,), ctx.needs_input_grad[1:])
        return None, _kernels(ctx).gelu_bwd(dy, x, ctx.approximate), None


class ReLU(Function):
    """(x,) -> y."""

    @staticmethod
    def forward(ctx, k, x):
        y = k.relu_fwd(x)
        ctx.save_for_backward(y)
        ctx.k = k
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return None, (reference if _create_graph() else _kernels(ctx)).relu_bwd(dy, y)
