"""softmax(scale q k^T) v without the (L, S) matrix in memory: FlashAttention-2 (Dao 2023).

Shapes: q (B, H, L, E), k (B, H, S, E), v (B, H, S, Ev), out (B, H, L, Ev). With s = scale q k^T, causal keeps j <= i.

    forward    p_ij = exp(s_ij - m_i), where m_i is the row maximum so far; l_i = sum_j p_ij
               out_i = sum_j p_ij v_j / l_i,   lse_i = m_i + log l_i        (l and out are rescaled when m grows)
    backward   p = exp(s - lse),   delta_i = sum out_i dout_i - dlse_i
               ds = p (dout v^T - delta),   dv = p^T dout,   dk = scale ds^T q,   dq = scale ds k

Forward saves out and lse, one number a row, because backward recomputes p from them. exp is exp2 with log2(e) folded
into the scale. Tiles that causal masking leaves empty are skipped, and only tiles on the diagonal or across the end
are masked. A fully masked row gives out = 0 and lse = -inf.

Backward is deterministic without float atomics: one kernel keeps a tile of k and v and loops over the queries for dk
and dv, another keeps a tile of q and loops over the keys for dq. This costs seven products where atomics need five.

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

float32 always takes the exact form. 16-bit tiles take the fused form where nothing is masked. If some row then turns
out to be beyond LIMIT, the tile starts over, and the loop over the masked tiles, which always takes the exact form,
covers all keys. Forward looks only at the last base of each row. If an earlier base was larger in size, it was below
the last one: either far below, and the p computed from it have shrunk to nothing, or hardly beyond LIMIT, where the
error is not twice as large.

16-bit tiles are loaded through tensor descriptors (TMA) where the device and their alignment allow it, else through
pointers. Head dimensions are padded to a power of two inside the tile. float32 products run on the CUDA cores, whose
operands are in registers, so a product over the head dimension is summed in chunks that are read again from cache.

attention_tiles.py has the structs that kernels pass around and what forward and backward share.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pygpt.ops.attention import strides_like_query

from .attention_configs import DELTA, DKDV, DQ, FWD, WIDE
from .attention_tiles import (
    KeyLoop,
    Operand,
    Params,
    RowStats,
    Tile,
    TileCoord,
    any_true,
    key_range,
    load_tile,
    mask_of,
    product,
    rows_of_head,
    store_gradient,
    store_rows,
    tile_coord,
)
from .common import LN2, LOG2E, Tiled, dot, empty, empty_strided, fma, launch, loop_bound, target, tileable, to_storage

MAX_HEAD_DIM = 256
L2_BYTES = 16 << 20  # the keys and values that concurrently running programs should share


# ------------------------------------------------------------------------------- forward
class Softmax(NamedTuple):
    """The online softmax of a tile of queries."""

    acc: tl.tensor  # (BLOCK_M, BLOCK_EV)
    row_max: tl.tensor  # of the unscaled scores
    row_sum: tl.tensor


@triton.jit
def _attend(state, q, k, v, loop, params):
    """Adds the keys of a loop to the softmax of the tile q of queries."""
    FUSED: tl.constexpr = params.LIMIT > 0 and not loop.MASKED
    acc, row_max, row_sum = state.acc, state.row_max, state.row_sum
    c = params.scale * LOG2E
    for start in tl.range(loop_bound(loop.begin), loop_bound(loop.end), k.TILE_ROWS):
        s = product(q, Tile(k, q.at, start, load_tile(k, q.at, start)))
        if params.SIGN < 1:
            s = s * params.SIGN
        if loop.MASKED:
            s = tl.where(mask_of(q.row, start, params, q.operand.TILE_ROWS, k.TILE_ROWS), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        new_max_or_0 = tl.where(new_max == float("-inf"), 0.0, new_max)
        if FUSED:
            p = tl.exp2(fma(s, c, -(new_max_or_0 * c)[:, None]))
            growth = row_max * c - new_max_or_0 * c
        else:
            p = tl.exp2((s - new_max_or_0[:, None]) * c)
            growth = (row_max - new_max_or_0) * c
        rescale = tl.where(row_max == float("-inf"), 0.0, tl.exp2(growth))
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v_data = load_tile(v, q.at, start)
        acc = dot(to_storage(p, v_data.dtype), v_data, acc * rescale[:, None])
        row_max = new_max
    return Softmax(acc, row_max, row_sum)


@triton.jit
def _empty_softmax(q, v):
    acc = tl.zeros([q.TILE_ROWS, v.TILE_WIDTH], tl.float32)
    return Softmax(acc, tl.full([q.TILE_ROWS], float("-inf"), tl.float32), tl.zeros([q.TILE_ROWS], tl.float32))


@triton.jit
def _forward(out, lse, q, k, v, params):
    tiles = tl.cdiv(params.L, q.TILE_ROWS)
    at = tile_coord(tiles, params)
    row = (tiles - 1 - at.tile) * q.TILE_ROWS
    q_data = load_tile(q, at, row)
    unmasked, end = key_range(row, params, q.TILE_ROWS, k.TILE_ROWS)
    state = _empty_softmax(q, v)
    c = params.scale * LOG2E
    for masked in tl.static_range(2):
        if masked and params.LIMIT:
            row_max, row_sum = state.row_max, state.row_sum
            base = tl.where(row_max == float("-inf"), 0.0, row_max * c)
            # The fused form summed p relative to base; from here on row_sum is relative to the row maximum.
            row_sum *= tl.exp2(tl.where(row_max == float("-inf"), 0.0, -fma(row_max, c, -base)))
            state = Softmax(state.acc, row_max, row_sum)
            if any_true(tl.abs(base) >= params.LIMIT):
                unmasked = 0
                state = _empty_softmax(q, v)
        begin, stop = (unmasked, end) if masked else (0, unmasked)
        state = _attend(
            state, Tile(q, at, row, q_data, params.CHUNK), k, v, KeyLoop(begin, stop, masked), params
        )  # fmt: skip
    i = row + tl.arange(0, q.TILE_ROWS)
    row_sum = state.row_sum
    natural = state.row_max * params.scale + tl.log2(row_sum) * LN2
    natural = tl.where(row_sum == 0, float("-inf"), natural)
    tl.store(rows_of_head(lse, at.head, params.L) + i, natural, i < params.L)
    acc = state.acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    first = out.source + at.b.to(tl.int64) * out.stride_b + at.h.to(tl.int64) * out.stride_h
    store_rows(first, out.stride_row, Tile(out, at, row, acc))


@triton.jit(do_not_specialize=["GROUP"])
def attention_fwd_kernel(
    out, lse, q, k, v, heads, H, L, S, scale, GROUP,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_l,
    CAUSAL: tl.constexpr, SIGN: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, EV: tl.constexpr,
    TMA: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_M queries of one head. The last queries, whose loops are longest, come first."""
    _forward(
        Operand(out, L, out_stride_b, out_stride_h, out_stride_l, EV, BLOCK_M, BLOCK_EV),
        lse,
        Operand(q, L, q_stride_b, q_stride_h, q_stride_l, E, BLOCK_M, BLOCK_E, TMA),
        Operand(k, S, k_stride_b, k_stride_h, k_stride_s, E, BLOCK_N, BLOCK_E, TMA),
        Operand(v, S, v_stride_b, v_stride_h, v_stride_s, EV, BLOCK_N, BLOCK_EV, TMA),
        Params(heads, H, L, S, scale, GROUP, CAUSAL, CHUNK, LIMIT, SIGN),
    )


# ------------------------------------------------------------------------------- backward
class KeySums(NamedTuple):
    """The accumulators of a tile of keys."""

    dk: tl.tensor  # without the factor scale
    dv: tl.tensor
    min_lse2: tl.tensor


class RowLoop(NamedTuple):
    """`tiles` tiles of queries from `begin` on. A MASKED loop jumps to the row `tail` after `diagonal` of them."""

    begin: tl.tensor
    tiles: tl.tensor
    diagonal: tl.tensor
    tail: tl.tensor
    MASKED: tl.constexpr


@triton.jit
def _load_lse(lse, i, L):
    """Loads lse, but inf for fully masked rows and past the end, so that p becomes 0 there."""
    x = tl.load(lse + i, i < L, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x)


@triton.jit
def attention_delta_kernel(
    delta, lse2, out, dout, lse, dlse, H, L, out_stride_b, out_stride_h, out_stride_l,
    dout_stride_b, dout_stride_h, dout_stride_l, dlse_stride_b, dlse_stride_h, dlse_stride_l,
    LIMIT: tl.constexpr, EV: tl.constexpr, BLOCK_EV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B H, L) = rowsum(out dout) - dlse. lse2 (B H, L), for the fused form, is lse log2(e), but -inf where LIMIT
    forbids that form and inf for a fully masked row."""
    tiles = tl.cdiv(L, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    at, row = TileCoord(tile, head, head // H, head % H), tile * BLOCK_M
    o = load_tile(Operand(out, L, out_stride_b, out_stride_h, out_stride_l, EV, BLOCK_M, BLOCK_EV), at, row)
    do = load_tile(Operand(dout, L, dout_stride_b, dout_stride_h, dout_stride_l, EV, BLOCK_M, BLOCK_EV), at, row)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    i = row + tl.arange(0, BLOCK_M)
    if dlse is not None:
        dlse += at.b.to(tl.int64) * dlse_stride_b + at.h.to(tl.int64) * dlse_stride_h
        row_delta -= tl.load(dlse + i.to(tl.int64) * dlse_stride_l, i < L, other=0.0)
    tl.store(rows_of_head(delta, head, L) + i, row_delta, i < L)
    if LIMIT:
        x = _load_lse(rows_of_head(lse, head, L), i, L)
        x = tl.where((tl.abs(x * LOG2E) < LIMIT) | (x == float("inf")), x * LOG2E, float("-inf"))
        tl.store(rows_of_head(lse2, head, L) + i, x, i < L)


@triton.jit
def _accumulate_dkdv(sums, k, v, q, dout, stats, loop, params):
    """Adds the queries of a loop to the gradients of the tiles k and v."""
    FUSED: tl.constexpr = params.LIMIT > 0 and not loop.MASKED
    dk, dv, min_lse2 = sums.dk, sums.dv, sums.min_lse2
    for tile in tl.range(0, loop_bound(loop.tiles)):
        start = loop.begin + tile * q.TILE_ROWS
        if loop.MASKED:
            start = tl.where(tile < loop.diagonal, start, loop.tail)
        i = start + tl.arange(0, q.TILE_ROWS)
        q_data = load_tile(q, k.at, start)
        st = product(k, Tile(q, k.at, start, q_data))
        if FUSED:
            lse2 = tl.load(stats.lse2 + i)
            min_lse2 = tl.minimum(min_lse2, lse2)
            pt = tl.exp2(fma(st, params.scale * LOG2E, -lse2[None, :]))
        else:
            pt = tl.exp2((st * params.scale - _load_lse(stats.lse, i, params.L)[None, :]) * LOG2E)
        if loop.MASKED:  # The rows that fill up the last tile must not reach an infinite key, because 0 * inf is NaN.
            mask = (i < params.L)[None, :]
            if params.CAUSAL:
                mask &= (k.row + tl.arange(0, k.operand.TILE_ROWS))[:, None] <= i[None, :]
            pt = tl.where(mask, pt, 0.0)
        do_data = load_tile(dout, k.at, start)
        if params.NEED_DV:
            dv = dot(to_storage(pt, do_data.dtype), do_data, dv)
        if params.NEED_DK:
            dpt = product(v, Tile(dout, k.at, start, do_data))
            dst = pt * (dpt - tl.load(stats.delta + i, i < params.L, other=0.0)[None, :])
            dk = dot(to_storage(dst, q_data.dtype), q_data, dk)
    return KeySums(dk, dv, min_lse2)


@triton.jit
def _empty_key_sums(q, k, v):
    dk = tl.zeros([k.TILE_ROWS, k.TILE_WIDTH], tl.float32)
    return KeySums(dk, tl.zeros([k.TILE_ROWS, v.TILE_WIDTH], tl.float32), tl.zeros([q.TILE_ROWS], tl.float32))


@triton.jit
def _backward_keys(dk, dv, q, dout, stats, k, v, params):
    BLOCK_M: tl.constexpr = q.TILE_ROWS
    BLOCK_N: tl.constexpr = k.TILE_ROWS
    at = tile_coord(tl.cdiv(params.S, BLOCK_N), params)
    col = at.tile * BLOCK_N
    k_data, v_data = load_tile(k, at, col), load_tile(v, at, col)
    lse, delta = rows_of_head(stats.lse, at.head, params.L), rows_of_head(stats.delta, at.head, params.L)
    lse2 = rows_of_head(stats.lse2, at.head, params.L) if params.LIMIT else lse
    # Queries from `begin` on may attend to some of these keys, those from `unmasked` to `end` to all of them.
    begin, unmasked, end = 0, 0, params.L // BLOCK_M * BLOCK_M
    if params.CAUSAL:
        begin = col // BLOCK_M * BLOCK_M
        unmasked = tl.cdiv(col + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    diagonal = tl.maximum(tl.minimum(unmasked, end) - begin, 0) // BLOCK_M
    partial = ((end < params.L) & (begin < params.L)).to(tl.int32)
    sums = _empty_key_sums(q, k, v)
    for masked in tl.static_range(2):
        if masked and params.LIMIT:  # noqa: SIM102 - a constant, and what depends on data
            if any_true(sums.min_lse2 == float("-inf")):
                diagonal = tl.maximum(end - begin, 0) // BLOCK_M
                sums = _empty_key_sums(q, k, v)
        first = begin if masked else unmasked
        tiles = diagonal + partial if masked else tl.maximum(end - unmasked, 0) // BLOCK_M
        sums = _accumulate_dkdv(
            sums, Tile(k, at, col, k_data, params.CHUNK), Tile(v, at, col, v_data, params.CHUNK), q, dout,
            RowStats(lse, lse2, delta), RowLoop(first, tiles, diagonal, end, masked), params,
        )  # fmt: skip
    if dk is not None:
        store_gradient(dk, Tile(k, at, col, sums.dk * params.scale), params.H)
    if dv is not None:
        store_gradient(dv, Tile(v, at, col, sums.dv), params.H)


@triton.jit(do_not_specialize=["GROUP"])
def attention_dkdv_kernel(
    dk, dv, q, k, v, dout, lse, lse2, delta, heads, H, L, S, scale, GROUP,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_l,
    CAUSAL: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, TMA: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program computes dk and dv of BLOCK_N keys of one head. The first keys, whose loops are longest, come first."""
    _backward_keys(
        dk,
        dv,
        Operand(q, L, q_stride_b, q_stride_h, q_stride_l, E, BLOCK_M, BLOCK_E, TMA),
        Operand(dout, L, dout_stride_b, dout_stride_h, dout_stride_l, EV, BLOCK_M, BLOCK_EV, TMA),
        RowStats(lse, lse2, delta),
        Operand(k, S, k_stride_b, k_stride_h, k_stride_s, E, BLOCK_N, BLOCK_E, TMA),
        Operand(v, S, v_stride_b, v_stride_h, v_stride_s, EV, BLOCK_N, BLOCK_EV, TMA),
        Params(heads, H, L, S, scale, GROUP, CAUSAL, CHUNK, LIMIT, NEED_DK=dk is not None, NEED_DV=dv is not None),
    )  # fmt: skip


@triton.jit
def _accumulate_dq(dq, q, dout, stats, k, v, loop, params):
    """Adds the keys of a loop to dq, without the factor scale, of the tile q of stats."""
    FUSED: tl.constexpr = params.LIMIT > 0 and not loop.MASKED
    for start in tl.range(loop_bound(loop.begin), loop_bound(loop.end), k.TILE_ROWS):
        k_data = load_tile(k, q.at, start)
        s = product(q, Tile(k, q.at, start, k_data))
        if FUSED:
            p = tl.exp2(fma(s, params.scale * LOG2E, -stats.lse2[:, None]))
        else:
            p = tl.exp2((s * params.scale - stats.lse[:, None]) * LOG2E)
        if loop.MASKED:
            p = tl.where(mask_of(q.row, start, params, q.operand.TILE_ROWS, k.TILE_ROWS), p, 0.0)
        dp = product(dout, Tile(v, q.at, start, load_tile(v, q.at, start)))
        dq = dot(to_storage(p * (dp - stats.delta[:, None]), k_data.dtype), k_data, dq)
    return dq


@triton.jit
def _backward_queries(dq, q, dout, stats, k, v, params):
    BLOCK_M: tl.constexpr = q.TILE_ROWS
    tiles = tl.cdiv(params.L, BLOCK_M)
    at = tile_coord(tiles, params)
    row = (tiles - 1 - at.tile) * BLOCK_M
    i = row + tl.arange(0, BLOCK_M)
    q_data, do_data = load_tile(q, at, row), load_tile(dout, at, row)
    lse = _load_lse(rows_of_head(stats.lse, at.head, params.L), i, params.L)
    lse2 = lse
    if params.LIMIT:
        lse2 = tl.load(rows_of_head(stats.lse2, at.head, params.L) + i, i < params.L, other=float("inf"))
    delta = tl.load(rows_of_head(stats.delta, at.head, params.L) + i, i < params.L, other=0.0)
    unmasked, end = key_range(row, params, BLOCK_M, k.TILE_ROWS)
    acc = tl.zeros([BLOCK_M, k.TILE_WIDTH], tl.float32)
    for masked in tl.static_range(2):
        if masked and params.LIMIT:  # noqa: SIM102 - a constant, and what depends on data
            if any_true(lse2 == float("-inf")):
                unmasked = 0
                acc = tl.zeros([BLOCK_M, k.TILE_WIDTH], tl.float32)
        begin, stop = (unmasked, end) if masked else (0, unmasked)
        acc = _accumulate_dq(
            acc, Tile(q, at, row, q_data, params.CHUNK), Tile(dout, at, row, do_data, params.CHUNK),
            RowStats(lse, lse2, delta), k, v, KeyLoop(begin, stop, masked), params,
        )  # fmt: skip
    store_gradient(dq, Tile(q, at, row, acc * params.scale), params.H)


@triton.jit(do_not_specialize=["GROUP"])
def attention_dq_kernel(
    dq, q, k, v, dout, lse, lse2, delta, heads, H, L, S, scale, GROUP,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_l,
    CAUSAL: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, TMA: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program computes dq of BLOCK_M queries of one head. The last queries, whose loops are longest, come first."""
    _backward_queries(
        dq,
        Operand(q, L, q_stride_b, q_stride_h, q_stride_l, E, BLOCK_M, BLOCK_E, TMA),
        Operand(dout, L, dout_stride_b, dout_stride_h, dout_stride_l, EV, BLOCK_M, BLOCK_EV, TMA),
        RowStats(lse, lse2, delta),
        Operand(k, S, k_stride_b, k_stride_h, k_stride_s, E, BLOCK_N, BLOCK_E, TMA),
        Operand(v, S, v_stride_b, v_stride_h, v_stride_s, EV, BLOCK_N, BLOCK_EV, TMA),
        Params(heads, H, L, S, scale, GROUP, CAUSAL, CHUNK, LIMIT),
    )  # fmt: skip


# ------------------------------------------------------------------------------- launchers
class TiledInput(NamedTuple):
    """A tensor that a kernel reads in tiles, and the constants that give the tile's height and width."""

    tensor: torch.Tensor
    rows: str
    width: str


class Pass(NamedTuple):
    """A kernel, its configurations, and the constant that gives how many queries or keys a program computes."""

    kernel: object
    configs: dict
    rows: str


FORWARD = Pass(attention_fwd_kernel, FWD, "BLOCK_M")
BACKWARD_KEYS = Pass(attention_dkdv_kernel, DKDV, "BLOCK_N")
BACKWARD_QUERIES = Pass(attention_dq_kernel, DQ, "BLOCK_M")


def _padded(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


def _last_contiguous(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


class _Call:
    """What the kernels of one call have in common."""

    def __init__(self, q, k, v, is_causal, dout=None):
        (B, H, L, E), (S, EV) = q.shape, v.shape[2:]
        self.H, self.L, self.S, self.heads = H, L, S, B * H
        self.bucket = target(q), max(64, _padded(E), _padded(EV)), q.itemsize
        tensors = [_last_contiguous(t) for t in ((q, k, v) if dout is None else (q, k, v, dout))]
        self.tma = q.itemsize == 2 and tileable(*tensors)
        tiles = (("BLOCK_M", "BLOCK_E"), ("BLOCK_N", "BLOCK_E"), ("BLOCK_N", "BLOCK_EV"), ("BLOCK_M", "BLOCK_EV"))
        self.inputs = [TiledInput(t, *tile) for t, tile in zip(tensors, tiles, strict=False)]
        # No more than the heads, because a kernel computes this times the number of tiles in 32 bits.
        self.group = max(1, min(self.heads, L2_BYTES // max(1, S * (E + EV) * q.itemsize)))
        self.limit = int(2**21 * torch.finfo(q.dtype).eps) if q.itemsize == 2 else 0
        self.constants = {
            "CAUSAL": is_causal, "LIMIT": self.limit, "E": E, "EV": EV, "TMA": self.tma,
            "CHUNK": 0 if q.itemsize == 2 else 16, "BLOCK_E": _padded(E), "BLOCK_EV": _padded(EV),
        }  # fmt: skip

    def launch(self, kernel: Pass, outputs, scale: float, *, stats=(), strides=(), **constants):
        """Launches a kernel whose parameters are outputs, inputs, stats, sizes, strides and constants. `strides` are
        those of outputs, where the kernel takes them."""
        inputs = [Tiled(t, (1, 1, rows, self.constants[width])) if self.tma else t for t, rows, width in self.inputs]
        strides = [*(stride for t, *_ in self.inputs for stride in t.stride()[:3]), *strides]
        length = self.L if kernel.rows == "BLOCK_M" else self.S
        launch(
            kernel.kernel, lambda c: self.heads * triton.cdiv(length, c[kernel.rows]), *outputs, *inputs, *stats,
            self.heads, self.H, self.L, self.S, scale, self.group, *strides,
            configs=kernel.configs[self.bucket], fuse=False, **self.constants, **constants,
        )  # fmt: skip


def attention_fwd(q, k, v, is_causal, scale, *options):
    """q (B, H, L, E), k (B, H, S, E), v (B, H, S, Ev) -> out (B, H, L, Ev) laid out as q is, lse (B, H, L)."""
    call = _Call(q, k, v, is_causal)
    B, L, EV = q.shape[0], call.L, v.shape[3]
    out = empty_strided(q, (B, call.H, L, EV), strides_like_query(q, EV))
    lse = empty(q, B, call.H, L, dtype=torch.float32)
    vanishes = abs(scale) < 2.0**-126  # no normal float32
    sign = 0 if vanishes else -1 if scale < 0 else 1
    scale = 1.0 if vanishes else abs(scale)
    call.launch(FORWARD, (out, lse), scale, strides=out.stride()[:3], SIGN=sign)
    return out, lse


def _delta(call: _Call, out, dout, lse, dlse):
    """-> lse2 (B, H, L), or None where there is no fused form, and delta (B, H, L). See `attention_delta_kernel`."""
    delta, lse2 = empty(lse, *lse.shape), empty(lse, *lse.shape) if call.limit else None
    strides = *out.stride()[:3], *dout.stride()[:3], *((0, 0, 0) if dlse is None else dlse.stride())
    launch(
        attention_delta_kernel, lambda c: call.heads * triton.cdiv(call.L, c["BLOCK_M"]),
        delta, lse2, out, dout, lse, dlse, call.H, call.L, *strides,
        configs=DELTA, LIMIT=call.limit, EV=out.shape[3], BLOCK_EV=_padded(out.shape[3]),
    )  # fmt: skip
    return lse2, delta


def attention_bwd(dout, dlse, q, k, v, out, lse, is_causal, scale, needs, *options):
    """-> dq, dk, dv, contiguous as (B, T, H, E). dlse (B, H, L) may be None."""
    call = _Call(q, k, v, is_causal, dout)
    stats = lse, *_delta(call, out, call.inputs[3].tensor, lse, dlse)
    dq, dk, dv = (
        empty(q, t.shape[0], t.shape[2], call.H, t.shape[3]).transpose(1, 2) if need else None
        for need, t in zip(needs, (q, k, v), strict=False)
    )
    for outputs in ((dk, None), (None, dv)) if call.bucket[1] == WIDE else ((dk, dv),):
        if any(g is not None for g in outputs):
            call.launch(BACKWARD_KEYS, outputs, scale, stats=stats)
    if dq is not None:
        call.launch(BACKWARD_QUERIES, (dq,), scale, stats=stats)
    return *(q.new_empty(0) if g is None else g for g in (dq, dk, dv)), *(q.new_empty(0) for _ in range(3))
