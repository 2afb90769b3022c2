"""layer_norm and rms_norm over rows x of N elements, or of x + residual (Ba et al. 2016; Zhang and Sennrich 2019).

    y = xhat w + b,   xhat = (x - mean) rstd,   mean = sum(x) / N,   rstd = 1 / sqrt(sum((x - mean)^2) / N + eps)
    dx = rstd (g - sum(g) / N - xhat sum(g xhat) / N) + ds,   g = dy w
    dw = sum over rows of dy xhat,   db = sum over rows of dy

rms_norm has no mean: x - mean becomes x, and the term sum(g) / N is absent. With a residual (add_layer_norm,
add_rms_norm) the kernel first stores s = x + residual, rounded to the dtype, and normalises s; ds is the gradient from
the sum's other consumer (the residual stream). Forward saves mean and rstd, one float32 number a row each, so that
backward computes xhat without a reduction. With dropout, s = x f + residual for its factors f, which backward draws
again: dresidual is the dx above, and dx is dresidual f. s, residual, ds and dresidual have one dtype, x, y, dy and dx
another or the same, and the parameters either. An offset is added to each weight in float32.

The mean is computed in two steps: first from x, then, together with the variance, from the mean of the centred values
(corrected two-pass algorithm: Chan, Golub and LeVeque 1983). This takes the rounding error of the first mean out of
the variance and out of y.

A row of up to FWD_WIDTH or BWD_WIDTH elements is read once and stays in registers; the wide_ kernels read a longer row
again for each pass. For dw and db at most PROGRAMS programs loop over the rows and sum in registers, and `column_sums`
adds their partial sums in a fixed order. The number of programs depends on the shape alone.

Shapes of kernel arguments: tensors are (rows, N) with adjacent elements and a row stride, mean and rstd (rows,), weight
and bias (N,). Where an optional tensor is None, the kernel is compiled without the work for it.
"""

import math

import torch
import triton
import triton.language as tl

from .attention.scores import philox
from .common import Config, Configs, contiguous, empty, launch, loop_bound, rows_of, to_storage

FWD_WIDTH, BWD_WIDTH = 16384, 8192  # the longest rows that are kept in registers
TILE = 2048  # elements of a tile of rows in backward
PROGRAMS = 256  # at most, that sum dw and db: two for each multiprocessor of an H100


# ------------------------------------------------------------------------------- forward
@triton.jit
def _factors(seed, threshold, keep, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS): what dropout multiplies the tile of these rows, and of the columns from col on, by; 4 divides col.
    1 without a seed."""
    if seed is None:
        return 1.0
    else:
        key = tl.load(seed)
        key0, key1 = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
        zero = tl.zeros([ROWS, COLS // 4], tl.uint32)
        group = zero + (col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = philox(group, zero + row.to(tl.uint32)[:, None], zero, zero, key0, key1)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([ROWS, COLS])
        return tl.where(words >= threshold.to(tl.uint32, bitcast=True), keep, 0.0)


@triton.jit
def _row_factors(seed, threshold, keep, row, col, COLS: tl.constexpr):
    """(COLS,): `_factors` of one row."""
    if seed is None:
        return 1.0
    else:
        rows = tl.zeros([1], tl.int64) + row
        return _factors(seed, threshold, keep, rows, col, 1, COLS).reshape([COLS])


@triton.jit
def _load_sum(x, residual, factors, col, mask):
    """x, or x factors + residual rounded to its dtype, in float32. Both point to the first column of the rows."""
    value = tl.load(x + col, mask, other=0.0).to(tl.float32)
    if residual is not None:
        value *= factors
        loaded = tl.load(residual + col, mask, other=0.0)
        value = to_storage(value + loaded.to(tl.float32), loaded.dtype).to(tl.float32)
    return value


@triton.jit
def _load_weight(weight, offset, col, mask):
    w = tl.load(weight + col, mask, other=0.0).to(tl.float32)
    if offset is not None:
        w += offset
    return w


@triton.jit
def _affine(xhat, weight, bias, offset, col, mask):
    """xhat (weight + offset) + bias at the columns col."""
    if weight is not None:
        xhat *= _load_weight(weight, offset, col, mask)
    if bias is not None:
        xhat += tl.load(bias + col, mask, other=0.0).to(tl.float32)
    return xhat


@triton.jit
def _variance(squares, residue, count):
    """The variance from the sum of squares and the mean of the centred values. NaN stays NaN."""
    variance = squares / count - residue * residue
    return tl.where(variance < 0, 0.0, variance)


@triton.jit(do_not_specialize=["threshold"])
def norm_fwd_kernel(x, residual, weight, bias, s, y, mean, rstd, rows, N, x_stride, residual_stride, eps,
                    seed, threshold, keep, offset, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """A program normalises ROWS rows of N <= WIDTH elements. s is written if there is a residual."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)[None, :]
    row_mask, mask = row < rows, (row < rows)[:, None] & (col < N)
    count = tl.cast(N, tl.float32)
    if residual is not None:
        residual += row[:, None] * residual_stride
    factors = _factors(seed, threshold, keep, row, 0, ROWS, WIDTH)
    value = _load_sum(x + row[:, None] * x_stride, residual, factors, col, mask)
    if residual is not None:
        tl.store(s + row[:, None] * N + col, to_storage(value, s.dtype.element_ty), mask)
    if mean is not None:
        coarse_mean = tl.div_rn(tl.sum(value, 1), count)
        value = tl.where(mask, value - coarse_mean[:, None], 0.0)
        residue = tl.div_rn(tl.sum(value, 1), count)
        row_rstd = tl.rsqrt(_variance(tl.sum(value * value, 1), residue, count) + eps)
        value -= residue[:, None]
        tl.store(mean + row, coarse_mean + residue, row_mask)
    else:
        row_rstd = tl.rsqrt(tl.sum(value * value, 1) / count + eps)
    tl.store(rstd + row, row_rstd, row_mask)
    out = _affine(value * row_rstd[:, None], weight, bias, offset, col, col < N)
    tl.store(y + row[:, None] * N + col, to_storage(out, y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["threshold"])
def wide_norm_fwd_kernel(x, residual, weight, bias, s, y, mean, rstd, N, x_stride, residual_stride, eps,
                         seed, threshold, keep, offset, BLOCK: tl.constexpr):  # fmt: skip
    """A program normalises one row of any length, BLOCK elements at a time."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    count = tl.cast(N, tl.float32)
    x += row * x_stride
    if residual is not None:
        residual += row * residual_stride
    coarse_mean, residue = 0.0, 0.0
    if mean is not None:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, loop_bound(N), BLOCK):
            factors = _row_factors(seed, threshold, keep, row, start, BLOCK)
            sums += _load_sum(x, residual, factors, start + cols, start + cols < N)
        coarse_mean = tl.div_rn(tl.sum(sums, 0), count)
    sums = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, loop_bound(N), BLOCK):
        mask = start + cols < N
        factors = _row_factors(seed, threshold, keep, row, start, BLOCK)
        value = tl.where(mask, _load_sum(x, residual, factors, start + cols, mask) - coarse_mean, 0.0)
        sums += value
        squares += value * value
    if mean is not None:
        residue = tl.div_rn(tl.sum(sums, 0), count)
        tl.store(mean + row, coarse_mean + residue)
    row_rstd = tl.rsqrt(_variance(tl.sum(squares, 0), residue, count) + eps)
    tl.store(rstd + row, row_rstd)
    for start in range(0, loop_bound(N), BLOCK):
        col = start + cols
        factors = _row_factors(seed, threshold, keep, row, start, BLOCK)
        value = _load_sum(x, residual, factors, col, col < N)
        if residual is not None:
            tl.store(s + row * N + col, to_storage(value, s.dtype.element_ty), col < N)
        out = _affine(((value - coarse_mean) - residue) * row_rstd, weight, bias, offset, col, col < N)
        tl.store(y + row * N + col, to_storage(out, y.dtype.element_ty), col < N)


# ------------------------------------------------------------------------------- backward
@triton.jit
def _load_xhat(x, mean, rstd, col, mask):
    """xhat from a pointer x to the first column of the rows, and the mean and rstd of the rows. Where mask is false,
    xhat has no meaning and dy must be 0."""
    value = tl.load(x + col, mask, other=0.0).to(tl.float32)
    if mean is not None:
        value -= mean
    return value * rstd


@triton.jit
def _store_gradients(d, dx, dresidual, factors, at, mask):
    """dresidual = d, dx = d factors. Either may be None. The factors are 1 without dropout."""
    if dresidual is not None:
        tl.store(dresidual + at, to_storage(d, dresidual.dtype.element_ty), mask)
    if dx is not None:
        tl.store(dx + at, to_storage(d * factors, dx.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["threshold"])
def norm_bwd_kernel(dy, ds, x, weight, mean, rstd, dx, dresidual, dw, db, rows, N, dy_stride, ds_stride, x_stride,
                    seed, threshold, keep, offset,
                    ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dx, dresidual, and this program's partial sums of dw and db: one row each of (programs, N) float32 tensors.

    A program loops over tiles of ROWS rows and WIDTH columns. dx and dresidual need whole rows, so WIDTH >= N unless
    both are None.
    """
    slices = tl.cdiv(N, WIDTH)
    program, programs = tl.program_id(0) // slices, tl.num_programs(0) // slices
    col = (tl.program_id(0) % slices) * WIDTH + tl.arange(0, WIDTH)
    col_mask = (col < N)[None, :]
    dw_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    db_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    count = tl.cast(N, tl.float32)
    if weight is not None:
        w = _load_weight(weight, offset, col, col < N)[None, :]
    for tile in tl.range(loop_bound(program), loop_bound(tl.cdiv(rows, ROWS)), loop_bound(programs), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        row_mask = row < rows
        mask = row_mask[:, None] & col_mask
        d = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask, other=0.0).to(tl.float32)
        if db is not None:
            db_sum += d
        if dx is not None or dresidual is not None or dw is not None:
            row_rstd = tl.load(rstd + row, row_mask, other=0.0)[:, None]
            row_mean = None
            if mean is not None:
                row_mean = tl.load(mean + row, row_mask, other=0.0)[:, None]
            xhat = _load_xhat(x + row[:, None] * x_stride, row_mean, row_rstd, col[None, :], mask)
        if dw is not None:
            dw_sum += d * xhat
        if dx is not None or dresidual is not None:
            if weight is not None:
                d *= w
            out = d - xhat * (tl.sum(d * xhat, 1) / count)[:, None]
            if mean is not None:
                out -= (tl.sum(d, 1) / count)[:, None]
            out *= row_rstd
            if ds is not None:
                out += tl.load(ds + row[:, None] * ds_stride + col[None, :], mask, other=0.0).to(tl.float32)
            factors = 1.0
            if dx is not None:
                factors = _factors(seed, threshold, keep, row, 0, ROWS, WIDTH)
            _store_gradients(out, dx, dresidual, factors, row[:, None] * N + col[None, :], mask)
    place = program.to(tl.int64) * N + col
    if dw is not None:
        tl.store(dw + place, tl.sum(dw_sum, 0), col < N)
    if db is not None:
        tl.store(db + place, tl.sum(db_sum, 0), col < N)


@triton.jit(do_not_specialize=["threshold"])
def wide_norm_bwd_kernel(dy, ds, x, weight, mean, rstd, dx, dresidual, N, dy_stride, ds_stride, x_stride,
                         seed, threshold, keep, offset, BLOCK: tl.constexpr):  # fmt: skip
    """dx and dresidual of one row of any length, BLOCK elements at a time."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    count = tl.cast(N, tl.float32)
    row_rstd = tl.load(rstd + row)
    row_mean = None
    if mean is not None:
        row_mean = tl.load(mean + row)
    dy += row * dy_stride
    x += row * x_stride
    g_sum = tl.zeros([BLOCK], tl.float32)
    gx_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, loop_bound(N), BLOCK):
        col = start + cols
        g = _affine(tl.load(dy + col, col < N, other=0.0).to(tl.float32), weight, None, offset, col, col < N)
        g_sum += g
        gx_sum += g * _load_xhat(x, row_mean, row_rstd, col, col < N)
    g_mean, gx_mean = tl.sum(g_sum, 0) / count, tl.sum(gx_sum, 0) / count
    for start in range(0, loop_bound(N), BLOCK):
        col = start + cols
        g = _affine(tl.load(dy + col, col < N, other=0.0).to(tl.float32), weight, None, offset, col, col < N)
        out = g - _load_xhat(x, row_mean, row_rstd, col, col < N) * gx_mean
        if mean is not None:
            out -= g_mean
        out *= row_rstd
        if ds is not None:
            out += tl.load(ds + row * ds_stride + col, col < N, other=0.0).to(tl.float32)
        factors = 1.0
        if dx is not None:
            factors = _row_factors(seed, threshold, keep, row, start, BLOCK)
        _store_gradients(out, dx, dresidual, factors, row * N + col, col < N)


@triton.jit
def _column_sum(partials, out, P, N, col, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """Sums the P rows of partials in tiles of LINES rows."""
    total = tl.zeros([LINES, BLOCK], tl.float32)
    for start in range(0, loop_bound(P), LINES):
        line = start + tl.arange(0, LINES).to(tl.int64)
        mask = (line < P)[:, None] & (col < N)[None, :]
        total += tl.load(partials + line[:, None] * N + col[None, :], mask, other=0.0)
    tl.store(out + col, to_storage(tl.sum(total, 0), out.dtype.element_ty), col < N)


@triton.jit
def column_sums_kernel(a, b, a_out, b_out, P, N, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """(P, N) -> (N,); b and b_out may be None."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _column_sum(a, a_out, P, N, col, LINES, BLOCK)
    if b is not None:
        _column_sum(b, b_out, P, N, col, LINES, BLOCK)


# ------------------------------------------------------------------------------- configurations
WIDTHS = [2**k for k in range(4, 15)]  # buckets: the width rounded up


def _fwd_configs(width: int, itemsize: int) -> Configs:
    """Each thread holds 64 bytes. A row of up to 2 KiB fits one warp, which reduces it without shared memory."""
    warps = min(max(width * itemsize // 2048, 1), 16)
    if width <= 256:
        shapes = ((2048 // width, 4), (1024 // width, 4), (4096 // width, 8))
    else:
        shapes = ((max(2048 // (width * itemsize), 1), warps), (1, min(2 * warps, 16)), (max(2048 // width, 1), 4))
    blocks = [({"ROWS": rows, "WIDTH": width}, warps) for rows, warps in dict.fromkeys(shapes)]
    return Configs(f"width {width} x {itemsize}", tuple(Config(*shape) for shape in blocks))


def _bwd_configs(width: int) -> Configs:
    """Each thread holds 8 to 16 elements, each of which takes about five registers (docs/measured.md T7). The kernel
    prefetches the next tiles."""
    warps = 16 if width > 4096 else 8
    blocks = {"ROWS": max(TILE // width, 1), "WIDTH": width}
    depths = (2, 1) if width > 4096 else (2,)
    return Configs(f"width {width}", tuple(Config({**blocks, "STAGES": stages}, warps) for stages in depths))


FWD = {(width, size): _fwd_configs(width, size) for width in WIDTHS if width <= FWD_WIDTH for size in (2, 4)}
BWD = {width: _bwd_configs(width) for width in WIDTHS if width <= BWD_WIDTH}
_WIDE = tuple(Config({"BLOCK": block}, warps) for block, warps in ((2048, 8), (4096, 16)))
WIDE_FWD, WIDE_BWD = Configs("wide", _WIDE), Configs("wide", _WIDE)
WIDE_SUMS = Configs("sums", (Config({"ROWS": 16, "WIDTH": 256, "STAGES": 2}, 8),))
MANY_LINES = Configs("many", (Config({"LINES": 128, "BLOCK": 16}, 4), Config({"LINES": 64, "BLOCK": 32}, 4)))
FEW_LINES = Configs("few", (Config({"LINES": 16, "BLOCK": 128}, 4), Config({"LINES": 8, "BLOCK": 256}, 4)))


def _bucket(width: int) -> int:
    return max(triton.next_power_of_2(width), WIDTHS[0])


# ------------------------------------------------------------------------------- launchers
def column_sums(*partials: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """One or two contiguous float32 (P, N) tensors -> the sums of their columns, (N,) each, added in a fixed order."""
    P, N = partials[0].shape
    outs = [empty(p, N, dtype=dtype) for p in partials]
    a, b = (*partials, None)[:2]
    a_out, b_out = (*outs, None)[:2]
    configs = FEW_LINES if P <= 16 else MANY_LINES
    launch(column_sums_kernel, lambda c: triton.cdiv(N, c["BLOCK"]), a, b, a_out, b_out, P, N, configs=configs)
    return outs


def sums_over_rows(dy: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """dy (rows, N) with adjacent elements -> (N,) in its dtype, or in another one: the gradient of a bias."""
    rows, N = dy.shape
    programs = min(32, triton.cdiv(rows, 16))
    db = empty(dy, programs, N, dtype=torch.float32)
    launch(
        norm_bwd_kernel, lambda c: programs * triton.cdiv(N, c["WIDTH"]),
        dy, None, None, None, None, None, None, None, None, db, rows, N, dy.stride(0), 0, 0, *NO_DROPOUT, None,
        configs=WIDE_SUMS,
    )  # fmt: skip
    return column_sums(db, dtype=dtype or dy.dtype)[0]


def _stride(t) -> int:
    return 0 if t is None else t.stride(0)


NO_DROPOUT = None, None, None


def _dropout(seed, dropout_p) -> tuple:
    """The kernels' seed, threshold, as the int32 with the bits of the uint32, and factor of what is kept."""
    if seed is None:
        return NO_DROPOUT
    threshold = min(math.floor(dropout_p * 2**32), 2**32 - 1)  # if dropout_p is 1, the factor is 0
    return seed, (threshold + 2**31) % 2**32 - 2**31, 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _norm_fwd(x, residual, weight, bias, eps, centre, offset=0.0, dropout=NO_DROPOUT):
    """-> y, s (None without a residual), mean (None unless centre), rstd."""
    lead, x2 = x.shape[:-1], rows_of(x)
    residual2 = None if residual is None else rows_of(residual)
    rows, N = x2.shape
    y = empty(x, *x.shape)
    s = None if residual is None else empty(residual, *x.shape)
    mean = empty(x, *lead, dtype=torch.float32) if centre else None
    rstd = empty(x, *lead, dtype=torch.float32)
    tensors = x2, residual2, contiguous(weight), contiguous(bias), s, y, mean, rstd
    rest = N, _stride(x2), _stride(residual2), eps, *dropout, offset or None
    fuse = dropout is NO_DROPOUT  # so that x f + residual is the same on every backend
    if N > FWD_WIDTH:
        launch(wide_norm_fwd_kernel, lambda c: rows, *tensors, *rest, configs=WIDE_FWD, fuse=fuse)
    else:
        configs = FWD[_bucket(N), x.itemsize]
        grid = lambda c: triton.cdiv(rows, c["ROWS"])
        launch(norm_fwd_kernel, grid, *tensors, rows, *rest, configs=configs, fuse=fuse)
    return y, s, mean, rstd


def _norm_bwd(dy, ds, x, weight, mean, rstd, needs, offset=0.0, dropout=NO_DROPOUT):
    """-> dx, dw, db and, where needs has a fourth entry, dresidual."""
    dy2, x2 = rows_of(dy), rows_of(x)
    ds2 = None if ds is None else rows_of(ds)
    rows, N = x2.shape
    # Dropout, and a residual in float32, take registers: their longest rows would spill.
    bucket, wide = _bucket(N), N > (BWD_WIDTH if len(needs) == 3 else BWD_WIDTH // 2)
    weight = contiguous(weight)
    tensors, strides = (dy2, ds2, x2, weight, mean, rstd), (_stride(dy2), _stride(ds2), _stride(x2))
    need_dx, *need_sums = needs[:3]
    dx = empty(dy, *x.shape) if need_dx else None
    dresidual = empty(x, *x.shape) if any(needs[3:]) else None
    rest = *strides, *dropout, offset or None
    programs = min(PROGRAMS, triton.cdiv(rows, 16 if wide else max(TILE // bucket, 1)))
    if wide:
        programs = min(programs, 32)  # for each slice of the columns
    dw, db = (empty(x, programs, N, dtype=torch.float32) if need else None for need in need_sums)
    need_rows = need_dx or any(needs[3:])
    if wide and need_rows:
        launch(wide_norm_bwd_kernel, lambda c: rows, *tensors, dx, dresidual, N, *rest, configs=WIDE_BWD)
    if any(need_sums) or need_rows and not wide:
        launch(
            norm_bwd_kernel,
            lambda c: programs * triton.cdiv(N, c["WIDTH"]),
            *tensors, *((None, None) if wide else (dx, dresidual)), dw, db, rows, N, *rest,
            configs=WIDE_SUMS if wide else BWD[bucket],
        )  # fmt: skip
    wanted = [sums for sums in (dw, db) if sums is not None]
    dtype = x.dtype if len(needs) == 3 else torch.float32 if weight is None else weight.dtype
    sums = iter(column_sums(*wanted, dtype=dtype) if wanted else ())
    grads = dx, *(next(sums) if n else None for n in need_sums), *(dresidual,) * (len(needs) - 3)
    return tuple(g if g is not None else x.new_empty(0) for g in grads)


def layer_norm_fwd(x, weight, bias, eps):
    """x (..., N) -> y (..., N), mean (...), rstd (...)."""
    y, _, mean, rstd = _norm_fwd(x, None, weight, bias, eps, True)
    return y, mean, rstd


def layer_norm_bwd(dy, x, weight, mean, rstd, needs):
    """-> dx (..., N), dweight (N,), dbias (N,)."""
    return _norm_bwd(dy, None, x, weight, mean, rstd, needs)


def add_layer_norm_fwd(x, residual, weight, bias, eps):
    """x, residual (..., N) -> y, s (..., N), mean, rstd (...)."""
    return _norm_fwd(x, residual, weight, bias, eps, True)


def add_layer_norm_bwd(dy, ds, s, weight, mean, rstd, needs):
    """-> the gradient of x and of residual (..., N), dweight (N,), dbias (N,). ds (..., N) or None."""
    return _norm_bwd(dy, ds, s, weight, mean, rstd, needs)


def rms_norm_fwd(x, weight, eps, weight_offset=0.0):
    """x (..., N) -> y (..., N), rstd (...)."""
    y, _, _, rstd = _norm_fwd(x, None, weight, None, eps, False, weight_offset)
    return y, rstd


def rms_norm_bwd(dy, x, weight, rstd, needs, weight_offset=0.0):
    """-> dx (..., N), dweight (N,)."""
    return _norm_bwd(dy, None, x, weight, None, rstd, (*needs, False), weight_offset)[:2]


def add_rms_norm_fwd(x, residual, weight, eps, weight_offset=0.0):
    """x, residual (..., N) -> y, s (..., N), rstd (...)."""
    y, s, _, rstd = _norm_fwd(x, residual, weight, None, eps, False, weight_offset)
    return y, s, rstd


def add_rms_norm_bwd(dy, ds, s, weight, rstd, needs, weight_offset=0.0):
    """-> the gradient of x and of residual (..., N), dweight (N,). ds (..., N) or None."""
    return _norm_bwd(dy, ds, s, weight, None, rstd, (*needs, False), weight_offset)[:2]


def dropout_add_layer_norm_fwd(x, residual, weight, bias, eps, seed, dropout_p):
    """x, residual (..., N), seed (1,) or None -> y, s (..., N), mean, rstd (...)."""
    return _norm_fwd(x, residual, weight, bias, eps, True, 0.0, _dropout(seed, dropout_p))


def dropout_add_layer_norm_bwd(dy, ds, s, weight, mean, rstd, needs, seed, dropout_p):
    """-> dx, dresidual (..., N), dweight, dbias (N,). ds (..., N) or None."""
    need_dx, need_dresidual, *sums = needs
    order = need_dx, *sums, need_dresidual
    dx, dw, db, dresidual = _norm_bwd(dy, ds, s, weight, mean, rstd, order, 0.0, _dropout(seed, dropout_p))
    return dx, dresidual, dw, db


def dropout_add_rms_norm_fwd(x, residual, weight, eps, seed, dropout_p, weight_offset):
    """x, residual (..., N), seed (1,) or None -> y, s (..., N), rstd (...)."""
    y, s, _, rstd = _norm_fwd(x, residual, weight, None, eps, False, weight_offset, _dropout(seed, dropout_p))
    return y, s, rstd


def dropout_add_rms_norm_bwd(dy, ds, s, weight, rstd, needs, seed, dropout_p, weight_offset):
    """-> dx, dresidual (..., N), dweight (N,). ds (..., N) or None."""
    need_dx, need_dresidual, need_dw = needs
    order, dropout = (need_dx, need_dw, False, need_dresidual), _dropout(seed, dropout_p)
    dx, dw, _, dresidual = _norm_bwd(dy, ds, s, weight, None, rstd, order, weight_offset, dropout)
    return dx, dresidual, dw
