"""linear and mlp, each a chain of one GEMM kernel with a fused epilogue.

    linear   y = x W^T + b                       x (M, K), W (N, K), b (N), y (M, N)
             dx = dy W     dW = dy^T x     db = sum over rows of dy
    mlp      y = act(x W1^T + b1) W2^T + b2      W1 (H, C), W2 (O, H)

Forward, bias and activation are applied to the finished tile; kept for backward are hidden = act(pre),
which dW2 needs, and, but for relu, pre itself, which act' is found from. Backward:

    dW2 = dy^T hidden                            db2 = sum over rows of dy
    dpre = (dy W2) act'(pre)                     <- in the GEMM's epilogue, with the sums of
    dW1 = dpre^T x                               db1 = sum over rows of dpre
    dx = dpre W1

A weight gradient is a small matrix with a long inner dimension (the rows): too few tiles for a GPU. It
is split along that dimension into parts that are summed afterwards, in order; their number depends on
the shape alone, so the result does not depend on the device.

Operands are read through tensor descriptors (TMA) where the device and their alignment allow, else
through pointers with any strides. Products accumulate in float32.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pygpt.ops.activation import SAVES_INPUT

from .activation import activate, backpropagate
from .common import (
    TARGETS,
    TRITON,
    Config,
    Configs,
    Tiled,
    aligned,
    bound,
    contiguous,
    dot,
    empty,
    launch,
    rows_of,
    target,
    tileable,
    to_storage,
)
from .norm import column_sums, sums_over_rows

SUM_ROWS = 64  # rows of a tile that are summed into one line of the partial bias gradient


# ------------------------------------------------------------------------------- the kernel
@triton.jit
def _load_tile(
    src, row, col, rows, cols, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr, BY: tl.constexpr
):
    """The (ROWS, COLS) tile at (row, col) of a (rows, cols) matrix, zero outside.

    BY: "pointer"; or src is a descriptor of the matrix ("row") or of its transpose ("column").
    """
    if BY == "pointer":
        r, c = row + tl.arange(0, ROWS).to(tl.int64), col + tl.arange(0, COLS).to(tl.int64)
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        return tl.load(src + r[:, None] * row_stride + c[None, :] * col_stride, inside, other=0.0)
    elif BY == "row":
        return src.load([row, col])
    else:
        return src.load([col, row]).T


@triton.jit
def gemm_kernel(
    out, a, b, bias, saved, pre, sums, M, N, K, a_rows, a_cols, b_rows, b_cols,
    A_BY: tl.constexpr, B_BY: tl.constexpr, ACTIVATION: tl.constexpr, SPLITS: tl.constexpr, SUM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (SPLITS, M, N) = epilogue(a (M, K) b (K, N)); a split takes every SPLITS-th part of K.

    Epilogue: + bias; pre receives what ACTIVATION is applied to; with saved, the activation's gradient
    instead; sums (M / SUM_ROWS, N) receives the sums of so many rows each.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, split = tl.program_id(0) % (tiles_m * tiles_n), tl.program_id(0) // (tiles_m * tiles_n)
    # GROUP rows of tiles at a time, column by column: neighbours in time share operands in the L2 cache.
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    m, n = (first + within % height) * BLOCK_M, within // height * BLOCK_N

    part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(bound(split * part), bound(tl.minimum(K, (split + 1) * part)), BLOCK_K):
        x = _load_tile(a, m, k, M, K, a_rows, a_cols, BLOCK_M, BLOCK_K, A_BY)
        w = _load_tile(b, k, n, K, N, b_rows, b_cols, BLOCK_K, BLOCK_N, B_BY)
        acc = dot(x, w, acc)

    row, col = m + tl.arange(0, BLOCK_M).to(tl.int64), n + tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (col < N)[None, :]
    at = row[:, None] * N + col[None, :]
    if bias is not None:
        acc += tl.load(bias + col, col < N, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        tl.store(pre + at, to_storage(acc, pre.dtype.element_ty), inside)
    if saved is not None:
        acc = backpropagate(acc, tl.load(saved + at, inside, other=0.0).to(tl.float32), ACTIVATION)
    elif ACTIVATION is not None:
        acc = activate(acc, ACTIVATION)
    if sums is not None:
        LINES: tl.constexpr = BLOCK_M // SUM_ROWS
        line = m // SUM_ROWS + tl.arange(0, LINES)
        total = tl.sum(tl.reshape(acc, [LINES, SUM_ROWS, BLOCK_N]), 1)
        tl.store(sums + line[:, None] * N + col[None, :], total, (line * SUM_ROWS < M)[:, None] & (col < N)[None, :])
    out += split.to(tl.int64) * M * N
    tl.store(out + at, to_storage(acc, out.dtype.element_ty), inside)


# ------------------------------------------------------------------------------- configurations
def _candidates(*shapes) -> tuple[Config, ...]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) each."""
    return tuple(
        Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, warps, stages)
        for m, n, k, warps, stages in shapes
    )


SMALL = 64  # rows up to which a product is bound by reading the weights
# Of Triton before 3.9, ptxas serializes the wgmma instructions of x W^T in tiles of 128 x 256.
LARGE = (128, 256, 64, 8, 3) if TRITON >= (3, 9) else (256, 128, 64, 8, 3)
# (target, itemsize, kind) -> candidates. An activation leaves registers for a smaller tile: on sm_90 "fused", forward,
# fits twice into a multiprocessor; "fused gradient", backward, does not, and loads one tile more ahead instead.
SHAPES = {
    ("sm80", 2, "plain"): ((128, 128, 64, 8, 3), (128, 256, 32, 8, 3), (64, 64, 32, 4, 3)),
    ("sm80", 2, "fused"): ((128, 128, 64, 8, 3), (64, 64, 32, 4, 3)),
    ("sm90", 2, "plain"): (LARGE, (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 64, 64, 4, 3)),
    ("sm90", 2, "fused"): ((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 64, 64, 4, 3)),
    ("sm90", 2, "fused gradient"): ((128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (64, 64, 64, 4, 3)),
    ("gfx942", 2, "plain"): ((128, 128, 64, 8, 2), (256, 128, 32, 8, 2), (64, 64, 64, 4, 2)),
    ("gfx942", 2, "fused"): ((128, 128, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm80", 4, "plain"): ((64, 64, 16, 4, 2),),
    ("sm90", 4, "plain"): ((128, 64, 16, 8, 3), (64, 64, 16, 4, 3), (64, 64, 16, 4, 2)),
}
FEW_ROWS = {2: ((64, 64, 128, 4, 3), (64, 64, 64, 4, 3)), 4: ((64, 32, 32, 4, 3), (64, 32, 16, 4, 2))}
ODD = {2: ((64, 64, 32, 4, 1), (64, 32, 32, 4, 1)), 4: ((64, 32, 16, 4, 1),)}  # elements are loaded one by one


def _configs(name: str, itemsize: int, kind: str) -> Configs:
    like = {"sm100": "sm90", "gfx942": "gfx942" if itemsize == 2 else "sm80"}.get(name, name)
    if kind in ("few rows", "odd"):
        shapes = (FEW_ROWS if kind == "few rows" else ODD)[itemsize]
    elif itemsize == 4:
        shapes = SHAPES[like, 4, "plain"]
    else:
        shapes = SHAPES.get((like, 2, kind)) or SHAPES[like, 2, "fused"]
    return Configs(f"{name}, {itemsize} bytes, {kind}", _candidates(*shapes))


KINDS = ("plain", "fused", "fused gradient", "few rows", "odd")
GEMM = {key: _configs(*key) for key in itertools.product(TARGETS, (2, 4), KINDS)}


# ------------------------------------------------------------------------------- launchers
class Operand(NamedTuple):
    """A matrix as `gemm_kernel` takes it."""

    source: object
    strides: tuple[int, int]
    by: str


def _operand(t: torch.Tensor, blocks: tuple[str, str]) -> Operand:
    """t is a matrix of any strides, blocks the names of its tile's height and width."""
    if tileable(t):
        return Operand(Tiled(t, blocks), t.stride(), "row")
    if tileable(t.mT):
        return Operand(Tiled(t.mT, blocks[::-1]), t.stride(), "column")
    return Operand(t, t.stride(), "pointer")


def _gemm(a, b, out, *, bias=None, saved=None, pre=None, sums=None, activation=None, splits=1):
    """out (splits, M, N), or (M, N) = epilogue(a (M, K) b (K, N)). See `gemm_kernel`."""
    (M, K), N = a.shape, b.shape[1]
    left, right = _operand(a, ("BLOCK_M", "BLOCK_K")), _operand(b, ("BLOCK_K", "BLOCK_N"))
    odd = not all(aligned(t) or aligned(t.mT) for t in (a, b))
    fused = "plain" if activation is None else "fused" if saved is None else "fused gradient"
    kind = "odd" if odd else "few rows" if M <= SMALL else fused
    launch(
        gemm_kernel,
        lambda c: splits * triton.cdiv(M, c["BLOCK_M"]) * triton.cdiv(N, c["BLOCK_N"]),
        out, left.source, right.source, bias, saved, pre, sums, M, N, K, *left.strides, *right.strides,
        configs=GEMM[target(a), a.itemsize, kind],
        A_BY=left.by, B_BY=right.by, ACTIVATION=activation, SPLITS=splits, SUM_ROWS=SUM_ROWS,
    )  # fmt: skip
    return out


def _splits(M: int, N: int, K: int) -> int:
    """Parts of K, each of at least 1024, so that a weight gradient has some 512 tiles."""
    tiles = triton.cdiv(M, 128) * triton.cdiv(N, 128)
    return max(1, min(512 // max(tiles, 1), K // 1024, 16))


def _weight_gradient(dy, x):
    """dy^T x for dy (M, N), x (M, K) -> (N, K)."""
    (M, N), K = dy.shape, x.shape[1]
    splits = _splits(N, K, M)
    if splits == 1:
        return _gemm(dy.mT, x, empty(x, N, K))
    parts = _gemm(dy.mT, x, empty(x, splits, N, K, dtype=torch.float32), splits=splits)
    return column_sums(parts.view(splits, N * K), dtype=x.dtype)[0].view(N, K)


def _if(need: bool, gradient, like):
    """gradient() if it is wanted, else nothing."""
    return gradient() if need else like.new_empty(0)


def linear_fwd(x, weight, bias):
    """x (..., K), weight (N, K), bias (N,) or None -> y (..., N)."""
    y = empty(x, *x.shape[:-1], weight.shape[0])
    rows = rows_of(x)
    _gemm(rows, weight.mT, y.view(rows.shape[0], weight.shape[0]), bias=contiguous(bias))
    return y


def linear_bwd(dy, x, weight, needs):
    """-> dx (..., K), dweight (N, K), dbias (N,)."""
    dy2, x2 = rows_of(dy), rows_of(x)
    return (
        _if(needs[0], lambda: _gemm(dy2, weight, empty(x, *x2.shape)).view(x.shape), x),
        _if(needs[1], lambda: _weight_gradient(dy2, x2), x),
        _if(needs[2], lambda: sums_over_rows(dy2), x),
    )


def mlp_fwd(x, fc_weight, fc_bias, proj_weight, proj_bias, activation):
    """-> y (..., O), hidden (..., H), pre (..., H) but for relu."""
    x2, H = rows_of(x), fc_weight.shape[0]
    hidden = empty(x, *x.shape[:-1], H)
    pre = empty(hidden, *hidden.shape) if activation in SAVES_INPUT else None
    _gemm(x2, fc_weight.mT, hidden.view(x2.shape[0], H), bias=contiguous(fc_bias), pre=pre, activation=activation)
    return linear_fwd(hidden, proj_weight, proj_bias), hidden, x.new_empty(0) if pre is None else pre


def mlp_bwd(dy, x, fc_weight, proj_weight, hidden, pre, activation, needs):
    """-> dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias."""
    dy2, x2, hidden2 = rows_of(dy), rows_of(x), rows_of(hidden)
    need_x, need_fc, need_fc_bias, need_proj, need_proj_bias = needs
    dpre = sums = None
    if need_x or need_fc or need_fc_bias:
        dpre = empty(x, *hidden2.shape)
        lines = triton.cdiv(dpre.shape[0], SUM_ROWS)
        sums = empty(x, lines, dpre.shape[1], dtype=torch.float32) if need_fc_bias else None
        saved = pre if activation in SAVES_INPUT else hidden
        _gemm(dy2, proj_weight, dpre, saved=saved.contiguous(), sums=sums, activation=activation)
    return (
        _if(need_x, lambda: _gemm(dpre, fc_weight, empty(x, *x2.shape)).view(x.shape), x),
        _if(need_fc, lambda: _weight_gradient(dpre, x2), x),
        _if(need_fc_bias, lambda: column_sums(sums, dtype=x.dtype)[0], x),
        _if(need_proj, lambda: _weight_gradient(dy2, hidden2), x),
        _if(need_proj_bias, lambda: sums_over_rows(dy2), x),
    )
