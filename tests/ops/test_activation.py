"""gelu and relu over every 16-bit number, and over float32's whole range."""

import math

import cases
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import autograd, functional, reference, verify

GELUS = {"none": lambda x: functional.gelu(x), "tanh": lambda x: functional.gelu(x, approximate="tanh")}


def numbers(dtype, generator):
    """All of a 16-bit dtype; random bit patterns of float32 and float64."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    bits = torch.int32 if dtype.itemsize == 4 else torch.int64
    info = torch.iinfo(bits)
    patterns = torch.randint(info.min, info.max, (200_000,), dtype=bits, generator=generator).view(dtype)
    return torch.cat([patterns, torch.randn(100_000, dtype=torch.float64, generator=generator).to(dtype) * 3])


def with_gradient(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("approximate", GELUS)
def test_gelu_in_every_binade(approximate, dtype, backend, generator):
    """The exactness rule for each power of two and sign on its own: no large value hides a small one's error."""
    x = numbers(dtype, generator)
    x = x[x.isfinite()]
    with pygpt.backend(backend):
        ours = with_gradient(GELUS[approximate], x)
    theirs = with_gradient(lambda x: reference.gelu(x, approximate), x)
    x64 = (
        reference.gelu_fwd(x.double(), approximate),
        reference.gelu_bwd(torch.ones(len(x)).double(), x.double(), approximate),
    )
    assert_exact_in_every_binade(x, ours, theirs, x64)


def assert_exact_in_every_binade(x, ours, theirs, x64):
    """Results at the values x: ours, PyTorch's, and the exact ones."""
    dtype, binade = x.dtype, torch.frexp(x.double()).exponent * 2 + (x > 0)
    for our, their, exact in zip(ours, theirs, x64, strict=True):
        sane = their.isfinite() & exact.isfinite()
        assert our[sane].isfinite().all()
        buckets, index = binade[sane].unique(return_inverse=True)

        def worst(t, index=index, buckets=buckets):
            return torch.zeros(len(buckets), dtype=torch.float64).scatter_reduce(0, index, t, "amax")

        error, yardstick, scale = (worst(t[sane].double().abs()) for t in (our - exact, their - exact, exact))
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the spacing of subnormal numbers
        limit = 2 * yardstick + (verify.allowance(dtype) * scale + tiny)
        bad = error > limit
        assert not bad.any(), [
            (b // 2, b % 2, e) for b, e in zip(buckets[bad].tolist(), (error / limit)[bad].tolist(), strict=True)
        ]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_relu_is_torchs_bit_by_bit(dtype, kernels, generator):
    x = numbers(dtype, generator)
    ours = with_gradient(lambda x: autograd.ReLU.apply(kernels, x), x)
    for our, their in zip(ours, with_gradient(F.relu, x), strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("function", [functional.relu, *GELUS.values()])
def test_special_values_as_in_torch(function, dtype, backend):
    x = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype
    )
    theirs = (
        F.relu
        if function is functional.relu
        else lambda x: F.gelu(x, approximate="none" if function is GELUS["none"] else "tanh")
    )
    with pygpt.backend(backend):
        for our, their, wide in zip(
            *(with_gradient(*at) for at in ((function, x), (theirs, x), (theirs, x.double()))), strict=True
        ):
            # PyTorch's vectorised float32 makes NaN of gelu(inf) and of gelu_tanh'(1e38), its float64 does not
            right = torch.isclose(our, their, equal_nan=True) | torch.isclose(our, wide.to(dtype), equal_nan=True)
            assert right.all(), (x[~right], our[~right], their[~right])


BAD = [
    (functional.gelu, (None,), TypeError, "input must be a Tensor.*NoneType"),
    (functional.gelu, (torch.ones(2).int(),), TypeError, "input must be floating point.*int32"),
    (functional.gelu, (torch.ones(2), "sigmoid"), ValueError, "approximate must be.*'sigmoid'"),
    (functional.relu, ([1.0],), TypeError, "input must be a Tensor.*list"),
    (functional.relu, (torch.ones(2).bool(),), TypeError, "input must be floating point.*bool"),
    (functional.relu, (torch.ones(2, dtype=torch.complex64),), TypeError, "input must be floating point.*complex64"),
]


@pytest.mark.parametrize("function, args, error, message", BAD, ids=[f"{f.__name__}: {m}" for f, _, _, m in BAD])
def test_bad_arguments(function, args, error, message, backend):
    with pygpt.backend(backend), pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(*args)
