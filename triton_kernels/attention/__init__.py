"""softmax(s) v, s = scale q k^T, without the (L, S) matrix in memory: FlashAttention-2 (Dao 2023).

Shapes: q (B, Hq, L, E), k (B, Hkv, S, E), v (B, Hkv, S, Ev), out (B, Hq, L, Ev). Hq / Hkv query heads share a head of k
and v. A query sees the keys of an interval (`Visible` in tiles.py), which causal masks and windows give.

    forward    p_ij = exp(s_ij - m_i), where m_i is the row maximum so far; l_i = sum_j p_ij
               out_i = sum_j p_ij v_j / l_i,   lse_i = m_i + log l_i        (l and out are rescaled when m grows)
    backward   p = exp(s - lse),   delta_i = sum out_i dout_i - dlse_i
               ds = p (dout v^T - delta),   dv = p^T dout,   dk = scale ds^T q,   dq = scale ds k

Forward saves out and lse, one number a row, because backward recomputes p from them. exp is exp2 with log2(e) folded
into the scale. Tiles that no query sees are skipped, and only tiles at the ends of intervals are masked. A fully masked
row gives out = 0 and lse = -inf. A sink is one more key, with a score of its own and the value 0. A row that sees one
key and has no sink has p = 1 whatever its score, so its ds is dlse.

Softcap, ALiBi, masks and dropout change scores or weights one by one (scores.py). A constant, GENERAL, tells whether a
call has any of them: those that only scale have code of their own.

Packed calls (varlen_attn) take sequences of different lengths as the rows of one tensor (`Sequence` in tiles.py). Their
kernels are those of dense calls; the diagonal ends at a sequence's last key. A program that lies past the end of its
sequence does nothing. Tiles begin at the first row of a sequence, so a result does not depend on the rest of the batch.

Backward is deterministic without float atomics: one kernel keeps a tile of k and v and loops over the queries for dk
and dv, another keeps a tile of q and loops over the keys for dq. This costs seven products where atomics need five. A
third one, for the gradient of a floating mask, keeps a tile of the mask.

The largest p of a row must be exactly 1 after rounding to 16 bits, because any other rounding would be an error of
the whole row. There are two ways to compute p from the products s = q k^T, with c = scale log2(e) and m the row
maximum of the unscaled s:

    exact    forward exp2((s - m) c)                                   backward exp2((s scale - lse) log2(e))
    fused    forward exp2(fma(s, c, -base)), base = round(m c)         backward exp2(fma(s, c, -lse log2(e)))

The exact form gives 1 for scores of any size: backward rounds s scale as forward did when it formed lse. The kernels
are compiled without contracting products and sums into an fma, which would undo this. The fused form takes one
instruction an element where the exact one takes two or three. It shifts the exponents of a row by the error of base,
and in backward by the errors of lse, c and lse log2(e): for |base| < 2^n by at most 2^(n-25), and in a row whose
weight is all on one key by 4.5 2^(n-25). Below LIMIT = 2^21 eps, where eps belongs to the storage type, the p of that
key thus misses 1 by at most eps / 23 in forward and eps / 5 in backward, and everything between 1 - eps / 4 and
1 + eps / 2 is rounded to 1. out sums the rounded p and l the unrounded ones, so l is corrected by the error of the
last base.

float32 always takes the exact form, and so do GENERAL scores. Other 16-bit tiles take the fused form where nothing is
masked. If some row then turns out to be beyond LIMIT, the tile starts over, and the loop over the masked tiles, which
always takes the exact form, covers all keys. Forward looks only at the last base of each row. If an earlier base was
larger in size, it was below the last one: either far below, and the p computed from it have shrunk to nothing, or
hardly beyond LIMIT, where the error is not twice as large.

16-bit tiles are loaded through tensor descriptors (TMA) where the device and their alignment allow it, else through
pointers. Head dimensions are padded to a power of two inside the tile. float32 products run on the CUDA cores, whose
operands are in registers, so a product over the head dimension is summed in chunks that are read again from cache.

tiles.py has the structs that kernels pass around and what forward and backward share.
"""

import math
from typing import NamedTuple

import torch
import triton

from pygpt.ops.attention import Options, strides_like_query
from pygpt.ops.qkv_attention import as_heads, split_heads
from pygpt.ops.varlen_attn import Packing

from ..common import Tiled, contiguous, empty, empty_strided, launch, target, tileable
from .bwd import attention_delta_kernel, attention_dkdv_kernel, attention_dq_kernel
from .configs import (
    DELTA,
    DKDV,
    DMASK,
    DQ,
    FWD,
    GENERAL_DKDV,
    GENERAL_DQ,
    GENERAL_FWD,
    GENERAL_WIDE,
    PACKED_DKDV,
    PACKED_FWD,
    WIDE,
)
from .dmask import attention_dmask_kernel
from .fwd import attention_fwd_kernel

MAX_HEAD_DIM = 256
MAX_PACKED_LENGTH = 2**30  # of a sequence; a window that is as wide has no limit
L2_BYTES = 16 << 20  # the keys and values that concurrently running programs should share


class TiledInput(NamedTuple):
    """A tensor that a kernel reads in tiles, and the constants that give the tile's height and width."""

    tensor: torch.Tensor
    rows: str
    width: str


class Pass(NamedTuple):
    """A kernel and its configurations: for dense calls, for packed ones, and for scores that are not only scaled."""

    kernel: object
    configs: dict
    packed_configs: dict
    general_configs: dict


FORWARD = Pass(attention_fwd_kernel, FWD, PACKED_FWD, GENERAL_FWD)
BACKWARD_KEYS = Pass(attention_dkdv_kernel, DKDV, PACKED_DKDV, GENERAL_DKDV)
BACKWARD_QUERIES = Pass(attention_dq_kernel, DQ, DQ, GENERAL_DQ)
BACKWARD_MASK = Pass(attention_dmask_kernel, DMASK, DMASK, DMASK)


def _padded(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


def _last_contiguous(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _interval(diagonal: int, left: int, right: int, unlimited: int) -> tuple[tuple[int, int, int], dict]:
    """diagonal, left and right of `Visible`, and its constants. Limits from `unlimited` on are none."""
    has_left, has_right = 0 <= left < unlimited, 0 <= right < unlimited
    return (diagonal, left if has_left else 0, right if has_right else 0), {"LEFT": has_left, "RIGHT": has_right}


def _scores(o: Options) -> tuple[tuple, dict]:
    """The numbers of `Scores`, None where the call does not use them, and its constants."""
    softcap, slopes, mask, dropout = o.softcap or None, (None,) * 2, (None,) * 5, (None,) * 3
    if o.alibi_slopes is not None:
        t = o.alibi_slopes.contiguous()
        slopes = t, t.shape[1] if t.shape[0] > 1 else 0
    boolean = o.attn_mask is not None and o.attn_mask.dtype == torch.bool
    if o.attn_mask is not None:
        t = o.attn_mask.view(torch.uint8) if boolean else o.attn_mask
        mask = t, *(0 if n == 1 else stride for n, stride in zip(t.shape, t.stride(), strict=True))
    if o.seed is not None:
        # All weights are dropped if dropout_p is 1: the factor is 0. The kernel takes the threshold's bits for uint32.
        threshold = min(math.floor(o.dropout_p * 2**32), 2**32 - 1)
        dropout = o.seed, (threshold + 2**31) % 2**32 - 2**31, 1 / (1 - o.dropout_p) if o.dropout_p < 1 else 0.0
    numbers = softcap, *slopes, *mask, *dropout
    return numbers, {"BOOLEAN": boolean, "GENERAL": any(n is not None for n in numbers)}


class _Call:
    """What the kernels of one call have in common."""

    def __init__(self, q, k, v, is_causal, options: Options, dout=None, packing: Packing | None = None):
        (B, H, L, E), (S, EV) = q.shape, v.shape[2:]
        diagonal, unlimited = S - L if options.lower_right else 0, L + S
        self.packing, self.sizes, self.sequences = packing, (L, S), (None,) * 4
        if packing is not None:  # q, k and v have one batch entry
            self.sizes, self.sequences = (None, None), (*map(contiguous, packing[:3]), L)
            B, L, S = len(packing.cu_seq_q) - 1, packing.max_q, packing.max_k
            diagonal, unlimited = 0, MAX_PACKED_LENGTH
        self.B, self.H, self.L, self.S, self.heads = B, H, L, S, B * H
        self.kv_heads = k.shape[1]
        self.heads_per_kv = H // k.shape[1] if k.shape[1] else 1
        self.bucket = target(q), max(64, _padded(E), _padded(EV)), q.itemsize
        tensors = [_last_contiguous(t) for t in ((q, k, v) if dout is None else (q, k, v, dout))]
        # A tile that TMA reads could reach into the next sequence, where an infinity would become NaN through 0 * inf.
        self.tma = q.itemsize == 2 and packing is None and tileable(*tensors)
        tiles = (("BLOCK_M", "BLOCK_E"), ("BLOCK_N", "BLOCK_E"), ("BLOCK_N", "BLOCK_EV"), ("BLOCK_M", "BLOCK_EV"))
        self.inputs = [TiledInput(t, *tile) for t, tile in zip(tensors, tiles, strict=False)]
        # No more than the heads, because a kernel computes this times the number of tiles in 32 bits.
        self.group = max(1, min(B * self.kv_heads, L2_BYTES // max(1, S * (E + EV) * q.itemsize)))
        right = 0 if is_causal else options.right
        self.interval, interval_constants = _interval(diagonal, options.left, right, unlimited)
        self.scores, score_constants = _scores(options)
        self.general = score_constants["GENERAL"]
        self.sink = None if options.sink is None else options.sink.contiguous()
        self.limit = int(2**21 * torch.finfo(q.dtype).eps) if q.itemsize == 2 and not self.general else 0
        self.constants = {
            **interval_constants, "GROUPED": self.heads_per_kv > 1, **score_constants, "LIMIT": self.limit, "E": E,
            "EV": EV, "TMA": self.tma, "CHUNK": 0 if q.itemsize == 2 else 16, "BLOCK_E": _padded(E),
            "BLOCK_EV": _padded(EV),
        }  # fmt: skip

    def launch(self, kernel: Pass, outputs, scale: float, *, programs=None, stats=(), strides=(), more=(), **constants):
        """Launches a kernel whose parameters are outputs, inputs, stats, sizes, strides, options, more and constants.
        `strides` are those of outputs, where the kernel takes them."""
        inputs = [Tiled(t, (1, 1, rows, self.constants[width])) if self.tma else t for t, rows, width in self.inputs]
        strides = [*(stride for t, *_ in self.inputs for stride in t.stride()[:3]), *strides]
        heads, H, group = self.heads, self.H, self.group * self.heads_per_kv
        if kernel is BACKWARD_KEYS:
            heads, H, group = self.B * self.kv_heads, self.kv_heads, self.group
        rows, length = ("BLOCK_N", self.S) if kernel is BACKWARD_KEYS else ("BLOCK_M", self.L)
        # A window takes registers too where rows that see one key need the gradient of lse.
        small = self.general or (self.constants["LEFT"] and self.constants.get("DLSE", False))
        configs = kernel.configs if self.packing is None else kernel.packed_configs
        launch(
            kernel.kernel, programs or (lambda c: heads * triton.cdiv(length, c[rows])), *outputs, *inputs, *stats,
            heads, H, *self.sizes, scale, group, *strides, self.heads_per_kv, *self.interval, *self.scores, *more,
            configs=(kernel.general_configs if small else configs)[self.bucket], fuse=False,
            **self.constants, **constants,
        )  # fmt: skip


def attention_fwd(q, k, v, is_causal, scale, *options):
    """q (B, Hq, L, E), k (B, Hkv, S, E), v (B, Hkv, S, Ev) -> out (B, Hq, L, Ev) laid out as q is, lse (B, Hq, L).

    options: those of `Options`, or none."""
    call = _Call(q, k, v, is_causal, Options(*options))
    B, L, EV = q.shape[0], call.L, v.shape[3]
    out = empty_strided(q, (B, call.H, L, EV), strides_like_query(q, EV))
    lse = empty(q, B, call.H, L, dtype=torch.float32)
    _forward(call, out, lse, scale)
    return out, lse


def _forward(call: _Call, out, lse, scale: float):
    sign = 1
    if not call.general:
        vanishes = abs(scale) < 2.0**-126  # no normal float32
        sign = 0 if vanishes else -1 if scale < 0 else 1
        scale = 1.0 if vanishes else abs(scale)
    call.launch(
        FORWARD, (out, lse), scale, stats=(call.sink,), strides=out.stride()[:3], more=call.sequences, SIGN=sign
    )  # fmt: skip


def _delta(call: _Call, out, dout, lse, dlse, need_sink: bool):
    """-> lse2 (B, H, L), or None where there is no fused form, delta and sink_rows (B, H, L). See
    `attention_delta_kernel`."""
    call.constants |= {"SINK": call.sink is not None, "DLSE": dlse is not None}
    delta, lse2 = empty(lse, *lse.shape), empty(lse, *lse.shape) if call.limit else None
    sink_rows = empty(lse, *lse.shape) if need_sink else None
    strides = *out.stride()[:3], *dout.stride()[:3], *((0, 0, 0) if dlse is None else dlse.stride())
    launch(
        attention_delta_kernel, lambda c: call.heads * triton.cdiv(call.L, c["BLOCK_M"]),
        delta, lse2, sink_rows, out, dout, lse, dlse, call.sink, call.heads, call.H, *call.sizes, *strides,
        *call.interval, *call.sequences,
        configs=DELTA, LEFT=call.constants["LEFT"], RIGHT=call.constants["RIGHT"], LIMIT=call.limit, EV=out.shape[3],
        BLOCK_EV=_padded(out.shape[3]),
    )  # fmt: skip
    return lse2, delta, sink_rows


def _mask_gradient(call: _Call, scale, stats, mask):
    """-> dmask, of the mask's shape and dtype."""
    dmask = empty(mask, *mask.shape)
    entries, heads, rows, cols = mask.shape
    one_row, one_col = rows == 1, cols == 1

    def programs(c):
        row_tiles = 1 if one_row else triton.cdiv(rows, c["BLOCK_M"])
        return entries * heads * row_tiles * (1 if one_col else triton.cdiv(cols, c["BLOCK_N"]))

    more = call.B if entries == 1 else 1, call.H if heads == 1 else 1, heads
    call.launch(
        BACKWARD_MASK, (dmask,), scale, programs=programs, stats=stats, more=more, ONE_ROW=one_row,
        ONE_COL=one_col,
    )  # fmt: skip
    return dmask


def _backward(call: _Call, scale: float, stats, dq, dk, dv, slope_rows=None, row_heads: int = 0):
    """Fills those that are not None. A row of memory of dq, dk and dv has row_heads heads, by default their own."""
    apart = call.bucket[1] >= (GENERAL_WIDE if call.general else WIDE)
    for outputs in ((dk, None), (None, dv)) if apart else ((dk, dv),):
        if any(g is not None for g in outputs):
            more = *call.sequences, row_heads or call.kv_heads
            call.launch(BACKWARD_KEYS, outputs, scale, stats=stats, more=more)
    if dq is not None or slope_rows is not None:
        more = *call.sequences, row_heads or call.H
        call.launch(BACKWARD_QUERIES, (dq, slope_rows), scale, stats=stats, more=more)


def attention_bwd(dout, dlse, q, k, v, out, lse, is_causal, scale, needs, *options):
    """-> dq, dk, dv, contiguous as (B, T, H, E), dmask, dslopes, dsink. dlse (B, Hq, L) may be None."""
    o = Options(*options)
    call = _Call(q, k, v, is_causal, o, dout)
    need_mask, need_slopes, need_sink = [*needs, False, False, False][3:6]
    lse2, delta, sink_rows = _delta(call, out, call.inputs[3].tensor, lse, dlse, need_sink)
    stats = lse, lse2, delta
    dq, dk, dv = (
        empty(q, t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) if need else None
        for need, t in zip(needs, (q, k, v), strict=False)
    )
    slope_rows = empty(lse, *lse.shape) if need_slopes else None
    _backward(call, scale, stats, dq, dk, dv, slope_rows)
    dmask = _mask_gradient(call, scale, stats, o.attn_mask) if need_mask else None
    dslopes = None if slope_rows is None else slope_rows.sum(-1).sum_to_size(o.alibi_slopes.shape)
    dsink = None if sink_rows is None else sink_rows.sum((0, 2))
    return tuple(q.new_empty(0) if g is None else g for g in (dq, dk, dv, dmask, dslopes, dsink))


# ------------------------------------------------------------------------------- one tensor of queries, keys and values
def qkv_attention_fwd(qkv, heads, kv_heads, is_causal, scale, seed, dropout_p, left, right):
    """qkv (B, T, (Hq + 2 Hkv) E) -> out (B, T, Hq E), lse (B, Hq, T)."""
    o = Options(seed=seed, dropout_p=dropout_p, left=left, right=right)
    call = _Call(*split_heads(qkv, heads, kv_heads), is_causal, o)
    out = empty(qkv, *qkv.shape[:2], heads * call.constants["E"])
    lse = empty(qkv, call.B, heads, call.L, dtype=torch.float32)
    _forward(call, as_heads(out, heads), lse, scale)
    return out, lse


def qkv_attention_bwd(dout, qkv, out, lse, heads, kv_heads, is_causal, scale, seed, dropout_p, left, right):
    """-> dqkv, contiguous."""
    o = Options(seed=seed, dropout_p=dropout_p, left=left, right=right)
    call = _Call(*split_heads(qkv, heads, kv_heads), is_causal, o, as_heads(dout, heads))
    lse = lse.contiguous()
    lse2, delta, _ = _delta(call, as_heads(out, heads), call.inputs[3].tensor, lse, None, False)
    dqkv = empty(qkv, *qkv.shape)
    of_heads = split_heads(dqkv, heads, kv_heads)
    _backward(call, scale, (lse, lse2, delta), *of_heads, row_heads=heads + 2 * kv_heads)
    return dqkv


# ------------------------------------------------------------------------------- packed sequences
def _one_entry(t):
    """(rows, H, width) as (1, H, rows, width)."""
    return t.transpose(0, 1)[None]


def varlen_attn_fwd(q, k, v, *packing):
    """q (total_q, Hq, E), k (total_k, Hkv, E), v (total_k, Hkv, Ev) -> out (total_q, Hq, Ev), lse (Hq, total_q).

    packing: that of `Packing`."""
    p = Packing(*packing)
    call = _Call(_one_entry(q), _one_entry(k), _one_entry(v), False, p.options, packing=p)
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    _forward(call, _one_entry(out), lse, p.scale)
    return out, lse


def varlen_attn_bwd(dout, dlse, q, k, v, out, lse, needs, *packing):
    """-> dq, dk, dv, contiguous. dlse (Hq, total_q) may be None."""
    p = Packing(*packing)
    call = _Call(_one_entry(q), _one_entry(k), _one_entry(v), False, p.options, _one_entry(dout), p)
    grads = [t.new_zeros(t.shape) if need else None for need, t in zip(needs, (q, k, v), strict=True)]
    lse, dlse = lse.contiguous(), None if dlse is None else dlse[None]
    lse2, delta, _ = _delta(call, _one_entry(out), call.inputs[3].tensor, lse, dlse, False)
    _backward(call, p.scale, (lse, lse2, delta), *grads)
    return tuple(q.new_empty(0) if g is None else g for g in grads)
