"""Gradients that no one here wrote: micrograd (scalar autograd in 100 lines) and tinygrad (its Python interpreter)."""

import numpy as np
import pytest
import torch
from micrograd.engine import Value
from tinygrad import Tensor as TinyTensor
from tinygrad.helpers import Context

import pygpt
from pygpt import functional as P

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def leaves(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def assert_same(function, inputs, oracle, dtype=torch.float64):
    """Value and every gradient of sum(weights * function(*inputs)), for random weights.

    oracle(weights, *inputs as arrays) -> value, [gradients]. Compared at torch.testing's own tolerance for ``dtype``.
    """
    out = function(*inputs)
    weights = torch.randn(out.shape, dtype=out.dtype)
    total = (out * weights).sum()
    ours = [total.detach(), *torch.autograd.grad(total, inputs)]
    value, gradients = oracle(weights.numpy(), *(t.detach().numpy() for t in inputs))
    for our, their in zip(ours, [value, *gradients], strict=True):
        torch.testing.assert_close(our.to(dtype), torch.as_tensor(np.array(their), dtype=dtype))


# ------------------------------------------------------------------------------- micrograd
def micrograd(function):
    """An oracle from a function of nested lists of Values to a list of rows of Values."""

    def oracle(weights, *arrays):
        values = [np.vectorize(Value, otypes=[object])(a) for a in arrays]
        total = sum(
            float(w) * y for ws, ys in zip(weights, function(*values), strict=True) for w, y in zip(ws, ys, strict=True)
        )
        total.backward()
        return total.data, [np.vectorize(lambda v: float(v.grad))(v) for v in values]

    return oracle


def layer(row, weight, bias):
    return [sum((w * v for w, v in zip(ws, row, strict=True)), b) for ws, b in zip(weight, bias, strict=True)]


def relu_mlp(x, fc_weight, fc_bias, proj_weight, proj_bias):
    return [layer([h.relu() for h in layer(row, fc_weight, fc_bias)], proj_weight, proj_bias) for row in x]


def centred_norm(x, weight, bias):
    rows = []
    for row in x:
        mean = sum(row) / len(row)
        variance = sum((v - mean) ** 2 for v in row) / len(row)
        rows.append([(v - mean) * (variance + 1e-5) ** -0.5 * w + b for v, w, b in zip(row, weight, bias, strict=True)])
    return rows


def rms(x, weight):
    return [
        [v * (sum(u**2 for u in row) / len(row) + 1e-5) ** -0.5 * w for v, w in zip(row, weight, strict=True)]
        for row in x
    ]


MICROGRAD = {
    "mlp": (lambda *a: P.mlp(*a, activation="relu"), relu_mlp, [(3, 4), (6, 4), (6,), (5, 6), (5,)]),
    "layer_norm": (lambda x, w, b: P.layer_norm(x, 7, w, b), centred_norm, [(3, 7), (7,), (7,)]),
    "rms_norm": (lambda x, w: P.rms_norm(x, 7, w, 1e-5), rms, [(3, 7), (7,)]),
    "linear": (P.linear, lambda x, w, b: [layer(row, w, b) for row in x], [(3, 4), (5, 4), (5,)]),
    "relu": (P.relu, lambda x: [[v.relu() for v in row] for row in x], [(4, 5)]),
}  # fmt: skip


@pytest.mark.parametrize("function, theirs, shapes", MICROGRAD.values(), ids=MICROGRAD)
def test_micrograd(function, theirs, shapes, backend):
    with pygpt.backend(backend):
        assert_same(function, leaves(*shapes), micrograd(theirs))


# ------------------------------------------------------------------------------- tinygrad
def tinygrad(function):
    def oracle(weights, *arrays):
        with Context(DEV="PYTHON"):  # needs no compiler
            inputs = [TinyTensor(a) for a in arrays]
            total = (function(*inputs) * TinyTensor(weights)).sum()
            return total.item(), [g.numpy() for g in total.gradient(*inputs)]

    return oracle


def attention(is_causal):
    return (
        lambda q, k, v: P.scaled_dot_product_attention(q, k, v, is_causal=is_causal),
        lambda q, k, v: q.scaled_dot_product_attention(k, v, is_causal=is_causal),
        [(1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 2)],
    )


# tinygrad's erf is a polynomial good to float32, so what stands on it is compared in float32
TINYGRAD = {
    "attention": (*attention(False), torch.float64),
    "causal attention": (*attention(True), torch.float64),
    "gelu": (P.gelu, lambda x: x.gelu("none"), [(5, 6)], torch.float32),
    "gelu_tanh": (lambda x: P.gelu(x, "tanh"), lambda x: x.gelu("tanh"), [(5, 6)], torch.float64),
    "layer_norm": (
        lambda x, w, b: P.layer_norm(x, 9, w, b),
        lambda x, w, b: x.layernorm() * w + b,
        [(2, 3, 9), (9,), (9,)],
        torch.float64,
    ),
    "mlp": (
        lambda *a: P.mlp(*a, activation="gelu_tanh"),
        lambda x, fc, fb, proj, pb: (x @ fc.T + fb).gelu("tanh") @ proj.T + pb,
        [(2, 3), (5, 3), (5,), (4, 5), (4,)],
        torch.float64,
    ),
}


@pytest.mark.parametrize("function, theirs, shapes, dtype", TINYGRAD.values(), ids=TINYGRAD)
def test_tinygrad(function, theirs, shapes, dtype, backend):
    with pygpt.backend(backend):
        assert_same(function, leaves(*shapes), tinygrad(theirs), dtype)


def test_add_layer_norm(backend):
    x, residual, weight, bias = leaves((2, 9), (2, 9), (9,), (9,))
    with pygpt.backend(backend):
        for i, theirs in enumerate(
            (lambda x, r, w, b: (x + r).layernorm() * w + b, lambda x, r, w, b: x + r + 0 * w + 0 * b)
        ):

            def ours(*inputs, i=i):
                return P.add_layer_norm(*inputs[:2], 9, *inputs[2:])[i] + 0 * inputs[2] + 0 * inputs[3]

            assert_same(ours, [x, residual, weight, bias], tinygrad(theirs))
