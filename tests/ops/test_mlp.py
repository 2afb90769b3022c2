"""linear and mlp: the meaning and the errors of their arguments."""

import cases
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import reference
from pygpt.functional import linear, mlp

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
    "swiglu": lambda x: halves(x)[0] / (1 + torch.exp(-halves(x)[0])) * halves(x)[1],
    "geglu": lambda x: ACTIVATIONS["gelu"](halves(x)[0]) * halves(x)[1],
}
ALL = [(activation, save) for activation in ACTIVATIONS for save in ("all", "input")]


def halves(x):
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def rows_of_fc(activation, H):
    return 2 * H if activation in reference.GATED else H


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("activation, save", [(None, None), *ALL])
def test_meaning(activation, save, lead, bias, backend):
    F = rows_of_fc(activation, 7)
    x, fc, proj = rand(*lead, 5), rand(F, 5), rand(4, 7)
    fb, pb = (rand(F), rand(4)) if bias else (None, None)
    inputs = [t for t in ((x, fc, fb) if activation is None else (x, fc, fb, proj, pb)) if t is not None]
    want = x @ fc.T + (fb if bias else 0.0)
    if activation:
        want = ACTIVATIONS[activation](want) @ proj.T + (pb if bias else 0.0)
    with pygpt.backend(backend):
        got = linear(x, fc, fb) if activation is None else mlp(x, fc, fb, proj, pb, activation, save=save)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g))


def test_default_activation_is_exact_gelu(backend):
    x, fc, proj = rand(3, 5), rand(7, 5), rand(5, 7)
    with pygpt.backend(backend):
        torch.testing.assert_close(mlp(x, fc, None, proj, None), F.gelu(x @ fc.T) @ proj.T)


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("biases", [(True, False), (False, True)])
def test_one_bias(biases, backend):
    x, fc, proj = rand(3, 5), rand(7, 5), rand(5, 7)
    fb, pb = rand(7) if biases[0] else None, rand(5) if biases[1] else None
    inputs = [t for t in (x, fc, fb, proj, pb) if t is not None]
    want = F.linear(F.relu(F.linear(x, fc, fb)), proj, pb)
    with pygpt.backend(backend):
        got = mlp(x, fc, fb, proj, pb, "relu")
    torch.testing.assert_close(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs))


def test_one_weight_in_two_places(backend):
    """Its gradient is the sum, also where the input itself is the weight."""
    w = rand(6, 6)
    with pygpt.backend(backend):
        got = torch.autograd.grad(mlp(w, w, None, w.t(), None, "gelu").sum(), w)
    torch.testing.assert_close(got, torch.autograd.grad(F.linear(F.gelu(F.linear(w, w)), w.t()).sum(), w))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_what_is_kept_for_backward(activation, dtype, kernels):
    """The hidden layer in the input's dtype, and what went into it only where the derivative needs that."""
    F = rows_of_fc(activation, 7)
    x, fc, proj = (rand(*s, dtype=dtype).detach() for s in ((3, 5), (F, 5), (4, 7)))
    y, hidden, pre = kernels.mlp_fwd(x, fc, None, proj, None, activation, "all")
    assert (y.shape, hidden.shape, hidden.dtype) == ((3, 4), (3, 7), dtype)
    assert pre.shape == ((3, F) if activation in reference.SAVES_INPUT else (0,)) and pre.dtype == dtype
    y_too, hidden, pre = kernels.mlp_fwd(x, fc, None, proj, None, activation, "input")
    assert torch.equal(y, y_too) and hidden.shape == pre.shape == (0,) and hidden.dtype == pre.dtype == dtype


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("M", [3, 65])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_have_the_same_bits_with_save_input(activation, M, dtype, compiled, device):
    """Whichever of them are wanted; and nothing of the hidden layer is kept."""
    F = rows_of_fc(activation, 40)
    tensors = [torch.randn(s, dtype=dtype, device=device) for s in ((M, 24), (F, 24), (F,), (17, 40), (17,))]
    dy = torch.randn(M, 17, dtype=dtype, device=device)
    for needs in ([1] * 5, [1, 0, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]):
        found = []
        for save in ("all", "input"):
            inputs = [t.detach().requires_grad_(bool(need)) for t, need in zip(tensors, needs, strict=True)]
            kept = []
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t)
            with pygpt.backend(compiled), hooks:
                y = mlp(*inputs, activation, save=save)
            y.backward(dy)
            found.append([y, *(t.grad for t in inputs)])
            addresses = {t.data_ptr() for t in inputs}
            assert save == "all" or all(t.data_ptr() in addresses for t in kept)
        for one, other in zip(*found, strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_the_derivative_where_float16_has_few_digits(activation, backend):
    """1e-4 is a normal number of float16, but its square, what relu2 gives, is 0."""
    x, one = torch.full((2, 1), 1e-4, dtype=torch.float16, requires_grad=True), torch.ones(1, 1, dtype=torch.float16)
    fc = one if activation not in reference.GATED else torch.cat((one, torch.ones_like(one)))
    bias = torch.tensor([0.0, 1.0], dtype=torch.float16) if activation in reference.GATED else None
    x64 = x.detach().double().requires_grad_()
    with pygpt.backend(backend):
        (got,) = torch.autograd.grad(mlp(x, fc, bias, one, None, activation).sum(), x)
    pre = x64 @ fc.double().T
    (want,) = torch.autograd.grad(ACTIVATIONS[activation](pre if bias is None else pre + bias.double()).sum(), x64)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=0)


def test_pytorchs_tile_registers_are_its_own():
    """With AMX both set up the same registers; neither may rely on what it left there."""
    x, w = torch.randn(96, 128).bfloat16(), torch.randn(160, 128).bfloat16()
    for _ in range(3):
        theirs, ours = F.linear(x, w), linear(x, w)
        assert theirs.equal(F.linear(x, w)) and ours.equal(linear(x, w))
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-6)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


X, W, B = zeros(2, 4), zeros(3, 4), zeros(3)
P, PB = zeros(5, 3), zeros(5)
BAD = [
    (linear, (None, W), TypeError, "input must be a Tensor.*NoneType"),
    (linear, (X, None), TypeError, "weight must be a Tensor.*NoneType"),
    (linear, (X.long(), W), TypeError, "input must be floating point.*int64"),
    (linear, (X, W.double()), TypeError, "weight is torch.float64.*input is torch.float32"),
    (linear, (X, W, B.half()), TypeError, "bias is torch.float16.*input is torch.float32"),
    (linear, (zeros(), W), ValueError, "input needs at least 1 dimension"),
    (linear, (X, zeros(3, 4, 1)), ValueError, r"weight must be a matrix.*\(3, 4, 1\)"),
    (linear, (X, zeros(3, 5)), ValueError, "input has 4 features.*wants 5"),
    (linear, (X, W, zeros(4)), ValueError, r"bias must have shape \(3,\).*\(4,\)"),
    (linear, (X, W, zeros(1, 4)), ValueError, r"bias must have shape \(3,\).*\(1, 4\)"),
    (linear, (X, W.to("meta")), ValueError, "weight is on meta"),
    (mlp, (X, W, B, P, PB, "swish"), ValueError, "unknown activation 'swish'.*gelu_tanh"),
    (mlp, (X, W, B, P, PB, None), ValueError, "unknown activation None"),
    (mlp, (X, W, None, None, PB), TypeError, "proj_weight must be a Tensor.*NoneType"),
    (mlp, (X, W, B.double(), P, PB), TypeError, "fc_bias is torch.float64"),
    (mlp, (X, W, B, P, PB, "swiglu"), ValueError, r"fc_weight must have an even number of rows for swiglu.*\(3, 4\)"),
    (mlp, (X, zeros(8, 4), B, P, PB, "geglu"), ValueError, r"fc_bias must have shape \(8,\)"),
    (mlp, (X, zeros(8, 4), None, P, PB, "geglu"), ValueError, "hidden layer has 4 features.*proj_weight.*wants 3"),
    (mlp, (zeros(), W, B, P, PB), ValueError, "input needs at least 1 dimension"),
    (mlp, (X, zeros(3, 5), B, P, PB), ValueError, "input has 4 features.*fc_weight.*wants 5"),
    (mlp, (X, W, zeros(4), P, PB), ValueError, r"fc_bias must have shape \(3,\)"),
    (mlp, (X, W, B, zeros(5, 4), PB), ValueError, "hidden layer has 3 features.*proj_weight.*wants 4"),
    (mlp, (X, W, B, P, zeros(3)), ValueError, r"proj_bias must have shape \(5,\)"),
]


@pytest.mark.parametrize("function, args, error, message", BAD, ids=[f"{f.__name__}: {m}" for f, _, _, m in BAD])
def test_bad_arguments(function, args, error, message, backend):
    with pygpt.backend(backend), pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(*args)


@pytest.mark.parametrize("save", ["none", None, "pre"])
def test_another_save_is_refused(save, backend):
    with pygpt.backend(backend), pytest.raises(ValueError, match=f"mlp: save must be 'all' or 'input', got {save!r}"):
        mlp(X, W, B, P, PB, save=save)


def test_the_kernels_refuse_by_name(kernels):
    for args, message in (
        (("gelu", "pre"), "save must be 'all' or 'input', got 'pre'"),
        (("swish", "all"), "unknown activation 'swish'.*swiglu, geglu"),
    ):
        with pytest.raises(RuntimeError, match=f"pygpt.mlp_fwd: {message}"):
            kernels.mlp_fwd(X, W, B, P, PB, *args)
