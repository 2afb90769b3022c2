"""Attention's forward kernel. The folder's __init__.py has the mathematics."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common import LN2, LOG2E, dot, fma, loop_bound, to_storage
from .scores import any_visible, change_scores, kept, load_mask
from .tiles import (
    Loop,
    Operand,
    Params,
    Scores,
    Tile,
    Visible,
    any_true,
    first_of_head,
    kv_coord,
    load_tile,
    mask_of,
    past_gap,
    product,
    rows_of_head,
    sequence_of,
    store_rows,
    tile_coord,
    tiles_of_head,
    walk,
    within_sequence,
)


class Softmax(NamedTuple):
    """The online softmax of a tile of queries."""

    acc: tl.tensor  # (BLOCK_M, BLOCK_EV)
    row_max: tl.tensor  # of the unscaled scores, or of the final ones if Scores is GENERAL
    row_sum: tl.tensor


@triton.jit
def _attend_tile(state, q, k, v, start, mask, loop, params):
    """Adds the keys from `start` on to the softmax of the tile q of queries."""
    FUSED: tl.constexpr = params.LIMIT > 0 and not loop.MASKED
    ROWS: tl.constexpr = q.operand.TILE_ROWS
    acc, row_max, row_sum = state.acc, state.row_max, state.row_sum
    c = LOG2E if params.scores.GENERAL else params.scale * LOG2E
    s = product(q, Tile(k, loop.at, start, load_tile(k, loop.at, start)))
    if params.scores.GENERAL:
        i, j = (q.row + tl.arange(0, ROWS))[:, None], (start + tl.arange(0, k.TILE_ROWS))[None, :]
        s, _ = change_scores(s, mask, q.at, i, j, params)
    elif params.SIGN < 1:
        s = s * params.SIGN
    if loop.MASKED:
        s = tl.where(mask_of(params.visible, q.row, start, ROWS, k.TILE_ROWS), s, float("-inf"))
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
    v_data = load_tile(v, loop.at, start)
    if params.scores.seed is not None:
        p = tl.where(kept(q.at.head, q.row, start, params, ROWS, k.TILE_ROWS), p, 0.0)
    acc = dot(to_storage(p, v_data.dtype), v_data, acc * rescale[:, None])
    return acc, new_max, row_sum


@triton.jit
def _attend(state, q, k, v, loop, params):
    """Adds the keys of a loop to the softmax of the tile q of queries."""
    acc, row_max, row_sum = state.acc, state.row_max, state.row_sum
    for row in tl.range(loop_bound(loop.begin), loop_bound(loop.end), k.TILE_ROWS):
        start = past_gap(row, loop)
        i, j = (q.row + tl.arange(0, q.operand.TILE_ROWS))[:, None], (start + tl.arange(0, k.TILE_ROWS))[None, :]
        mask = load_mask(q.at, i, j, params)
        if params.scores.BOOLEAN:
            if any_visible(mask):
                acc, row_max, row_sum = _attend_tile(Softmax(acc, row_max, row_sum), q, k, v, start, mask, loop, params)
        else:
            acc, row_max, row_sum = _attend_tile(Softmax(acc, row_max, row_sum), q, k, v, start, mask, loop, params)
    return Softmax(acc, row_max, row_sum)


@triton.jit
def _empty_softmax(q, v):
    acc = tl.zeros([q.TILE_ROWS, v.TILE_WIDTH], tl.float32)
    return Softmax(acc, tl.full([q.TILE_ROWS], float("-inf"), tl.float32), tl.zeros([q.TILE_ROWS], tl.float32))


@triton.jit
def _forward(at, out, lse, sink, q, k, v, params):
    row = (tl.cdiv(params.visible.q_len, q.TILE_ROWS) - 1 - at.tile) * q.TILE_ROWS
    q_data = load_tile(q, at, row)
    begin, unmasked, masked, end = walk(params.visible, row, q.TILE_ROWS, k.TILE_ROWS)
    state = _empty_softmax(q, v)
    c = params.scale * LOG2E
    for edges in tl.static_range(2):
        if edges and params.LIMIT:
            row_max, row_sum = state.row_max, state.row_sum
            base = tl.where(row_max == float("-inf"), 0.0, row_max * c)
            # The fused form summed p relative to base; from here on row_sum is relative to the row maximum.
            row_sum *= tl.exp2(tl.where(row_max == float("-inf"), 0.0, -fma(row_max, c, -base)))
            state = Softmax(state.acc, row_max, row_sum)
            if any_true(tl.abs(base) >= params.LIMIT):
                masked = unmasked
                state = _empty_softmax(q, v)
        gap = masked - unmasked
        first = unmasked if not edges else begin if params.visible.LEFT else masked
        stop = masked if not edges else end - gap if params.visible.LEFT else end
        state = _attend(
            state, Tile(q, at, row, q_data, params.CHUNK), k, v,
            Loop(kv_coord(at, params), first, stop, unmasked, gap, edges and params.visible.LEFT, edges), params,
        )  # fmt: skip
    i = row + tl.arange(0, q.TILE_ROWS)
    row_sum = state.row_sum
    row_max = state.row_max if params.scores.GENERAL else state.row_max * params.scale
    acc = state.acc
    if sink is not None:  # one more key, of value 0
        s = tl.load(sink + at.h)
        new_max = tl.maximum(row_max, s)
        new_max_or_0 = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.where(row_max == float("-inf"), 0.0, tl.exp2((row_max - new_max_or_0) * LOG2E))
        row_sum = row_sum * rescale + tl.exp2((s - new_max_or_0) * LOG2E)
        acc, row_max = acc * rescale[:, None], new_max
    natural = row_max + tl.log2(row_sum) * LN2
    natural = tl.where(row_sum == 0, float("-inf"), natural)
    tl.store(rows_of_head(lse, at.head, params.rows, params.q_row) + i, natural, i < params.visible.q_len)
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    if params.scores.seed is not None:
        acc = acc * params.scores.keep
    store_rows(first_of_head(out, at), out.stride_row, Tile(out, at, row, acc))


@triton.jit(
    do_not_specialize=["heads", "GROUP", "diagonal", "left", "right", "softcap", "threshold", "keep", "total_q"]
)
def attention_fwd_kernel(
    out, lse, q, k, v, sink, heads, H, L, S, scale, GROUP,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_l, heads_per_kv, diagonal, left, right,
    softcap, slopes, slope_stride, mask, mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    seed, threshold, keep, cu_seq_q, cu_seq_k, seqused_k, total_q,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, GROUPED: tl.constexpr, BOOLEAN: tl.constexpr, GENERAL: tl.constexpr,
    SIGN: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, EV: tl.constexpr,
    TMA: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_M queries of one head. The last queries, whose loops are longest, come first."""
    at = tile_coord(tiles_of_head(L, BLOCK_M, heads), heads, H, GROUP)
    q_row, k_row, rows = 0, 0, L
    if cu_seq_q is not None:
        q_row, k_row, L, S = sequence_of(at, cu_seq_q, cu_seq_k, seqused_k)
        if at.tile * BLOCK_M >= L:
            return
        at, diagonal, rows = within_sequence(at), S - L, total_q
    _forward(
        at,
        Operand(out, q_row, L, out_stride_b, out_stride_h, out_stride_l, EV, BLOCK_M, BLOCK_EV),
        lse,
        sink,
        Operand(q, q_row, L, q_stride_b, q_stride_h, q_stride_l, E, BLOCK_M, BLOCK_E, TMA),
        Operand(k, k_row, S, k_stride_b, k_stride_h, k_stride_s, E, BLOCK_N, BLOCK_E, TMA),
        Operand(v, k_row, S, v_stride_b, v_stride_h, v_stride_s, EV, BLOCK_N, BLOCK_EV, TMA),
        Params(
            Visible(L, S, diagonal, left, right, LEFT, RIGHT),
            Scores(
                softcap, slopes, slope_stride, mask, mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
                seed, threshold, keep, BOOLEAN, GENERAL,
            ),
            q_row, rows, H, scale, heads_per_kv, GROUPED, CHUNK, LIMIT, SIGN=SIGN,
        ),
    )  # fmt: skip
