"""Attention over packed sequences: many sequences of unequal lengths in one tensor, without padding.

Sequence b has the queries cu_seq_q[b] .. cu_seq_q[b + 1] - 1 of q (total_q, Hq, E), and the keys and values in the rows
cu_seq_k[b] .. cu_seq_k[b + 1] - 1 of k (total_k, Hkv, E) and v (total_k, Hkv, Ev). It uses the first seqused_k[b] of
them, if that is given. Its queries see its keys alone, along the diagonal that ends at its last key. Rows that belong
to no sequence have out = 0, lse = -inf and gradients 0. Each sequence is one call of attention, and so is the reference
here; attention.py has the mathematics. The kernels of attention serve these calls, too (csrc/attention/sequence.h).
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from operator import index
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..dispatch import Call, Op, call, register, without_values
from .attention import Options, attention_bwd, attention_composite, attention_fwd, visible
from .attention_arguments import checked_scale, checked_window, torchs
from .attention_specs import flops_bwd, flops_fwd
from .common import (
    Spec,
    acc_dtype,
    backward_kernels,
    check_tensors,
    composite_gradients,
    in_forward_mode,
    only,
    savable,
)

_OP = "pygpt.varlen_attn"


# ------------------------------------------------------------------------------- the mathematics
class Packing(NamedTuple):
    """The arguments of varlen_attn_fwd and varlen_attn_bwd after the tensors, in the order of their schema."""

    cu_seq_q: Tensor  # (N + 1,) int32, from 0, never falling
    cu_seq_k: Tensor  # (N + 1,) int32, likewise
    seqused_k: Tensor | None  # (N,) int32
    max_q: int  # no sequence has more queries, nor more keys than max_k
    max_k: int
    scale: float
    left: int  # how many keys before its own a query sees; -1 is unlimited. Query i's own key is i + keys - queries
    right: int

    @property
    def options(self) -> Options:
        return Options(left=self.left, right=self.right, lower_right=True)


class Rows(NamedTuple):
    """The rows of one sequence."""

    q: slice
    k: slice

    def of_queries(self, t: Tensor) -> Tensor:
        """(1, heads, length, width) of a packed tensor with a row for each query."""
        return t[self.q].transpose(0, 1)[None]

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Likewise of packed queries, keys and values."""
        return self.of_queries(q), *(t[self.k].transpose(0, 1)[None] for t in (k, v))  # type: ignore[return-value]


def sequences(p: Packing, q: Tensor, k: Tensor) -> Iterator[Rows]:
    """The rows of each sequence, checked."""
    of_q, of_k = _spans("q", p.cu_seq_q, q.shape[0], p.max_q), _spans("k", p.cu_seq_k, k.shape[0], p.max_k)
    used = [end - begin for begin, end in of_k] if p.seqused_k is None else p.seqused_k.tolist()
    if any(not 0 <= n <= end - begin for n, (begin, end) in zip(used, of_k, strict=True)):
        raise ValueError(f"{_OP}: seqused_k must be from 0 to the number of keys of a sequence")
    for span, (begin, _), n in zip(of_q, of_k, used, strict=True):
        yield Rows(slice(*span), slice(begin, begin + n))


def _spans(name: str, cu_seq: Tensor, total: int, most: int) -> list[tuple[int, int]]:
    """The first row of each sequence and the one after its last row, checked."""
    rows = cu_seq.tolist()
    spans = list(pairwise(rows))
    if rows[0] != 0 or rows[-1] > total or any(end < begin for begin, end in spans):
        raise ValueError(f"{_OP}: cu_seq_{name} must start at 0, never fall, and end within the {total} rows")
    if (longest := max((end - begin for begin, end in spans), default=0)) > most:
        raise ValueError(f"{_OP}: max_{name} is {most}, but a sequence has {longest} rows")
    return spans


def varlen_attn_composite(q, k, v, *packing, return_lse=False):
    """out, or with return_lse (out, lse): PyTorch's own function for each sequence."""
    p, N = Packing(*packing), packing[0].shape[0] - 1
    if N > 0 and without_values((q, k, v)):
        return _composite_by_mask(q, k, v, p, return_lse)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    empty = Rows(slice(0), slice(0))  # connects the results to the inputs if there is no sequence
    for rows in (empty, *(sequences(p, q, k) if N > 0 else ())):
        results = _sequence_composite(rows.of(q, k, v), p, return_lse)
        outs.append(results[0][0].transpose(0, 1))
        if return_lse:
            lses.append(results[1][0])
    covered = sum(out.shape[0] for out in outs)
    out = torch.cat([*outs, q.new_zeros(q.shape[0] - covered, q.shape[1], v.shape[2])])
    if not return_lse:
        return out
    outside = q.new_full((q.shape[1], q.shape[0] - covered), -math.inf, dtype=acc_dtype(q))
    return out, torch.cat([*lses, outside], 1)


def _sequence_composite(qkv: tuple[Tensor, Tensor, Tensor], p: Packing, return_lse: bool) -> tuple:
    q, k, v = qkv
    if return_lse or q.shape[2] == 0 or k.shape[2] == 0 or in_forward_mode():
        return attention_composite(q, k, v, False, p.scale, *p.options, return_lse=True)
    causal = q.shape[2] == k.shape[2] and (p.left, p.right) == (-1, 0)
    mask = None if causal else visible(q.shape[2], k.shape[2], q.device, False, p.options)
    return torchs(q, k, v, mask, is_causal=causal, scale=p.scale, enable_gqa=q.shape[1] != k.shape[1]), None


def _composite_by_mask(q, k, v, p: Packing, return_lse: bool):
    """One call of attention with a mask of all queries and keys, for graphs, which cannot depend on the lengths.

    A derivative of a derivative needs it, and a transform within a graph. Here a NaN reaches other sequences.
    """
    lengths_q, lengths_k = p.cu_seq_q.diff(), p.cu_seq_k.diff() if p.seqused_k is None else p.seqused_k
    (of_q, i), (of_k, j) = (_places(cu_seq, t.shape[0]) for cu_seq, t in ((p.cu_seq_q, q), (p.cu_seq_k, k)))
    own = i + lengths_k[of_q.clamp(max=lengths_k.shape[0] - 1)] - lengths_q[of_q.clamp(max=lengths_q.shape[0] - 1)]
    mask = (of_q[:, None] == of_k) & (j < lengths_k[of_k.clamp(max=lengths_k.shape[0] - 1)])
    mask = mask & (of_q < lengths_q.shape[0])[:, None]
    if p.left >= 0:
        mask = mask & (j >= own[:, None] - p.left)
    if p.right >= 0:
        mask = mask & (j <= own[:, None] + p.right)
    heads_first = (t.transpose(0, 1)[None] for t in (q, k, v))
    out, lse = attention_composite(*heads_first, False, p.scale, *Options(mask[None, None]), return_lse=True)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def _places(cu_seq: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(rows,), (rows,): each row's sequence, the number of sequences for a row of none, and its place in it."""
    row = torch.arange(rows, device=cu_seq.device)
    sequence = torch.searchsorted(cu_seq, row, right=True) - 1
    return sequence, row - cu_seq[sequence]


def varlen_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None,
    max_q: int, max_k: int, scale: float, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (total_q, Hq, Ev), contiguous, and lse (Hq, total_q)."""
    p = Packing(cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, scale, left, right)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=acc_dtype(q))
    for rows in _known(p, q, k):
        of_out, of_lse = attention_fwd(*rows.of(q, k, v), False, scale, left=left, right=right, lower_right=True)
        out[rows.q], lse[:, rows.q] = of_out[0].transpose(0, 1), of_lse[0]
    return out, lse


def varlen_attn_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, needs: list[bool],
    cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None, max_q: int, max_k: int, scale: float, left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (total_q, Hq, E), dk (total_k, Hkv, E), dv (total_k, Hkv, Ev), contiguous."""
    p = Packing(cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, scale, left, right)
    grads = [q.new_zeros(t.shape if need else 0) for need, t in zip(needs, (q, k, v), strict=True)]
    for rows in _known(p, q, k):
        do, o, of_lse = rows.of_queries(dout), rows.of_queries(out), lse[None, :, rows.q]
        of_dlse = None if dlse is None else dlse[None, :, rows.q]
        parts = attention_bwd(
            do, of_dlse, *rows.of(q, k, v), o, of_lse, False, scale, needs, left=left, right=right, lower_right=True
        )
        for need, grad, part, where in zip(needs, grads, parts, (rows.q, rows.k, rows.k), strict=False):
            if need:
                grad[where] = part[0].transpose(0, 1)
    return tuple(grads)  # type: ignore[return-value]


def _known(p: Packing, q: Tensor, k: Tensor) -> Iterator[Rows]:
    """The sequences; none of fake tensors, which have shapes but no values."""
    if p.cu_seq_q.device != q.device:
        raise ValueError(f"{_OP}: cu_seq_q is on {p.cu_seq_q.device}, query on {q.device}")
    return sequences(p, q, k) if _has_values(p.cu_seq_q) else iter(())


def _has_values(t: Tensor) -> bool:
    return not (t.is_meta or isinstance(t, FakeTensor))


# ------------------------------------------------------------------------------- autograd
def _with_lse(*args):
    return varlen_attn_composite(*args, return_lse=True)


class VarlenAttn(torch.autograd.Function):
    """(kernels, q, k, v, *packing) -> out, lse."""

    @staticmethod
    def forward(ctx, kernels, q, k, v, *packing):
        ctx.kernels, ctx.sizes = kernels, packing[3:]
        out, lse = kernels.varlen_attn_fwd(q, k, v, *packing)
        ctx.save_for_backward(q, k, v, out, lse, *map(savable, packing[:3]))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, v, out, lse, *rows = ctx.saved_tensors
        packing, needs = (*rows, *ctx.sizes), ctx.needs_input_grad[1:4]
        kernels = backward_kernels(ctx)
        if kernels is None:
            grads = composite_gradients(_with_lse, (q, k, v, *packing), needs, (dout, dlse))
            return None, *grads, *(None,) * len(packing)
        if dout is None:  # lse does not depend on v
            dout, needs = torch.zeros_like(out), (*needs[:2], False)
        grads = kernels.varlen_attn_bwd(dout, dlse, q, k, v, out, lse, needs, *packing)
        return None, *only(needs, grads), *(None,) * len(packing)


# ------------------------------------------------------------------------------- the public function
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns attention over packed sequences, with the arguments of torch.nn.attention.varlen.varlen_attn.

    The algorithm is FlashAttention-2 (Dao 2023). Nothing is padded: time and memory follow the lengths of the
    sequences, on a CPU as on a GPU. A sequence's results do not depend on the others. From token counts::

        cu_seq = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()  # 3, 5, 2 -> 0, 3, 8, 10
        out = varlen_attn(q, k, v, cu_seq, cu_seq, max(lengths), max(lengths), window_size=(-1, 0))  # causal

    Shapes: ``query (total_q, Hq, E)``, ``key (total_k, Hkv, E)``, ``value (total_k, Hkv, Ev)``, result
    ``(total_q, Hq, Ev)``. All three have one dtype: float64, float32, bfloat16 or float16.

    - ``cu_seq_q`` and ``cu_seq_k``, int32 ``(N + 1,)``: sequence b has the queries ``cu_seq_q[b]`` to
      ``cu_seq_q[b + 1] - 1``, and likewise the keys. They start at 0 and never fall. Rows after the last sequence give
      output 0 and gradients 0. ``cu_seq_k`` may be None in torch with block_table only, so not here.
    - ``max_q`` and ``max_k`` are at least the lengths of the longest sequence. On a CPU all of this is checked; a GPU
      trusts it.
    - ``return_aux``: with an object whose attribute ``lse`` is true, such as torch.nn.attention.varlen.AuxRequest, the
      result is (output, lse). lse ``(Hq, total_q)`` is the natural logarithm of each row's sum of exponentials, -inf in
      rows that see no key. It is float32 (float64 for float64) and differentiable.
    - ``scale`` is 1 / sqrt(E) by default.
    - ``window_size=(left, right)``: query i of a sequence sees the keys from ``own - left`` to ``own + right``, with
      ``own = i + keys - queries``; -1 is unlimited. (-1, 0) is causal.
    - ``enable_gqa`` lets Hq be a multiple of Hkv.
    - ``seqused_k`` int32 ``(N,)``: how many of its keys a sequence uses, as with a cache that is not full. The others
      have gradient 0.
    - ``block_table`` (paged keys) is not served: ValueError.
    - ``num_splits`` is accepted and changes nothing: results are always the same bits.

    A query without a visible key gives output 0 and gradients 0. Masks, dropout, ALiBi, softcap and sinks are not here.
    Where no kernel serves a call, such as one with wider heads, PyTorch computes sequence by sequence. A graph of
    second derivatives is the exception: it has a mask of all queries and keys.

    Shapes that do not fit raise ValueError, wrong types and unequal dtypes TypeError. Sequences that do not lie in the
    tensors raise ValueError, or RuntimeError where a kernel finds it.
    """
    return call(
        "varlen_attn", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale,
        window_size=window_size, enable_gqa=enable_gqa, seqused_k=seqused_k, block_table=block_table,
        num_splits=num_splits,
    )  # fmt: skip


def prepare(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
) -> Call:  # fmt: skip
    if not isinstance(block_table, (Tensor, NoneType)):
        raise TypeError(f"{_OP}: block_table must be a Tensor, got {type(block_table).__name__}")
    if block_table is not None:
        raise ValueError(f"{_OP}: block_table is not served: keys in pages are read by no kernel here")
    if num_splits is not None and not isinstance(num_splits, int):
        raise TypeError(f"{_OP}: num_splits must be an integer or None, got {type(num_splits).__name__}")
    if error := check_tensors("varlen_attn", (query, key, value), one_dtype=True):
        raise error
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 3:
            raise ValueError(f"{_OP}: {name} must have shape (total, heads, channels), got {tuple(t.shape)}")
    (_, Hq, E), (Sk, Hk, Ek), (Sv, Hv, _) = query.shape, key.shape, value.shape
    if Ek != E:
        raise ValueError(f"{_OP}: key has head dimension {Ek}, query {E}; they must be equal")
    if (Sk, Hk) != (Sv, Hv):
        raise ValueError(f"{_OP}: key has {Sk} rows of {Hk} heads, value {Sv} of {Hv}; they must be equal")
    if Hq != Hk and not (enable_gqa and Hk and Hq % Hk == 0):
        hint = "" if enable_gqa else "; pass enable_gqa=True for grouped heads"
        raise ValueError(f"{_OP}: {Hq} query heads and {Hk} key heads do not fit{hint}")
    if Hq == 0:
        key, value = key[:, :0], value[:, :0]
    N = _checked_rows("cu_seq_q", cu_seq_q, query)
    _checked_rows("cu_seq_k", cu_seq_k, query, N)
    if seqused_k is not None:
        _checked_rows("seqused_k", seqused_k, query, N - 1)
    max_q, max_k = _checked_length("max_q", max_q), _checked_length("max_k", max_k)
    left, right = checked_window(_OP, "window_size", window_size)
    scale = checked_scale(_OP, scale, E)
    args = query, key, value, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, scale, left, right
    if return_aux is not None and not hasattr(return_aux, "lse"):
        raise TypeError(f"{_OP}: return_aux needs an attribute lse, which {type(return_aux).__name__} does not have")
    return_lse = return_aux is not None and bool(return_aux.lse)

    def finish(results):
        return results if return_lse or isinstance(results, Tensor) else results[0]

    return Call(args, finish=finish, options={"return_lse": True} if return_lse else {})


def _checked_length(name: str, n):
    if torch.compiler.is_compiling():  # a comparison would be a guard, which a data-dependent length has none of
        return n
    try:
        n = index(n)
    except TypeError:
        n = -1
    if not 0 <= n < 2**63:
        raise ValueError(f"{_OP}: {name} must be an integer from 0 on")
    return n


def _checked_rows(name: str, t, query: Tensor, size: int | None = None) -> int:
    """Checks a tensor of row numbers and returns its size."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(t).__name__}")
    if t.dtype != torch.int32:
        raise TypeError(f"{_OP}: {name} must be int32, got {t.dtype}")
    if t.device != query.device:
        raise ValueError(f"{_OP}: {name} is on {t.device}, query on {query.device}")
    if t.dim() != 1 or t.shape[0] == 0 and size is None or size not in (None, t.shape[0]):
        want = "(N + 1,)" if size is None else f"({size},)"
        raise ValueError(f"{_OP}: {name} must have shape {want}, got {tuple(t.shape)}")
    return t.shape[0]


# ------------------------------------------------------------------------------- FLOPs, verify
def _flops_fwd(q, k, v, *packing, out_val=None):
    return sum(flops_fwd(*sequence) for sequence in _sequences_of(Packing(*packing), q, k, v))


def _flops_bwd(dout, dlse, q, k, v, out, lse, needs, *packing, out_val=None):
    sequences = _sequences_of(Packing(*packing), q, k, v)
    return sum(flops_bwd(of_q.new_empty(*of_q.shape[:3], v.shape[2]), None, of_q, *kv) for of_q, *kv in sequences)


def _sequences_of(p: Packing, q, k, v):
    """(q, k, v) of each sequence in 4 dimensions. Without values all count as the longest, as in torch."""
    if _has_values(p.cu_seq_q):
        return [rows.of(q, k, v) for rows in sequences(p, q, k)]
    lengths = p.max_q, p.max_k, p.max_k
    longest = [t.new_empty(1, t.shape[1], n, t.shape[2]) for t, n in zip((q, k, v), lengths, strict=True)]
    return [longest] * (p.cu_seq_q.shape[0] - 1)


def unequal_lengths(N: int, L: int, S: int) -> tuple[Tensor, Tensor, int, int]:
    """cu_seq_q and cu_seq_k of N sequences of L / N, 2 L / N, ... L queries and likewise of keys, and the rows that
    tensors have: two more than the sequences."""
    cu_q, cu_k = (torch.tensor([0, *(n * (b + 1) // N for b in range(N))]).cumsum(0).int() for n in (L, S))
    return cu_q, cu_k, int(cu_q[-1]) + 2, int(cu_k[-1]) + 2


def _draw(random, d):
    H, L, S = d["H"], d["L"], d["S"]
    starts_q, starts_k, rows_q, rows_k = unequal_lengths(d["N"], L, S)
    q = random(rows_q, H * d["group"], d["E"])
    k, v = random(rows_k, H, d["E"]), random(rows_k, H, d["Ev"])
    used = (starts_k.diff() + 1) // 2 if d["used"] else None
    scale = 1.0 / math.sqrt(max(d["E"], 1))
    return q, k, v, starts_q, starts_k, used, L, S, scale, d["left"], d["right"]


def _cancelled(args, grads):
    """The gradients without rowsum(dout out), the softmax's correction, which cancels most of them."""
    q, k, v, *packing = args
    out, lse = varlen_attn_fwd(*args)
    dq, dk, _ = varlen_attn_bwd(grads[0], None, q, k, v, out * 0, lse, [True, True, False], *packing)
    return {"dq": dq, "dk": dk}


def _call(q, k, v, *packing):
    p = Packing(*packing)
    return varlen_attn(
        q, k, v, p.cu_seq_q, p.cu_seq_k, p.max_q, p.max_k, return_aux=_AUX, scale=p.scale,
        window_size=(p.left, p.right), enable_gqa=True, seqused_k=p.seqused_k,
    )  # fmt: skip


class _Aux(NamedTuple):
    lse: bool = True


_AUX = _Aux()


def _torchs_with_lse(*args):
    return varlen_attn_composite(*args), varlen_attn_composite(*args, return_lse=True)[1]


register(
    Op(
        "varlen_attn",
        public=varlen_attn,
        prepare=prepare,
        composite=varlen_attn_composite,
        fwd=varlen_attn_fwd,
        bwd=varlen_attn_bwd,
        function=VarlenAttn,
        results=2,
        flops=(_flops_fwd, _flops_bwd),
        lower_precision=True,
        opaque=True,
        specs={
            "varlen_attn": Spec(
                "varlen_attn",
                inputs=("q", "k", "v"),
                dims={
                    "N": 4, "H": 2, "group": 2, "L": 64, "S": lambda d: d["L"], "E": 64, "Ev": lambda d: d["E"],
                    "left": -1, "right": -1, "used": 0,
                },
                draw=_draw,
                call=_call,
                shapes=({}, {"right": 0}, {"L": 50, "S": 77, "E": 40, "Ev": 24, "left": 20, "right": 0, "used": 1}),
                outputs=("fwd", "lse"),
                cancelled=_cancelled,
                yardstick=_torchs_with_lse,
            )
        },
    )
)  # fmt: skip
