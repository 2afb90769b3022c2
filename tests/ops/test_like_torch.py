"""What torch.nn.functional accepts, pygpt.functional accepts with the same result, on torch's own OpInfo samples."""

from functools import partial
from itertools import product

import cases
import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import SampleInput

import pygpt
from pygpt import functional, verify

NAMES = ["linear", "layer_norm", "rms_norm", "gelu", "relu", "scaled_dot_product_attention"]
INFOS = {name: next(info for info in op_db if info.name == f"nn.functional.{name}") for name in NAMES}
DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, info in INFOS.items()
    for dtype in sorted(info.supported_dtypes("cpu"), key=str)
]


def run(function, sample: SampleInput):
    """The result, and the gradients of the sample's tensors."""
    leaves = []

    def leaf(t):
        if not isinstance(t, torch.Tensor):
            return t
        if not t.requires_grad:
            return t.detach()
        leaves.append(t.detach().requires_grad_())
        return leaves[-1]

    args = [leaf(sample.input), *map(leaf, sample.args)]
    torch.manual_seed(0)  # of dropout
    out = function(*args, **{key: leaf(value) for key, value in sample.kwargs.items()})
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True) if out.requires_grad else ()
    return out.detach(), grads


def assert_like_torch(name, sample):
    """The same shape, dtype, strides and values. In other dtypes than float64 gradients are test_parity's to judge."""
    (want, of_want), (got, of_got) = (run(getattr(module, name), sample) for module in (F, functional))
    assert (got.shape, got.dtype, cases.layout_of(got)) == (want.shape, want.dtype, cases.layout_of(want)), sample
    if torch.equal(got, want):
        pass
    elif want.dtype == torch.float64:
        torch.testing.assert_close(got, want, equal_nan=True)
    else:  # as near to the result in float64 as PyTorch's, by the rule of pygpt.verify
        exact, _ = run(getattr(F, name), sample.transform(in_float64))
        ours, theirs = ((t.double() - exact).abs().max().item() / exact.abs().max().item() for t in (got, want))
        assert ours <= 2 * theirs + verify.allowance(want.dtype), (ours, theirs, sample)
    for a, b in zip(of_got, of_want, strict=True):
        assert (a is None) == (b is None), sample
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), sample
        if a is not None and a.dtype == torch.float64:
            torch.testing.assert_close(a, b, equal_nan=True)


def in_float64(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double().requires_grad_(value.requires_grad)
    return value


@pytest.mark.parametrize("name, dtype", DTYPES)
def test_samples(name, dtype):
    """Without dropout, whose random numbers are not PyTorch's."""
    info, floating = INFOS[name], dtype.is_floating_point
    for sample in info.sample_inputs("cpu", dtype, requires_grad=floating and info.supports_autograd):
        if sample.kwargs.get("dropout_p"):
            continue
        assert_like_torch(name, sample)
        assert_like_torch(name, sample.noncontiguous())


@pytest.mark.parametrize("name", [name for name in NAMES if INFOS[name].error_inputs_func is not None])
def test_error_samples(name):
    for error in INFOS[name].error_inputs("cpu"):
        for function in (getattr(F, name), getattr(functional, name)):
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                function(error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs)


def irregular():
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 1, 5, 8)
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    linear, sdpa = functional.linear, functional.scaled_dot_product_attention
    yield "linear: a scalar as bias", linear, (x, w, torch.randn(()))
    yield "linear: a bias of one element", linear, (x, w, torch.randn(1))
    yield "linear: a row as bias", linear, (x, w, b[None])
    yield "linear: a vector as weight", linear, (x, w[0])
    yield "linear: vectors", linear, (x[0], w[0])
    yield "linear: integers", linear, (x.long(), w.long(), b.long())
    yield "linear: complex", linear, (x.cfloat(), w.cfloat(), b.cfloat())
    yield "relu: integers", functional.relu, (x.long(),)
    yield "relu: channels last", functional.relu, (image,)
    yield "gelu: channels last", functional.gelu, (image,)
    yield "gelu: transposed", partial(functional.gelu, approximate="tanh"), (x.t(),)
    yield "gelu: sliced and permuted", functional.gelu, (image.permute(3, 0, 2, 1)[:, :, ::2],)
    yield "attention: one head of key and value", sdpa, (q, k, k)
    yield "attention: one head of value", sdpa, (q, torch.randn(2, 4, 5, 8), k)
    yield "attention: one head of query", sdpa, (k, torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8))
    grouped = partial(sdpa, enable_gqa=True)
    yield "attention: fewer heads of key than of value", grouped, (q, torch.randn(2, 2, 5, 8), torch.randn(2, 4, 5, 8))
    yield "attention: one batch of keys", sdpa, (q, *torch.randn(2, 1, 4, 5, 8))
    yield "attention: five dimensions", sdpa, (q[None], *torch.randn(2, 3, 1, 4, 5, 8))
    yield "layer_norm: no dimension left", functional.layer_norm, (x[0], (4,), w[0])
    yield "layer_norm: a dtype of its own for the parameters", functional.layer_norm, (x.bfloat16(), (4,), w[0], w[1])
    yield "rms_norm: transposed", functional.rms_norm, (x.t().contiguous().t(), (4,), w[0])
    yield "rms_norm: channels last", functional.rms_norm, (image, (5,), b)
    yield "rms_norm: channels last, two dimensions", functional.rms_norm, (image, (4, 5))
    video = torch.randn(2, 3, 4, 2, 5).contiguous(memory_format=torch.channels_last_3d)
    yield "rms_norm: channels last in three dimensions", functional.rms_norm, (video, (5,), b)
    yield "rms_norm: four dimensions in another order", functional.rms_norm, (image.permute(3, 2, 0, 1), (3,))


IRREGULAR = list(irregular())


@pytest.mark.parametrize("_, function, args", IRREGULAR, ids=[name for name, *_ in IRREGULAR])
def test_irregular_calls(_, function, args):
    name, kwargs = getattr(function, "func", function).__name__, getattr(function, "keywords", {})
    assert_like_torch(name, SampleInput(args[0], args=args[1:], kwargs=kwargs))
    floats = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    assert_like_torch(name, SampleInput(floats[0], args=tuple(floats[1:]), kwargs=kwargs))


@pytest.mark.parametrize("name", NAMES)
def test_inference_tensors_outside_inference_mode(name):
    """PyTorch refuses to save one for backward. Where it saves none, ours accepts the call, too."""
    shapes = {"linear": [(3, 4), (5, 4), (5,)], "scaled_dot_product_attention": [(1, 2, 3, 8)] * 3}.get(name)
    shapes = shapes or [(3, 4), *[(4,)] * (name.count("norm") + (name == "layer_norm"))]
    between = [(4,)] if "norm" in name else []
    accepted = 0
    for kinds in product(("plain", "trained", "inference"), repeat=len(shapes)):
        with torch.inference_mode():
            made = [torch.randn(shape) for shape in shapes]
        plain = [t if kind == "inference" else t.clone() for kind, t in zip(kinds, made, strict=True)]
        tensors = [t.requires_grad_(kind == "trained") for kind, t in zip(kinds, plain, strict=True)]
        leaves = [t for t in tensors if t.requires_grad]

        def gradients(function, tensors=tensors, leaves=leaves):
            out = function(tensors[0], *between, *tensors[1:])
            return torch.autograd.grad(out.sum(), leaves) if leaves else ()

        try:
            want = gradients(getattr(F, name))
        except RuntimeError:
            continue
        for _ in range(2):  # the second call may be served from the dispatch cache
            torch.testing.assert_close(gradients(getattr(functional, name)), want)
        accepted += "inference" in kinds
    assert accepted


@pytest.mark.parametrize("requires_grad", [False, True])
def test_relu_in_place(requires_grad, backend):
    x = torch.randn(4, 5, requires_grad=requires_grad)
    t = x * 1
    if backend == "torch":
        with pygpt.backend(backend):
            assert functional.relu(t, inplace=True) is t
    else:
        with pygpt.backend(backend), pytest.raises(RuntimeError, match="inplace not served"):
            functional.relu(t, inplace=True)
        assert functional.relu(t, inplace=True) is t
    assert torch.equal(t, x.relu())


LAYOUTS = {"BHLE": (0, 1, 2, 3), "BLHE": (0, 2, 1, 3), "HBLE": (1, 0, 2, 3), "LBHE": (2, 0, 1, 3), "HLBE": (1, 2, 0, 3)}


def laid_out(shape, order):
    """A random tensor of this shape whose dimensions lie in memory in this order."""
    t = torch.randn([shape[d] for d in order])
    return t.permute([order.index(d) for d in range(len(order))])


@pytest.mark.parametrize("of_key", LAYOUTS)
@pytest.mark.parametrize("of_query", LAYOUTS)
@pytest.mark.parametrize("Ev", [8, 5])
def test_attention_lies_in_memory_as_torchs(of_query, of_key, Ev):
    q, k = laid_out((2, 3, 7, 8), LAYOUTS[of_query]), laid_out((2, 3, 6, 8), LAYOUTS[of_key])
    v = laid_out((2, 3, 6, Ev), LAYOUTS[of_key])
    ours, theirs = (f(q, k, v) for f in (functional.scaled_dot_product_attention, F.scaled_dot_product_attention))
    assert ours.stride() == theirs.stride()
