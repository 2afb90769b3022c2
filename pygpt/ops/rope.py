"""rope: rotary position embedding of queries and keys (Su et al. 2021), after an optional RMSNorm of each head.

    x^ = x rstd weight, rstd = 1 / sqrt(mean(x^2) + eps), or x where there is no weight    (QK-norm; Henry et al. 2020)
    y_a = x^_a cos - x^_b sin, y_b = x^_b cos + x^_a sin for every pair (a, b) of the first R channels; y = x^ elsewhere

q (B, Hq, T, D), k (B, Hkv, T, D) or None, cos and sin (T, R/2) or (B or 1, T, R/2), constants, in the dtype of
statistics. Pair i is (i, i + R/2), or (2i, 2i + 1) if interleaved. position_ids (T,) or (B or 1, T) select rows of cos
and sin; a row that does not exist counts as NaN. weight (D,) is in the dtype of statistics.

Backward rotates by -angle. It keeps x and rstd (B, H, T) where there is a weight, and neither where there is none.
"""

from numbers import Real

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from ..dispatch import Call, Op, call, lookup, register, without_values
from .attention import strides_like_query
from .common import (
    Spec,
    acc,
    acc_dtype,
    backward_kernels,
    check_tensors,
    composite_gradients,
    laid_out,
    only,
    savable,
    unread,
)

_OP = "pygpt.rope"


# ------------------------------------------------------------------------------- the mathematics
def rope_composite(q, k, cos, sin, q_weight, k_weight, position_ids, eps, interleaved):
    """-> q and k after norm and rotation; an empty tensor for a k that is None."""
    cos, sin = _tables(cos, sin, position_ids)
    sides = ((q, q_weight), (k, k_weight))
    outs = [_rotated(_normed(acc(x), w, eps)[0], cos, sin, interleaved).to(q.dtype) for x, w in sides if x is not None]
    return (*outs, q.new_empty(0))[:2]


def _tables(cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> list[Tensor]:
    """cos and sin (B or 1, 1, T, R/2): the rows of the positions."""
    if cos.layout != torch.strided or sin.layout != torch.strided:
        raise TypeError(f"{_OP}: cos and sin must be strided")  # torch broadcasts sparse tensors wrongly
    tables = [t.detach() if t.dim() == 3 else t.detach()[None] for t in (cos, sin)]
    if position_ids is not None:
        rows = tables[0].shape[1]
        ids = (position_ids if position_ids.dim() == 2 else position_ids[None]).long()[..., None]
        exists = (ids >= 0) & (ids < rows)
        ids = ids.clamp(0, max(rows - 1, 0)) if rows else ids * 0
        tables = [torch.where(exists, _selected(t, ids), torch.nan) for t in tables]
    return [t[:, None] for t in tables]


def _selected(table: Tensor, ids: Tensor) -> Tensor:
    """table (B or 1, rows, R/2), ids (B or 1, T, 1) -> (B or 1, T, R/2)."""
    if table.shape[1] == 0:
        return table.new_zeros(1, 1, table.shape[2])
    B = max(table.shape[0], ids.shape[0]) if 0 not in (table.shape[0], ids.shape[0]) else 0
    return table.expand(B, -1, -1).gather(1, ids.expand(B, -1, table.shape[2]))


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x rstd weight and rstd, or x and an empty tensor where there is no weight."""
    if weight is None:
        return x, x.new_empty(0)
    rstd = torch.rsqrt(x.square().mean(-1) + eps)
    return x * rstd[..., None] * weight, rstd


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rotary[..., :half], rotary[..., half:]
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((y, rest), -1)


def rope_fwd(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    position_ids: Tensor | None, eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> q and k, laid out as they came, and the rstd (B, H, T) of each that has a weight. Others are empty."""
    cos, sin = _tables(cos, sin, position_ids)
    outs, rstds = [q.new_empty(0)] * 2, [q.new_empty(0, dtype=acc_dtype(q)) for _ in range(2)]
    for i, (x, weight) in enumerate(((q, q_weight), (k, k_weight))):
        if x is not None:
            xhat, rstds[i] = _normed(acc(x), weight, eps)
            outs[i] = laid_out(_rotated(xhat, cos, sin, interleaved), strides_like_query(x, x.shape[3]), x.dtype)
    return outs[0], outs[1], rstds[0], rstds[1]


def rope_bwd(
    dq_out: Tensor | None, dk_out: Tensor | None, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, q_rstd: Tensor | None, k_rstd: Tensor | None,
    position_ids: Tensor | None, interleaved: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dq_weight, dk_weight; dq is laid out as dq_out, dk as dk_out.

    With g = weight times dy rotated by -angle: dx = rstd (g - xhat mean(g xhat)), or g where there is no weight;
    dweight = the sum of xhat times the rotated dy over all rows.
    """
    cos, sin = _tables(cos, sin, position_ids)
    lead = dq_out if dq_out is not None else dk_out
    assert lead is not None, f"{_OP}_bwd: dq_out and dk_out are both None"
    grads = [lead.new_empty(0) for _ in range(2)] + [cos.new_empty(0) for _ in range(2)]
    for i, (dy, x, weight, rstd) in enumerate(((dq_out, q, q_weight, q_rstd), (dk_out, k, k_weight, k_rstd))):
        if dy is None or not (needs[i] or needs[i + 2]):
            continue
        g = _rotated(acc(dy), cos, -sin, interleaved)
        if weight is not None:
            assert x is not None and rstd is not None
            xhat = acc(x) * rstd[..., None]
            if needs[i + 2]:
                grads[i + 2] = (g * xhat).sum((0, 1, 2))
            g = g * weight
            g = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[..., None]
        if needs[i]:
            grads[i] = laid_out(g, strides_like_query(dy, dy.shape[3]), dy.dtype)
    return grads[0], grads[1], grads[2], grads[3]


# ------------------------------------------------------------------------------- autograd
class Rope(torch.autograd.Function):
    """(kernels, q, k, cos, sin, q_weight, k_weight, position_ids, eps, interleaved) -> q, k."""

    @staticmethod
    def forward(ctx, kernels, q, k, cos, sin, q_weight, k_weight, position_ids, eps, interleaved):
        ctx.kernels, ctx.eps, ctx.interleaved = kernels, eps, interleaved
        q_out, k_out, *rstds = kernels.rope_fwd(q, k, cos, sin, q_weight, k_weight, position_ids, eps, interleaved)
        of_norm = [
            t if weight is not None else None
            for t, weight in zip((q, k, *rstds), (q_weight, k_weight) * 2, strict=True)
        ]
        ctx.save_for_backward(*map(savable, (*of_norm, cos, sin, q_weight, k_weight, position_ids)))
        ctx.set_materialize_grads(False)
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        q, k, q_rstd, k_rstd, cos, sin, q_weight, k_weight, position_ids = ctx.saved_tensors
        wanted, given = ctx.needs_input_grad, [dq_out is not None, dk_out is not None] * 2
        needs = tuple(wanted[i] and g for i, g in zip((1, 2, 5, 6), given, strict=True))
        if not any(needs):
            return (None,) * 10
        kernels = backward_kernels(ctx)
        if kernels is None:
            q, k = (
                unread(dy, *dy.shape) if x is None and dy is not None else x for x, dy in ((q, dq_out), (k, dk_out))
            )
            if q is None:  # only k's gradient came in, and q was not saved
                q = k[:, :0]
            args = q, k, cos, sin, q_weight, k_weight, position_ids, ctx.eps, ctx.interleaved
            ordered = needs[0], needs[1], False, False, needs[2], needs[3]
            dq, dk, _, _, *of_weights = composite_gradients(rope_composite, args, ordered, (dq_out, dk_out))
        else:
            dq, dk, *of_weights = only(
                needs,
                kernels.rope_bwd(
                    dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, q_rstd, k_rstd, position_ids,
                    ctx.interleaved, needs,
                ),
            )  # fmt: skip
        return None, dq, dk, None, None, *of_weights, None, None, None


# ------------------------------------------------------------------------------- the public function
def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns q and k with rotary position embedding (Su et al. 2021), computed in one pass over memory.

    Shapes: ``q (B, Hq, T, D)``, ``k (B, Hkv, T, D)`` or None, ``cos`` and ``sin`` ``(T, R/2)`` or ``(B, T, R/2)``. The
    results are new tensors of the shapes, dtypes and memory orders of q and k; None for a k that is None. Heads that
    are views of one packed projection are read where they are.

    - The first ``R <= D`` channels are rotated, pairs ``(i, i + R/2)``, or ``(2i, 2i + 1)`` with ``interleaved``. The
      others stay as they are.
    - ``cos`` and ``sin`` are float32, or float64 for float64 q, whatever the dtype of q and k. They are constants:
      they get no gradient.
    - ``q_weight`` and ``k_weight``, ``(D,)``: an RMSNorm over the head dimension, with ``eps``, comes before the
      rotation of that tensor (Henry et al. 2020). Each is optional and independent of the other.
    - ``position_ids``, integers ``(T,)`` or ``(B, T)``, select rows of cos and sin, which may then have any number of
      rows. On a CPU one out of range raises. On a GPU it gives NaN in that position.

    q and k have one dtype: float64, float32, bfloat16 or float16. Everything is computed in float32 (float64 for
    float64) and rounded once. Backward keeps q and k only where they have a weight. Shapes that do not fit raise
    ValueError, wrong types and unequal dtypes TypeError.
    """
    kernel = lookup("rope", q, k, cos, sin, q_weight, k_weight) if position_ids is None else None
    if kernel is None or not _fits(q, k, cos, sin, q_weight, k_weight, eps, interleaved):
        return call(
            "rope", q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, interleaved=interleaved,
            position_ids=position_ids,
        )  # fmt: skip
    q_out, k_out = kernel(q, k, cos, sin, q_weight, k_weight, None, eps, interleaved)
    return q_out, None if k is None else k_out


def _fits(q, k, cos, sin, q_weight, k_weight, eps, interleaved) -> bool:
    """Whether `prepare` would change nothing and raise nothing in a call without position_ids."""
    if q.dim() != 4 or cos.dim() not in (2, 3) or cos.shape != sin.shape:
        return False
    B, _, T, D = q.shape
    return (
        (k_weight is None if k is None else k.dim() == 4 and k.shape[0] == B and k.shape[2:] == (T, D))
        and 2 * cos.shape[-1] <= D
        and (cos.dim() == 2 or cos.shape[0] in (1, B))
        and cos.shape[-2] == T
        and all(w is None or w.shape == (D,) for w in (q_weight, k_weight))
        and type(eps) is float
        and type(interleaved) is bool
    )


def prepare(
    q, k, cos, sin, *, q_weight=None, k_weight=None, eps=1e-6, interleaved=False, position_ids=None
) -> Call:  # fmt: skip
    if error := check_tensors("rope", (q, k, cos, sin, q_weight, k_weight)):
        raise error
    _check_heads(q, k)
    D = q.shape[3]
    _check_tables(q, cos, sin, position_ids)
    if not isinstance(eps, Real):
        raise TypeError(f"{_OP}: eps must be a number, got {type(eps).__name__}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"{_OP}: interleaved must be a bool, got {type(interleaved).__name__}")
    if k is None and k_weight is not None:
        raise ValueError(f"{_OP}: k_weight is given, but k is None")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != (D,):
            raise ValueError(f"{_OP}: {name} must have shape ({D},), got {tuple(weight.shape)}")
    weights = [None if w is None else w.to(acc_dtype(q)) for w in (q_weight, k_weight)]
    if position_ids is not None:
        position_ids = _canonical_positions(position_ids, q, cos.shape[-2])

    def finish(results):
        return results[0], None if k is None else results[1]

    args = (q, k, cos, sin, *weights, position_ids, float(eps), interleaved)
    fast = (q, k, cos, sin, q_weight, k_weight) if position_ids is None else None  # whose values must be checked
    return Call(args, finish=finish, fast=fast)


def _check_heads(q, k):
    if q.dim() != 4:
        raise ValueError(f"{_OP}: q must have shape (B, H, T, D), got {tuple(q.shape)}")
    if k is None:
        return
    if k.dtype != q.dtype:
        raise TypeError(f"{_OP}: k is {k.dtype}, q is {q.dtype}; they must be equal")
    B, _, T, D = q.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[2] != T or k.shape[3] != D:
        raise ValueError(f"{_OP}: k must have shape ({B}, H, {T}, {D}), got {tuple(k.shape)}")


def _check_tables(q, cos, sin, position_ids):
    B, _, T, D = q.shape
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype != acc_dtype(q):
            raise TypeError(f"{_OP}: {name} must be {acc_dtype(q)} for q of {q.dtype}, got {t.dtype}")
        fits = t.dim() == 2 or t.dim() == 3 and t.shape[0] in (1, B)
        if not fits or (position_ids is None and t.shape[-2] != T) or 2 * t.shape[-1] > D:
            rows = T if position_ids is None else "rows"
            got = tuple(t.shape)
            raise ValueError(f"{_OP}: {name} must be ({rows}, R/2) or ({B}, {rows}, R/2) with R <= {D}, got {got}")
    if cos.shape != sin.shape:
        raise ValueError(f"{_OP}: cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}; they must be equal")


def _canonical_positions(position_ids, q: Tensor, rows: int) -> Tensor:
    """int32 or int64, checked; on a CPU also that the rows exist."""
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"{_OP}: position_ids must be a Tensor, got {type(position_ids).__name__}")
    if position_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{_OP}: position_ids must be integers, got {position_ids.dtype}")
    if position_ids.device != q.device:
        raise ValueError(f"{_OP}: position_ids is on {position_ids.device}, q on {q.device}")
    B, T = q.shape[0], q.shape[2]
    if tuple(position_ids.shape) not in ((T,), (B, T), (1, T)):
        raise ValueError(f"{_OP}: position_ids must have shape ({T},) or ({B}, {T}), got {tuple(position_ids.shape)}")
    known = position_ids.device.type == "cpu" and not without_values((position_ids,))
    if known and not _are_functorch_transforms_active() and position_ids.numel():
        first, last = (int(n) for n in position_ids.aminmax())
        if first < 0 or last >= rows:
            raise ValueError(f"{_OP}: position_ids must be from 0 to {rows - 1}, got {first if first < 0 else last}")
    return position_ids if position_ids.dtype == torch.int32 else position_ids.long()


# ------------------------------------------------------------------------------- verify
def _draw(random, d):
    B, H, T, D = d["B"], d["H"], d["T"], d["D"]
    rows = T + 3 if d["positions"] else T
    ticks = (random(rows, d["R"] // 2) * 2.0**20).long()
    q, k = random(B, H * d["group"], T, D), random(B, H, T, D)
    weights = [random(D) if d["norm"] else None for _ in range(2)]
    ids = (random(B, T).abs() * 2**20).long() % rows if d["positions"] else None
    return q, k, *weights, ticks, ids, 1e-6, bool(d["interleaved"])


def _canonical(q, k, q_weight, k_weight, ticks, ids, eps, interleaved):
    """The drawn arguments, in which integers stand for the angles, as those of rope_fwd."""
    angles = ticks * 2.0**-20
    tables = (t.float().to(acc_dtype(q)) for t in (angles.cos(), angles.sin()))
    return q, k, *tables, acc(q_weight), acc(k_weight), ids, eps, interleaved


def _call(*drawn):
    q, k, cos, sin, q_weight, k_weight, ids, eps, interleaved = _canonical(*drawn)
    return rope(
        q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, interleaved=interleaved, position_ids=ids
    )


def _cancelled(args, grads):
    """The gradients without the norm's correction."""
    if args[2] is None:
        return {}
    q, k, cos, sin, *weights, ids, eps, interleaved = _canonical(*args)
    tables = _tables(cos, sin, ids)
    return {
        f"d{name}": _rotated(dy, tables[0], -tables[1], interleaved) * w * _normed(x, w, eps)[1][..., None]
        for name, x, w, dy in (("q", q, weights[0], grads[0]), ("k", k, weights[1], grads[1]))
    }


register(
    Op(
        "rope",
        public=rope,
        prepare=prepare,
        composite=rope_composite,
        fwd=rope_fwd,
        bwd=rope_bwd,
        function=Rope,
        results=2,
        statistics=("cos", "sin", "q_weight", "k_weight"),
        specs={
            "rope": Spec(
                "rope",
                inputs=("q", "k", "q_weight", "k_weight"),
                dims={
                    "B": 2, "H": 4, "group": 2, "T": 64, "D": 64, "R": lambda d: d["D"] // 2 * 2, "norm": 0,
                    "interleaved": 0, "positions": 0,
                },
                draw=_draw,
                canonical=_canonical,
                call=_call,
                shapes=({}, {"norm": 1}, {"interleaved": 1, "D": 80, "R": 40, "norm": 1, "positions": 1}),
                outputs=("q", "k"),
                yardstick=lambda *drawn: rope_composite(*_canonical(*drawn)),
                cancelled=_cancelled,
            )
        },
    )
)  # fmt: skip
