"""linear and mlp, each a chain of launches of one GEMM kernel with a fused epilogue.

    linear   y = x W^T + b                       x (M, K), W (N, K), b (N,), y (M, N)
             dx = dy W     dW = dy^T x     db = sum over rows of dy
    mlp      y = act(x W1^T + b1) W2^T + b2      x (M, C), W1 (H, C), b1 (H,), W2 (O, H), b2 (O,), y (M, O)

The epilogue of forward adds the bias to the finished tile and applies the activation. mlp saves hidden = act(pre),
because dW2 needs it, and for all activations but relu also pre = x W1^T + b1, because act' is computed from it (relu's
is computed from hidden). Backward:

    dW2 = dy^T hidden                            db2 = sum over rows of dy
    dpre = (dy W2) act'(pre)                     in the GEMM's epilogue, with the partial sums of
    dW1 = dpre^T x                               db1 = sum over rows of dpre
    dx = dpre W1

A gated activation has W1 (2H, C) and b1 (2H,): hidden = act(gate) value, where [gate | value] = x W1^T + b1. Forward
computes the gate by one launch, which leaves it in pre, or in hidden where pre is not saved. The epilogue of the second
launch, which computes the value, reads it there. Backward's epilogue writes both halves of dpre (M, 2H):

    d = dy W2       dpre = [d value act'(gate) | d act(gate)]

A weight gradient is a small matrix with a long inner dimension, the rows, and has too few tiles to fill a GPU. It is
therefore split along the inner dimension (split-K), and the parts are summed afterwards in a fixed order. Their
number depends on the shape alone, so the result does not depend on the device.

Operands are loaded through tensor descriptors (TMA) where the device and their alignment allow it, else through
pointers with any strides. Products accumulate in float32.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pygpt.ops.activation import GATED, SAVES_INPUT, known
from pygpt.ops.mlp import saves_all

from .activation import activate, backpropagate
from .common import (
    TARGETS,
    TRITON,
    Config,
    Configs,
    Tiled,
    aligned,
    contiguous,
    dot,
    empty,
    launch,
    loop_bound,
    rows_of,
    target,
    tileable,
    to_storage,
)
from .norm import column_sums, sums_over_rows

SUM_ROWS = 64  # rows of a tile that are summed into one row of the partial bias gradient


# ------------------------------------------------------------------------------- the kernel
class Matrix(NamedTuple):
    """A (rows, cols) operand that is read in tiles of (TILE_ROWS, TILE_COLS)."""

    source: object  # a pointer, or a tensor descriptor
    rows: tl.tensor
    cols: tl.tensor
    row_stride: tl.tensor
    col_stride: tl.tensor
    TILE_ROWS: tl.constexpr
    TILE_COLS: tl.constexpr
    LOAD: tl.constexpr  # "pointer", or a descriptor of the matrix ("row major") or of its transpose ("column major")


@triton.jit
def _load_tile(x, row, col):
    """The tile of x at (row, col), zero outside."""
    if x.LOAD == "pointer":
        r, c = row + tl.arange(0, x.TILE_ROWS).to(tl.int64), col + tl.arange(0, x.TILE_COLS).to(tl.int64)
        mask = (r < x.rows)[:, None] & (c < x.cols)[None, :]
        return tl.load(x.source + r[:, None] * x.row_stride + c[None, :] * x.col_stride, mask, other=0.0)
    elif x.LOAD == "row major":
        return x.source.load([row, col])
    else:
        return x.source.load([col, row]).T


@triton.jit
def _tile_coord(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The tile scheduler: GROUP rows of tiles at a time, column by column, so that programs that run at the same time
    share operands in the L2 cache. Returns the tile's row and column."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def gemm_kernel(
    out, a, b, bias, saved, pre, gate, row_sums, addend, M, N, K, a_row_stride, a_col_stride, b_row_stride,
    b_col_stride, A_LOAD: tl.constexpr, B_LOAD: tl.constexpr, ACTIVATION: tl.constexpr, OUT_WIDTH: tl.constexpr,
    PRE_WIDTH: tl.constexpr, SPLITS: tl.constexpr, SUM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (SPLITS, M, N) = epilogue(a (M, K) b (K, N)); split s covers the s-th of SPLITS equal parts of K.

    Epilogue: + bias; + addend (M, N), which may be out; pre receives the activation's input, or with a gate the value
    by which the activation of the gate is multiplied; with saved, the product is multiplied by the activation's
    derivative instead; row_sums (M / SUM_ROWS, N) receives the sums of SUM_ROWS rows each. The rows of out and addend
    are OUT_WIDTH * N elements apart, those of saved, pre and gate PRE_WIDTH * N. Where saved has PRE_WIDTH 2, its rows
    are [gate | value], and out's are their gradients.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, split = tl.program_id(0) % (tiles_m * tiles_n), tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = _tile_coord(tile, tiles_m, tiles_n, GROUP)
    m, n = tile_m * BLOCK_M, tile_n * BLOCK_N

    part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(loop_bound(split * part), loop_bound(tl.minimum(K, (split + 1) * part)), BLOCK_K):
        # Structs stand where they are used: assigning one to a variable would lose its constants (docs/measured.md T2).
        x = _load_tile(Matrix(a, M, K, a_row_stride, a_col_stride, BLOCK_M, BLOCK_K, A_LOAD), m, k)
        w = _load_tile(Matrix(b, K, N, b_row_stride, b_col_stride, BLOCK_K, BLOCK_N, B_LOAD), k, n)
        acc = dot(x, w, acc)

    row, col = m + tl.arange(0, BLOCK_M).to(tl.int64), n + tl.arange(0, BLOCK_N)
    mask = (row < M)[:, None] & (col < N)[None, :]
    offset = row[:, None] * (N * OUT_WIDTH) + col[None, :]
    pre_offset = row[:, None] * (N * PRE_WIDTH) + col[None, :]
    if bias is not None:
        acc += tl.load(bias + col, col < N, other=0.0).to(tl.float32)[None, :]
    if addend is not None:
        acc += tl.load(addend + offset, mask, other=0.0)
    if pre is not None:
        tl.store(pre + pre_offset, to_storage(acc, pre.dtype.element_ty), mask)
    if saved is not None:
        x = tl.load(saved + pre_offset, mask, other=0.0).to(tl.float32)
        if PRE_WIDTH == 2:
            tl.store(out + offset + N, to_storage(acc * activate(x, ACTIVATION), out.dtype.element_ty), mask)
            acc *= tl.load(saved + pre_offset + N, mask, other=0.0).to(tl.float32)
        acc = backpropagate(acc, x, ACTIVATION)
    elif gate is not None:
        acc *= activate(tl.load(gate + pre_offset, mask, other=0.0).to(tl.float32), ACTIVATION)
    elif ACTIVATION is not None:
        acc = activate(acc, ACTIVATION)
    if row_sums is not None:
        LINES: tl.constexpr = BLOCK_M // SUM_ROWS
        line = m // SUM_ROWS + tl.arange(0, LINES)
        sums = tl.sum(tl.reshape(acc, [LINES, SUM_ROWS, BLOCK_N]), 1)
        line_mask = (line * SUM_ROWS < M)[:, None] & (col < N)[None, :]
        tl.store(row_sums + line[:, None] * N + col[None, :], sums, line_mask)
    out += split.to(tl.int64) * M * N
    tl.store(out + offset, to_storage(acc, out.dtype.element_ty), mask)


# ------------------------------------------------------------------------------- configurations
def _candidates(*shapes) -> tuple[Config, ...]:
    """Each shape is (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)."""
    return tuple(
        Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, warps, stages)
        for m, n, k, warps, stages in shapes
    )


FEW_ROWS = 64  # up to so many rows, a product is bound by reading the weights
# Before Triton 3.9, ptxas serializes the wgmma instructions of x W^T in tiles of 128 x 256 (docs/measured.md T5).
LARGE = (128, 256, 64, 8, 3) if TRITON >= (3, 9) else (256, 128, 64, 8, 3)
# (target, itemsize, kind) -> candidates. An activation needs registers, so its tiles are smaller. On sm_90 two programs
# of "fused", which is forward, fit a multiprocessor. Two of "fused gradient", which is backward, do not, so it
# prefetches one tile more instead (docs/measured.md T6).
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
FEW_ROWS_SHAPES = {2: ((64, 64, 128, 4, 3), (64, 64, 64, 4, 3)), 4: ((64, 32, 32, 4, 3), (64, 32, 16, 4, 2))}
UNALIGNED_SHAPES = {
    2: ((64, 64, 32, 4, 1), (64, 32, 32, 4, 1)),
    4: ((64, 32, 16, 4, 1),),
}  # elements are loaded one by one


def _configs(name: str, itemsize: int, kind: str) -> Configs:
    like = {"sm100": "sm90", "gfx942": "gfx942" if itemsize == 2 else "sm80"}.get(name, name)
    if kind in ("few rows", "unaligned"):
        shapes = (FEW_ROWS_SHAPES if kind == "few rows" else UNALIGNED_SHAPES)[itemsize]
    elif itemsize == 4:
        shapes = SHAPES[like, 4, "plain"]
    else:
        shapes = SHAPES.get((like, 2, kind)) or SHAPES[like, 2, "fused"]
    return Configs(f"{name}, {itemsize} bytes, {kind}", _candidates(*shapes))


KINDS = ("plain", "fused", "fused gradient", "few rows", "unaligned")
GEMM = {key: _configs(*key) for key in itertools.product(TARGETS, (2, 4), KINDS)}


# ------------------------------------------------------------------------------- launchers
class Operand(NamedTuple):
    """A matrix as `gemm_kernel` takes it: see Matrix."""

    source: torch.Tensor | Tiled
    strides: tuple[int, int]
    load: str


class Epilogue(NamedTuple):
    """What `gemm_kernel` does with the finished tiles."""

    bias: torch.Tensor | None = None
    saved: torch.Tensor | None = None
    pre: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    row_sums: torch.Tensor | None = None
    addend: torch.Tensor | None = None  # float32, contiguous
    activation: str | None = None
    out_width: int = 1
    pre_width: int = 1


PLAIN = Epilogue()


def _operand(t: torch.Tensor, tile: tuple[str, str]) -> Operand:
    """t is a matrix of any strides; tile names the constants that are its tile's height and width."""
    if tileable(t):
        return Operand(Tiled(t, tile), t.stride(), "row major")
    if tileable(t.mT):
        return Operand(Tiled(t.mT, tile[::-1]), t.stride(), "column major")
    return Operand(t, t.stride(), "pointer")


def _kind(a, b, epilogue: Epilogue, wide: bool) -> str:
    """Which of KINDS has the configurations for this product. wide: whether 16-bit operands have a float32 result."""
    if not all(aligned(t) or aligned(t.mT) for t in (a, b)):
        return "unaligned"
    two_results = epilogue.saved is not None and epilogue.pre_width == 2
    spills = two_results or (TRITON < (3, 9) and (wide or epilogue.gate is not None))  # or waits for each wgmma
    if a.shape[0] <= FEW_ROWS or spills:
        return "few rows"
    if epilogue.activation is None:
        return "fused gradient" if wide or epilogue.addend is not None else "plain"  # float32 tiles take registers
    return "fused" if epilogue.saved is None else "fused gradient"


def _gemm(a, b, out, epilogue: Epilogue = PLAIN, splits: int = 1):
    """out (splits, M, N), or (M, N) = epilogue(a (M, K) b (K, N)). See `gemm_kernel`."""
    (M, K), N = a.shape, b.shape[1]
    left, right = _operand(a, ("BLOCK_M", "BLOCK_K")), _operand(b, ("BLOCK_K", "BLOCK_N"))
    *tensors, activation, out_width, pre_width = epilogue
    launch(
        gemm_kernel,
        lambda c: splits * triton.cdiv(M, c["BLOCK_M"]) * triton.cdiv(N, c["BLOCK_N"]),
        out, left.source, right.source, *tensors, M, N, K, *left.strides, *right.strides,
        configs=GEMM[target(a), a.itemsize, _kind(a, b, epilogue, splits == 1 and out.itemsize > a.itemsize)],
        in_place=(out,) if epilogue.gate is out else (),
        A_LOAD=left.load, B_LOAD=right.load, ACTIVATION=activation, OUT_WIDTH=out_width, PRE_WIDTH=pre_width,
        SPLITS=splits, SUM_ROWS=SUM_ROWS,
    )  # fmt: skip
    return out


def _splits(M: int, N: int, K: int) -> int:
    """How many parts of K, each of at least 1024, give a weight gradient about 512 tiles."""
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
    """gradient() if it is needed, else an empty tensor."""
    return gradient() if need else like.new_empty(0)


def linear_fwd(x, weight, bias):
    """x (..., K), weight (N, K), bias (N,) or None -> y (..., N)."""
    y = empty(x, *x.shape[:-1], weight.shape[0])
    rows = rows_of(x)
    _gemm(rows, weight.mT, y.view(rows.shape[0], weight.shape[0]), Epilogue(bias=contiguous(bias)))
    return y


def linear_bwd(dy, x, weight, needs):
    """-> dx (..., K), dweight (N, K), dbias (N,)."""
    dy2, x2 = rows_of(dy), rows_of(x)
    return (
        _if(needs[0], lambda: _gemm(dy2, weight, empty(x, *x2.shape)).view(x.shape), x),
        _if(needs[1], lambda: _weight_gradient(dy2, x2), x),
        _if(needs[2], lambda: sums_over_rows(dy2), x),
    )


def mlp_fwd(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, save="all"):
    """-> y (..., O), hidden (..., H), pre (..., H or gated 2 H) but for relu; hidden and pre only with save="all"."""
    saves_input, saves = known("mlp_fwd", activation) in SAVES_INPUT, saves_all("mlp_fwd", save)
    x2 = rows_of(x)
    (M, _), fc_dim, H = x2.shape, fc_weight.shape[0], proj_weight.shape[1]
    hidden = empty(x, *x.shape[:-1], H)
    pre = empty(x, *x.shape[:-1], fc_dim) if saves and saves_input else None
    hidden2, pre2, fc_bias = hidden.view(M, H), None if pre is None else pre.view(M, fc_dim), contiguous(fc_bias)
    if activation in GATED:
        _gated(x2, fc_weight, fc_bias, hidden2, pre2, GATED[activation])
    else:
        _gemm(x2, fc_weight.mT, hidden2, Epilogue(bias=fc_bias, pre=pre2, activation=activation))
    y = linear_fwd(hidden, proj_weight, proj_bias)
    return y, hidden if saves else x.new_empty(0), x.new_empty(0) if pre is None else pre  # which share no memory


def _gated(x, fc_weight, fc_bias, hidden, pre, activation):
    """hidden (M, H) = act(gate) value; pre (M, 2 H), if not None, receives [gate | value]."""
    H, width = hidden.shape[1], 1 if pre is None else 2
    gate, value = (hidden, None) if pre is None else (pre[:, :H], pre[:, H:])
    of_gate, of_value = (None, None) if fc_bias is None else (fc_bias[:H], fc_bias[H:])
    _gemm(x, fc_weight[:H].mT, gate, Epilogue(bias=of_gate, out_width=width))
    epilogue = Epilogue(bias=of_value, pre=value, gate=gate, activation=activation, pre_width=width)
    _gemm(x, fc_weight[H:].mT, hidden, epilogue)


def mlp_bwd(dy, x, fc_weight, proj_weight, hidden, pre, activation, needs):
    """-> dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias."""
    dy2, x2, hidden2 = rows_of(dy), rows_of(x), rows_of(hidden)
    need_x, need_fc, need_fc_bias, need_proj, need_proj_bias = needs
    dpre = sums = None
    if need_x or need_fc or need_fc_bias:
        gated, width = GATED.get(activation), 2 if activation in GATED else 1
        dpre = empty(x, hidden2.shape[0], fc_weight.shape[0])
        lines = triton.cdiv(dpre.shape[0], SUM_ROWS)
        sums = empty(x, lines, dpre.shape[1], dtype=torch.float32) if need_fc_bias and not gated else None
        saved = pre if known("mlp_bwd", activation) in SAVES_INPUT else hidden
        act, saved = gated or activation, saved.contiguous()
        epilogue = Epilogue(saved=saved, row_sums=sums, activation=act, out_width=width, pre_width=width)
        _gemm(dy2, proj_weight, dpre, epilogue)
    return (
        _if(need_x, lambda: _gemm(dpre, fc_weight, empty(x, *x2.shape)).view(x.shape), x),
        _if(need_fc, lambda: _weight_gradient(dpre, x2), x),
        _if(need_fc_bias, lambda: sums_over_rows(dpre) if sums is None else column_sums(sums, dtype=x.dtype)[0], x),
        _if(need_proj, lambda: _weight_gradient(dy2, hidden2), x),
        _if(need_proj_bias, lambda: sums_over_rows(dy2), x),
    )
