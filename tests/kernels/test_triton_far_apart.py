"""The Triton kernels on memory whose rows, heads or sequences are so far apart that offsets take more than 32 bits."""

import math

import cases
import pytest
import torch
import triton
import triton.language as tl

from pygpt import verify
from pygpt.dispatch import TABLE

if TABLE["triton"].missing:
    pytest.fail(TABLE["triton"].missing, pytrace=False)
from pygpt.triton_kernels import attention, common, norm
from pygpt.triton_kernels.attention import tiles as attention_tiles

KERNELS = TABLE["triton"].kernels
DEVICE = TABLE["triton"].devices[0]
EVEN, HALF, ODD = 2**31 + 16, 2**30 + 16, 2**31 + 11  # strides in elements; EVEN and HALF keep rows aligned to 16 bytes
FAR = [(EVEN, torch.bfloat16), (HALF, torch.bfloat16), (HALF, torch.float32), (ODD, torch.bfloat16)]
POINTERS, DESCRIPTORS = [(*far, "sm80") for far in FAR], [(*far, "sm90") for far in FAR[:2]]


def sparse(elements, dtype):
    """A large zero tensor. On a CPU only the pages that are touched exist."""
    size = elements * dtype.itemsize
    if DEVICE == "cpu":
        return cases.sparse(elements, dtype)
    if torch.cuda.mem_get_info()[0] < size + 2**30:
        pytest.skip(f"needs {size >> 30} GB of GPU memory")
    return torch.zeros(elements, dtype=dtype, device=DEVICE)


class FarApart:
    """Draws tensors that have a large stride along one dimension and are dense along the others, all in one memory."""

    def __init__(self, stride, length, dtype, generator):
        self.stride, self.length, self.generator, self.used = stride, length, generator, 0
        self.memory = sparse((length - 1) * stride + 2**17, dtype)

    def __call__(self, *shape, far=0):
        dense = [n for d, n in enumerate(shape) if d != far]
        strides = list(torch.empty(dense, device="meta").stride())
        t = self.memory.as_strided(shape, [*strides[:far], self.stride, *strides[far:]], self.used)
        self.used += -(-math.prod(dense) // 16) * 16
        assert shape[far] <= self.length and self.used <= 2**17
        return t.copy_(torch.randn(shape, generator=self.generator))


def near(t):
    """A copy with a small stride instead of the large one, and rows that are aligned alike."""
    if not isinstance(t, torch.Tensor) or max(t.stride()) < 2**30:
        return t
    small = -(-t.numel() // 16) * 16 + max(t.stride()) % 16
    return t.new_empty_strided(t.shape, [min(stride, small) for stride in t.stride()]).copy_(t)


def assert_same_when_near(name, *args):
    ours, want = (verify.as_tuple(getattr(KERNELS, name)(*each)) for each in (args, map(near, args)))
    for a, b in zip(ours, want, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("in_registers", [True, False])
@pytest.mark.parametrize("stride, dtype", FAR, ids=cases.ids)
def test_norms_of_rows_that_are_far_apart(stride, dtype, in_registers, generator, monkeypatch):
    if not in_registers:  # then rows are read again for each pass
        monkeypatch.setattr(norm, "FWD_WIDTH", 0)
        monkeypatch.setattr(norm, "BWD_WIDTH", 0)
    draw_far = FarApart(stride, 5, dtype, generator)
    x, residual, dy, ds = (draw_far(5, 64) for _ in range(4))
    w, mean, rstd = (torch.rand(n, generator=generator).to(DEVICE) for n in (64, 5, 5))
    assert_same_when_near("add_layer_norm_fwd", x, residual, w.to(dtype), w.to(dtype), 1e-5)
    assert_same_when_near("add_layer_norm_bwd", dy, ds, x, w.to(dtype), mean, rstd, [True] * 3)
    assert_same_when_near("add_rms_norm_fwd", x, residual, w.to(dtype), 1e-5)
    assert_same_when_near("add_rms_norm_bwd", dy, ds, x, w.to(dtype), rstd, [True] * 2)
    dropout = torch.tensor([5], device=DEVICE), 0.3
    assert_same_when_near("dropout_add_layer_norm_fwd", x, residual, w, w, 1e-5, *dropout)
    assert_same_when_near("dropout_add_layer_norm_bwd", dy, ds, x, w, mean, rstd, [True] * 4, *dropout)


@pytest.mark.parametrize("stride, dtype, target", POINTERS + DESCRIPTORS, ids=cases.ids)
def test_products_of_rows_that_are_far_apart(stride, dtype, target, generator):
    draw_far = FarApart(stride, 17, dtype, generator)
    x, dy, w, hidden, proj = (draw_far(*shape) for shape in ((17, 32), (17, 16), (16, 32), (17, 16), (16, 16)))
    with common.compiling_for(target):
        assert_same_when_near("linear_fwd", x, w, None)
        assert_same_when_near("linear_bwd", dy, x, w, [True] * 3)
        assert_same_when_near("mlp_fwd", x, w, None, proj, None, "gelu")
        assert_same_when_near("mlp_bwd", dy, x, w, proj, hidden, hidden, "gelu", [True] * 5)
        half = proj[:, :8]
        assert_same_when_near("mlp_fwd", x, w, None, half, None, "swiglu")
        assert_same_when_near("mlp_bwd", dy, x, w, half, hidden[:, :8], hidden, "swiglu", [True] * 5)


@pytest.mark.parametrize("far", [0, 1, 2])  # sequences, heads or positions
@pytest.mark.parametrize("stride, dtype, target", POINTERS + DESCRIPTORS, ids=cases.ids)
def test_attention_of_what_is_far_apart(stride, dtype, target, far, generator):
    draw_far, draw_statistics = (FarApart(stride, 5, each, generator) for each in (dtype, torch.float32))
    shape = [5 if d == far else n for d, n in enumerate((1, 2, 5, 16))]
    q, k, v, out, dout = (draw_far(*shape, far=far) for _ in range(5))
    lse, dlse = torch.rand(shape[:3], generator=generator).to(DEVICE), draw_statistics(*shape[:3], far=far)
    with common.compiling_for(target):
        assert_same_when_near("attention_fwd", q, k, v, True, 0.3)
        assert_same_when_near("attention_bwd", dout, dlse, q, k, v, out, lse, True, 0.3, [True] * 3)


@pytest.mark.parametrize("far", [0, 1, 2])
def test_an_output_of_attention_that_is_far_apart(far, generator, monkeypatch):
    """Outputs are dense, but those of a large call are as large."""
    shape = [5 if d == far else n for d, n in enumerate((1, 2, 5, 16))]
    q = torch.randn(shape, generator=generator).bfloat16().to(DEVICE)
    want = KERNELS.attention_fwd(q, q, q, False, 0.3)
    draw_far = FarApart(HALF, 5, torch.bfloat16, generator)
    monkeypatch.setattr(attention, "empty_strided", lambda *_: draw_far(*shape, far=far))
    assert all(map(torch.equal, KERNELS.attention_fwd(q, q, q, False, 0.3), want))


@triton.jit
def _store_one_row(grad, stats, length, head, row, H, L, WIDTH: tl.constexpr):
    ones = tl.full([1, WIDTH], 1.0, tl.float32)
    attention_tiles.store_gradient(
        grad,
        attention_tiles.Tile(
            attention_tiles.Operand(grad, 0, length, 0, 0, 0, WIDTH, 1, WIDTH),
            attention_tiles.TileCoord(0, head, head // H, head % H),
            row,
            ones,
        ),
        H,
        H,
    )
    tl.store(attention_tiles.rows_of_head(stats, head, L, 0), 1.0)


@pytest.mark.parametrize("head, row", [(3, 0), (0, 2**17 - 1), (3, 2**17 - 1)])
def test_gradients_and_statistics_of_attention_past_32_bits(head, row):
    """The addresses in (B, T, H, WIDTH) gradients and in (B H, L) statistics that are large themselves."""
    B, T, H, width, L = 2, 2**17, 2, 2**14, 2**30
    grad, stats = sparse(B * T * H * width, torch.bfloat16), sparse(B * H * L, torch.float32)
    _store_one_row[(1,)](grad, stats, T, head, row, H, L, width)
    assert grad.view(B, T, H, width)[head // H, row, head % H].eq(1).all()
    assert stats[head * L] == 1
