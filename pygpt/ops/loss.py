"""cross_entropy of logits x (N, V) and classes (N,), and linear_cross_entropy, whose logits are a linear layer's.

    p = softmax(x),   lse = log(sum of exp(x)),   nll = lse - x[target]
    loss of a row = (1 - s) w[target] nll + s / V sum_c w[c] (lse - x[c]) + z lse^2     s = label_smoothing, z = z_loss
    dx = p (g ((1 - s) w[target] + s / V sum(w)) + 2 z gz lse) - g s / V w - g (1 - s) w[target] [c = target]

weight w (V,) is 1 where it is None. Rows whose target is ignore_index have loss 0 and gradients 0, and are not read.
"mean" divides the first two terms by the sum of w[target] and the last one by the number of kept targets, so there
g = dloss / totals[0] and gz = dloss / totals[1]; otherwise g = gz = dloss.

Backward reads stats (2, N), max(x) and the sum of exp(x - max(x)) of each row. They keep the digits that lse would lose
where all logits of a row are large. The smoothing term is that of Szegedy et al. 2016, the last one that of de
Brébisson and Vincent 2016 and of PaLM (Chowdhery et al. 2022). Losses and statistics are float32 (float64 for float64).
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from ..dispatch import Op, call, lookup, register, without_values
from .common import Spec, acc, backward_kernels, composite_gradients, only, savable, wanted
from .loss_arguments import (
    REDUCTIONS,
    Options,
    expression,
    fits,
    known_reduction,
    linear_expression,
    prepare_cross_entropy,
    prepare_linear_cross_entropy,
)


# ------------------------------------------------------------------------------- cross_entropy: the mathematics
def cross_entropy_composite(x, target, *options):
    return expression(acc(x), target, Options(*options))


def _of_targets(target: Tensor, classes: int, o: Options, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) each: whether the row is kept, its class or 0, and its class's weight or 0."""
    kept = target != o.ignore_index
    index = torch.where(kept, target, 0)
    weight = like.new_ones(1).expand(classes) if o.weight is None else o.weight
    return kept, index, torch.where(kept, weight[index], 0)


def cross_entropy_fwd(
    x: Tensor, target: Tensor, ignore_index: int, weight: Tensor | None, reduction: str, label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> loss (N,) for reduction "none", else (); stats (2, N); totals (2,): the sum of w[target] over the kept rows,
    and their number."""
    o, xa = Options(ignore_index, weight, reduction, label_smoothing, z_loss), acc(x)
    kept, index, of_target = _of_targets(target, x.shape[1], o, xa)
    row_max = xa.amax(-1)
    shifted = xa - row_max[:, None]
    row_sum = shifted.exp().sum(-1)
    log_sum = row_sum.log()
    losses = (1 - label_smoothing) * of_target * (log_sum - shifted.gather(1, index[:, None])[:, 0])
    if label_smoothing:
        others = log_sum[:, None] - shifted
        losses = losses + label_smoothing / x.shape[1] * (others if weight is None else others * weight).sum(-1)
    losses = torch.where(kept, losses, 0)
    squares = torch.where(kept, z_loss * (row_max + log_sum).square(), 0) if z_loss else torch.zeros_like(losses)
    stats = torch.where(kept, torch.stack((row_max, row_sum)), 0)
    totals = torch.stack((of_target.sum(), kept.sum().to(xa.dtype)))
    if known_reduction("cross_entropy_fwd", reduction) == "none":
        return losses + squares, stats, totals
    if reduction == "sum":
        return (losses + squares).sum(), stats, totals
    mean = losses.sum() / totals[0]
    return mean + squares.sum() / totals[1] if z_loss else mean, stats, totals


def _softmax_term(dloss, x, target, stats, totals, o: Options):
    """The first term of dx, and what the others are made of: the factors of the target's logit and of all."""
    row_max, row_sum = stats
    _, _, of_target = _of_targets(target, x.shape[1], o, stats)
    g, gz = (dloss / totals[0], dloss / totals[1]) if o.reduction == "mean" else (dloss, dloss)
    one, others = g * (1 - o.label_smoothing) * of_target, g * o.label_smoothing / x.shape[1]
    of_weights = x.shape[1] if o.weight is None else o.weight.sum()
    factor = one + others * of_weights + 2 * o.z_loss * gz * (row_max + row_sum.log())
    return (factor / row_sum)[:, None] * (acc(x) - row_max[:, None]).exp(), one, others.expand_as(factor)


def cross_entropy_bwd(
    dloss: Tensor, x: Tensor, target: Tensor, stats: Tensor, totals: Tensor, ignore_index: int, weight: Tensor | None,
    reduction: str, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """dloss like loss -> dx (N, V), contiguous."""
    known_reduction("cross_entropy_bwd", reduction)
    o = Options(ignore_index, weight, reduction, label_smoothing, z_loss)
    kept, index, _ = _of_targets(target, x.shape[1], o, stats)
    dx, one, others = _softmax_term(dloss, x, target, stats, totals, o)
    if label_smoothing:
        dx = dx - others[:, None] * (1 if weight is None else weight)
    dx = dx.scatter_add(1, index[:, None], -one[:, None])
    return torch.where(kept[:, None], dx, 0).to(x.dtype)


# ------------------------------------------------------------------------------- linear_cross_entropy: the mathematics
def linear_cross_entropy_composite(x, linear_weight, target, linear_bias, needs, *options):
    return expression(_logits(x, linear_weight, linear_bias), target, Options(*options))


def _logits(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    product = acc(x) @ acc(linear_weight).mT
    return product if linear_bias is None else product + acc(linear_bias)


def linear_cross_entropy_fwd(
    x: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, needs: list[bool], ignore_index: int,
    weight: Tensor | None, reduction: str, label_smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x (N, K), linear_weight (V, K), linear_bias (V,) -> loss, dx, dw, db, stats, totals.

    dx, dw, db: those in ``needs``, of the sum of the losses or of totals[0] times their mean. They are float32 (float64
    for float64), and without elements for reduction "none".

    The compiled backends round dlogits to the dtype of x before the products. Float16's they multiply by a power of two
    first, and divide the float32 sums by it, as the upstream gradient, which may scale them, comes later. It is the
    largest one that leaves B below 2^14, with B = (1 - s) max |w[target]| + s / V sum |w| + 2^14 |z_loss| gz over the
    kept rows and gz = 1, or totals[0] / totals[1] for "mean". So no gradient overflows where |lse| is below 2^13.
    """
    options = ignore_index, weight, reduction, label_smoothing, z_loss
    logits = _logits(x, linear_weight, linear_bias)
    loss, stats, totals = cross_entropy_fwd(logits, target, *options)
    formed = [need and reduction != "none" for need in needs]
    if not any(formed):
        return loss, *(logits.new_empty(0) for _ in needs), stats, totals  # type: ignore[return-value]
    upstream = totals[0] if reduction == "mean" else torch.ones_like(loss)
    dlogits = cross_entropy_bwd(upstream, logits, target, stats, totals, *options)
    return loss, *_gradients(dlogits, x, linear_weight, formed, logits), stats, totals


def linear_cross_entropy_bwd(
    dloss: Tensor, x: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, stats: Tensor,
    totals: Tensor, needs: list[bool], ignore_index: int, weight: Tensor | None, reduction: str,
    label_smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dw, db, where forward has not formed them. The logits are computed again."""
    logits = _logits(x, linear_weight, linear_bias)
    options = ignore_index, weight, reduction, label_smoothing, z_loss
    dlogits = cross_entropy_bwd(dloss, logits, target, stats, totals, *options)
    return _gradients(dlogits, x, linear_weight, needs, x)


def _gradients(dlogits, x, linear_weight, needs, like):
    return wanted(needs, (dlogits @ acc(linear_weight), dlogits.mT @ acc(x), dlogits.sum(0)), like)


def _scaled(g: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """g * factor in dtype, without g's size in float32 beside it unless the call is traced or transformed."""
    if g.dtype == dtype or without_values((g, factor)) or _are_functorch_transforms_active():
        return (g * factor).to(dtype)
    out = g.new_empty(g.shape, dtype=dtype)
    lines = max(1, _LINES // max(1, g.shape[-1]))  # on a CPU, torch keeps the product of a call in float32
    for part, of_part in zip(out.split(lines), g.split(lines), strict=True):
        torch.mul(of_part, factor, out=part)
    return out


_LINES = 1 << 22  # elements of g that are scaled together


# ------------------------------------------------------------------------------- autograd
class CrossEntropy(torch.autograd.Function):
    """(kernels, x, target, *options) -> loss."""

    @staticmethod
    def forward(ctx, kernels, x, target, ignore_index, weight, *options):
        ctx.kernels, ctx.options = kernels, (ignore_index, *options)
        loss, stats, totals = kernels.cross_entropy_fwd(x, target, ignore_index, weight, *options)
        ctx.save_for_backward(x, savable(target), savable(weight), stats, totals)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if dloss is None:
            return (None,) * 8
        x, target, weight, stats, totals = ctx.saved_tensors
        options = ctx.options[0], weight, *ctx.options[1:]
        kernels = backward_kernels(ctx)
        if kernels is None:
            (dx,) = composite_gradients(cross_entropy_composite, (x, target, *options), (True,), (dloss,))
        else:
            dx = kernels.cross_entropy_bwd(dloss, x, target, stats, totals, *options)
        return None, dx, *(None,) * 6


class LinearCrossEntropy(torch.autograd.Function):
    """(kernels, x, linear_weight, target, linear_bias, needs, *options) -> loss."""

    @staticmethod
    def forward(ctx, kernels, x, linear_weight, target, linear_bias, needs, ignore_index, weight, *options):
        ctx.kernels, ctx.options, ctx.formed = kernels, (ignore_index, *options), needs
        args = x, linear_weight, target, linear_bias, needs, ignore_index, weight, *options
        loss, *formed, stats, totals = kernels.linear_cross_entropy_fwd(*args)
        tensors = x, linear_weight, target, linear_bias, weight
        ctx.save_for_backward(*map(savable, tensors), *formed, stats, totals)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if dloss is None:
            return (None,) * 11
        x, linear_weight, target, linear_bias, weight, *formed, stats, totals = ctx.saved_tensors
        options = ctx.options[0], weight, *ctx.options[1:]
        needs = ctx.needs_input_grad[1], ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        kernels = backward_kernels(ctx)
        if kernels is None:
            args = x, linear_weight, target, linear_bias, needs, *options
            of_args = needs[0], needs[1], False, needs[2]
            dx, dw, _, db = composite_gradients(linear_cross_entropy_composite, args, of_args, (dloss,))
        elif options[2] != "none":
            if any(need and not made for made, need in zip(ctx.formed, needs, strict=True)):  # a graph traced without
                args = x, linear_weight, target, linear_bias, needs, *options
                formed = kernels.linear_cross_entropy_fwd(*args)[1:4]
            factor = dloss
            if options[2] == "mean":  # where no target is kept, the loss is NaN and the gradients are 0
                factor = torch.where(totals[1] > 0, dloss / totals[0], 0)
            dx, dw, db = (_scaled(g, factor, x.dtype) if need else None for g, need in zip(formed, needs, strict=True))
        else:
            args = x, linear_weight, target, linear_bias, stats, totals, needs, *options
            dx, dw, db = only(needs, kernels.linear_cross_entropy_bwd(dloss, *args))
        return None, dx, dw, None, db, *(None,) * 6


# ------------------------------------------------------------------------------- the public functions
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Returns the cross-entropy of logits and classes, as torch.nn.functional.cross_entropy does.

    ``input`` has shape ``(V,)``, ``(N, V)`` or ``(N, V, d1, ...)``, and ``target``, int64, the same shape without V.
    ``weight (V,)`` weighs the classes. Targets equal to ``ignore_index`` have loss and gradient 0, whatever their
    logits are. ``label_smoothing`` in [0, 1] mixes the uniform distribution into the targets. ``reduction`` is "none",
    "sum" or "mean", which divides by the sum of the targets' weights.

    ``z_loss`` adds z_loss * logsumexp(logits)^2 to the loss of each kept target, which keeps the logits from drifting
    (PaLM; Chowdhery et al. 2022). Weights and smoothing do not change this part, and "mean" divides it by the number of
    kept targets.

    The logits are read once in forward, with label_smoothing twice. Backward reads them once, and writes their gradient
    once. Targets that are probabilities (of input's shape) go to PyTorch. Shapes that do not fit raise ValueError,
    wrong types TypeError. A class that is out of range raises IndexError on a CPU. On a GPU its row has loss and
    gradients NaN.
    """
    kernel = lookup("cross_entropy", input, target)
    if kernel is None or not fits(input, target, ignore_index, weight, reduction, label_smoothing, z_loss):
        return call(
            "cross_entropy", input, target, weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip
    return kernel(input, target, ignore_index, None, reduction, label_smoothing, z_loss)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Returns cross_entropy(linear(input, linear_weight, linear_bias), target, ...), whose logits it forms by chunks.

    ``input (N, K)`` or ``(K,)``, ``linear_weight (V, K)``, ``linear_bias (V,)`` or None, and ``target (N,)`` or ``()``,
    int64. The arguments are those of torch.nn.functional.linear_cross_entropy, which torch has since 2.13, and
    ``z_loss`` is that of `cross_entropy`; ``ignore_index`` None is -100. ``options``, torch's choice of chunks, is
    accepted and changes nothing.

    Rows are taken in chunks, so that the logits of one chunk exist at a time (Wijmans et al. 2024 have the idea for
    GPUs); few rows are one chunk. With reduction "mean" or "sum" the gradients are formed in forward, while a chunk's
    logits are there, and backward only scales them. With "none" backward computes the logits again. Logits are not
    rounded to a 16-bit dtype. A graph of the gradients (create_graph) is PyTorch's, which holds all logits.

    Targets that are probabilities and a linear_weight of more dimensions go to PyTorch. Errors are those of
    `cross_entropy`.
    """
    return call(
        "linear_cross_entropy", input, linear_weight, target, linear_bias=linear_bias, weight=weight,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, options=options, z_loss=z_loss,
    )  # fmt: skip


# ------------------------------------------------------------------------------- FLOPs, verify
def _linear_flops(x, linear_weight, target, linear_bias, needs, ignore_index, weight, reduction, *_, out_val=None):
    """Counts a multiplication and an addition for each product, as torch does for mm and addmm."""
    return 2 * x.numel() * len(linear_weight) * (1 + (reduction != "none" and sum(needs[:2])))


def _linear_bwd_flops(dloss, x, linear_weight, target, linear_bias, stats, totals, needs, *_, out_val=None):
    return 2 * x.numel() * len(linear_weight) * (1 + sum(needs[:2]))


_HOW: dict[str, Any] = {
    "ignored": 0,  # from row 1 on, every how many-th target is ignored; 0 is none
    "weight": 0,  # whether classes have weights
    "reduction": "mean",
    "smoothing": 0.0,
    "z": 0.0,
}
_SHAPES: tuple[dict, ...] = (
    {},
    {"ignored": 3, "weight": 1, "smoothing": 0.1, "z": 1e-2},
    {"ignored": 3, "reduction": "sum", "z": 1e-2},
    {"reduction": "none", "weight": 1},
)
_CHOICES = {"reduction": REDUCTIONS}


def _draw_rest(random, d):
    """The target, and the options, of d["N"] rows. About every eighth class is that of several rows."""
    N, V = d["N"], max(d["V"], 1)
    target = (random(N).abs() * V).long() % V if N else torch.zeros(0, dtype=torch.int64)
    if d["ignored"]:
        target[1 :: d["ignored"]] = -100
    weight = random(d["V"]).abs() + 0.1 if d["weight"] else None
    return target, (-100, weight, d["reduction"], d["smoothing"], d["z"])


def _draw(random, d):
    target, options = _draw_rest(random, d)
    return random(d["N"], d["V"]) * d["gain"] + d["mean"], target, *options


def _draw_linear(random, d):
    target, options = _draw_rest(random, d)
    bias = random(d["V"]) if d["bias"] else None
    weight = random(d["V"], d["K"]) / max(d["K"], 1) ** 0.5
    return random(d["N"], d["K"]), weight, target, bias, (True,) * 3, *options


def _cancelled(args, grads):
    """The softmax's term, which the target's own and that of smoothing cancel where a class is certain."""
    x, target, *options = args
    _, stats, totals = cross_entropy_fwd(*args)
    term, *_ = _softmax_term(grads[0], x, target, stats, totals, Options(*options))
    return {"dx": torch.where(target[:, None] == options[0], 0, term)}


def _cancelled_linear(args, grads):
    x, linear_weight, target, linear_bias, _, *options = args
    term = _cancelled((_logits(x, linear_weight, linear_bias), target, *options), grads)["dx"]
    return {"dx": term @ linear_weight, "dlinear_weight": term.mT @ x, "dlinear_bias": term.sum(0)}


def _canonical(x, target, ignore_index, weight, *options):
    return x, target, ignore_index, acc(weight), *options


def _canonical_linear(x, linear_weight, target, linear_bias, needs, ignore_index, weight, *options):
    return x, linear_weight, target, linear_bias, needs, ignore_index, acc(weight), *options


def _call(x, target, *options):
    o = Options(*options)
    return cross_entropy(x, target, o.weight, **o.scalars())


def _call_linear(x, linear_weight, target, linear_bias, needs, *options):
    o = Options(*options)
    return linear_cross_entropy(x, linear_weight, target, linear_bias=linear_bias, weight=o.weight, **o.scalars())


register(
    Op(
        "cross_entropy",
        public=cross_entropy,
        prepare=prepare_cross_entropy,
        composite=cross_entropy_composite,
        fwd=cross_entropy_fwd,
        bwd=cross_entropy_bwd,
        function=CrossEntropy,
        integers=("target",),
        specs={
            "cross_entropy": Spec(
                "cross_entropy",
                inputs=("x",),
                dims={"N": 64, "V": 1000, "mean": 0.0, "gain": 1.0, **_HOW},
                draw=_draw,
                canonical=_canonical,
                call=_call,
                shapes=(*_SHAPES, {"mean": 300.0, "gain": 4.0}),
                cancelled=_cancelled,
                yardstick=lambda x, target, *options: expression(x, target, Options(*options)),
                choices=_CHOICES,
            )
        },
    )
)
register(
    Op(
        "linear_cross_entropy",
        public=linear_cross_entropy,
        prepare=prepare_linear_cross_entropy,
        composite=linear_cross_entropy_composite,
        fwd=linear_cross_entropy_fwd,
        bwd=linear_cross_entropy_bwd,
        function=LinearCrossEntropy,
        integers=("target",),
        flops=(_linear_flops, _linear_bwd_flops),
        lower_precision=True,
        specs={
            "linear_cross_entropy": Spec(
                "linear_cross_entropy",
                inputs=("x", "linear_weight", "target", "linear_bias"),
                dims={"N": 64, "K": 48, "V": 300, "bias": 0, **_HOW},
                draw=_draw_linear,
                canonical=_canonical_linear,
                call=_call_linear,
                shapes=({"bias": 1}, *_SHAPES[1:]),
                cancelled=_cancelled_linear,
                yardstick=lambda x, linear_weight, target, linear_bias, needs, *options: linear_expression(
                    x, linear_weight, target, linear_bias, Options(*options)
                ),
                choices=_CHOICES,
            )
        },
    )
)
