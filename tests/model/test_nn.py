"""The modules against torch.nn, and against attention and MLP written out here.

Layers of theirs that hooks, adapters or patches change are in test_changed_layers.py.
"""

import io
import math

import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import nn, reference

F64 = torch.float64


def of_kind(kind):
    return (nn.MLP(8, dtype=F64) if kind == "MLP" else nn.CausalSelfAttention(8, 2, dtype=F64)).eval()


def value_and_gradients(call, m, x, dy):
    x = x.clone().requires_grad_()
    m.zero_grad()
    y = call(x)
    y.backward(dy)
    assert all(p.grad is not None for p in m.parameters())
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in m.named_parameters()}}


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


def halves(h):
    return h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(activation, bias, backend):
    mlp = nn.MLP(6, 10, activation, bias, dtype=F64)
    assert mlp.c_fc.weight.shape == (20 if activation in reference.GATED else 10, 6)
    assert list(mlp.state_dict()) == [
        f"{m}.{p}" for m in ("c_fc", "c_proj") for p in (("weight", "bias") if bias else ("weight",))
    ]
    act = {
        "gelu": F.gelu,
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda h: F.relu(h) ** 2,
        "swiglu": lambda h: F.silu(halves(h)[0]) * halves(h)[1],
        "geglu": lambda h: F.gelu(halves(h)[0]) * halves(h)[1],
    }
    x = torch.randn(2, 3, 6, dtype=F64)
    expected = F.linear(act[activation](F.linear(x, *mlp.c_fc.parameters())), *mlp.c_proj.parameters())
    with pygpt.backend(backend):
        torch.testing.assert_close(mlp(x), expected)


class LlamaMLP(torch.nn.Module):
    """As in transformers, with its names."""

    def __init__(self, width, hidden, bias):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(width, hidden, bias, dtype=F64) for _ in range(2))
        self.down_proj = torch.nn.Linear(hidden, width, bias, dtype=F64)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("bias", [True, False])
def test_llamas_layers_are_fused_and_split_again(bias):
    llama, x = LlamaMLP(6, 10, bias), torch.randn(3, 6, dtype=F64)
    mlp = nn.MLP(6, 10, "swiglu", bias, dtype=F64)
    gate, up = llama.gate_proj, llama.up_proj
    with torch.no_grad():
        for name, p in gate.named_parameters():
            getattr(mlp.c_fc, name).copy_(nn.fuse_gate(p, getattr(up, name)))
        mlp.c_proj.load_state_dict(llama.down_proj.state_dict())
    torch.testing.assert_close(mlp(x), llama(x))
    for name, p in mlp.c_fc.named_parameters():
        for half, layer in zip(nn.split_gate(p), (gate, up), strict=True):
            assert torch.equal(half, getattr(layer, name))


def test_what_is_no_gate_is_refused():
    with pytest.raises(ValueError, match=r"pygpt.nn.fuse_gate: gate is \(3, 2\), up \(4, 2\)"):
        nn.fuse_gate(torch.ones(3, 2), torch.ones(4, 2))
    for shape in ((), (3, 2)):
        with pytest.raises(ValueError, match="pygpt.nn.split_gate: fused must have an even number of rows"):
            nn.split_gate(torch.ones(shape))


def plain_attention(m, x):
    """Heads one by one, scores in full."""
    _, T, C = x.shape
    D, H, G = C // m.num_heads, m.num_heads, m.num_heads // m.num_kv_heads
    qkv = F.linear(x, m.c_attn.weight, m.c_attn.bias)
    q, k, v = qkv.split((C, D * m.num_kv_heads, D * m.num_kv_heads), dim=2)
    heads = []
    for h in range(H):
        qh, kh, vh = (t[:, :, i * D : (i + 1) * D] for t, i in ((q, h), (k, h // G), (v, h // G)))
        left = T if m.window is None else m.window
        visible = torch.ones(T, T).tril().triu(-left).bool()
        s = (qh @ kh.mT / math.sqrt(D)).masked_fill(~visible, -math.inf)
        heads.append(s.softmax(-1) @ vh)
    return F.linear(torch.cat(heads, 2), m.c_proj.weight, m.c_proj.bias)


@pytest.mark.parametrize("kv_heads", [None, 4, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window", [None, 0, 2, 99])
def test_attention(kv_heads, bias, window):
    m = nn.CausalSelfAttention(24, 4, kv_heads, bias, dtype=F64, window=window)
    x = torch.randn(2, 7, 24, dtype=F64)
    torch.testing.assert_close(m(x), plain_attention(m, x))
    torch.testing.assert_close(m(x[:, :1]), plain_attention(m, x[:, :1]))


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 1, 1, 1], [3, 4, 2], [9]])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 0, 3])
def test_cache(pieces, kv_heads, window):
    """However the positions are cut into calls, the cached result is that of one call."""
    m = nn.CausalSelfAttention(24, 4, kv_heads, dtype=F64, window=window).eval()
    x = torch.randn(2, 9, 24, dtype=F64)
    cache = nn.KVCache(9)
    torch.testing.assert_close(torch.cat([m(part, cache) for part in x.split(pieces, 1)], 1), m(x))
    with pytest.raises(ValueError, match="10 positions, room for 9"):
        m(x[:, :1], cache)


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: torch.cat([x, x]), lambda x: x.float()])
def test_a_cache_refuses_another_batch_or_dtype(change):
    """A batch of one is not broadcast to the others."""
    m, x, cache = nn.CausalSelfAttention(24, 4, dtype=F64), torch.randn(2, 3, 24, dtype=F64), nn.KVCache(9)
    with torch.no_grad():
        m(x, cache)
        other = change(x)
        with pytest.raises(ValueError, match="KVCache: holds"):
            m.to(other.dtype)(other, cache)
    assert cache.length == 3


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
        (lambda: nn.CausalSelfAttention(8, 2, window=-1), "window must be an integer from 0 on"),
        (lambda: nn.MLP(8, activation="swish"), "unknown activation 'swish'"),
        (lambda: nn.CausalSelfAttention(8, 2)(torch.zeros(3, 8)), r"x must be \(B, T, 8\), got \(3, 8\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("window", [None, 2])
def test_cached_decoding_compiles(window):
    """The branch that imports the lower-right mask, without a graph break."""
    m, x = of_kind("CausalSelfAttention"), torch.randn(2, 9, 8, dtype=F64)
    m.window = window

    def run(call):
        cache = nn.KVCache(9)
        return [call(part, cache) for part in x.split([4, 4, 1], 1)]

    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(m, fullgraph=True, backend="eager")), run(m))


@pytest.mark.parametrize("make", [lambda **f: nn.MLP(8, **f), lambda **f: nn.CausalSelfAttention(8, 2, **f)])
def test_reset_parameters(make, seed):
    """Draws what the constructor draws."""
    fresh, empty = (torch.manual_seed(seed), make())[1], make(device="meta").to_empty(device="cpu")
    for p in empty.parameters():
        p.data.fill_(math.nan)
    torch.manual_seed(seed)
    empty.reset_parameters()
    torch.testing.assert_close(dict(empty.named_parameters()), dict(fresh.named_parameters()), rtol=0, atol=0)


# ------------------------------------------------------------------------------- tracing
DROP_INS = [("LayerNorm", (8,)), ("RMSNorm", (8,)), ("Linear", (8, 5))]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name, args", DROP_INS)
def test_script(name, args, inside):
    """PyTorch's kernels compute, on the same parameters, and the module stays what it was."""
    m, theirs = getattr(nn, name)(*args), getattr(torch.nn, name)(*args)
    theirs.load_state_dict(m.state_dict())
    model = torch.nn.Sequential(m) if inside else m
    scripted, x = torch.jit.script(model), torch.randn(2, 3, 8)
    assert torch.equal(scripted(x), theirs(x))
    scripted(x).sum().backward()
    assert all(p.grad is not None for p in m.parameters())
    assert (model[0] if inside else model) is m and type(m) is getattr(nn, name)
    saved = io.BytesIO()
    torch.jit.save(scripted, saved)
    saved.seek(0)
    assert torch.equal(torch.jit.load(saved)(x), theirs(x))


def test_a_scripted_layer_norm_refuses_a_residual():
    x = torch.randn(2, 8)
    with pytest.raises(torch.jit.Error, match="takes no residual"):
        torch.jit.script(nn.LayerNorm(8))(x, x)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name, args", [*DROP_INS, ("MLP", (8,))])
def test_symbolic_trace(name, args, inside):
    m, x = getattr(nn, name)(*args), torch.randn(2, 3, 8)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(m) if inside else m)
    assert torch.equal(traced(x), m(x))
    assert any(node.op == "call_function" for node in traced.graph.nodes)


def test_symbolic_trace_of_a_layer_norm_takes_a_residual():
    m, (x, residual) = nn.LayerNorm(8), torch.randn(2, 3, 8)
    assert all(map(torch.equal, torch.fx.symbolic_trace(m)(x, residual), m(x, residual)))


@pytest.mark.parametrize("name, args", [*DROP_INS, ("MLP", (8,)), ("CausalSelfAttention", (8, 2))])
def test_jit_trace(name, args):
    """Traced twice the graph is the same, which torch.jit.trace checks, and trains as the module does."""
    m, x = getattr(nn, name)(*args), torch.randn(2, 3, 8)
    traced = torch.jit.trace(m, (x,))
    dy = torch.randn_like(m(x))
    got, want = (value_and_gradients(call, m, x, dy) for call in (traced, m))
    torch.testing.assert_close(got, want)
