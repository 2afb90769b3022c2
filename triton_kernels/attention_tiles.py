"""What attention's forward and backward kernels share: structs, loads, stores, products, masks, the tile scheduler.

Kernels take flat parameters, because a NamedTuple as a launch argument costs microseconds (docs/measured.md T1). Each
kernel packs them into the NamedTuples below. Fields in capitals are constants. Two rules keep them constant in every
Triton (docs/measured.md T2): a struct with constants is passed on as an argument and never assigned to a variable, and
the last field of a struct that contains such a struct is a constant.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .common import dot, to_storage


class Operand(NamedTuple):
    """A (B, H, length, width) tensor that is read or written in tiles of TILE_ROWS rows."""

    source: object  # a pointer, or with TMA a tensor descriptor
    length: tl.tensor
    stride_b: tl.tensor
    stride_h: tl.tensor
    stride_row: tl.tensor
    WIDTH: tl.constexpr
    TILE_ROWS: tl.constexpr
    TILE_WIDTH: tl.constexpr  # WIDTH padded to a power of two
    TMA: tl.constexpr = False


class TileCoord(NamedTuple):
    """Which tile of which head a program computes; head = b H + h."""

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


class Params(NamedTuple):
    """What all tiles of a call have in common. Scores are SIGN scale q k^T, scale > 0; heads = B H."""

    heads: tl.tensor
    H: tl.tensor
    L: tl.tensor
    S: tl.tensor
    scale: tl.tensor
    group: tl.tensor  # heads whose tiles run concurrently
    CAUSAL: tl.constexpr
    CHUNK: tl.constexpr  # see Tile
    LIMIT: tl.constexpr  # up to which |base| the fused form is exact enough; 0 means never
    SIGN: tl.constexpr = 1
    NEED_DK: tl.constexpr = False
    NEED_DV: tl.constexpr = False


class KeyLoop(NamedTuple):
    """The keys from `begin` to `end`. MASKED says whether their tiles need a mask."""

    begin: tl.tensor
    end: tl.tensor
    MASKED: tl.constexpr


class RowStats(NamedTuple):
    """Statistics of queries: pointers to (B H, L), or to those of one head, or the values of one tile."""

    lse: tl.tensor
    lse2: tl.tensor  # see attention_delta_kernel
    delta: tl.tensor


# ------------------------------------------------------------------------------- device functions
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
    address = x.source + col + at.b.to(tl.int64) * x.stride_b + at.h.to(tl.int64) * x.stride_h
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
def store_gradient(grad, x, H):
    """Stores the tile x into grad, which has the operand's shape and is contiguous as (B, length, H, WIDTH)."""
    first = ((x.at.head // H).to(tl.int64) * x.operand.length * H + x.at.head % H) * x.operand.WIDTH
    store_rows(grad + first, H * x.operand.WIDTH, x)


@triton.jit
def rows_of_head(stats, head, L):
    """A pointer to the L numbers of a head in a (B H, L) tensor."""
    return stats + head.to(tl.int64) * L


@triton.jit
def mask_of(row, col, params, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys of a tile its queries may attend to: (1, BLOCK_N), if causal (BLOCK_M, BLOCK_N)."""
    last = params.S - 1
    if params.CAUSAL:
        last = tl.minimum(last, row + tl.arange(0, BLOCK_M))[:, None]
    return tl.arange(0, BLOCK_N)[None, :] <= last - col


@triton.jit
def key_range(row, params, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For queries row .. row + BLOCK_M: the end of the key tiles that need no mask, and the end of all keys."""
    unmasked, end = params.S, params.S
    if params.CAUSAL:
        unmasked, end = tl.minimum(row + 1, params.S), tl.minimum(row + BLOCK_M, params.S)
    return unmasked // BLOCK_N * BLOCK_N, end


@triton.jit
def any_true(x):
    """Whether any element of x is true. The second maximum, of equal numbers, makes the compiler keep the loop bounds
    that depend on the result in uniform registers (docs/measured.md T3)."""
    return tl.max(tl.full([256], 0, tl.int32) + tl.max(x.to(tl.int32), 0), 0) > 0


@triton.jit
def tile_coord(tiles, params):
    """The tile scheduler: `group` heads at a time, whose keys and values share the L2 cache. Within a group the first
    tiles of all heads come first, then the second ones."""
    program, group = tl.program_id(0), params.group
    first = program // (group * tiles) * group
    within = program % (group * tiles)
    size = tl.minimum(params.heads - first, group)
    head = first + within % size
    return TileCoord(within // size, head, head // params.H, head % params.H)
