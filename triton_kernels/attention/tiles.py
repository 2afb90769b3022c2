"""What attention's kernels share: structs, loads, stores, products, which keys a query sees, the tile scheduler.

Kernels take flat parameters, because a NamedTuple as a launch argument costs microseconds (docs/measured.md T1). Each
kernel packs them into the NamedTuples below. Fields in capitals are constants. Two rules keep them constant in every
Triton (docs/measured.md T2): a struct with constants is passed on as an argument and never assigned to a variable, and
the last field of a struct that contains such a struct is a constant.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common import dot, to_storage


class Operand(NamedTuple):
    """A (B, H, length, width) tensor, or a sequence's rows of it, read or written in tiles of TILE_ROWS rows."""

    source: object  # a pointer, or with TMA a tensor descriptor
    first_row: tl.tensor  # of the sequence; 0 in a dense call
    length: tl.tensor
    stride_b: tl.tensor
    stride_h: tl.tensor
    stride_row: tl.tensor
    WIDTH: tl.constexpr
    TILE_ROWS: tl.constexpr
    TILE_WIDTH: tl.constexpr  # WIDTH padded to a power of two
    TMA: tl.constexpr = False


class TileCoord(NamedTuple):
    """A tile of a head of batch entry b; head = b H + h. Heads are those of queries, or of keys and values."""

    tile: tl.tensor
    head: tl.tensor
    b: tl.tensor
    h: tl.tensor


class Tile(NamedTuple):
    """The rows of one head of an operand from `row` on, and their data, (TILE_ROWS, TILE_WIDTH)."""

    operand: Operand
    at: TileCoord
    row: tl.tensor
    data: tl.tensor
    CHUNK: tl.constexpr = 0  # columns that a step of a float32 product reads again, or 0: the product takes data


class Sequence(NamedTuple):
    """Where a sequence of a packed call lies (csrc/attention/sequence.h).

    The tensors of a packed call have one batch entry, whose rows are those of all sequences. A program works on one
    sequence: rows are counted from its first one, and no tile reaches beyond its last one."""

    q_row: tl.tensor  # the first row in the tensors
    k_row: tl.tensor
    q_len: tl.tensor
    k_len: tl.tensor


class Visible(NamedTuple):
    """Which keys a query sees: query i those from i + diagonal - left to i + diagonal + right, without those that do
    not exist (csrc/attention/visible.h). Which queries a key sees is of the same kind: exchange the lengths, exchange
    the limits, and negate the diagonal."""

    q_len: tl.tensor
    k_len: tl.tensor
    diagonal: tl.tensor
    left: tl.tensor
    right: tl.tensor
    LEFT: tl.constexpr  # whether there is a limit on the left; if not, `left` has no meaning
    RIGHT: tl.constexpr


class Scores(NamedTuple):
    """What happens to a score besides scaling (csrc/attention/scores.h). What a call does not use is None."""

    softcap: tl.tensor
    slopes: tl.tensor  # a pointer to (B or 1, H)
    slope_stride: tl.tensor
    mask: tl.tensor  # a pointer to (B, H, L, S) with these strides, 0 where it is broadcast; uint8 if BOOLEAN
    mask_stride_b: tl.tensor
    mask_stride_h: tl.tensor
    mask_stride_l: tl.tensor
    mask_stride_s: tl.tensor
    seed: tl.tensor
    threshold: tl.tensor
    keep: tl.tensor
    BOOLEAN: tl.constexpr
    GENERAL: tl.constexpr  # whether anything but scaling happens


class Params(NamedTuple):
    """What all tiles of a call have in common. Scores start as SIGN scale q k^T."""

    visible: Visible
    scores: Scores
    q_row: tl.tensor  # see Sequence; 0 in a dense call
    rows: tl.tensor  # queries that a head has: L, or those of all sequences
    H: tl.tensor
    scale: tl.tensor
    heads_per_kv: tl.tensor  # query heads that share a head of keys and values
    GROUPED: tl.constexpr  # whether these are several
    CHUNK: tl.constexpr  # see Tile
    LIMIT: tl.constexpr  # up to which |base| the fused form is exact enough; 0 means never
    row_heads: tl.tensor = 0  # see store_gradient
    SIGN: tl.constexpr = 1
    SINK: tl.constexpr = False
    DLSE: tl.constexpr = False  # whether lse has a gradient


class Loop(NamedTuple):
    """A loop over tiles of rows of the head `at`: keys for a tile of queries, queries for a tile of keys.

    It goes from `begin` to `end`, and with GAP moves up by `gap` rows from the row `gap_at` on. MASKED says whether its
    tiles need the mask of Visible.
    """

    at: TileCoord
    begin: tl.tensor
    end: tl.tensor
    gap_at: tl.tensor
    gap: tl.tensor
    GAP: tl.constexpr
    MASKED: tl.constexpr


class RowStats(NamedTuple):
    """Statistics of queries: pointers to (B H, rows), or to a sequence of one head, or the values of one tile."""

    lse: tl.tensor
    lse2: tl.tensor  # see attention_delta_kernel
    delta: tl.tensor


# ------------------------------------------------------------------------------- loads, products, stores
@triton.jit
def first_of_head(x, at):
    """A pointer to the first row of a head's sequence in the operand x."""
    first = x.source + at.b.to(tl.int64) * x.stride_b + at.h.to(tl.int64) * x.stride_h
    return first + x.first_row * x.stride_row


@triton.jit
def load_tile(x, at, row):
    """TILE_ROWS rows of the operand x from row on, zero outside."""
    if x.TMA:
        return x.source.load([at.b, at.h, row, 0]).reshape([x.TILE_ROWS, x.TILE_WIDTH])
    else:
        return _load_columns(x, at, row, 0, x.TILE_WIDTH)


@triton.jit
def _load_columns(x, at, row, col, COLS: tl.constexpr):
    """COLS columns of such a tile from col on, through pointers."""
    r, c = row + tl.arange(0, x.TILE_ROWS).to(tl.int64), tl.arange(0, COLS)
    address = first_of_head(x, at) + col
    address = address + r[:, None] * x.stride_row + c[None, :]
    if x.WIDTH > 0 and x.WIDTH % COLS == 0:
        return tl.load(address, (r < x.length)[:, None], other=0.0)
    else:
        return tl.load(address, (r < x.length)[:, None] & (c < x.WIDTH - col)[None, :], other=0.0)


@triton.jit
def product(x, y):
    """x y^T of two tiles. With CHUNK, both are read again, so many columns at a time."""
    acc = tl.zeros([x.operand.TILE_ROWS, y.operand.TILE_ROWS], tl.float32)
    if x.CHUNK:
        for col in range(0, x.operand.WIDTH, x.CHUNK):
            x_chunk = _load_columns(x.operand, x.at, x.row, col, x.CHUNK)
            y_chunk = _load_columns(y.operand, y.at, y.row, col, x.CHUNK)
            acc = dot(x_chunk, y_chunk.T, acc)
    else:
        acc = dot(x.data, y.data.T, acc)
    return acc


@triton.jit
def store_rows(first, stride, x):
    """Stores the tile x; `first` points to the first row of its head, and rows are `stride` apart."""
    r, c = x.row + tl.arange(0, x.operand.TILE_ROWS).to(tl.int64), tl.arange(0, x.operand.TILE_WIDTH)
    mask = (r < x.operand.length)[:, None] & (c < x.operand.WIDTH)[None, :]
    tl.store(first + r[:, None] * stride + c[None, :], to_storage(x.data, first.dtype.element_ty), mask)


@triton.jit
def store_gradient(grad, x, H, row_heads):
    """Stores the tile x into grad, which has H of the row_heads heads of a contiguous (B, length, row_heads, WIDTH)."""
    row = (x.at.head // H).to(tl.int64) * x.operand.length + x.operand.first_row
    first = (row * row_heads + x.at.head % H) * x.operand.WIDTH
    store_rows(grad + first, row_heads * x.operand.WIDTH, x)


@triton.jit
def rows_of_head(stats, head, rows, first_row):
    """A pointer to the statistics of a head's sequence in a (B H, rows) tensor."""
    return stats + head.to(tl.int64) * rows + first_row


# ------------------------------------------------------------------------------- which keys a query sees
@triton.jit
def first_key(visible, i):
    """The first key that query i sees."""
    if visible.LEFT:
        return tl.maximum(i + (visible.diagonal - visible.left), 0)
    else:
        return i * 0


@triton.jit
def end_key(visible, i):
    """The key after the last one that query i sees."""
    if visible.RIGHT:
        return tl.minimum(i + (visible.diagonal + visible.right + 1), visible.k_len)
    else:
        return i * 0 + visible.k_len


@triton.jit
def sees_one_key(visible, i):
    return end_key(visible, i) - first_key(visible, i) == 1


@triton.jit
def mask_of(visible, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which keys of a tile its queries see: (ROWS, COLS), or (1, COLS) if that depends on no query."""
    i, j = row + tl.arange(0, ROWS), tl.arange(0, COLS)
    last = visible.k_len - 1
    if visible.RIGHT:
        last = tl.minimum(last, i + (visible.diagonal + visible.right))[:, None]
    mask = j[None, :] <= last - col
    if visible.LEFT:
        mask &= j[None, :] >= (i + (visible.diagonal - visible.left))[:, None] - col
    return mask


@triton.jit
def queries_of(visible, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which queries of a tile, from row on, see its keys: (COLS, ROWS), or (1, ROWS) if that depends on no key."""
    i, j = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    mask = (i < visible.q_len)[None, :]
    if visible.RIGHT:
        mask &= j[:, None] <= (i + (visible.diagonal + visible.right))[None, :]
    if visible.LEFT:
        mask &= j[:, None] >= (i + (visible.diagonal - visible.left))[None, :]
    return mask


@triton.jit
def walk(visible, row, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tiles of keys for the queries row .. row + ROWS: begin, unmasked, masked, end.

    Tiles from `unmasked` to `masked` are seen by all of these queries. Those before and after them, from `begin` to
    `end`, need a mask. All others are seen by none.
    """
    begin, unmasked = 0, 0
    if visible.LEFT:
        begin = first_key(visible, row) // COLS * COLS
        unmasked = tl.cdiv(first_key(visible, row + ROWS - 1), COLS) * COLS
    masked, end = visible.k_len, visible.k_len
    if visible.RIGHT:
        masked, end = tl.maximum(end_key(visible, row), 0), end_key(visible, row + ROWS - 1)
    masked = masked // COLS * COLS
    if visible.LEFT:
        masked = tl.maximum(masked, unmasked)
    return begin, unmasked, masked, end


@triton.jit
def past_gap(row, loop):
    """Where a loop's tile lies."""
    if loop.GAP:
        return tl.where(row < loop.gap_at, row, row + loop.gap)
    else:
        return row


# ------------------------------------------------------------------------------- the tile scheduler
@triton.jit
def any_true(x):
    """Whether any element of x is true. The second maximum, of equal numbers, makes the compiler keep the loop bounds
    that depend on the result in uniform registers (docs/measured.md T3)."""
    return tl.max(tl.full([256], 0, tl.int32) + tl.max(x.to(tl.int32), 0), 0) > 0


@triton.jit
def tiles_of_head(length, TILE_ROWS: tl.constexpr, heads):
    """How many tiles each head has. In a packed call, where length is None, these are the longest sequence's."""
    if length is None:
        return tl.num_programs(0) // heads
    else:
        return tl.cdiv(length, TILE_ROWS)


@triton.jit
def tile_coord(tiles, heads, H, group):
    """The tile scheduler: `group` heads at a time, whose keys and values share the L2 cache. Within a group the first
    tiles of all heads come first, then the second ones."""
    program = tl.program_id(0)
    first = program // (group * tiles) * group
    within = program % (group * tiles)
    size = tl.minimum(heads - first, group)
    head = first + within % size
    return TileCoord(within // size, head, head // H, head % H)


@triton.jit
def sequence_of(at, cu_seq_q, cu_seq_k, seqused_k):
    """The sequence of a packed call that counts as batch entry at.b to `tile_coord`."""
    q_row, k_row = tl.load(cu_seq_q + at.b), tl.load(cu_seq_k + at.b)
    q_len = tl.load(cu_seq_q + at.b + 1) - q_row
    k_len = tl.load(cu_seq_k + at.b + 1) - k_row if seqused_k is None else tl.load(seqused_k + at.b)
    return Sequence(q_row.to(tl.int64), k_row.to(tl.int64), q_len, k_len)


@triton.jit
def within_sequence(at):
    """The same tile, in the one batch entry that the tensors of a packed call have."""
    return TileCoord(at.tile, at.h, at.b * 0, at.h)


@triton.jit
def kv_coord(at, params):
    """The head of keys and values that the query head `at` reads."""
    if params.GROUPED:
        return TileCoord(at.tile, at.head // params.heads_per_kv, at.b, at.h // params.heads_per_kv)
    else:
        return at
