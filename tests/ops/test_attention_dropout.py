"""Dropout in attention: its random bits, its statistics, its seed."""

import cases
import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pygpt
from pygpt.functional import scaled_dot_product_attention as sdpa
from pygpt.ops.common import dropout_factors
from tests.ops.attention_by_hand import kept, philox
from tests.ops.attention_cases import BY_NAME, MARKS

GPU_SHARE = {"triton": 9, "cuda": 6}  # see conftest
pytestmark = MARKS


# ------------------------------------------------------------------------------- dropout's random bits
KNOWN_ANSWERS = [  # of the authors' library: key, counter, words
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("key, counter, words", KNOWN_ANSWERS)
def test_philox_by_hand_gives_the_known_answers(key, counter, words):
    assert philox(key, np.array(counter, dtype=np.uint64)).tolist() == list(words)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 12345678901234])
def test_the_references_random_bits(seed, p):
    B, H, L, S = 2, 3, 5, 11
    rows, heads = torch.arange(L)[:, None], torch.arange(B * H).view(B, H, 1, 1)
    found = dropout_factors(torch.tensor([seed]), p, S, rows, heads)
    want = kept(seed, p, B, H, L, S).double() * (1 / (1 - p) if p < 1 else 0)
    assert torch.equal(found, want)


DROPOUT = BY_NAME["dropout"]


@pytest.mark.parametrize("option", [DROPOUT], ids=cases.ids)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("L", [3, 37])
def test_which_weights_dropout_drops(L, dtype, option, backend, device, seed, kernels):
    """Forward and backward drop the same ones, those of the contract, on every path and backend."""
    B, H, S, p = 2, 3, 61, (0.1, 0.5, 0.9)[seed % 3]
    key = int.from_bytes(seed.to_bytes(4, "little") * 2, "little", signed=True)
    q = torch.zeros(B, H, L, 64, dtype=dtype, device=device)
    k, v = (torch.zeros(B, H, S, 64, dtype=dtype, device=device) for _ in range(2))
    v[..., :S] = torch.eye(S)  # so that channel j of out is the weight of key j
    dout = torch.zeros_like(q)
    dout[..., :L] = torch.eye(L)
    options = None, None, None, torch.tensor([key], device=device), p
    out, lse = kernels.attention_fwd(q, k, v, False, 1.0, *options)
    _, _, dv, *_ = kernels.attention_bwd(dout, None, q, k, v, out, lse, False, 1.0, [False, False, True], *options)
    want = kept(key, p, B, H, L, S)
    assert torch.equal(out[..., :S].cpu() != 0, want) and torch.equal(dv[..., :L].mT.cpu() != 0, want)
    torch.testing.assert_close(out.amax().item() * S, 1 / (1 - p), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("option", [DROPOUT], ids=cases.ids)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_the_share_that_dropout_keeps(p, option, compiled, device):
    """Within five standard deviations, over all weights, and over those of each word of the generator."""
    q = torch.zeros(2, 4, 64, 64, device=device)
    v = torch.eye(64, device=device).expand(2, 4, 64, 64)
    with pygpt.backend(compiled):
        seen = sdpa(q, q, v, dropout_p=p) != 0
    for part in (seen, *(seen[..., word::4] for word in range(4)), seen[:, :, ::2], seen[0], seen[:, 1]):
        deviation = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(part.double().mean().item() - (1 - p)) < 5 * deviation


@pytest.mark.parametrize("option", [DROPOUT], ids=cases.ids)
def test_dropout_follows_manual_seed(option, backend, device):
    q, k, v = (torch.randn(1, 2, 20, 8, device=device) for _ in range(3))
    with pygpt.backend(backend):
        torch.manual_seed(3)
        first = sdpa(q, k, v, dropout_p=0.5)
        state = torch.get_rng_state()
        pygpt.explain(sdpa, q, k, v, dropout_p=0.5)
        sdpa(q, k, v)
        assert torch.equal(torch.get_rng_state(), state)  # what has no dropout draws nothing
        second = sdpa(q, k, v, dropout_p=0.5)
        torch.manual_seed(3)
        assert torch.equal(first, sdpa(q, k, v, dropout_p=0.5)) and torch.equal(second, sdpa(q, k, v, dropout_p=0.5))
        assert not torch.equal(first, second)
        nothing, lse = sdpa(q, k, v, dropout_p=1.0, return_lse=True)
        assert not nothing.any()
        torch.testing.assert_close(lse, sdpa(q, k, v, return_lse=True)[1])


@pytest.mark.parametrize("option", [DROPOUT], ids=cases.ids)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_is_replayed_by_checkpoints(use_reentrant, option, compiled, device):
    q, k, v = inputs = [torch.randn(1, 2, 20, 8, device=device, requires_grad=True) for _ in range(3)]
    context = {} if use_reentrant else {"context_fn": lambda: (pygpt.backend(compiled), pygpt.backend(compiled))}

    def attend(q, k, v):
        return sdpa(q, k, v, dropout_p=0.4, is_causal=True)

    results = []
    with pygpt.backend(compiled):
        for run in (attend, lambda *t: checkpoint(attend, *t, use_reentrant=use_reentrant, **context)):
            torch.manual_seed(5)
            out = run(q, k, v)
            torch.manual_seed(6)
            out.square().sum().backward()
            results.append([out.detach(), *(t.grad.clone() for t in inputs)])
            q.grad = k.grad = v.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
