"""What Triton's interpreter computes differently from a GPU.

Each test asserts what a GPU does. Where the interpreter is wrong the kernels avoid it: see common.py.
"""

import pytest
import torch
import triton
import triton.language as tl

from pygpt.dispatch import TABLE

if TABLE["triton"].missing:
    pytest.fail(TABLE["triton"].missing, pytrace=False)
from pygpt.triton_kernels import common

DEVICE = TABLE["triton"].devices[0]


def interpreter_is_wrong(why):
    return pytest.mark.xfail(common.INTERPRETED, reason=why, raises=Exception, strict=False)


@triton.jit
def _convert(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _double(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(y + i, a + a)


@triton.jit
def _square(x, y, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + at)
    tl.store(y + at, tl.dot(a, a))


@triton.jit
def _fma(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(y + i, tl.fma(a, a, -(a * a)))


@triton.jit
def _our_fma(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(y + i, common.fma(a, 1.1, -(a * 1.1)))


def run(kernel, x, dtype, N=16):
    y = torch.empty_like(x, dtype=dtype, device=DEVICE)
    kernel[(1,)](x.to(DEVICE), y, N)
    return y.cpu()


@interpreter_is_wrong("float32 to bfloat16 truncates instead of rounding to nearest even")
def test_rounding_to_bfloat16(generator):
    x = torch.randn(16, generator=generator)
    assert torch.equal(run(_convert, x, torch.bfloat16), x.bfloat16())


@interpreter_is_wrong("bfloat16 subnormal numbers are not converted to float32 rightly")
def test_subnormal_bfloat16():
    x = torch.arange(1, 17).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(run(_convert, x, torch.float32), x.float())


@interpreter_is_wrong("bfloat16 arithmetic works on the bits as integers")
def test_arithmetic_in_bfloat16(generator):
    x = torch.randn(16, generator=generator).bfloat16()
    assert torch.equal(run(_double, x, torch.bfloat16), x + x)


@interpreter_is_wrong("a product of bfloat16 matrices multiplies the bits as integers")
def test_product_in_bfloat16(generator):
    x = torch.randn(16, 16, generator=generator).bfloat16()
    torch.testing.assert_close(run(_square, x, torch.float32), x.float() @ x.float())


@interpreter_is_wrong("before Triton 3.9 an fma is rounded twice")
def test_fma(generator):
    x = torch.randn(16, generator=generator)
    assert torch.equal(run(_fma, x, torch.float32).double(), x.double() ** 2 - (x * x).double())


def test_our_fma(generator):
    x, c = torch.randn(16, generator=generator), torch.tensor(1.1)
    assert torch.equal(run(_our_fma, x, torch.float32).double(), x.double() * c.double() - (x * c).double())


def test_the_same_in_float16_and_float32(generator):
    for dtype in (torch.float16, torch.float32):
        x = torch.randn(16, 16, generator=generator).to(dtype)
        torch.testing.assert_close(run(_square, x, torch.float32), x.float() @ x.float(), rtol=2e-3, atol=2e-3)
