"""The numbers that Triton's attention must give: a row's only key weighs one, dropout's bits, tanh, some gradients."""

import itertools
import math

import cases
import pytest
import torch
import triton
import triton.language as tl

from pygpt.dispatch import TABLE

if TABLE["triton"].missing:
    pytest.fail(TABLE["triton"].missing, pytrace=False)
from pygpt.triton_kernels import attention
from pygpt.triton_kernels.attention import scores
from pygpt.triton_kernels.attention import tiles as attention_tiles

from pygpt.ops import attention as oracle
from pygpt.ops.common import _philox

KERNELS = TABLE["triton"].kernels
DEVICE = TABLE["triton"].devices[0]


# ------------------------------------------------------------------------------- attention's two forms of p
def one_key_rows(smallest, largest, dtype, generator):
    """q, k and scale of rows whose own key has all their weight. Scores times log2 e have either sign and such sizes.

    All products are small integers times a power of two, so that their sums are exact in any order.
    """
    L, E, scale = 70 if dtype == torch.float32 else 150, 64, 30.3
    k = torch.randint(2, (L, E), generator=generator).double() * 2 - 1
    k[:, -1] = 1
    size = smallest * (largest / smallest) ** torch.rand(L, 1, generator=generator).double()
    size[:2] = torch.tensor([[smallest], [largest]])
    unit = (size / (63 * scale * math.log2(math.e))).to(torch.bfloat16).double()
    q = unit * k
    q[:, -1] = torch.where(torch.rand(L, generator=generator) < 0.5, 0, -128 * unit[:, 0])
    return *(t.to(dtype)[None, None].to(DEVICE) for t in (q, k)), scale


@pytest.mark.parametrize(
    "smallest, largest, causal, dtype",
    [
        (0.1, 0.95, False, torch.bfloat16),  # no row of a tile is beyond the limit of the fused form,
        (0.2, 0.95, False, torch.float16),
        (0.5, 1.05, False, torch.bfloat16),  # a few hardly,
        (0.2, 200.0, False, torch.bfloat16),  # many by far
        (0.2, 200.0, True, torch.float16),
        (0.1, 0.95, False, torch.float32),  # which has no fused form
    ],
    ids=cases.ids,
)
def test_the_only_key_of_a_row_weighs_exactly_one(smallest, largest, causal, dtype, generator):
    limit = 2**21 * torch.finfo(torch.bfloat16 if dtype == torch.float32 else dtype).eps
    q, k, scale = one_key_rows(smallest * limit, largest * limit, dtype, generator)
    v, dout = (torch.randn(q.shape, generator=generator).to(q) for _ in range(2))
    scale_f = torch.tensor(scale, dtype=torch.float32, device=DEVICE)
    out, lse = KERNELS.attention_fwd(q, k, v, causal, scale)
    assert torch.equal(out, v)
    assert torch.equal(lse, (q.float() * k.float()).sum(-1) * scale_f)
    grads = KERNELS.attention_bwd(dout, torch.ones_like(lse), q, k, v, out, lse, causal, scale, [True] * 3)
    dq, dk, dv = grads[:3]
    assert torch.equal(dv, dout)
    how = {"rtol": 1e-5 if dtype == torch.float32 else 0, "atol": 0}  # of ds, which is that of lse
    torch.testing.assert_close(dq, (scale_f * k.float()).to(dtype), **how)
    torch.testing.assert_close(dk, (scale_f * q.float()).to(dtype), **how)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-60, -1e-60])
def test_a_scale_that_vanishes_in_float32_is_zero(scale, generator):
    q = torch.randn(1, 1, 70, 16, generator=generator).to(DEVICE)
    mean = q.cumsum(2) / torch.arange(1, 71, device=DEVICE)[:, None]
    torch.testing.assert_close(KERNELS.attention_fwd(q, q, q, True, scale)[0], mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.ids)
def test_grouped_heads_of_which_one_is_beyond_the_fused_form(dtype, generator):
    """Its keys start over with all heads of the group."""
    q, k, v, dout = (torch.randn(1, heads, 140, 64, generator=generator).to(dtype).to(DEVICE) for heads in (4, 2, 2, 4))
    q[:, 1] *= 2000
    args = q, k, v, False, 1.0
    out, lse = KERNELS.attention_fwd(*args)
    got = KERNELS.attention_bwd(dout, None, q, k, v, out, lse, False, 1.0, [True] * 3)
    repeated = (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), False, 1.0)
    all_out, all_lse = KERNELS.attention_fwd(*repeated)
    assert torch.equal(out, all_out) and torch.equal(lse, all_lse)
    dq, dk, dv = KERNELS.attention_bwd(dout, None, *repeated[:3], out, lse, False, 1.0, [True] * 3)[:3]
    assert torch.equal(got[0], dq)
    for a, b in zip(got[1:3], (dk, dv), strict=True):
        want = b.double().unflatten(1, (2, 2)).sum(2)
        error = (a.double() - want).norm() / want.norm()
        assert error < 4 * torch.finfo(dtype).eps


# ------------------------------------------------------------------------------- attention's options
@triton.jit
def _kept(result, seed, threshold, head, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    none = attention_tiles.Scores(
        None, None, None, None, None, None, None, None, seed, threshold, None, False, True
    )  # fmt: skip
    params = attention_tiles.Params(
        attention_tiles.Visible(0, 0, 0, 0, 0, False, False), none, 0, 0, 0, 0.0, 1, False, 0, 0
    )
    keep = scores.kept(head, row, col, params, ROWS, COLS)
    tl.store(result + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize("head, row, col", [(0, 0, 0), (7, 35, 48), (2**20 + 1, 2**21 + 5, 2**22 + 64)])
def test_dropouts_bits(p, head, row, col, generator):
    """Bit for bit those of the formulas."""
    ROWS, COLS = 16, 32
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator)
    keep = torch.zeros(ROWS, COLS, dtype=torch.int8, device=DEVICE)
    threshold = attention._scores(oracle.Options(seed=seed, dropout_p=p))[0][-2]
    _kept[(1,)](keep, seed.to(DEVICE), threshold, head, row, col, ROWS, COLS)
    group, rows = col // 4 + torch.arange(COLS // 4), torch.arange(row, row + ROWS)[:, None]
    words = torch.stack(_philox(seed, (group, rows, head, 0)), -1).flatten(-2)
    assert torch.equal(keep.cpu().bool(), words >= min(math.floor(p * 2**32), 2**32 - 1))


@triton.jit
def _tanh(y, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, scores.tanh(tl.load(x + i)))


def test_tanh_of_small_and_large_numbers():
    x = torch.cat([torch.logspace(-30, 2, 2047, dtype=torch.float64), torch.tensor([math.inf])]).float()
    x = torch.cat([x, -x]).to(DEVICE)
    y = torch.empty_like(x)
    _tanh[(1,)](y, x, len(x))
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=3 * 2**-24, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize(
    "left, causal, S", [(0, False, 257), (3, False, 257), (-1, False, 1), (-1, True, 1), (0, True, 40)]
)
def test_a_row_that_sees_one_key_has_the_gradient_of_lse_alone(left, causal, S, dtype, generator):
    """Also in a tile that has one key (S = 257, and S = 1), in which no other query needs a mask."""
    L = 300 if S > 1 else 70
    q, k, v, dout = (torch.randn(1, 1, n, 16, generator=generator).to(dtype).to(DEVICE) for n in (L, S, S, L))
    options = None, None, None, None, 0.0, 0.0, left, -1 if causal or left < 0 else 20, False
    out, lse = KERNELS.attention_fwd(q, k, v, causal, 0.3, *options)
    begin, end = oracle.interval(L, S, DEVICE, causal, oracle.Options(*options))
    one = (end - begin == 1)[:, 0]
    assert one.any()
    for dlse in (None, torch.randn(lse.shape, generator=generator).to(DEVICE)):
        got = KERNELS.attention_bwd(dout, dlse, q, k, v, out, lse, causal, 0.3, [True] * 3, *options)
        want = oracle.attention_bwd(dout, dlse, q, k, v, out, lse, causal, 0.3, [True] * 3, *options)
        for a, b in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=5e-2 * b.std().item())
        if dlse is None:
            assert not got[0][:, :, one].any()
            if S == 1:
                assert not got[1].any()


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 40), (1, 70))), ids=str)
@pytest.mark.share(3)
def test_the_gradient_of_a_mask_that_is_broadcast(shape, generator):
    q, k, v, dout = (
        torch.randn(2, heads, n, 16, generator=generator).to(DEVICE)
        for heads, n in ((4, 40), (2, 70), (2, 70), (4, 40))
    )
    mask = torch.randn(shape, generator=generator).to(DEVICE)
    sink = torch.randn(4, generator=generator).to(DEVICE)  # without it, the gradients of a row sum to 0
    options = mask, None, sink, None, 0.0, 0.0, 20, -1, True
    needs = [False, False, False, True, False, False]
    out, lse = KERNELS.attention_fwd(q, k, v, False, 0.3, *options)
    got = KERNELS.attention_bwd(dout, None, q, k, v, out, lse, False, 0.3, needs, *options)[3]
    want = oracle.attention_bwd(dout, None, q, k, v, out, lse, False, 0.3, needs, *options)[3]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
