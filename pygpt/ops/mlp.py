"""linear, y = x W^T + b, and mlp, two linear layers around an activation.

linear: x (..., K), weight (N, K), bias (N,) or None -> y (..., N). Backward needs weight, and x if weight is trained.
mlp: x (..., C), fc_weight (H, C), fc_bias (H,), proj_weight (O, H), proj_bias (O,) -> y (..., O). Bias and activation
run in the first GEMM's epilogue, and the activation's gradient runs in the backward GEMM's epilogue. Backward keeps the
hidden layer after the activation. Except for relu, whose derivative follows from its output, it also keeps it before.
With save="input" it keeps neither, and backward computes both again.

A gated activation has fc_weight (2 H, C) and fc_bias (2 H,), the gate's H rows before the value's, and the hidden layer
is act(gate) * value.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Call, Op, call, lookup, register
from .activation import ACTIVATIONS, GATED, SAVES_INPUT, known
from .common import (
    Spec,
    acc,
    backward_kernels,
    check_tensors,
    composite_gradients,
    lead,
    only,
    rows,
    savable,
    unread,
    wanted,
)

_torchs = F.linear  # bound now, because a user may replace it by ours later


# ------------------------------------------------------------------------------- linear: the mathematics
def linear_composite(x, weight, bias):
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""
    return _torchs(x, weight, bias)


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = acc(x) @ acc(weight).mT
    return (y if bias is None else y + acc(bias)).to(x.dtype)


def linear_bwd(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy W, dW = dy^T x, db = the sum of dy's rows."""
    dy2, x2 = acc(rows(dy)), acc(rows(x))
    return wanted(needs, ((dy2 @ acc(weight)).view(x.shape), dy2.mT @ x2, dy2.sum(0)), x)


class Linear(torch.autograd.Function):
    """(kernels, x, weight, bias) -> y."""

    @staticmethod
    def forward(ctx, kernels, x, weight, bias):
        ctx.kernels, ctx.leading = kernels, x.shape[:-1]
        ctx.save_for_backward(x if weight.requires_grad else None, savable(weight))  # only dW reads x
        ctx.set_materialize_grads(False)
        return kernels.linear_fwd(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 4
        x, weight = ctx.saved_tensors
        x = unread(dy, *ctx.leading, weight.shape[1]) if x is None else x
        kernels, needs = backward_kernels(ctx), ctx.needs_input_grad[1:]
        if kernels is None:
            bias = unread(weight, weight.shape[0]) if needs[2] else None
            return None, *composite_gradients(linear_composite, (x, weight, bias), needs, (dy,))
        return None, *only(needs, kernels.linear_bwd(dy, x, weight, needs))


# ------------------------------------------------------------------------------- linear: the public function
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns input weight^T + bias.

    ``input (..., K)``, ``weight (N, K)`` and ``bias (N,)`` or None give ``(..., N)``. Products are summed in float32
    (float64 for float64). What torch.nn.functional.linear takes beyond that, it serves itself: a vector as weight, a
    bias that broadcasts, integer and complex tensors. Shapes that torch does not take either raise ValueError, and
    dtypes and types that it does not take raise TypeError.
    """
    kernel = lookup("linear", input, weight, bias)
    if kernel is None or shape_error("linear", input.shape, weight.shape, bias):
        return call("linear", input, weight, bias)
    return kernel(input, weight, bias)


def shape_error(op, of_input, of_weight, bias, names=("input", "weight", "bias")) -> str:
    """What is wrong with the shapes of x, W and b, or an empty string. of_input, of_weight: the shapes of x and W."""
    if len(of_weight) != 2:
        return f"pygpt.{op}: {names[1]} must be a matrix, got shape {tuple(of_weight)}"
    if not of_input:
        return f"pygpt.{op}: {names[0]} needs at least 1 dimension, got a scalar"
    N, K = of_weight
    if of_input[-1] != K:
        return f"pygpt.{op}: {names[0]} has {of_input[-1]} features, {names[1]} {tuple(of_weight)} wants {K}"
    if bias is not None and bias.shape != (N,):
        return f"pygpt.{op}: {names[2]} must have shape ({N},), got {tuple(bias.shape)}"
    return ""


def _prepare_linear(input, weight, bias=None) -> Call:
    error = check_tensors("linear", (input, weight, bias), one_dtype=True)
    if error is None and (misfit := shape_error("linear", input.shape, weight.shape, bias)):
        error = ValueError(misfit)
    args = input, weight, bias
    return Call(args, torch=partial(_torchs, *args), error=error, fast=args if error is None else None)


# ------------------------------------------------------------------------------- mlp: the mathematics
SAVES = ("all", "input")


def mlp_composite(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, save="all"):
    """act(x fc_weight^T + fc_bias) proj_weight^T + proj_bias; x (..., C), weights (H, C) or gated (2 H, C), (O, H)."""
    hidden = _hidden(ACTIVATIONS[activation][0], _torchs(x, fc_weight, fc_bias), activation)
    return _torchs(hidden, proj_weight, proj_bias)


def _hidden(act, pre, activation):
    if activation not in GATED:
        return act(pre)
    gate, value = pre.chunk(2, -1)
    return act(gate) * value


def mlp_fwd(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
    activation: str, save: str = "all",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y (..., O), hidden (..., H) after the activation, pre (..., H or gated 2 H) before it (SAVES_INPUT only).

    With save="input", hidden and pre have no elements.
    """
    act = ACTIVATIONS[known("mlp_fwd", activation)][1]
    saves = saves_all("mlp_fwd", save)
    pre = acc(x) @ acc(fc_weight).mT
    pre = pre if fc_bias is None else pre + acc(fc_bias)
    hidden = _hidden(act, pre, activation).to(x.dtype)
    saved = pre.to(x.dtype) if saves and activation in SAVES_INPUT else x.new_empty(0)
    return linear_fwd(hidden, proj_weight, proj_bias), hidden if saves else x.new_empty(0), saved


def saves_all(op, save) -> bool:
    """Whether mlp_fwd returns hidden and pre. Raises what the compiled kernels raise for an unknown value."""
    if save not in SAVES:
        raise RuntimeError(f"pygpt.{op}: save must be 'all' or 'input', got {save!r}")
    return save == "all"


def mlp_bwd(
    dy: Tensor, x: Tensor, fc_weight: Tensor, proj_weight: Tensor, hidden: Tensor, pre: Tensor,
    activation: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias."""
    _, act, gradient = ACTIVATIONS[known("mlp_bwd", activation)]
    dy2, x2, h2 = (acc(rows(t)) for t in (dy, x, hidden))
    saved, d = acc(rows(pre)) if activation in SAVES_INPUT else h2, dy2 @ acc(proj_weight)
    if activation in GATED:
        gate, value = saved.chunk(2, -1)
        dpre = torch.cat((gradient(d * value, gate), d * act(gate)), -1)
    else:
        dpre = gradient(d, saved)
    grads = ((dpre @ acc(fc_weight)).view(x.shape), dpre.mT @ x2, dpre.sum(0), dy2.mT @ h2, dy2.sum(0))
    return wanted(needs, grads, x)


class MLP(torch.autograd.Function):
    """(kernels, x, fc_weight, fc_bias, proj_weight, proj_bias, activation, save) -> y."""

    @staticmethod
    def forward(ctx, kernels, x, fc_weight, fc_bias, proj_weight, proj_bias, activation, save="all"):
        ctx.kernels, ctx.activation, ctx.save = kernels, activation, save
        y, hidden, pre = kernels.mlp_fwd(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, save)
        if save == "input":
            hidden = pre = None
        elif not proj_weight.requires_grad and activation in SAVES_INPUT:
            hidden = None  # only dproj_weight reads it
        ctx.save_for_backward(x, fc_weight, savable(fc_bias), proj_weight, hidden, pre)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 8
        x, fc_weight, fc_bias, proj_weight, hidden, pre = ctx.saved_tensors
        kernels, needs = backward_kernels(ctx), ctx.needs_input_grad[1:6]
        if kernels is None:
            proj_bias = unread(proj_weight, proj_weight.shape[0]) if needs[4] else None
            args = x, fc_weight, fc_bias, proj_weight, proj_bias, ctx.activation
            return None, *composite_gradients(mlp_composite, args, needs, (dy,)), None, None
        if ctx.save == "input":  # no row of proj_weight: the second product is empty
            _, hidden, pre = kernels.mlp_fwd(x, fc_weight, fc_bias, proj_weight[:0], None, ctx.activation, "all")
        elif hidden is None:
            hidden = unread(dy, *dy.shape[:-1], proj_weight.shape[1])
        grads = kernels.mlp_bwd(dy, x, fc_weight, proj_weight, hidden, pre, ctx.activation, needs)
        return None, *only(needs, grads), None, None


# ------------------------------------------------------------------------------- mlp: the public function
def mlp(
    input: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str = "gelu",
    *,
    save: str = "all",
) -> Tensor:
    """Returns linear(act(linear(input, fc_weight, fc_bias)), proj_weight, proj_bias), computed as one op.

    ``input (..., C)``, ``fc_weight (H, C)``, ``fc_bias (H,)`` or None, ``proj_weight (O, H)`` and ``proj_bias (O,)`` or
    None give ``(..., O)``. ``activation`` is "gelu" (exact), "gelu_tanh", "relu" or "relu2" (relu squared; So et al.
    2021), or gated (Shazeer 2020): "swiglu" multiplies silu(gate) by value, "geglu" the exact gelu(gate). Then
    ``fc_weight (2 H, C)`` has the gate's rows first, as `pygpt.nn.fuse_gate` makes it, and ``fc_bias (2 H,)`` alike.
    The bias and the activation run in the first product's epilogue.

    ``save="input"`` keeps nothing of the hidden layer for backward, which then repeats the first product. The gradients
    have the same bits as with "all".

    Another activation, another ``save``, or shapes that do not fit, raise ValueError. Unequal dtypes and wrong types,
    such as integer tensors, raise TypeError.
    """
    args = input, fc_weight, fc_bias, proj_weight, proj_bias
    kernel = lookup("mlp", *args)
    if kernel is None or activation not in ACTIVATIONS or save not in SAVES or _mlp_shape_error(*args, activation):
        return call("mlp", *args, activation, save=save)
    return kernel(*args, activation, save)


def _mlp_shape_error(input, fc_weight, fc_bias, proj_weight, proj_bias, activation) -> str:
    of_fc = fc_weight.shape
    if error := shape_error("mlp", input.shape, of_fc, fc_bias, ("input", "fc_weight", "fc_bias")):
        return error
    if activation in GATED and of_fc[0] % 2:
        return f"pygpt.mlp: fc_weight must have an even number of rows for {activation}, got {tuple(of_fc)}"
    hidden = (of_fc[0] // 2 if activation in GATED else of_fc[0],)
    return shape_error("mlp", hidden, proj_weight.shape, proj_bias, ("the hidden layer", "proj_weight", "proj_bias"))


def _prepare_mlp(input, fc_weight, fc_bias, proj_weight, proj_bias, activation="gelu", *, save="all") -> Call:
    tensors = input, fc_weight, fc_bias, proj_weight, proj_bias
    if activation not in ACTIVATIONS:
        raise ValueError(f"pygpt.mlp: unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if save not in SAVES:
        raise ValueError(f"pygpt.mlp: save must be 'all' or 'input', got {save!r}")
    if error := check_tensors("mlp", tensors, one_dtype=True):
        return Call((*tensors, activation, save), error=error)
    if misfit := _mlp_shape_error(*tensors, activation):
        raise ValueError(misfit)
    return Call((*tensors, activation, save), fast=tensors)


# ------------------------------------------------------------------------------- FLOPs, verify
def _linear_flops(x, weight, bias=None, *, out_val=None):
    """Counts a multiplication and an addition for each product, as torch does for mm and addmm."""
    return 2 * x.numel() * len(weight)


def _linear_bwd_flops(dy, x, weight, needs, *, out_val=None):
    return _linear_flops(x, weight) * sum(needs[:2])


def _mlp_flops(x, fc_weight, fc_bias, proj_weight, *_, out_val=None):
    return _linear_flops(x, fc_weight) + 2 * rows(x).shape[0] * proj_weight.numel()


def _mlp_bwd_flops(dy, x, fc_weight, proj_weight, hidden, pre, activation, needs, *, out_val=None):
    fc, proj = _linear_flops(x, fc_weight), _linear_flops(hidden, proj_weight)
    return fc * sum(needs[:2]) + proj * (any(needs[:3]) + needs[3])


def _weight(random, n, k):
    return random(n, k) / max(k, 1) ** 0.5


def _draw_linear(random, d):
    bias = random(d["N"]) if d["bias"] else None
    return random(*lead(d["M"]), d["K"]), _weight(random, d["N"], d["K"]), bias


def _draw_mlp(random, d):
    F = 2 * d["H"] if d["activation"] in GATED else d["H"]
    biases = (random(F), random(d["O"])) if d["bias"] else (None, None)
    fc, proj = _weight(random, F, d["C"]), _weight(random, d["O"], d["H"])
    return random(*lead(d["M"]), d["C"]), fc, biases[0], proj, biases[1], d["activation"], d["save"]


def _off_the_kink(args):
    """Whether no hidden unit of relu is so close to 0 that rounding decides whether it has a gradient."""
    x, weight, bias, _, _, activation, _ = args
    if activation != "relu" or not x.numel():
        return True
    pre = linear_composite(x.double(), weight.double(), None if bias is None else bias.double()).abs()
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return not pre.numel() or bool(pre.min() > 4 * eps * pre.max())


register(
    Op(
        "linear",
        public=linear,
        prepare=_prepare_linear,
        composite=linear_composite,
        fwd=linear_fwd,
        bwd=linear_bwd,
        function=Linear,
        flops=(_linear_flops, _linear_bwd_flops),
        lower_precision=True,
        specs={
            "linear": Spec(
                "linear",
                inputs=("x", "weight", "bias"),
                dims={"M": 128, "K": 256, "N": lambda d: d["K"], "bias": 1},
                draw=_draw_linear,
                call=linear,
                shapes=({}, {"bias": 0, "N": 33}),
            )
        },
    )
)
register(
    Op(
        "mlp",
        public=mlp,
        prepare=_prepare_mlp,
        composite=mlp_composite,
        fwd=mlp_fwd,
        bwd=mlp_bwd,
        function=MLP,
        flops=(_mlp_flops, _mlp_bwd_flops),
        lower_precision=True,
        specs={
            "mlp": Spec(
                "mlp",
                inputs=("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias"),
                dims={
                    "M": 128,
                    "C": 128,
                    "H": lambda d: 4 * d["C"],
                    "O": lambda d: d["C"],
                    "bias": 1,
                    "activation": "gelu",
                    "save": "all",
                },
                draw=_draw_mlp,
                call=lambda *args: mlp(*args[:-1], save=args[-1]),
                shapes=(*({"activation": a} for a in ACTIVATIONS), {"activation": "swiglu", "save": "input"}),
                settled=_off_the_kink,
                choices={"activation": tuple(ACTIVATIONS), "save": SAVES},
            )
        },
    )
)
