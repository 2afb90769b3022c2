"""gelu and relu, which work element by element, and the activations of mlp.

gelu: y = x Phi(x), Phi the distribution function of the standard normal, or its tanh approximation (Hendrycks and
Gimpel 2016). Backward keeps x. relu: y = max(x, 0). Backward keeps y: dx = dy where y > 0.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Call, Op, call, lookup, register
from .common import (
    Spec,
    acc,
    backward_kernels,
    check_tensors,
    composite_gradients,
    dense_strides,
    laid_out,
    lead,
)

_torchs_gelu, _torchs_relu = F.gelu, F.relu  # bound now, because a user may replace them by ours later

# ------------------------------------------------------------------------------- the mathematics
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def _cdf(x):  # of the standard normal distribution
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _tanh_cdf(x):
    return torch.sigmoid(2.0 * _SQRT_2_OVER_PI * (x + 0.044715 * x**3))


_GELU = (
    _torchs_gelu,
    lambda x: x * _cdf(x),
    lambda dy, x: dy * (_cdf(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)),
)
_SILU = (
    F.silu,
    lambda x: x * torch.sigmoid(x),
    lambda dy, x: dy * (torch.sigmoid(x) + x * torch.sigmoid(x) * torch.sigmoid(-x)),
)
ACTIVATIONS: dict[str, tuple[Callable, Callable, Callable]] = {
    # name: PyTorch's expression, value(x), gradient(dy, saved): saved is x, or relu's own value
    "gelu": _GELU,
    "gelu_tanh": (
        partial(_torchs_gelu, approximate="tanh"),
        lambda x: x * _tanh_cdf(x),
        lambda dy, x: (
            dy
            * (_tanh_cdf(x) + x * _tanh_cdf(x) * _tanh_cdf(-x) * 2.0 * _SQRT_2_OVER_PI * (1.0 + 3 * 0.044715 * x * x))
        ),
    ),
    "relu": (_torchs_relu, _torchs_relu, lambda dy, y: torch.where(y <= 0, 0.0, dy)),
    "relu2": (
        lambda x: _torchs_relu(x).square(),
        lambda x: _torchs_relu(x).square(),
        lambda dy, x: torch.where(x <= 0, 0.0, 2.0 * x * dy),
    ),
    "swiglu": _SILU,  # of the gate; the result is its product with the value
    "geglu": _GELU,
}
GATED = {"swiglu": "silu", "geglu": "gelu"}  # name: what is applied to the gate (Shazeer 2020)
SAVES_INPUT = tuple(name for name in ACTIVATIONS if name != "relu")  # relu's derivative follows from its output


def gelu_name(op, approximate):
    """The name in ACTIVATIONS. Raises what the compiled kernels raise for another value."""
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"pygpt.{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return "gelu" if approximate == "none" else "gelu_tanh"


def known(op, activation):
    """The same for a name in ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"pygpt.{op}: unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return activation


def gelu_composite(x, approximate):
    """x Phi(x), or with approximate="tanh" x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))."""
    return _torchs_gelu(x, approximate=approximate)


def gelu_fwd(x: Tensor, approximate: str) -> Tensor:
    y = ACTIVATIONS[gelu_name("gelu_fwd", approximate)][1](acc(x))
    return laid_out(y, dense_strides(x.shape, x.stride()), x.dtype)


def gelu_bwd(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    dx = ACTIVATIONS[gelu_name("gelu_bwd", approximate)][2](acc(dy), acc(x))
    return laid_out(dx, dense_strides(x.shape, dy.stride(), x.stride()), x.dtype)


def relu_composite(x):
    return _torchs_relu(x)


def relu_fwd(x: Tensor) -> Tensor:
    return _torchs_relu(x)


def relu_bwd(dy: Tensor, y: Tensor) -> Tensor:
    """dy, but 0 where y <= 0. PyTorch's own op is used because it is differentiable in y as well."""
    return torch.ops.aten.threshold_backward(dy, y, 0)


# ------------------------------------------------------------------------------- autograd
class GELU(torch.autograd.Function):
    """(kernels, x, approximate) -> y."""

    @staticmethod
    def forward(ctx, kernels, x, approximate):
        ctx.kernels, ctx.approximate = kernels, approximate
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return kernels.gelu_fwd(x, approximate)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 3
        (x,) = ctx.saved_tensors
        kernels = backward_kernels(ctx)
        if kernels is None:
            return None, *composite_gradients(gelu_composite, (x, ctx.approximate), (True,), (dy,)), None
        return None, kernels.gelu_bwd(dy, x, ctx.approximate), None


class ReLU(torch.autograd.Function):
    """(kernels, x) -> y."""

    @staticmethod
    def forward(ctx, kernels, x):
        ctx.kernels = kernels
        y = kernels.relu_fwd(x)
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None
        (y,) = ctx.saved_tensors
        kernels = backward_kernels(ctx)
        return None, (relu_bwd if kernels is None else kernels.relu_bwd)(dy, y)


# ------------------------------------------------------------------------------- the public functions
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Returns x Phi(x), where Phi is the standard normal distribution function (Hendrycks and Gimpel 2016).

    ``approximate="tanh"`` takes the same paper's approximation, which GPT-2 has:
    0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). ``input`` has any shape, and the result has the same shape, dtype
    and order of strides. Another value of ``approximate`` raises ValueError, an input of a wrong type TypeError.
    """
    kernel = lookup("gelu", input)
    if kernel is None or approximate not in ("none", "tanh"):
        return call("gelu", input, approximate)
    return kernel(input, approximate)


def _prepare_gelu(input, approximate="none") -> Call:
    error = check_tensors("gelu", (input,))
    if approximate not in ("none", "tanh"):
        raise ValueError(f"pygpt.gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    args, torchs = (input, approximate), partial(_torchs_gelu, input, approximate=approximate)
    return Call(args, torch=torchs, error=error, fast=(input,) if error is None else None)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Returns max(x, 0), element by element.

    ``input`` has any shape, and the result has the same shape, dtype and order of strides. With ``inplace`` the result
    replaces the input. PyTorch's own op serves that, and integers. An input of a wrong type raises TypeError.
    """
    kernel = None if inplace else lookup("relu", input)
    return call("relu", input, inplace) if kernel is None else kernel(input)


def _prepare_relu(input, inplace=False) -> Call:
    error = check_tensors("relu", (input,))
    fast = (input,) if error is None and not inplace else None
    features = ("inplace",) if inplace else ()
    return Call((input,), features, torch=partial(_torchs_relu, input, inplace), error=error, fast=fast)


# ------------------------------------------------------------------------------- verify
def _draw(*rest):
    return lambda random, d: (random(*lead(d["M"])) * d["gain"], *(d[r] for r in rest))


register(
    Op(
        "gelu",
        public=gelu,
        prepare=_prepare_gelu,
        composite=gelu_composite,
        fwd=gelu_fwd,
        bwd=gelu_bwd,
        function=GELU,
        specs={
            "gelu": Spec(
                "gelu",
                inputs=("x",),
                dims={"M": 4096, "gain": 1.0, "approximate": "none"},
                draw=_draw("approximate"),
                call=gelu,
                shapes=({}, {"approximate": "tanh"}, {"gain": 4.0}),
                choices={"approximate": ("none", "tanh")},
            )
        },
    )
)
register(
    Op(
        "relu",
        public=relu,
        prepare=_prepare_relu,
        composite=relu_composite,
        fwd=relu_fwd,
        bwd=relu_bwd,
        function=ReLU,
        specs={"relu": Spec("relu", inputs=("x",), dims={"M": 4096, "gain": 1.0}, draw=_draw(), call=relu)},
    )
)
