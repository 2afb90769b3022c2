"""gelu, gelu_tanh, relu and relu2: y = act(x), dx = dy act'(x), elementwise on tensors of any shape; and mlp's silu.

    gelu        x cdf(x)  (Hendrycks and Gimpel 2016)      cdf(x) + x pdf(x)
    gelu_tanh   x sigmoid(2u), 2u = x (U + U3 x^2)         sigmoid(2u) + x sigmoid(2u) sigmoid(-2u) (U + 3 U3 x^2)
    relu        max(x, 0)                                  1 where not y <= 0
    relu2       max(x, 0)^2  (So et al. 2021)              2 x where not x <= 0
    silu        x s, s = sigmoid(x)                        s + x s (1 - s)

cdf and pdf are those of the standard normal distribution; U = 2 sqrt(2 / pi), U3 = 0.044715 U. All but relu save x for
backward, relu saves its output y, which the next op keeps anyway.

The exact gelu takes one exponential and one division but no erf, because 0.5 (1 + erf) has no correct digits in the
lower tail. With a = |x| and polynomials H, D, E that were fitted for the least relative error,

    cdf(-a) = exp(-a^2/2) 2^H(a / (a + 7.5)),     cdf(-a) - a pdf(a) = exp(-a^2/2) D(a) / E(a),

and the value at a is 1 minus the value at -a.
"""

import triton
import triton.language as tl

from pygpt.ops.activation import gelu_name
from pygpt.ops.common import dense_strides

from .common import LOG2E, Config, Configs, empty, empty_strided, in_order, launch, to_storage

U = tl.constexpr(1.59576912160573071176)
U3 = tl.constexpr(1.59576912160573071176 * 0.044715)
TAIL_END = tl.constexpr(14.5)  # both tails are 0 beyond it in float32


# ------------------------------------------------------------------------------- device functions
@triton.jit
def _normal_cdf(x):
    a = tl.minimum(tl.abs(x), TAIL_END)
    t = a / (a + 7.5)
    h = -17.917442 * t + 46.454796
    h = h * t - 49.430836
    h = h * t + 19.865513
    h = h * t + 5.5340266
    h = h * t - 8.869861
    h = h * t - 1.2613237
    h = h * t + 6.1112385
    h = h * t - 8.633284
    h = h * t - 1.0
    tail = tl.exp2(a * a * (-0.5 * LOG2E) + h)
    return tl.where(x < 0, tail, 1 - tail)


@triton.jit
def _gelu_slope(x):
    """cdf(x) + x pdf(x); at infinity NaN, as PyTorch has it."""
    a = tl.minimum(tl.abs(x), TAIL_END)
    d = -0.011654989 * a - 0.09460677
    d = d * a - 0.31971186
    d = d * a - 0.47531727
    d = d * a - 0.08311839
    d = d * a + 0.5
    e = 0.029214934 * a + 0.23714224
    e = e * a + 0.8305759
    e = e * a + 1.4295318
    e = e * a + 1.0
    tail = tl.exp2(a * a * (-0.5 * LOG2E)) * d / e
    return tl.where(x < 0, tail, 1 - tail) + x * 0


@triton.jit
def _exp_minus(a):
    """exp(-a) for a >= 0. Its relative error does not grow with a: a multiple of ln 2 is subtracted in two parts, the
    first of few bits."""
    a = tl.minimum(a, 110.0)
    n = tl.floor(a * -LOG2E + 0.5)
    return tl.exp2((a + n * 0.693359375 + n * -0.000212194440) * -LOG2E) * tl.exp2(n)


@triton.jit
def _sigmoid_slope(x, e, slope):
    """s + x s (1 - s) slope with s = sigmoid(t) and e = exp(-|t|), which cannot overflow. t has the sign of x."""
    r = 1 / (1 + e)
    s = tl.where(x < 0, e * r, r)
    return s + x * (e * r * r) * slope


@triton.jit
def _gelu_tanh_slope(x):
    xx = x * x
    return _sigmoid_slope(x, tl.exp2(tl.abs(x) * (-U * LOG2E - U3 * LOG2E * xx)), U + 3 * U3 * xx)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """act(x) of float32 x."""
    if NAME == "gelu":
        y = x * _normal_cdf(x)
    elif NAME == "gelu_tanh":
        y = x / (1 + tl.exp2(x * (-U * LOG2E - U3 * LOG2E * (x * x))))
    elif NAME == "silu":
        e = _exp_minus(tl.abs(x))
        y = tl.where(x < 0, x * e, x) / (1 + e)
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu2")
        y = tl.where(x < 0, 0.0, x)
        if NAME == "relu2":
            y *= y
    return y


@triton.jit
def backpropagate(d, saved, NAME: tl.constexpr):
    """The float32 gradient d of act's output -> the gradient of its input. saved is y for relu and x for the others.

    relu and relu2 select rather than multiply, so that NaN or infinity in d does not pass a unit that is off.
    """
    if NAME == "gelu":
        d *= _gelu_slope(saved)
    elif NAME == "gelu_tanh":
        d *= _gelu_tanh_slope(saved)
    elif NAME == "silu":
        d *= _sigmoid_slope(saved, _exp_minus(tl.abs(saved)), 1.0)
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu2")
        if NAME == "relu2":
            d *= 2 * saved
        d = tl.where(saved <= 0, 0.0, d)
    return d


# ------------------------------------------------------------------------------- kernels
@triton.jit
def activation_fwd_kernel(x, y, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    out = activate(tl.load(x + offset, offset < n).to(tl.float32), NAME)
    tl.store(y + offset, to_storage(out, y.dtype.element_ty), offset < n)


@triton.jit
def activation_bwd_kernel(dy, saved, dx, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dy + offset, offset < n).to(tl.float32)
    out = backpropagate(d, tl.load(saved + offset, offset < n).to(tl.float32), NAME)
    tl.store(dx + offset, to_storage(out, dx.dtype.element_ty), offset < n)


# ------------------------------------------------------------------------------- launchers
_SHAPES = ((4096, 8), (2048, 4), (2048, 8), (1024, 4))
FWD, BWD = (Configs("any", tuple(Config({"BLOCK": block}, warps) for block, warps in _SHAPES)) for _ in range(2))


def _elementwise(kernel, configs, name, *inputs, order=None):
    """kernel over the elements of inputs -> a tensor of their shape, in the memory order of `order` or of inputs."""
    x = inputs[0]
    if all(t.is_contiguous() for t in inputs):
        out = empty(x, *x.shape)
    else:
        strides = dense_strides(x.shape, *(t.stride() for t in order or inputs))
        out = empty_strided(x, x.shape, strides)
        inputs = [in_order(t, strides) for t in inputs]
    n = out.numel()
    launch(kernel, lambda c: triton.cdiv(n, c["BLOCK"]), *inputs, out, n, configs=configs, NAME=name)
    return out


def gelu_fwd(x, approximate):
    """x (...) -> y (...)."""
    return _elementwise(activation_fwd_kernel, FWD, gelu_name("gelu_fwd", approximate), x)


def gelu_bwd(dy, x, approximate):
    """dy, x (...) -> dx (...)."""
    return _elementwise(activation_bwd_kernel, BWD, gelu_name("gelu_bwd", approximate), dy, x)


def relu_fwd(x):
    """x (...) -> y (...)."""
    return _elementwise(activation_fwd_kernel, FWD, "relu", x)


def relu_bwd(dy, y):
    """dy, y (...) -> dx (...)."""
    return _elementwise(activation_bwd_kernel, BWD, "relu", dy, y, order=(y, dy))  # the order that torch gives
