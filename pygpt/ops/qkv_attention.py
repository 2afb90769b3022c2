"""Self-attention of one projection: queries, keys and values side by side in qkv (B, T, (Hq + 2 Hkv) E).

The channels of a position are Hq heads of queries, then Hkv of keys and Hkv of values, E each. out (B, T, Hq E) is
attention of these heads, side by side again. attention.py has the mathematics, and its kernels compute this on views.
The gradient makes the difference: here it is one tensor, too, where the backward of a split would copy three into one.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import Call, Op, call, lookup, register
from .attention import Options, attention_bwd, attention_composite, attention_fwd
from .attention_arguments import check_flags, checked_dropout, checked_scale, checked_window
from .attention_specs import flops_bwd, flops_fwd
from .common import Spec, backward_kernels, check_tensors, checked_integer, composite_gradients, savable

_OP = "pygpt.qkv_attention"
SEED = 5  # the place of dropout's seed among the canonical arguments


# ------------------------------------------------------------------------------- the mathematics
def as_heads(t: Tensor, heads: int) -> Tensor:
    """(B, T, heads E) as a view (B, heads, T, E)."""
    return t.unflatten(2, (heads, t.shape[2] // heads)).transpose(1, 2)


def split_heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q (B, Hq, T, E), k and v (B, Hkv, T, E) of qkv."""
    q, k, v = as_heads(qkv, heads + 2 * kv_heads).split((heads, kv_heads, kv_heads), 1)
    return q, k, v


def _side_by_side(heads: Tensor) -> Tensor:
    """(B, H, T, E) as (B, T, H E)."""
    return heads.transpose(1, 2).flatten(2)


def _options(seed: Tensor | None, dropout_p: float, left: int, right: int) -> Options:
    return Options(seed=seed, dropout_p=dropout_p, left=left, right=right)


def qkv_attention_composite(qkv, heads, kv_heads, is_causal, scale, *options):
    o = _options(*options)
    of_heads = split_heads(qkv, heads, kv_heads)
    return _side_by_side(attention_composite(*of_heads, is_causal, scale, *(() if o == Options() else o)))


def _differentiable(qkv, heads, kv_heads, is_causal, scale, *options):
    """The composite by formulas alone, as PyTorch's fused kernel has one derivative."""
    of_heads, o = split_heads(qkv, heads, kv_heads), _options(*options)
    return _side_by_side(attention_composite(*of_heads, is_causal, scale, *o, return_lse=True)[0])


def qkv_attention_fwd(
    qkv: Tensor, heads: int, kv_heads: int, is_causal: bool, scale: float, seed: Tensor | None, dropout_p: float,
    left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, T, Hq E), contiguous, and lse (B, Hq, T)."""
    options: tuple[Any, ...] = _options(seed, dropout_p, left, right)
    out, lse = attention_fwd(*split_heads(qkv, heads, kv_heads), is_causal, scale, *options)
    return _side_by_side(out).contiguous(), lse


def qkv_attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, kv_heads: int, is_causal: bool, scale: float,
    seed: Tensor | None, dropout_p: float, left: int, right: int,
) -> Tensor:  # fmt: skip
    """dqkv, contiguous."""
    options: tuple[Any, ...] = _options(seed, dropout_p, left, right)
    q, k, v = split_heads(qkv, heads, kv_heads)
    of_rows = as_heads(dout, heads), None, q, k, v, as_heads(out, heads), lse
    dq, dk, dv, *_ = attention_bwd(*of_rows, is_causal, scale, [True] * 3, *options)
    return _side_by_side(torch.cat((dq, dk, dv), 1)).contiguous()


# ------------------------------------------------------------------------------- autograd
class QkvAttention(torch.autograd.Function):
    """(kernels, qkv, heads, kv_heads, is_causal, scale, seed, dropout_p, left, right) -> out."""

    @staticmethod
    def forward(ctx, kernels, qkv, heads, kv_heads, is_causal, scale, seed, dropout_p, left, right):
        ctx.kernels = kernels
        ctx.sizes, ctx.options = (heads, kv_heads, is_causal, scale), (dropout_p, left, right)
        out, lse = kernels.qkv_attention_fwd(qkv, *ctx.sizes, seed, *ctx.options)
        ctx.save_for_backward(qkv, out, lse, savable(seed))
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * 10
        qkv, out, lse, seed = ctx.saved_tensors
        args, kernels = (*ctx.sizes, seed, *ctx.options), backward_kernels(ctx)
        if kernels is None:
            (dqkv,) = composite_gradients(_differentiable, (qkv, *args), (True,), (dout,))
        else:
            dqkv = kernels.qkv_attention_bwd(dout, qkv, out, lse, *args)
        return None, dqkv, *(None,) * 8


# ------------------------------------------------------------------------------- the public function
def qkv_attention(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Returns self-attention of ``qkv (B, T, (Hq + 2 Hkv) E)``, the output of one projection, as ``(B, T, Hq E)``.

    The channels of a position are ``num_heads`` heads of queries, then ``num_kv_heads`` heads of keys and as many of
    values (by default num_heads), E channels each. The result, and its gradient, are those of
    `scaled_dot_product_attention` on these heads, which has the other arguments and the algorithm (FlashAttention-2;
    Dao 2023). The gradient of qkv is written as one tensor. num_heads must be a multiple of num_kv_heads.

    The dtype is float64, float32, bfloat16 or float16. Shapes and values that do not fit raise ValueError, wrong types,
    such as integer tensors, TypeError.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    kernel = lookup("qkv_attention", qkv)
    options = dropout_p or window is not None or scale is not None or not isinstance(is_causal, bool)
    if kernel is not None and not options and _fits(qkv, num_heads, kv_heads):
        scale = 1.0 / math.sqrt(qkv.shape[2] // (num_heads + 2 * kv_heads) or 1)
        return kernel(qkv, num_heads, kv_heads, is_causal, scale, None, 0.0, -1, -1)
    return call("qkv_attention", qkv, num_heads, num_kv_heads, dropout_p, is_causal, scale=scale, window=window)


def _fits(qkv: Tensor, heads: int, kv_heads: int) -> bool:
    """Whether the shape and the numbers of heads fit, and every kernel has these head dimensions."""
    if qkv.dim() != 3 or not (type(heads) is type(kv_heads) is int) or not 1 <= kv_heads <= heads:
        return False
    E, rest = divmod(qkv.shape[2], heads + 2 * kv_heads)
    return rest == 0 and heads % kv_heads == 0 and dispatch.fast_head_dim >= E


def prepare(qkv, num_heads, num_kv_heads=None, dropout_p=0.0, is_causal=False, *, scale=None, window=None) -> Call:
    num_heads = checked_integer(_OP, "num_heads", num_heads)
    kv_heads = num_heads if num_kv_heads is None else checked_integer(_OP, "num_kv_heads", num_kv_heads)
    check_flags(_OP, is_causal=is_causal)
    if kv_heads < 1 or num_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"{_OP}: num_heads {num_heads} is no multiple of num_kv_heads {kv_heads}")
    error = check_tensors("qkv_attention", (qkv,))
    if error is not None:
        raise error
    if qkv.dim() != 3 or qkv.shape[2] % (num_heads + 2 * kv_heads):
        want = f"(B, T, {num_heads + 2 * kv_heads} E)"
        raise ValueError(f"{_OP}: qkv must have shape {want}, got {tuple(qkv.shape)}")
    E = qkv.shape[2] // (num_heads + 2 * kv_heads)
    left, right = (-1, -1) if window is None else checked_window(_OP, "window", window)
    dropout_p = checked_dropout(_OP, dropout_p)
    in_use = {"dropout_p": dropout_p > 0.0, "window": (left, right) != (-1, -1), "enable_gqa": kv_heads != num_heads}
    args = qkv, num_heads, kv_heads, is_causal, checked_scale(_OP, scale, E), None, dropout_p, left, right
    features = frozenset(name for name, used in in_use.items() if used)
    if E > dispatch.fast_head_dim:
        error = ValueError(f"{_OP}: head dimension above {dispatch.fast_head_dim}")
    fast = (qkv,) if error is None and not features - {"enable_gqa"} else None
    return Call(args, features, error=error, fast=fast, seed=SEED if dropout_p else None)


# ------------------------------------------------------------------------------- FLOPs, verify
def _flops_fwd(qkv, heads, kv_heads, *_, out_val=None):
    return flops_fwd(*split_heads(qkv, heads, kv_heads))


def _flops_bwd(dout, qkv, out, lse, heads, kv_heads, *_, out_val=None):
    return flops_bwd(as_heads(dout, heads), None, *split_heads(qkv, heads, kv_heads))


def _draw(random, d):
    heads, kv_heads = d["H"] * d["group"], d["H"]
    qkv = random(d["B"], d["L"], (heads + 2 * kv_heads) * d["E"])
    seed = (random(1) * 2**60).long() if d["dropout"] else None
    scale = 1.0 / math.sqrt(max(d["E"], 1))
    return qkv, heads, kv_heads, bool(d["causal"]), scale, seed, d["dropout"], d["left"], -1


def _call(qkv, heads, kv_heads, is_causal, scale, seed, dropout_p, left, right):
    """As the public function computes it, but the seed is given, not drawn."""
    if seed is None:
        window = None if (left, right) == (-1, -1) else (left, right)
        return qkv_attention(qkv, heads, kv_heads, is_causal=is_causal, scale=scale, window=window)
    row = dispatch.pick("qkv_attention", [qkv], ["dropout_p"])
    return QkvAttention.apply(row.kernels, qkv, heads, kv_heads, is_causal, scale, seed, dropout_p, left, right)


def _cancelled(args, grads):
    """The gradient without rowsum(dout out), the softmax's correction, which cancels most of it."""
    out, lse = qkv_attention_fwd(*args)
    return {"dqkv": qkv_attention_bwd(grads[0], args[0], out * 0, lse, *args[1:])}


register(
    Op(
        "qkv_attention",
        public=qkv_attention,
        prepare=prepare,
        composite=qkv_attention_composite,
        fwd=qkv_attention_fwd,
        bwd=qkv_attention_bwd,
        function=QkvAttention,
        flops=(_flops_fwd, _flops_bwd),
        lower_precision=True,
        specs={
            "qkv_attention": Spec(
                "qkv_attention",
                inputs=("qkv",),
                dims={"B": 2, "H": 4, "group": 1, "L": 128, "E": 64, "causal": 1, "left": -1, "dropout": 0.0},
                draw=_draw,
                call=_call,
                shapes=({}, {"H": 2, "group": 3, "L": 77, "E": 40, "left": 20}),
                cancelled=_cancelled,
            )
        },
    )
)
