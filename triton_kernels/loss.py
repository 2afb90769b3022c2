"""cross_entropy of logits x (N, V), and linear_cross_entropy, whose logits exist for one chunk of rows at a time.

pygpt/ops/loss.py has the formulas. A program processes a row in forward and reads it once: the sum of exp(x - maximum)
is rescaled when the maximum rises (Milakov and Gimelshein 2018). Smoothing reads the row again. In backward a program
processes a block of a row. `loss_reduce_kernel` sums the rows' losses in an order that depends on their number alone.

linear_cross_entropy is a sequence of GEMMs (mlp.py) and these kernels for every chunk:

    logits = x W^T + b      dlogits      dx = dlogits W      dW += dlogits^T x      db = column sums of dlogits

Logits and the sums of dW are float32. dlogits have the operands' dtype; float32 ones overwrite the logits. Forward
scales those of float16, and at last divides the gradients by the same power of two.

A target that is no class gives its row a loss and gradients of NaN. It is never an index. Shapes of kernel arguments:
x (rows, V) with adjacent elements and a row stride; target, row_losses (N,); weight (V,) or None; stats (2, N).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pygpt.ops.loss_arguments import known_reduction

from .common import LOG2E, Config, Configs, contiguous, empty, launch, loop_bound, rows_of, to_storage
from .mlp import Epilogue, _gemm
from .norm import column_sums, sums_over_rows

LEAST_ROWS, L2_BYTES = 1024, 32 << 20


# ------------------------------------------------------------------------------- kernels
@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _weights(weight, cols, V):
    """The classes' weights at the columns cols, 0 past the last."""
    if weight is None:
        return tl.where(cols < V, 1.0, 0.0)
    else:
        return tl.load(weight + cols, cols < V, other=0.0)


@triton.jit
def loss_fwd_kernel(x, target, weight, row_losses, stats, first, N, V, x_stride, ignore_index, smoothing, z_loss,
                    WITH_SQUARES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """stats and the loss of a row, with z lse^2 if WITH_SQUARES. Row 0 of x is row `first` of the others."""
    r = tl.program_id(0).to(tl.int64)
    row, cols = first + r, tl.arange(0, BLOCK)
    cls = tl.load(target + row)
    x += r * x_stride
    kept = cls != ignore_index
    end = tl.where(kept, V, 0)  # an ignored row is not read
    row_max, sums = tl.full((), -float("inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, loop_bound(end), BLOCK):
        value = tl.load(x + start + cols, start + cols < V, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(row_max, tl.max(value, 0))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # -inf - -inf would be NaN
        sums = sums * _exp(row_max - shift) + _exp(value - shift)
        row_max = new_max
    row_sum = tl.where(kept, tl.sum(sums, 0), 1.0)
    log_sum = tl.log(row_sum)
    known = (cls >= 0) & (cls < V)
    at_target = tl.load(x + cls, known & (end > 0), other=0.0).to(tl.float32)
    loss = (log_sum - (at_target - row_max)) * (1.0 - smoothing)
    if weight is not None:
        loss *= tl.load(weight + cls, known, other=0.0)
    if SMOOTH:
        smooth = tl.zeros([BLOCK], tl.float32)
        for start in range(0, loop_bound(end), BLOCK):
            mask = start + cols < V
            value = tl.load(x + start + cols, mask, other=0.0).to(tl.float32)
            term = _weights(weight, start + cols, V) * (log_sum - (value - row_max))
            smooth += tl.where(mask, term, 0.0)
        loss += tl.sum(smooth, 0) * smoothing / V
    if WITH_SQUARES:
        loss += z_loss * (row_max + log_sum) * (row_max + log_sum)
    loss = tl.where(known, loss, float("nan"))
    tl.store(row_losses + row, tl.where(kept, loss, 0.0))
    tl.store(stats + row, tl.where(kept, row_max, 0.0))
    tl.store(stats + N + row, tl.where(kept, row_sum, 0.0))


@triton.jit
def loss_reduce_kernel(target, weight, row_losses, stats, totals, loss, N, V, ignore_index, z_loss,
                       MEAN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: the totals and, where there is a loss, that of all rows."""
    weights, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    losses, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, loop_bound(N), BLOCK):
        row = start + tl.arange(0, BLOCK)
        cls = tl.load(target + row, row < N, other=0)
        kept = (row < N) & (cls != ignore_index)
        known = kept & (cls >= 0) & (cls < V)
        if weight is None:
            weights += tl.where(known, 1.0, 0.0)
        else:
            weights += tl.load(weight + cls, known, other=0.0)
        count += tl.where(kept, 1.0, 0.0)
        if loss is not None:
            losses += tl.load(row_losses + row, kept, other=0.0)
            lse = tl.load(stats + row, kept, other=0.0) + tl.log(tl.load(stats + N + row, kept, other=1.0))
            squares += tl.where(kept, lse * lse, 0.0)
    total, kept_rows = tl.sum(weights, 0), tl.sum(count, 0)
    tl.store(totals, total)
    tl.store(totals + 1, kept_rows)
    if loss is not None:
        sum_of_losses, sum_of_squares = tl.sum(losses, 0), z_loss * tl.sum(squares, 0)
        if MEAN:
            sum_of_losses, sum_of_squares = sum_of_losses / total, sum_of_squares / kept_rows
        # Without z_loss an infinite lse or no kept row must not make the loss NaN.
        tl.store(loss, sum_of_losses + tl.where(z_loss == 0.0, 0.0, sum_of_squares))


@triton.jit
def loss_bwd_kernel(x, dx, target, weight, of_weights, stats, totals, dloss, scale, first, N, V, x_stride, dx_stride,
                    ignore_index, smoothing, z_loss, REDUCTION: tl.constexpr, SMOOTH: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """dx of a block of a row, times scale. Without dloss: of the losses' sum, or of totals[0] times their mean."""
    blocks = tl.cdiv(V, BLOCK)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row, mask = first + r, cols < V
    cls = tl.load(target + row)
    kept, known = cls != ignore_index, (cls >= 0) & (cls < V)
    of_loss, of_squares = 1.0, 1.0
    if dloss is not None:
        if REDUCTION == "none":
            of_loss = tl.load(dloss + row)
        else:
            of_loss = tl.load(dloss)
        of_squares = of_loss
    if REDUCTION == "mean":
        if dloss is None:
            of_squares = tl.load(totals) / tl.load(totals + 1)
        else:
            of_loss, of_squares = of_loss / tl.load(totals), of_loss / tl.load(totals + 1)
    if scale is not None:
        of_loss, of_squares = of_loss * tl.load(scale), of_squares * tl.load(scale)
    one = of_loss * (1.0 - smoothing)
    if weight is not None:
        one *= tl.load(weight + cls, known, other=0.0)
    factor = tl.where(known, one, float("nan"))
    row_max, row_sum = tl.load(stats + row), tl.where(kept, tl.load(stats + N + row), 1.0)
    others = of_loss * smoothing / V
    if SMOOTH:
        if of_weights is None:
            factor += others * V
        else:
            factor += others * tl.load(of_weights)
    factor += 2.0 * z_loss * of_squares * tl.where(z_loss == 0.0, 0.0, row_max + tl.log(row_sum))
    read = cols < tl.where(kept, V, 0)
    value = tl.load(x + r * x_stride + cols, read, other=0.0).to(tl.float32)
    d = factor / row_sum * _exp(value - row_max)
    if SMOOTH:
        d -= others * _weights(weight, cols, V)
    d = tl.where(cols == cls, d - one, d)
    tl.store(dx + r * dx_stride + cols, to_storage(tl.where(kept, d, 0.0), dx.dtype.element_ty), mask)


# ------------------------------------------------------------------------------- configurations
_SHAPES = ((4096, 8), (2048, 8), (1024, 4))
FWD, BWD = (Configs("any", tuple(Config({"BLOCK": block}, warps) for block, warps in _SHAPES)) for _ in range(2))
FWD_SMALL, BWD_SMALL = (Configs("small", (Config({"BLOCK": 256}, 1), Config({"BLOCK": 512}, 2))) for _ in range(2))
REDUCE = Configs("any", (Config({"BLOCK": 1024}, 8),))


# ------------------------------------------------------------------------------- launchers
class Loss(NamedTuple):
    """What the launchers of a call share."""

    target: torch.Tensor
    V: int
    ignore_index: int
    weight: torch.Tensor | None
    reduction: str
    smoothing: float
    z_loss: float
    stats: torch.Tensor
    totals: torch.Tensor

    @property
    def N(self) -> int:
        return self.target.shape[0]


def _loss(op, x, target, V, saved, ignore_index, weight, reduction, label_smoothing, z_loss) -> Loss:
    """saved: stats and totals, or None in forward, which allocates them."""
    N = target.shape[0]
    if saved is None:
        saved = empty(x, 2, N, dtype=torch.float32), empty(x, 2, dtype=torch.float32)
    scalars = known_reduction(op, reduction), label_smoothing, z_loss
    return Loss(target.contiguous(), V, ignore_index, contiguous(weight), *scalars, *(t.contiguous() for t in saved))


def _set_rows(o: Loss, x, row_losses, first: int = 0):
    """stats and losses of the rows of logits x, which begin with row `first`."""
    launch(
        loss_fwd_kernel, lambda c: x.shape[0], x, o.target, o.weight, row_losses, o.stats, first, o.N, o.V,
        x.stride(0), o.ignore_index, o.smoothing, o.z_loss, configs=FWD_SMALL if o.V <= 512 else FWD,
        WITH_SQUARES=o.reduction == "none" and o.z_loss != 0, SMOOTH=o.smoothing != 0,
    )  # fmt: skip


def _reduce(o: Loss, row_losses, loss):
    """Sets the totals and, if it is not None, the loss."""
    launch(
        loss_reduce_kernel, lambda c: 1, o.target, o.weight, row_losses, o.stats, o.totals, loss, o.N, o.V,
        o.ignore_index, o.z_loss, configs=REDUCE, MEAN=o.reduction == "mean",
    )  # fmt: skip


def _set_gradients(o: Loss, dloss, x, dx, of_weights, first: int = 0, scale=None):
    """dx from logits x, whose rows begin with row `first`. dx may be x."""
    rows = x.shape[0]
    launch(
        loss_bwd_kernel, lambda c: rows * triton.cdiv(o.V, c["BLOCK"]), x, dx, o.target, o.weight, of_weights, o.stats,
        o.totals, dloss, scale, first, o.N, o.V, x.stride(0), dx.stride(0), o.ignore_index, o.smoothing, o.z_loss,
        configs=BWD_SMALL if o.V <= 512 else BWD, REDUCTION=o.reduction, SMOOTH=o.smoothing != 0,
        in_place=(x,) if x.data_ptr() == dx.data_ptr() else (),
    )  # fmt: skip
    return dx


def _sum_of_weights(o: Loss):
    if o.weight is None or o.smoothing == 0:
        return None
    return sums_over_rows(o.weight[:, None])


def _scale_of_float16(o: Loss):
    """() in float32: the power of two that pygpt/ops/loss.py gives float16's dlogits. The totals are set."""
    bound = o.totals.new_ones(())
    if o.weight is not None and o.N:
        of_targets = o.weight[o.target.clamp(0, o.V - 1)].abs().nan_to_num(0, 0, 0)
        bound = torch.where(o.target != o.ignore_index, of_targets, 0).amax()
    bound = bound * (1 - o.smoothing)
    if o.smoothing:
        bound = bound + o.smoothing / o.V * (o.V if o.weight is None else o.weight.abs().sum())
    if o.z_loss:
        bound = bound + 2.0**14 * abs(o.z_loss) * (o.totals[0] / o.totals[1] if o.reduction == "mean" else 1)
    exponent = (bound.view(torch.int32) >> 23).clamp(27, 254)  # with its bias of 127, as in the bits of the result
    return (267 - exponent << 23).view(torch.float32)


def _rows_and_loss(o: Loss):
    """(N,) for the rows' losses, and the result, which is the same for reduction "none"."""
    row_losses = empty(o.stats, o.N)
    return row_losses, row_losses if o.reduction == "none" else empty(o.stats)


def cross_entropy_fwd(x, target, ignore_index, weight, reduction, label_smoothing, z_loss):
    """-> loss (N,) or (), stats (2, N), totals (2,)."""
    options = ignore_index, weight, reduction, label_smoothing, z_loss
    o = _loss("cross_entropy_fwd", x, target, x.shape[1], None, *options)
    row_losses, loss = _rows_and_loss(o)
    _set_rows(o, rows_of(x), row_losses)
    _reduce(o, row_losses, None if reduction == "none" else loss)
    return loss, o.stats, o.totals


def cross_entropy_bwd(dloss, x, target, stats, totals, ignore_index, weight, reduction, label_smoothing, z_loss):
    """-> dx (N, V)."""
    options = ignore_index, weight, reduction, label_smoothing, z_loss
    o = _loss("cross_entropy_bwd", x, target, x.shape[1], (stats, totals), *options)
    return _set_gradients(o, dloss.contiguous(), rows_of(x), empty(x, *x.shape), _sum_of_weights(o))


class _Linear(NamedTuple):
    """The linear layer before the loss."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def chunks(self) -> list[slice]:
        """Rows that are taken together: so many that updating dW costs little beside its product, and more while their
        logits stay in L2. One empty chunk if there are no rows."""
        N, V = self.x.shape[0], self.weight.shape[0]
        count = max(1, triton.cdiv(N, max(LEAST_ROWS, L2_BYTES // (4 * V))))
        size = triton.cdiv(N, count)
        return [slice(i * size, min(N, (i + 1) * size)) for i in range(max(1, triton.cdiv(N, max(size, 1))))]

    def logits(self, rows: slice, out):
        return _gemm(self.x[rows], self.weight.mT, out[: rows.stop - rows.start], Epilogue(bias=self.bias))


class _Gradients:
    """dx, dw and db, those that are needed, chunk by chunk."""

    def __init__(self, linear: _Linear, needs, dtype: torch.dtype):
        x, w, _ = linear
        self.linear, self.dtype = linear, dtype
        self.dx = empty(x, *x.shape, dtype=dtype) if needs[0] else None
        self.dw = empty(x, *w.shape, dtype=torch.float32) if needs[1] else None
        self.db: list | None = [] if needs[2] else None

    def add(self, rows: slice, dlogits):
        x, w, _ = self.linear
        if self.dx is not None:
            _gemm(dlogits, w, self.dx[rows])
        if self.dw is not None:
            last = rows.stop == x.shape[0]
            out = empty(x, *w.shape, dtype=self.dtype) if last and self.dtype != torch.float32 else self.dw
            _gemm(dlogits.mT, x[rows], out, Epilogue(addend=self.dw if rows.start else None))
            self.dw = out
        if self.db is not None:
            self.db.append(sums_over_rows(dlogits, dtype=torch.float32))

    def result(self, scale=None):
        """scale: a factor of the dlogits that the results do not have."""
        db = None if self.db is None else column_sums(torch.stack(self.db), dtype=self.dtype)[0]
        results = self.dx, self.dw, db
        if scale is not None:
            results = tuple(None if g is None else g.mul_(1 / scale) for g in results)
        return tuple(self.linear.x.new_empty(0, dtype=self.dtype) if g is None else g for g in results)


def _buffers(linear: _Linear, with_gradients: bool):
    """A chunk's logits in float32, and its dlogits in the operands' dtype, which for float32 are the same memory."""
    (first, *_), V, x = linear.chunks(), linear.weight.shape[0], linear.x
    logits = empty(x, first.stop, V, dtype=torch.float32)
    return logits, logits if x.dtype == torch.float32 or not with_gradients else empty(x, first.stop, V)


def linear_cross_entropy_fwd(
    x, linear_weight, target, linear_bias, needs, ignore_index, weight, reduction, label_smoothing, z_loss
):
    """-> loss, dx, dw, db, stats, totals."""
    options = ignore_index, weight, reduction, label_smoothing, z_loss
    o = _loss("linear_cross_entropy_fwd", x, target, linear_weight.shape[0], None, *options)
    linear = _Linear(rows_of(x), rows_of(linear_weight), contiguous(linear_bias))
    formed = [need and reduction != "none" for need in needs]
    gradients, of_weights = _Gradients(linear, formed, torch.float32), _sum_of_weights(o)
    row_losses, loss = _rows_and_loss(o)
    logits, dlogits = _buffers(linear, any(formed))
    _reduce(o, None, None)
    scale = _scale_of_float16(o) if any(formed) and x.dtype == torch.float16 else None
    for rows in linear.chunks():
        of_chunk = linear.logits(rows, logits)
        _set_rows(o, of_chunk, row_losses, rows.start)
        if any(formed):
            of_rows = dlogits[: len(of_chunk)]
            gradients.add(rows, _set_gradients(o, None, of_chunk, of_rows, of_weights, rows.start, scale))
    if reduction != "none":
        _reduce(o, row_losses, loss)
    return loss, *gradients.result(scale), o.stats, o.totals


def linear_cross_entropy_bwd(
    dloss, x, linear_weight, target, linear_bias, stats, totals, needs, ignore_index, weight, reduction,
    label_smoothing, z_loss,
):  # fmt: skip
    """-> dx, dw, db."""
    options = ignore_index, weight, reduction, label_smoothing, z_loss
    o = _loss("linear_cross_entropy_bwd", x, target, linear_weight.shape[0], (stats, totals), *options)
    linear = _Linear(rows_of(x), rows_of(linear_weight), contiguous(linear_bias))
    gradients, of_weights, upstream = _Gradients(linear, needs, x.dtype), _sum_of_weights(o), dloss.contiguous()
    logits, dlogits = _buffers(linear, any(needs))
    for rows in linear.chunks():
        of_chunk = linear.logits(rows, logits)
        of_rows = dlogits[: len(of_chunk)]
        gradients.add(rows, _set_gradients(o, upstream, of_chunk, of_rows, of_weights, rows.start))
    return gradients.result()
