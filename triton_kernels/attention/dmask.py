"""The gradient of attention's floating mask: that of the scores, summed over what shares an element of the mask.

A program owns a tile of the mask and loops over the batch entries, heads, rows and columns that share it, in this
order, so that the sum needs no atomics and is the same in every run. It is kept in float32 and rounded once.
"""

import triton
import triton.language as tl

from ..common import loop_bound, to_storage
from .bwd import Inputs, load_stats, score_gradients
from .scores import load_mask
from .tiles import Operand, Params, RowStats, Scores, Tile, TileCoord, Visible, kv_coord, load_tile, walk


@triton.jit
def _tile_gradient(inputs, col, params):
    """The gradient of the scores of the tiles q and dout and of the keys from `col` on."""
    i, j = inputs.q.row + tl.arange(0, inputs.q.operand.TILE_ROWS), col + tl.arange(0, inputs.k.TILE_ROWS)
    kv = kv_coord(inputs.q.at, params)
    mask = load_mask(inputs.q.at, i[:, None], j[None, :], params)
    k_data = load_tile(inputs.k, kv, col)
    ds, _ = score_gradients(
        Inputs(inputs.q, inputs.dout, inputs.stats, Tile(inputs.k, kv, col, k_data), inputs.v), mask, True, params
    )
    return tl.where((i < params.visible.q_len)[:, None], ds, 0.0)


@triton.jit
def _mask_gradient(dmask, entries, heads, inputs, mask_heads, ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr, params):
    BLOCK_M: tl.constexpr = inputs.q.TILE_ROWS
    BLOCK_N: tl.constexpr = inputs.k.TILE_ROWS
    L, S = params.visible.q_len, params.visible.k_len
    row_tiles = 1 if ONE_ROW else tl.cdiv(L, BLOCK_M)
    col_tiles = 1 if ONE_COL else tl.cdiv(S, BLOCK_N)
    program = tl.program_id(0)
    first_row, first_col = program // col_tiles % row_tiles * BLOCK_M, program % col_tiles * BLOCK_N
    head = program // (col_tiles * row_tiles)  # of the mask
    first_b, first_h = head // mask_heads, head % mask_heads
    row_end = L if ONE_ROW else tl.minimum(first_row + BLOCK_M, L)
    col_end = S if ONE_COL else tl.minimum(first_col + BLOCK_N, S)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for entry in tl.range(loop_bound(entries)):
        for shared in tl.range(loop_bound(heads)):
            b, h = first_b + entry, first_h + shared
            at = TileCoord(0, b * params.H + h, b, h)
            for row in tl.range(loop_bound(first_row), loop_bound(row_end), BLOCK_M):
                begin, _, _, end = walk(params.visible, row, BLOCK_M, BLOCK_N)
                begin, end = tl.maximum(begin, first_col), tl.minimum(end, col_end)
                q_data, do_data = load_tile(inputs.q, at, row), load_tile(inputs.dout, at, row)
                stats = load_stats(inputs.stats, at.head, row + tl.arange(0, BLOCK_M), params)
                for col in tl.range(loop_bound(begin), loop_bound(end), BLOCK_N):
                    acc += _tile_gradient(
                        Inputs(
                            Tile(inputs.q, at, row, q_data, params.CHUNK),
                            Tile(inputs.dout, at, row, do_data, params.CHUNK), stats, inputs.k, inputs.v,
                        ),
                        col, params,
                    )  # fmt: skip
    # Where rows or columns share an element, the tile is summed over them.
    dmask += head.to(tl.int64) * (1 if ONE_ROW else L) * (1 if ONE_COL else S)
    i, j = first_row + tl.arange(0, BLOCK_M).to(tl.int64), first_col + tl.arange(0, BLOCK_N)
    if ONE_ROW and ONE_COL:
        tl.store(dmask, to_storage(tl.sum(tl.sum(acc, 1), 0), dmask.dtype.element_ty))
    elif ONE_ROW:
        tl.store(dmask + j, to_storage(tl.sum(acc, 0), dmask.dtype.element_ty), j < S)
    elif ONE_COL:
        tl.store(dmask + i, to_storage(tl.sum(acc, 1), dmask.dtype.element_ty), i < L)
    else:
        inside = (i < L)[:, None] & (j < S)[None, :]
        tl.store(dmask + i[:, None] * S + j[None, :], to_storage(acc, dmask.dtype.element_ty), inside)


@triton.jit(
    do_not_specialize=["GROUP", "diagonal", "left", "right", "threshold", "entries", "mask_heads", "shared_heads"]
)
def attention_dmask_kernel(
    dmask, q, k, v, dout, lse, lse2, delta, heads, H, L, S, scale, GROUP,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_l, heads_per_kv, diagonal, left, right,
    softcap, slopes, slope_stride, mask, mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    seed, threshold, keep, entries, shared_heads, mask_heads,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, GROUPED: tl.constexpr, BOOLEAN: tl.constexpr, GENERAL: tl.constexpr,
    SINK: tl.constexpr, DLSE: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr, LIMIT: tl.constexpr,
    E: tl.constexpr, EV: tl.constexpr, TMA: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of dmask, which has mask_heads heads. `entries` batch entries share each of its batch
    entries, shared_heads heads each of its heads; all rows share one with ONE_ROW, all columns with ONE_COL."""
    _mask_gradient(
        dmask,
        entries,
        shared_heads,
        Inputs(
            Operand(q, 0, L, q_stride_b, q_stride_h, q_stride_l, E, BLOCK_M, BLOCK_E, TMA),
            Operand(dout, 0, L, dout_stride_b, dout_stride_h, dout_stride_l, EV, BLOCK_M, BLOCK_EV, TMA),
            RowStats(lse, lse2, delta),
            Operand(k, 0, S, k_stride_b, k_stride_h, k_stride_s, E, BLOCK_N, BLOCK_E, TMA),
            Operand(v, 0, S, v_stride_b, v_stride_h, v_stride_s, EV, BLOCK_N, BLOCK_EV, TMA),
        ),
        mask_heads,
        ONE_ROW,
        ONE_COL,
        Params(
            Visible(L, S, diagonal, left, right, LEFT, RIGHT),
            Scores(
                softcap, slopes, slope_stride, mask, mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
                seed, threshold, keep, BOOLEAN, GENERAL,
            ),
            0, L, H, scale, heads_per_kv, GROUPED, CHUNK, LIMIT, SINK=SINK, DLSE=DLSE,
        ),
    )  # fmt: skip
