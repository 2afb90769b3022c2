"""The modules against torch.nn, and against attention and MLP written out here."""

import math

import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import functional, nn

F64 = torch.float64


@pytest.mark.parametrize(
    "name, args",
    [("LayerNorm", (12,)), ("LayerNorm", ((3, 12),)), ("RMSNorm", (12,)), ("Linear", (12, 5))],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_drop_in_for_torch(name, args, dtype, backend):
    ours, theirs = getattr(nn, name)(*args, dtype=dtype), getattr(torch.nn, name)(*args, dtype=dtype)
    assert isinstance(ours, type(theirs))
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 12, dtype=dtype)
    with pygpt.backend(backend):
        torch.testing.assert_close(ours(x), theirs(x))


def test_layer_norm_with_residual(backend):
    norm = nn.LayerNorm(12, bias=False, dtype=F64)
    x, residual = torch.randn(2, 2, 5, 12, dtype=F64)
    with pygpt.backend(backend):
        normed, summed = norm(x, residual)
    torch.testing.assert_close(summed, x + residual)
    torch.testing.assert_close(normed, F.layer_norm(x + residual, (12,), norm.weight))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(activation, bias, backend):
    mlp = nn.MLP(6, 10, activation, bias, dtype=F64)
    assert list(mlp.state_dict()) == [
        f"{m}.{p}" for m in ("c_fc", "c_proj") for p in (("weight", "bias") if bias else ("weight",))
    ]
    act = {
        "gelu": F.gelu,
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda h: F.relu(h) ** 2,
    }
    x = torch.randn(2, 3, 6, dtype=F64)
    expected = F.linear(act[activation](F.linear(x, *mlp.c_fc.parameters())), *mlp.c_proj.parameters())
    with pygpt.backend(backend):
        torch.testing.assert_close(mlp(x), expected)


def plain_attention(m, x):
    """Heads one by one, scores in full."""
    _, T, C = x.shape
    D, H, G = C // m.num_heads, m.num_heads, m.num_heads // m.num_kv_heads
    qkv = F.linear(x, m.c_attn.weight, m.c_attn.bias)
    q, k, v = qkv.split((C, D * m.num_kv_heads, D * m.num_kv_heads), dim=2)
    heads = []
    for h in range(H):
        qh, kh, vh = (t[:, :, i * D : (i + 1) * D] for t, i in ((q, h), (k, h // G), (v, h // G)))
        s = (qh @ kh.mT / math.sqrt(D)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        heads.append(s.softmax(-1) @ vh)
    return F.linear(torch.cat(heads, 2), m.c_proj.weight, m.c_proj.bias)


@pytest.mark.parametrize("kv_heads", [None, 4, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_attention(kv_heads, bias):
    m = nn.CausalSelfAttention(24, 4, kv_heads, bias, dtype=F64)
    x = torch.randn(2, 7, 24, dtype=F64)
    torch.testing.assert_close(m(x), plain_attention(m, x))
    torch.testing.assert_close(m(x[:, :1]), plain_attention(m, x[:, :1]))


def test_attention_takes_views(monkeypatch):
    """Queries, keys and values are views of c_attn's output."""
    seen = []
    sdpa = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *a, **k: seen.extend(a) or sdpa(*a, **k))
    m = nn.CausalSelfAttention(24, 4, 2)
    m(torch.randn(2, 7, 24))
    q, k, v = seen
    assert q.shape == (2, 4, 7, 6) and k.shape == v.shape == (2, 2, 7, 6)
    assert len({t.untyped_storage().data_ptr() for t in seen}) == 1


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 1, 1, 1], [3, 4, 2], [9]])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cache(pieces, kv_heads):
    """However the positions are cut into calls, the cached result is that of one call."""
    m = nn.CausalSelfAttention(24, 4, kv_heads, dtype=F64).eval()
    x = torch.randn(2, 9, 24, dtype=F64)
    cache = nn.KVCache(9)
    torch.testing.assert_close(torch.cat([m(part, cache) for part in x.split(pieces, 1)], 1), m(x))
    with pytest.raises(ValueError, match="10 positions, room for 9"):
        m(x[:, :1], cache)


def test_dropout_only_while_training():
    for m in nn.CausalSelfAttention(24, 4, dropout=0.5), nn.MLP(24, dropout=0.5):
        x = torch.randn(2, 7, 24)
        assert not torch.equal(m(x), m(x))
        m.eval()
        assert torch.equal(m(x), m(x))
        m.dropout.train()  # by itself, as Monte Carlo dropout does (Gal and Ghahramani 2016)
        assert not torch.equal(m(x), m(x))


@pytest.mark.parametrize("shape", [(0, 7, 24), (2, 0, 24)], ids=str)
def test_nothing_to_attend_to(shape):
    assert nn.CausalSelfAttention(24, 4, 2)(torch.randn(shape)).shape == shape


def test_factory_arguments():
    for m in nn.CausalSelfAttention(8, 2, device="meta", dtype=F64), nn.MLP(8, device="meta", dtype=F64):
        assert {(p.device.type, p.dtype) for p in m.parameters()} == {("meta", F64)}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.CausalSelfAttention(10, 3), "embed_dim 10 does not divide by num_heads 3"),
        (lambda: nn.CausalSelfAttention(10, 0), "num_heads 0"),
        (lambda: nn.CausalSelfAttention(12, 4, 3), "num_heads 4 is no multiple of num_kv_heads 3"),
        (lambda: nn.MLP(8, activation="swish"), "unknown activation 'swish'"),
        (lambda: nn.CausalSelfAttention(8, 2)(torch.zeros(3, 8)), r"x must be \(B, T, 8\), got \(3, 8\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
