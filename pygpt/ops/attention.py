"""Attention: out = softmax(s) v with the scores s = scale q k^T, and lse, the log of each row's sum of exponentials.

q (B, Hq, L, E), k (B, Hkv, S, E), v (B, Hkv, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L). Backward keeps out and lse
and recomputes p = exp(s - lse) (FlashAttention-2; Dao 2023), so that nothing of size L x S stays in memory.

A query sees the keys of an interval (csrc/attention/visible.h draws it), and its scores may be changed on the way to
the softmax, in this order: scale, softcap, ALiBi and floating mask, then the boolean masks together. `Options` has what
a call may add to the plain one. attention_arguments.py checks the public arguments and makes them canonical;
attention_specs.py has the specs, and registers the op.
"""

import math
from contextlib import nullcontext
from types import NoneType
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..autocast import autocasting
from ..dispatch import call, lookup
from .attention_arguments import is_fast, torchs
from .common import (
    acc,
    backward_kernels,
    composite_gradients,
    dense_strides,
    dropout_factors,
    in_forward_mode,
    laid_out,
    only,
    savable,
)


# ------------------------------------------------------------------------------- the mathematics
class Options(NamedTuple):
    """The optional arguments of attention_fwd and attention_bwd, in the order of their schema."""

    attn_mask: Tensor | None = None  # boolean or floating, (B or 1, Hq or 1, L or 1, S or 1)
    alibi_slopes: Tensor | None = None  # (B or 1, Hq) in the dtype of lse
    sink: Tensor | None = None  # (Hq,) in the dtype of lse
    seed: Tensor | None = None  # (1,) int64: the key of dropout's random bits
    dropout_p: float = 0.0
    softcap: float = 0.0
    left: int = -1  # how many keys before its own a query sees; -1 is unlimited
    right: int = -1
    lower_right: bool = False  # whether query i's own key is i + S - L, not i


def attention_composite(q, k, v, is_causal, scale, *options, return_lse=False):
    """out, or with return_lse (out, lse): PyTorch's own function where it has the options, else the formulas."""
    if not options and not return_lse and not in_forward_mode():
        return torchs(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    with torch.autocast(q.device.type, enabled=False) if autocasting(q.device.type) else nullcontext():
        o = Options(*options)
        p, lse = _softmax(_scores(q, k, is_causal, scale, o)[0], o.sink)
        out = (_dropped(p, o) @ acc(_repeated(v, q))).to(q.dtype)
    return (out, lse) if return_lse else out


def scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    """The scores of a plain call, -inf where masked."""
    return _scores(q, k, is_causal, scale, Options())[0]


def _scores(q, k, is_causal, scale, o: Options) -> tuple[Tensor, Tensor]:
    """(B, Hq, L, S): the scores, -inf where masked, and what they were after softcap, for its derivative."""
    s = (acc(q) * scale) @ acc(_repeated(k, q)).mT
    if o.softcap:
        s = o.softcap * torch.tanh(s / o.softcap)
    capped = s
    L, S = s.shape[-2:]
    if o.alibi_slopes is not None:
        s = s - o.alibi_slopes[..., None, None] * distance(L, S, q.device, o.lower_right).abs()
    if o.attn_mask is not None and o.attn_mask.dtype != torch.bool:
        s = s + o.attn_mask.to(s.dtype)
    keep = visible(L, S, q.device, is_causal, o)
    return s if keep is None else s.masked_fill(~keep, -math.inf), capped


def own_key(L: int, S: int, device, lower_right: bool) -> Tensor:
    """(L, 1): the key on query i's diagonal, which may lie outside 0 .. S - 1."""
    return torch.arange(L, device=device)[:, None] + (S - L if lower_right else 0)


def distance(L: int, S: int, device, lower_right: bool) -> Tensor:
    """(L, S): how far key j is to the right of query i's own key."""
    return torch.arange(S, device=device) - own_key(L, S, device, lower_right)


def interval(L: int, S: int, device, is_causal: bool, o: Options) -> tuple[Tensor, Tensor]:
    """(L, 1), (L, 1): query i sees the keys begin .. end - 1, before a boolean mask hides some."""
    own, right = own_key(L, S, device, o.lower_right), 0 if is_causal else o.right
    begin = (own - o.left).clamp(min=0) if o.left >= 0 else torch.zeros_like(own)
    end = (own + right + 1).clamp(max=S) if right >= 0 else torch.full_like(own, S)
    return begin, end


def visible(L: int, S: int, device, is_causal: bool, o: Options) -> Tensor | None:
    """Whether query i sees key j, broadcast to (B, Hq, L, S). None if each query sees every key."""
    keep = o.attn_mask if o.attn_mask is not None and o.attn_mask.dtype == torch.bool else None
    if not is_causal and o.left < 0 and o.right < 0:
        return keep
    (begin, end), key = interval(L, S, device, is_causal, o), torch.arange(S, device=device)
    seen = (begin <= key) & (key < end)
    return seen if keep is None else seen & keep


def _softmax(s: Tensor, sink: Tensor | None):
    """p and lse. A row that sees no key has p = 0, and lse = sink or -inf, never NaN."""
    m = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    if sink is not None:
        m = m.maximum(sink.detach()[:, None, None])
    m = m.masked_fill(m == -math.inf, 0.0)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink[:, None, None] - m)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (m + total.log()).masked_fill(empty, -math.inf)
    return e / total, lse.squeeze(-1)


def _dropped(p: Tensor, o: Options) -> Tensor:
    """p after dropout: 0 where a weight is dropped, else p / (1 - dropout_p)."""
    if o.seed is None:
        return p
    (B, H, L, S), device = p.shape, p.device
    rows, heads = torch.arange(L, device=device)[:, None], torch.arange(B * H, device=device).view(B, H, 1, 1)
    return p * dropout_factors(o.seed, o.dropout_p, S, rows, heads).to(p.dtype)


def _repeated(kv: Tensor, q: Tensor) -> Tensor:
    """Each head as many times as query heads share it."""
    return kv if kv.shape[1] == q.shape[1] else kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


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


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None, sink: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
    softcap: float = 0.0, left: int = -1, right: int = -1, lower_right: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, Hq, L, Ev) laid out as q is, lse (B, Hq, L) = log(sum_j exp(s_ij) + exp(sink))."""
    o = Options(attn_mask, alibi_slopes, sink, seed, dropout_p, softcap, left, right, lower_right)
    p, lse = _softmax(_scores(q, k, is_causal, scale, o)[0], sink)
    return laid_out(_dropped(p, o) @ acc(_repeated(v, q)), strides_like_query(q, v.shape[3]), q.dtype), lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    is_causal: bool, scale: float, needs: list[bool], attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None, sink: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
    softcap: float = 0.0, left: int = -1, right: int = -1, lower_right: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dmask, dslopes, dsink; the last three only where ``needs`` has six entries.

    With delta = rowsum(dout out) - dlse and f = 1 / (1 - dropout_p) where a weight is kept, else 0:
    dv = (p f)^T dout; ds = p (f dout v^T - delta); dmask = ds; dslopes = -sum(ds distance);
    dsink = -sum(exp(sink - lse) delta); with c = 1, or 1 - (s / softcap)^2 of the capped scores: dq = scale (c ds) k;
    dk = scale (c ds)^T q. Gradients are summed over what was broadcast: the query heads of a group, the mask.
    A row that sees one key, and has no sink, has p = 1 whatever the score, so its ds is dlse.
    """
    o = Options(attn_mask, alibi_slopes, sink, seed, dropout_p, softcap, left, right, lower_right)
    s, capped = _scores(q, k, is_causal, scale, o)
    L, S = s.shape[-2:]
    finite_lse = lse.masked_fill(lse == -math.inf, 0.0)
    p = torch.exp(s - finite_lse[..., None])
    do = acc(dout)
    delta = (do * acc(out)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    ds = p * (_dropped(do @ acc(_repeated(v, q)).mT, o) - delta)
    if sink is None:
        begin, end = interval(L, S, s.device, is_causal, o)
        ds = torch.where(end - begin == 1, p * (0.0 if dlse is None else dlse[..., None]), ds)
    ds_scaled = ds * scale if not softcap else ds * (1.0 - (capped / softcap) ** 2) * scale

    needs = [*needs, False, False, False][:6]
    dq, dk, dv = (
        _heads_last(g.to(q.dtype)) if need else q.new_empty(0)
        for need, g in zip(
            needs,
            (
                ds_scaled @ acc(_repeated(k, q)),
                _of_groups(ds_scaled.mT @ acc(q), k),
                _of_groups(_dropped(p, o).mT @ do, k),
            ),
            strict=False,
        )
    )
    dmask, dslopes, dsink = (q.new_empty(0) for _ in range(3))  # results of an op may not share memory
    if needs[3]:
        assert attn_mask is not None
        dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    if needs[4]:
        assert alibi_slopes is not None
        of_heads = -(ds * distance(L, S, s.device, lower_right).abs()).sum((-1, -2))
        dslopes = of_heads.sum_to_size(alibi_slopes.shape)
    if needs[5]:
        assert sink is not None
        dsink = -(torch.exp(sink[:, None] - finite_lse) * delta.squeeze(-1)).sum((0, 2))
    return dq, dk, dv, dmask, dslopes, dsink


def _of_groups(g: Tensor, k: Tensor) -> Tensor:
    """(B, Hq, S, .) summed over the query heads that share a head of k."""
    return g if g.shape[1] == k.shape[1] else g.unflatten(1, (k.shape[1], -1)).sum(2)


# ------------------------------------------------------------------------------- autograd
def _with_lse(*args):
    return attention_composite(*args, return_lse=True)


class Attention(torch.autograd.Function):
    """(kernels, q, k, v, is_causal, scale, *options) -> out, lse. The options are absent, or all of `Options`."""

    @staticmethod
    def forward(ctx, kernels, q, k, v, is_causal, scale, *options):
        ctx.kernels, ctx.is_causal, ctx.scale, ctx.options = kernels, is_causal, scale, options[4:]
        out, lse = kernels.attention_fwd(q, k, v, is_causal, scale, *options)
        ctx.save_for_backward(q, k, v, out, lse, *map(savable, options[:4]))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        options = (*tensors, *ctx.options)
        needs, of_options = ctx.needs_input_grad[1:4], ctx.needs_input_grad[6:9]
        if of_options:  # of a registered op, trailing arguments that have their defaults are left out
            needs = *needs, *of_options, *(False,) * (3 - len(of_options))
        kernels = backward_kernels(ctx)
        if kernels is None:
            args = q, k, v, ctx.is_causal, ctx.scale, *options
            needed = *needs[:3], False, False, *needs[3:]
            grads = composite_gradients(_with_lse, args, needed, (dout, dlse))
            return None, *grads, *(None,) * (len(ctx.needs_input_grad) - 1 - len(grads))
        if dout is None:  # lse does not depend on v
            dout, needs = torch.zeros_like(out), (*needs[:2], False, *needs[3:])
        grads = kernels.attention_bwd(dout, dlse, q, k, v, out, lse, ctx.is_causal, ctx.scale, needs, *options)
        grads = only(needs, grads[: len(needs)])
        return None, *grads[:3], None, None, *grads[3:], *(None,) * (6 if options else 0)


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
    sink: Tensor | None = None,
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
    sink: Tensor | None = None,
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
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns softmax(scale * query key^T + bias) value, with the arguments of torch's function of this name.

    The algorithm is FlashAttention-2 (Dao 2023): the (L, S) matrix is never in memory, forward or backward.

    Shapes: ``query (..., Hq, L, E)``, ``key (..., Hkv, S, E)``, ``value (..., Hkv, S, Ev)``, result
    ``(..., Hq, L, Ev)``. The leading dimensions broadcast, and so does a single head of key and value. The result is
    laid out in memory as query is. All tensors have one dtype: float64, float32, bfloat16 or float16.

    - ``attn_mask`` is boolean (True: may attend) or floating (added to the scores, in float32 or query's dtype), and
      broadcasts to ``(..., Hq, L, S)``. Together with ``is_causal`` or ``window``, a query attends to the keys that all
      allow. It may also be ``torch.nn.attention.bias.causal_lower_right(L, S)``, which is causal along j = i + S - L
      instead of j = i and excludes ``is_causal``.
    - ``is_causal``: query i attends to keys j <= i, aligned top-left as in torch. For L = 3 and S = 5::

          i=0  1 . . . .
          i=1  1 1 . . .
          i=2  1 1 1 . .

    - ``dropout_p`` is the probability with which an attention weight is dropped. A seed is drawn from torch's generator
      of the device. The random bits follow from it and are the same on every backend, but not torch's.
    - ``scale`` is 1 / sqrt(E) by default.
    - ``enable_gqa`` lets Hq be a multiple of Hkv.
    - ``window=(left, right)``: query i attends to keys i - left <= j <= i + right; -1 is unlimited. Its diagonal j = i
      starts top-left also where L and S differ. Only causal_lower_right moves it, too: j = i + S - L.
    - ``alibi_slopes`` ``(Hq,)`` or ``(B, Hq)`` adds -slope * distance to the same diagonal (Press et al. 2021).
    - ``softcap`` c > 0 makes a score c * tanh(score / c), before masks.
    - ``sink`` ``(Hq,)`` adds exp(sink) to each row's sum of exponentials (attention sinks; Xiao et al. 2023, learned as
      in gpt-oss 2025). It is not scaled, capped, masked or dropped; lse includes it.
    - ``return_lse`` also returns lse ``(..., Hq, L)``, the natural logarithm of each row's sum of exponentials. It is
      float32 (float64 for float64) and differentiable.

    A fully masked row gives output 0, lse -inf and gradients 0. Shapes and values that do not fit raise ValueError.
    Unequal dtypes and wrong types, such as integer tensors, raise TypeError.
    """
    kernel = lookup("attention", query, key, value)
    options = attn_mask is not None or dropout_p or enable_gqa or window is not None or alibi_slopes is not None
    options = options or softcap or sink is not None or return_lse or not isinstance(scale, (NoneType, float, int))
    options = options or not isinstance(is_causal, bool)
    if kernel is None or options or not is_fast(query, key, value):
        return call(
            "attention", query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
            window=window, alibi_slopes=alibi_slopes, softcap=softcap, sink=sink, return_lse=return_lse,
        )  # fmt: skip
    scale = 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else float(scale)
    results = kernel(query, key, value, is_causal, scale)
    return results[0] if isinstance(results, tuple) else results
