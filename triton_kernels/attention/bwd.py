"""Attention's backward kernels for dq, dk, dv and ALiBi's slopes. The folder's __init__.py has the mathematics."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common import LOG2E, dot, fma, loop_bound, to_storage
from .scores import any_visible, change_scores, distance, kept, load_mask, uncap
from .tiles import (
    Loop,
    Operand,
    Params,
    RowStats,
    Scores,
    Tile,
    TileCoord,
    Visible,
    any_true,
    kv_coord,
    load_tile,
    mask_of,
    past_gap,
    product,
    queries_of,
    rows_of_head,
    sees_one_key,
    sequence_of,
    store_gradient,
    tile_coord,
    tiles_of_head,
    walk,
    within_sequence,
)

NO_GRADIENT = tl.constexpr(3.4028234663852886e38)  # as delta: the scores of the row have none


# ------------------------------------------------------------------------------- statistics of rows
@triton.jit
def load_lse(lse, i, L):
    """Loads lse, but inf for fully masked rows and past the end, so that p becomes 0 there."""
    x = tl.load(lse + i, i < L, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x)


@triton.jit(do_not_specialize=["heads", "diagonal", "left", "right", "total_q"])
def attention_delta_kernel(
    delta, lse2, sink_rows, out, dout, lse, dlse, sink, heads, H, L, S, out_stride_b, out_stride_h, out_stride_l,
    dout_stride_b, dout_stride_h, dout_stride_l, dlse_stride_b, dlse_stride_h, dlse_stride_l, diagonal, left, right,
    cu_seq_q, cu_seq_k, seqused_k, total_q,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LIMIT: tl.constexpr, EV: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B H, L) = rowsum(out dout) - dlse, but for a row that sees one key and has no sink -dlse, or NO_GRADIENT
    if dlse is None. lse2 (B H, L), for the fused form, is lse log2(e), but -inf where LIMIT forbids that form and inf
    for a fully masked row. sink_rows (B H, L): a row's share of the gradient of its sink."""
    tiles = tiles_of_head(L, BLOCK_M, heads)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    at, row = TileCoord(tile, head, head // H, head % H), tile * BLOCK_M
    q_row, rows = 0, L
    if cu_seq_q is not None:
        q_row, _, L, S = sequence_of(at, cu_seq_q, cu_seq_k, seqused_k)
        if row >= L:
            return
        at, diagonal, rows = within_sequence(at), S - L, total_q
    o = load_tile(Operand(out, q_row, L, out_stride_b, out_stride_h, out_stride_l, EV, BLOCK_M, BLOCK_EV), at, row)
    do = load_tile(Operand(dout, q_row, L, dout_stride_b, dout_stride_h, dout_stride_l, EV, BLOCK_M, BLOCK_EV), at, row)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    i = row + tl.arange(0, BLOCK_M)
    if sink is None:
        one = sees_one_key(Visible(L, S, diagonal, left, right, LEFT, RIGHT), i)
        row_delta = tl.where(one, NO_GRADIENT if dlse is None else 0.0, row_delta)
    if dlse is not None:
        dlse += at.b.to(tl.int64) * dlse_stride_b + at.h.to(tl.int64) * dlse_stride_h
        row_delta -= tl.load(dlse + (q_row + i).to(tl.int64) * dlse_stride_l, i < L, other=0.0)
    tl.store(rows_of_head(delta, at.head, rows, q_row) + i, row_delta, i < L)
    if LIMIT:
        x = load_lse(rows_of_head(lse, at.head, rows, q_row), i, L)
        x = tl.where((tl.abs(x * LOG2E) < LIMIT) | (x == float("inf")), x * LOG2E, float("-inf"))
        tl.store(rows_of_head(lse2, at.head, rows, q_row) + i, x, i < L)
    if sink_rows is not None:
        x = load_lse(rows_of_head(lse, at.head, rows, q_row), i, L)
        weight = tl.exp2((tl.load(sink + at.h) - x) * LOG2E)
        tl.store(rows_of_head(sink_rows, at.head, rows, q_row) + i, -weight * row_delta, i < L)


class Inputs(NamedTuple):
    """What the backward of a tile reads, and the gradients besides dq that it computes. A program holds tiles of one
    side, keys and values or queries with their statistics, and walks over operands of the other side."""

    q: Operand  # or Tile
    dout: Operand
    stats: RowStats
    k: Operand
    v: Operand
    DK: tl.constexpr = False
    DV: tl.constexpr = False
    SLOPES: tl.constexpr = False


# ------------------------------------------------------------------------------- keys and values
class KeySums(NamedTuple):
    """The accumulators of a tile of keys."""

    dk: tl.tensor  # without the factor scale
    dv: tl.tensor
    min_lse2: tl.tensor


@triton.jit
def _accumulate_dkdv_tile(sums, inputs, start, mask, loop, params):
    """Adds the queries from `start` on to the gradients of the tiles k and v."""
    FUSED: tl.constexpr = params.LIMIT > 0 and not loop.MASKED
    ROWS: tl.constexpr = inputs.q.TILE_ROWS
    KEYS: tl.constexpr = inputs.k.operand.TILE_ROWS
    dk, dv, min_lse2 = sums.dk, sums.dv, sums.min_lse2
    L = params.visible.q_len
    i = start + tl.arange(0, ROWS)
    j = inputs.k.row + tl.arange(0, KEYS)
    q_data = load_tile(inputs.q, loop.at, start)
    st = product(inputs.k, Tile(inputs.q, loop.at, start, q_data))
    capped = st
    if FUSED:
        lse2 = tl.load(inputs.stats.lse2 + i)
        min_lse2 = tl.minimum(min_lse2, lse2)
        pt = tl.exp2(fma(st, params.scale * LOG2E, -lse2[None, :]))
    elif params.scores.GENERAL:
        st, capped = change_scores(st, mask, loop.at, i[None, :], j[:, None], params)
        pt = tl.exp2((st - load_lse(inputs.stats.lse, i, L)[None, :]) * LOG2E)
    else:
        pt = tl.exp2((st * params.scale - load_lse(inputs.stats.lse, i, L)[None, :]) * LOG2E)
    if loop.MASKED:  # The rows that fill up the last tile must not reach an infinite key, because 0 * inf is NaN.
        pt = tl.where(queries_of(params.visible, start, inputs.k.row, ROWS, KEYS), pt, 0.0)
    keep = pt
    if params.scores.seed is not None:
        keep = tl.where(kept(loop.at.head, start, inputs.k.row, params, ROWS, KEYS).T, params.scores.keep, 0.0)
    do_data = load_tile(inputs.dout, loop.at, start)
    if inputs.DV:
        weight = pt if params.scores.seed is None else pt * keep
        dv = dot(to_storage(weight, do_data.dtype), do_data, dv)
    if inputs.DK:
        dpt = product(inputs.v, Tile(inputs.dout, loop.at, start, do_data))
        if params.scores.seed is not None:
            dpt = dpt * keep
        delta = tl.load(inputs.stats.delta + i, i < L, other=0.0)
        if loop.MASKED and params.DLSE and not params.SINK:
            dpt = tl.where(sees_one_key(params.visible, i)[None, :], 0.0, dpt)
        dst = pt * (dpt - delta[None, :])
        if loop.MASKED and not (params.DLSE or params.SINK):
            dst = tl.where(delta[None, :] == NO_GRADIENT, 0.0, dst)
        dk = dot(to_storage(uncap(dst, capped, params), q_data.dtype), q_data, dk)
    return dk, dv, min_lse2


@triton.jit
def _accumulate_dkdv(sums, inputs, loop, params):
    """Adds the queries of a loop to the gradients of the tiles k and v."""
    dk, dv, min_lse2 = sums.dk, sums.dv, sums.min_lse2
    # Counting tiles, not rows, takes fewer registers.
    for tile in tl.range(0, loop_bound(tl.cdiv(loop.end - loop.begin, inputs.q.TILE_ROWS))):
        start = past_gap(loop.begin + tile * inputs.q.TILE_ROWS, loop)
        i, j = start + tl.arange(0, inputs.q.TILE_ROWS), inputs.k.row + tl.arange(0, inputs.k.operand.TILE_ROWS)
        mask = load_mask(loop.at, i[None, :], j[:, None], params)
        if params.scores.BOOLEAN:
            if any_visible(mask):
                dk, dv, min_lse2 = _accumulate_dkdv_tile(KeySums(dk, dv, min_lse2), inputs, start, mask, loop, params)
        else:
            dk, dv, min_lse2 = _accumulate_dkdv_tile(KeySums(dk, dv, min_lse2), inputs, start, mask, loop, params)
    return KeySums(dk, dv, min_lse2)


@triton.jit
def _accumulate_head(sums, inputs, head, loop, params):
    """The same for the query head number `head` of those that share the keys and values of loop.at."""
    kv, stats = loop.at, inputs.stats
    at = TileCoord(kv.tile, kv.head * params.heads_per_kv + head, kv.b, kv.h * params.heads_per_kv + head)
    lse = rows_of_head(stats.lse, at.head, params.rows, params.q_row)
    lse2 = rows_of_head(stats.lse2, at.head, params.rows, params.q_row) if params.LIMIT else lse
    delta = rows_of_head(stats.delta, at.head, params.rows, params.q_row)
    return _accumulate_dkdv(
        sums,
        Inputs(inputs.q, inputs.dout, RowStats(lse, lse2, delta), inputs.k, inputs.v, inputs.DK, inputs.DV),
        Loop(at, loop.begin, loop.end, loop.gap_at, loop.gap, loop.GAP, loop.MASKED),
        params,
    )


@triton.jit
def _empty_key_sums(q, k, v):
    dk = tl.zeros([k.TILE_ROWS, k.TILE_WIDTH], tl.float32)
    return KeySums(dk, tl.zeros([k.TILE_ROWS, v.TILE_WIDTH], tl.float32), tl.zeros([q.TILE_ROWS], tl.float32))


@triton.jit
def _backward_keys(at, dk, dv, inputs, params):
    col = at.tile * inputs.k.TILE_ROWS
    k_data, v_data = load_tile(inputs.k, at, col), load_tile(inputs.v, at, col)
    begin, unmasked, masked, end = walk(
        Visible(
            params.visible.k_len, params.visible.q_len, -params.visible.diagonal, params.visible.right,
            params.visible.left, params.visible.RIGHT, params.visible.LEFT,
        ),
        col, inputs.k.TILE_ROWS, inputs.q.TILE_ROWS,
    )  # fmt: skip
    # Past the edges, a query sees one key only in a tile that has one key.
    if params.visible.LEFT:
        masked = tl.where(params.visible.k_len - col == 1, unmasked, masked)
    else:
        masked = tl.where(params.visible.k_len == 1, unmasked, masked)
    sums = _empty_key_sums(inputs.q, inputs.k, inputs.v)
    for edges in tl.static_range(2):
        if edges and params.LIMIT:  # noqa: SIM102 - a constant, and what depends on data
            if any_true(sums.min_lse2 == float("-inf")):
                masked = unmasked
                sums = _empty_key_sums(inputs.q, inputs.k, inputs.v)
        gap = masked - unmasked
        first = unmasked if not edges else begin if params.visible.RIGHT else masked
        stop = masked if not edges else end - gap if params.visible.RIGHT else end
        if params.GROUPED:
            acc_k, acc_v, min_lse2 = sums.dk, sums.dv, sums.min_lse2
            for head in tl.range(loop_bound(params.heads_per_kv)):
                of_head = _accumulate_head(
                    KeySums(acc_k, acc_v, min_lse2),
                    Inputs(
                        inputs.q, inputs.dout, inputs.stats, Tile(inputs.k, at, col, k_data, params.CHUNK),
                        Tile(inputs.v, at, col, v_data, params.CHUNK), dk is not None, dv is not None,
                    ),
                    head, Loop(at, first, stop, unmasked, gap, edges and params.visible.RIGHT, edges), params,
                )  # fmt: skip
                acc_k, acc_v, min_lse2 = of_head.dk, of_head.dv, of_head.min_lse2
            sums = KeySums(acc_k, acc_v, min_lse2)
        else:
            sums = _accumulate_head(
                sums,
                Inputs(
                    inputs.q, inputs.dout, inputs.stats, Tile(inputs.k, at, col, k_data, params.CHUNK),
                    Tile(inputs.v, at, col, v_data, params.CHUNK), dk is not None, dv is not None,
                ),
                0, Loop(at, first, stop, unmasked, gap, edges and params.visible.RIGHT, edges), params,
            )  # fmt: skip
    if dk is not None:
        store_gradient(dk, Tile(inputs.k, at, col, sums.dk * params.scale), params.H, params.row_heads)
    if dv is not None:
        store_gradient(dv, Tile(inputs.v, at, col, sums.dv), params.H, params.row_heads)


@triton.jit(do_not_specialize=["heads", "GROUP", "diagonal", "left", "right", "threshold", "total_q", "row_heads"])
def attention_dkdv_kernel(
    dk, dv, q, k, v, dout, lse, lse2, delta, heads, H, L, S, scale, GROUP,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_l, heads_per_kv, diagonal, left, right,
    softcap, slopes, slope_stride, mask, mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    seed, threshold, keep, cu_seq_q, cu_seq_k, seqused_k, total_q, row_heads,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, GROUPED: tl.constexpr, BOOLEAN: tl.constexpr, GENERAL: tl.constexpr,
    SINK: tl.constexpr, DLSE: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, TMA: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program computes dk and dv of BLOCK_N keys of one head of keys and values; `heads` and H count these.

    The first keys, whose loops are longest, come first."""
    at = tile_coord(tiles_of_head(S, BLOCK_N, heads), heads, H, GROUP)
    q_row, k_row, rows = 0, 0, L
    if cu_seq_q is not None:
        q_row, k_row, L, S = sequence_of(at, cu_seq_q, cu_seq_k, seqused_k)
        if at.tile * BLOCK_N >= S:
            return
        at, diagonal, rows = within_sequence(at), S - L, total_q
    _backward_keys(
        at,
        dk,
        dv,
        Inputs(
            Operand(q, q_row, L, q_stride_b, q_stride_h, q_stride_l, E, BLOCK_M, BLOCK_E, TMA),
            Operand(dout, q_row, L, dout_stride_b, dout_stride_h, dout_stride_l, EV, BLOCK_M, BLOCK_EV, TMA),
            RowStats(lse, lse2, delta),
            Operand(k, k_row, S, k_stride_b, k_stride_h, k_stride_s, E, BLOCK_N, BLOCK_E, TMA),
            Operand(v, k_row, S, v_stride_b, v_stride_h, v_stride_s, EV, BLOCK_N, BLOCK_EV, TMA),
        ),
        Params(
            Visible(L, S, diagonal, left, right, LEFT, RIGHT),
            Scores(
                softcap, slopes, slope_stride, mask, mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
                seed, threshold, keep, BOOLEAN, GENERAL,
            ),
            q_row, rows, H, scale, heads_per_kv, GROUPED, CHUNK, LIMIT, SINK=SINK, DLSE=DLSE, row_heads=row_heads,
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------- queries
@triton.jit
def score_gradients(inputs, mask, MASKED: tl.constexpr, params):
    """(BLOCK_M, BLOCK_N) of the tiles q, dout and k and of the operand v: the gradient of the scores, and that of the
    products without the factor scale."""
    FUSED: tl.constexpr = params.LIMIT > 0 and not MASKED
    ROWS: tl.constexpr = inputs.q.operand.TILE_ROWS
    KEYS: tl.constexpr = inputs.k.operand.TILE_ROWS
    i, j = inputs.q.row + tl.arange(0, ROWS), inputs.k.row + tl.arange(0, KEYS)
    s = product(inputs.q, inputs.k)
    capped = s
    if FUSED:
        p = tl.exp2(fma(s, params.scale * LOG2E, -inputs.stats.lse2[:, None]))
    elif params.scores.GENERAL:
        s, capped = change_scores(s, mask, inputs.q.at, i[:, None], j[None, :], params)
        p = tl.exp2((s - inputs.stats.lse[:, None]) * LOG2E)
    else:
        p = tl.exp2((s * params.scale - inputs.stats.lse[:, None]) * LOG2E)
    if MASKED:
        p = tl.where(mask_of(params.visible, inputs.q.row, inputs.k.row, ROWS, KEYS), p, 0.0)
    v_data = load_tile(inputs.v, inputs.k.at, inputs.k.row)
    dp = product(inputs.dout, Tile(inputs.v, inputs.k.at, inputs.k.row, v_data))
    if params.scores.seed is not None:
        keep = kept(inputs.q.at.head, inputs.q.row, inputs.k.row, params, ROWS, KEYS)
        dp = tl.where(keep, dp * params.scores.keep, 0.0)
    if MASKED and params.DLSE and not params.SINK:
        dp = tl.where(sees_one_key(params.visible, i)[:, None], 0.0, dp)
    ds = p * (dp - inputs.stats.delta[:, None])
    return ds, uncap(ds, capped, params)


@triton.jit
def load_stats(stats, head, i, params):
    """The statistics of the queries i of a head. Where scores have no gradient, lse makes p 0, but not for dv."""
    L = params.visible.q_len
    rows, q_row = params.rows, params.q_row
    lse = load_lse(rows_of_head(stats.lse, head, rows, q_row), i, L)
    lse2 = lse
    if params.LIMIT:
        lse2 = tl.load(rows_of_head(stats.lse2, head, rows, q_row) + i, i < L, other=float("inf"))
    delta = tl.load(rows_of_head(stats.delta, head, rows, q_row) + i, i < L, other=0.0)
    if not (params.DLSE or params.SINK):
        lse = tl.where(delta == NO_GRADIENT, float("inf"), lse)
        delta = tl.where(delta == NO_GRADIENT, 0.0, delta)
    return RowStats(lse, lse2, delta)


@triton.jit
def _accumulate_dq_tile(dq, slope_sum, inputs, start, mask, loop, params):
    """Adds the keys from `start` on to dq, without the factor scale, and with inputs.SLOPES to the gradients
    of the rows' slopes."""
    k_data = load_tile(inputs.k, loop.at, start)
    ds, dproduct = score_gradients(
        Inputs(inputs.q, inputs.dout, inputs.stats, Tile(inputs.k, loop.at, start, k_data), inputs.v), mask,
        loop.MASKED, params,
    )  # fmt: skip
    if inputs.SLOPES:
        i, j = inputs.q.row + tl.arange(0, inputs.q.operand.TILE_ROWS), start + tl.arange(0, inputs.k.TILE_ROWS)
        slope_sum -= tl.sum(ds * distance(i[:, None], j[None, :], params), 1)
    dq = dot(to_storage(dproduct, k_data.dtype), k_data, dq)
    return dq, slope_sum


@triton.jit
def _accumulate_dq(dq, slope_sum, inputs, loop, params):
    """The same for the keys of a loop."""
    for row in tl.range(loop_bound(loop.begin), loop_bound(loop.end), inputs.k.TILE_ROWS):
        start = past_gap(row, loop)
        i, j = inputs.q.row + tl.arange(0, inputs.q.operand.TILE_ROWS), start + tl.arange(0, inputs.k.TILE_ROWS)
        mask = load_mask(inputs.q.at, i[:, None], j[None, :], params)
        if params.scores.BOOLEAN:
            if any_visible(mask):
                dq, slope_sum = _accumulate_dq_tile(dq, slope_sum, inputs, start, mask, loop, params)
        else:
            dq, slope_sum = _accumulate_dq_tile(dq, slope_sum, inputs, start, mask, loop, params)
    return dq, slope_sum


@triton.jit
def _backward_queries(at, dq, slope_rows, inputs, params):
    BLOCK_M: tl.constexpr = inputs.q.TILE_ROWS
    L = params.visible.q_len
    row = (tl.cdiv(L, BLOCK_M) - 1 - at.tile) * BLOCK_M
    i = row + tl.arange(0, BLOCK_M)
    q_data, do_data = load_tile(inputs.q, at, row), load_tile(inputs.dout, at, row)
    of_rows = load_stats(inputs.stats, at.head, i, params)
    begin, unmasked, masked, end = walk(params.visible, row, BLOCK_M, inputs.k.TILE_ROWS)
    acc = tl.zeros([BLOCK_M, inputs.k.TILE_WIDTH], tl.float32)
    slope_sum = tl.zeros([BLOCK_M], tl.float32)
    for edges in tl.static_range(2):
        if edges and params.LIMIT:  # noqa: SIM102 - a constant, and what depends on data
            if any_true(of_rows.lse2 == float("-inf")):
                masked = unmasked
                acc = tl.zeros([BLOCK_M, inputs.k.TILE_WIDTH], tl.float32)
        gap = masked - unmasked
        first = unmasked if not edges else begin if params.visible.LEFT else masked
        stop = masked if not edges else end - gap if params.visible.LEFT else end
        acc, slope_sum = _accumulate_dq(
            acc, slope_sum,
            Inputs(
                Tile(inputs.q, at, row, q_data, params.CHUNK), Tile(inputs.dout, at, row, do_data, params.CHUNK),
                of_rows, inputs.k, inputs.v, SLOPES=slope_rows is not None,
            ),
            Loop(kv_coord(at, params), first, stop, unmasked, gap, edges and params.visible.LEFT, edges), params,
        )  # fmt: skip
    if dq is not None:
        store_gradient(dq, Tile(inputs.q, at, row, acc * params.scale), params.H, params.row_heads)
    if slope_rows is not None:
        tl.store(rows_of_head(slope_rows, at.head, params.rows, params.q_row) + i, slope_sum, i < L)


@triton.jit(do_not_specialize=["heads", "GROUP", "diagonal", "left", "right", "threshold", "total_q", "row_heads"])
def attention_dq_kernel(
    dq, slope_rows, q, k, v, dout, lse, lse2, delta, heads, H, L, S, scale, GROUP,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_l, heads_per_kv, diagonal, left, right,
    softcap, slopes, slope_stride, mask, mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    seed, threshold, keep, cu_seq_q, cu_seq_k, seqused_k, total_q, row_heads,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, GROUPED: tl.constexpr, BOOLEAN: tl.constexpr, GENERAL: tl.constexpr,
    SINK: tl.constexpr, DLSE: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, TMA: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program computes dq of BLOCK_M queries of one head, and slope_rows (B H, L): their shares of the gradient of
    ALiBi's slope. The last queries, whose loops are longest, come first."""
    at = tile_coord(tiles_of_head(L, BLOCK_M, heads), heads, H, GROUP)
    q_row, k_row, rows = 0, 0, L
    if cu_seq_q is not None:
        q_row, k_row, L, S = sequence_of(at, cu_seq_q, cu_seq_k, seqused_k)
        if at.tile * BLOCK_M >= L:
            return
        at, diagonal, rows = within_sequence(at), S - L, total_q
    _backward_queries(
        at,
        dq,
        slope_rows,
        Inputs(
            Operand(q, q_row, L, q_stride_b, q_stride_h, q_stride_l, E, BLOCK_M, BLOCK_E, TMA),
            Operand(dout, q_row, L, dout_stride_b, dout_stride_h, dout_stride_l, EV, BLOCK_M, BLOCK_EV, TMA),
            RowStats(lse, lse2, delta),
            Operand(k, k_row, S, k_stride_b, k_stride_h, k_stride_s, E, BLOCK_N, BLOCK_E, TMA),
            Operand(v, k_row, S, v_stride_b, v_stride_h, v_stride_s, EV, BLOCK_N, BLOCK_EV, TMA),
        ),
        Params(
            Visible(L, S, diagonal, left, right, LEFT, RIGHT),
            Scores(
                softcap, slopes, slope_stride, mask, mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
                seed, threshold, keep, BOOLEAN, GENERAL,
            ),
            q_row, rows, H, scale, heads_per_kv, GROUPED, CHUNK, LIMIT, SINK=SINK, DLSE=DLSE, row_heads=row_heads,
        ),
    )  # fmt: skip
