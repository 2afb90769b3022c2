"""layer_norm, add_layer_norm, rms_norm and add_rms_norm: the meaning and the errors of their arguments."""

import cases
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import verify
from pygpt.functional import add_layer_norm, add_rms_norm, layer_norm, rms_norm


def of_sum(norm):
    return lambda x, residual, *rest: (norm(x + residual, *rest), x + residual)


NORMS = {  # ours, PyTorch's, number of inputs, number of parameters
    "layer_norm": (layer_norm, F.layer_norm, 1, 2),
    "add_layer_norm": (add_layer_norm, of_sum(F.layer_norm), 2, 2),
    "rms_norm": (rms_norm, F.rms_norm, 1, 1),
    "add_rms_norm": (add_rms_norm, of_sum(F.rms_norm), 2, 1),
}
every_norm = pytest.mark.parametrize("ours, theirs, inputs, params", NORMS.values(), ids=NORMS)


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def assert_same(ours, theirs, leaves):
    """Outputs and the gradients of a random function of all of them."""
    grads = []
    for outs in (ours, theirs):
        outs = verify.as_tuple(outs)
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(outs, leaves, [torch.randn(o.shape, dtype=o.dtype) for o in outs]))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads[0], grads[1])


@every_norm
@pytest.mark.parametrize("given", [0, 1, 2])
@pytest.mark.parametrize(
    "shape, normalized",
    [
        ((4, 6), 6),
        ((4, 6), (6,)),
        ((2, 3, 4), [3, 4]),
        ((2, 3, 4), torch.Size((2, 3, 4))),
        ((6,), 6),
        ((0, 3, 4), (3, 4)),
        ((2, 0, 4), (4,)),
        ((0, 4), (4,)),
        ((2, 3, 0), (3, 0)),
    ],
    ids=str,
)
def test_normalized_shape_as_in_torch(ours, theirs, inputs, params, shape, normalized, given, backend):
    xs = [rand(*shape) for _ in range(inputs)]
    end = (normalized,) if isinstance(normalized, int) else tuple(normalized)
    weights = [rand(*end) for _ in range(min(given, params))]
    with pygpt.backend(backend):
        got = ours(*xs, normalized, *weights)
    assert_same(got, theirs(*xs, end, *weights), xs + weights)


@every_norm
@pytest.mark.parametrize("axes", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_permuted_input_over_several_dimensions(ours, theirs, inputs, params, axes, backend):
    xs = [rand(3, 4, 5).permute(axes) for _ in range(inputs)]
    end = xs[0].shape[1:]
    with pygpt.backend(backend):
        assert_same(ours(*xs, end), theirs(*xs, end), xs)


@every_norm
def test_eps(ours, theirs, inputs, params, backend):
    xs = [rand(4, 6) for _ in range(inputs)]
    weights = [None] * params
    with pygpt.backend(backend):
        assert_same(ours(*xs, 6, *weights, 0.5), theirs(*xs, (6,), *weights, 0.5), xs)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_default_eps_of_rms_norm_is_torchs(dtype, backend):
    x = (torch.randn(4, 8) * 1e-3).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    with pygpt.backend(backend):
        torch.testing.assert_close(rms_norm(x, 8), F.rms_norm(x, (8,)), rtol=tolerance, atol=tolerance)
        for other in cases.DTYPES:  # the machine epsilon is that of the sum
            found, want = add_rms_norm(x, x.to(other), 8), of_sum(F.rms_norm)(x, x.to(other), (8,))
            torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("width", [1, 3, 64, 1000])
def test_constant_rows(width, value, dtype, backend):
    """No variance at all: the output is the bias alone, exactly."""
    x = torch.full((3, width), value, dtype=dtype, requires_grad=True)
    bias = torch.randn(width).to(dtype)
    with pygpt.backend(backend):
        y = layer_norm(x, width, torch.randn(width).to(dtype), bias)
        (dx,) = torch.autograd.grad(y.sum(), x)
    if backend == "torch":  # PyTorch's own scales x and mean apart: x rstd - mean rstd
        assert y.isfinite().all()
    else:
        assert torch.equal(y, bias.expand_as(y))
    assert dx.isfinite().all()


def assert_a_single_column_has_no_gradient(kernels, dtype, generator):
    """Exactly: g is rounded before it is averaged, so that it is its own mean."""
    dy, x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((50, 1), (50, 1), (1,)))
    _, mean, rstd = kernels.layer_norm_fwd(x, weight, None, 1e-5)
    dx, *_ = kernels.layer_norm_bwd(dy, x, weight, mean, rstd, [True] * 3)
    assert not dx.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=cases.ids)
def test_a_single_column_has_no_gradient(dtype, kernels, generator):
    assert_a_single_column_has_no_gradient(kernels, dtype, generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("width", [1, 3, 13])
def test_what_lies_beside_a_short_row(width, dtype, kernels):
    """Columns that are none count as 0, however far that is from the mean."""
    x = torch.full((3, width), 2.0**120 if dtype != torch.float64 else 2.0**1020, dtype=dtype)
    dy = torch.randn(3, width).to(dtype)
    y, mean, rstd = kernels.layer_norm_fwd(x, None, None, 1e-5)
    dx, dw, db = kernels.layer_norm_bwd(dy, x, None, mean, rstd, [True] * 3)
    assert torch.equal(y, torch.zeros_like(x)) and torch.equal(dw, torch.zeros_like(dw))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    want = (dy.double() - dy.double().mean(-1, keepdim=True)) / 1e-5**0.5
    torch.testing.assert_close(dx.double(), want, rtol=tolerance, atol=tolerance * 1e3)
    torch.testing.assert_close(db.double(), dy.double().sum(0), rtol=tolerance, atol=tolerance)


@every_norm
def test_parameters_of_another_dtype(ours, theirs, inputs, params, compiled):
    """As in torch: bfloat16 input, float32 parameters; the default falls back, a forced backend refuses."""
    xs = [rand(4, 6, dtype=torch.bfloat16) for _ in range(inputs)]
    weights = [rand(6, dtype=torch.float32) for _ in range(params)]
    try:
        want = theirs(*xs, (6,), *weights)
    except RuntimeError:
        pytest.xfail("torch does not serve it either")
    torch.testing.assert_close(ours(*xs, 6, *weights), want)
    with pygpt.backend(compiled), pytest.raises(RuntimeError, match="different dtypes"):
        ours(*xs, 6, *weights)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


X = zeros(2, 4)
BAD = [
    (layer_norm, (None, 4), TypeError, "input must be a Tensor.*NoneType"),
    (layer_norm, (X.int(), 4), TypeError, "input must be floating point.*int32"),
    (layer_norm, (X, 5), ValueError, r"normalized_shape \(5,\).*\(2, 4\)"),
    (layer_norm, (X, ()), ValueError, "normalized_shape must have at least one dimension"),
    (layer_norm, (X, (1, 2, 4)), ValueError, r"normalized_shape \(1, 2, 4\).*\(2, 4\)"),
    (layer_norm, (X, 4, zeros(5)), ValueError, r"weight must have shape \(4,\).*\(5,\)"),
    (layer_norm, (X, 4, None, zeros(1, 4)), ValueError, r"bias must have shape \(4,\).*\(1, 4\)"),
    (layer_norm, (X, 4, 1.0), TypeError, "weight must be a Tensor.*float"),
    (layer_norm, (X, 4, None, None, None), TypeError, "eps must be a number, got NoneType"),
    (rms_norm, (X, 4, None, "1e-5"), TypeError, "eps must be a number, got str"),
    (layer_norm, (X, 4, zeros(4).to("meta")), ValueError, "weight is on meta"),
    (add_layer_norm, (X, None, 4), TypeError, "residual must be a Tensor.*NoneType"),
    (add_layer_norm, (X, zeros(4), 4), ValueError, r"residual must have shape \(2, 4\).*\(4,\)"),
    (add_layer_norm, (X, X, 5), ValueError, r"normalized_shape \(5,\)"),
    (add_layer_norm, (X, X, 4, zeros(2)), ValueError, r"weight must have shape \(4,\).*\(2,\)"),
    (add_layer_norm, (X, X, 4, None, None, None), TypeError, "eps must be a number, got NoneType"),
    (rms_norm, (X, 5), ValueError, r"normalized_shape \(5,\)"),
    (rms_norm, (X, 4, zeros(2)), ValueError, r"weight must have shape \(4,\).*\(2,\)"),
    (rms_norm, (X.bool(), 4), TypeError, "input must be floating point.*bool"),
    (add_rms_norm, (X, None, 4), TypeError, "residual must be a Tensor.*NoneType"),
    (add_rms_norm, (X, zeros(4), 4), ValueError, r"residual must have shape \(2, 4\).*\(4,\)"),
    (add_rms_norm, (X, X, 5), ValueError, r"normalized_shape \(5,\)"),
    (add_rms_norm, (X, X, 4, zeros(2)), ValueError, r"weight must have shape \(4,\).*\(2,\)"),
    (add_rms_norm, (X, X, 4, None, "1e-5"), TypeError, "eps must be a number, got str"),
]


@pytest.mark.parametrize("function, args, error, message", BAD, ids=[f"{f.__name__}: {m}" for f, _, _, m in BAD])
def test_bad_arguments(function, args, error, message, backend):
    with pygpt.backend(backend), pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(*args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of devices with less shared memory, emulated")
@pytest.mark.parametrize("dtype, width", [(torch.float32, 1000), (torch.bfloat16, 12288)], ids=str)
def test_the_shared_memory_of_smaller_gpus(dtype, width, emulated, monkeypatch, generator):
    """A100s have 163 KB a block, RTX cards 99: where the staged rows of backward don't fit, they are read twice."""
    emulated()
    for kilobytes in (163, 99):
        monkeypatch.setenv("PYGPT_EMULATED_SHARED", str(kilobytes << 10))
        cases.assert_exact("add_layer_norm", {"M": 3, "N": width}, dtype, generator, "cuda")
