"""Attention: out = softmax(scale q k^T) v, and lse, the log of each row's sum of exponentials.

q (B, Hq, L, E), k (B, Hkv, S, E), v (B, Hkv, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L). Backward keeps out and lse
and recomputes p = exp(scale q k^T - lse) (FlashAttention-2; Dao 2023), so that nothing of size L x S stays in memory.
"""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autocast import autocasting
from ..dispatch import Call, Op, call, lookup, register
from .common import (
    Spec,
    acc,
    backward_kernels,
    check_tensors,
    composite_gradients,
    dense_strides,
    laid_out,
    only,
    wanted,
)

_torchs = F.scaled_dot_product_attention  # bound now, because a user may replace it by ours later


# ------------------------------------------------------------------------------- the mathematics
def attention_composite(
    q, k, v, is_causal, scale, *, attn_mask=None, dropout_p=0.0, enable_gqa=False, window=None,
    alibi_slopes=None, softcap=0.0, lower_right=False, return_lse=False,
):  # fmt: skip
    """softmax(scale * q k^T + bias) v over (B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev)."""
    torch_has_it = window is None and alibi_slopes is None and softcap == 0.0 and not lower_right
    if torch_has_it and not return_lse and not (is_causal and attn_mask is not None):
        return _torchs(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    features = attn_mask, dropout_p, window, alibi_slopes, softcap, lower_right
    with torch.autocast(q.device.type, enabled=False) if autocasting(q.device.type) else nullcontext():
        out, lse = _explicit_attention(q, *_repeat_heads(q, k, v), is_causal, scale, *features)
    return (out, lse) if return_lse else out


def _explicit_attention(q, k, v, is_causal, scale, attn_mask, dropout_p, window, alibi_slopes, softcap, lower_right):
    L, S = q.shape[-2], k.shape[-2]
    dist = _distance(L, S, q.device, lower_right)
    s = (acc(q) * scale) @ acc(k).mT
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype).reshape(-1, q.shape[1], 1, 1) * dist.abs()
    keep = torch.ones_like(dist, dtype=torch.bool)
    if is_causal or lower_right:
        keep = keep & (dist <= 0)
    if window is not None:
        left, right = window
        keep = keep & (dist >= -left if left >= 0 else keep) & (dist <= right if right >= 0 else keep)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    elif attn_mask is not None:
        s = s + attn_mask.to(s.dtype)
    p, lse = _softmax(s.masked_fill(~keep, -math.inf))
    p = F.dropout(p, dropout_p) if dropout_p else p
    return (p @ acc(v)).to(q.dtype), lse


def _distance(L: int, S: int, device, lower_right: bool) -> Tensor:
    """(L, S): the distance of key j to the right of query i's position on the key axis."""
    shift = S - L if lower_right else 0
    return torch.arange(S, device=device) - (torch.arange(L, device=device)[:, None] + shift)


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.shape[1] == k.shape[1]:
        return k, v
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def _softmax(s: Tensor):
    """Row softmax and log-sum-exp. A fully masked row gives zeros and -inf, never NaN."""
    m = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    m = m.masked_fill(m == -math.inf, 0.0)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (m + total.log()).masked_fill(empty, -math.inf)
    return e / total, lse.squeeze(-1)


def scores(q, k, is_causal, scale):
    s = (acc(q) * scale) @ acc(k).mT
    if is_causal:
        s = s.masked_fill(_distance(q.shape[-2], k.shape[-2], q.device, False) > 0, -math.inf)
    return s


def strides_like_query(q: Tensor, width: int) -> tuple[int, ...]:
    """Strides of (B, H, L, width) in the memory order of q's batch, heads and positions, the channels innermost.

    torch's fused kernel gives these strides. Where it does not serve the call, torch's result is contiguous, as here.
    """
    if width != q.shape[3] or q.stride(3) != 1:
        return torch.empty(*q.shape[:3], width, device="meta").stride()
    return *(stride * max(width, 1) for stride in dense_strides(q.shape[:3], q.stride()[:3])), 1


def _heads_last(t: Tensor) -> Tensor:
    """A copy laid out (B, L, H, E) in memory, so that merging the heads needs no copy."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, H, L, Ev) laid out as q is, lse (B, H, L) = log sum_j exp(s_ij)."""
    p, lse = _softmax(scores(q, k, is_causal, scale))
    return laid_out(p @ acc(v), strides_like_query(q, v.shape[3]), q.dtype), lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    is_causal: bool, scale: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """p = exp(s - lse); dv = p^T dout; ds = p (dout v^T - rowsum(dout out) + dlse); dq = scale ds k;
    dk = scale ds^T q."""
    s = scores(q, k, is_causal, scale)
    p = torch.exp(s - lse[..., None].masked_fill(lse[..., None] == -math.inf, 0.0))
    do = acc(dout)
    delta = (do * acc(out)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    ds = p * (do @ acc(v).mT - delta) * scale
    grads = wanted(needs, (ds @ acc(k), ds.mT @ acc(q), p.mT @ do), q)
    dq, dk, dv = (_heads_last(g) if need else g for need, g in zip(needs, grads, strict=True))
    return dq, dk, dv


# ------------------------------------------------------------------------------- autograd
def _with_lse(q, k, v, is_causal, scale):
    return attention_composite(q, k, v, is_causal, scale, return_lse=True)


class Attention(torch.autograd.Function):
    """(kernels, q, k, v, is_causal, scale) -> out, lse."""

    @staticmethod
    def forward(ctx, kernels, q, k, v, is_causal, scale):
        ctx.kernels, ctx.is_causal, ctx.scale = kernels, is_causal, scale
        out, lse = kernels.attention_fwd(q, k, v, is_causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 6
        q, k, v, out, lse = ctx.saved_tensors
        kernels, needs = backward_kernels(ctx), ctx.needs_input_grad[1:4]
        if kernels is None:
            args = q, k, v, ctx.is_causal, ctx.scale
            return None, *composite_gradients(_with_lse, args, needs, (dout, dlse)), None, None
        if dout is None:  # lse does not depend on v
            dout, needs = torch.zeros_like(out), (*needs[:2], False)
        grads = kernels.attention_bwd(dout, dlse, q, k, v, out, lse, ctx.is_causal, ctx.scale, needs)
        return None, *only(needs, grads), None, None


# ------------------------------------------------------------------------------- the public function
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns softmax(scale * query key^T + bias) value, with the arguments of torch's function of this name.

    The algorithm is FlashAttention-2 (Dao 2023): the (L, S) matrix is never in memory, forward or backward. Calls with
    attn_mask, dropout_p, enable_gqa, window, alibi_slopes or softcap have no kernel yet. PyTorch computes them, some by
    way of that matrix.

    Shapes: ``query (..., Hq, L, E)``, ``key (..., Hkv, S, E)``, ``value (..., Hkv, S, Ev)``, result
    ``(..., Hq, L, Ev)``. The leading dimensions broadcast, and so does a single head of key and value. The result is
    laid out in memory as query is. All tensors have one dtype: float64, float32, bfloat16 or float16.

    - ``attn_mask`` is boolean (True: may attend) or floating (added to the scores), and broadcasts to
      ``(..., Hq, L, S)``. Together with ``is_causal`` or ``window``, a query attends to the keys that all allow. It may
      also be ``torch.nn.attention.bias.causal_lower_right(L, S)``, which is causal along j = i + S - L instead of j = i
      and excludes ``is_causal``.
    - ``is_causal``: query i attends to keys j <= i, aligned top-left as in torch. For L = 3 and S = 5::

          i=0  1 . . . .
          i=1  1 1 . . .
          i=2  1 1 1 . .

    - ``dropout_p`` is the probability with which an attention weight is dropped.
    - ``scale`` is 1 / sqrt(E) by default.
    - ``enable_gqa`` lets Hq be a multiple of Hkv.
    - ``window=(left, right)``: query i attends to keys i - left <= j <= i + right; -1 is unlimited. Its diagonal j = i
      starts top-left also where L and S differ. Only causal_lower_right moves it, too: j = i + S - L.
    - ``alibi_slopes`` ``(Hq,)`` or ``(B, Hq)`` adds -slope * distance to the same diagonal (Press et al. 2021).
    - ``softcap`` c > 0 makes a score c * tanh(score / c), before masks.
    - ``return_lse`` also returns lse ``(..., Hq, L)``, the natural logarithm of each row's sum of exponentials. It is
      float32 (float64 for float64) and differentiable.

    A fully masked row gives output 0, lse -inf and gradients 0. Shapes and values that do not fit raise ValueError.
    Unequal dtypes and wrong types, such as integer tensors, raise TypeError.
    """
    kernel = lookup("attention", query, key, value)
    features = attn_mask is not None or dropout_p or enable_gqa or window is not None or alibi_slopes is not None
    if kernel is None or features or softcap or return_lse or not _is_fast(query, key, value):
        return call(
            "attention", query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
            window=window, alibi_slopes=alibi_slopes, softcap=softcap, return_lse=return_lse,
        )  # fmt: skip
    scale = 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else float(scale)
    results = kernel(query, key, value, bool(is_causal), scale)
    return results[0] if isinstance(results, tuple) else results


def _is_fast(query, key, value) -> bool:
    """Whether the shapes are (B, H, L, E), (B, H, S, E), (B, H, S, Ev), and every kernel has these head dimensions."""
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    return (
        len(of_query) == len(of_key) == len(of_value) == 4
        and of_query[:2] == of_key[:2] == of_value[:2]
        and of_query[3] == of_key[3] <= dispatch.fast_head_dim >= of_value[3]
        and of_key[2] == of_value[2]
    )


_OP = "pygpt.scaled_dot_product_attention"


def _prepare(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False,
    window=None, alibi_slopes=None, softcap=0.0, return_lse=False,
) -> Call:  # fmt: skip
    mask = attn_mask.unsqueeze(0) if isinstance(attn_mask, Tensor) and attn_mask.dim() == 1 else attn_mask
    torchs: Callable | None = partial(
        _torchs, query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if error := check_tensors("attention", (query, key, value), one_dtype=True):
        return Call((query, key, value, is_causal, scale), torch=torchs, error=error)
    _check_shapes(query, key, value)
    L, E, S, Ev = query.shape[-2], query.shape[-1], key.shape[-2], value.shape[-1]
    scale = 1.0 / math.sqrt(E or 1) if scale is None else float(scale)
    if _is_causal_bias(attn_mask) or (attn_mask is not None and is_causal) or window is not None:
        torchs = None  # PyTorch's function does not take these
    if alibi_slopes is not None or softcap or return_lse:
        torchs = None
    Hk, Hv = (t.shape[-3] if t.dim() > 2 else 1 for t in (key, value))
    if enable_gqa and Hk != Hv:
        error = ValueError(f"{_OP}: key has {Hk} heads, value {Hv}; they must be equal")
        if torchs is None:
            raise error
        return Call((query, key, value, is_causal, scale), torch=torchs, error=error)

    q, k, v, leading = _four_dimensional(query, key, value, enable_gqa)
    Hq = q.shape[1]
    attn_mask, is_causal, lower_right = _without_causal_bias(attn_mask, is_causal, L, S)
    features = _check_scores(q, leading, S, attn_mask, window, alibi_slopes, softcap)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{_OP}: dropout_p must be in [0, 1], got {dropout_p}")
    if lower_right:
        features["lower_right"] = True
    if dropout_p > 0.0:
        features["dropout_p"] = dropout_p
    if Hq != k.shape[1]:
        features["enable_gqa"] = enable_gqa
    if return_lse:
        features["return_lse"] = True

    heads = leading if query.dim() == key.dim() == value.dim() == 2 else (*leading, Hq)

    def finish(results):
        out, lse = results if isinstance(results, tuple) else (results, None)
        out = out if out.dim() == len(heads) + 2 else out.reshape(*heads, L, Ev)
        return (out, lse.reshape(*heads, L)) if return_lse else out

    fast = (query, key, value) if not features and _is_fast(query, key, value) else None
    return Call((q, k, v, bool(is_causal), scale), features, finish, torchs, fast=fast)


def _check_shapes(query, key, value):
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise ValueError(f"{_OP}: {name} needs at least 2 dimensions, got shape {tuple(t.shape)}")
    E, S = query.shape[-1], key.shape[-2]
    if key.shape[-1] != E:
        raise ValueError(f"{_OP}: key has head dimension {key.shape[-1]}, query {E}; they must be equal")
    if value.shape[-2] != S:
        raise ValueError(f"{_OP}: value has {value.shape[-2]} positions, key {S}; they must be equal")


def _without_causal_bias(attn_mask, is_causal, L, S) -> tuple:
    """-> attn_mask, is_causal, lower_right, where a CausalBias has become one of the flags."""
    if not _is_causal_bias(attn_mask):
        return attn_mask, is_causal, False
    if is_causal:
        raise ValueError(f"{_OP}: is_causal and a CausalBias attn_mask are both set")
    if (size := (attn_mask.seq_len_q, attn_mask.seq_len_kv)) != (L, S):
        raise ValueError(f"{_OP}: the CausalBias is for {size}, the scores are ({L}, {S})")
    lower_right = attn_mask.variant.name == "LOWER_RIGHT"
    return None, not lower_right, lower_right


def _check_scores(q, leading, S, attn_mask, window, alibi_slopes, softcap) -> dict:
    """The features in use that change the scores, by name. q (B, Hq, L, E)."""
    B, Hq, L = q.shape[:3]
    features = {}
    if attn_mask is not None:
        _check_optional("attn_mask", attn_mask, q, or_boolean=True)
        features["attn_mask"] = _broadcast_mask(attn_mask, leading, (B, Hq, L, S))
    if window is not None and _check_window(window):
        features["window"] = window
    if alibi_slopes is not None:
        _check_optional("alibi_slopes", alibi_slopes, q)
        if tuple(alibi_slopes.shape) not in ((Hq,), (B, Hq)):
            shape = tuple(alibi_slopes.shape)
            raise ValueError(f"{_OP}: alibi_slopes must have shape ({Hq},) or ({B}, {Hq}), got {shape}")
        features["alibi_slopes"] = alibi_slopes
    if not softcap >= 0.0:
        raise ValueError(f"{_OP}: softcap must not be negative, got {softcap}")
    if softcap > 0.0:
        features["softcap"] = softcap
    return features


def _is_causal_bias(attn_mask) -> bool:
    """Whether it is a torch.nn.attention.bias.CausalBias. Importing that module takes a second, so this does not."""
    bias = sys.modules.get("torch.nn.attention.bias")
    return bias is not None and isinstance(attn_mask, bias.CausalBias)


def _four_dimensional(query, key, value, enable_gqa):
    """Views (B, H, T, E) of the three with broadcast leading dimensions, and those dimensions without the heads."""
    q, k, v = (t if t.dim() > 2 else t.unsqueeze(0) for t in (query, key, value))
    Hq, Hk, Hv = q.shape[-3], k.shape[-3], v.shape[-3]
    if enable_gqa:
        if Hq != Hk and not (Hk > 0 and Hq % Hk == 0):
            raise ValueError(f"{_OP}: {Hq} query heads are no multiple of {Hk} key heads")
    elif not Hq == Hk == Hv:
        heads = {n for n in (Hq, Hk, Hv) if n != 1}
        if len(heads) > 1:
            grouped = "; pass enable_gqa=True for grouped heads" if Hk == Hv and Hk and Hq % Hk == 0 else ""
            raise ValueError(f"{_OP}: query has {Hq} heads, key {Hk}, value {Hv}; they do not broadcast{grouped}")
        (heads,) = heads
        q, k, v = (t.expand(*t.shape[:-3], heads, *t.shape[-2:]) for t in (q, k, v))
    shapes = [t.shape[:-3] for t in (q, k, v)]
    if len(shapes[0]) == 1 and shapes[0] == shapes[1] == shapes[2]:
        return q, k, v, shapes[0]
    try:
        leading = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        got = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(f"{_OP}: the leading dimensions of {got} do not broadcast") from None
    q, k, v = (t.expand(*leading, *t.shape[-3:]).reshape(math.prod(leading), *t.shape[-3:]) for t in (q, k, v))
    return q, k, v, leading


def _check_optional(name, t, query, or_boolean=False):
    """Raises unless ``t`` is a floating tensor on the query's device, or with or_boolean a boolean one."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(t).__name__}")
    if not t.is_floating_point() and not (or_boolean and t.dtype == torch.bool):
        raise TypeError(f"{_OP}: {name} must be {'boolean or ' * or_boolean}floating point, got {t.dtype}")
    if t.device != query.device:
        raise ValueError(f"{_OP}: {name} is on {t.device}, query on {query.device}")


def _broadcast_mask(attn_mask, leading, shape):
    """attn_mask broadcast to (B, Hq, L, S), as a view where the strides allow it."""
    full = (*leading, *shape[1:])
    try:
        return attn_mask.expand(full).reshape(shape)
    except RuntimeError:
        raise ValueError(f"{_OP}: attn_mask {tuple(attn_mask.shape)} does not broadcast to {full}") from None


def _check_window(window) -> bool:
    """Whether the window limits anything. ValueError where it is no window."""
    try:
        left, right = window
        valid = min(left, right) >= -1
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{_OP}: window must be (left, right) >= -1, got {window!r}")
    return (left, right) != (-1, -1)


# ------------------------------------------------------------------------------- FLOPs, verify
def _flops_fwd(q, k, v, *_, out_shape=None):
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(q, k, v)


def _flops_bwd(dout, dlse, q, k, v, *_, out_shape=None):
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(dout, q, k, v)


def _draw(random, d):
    q, k, v = (random(d["B"], d["H"], *s) for s in ((d["L"], d["E"]), (d["S"], d["E"]), (d["S"], d["Ev"])))
    return q, k, v, bool(d["causal"]), 1.0 / math.sqrt(max(d["E"], 1))


def _cancelled(args, grads):
    """dq and dk without rowsum(dout out), the softmax's correction, which cancels most of them."""
    q, k, v, is_causal, scale = args
    out, lse = attention_fwd(*args)
    terms = attention_bwd(grads[0], None, q, k, v, out * 0, lse, is_causal, scale, [True, True, False])
    return {"dq": terms[0], "dk": terms[1]}


def _call(q, k, v, is_causal, scale):
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)


def _call_with_lse(q, k, v, is_causal, scale):
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, return_lse=True)


def _torchs_with_lse(q, k, v, is_causal, scale):
    lse = torch.logsumexp(scores(q, k, is_causal, scale), -1)  # in float32, as ours is
    return attention_composite(q, k, v, is_causal, scale), lse


_HOW: dict[str, Any] = {
    "inputs": ("q", "k", "v"),
    "dims": {"B": 2, "H": 4, "L": 128, "S": lambda d: d["L"], "E": 64, "Ev": lambda d: d["E"], "causal": 0},
    "draw": _draw,
    "cancelled": _cancelled,
}
register(
    Op(
        "attention",
        public=scaled_dot_product_attention,
        prepare=_prepare,
        composite=attention_composite,
        fwd=attention_fwd,
        bwd=attention_bwd,
        function=Attention,
        results=2,
        flops=(_flops_fwd, _flops_bwd),
        lower_precision=True,
        specs={
            "attention": Spec(
                "attention",
                call=_call,
                shapes=({}, {"causal": 1}, {"L": 100, "S": 77, "E": 80, "Ev": 48, "causal": 1}),
                **_HOW,
            ),
            "attention_lse": Spec(
                "attention",
                call=_call_with_lse,
                shapes=({}, {"causal": 1}),
                outputs=("fwd", "lse"),
                yardstick=_torchs_with_lse,
                **_HOW,
            ),
        },
    )
)
