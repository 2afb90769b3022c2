"""What is CUDA C++'s own in attention's options, on the emulator: tiles that are skipped, dropout's bits, rows that see
one key, head dimensions. Parity with float64 is tested for all backends alike.
"""

import math

import pytest
import torch

from pygpt.ops import attention
from pygpt.ops.common import dropout_factors

from .. import emulator
from ..emulator import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (64, 128, 256)  # the padded head dimensions


@pytest.fixture(scope="module")
def kernels():
    return emulator.kernels(schedules=("random",))


def inputs(B, Hq, Hkv, L, S, E, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, E), (B, Hq, L, E)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def options(**named):
    return tuple(attention.Options(**named))


def products(call) -> int:
    """How many mma instructions a call runs."""
    module = build.load()
    module.reset_statistics()
    call()
    return module.statistics()["mma"]


@pytest.mark.parametrize("hidden", ["window", "keys", "queries"])
def test_tiles_without_a_visible_key_are_skipped(hidden, kernels):
    L = S = 256
    q, k, v, dout = inputs(1, 2, 1, L, S, 64, torch.bfloat16)
    visible = torch.ones(1, 1, L, S, dtype=torch.bool)
    if hidden == "window":
        some, every = options(left=15, right=0), options(left=S, right=L)
    else:
        visible[..., 64:] = False if hidden == "keys" else visible[..., 64:]
        visible[:, :, 64:] = False if hidden == "queries" else visible[:, :, 64:]
        some, every = options(attn_mask=visible), options(attn_mask=torch.ones_like(visible))
    out, lse = kernels.attention_fwd(q, k, v, False, 0.1, *some)
    for call in (
        lambda o: kernels.attention_fwd(q, k, v, False, 0.1, *o),
        lambda o: kernels.attention_bwd(dout, None, q, k, v, out, lse, False, 0.1, [True, False, False], *o),
        lambda o: kernels.attention_bwd(dout, None, q, k, v, out, lse, False, 0.1, [False, True, True], *o),
    ):
        count = products(lambda call=call: call(some))
        assert 0 < count <= 0.55 * products(lambda call=call: call(every))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("E", WIDTHS)
def test_dropout_drops_what_philox_says(E, dtype, kernels):
    """With equal scores and one key to a channel, a weight is where out and dv are not 0."""
    B, Hq, Hkv, L, S = 1, 2, 1, 37, 50
    q, k, v, dout = (
        torch.zeros(s, dtype=dtype) for s in ((B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, E), (B, Hq, L, E))
    )
    v[..., torch.arange(S), torch.arange(S)] = 1
    dout[..., torch.arange(L), torch.arange(L)] = 1
    seed = torch.tensor([-123456789123456789])
    heads = torch.arange(B * Hq).view(B, Hq, 1, 1)
    kept = dropout_factors(seed, 0.4, S, torch.arange(L)[:, None], heads) > 0
    o = options(seed=seed, dropout_p=0.4)
    out, lse = kernels.attention_fwd(q, k, v, False, 1.0, *o)
    assert torch.equal(out[..., :S] != 0, kept)
    dv = kernels.attention_bwd(dout, None, q, k, v, out, lse, False, 1.0, [False, False, True], *o)[2]
    expected = kept.double().sum(1, keepdim=True).mT / (S * 0.6)
    torch.testing.assert_close(dv[..., :L].double(), expected, rtol=1e-2, atol=0)
    mask = torch.zeros(B, Hq, L, S)
    o = options(seed=seed, dropout_p=0.4, attn_mask=mask)
    dmask = kernels.attention_bwd(torch.ones_like(dout), None, q, k, torch.ones_like(v), out * 0, lse, False, 1.0,
                                  [False, False, False, True, False, False], *o)[3]  # fmt: skip
    assert torch.equal(dmask != 0, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("E", WIDTHS)
@pytest.mark.parametrize("general", [False, True])
def test_rows_that_see_one_key(general, E, dtype, kernels):
    """Their ds is exactly dlse, and dv gets their dout."""
    B, Hq, Hkv, L = 1, 2, 1, 70
    q, k, v, dout = inputs(B, Hq, Hkv, L, L, E, dtype)
    q, k = q * 8, k * 8
    for o in (options(left=0, right=0), options(left=3, right=0), options(left=0, right=3)):
        o = (torch.zeros(1, 1, L, L), *o[1:]) if general else o
        out, lse = kernels.attention_fwd(q, k, v, False, 0.3, *o)
        dq, dk, dv, *_ = kernels.attention_bwd(dout, None, q, k, v, out, lse, False, 0.3, [True] * 3, *o)
        row = -1 if o[6] == 0 else 0
        assert not dq[:, :, row].any()
        if o[6] == o[7] == 0:
            assert not dq.any() and not dk.any() and torch.equal(out, v.expand_as(out))
            torch.testing.assert_close(dv, dout.float().sum(1, keepdim=True).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("S", [1, 90])
def test_one_key_for_all_queries(S, kernels):
    q, k, v, dout = inputs(2, 4, 2, 70, S, 24, torch.float32)
    o = options(sink=torch.randn(4)) if S > 1 else options()
    out, lse = kernels.attention_fwd(q, k, v, False, 0.3, *o)
    grads = kernels.attention_bwd(dout, None, q, k, v, out, lse, False, 0.3, [True] * 3, *o)
    want = attention.attention_bwd(dout, None, q, k, v, out, lse, False, 0.3, [True] * 3, *o)
    for found, expected in zip(grads[:3], want[:3], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert S > 1 or not (grads[0].any() or grads[1].any())


@pytest.mark.parametrize("shape", [(2, 4, 70, 85), (1, 4, 1, 85), (2, 1, 70, 1), (1, 1, 70, 85), (1, 1, 1, 1)])
def test_gradients_of_a_broadcast_mask_are_sums(shape, kernels):
    """Those of the expanded mask, added over what was broadcast."""
    q, k, v, dout = inputs(2, 4, 2, 70, 85, 24, torch.float32)
    mask, dlse = torch.randn(shape), torch.randn(2, 4, 70)
    slopes = torch.rand(2, 4)
    whole = options(attn_mask=mask.expand(2, 4, 70, 85).contiguous(), alibi_slopes=slopes, softcap=3.0)
    out, lse = kernels.attention_fwd(q, k, v, True, 0.3, *whole)
    needs = [False] * 3 + [True, True, False]
    every = kernels.attention_bwd(dout, dlse, q, k, v, out, lse, True, 0.3, needs, *whole)
    found = kernels.attention_bwd(dout, dlse, q, k, v, out, lse, True, 0.3, needs, mask, *whole[1:])
    terms = every[3].abs().sum_to_size(shape)
    assert (found[3] - every[3].sum_to_size(shape)).abs().le(1e-5 * terms + 1e-7).all()
    torch.testing.assert_close(found[4], every[4], rtol=1e-4, atol=1e-4)
    alone = kernels.attention_bwd(
        dout, dlse, q, k, v, out, lse, True, 0.3, [False] * 4 + [True, False], mask, *whole[1:]
    )
    torch.testing.assert_close(alone[4], every[4], rtol=1e-4, atol=1e-4)


def test_head_dimensions_above_256_are_an_error(kernels):
    q, k, v, dout = inputs(1, 1, 1, 3, 3, 257, torch.float32)
    with pytest.raises(RuntimeError, match="head dimensions above 256"):
        kernels.attention_fwd(q, k, v, False, 1.0)
    with pytest.raises(RuntimeError, match="head dimensions above 256"):
        kernels.attention_bwd(dout, None, q, k, v, q, torch.zeros(1, 1, 3), False, 1.0, [True] * 3)


def test_rows_without_keys_give_zeros_and_sinks(kernels):
    q, k, v, dout = inputs(1, 2, 1, 40, 10, 24, torch.bfloat16)
    sink = torch.tensor([0.5, -math.inf])
    o = options(sink=sink, lower_right=True, right=0)
    out, lse = kernels.attention_fwd(q, k, v, False, 0.3, *o)
    assert not out[:, :, :30].any() and torch.equal(lse[0, :, :30], sink[:, None].expand(2, 30))
    grads = kernels.attention_bwd(dout, None, q, k, v, out, lse, False, 0.3, [True] * 3 + [False, False, True], *o)
    assert not grads[0][:, :, :30].any() and all(g.isfinite().all() for g in grads)


# ------------------------------------------------------------------------------- packed sequences
LENGTHS_Q, LENGTHS_K = (5, 0, 150, 1, 33), (150, 7, 130, 64, 0)


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed_inputs(E, dtype):
    """q, k, v, dout, dlse of two query heads and one key head."""
    L, S = sum(LENGTHS_Q), sum(LENGTHS_K)
    tensors = [t[0].transpose(0, 1).contiguous() for t in inputs(1, 2, 1, L, S, E, dtype)]
    return *tensors, torch.randn(2, L, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("E", WIDTHS)
@pytest.mark.parametrize("left, right, used", [(-1, 0, None), (40, 3, (149, 0, 70, 64, 0))])
def test_packed_sequences_have_the_bits_of_dense_calls(left, right, used, E, dtype, kernels):
    q, k, v, dout, dlse = packed_inputs(E, dtype)
    first_q, first_k, keys = starts(LENGTHS_Q), starts(LENGTHS_K), used or LENGTHS_K
    rows = first_q, first_k, None if used is None else torch.tensor(used).int()
    args = *rows, max(LENGTHS_Q), max(LENGTHS_K), 0.3, left, right
    out, lse = kernels.varlen_attn_fwd(q, k, v, *args)
    dq, dk, dv = kernels.varlen_attn_bwd(dout, dlse, q, k, v, out, lse, [True] * 3, *args)
    o = options(left=left, right=right, lower_right=True)
    for b, (L, S) in enumerate(zip(LENGTHS_Q, keys, strict=True)):
        of_q, of_k = slice(first_q[b], first_q[b] + L), slice(first_k[b], first_k[b] + S)
        tensors = [t.transpose(0, 1)[None] for t in (q[of_q], k[of_k], v[of_k], dout[of_q])]
        want = kernels.attention_fwd(*tensors[:3], False, 0.3, *o)
        assert torch.equal(out[of_q], want[0][0].transpose(0, 1)) and torch.equal(lse[:, of_q], want[1][0])
        of_lse = dlse[None, :, of_q].contiguous()
        grads = kernels.attention_bwd(tensors[3], of_lse, *tensors[:3], *want, False, 0.3, [True] * 3, *o)
        for found, expected in zip((dq[of_q], dk[of_k], dv[of_k]), grads[:3], strict=True):
            assert torch.equal(found, expected[0].transpose(0, 1))
        for gradient in (dk, dv):
            assert not gradient[of_k.stop : first_k[b + 1]].any()


def test_a_longer_maximum_adds_no_work(kernels):
    """Blocks past the end of their sequence stop at once."""
    q, k, v, dout, _ = packed_inputs(64, torch.bfloat16)
    rows = starts(LENGTHS_Q), starts(LENGTHS_K), None
    exact, longer = ((*rows, max(LENGTHS_Q) + more, max(LENGTHS_K) + more, 0.3, -1, 0) for more in (0, 1000))
    out, lse = kernels.varlen_attn_fwd(q, k, v, *exact)
    for call in (
        lambda args: kernels.varlen_attn_fwd(q, k, v, *args),
        lambda args: kernels.varlen_attn_bwd(dout, None, q, k, v, out, lse, [True] * 3, *args),
    ):
        assert 0 < products(lambda call=call: call(exact)) == products(lambda call=call: call(longer))
