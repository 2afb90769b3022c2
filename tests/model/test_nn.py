"""The modules against torch.nn, and against attention and MLP written out here."""

import io
import math
from functools import partial
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch.nn import utils
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune

import pygpt
from pygpt import functional, nn, reference

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


# ------------------------------------------------------------------------------- layers that are more than a Linear
class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


class OtherLinear(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class LoRA(torch.nn.Module):
    """Hu et al. 2021, with both factors drawn."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False, dtype=F64)
        self.up = torch.nn.Linear(2, base.out_features, bias=False, dtype=F64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def to_class(cls):
    def change(parent, name):
        layer = getattr(parent, name)
        other = cls(layer.in_features, layer.out_features, dtype=F64)
        other.load_state_dict(layer.state_dict())
        setattr(parent, name, other)

    return change


def on_layer(change):
    return lambda parent, name: change(getattr(parent, name))


def weight_normed(norm, magnitude):
    def change(layer):
        norm(layer)
        magnitude(layer).data.mul_(2)  # at first the weight is as it was

    return on_layer(change)


def patched(layer):
    forward = type(layer).forward
    layer.forward = MethodType(lambda self, x: 2 * forward(self, x), layer)


def doubled(*args):
    """The last argument of a hook is what it may replace: the input, the output or the gradient."""
    *_, last = args
    return tuple(2 * t for t in last) if isinstance(last, tuple) else 2 * last


def doubled_input_gradient(module, grad_input, grad_output):
    return tuple(g if g is None else 2 * g for g in grad_input)


def with_keywords(module, args, kwargs, *output):
    return (doubled(args), kwargs) if not output else doubled(*output)


def on_linears(hook):
    """A global hook of one kind of module."""
    return lambda module, *args: hook(module, *args) if isinstance(module, torch.nn.Linear) else None


GLOBAL_HOOKS = {
    "global forward hook": lambda *_: global_hooks.register_module_forward_hook(on_linears(doubled)),
    "global forward pre-hook": lambda *_: global_hooks.register_module_forward_pre_hook(on_linears(doubled)),
    "global full backward hook": lambda *_: global_hooks.register_module_full_backward_hook(
        on_linears(doubled_input_gradient)
    ),
    "global full backward pre-hook": lambda *_: global_hooks.register_module_full_backward_pre_hook(
        on_linears(doubled)
    ),
}
CHANGES = {
    "forward hook": on_layer(lambda m: m.register_forward_hook(doubled)),
    "forward hook with keywords": on_layer(lambda m: m.register_forward_hook(with_keywords, with_kwargs=True)),
    "forward pre-hook": on_layer(lambda m: m.register_forward_pre_hook(doubled)),
    "forward pre-hook with keywords": on_layer(lambda m: m.register_forward_pre_hook(with_keywords, with_kwargs=True)),
    "full backward hook": on_layer(lambda m: m.register_full_backward_hook(doubled_input_gradient)),
    "full backward pre-hook": on_layer(lambda m: m.register_full_backward_pre_hook(doubled)),
    **GLOBAL_HOOKS,
    "patched forward": on_layer(patched),
    "subclass": to_class(OtherLinear),
    "replaced": lambda parent, name: setattr(parent, name, torch.nn.Sequential(getattr(parent, name), Doubled())),
    "adapter": lambda parent, name: setattr(parent, name, LoRA(getattr(parent, name))),
    "parametrize": on_layer(lambda m: parametrize.register_parametrization(m, "weight", Doubled())),
    "parametrized bias": on_layer(lambda m: parametrize.register_parametrization(m, "bias", Doubled())),
    "weight_norm": weight_normed(parametrizations.weight_norm, lambda m: m.parametrizations.weight.original0),
    "old weight_norm": weight_normed(utils.weight_norm, lambda m: m.weight_g),
    "spectral_norm": on_layer(parametrizations.spectral_norm),
    "old spectral_norm": on_layer(utils.spectral_norm),
    "prune": on_layer(lambda m: prune.l1_unstructured(m, "weight", amount=0.5)),
    "pruned bias": on_layer(lambda m: prune.random_unstructured(m, "bias", amount=0.5)),
}
LAYERS = [("MLP", "c_fc"), ("MLP", "c_proj"), ("CausalSelfAttention", "c_attn"), ("CausalSelfAttention", "c_proj")]


def of_kind(kind):
    return (nn.MLP(8, dtype=F64) if kind == "MLP" else nn.CausalSelfAttention(8, 2, dtype=F64)).eval()


def layer_by_layer(m, x):
    if isinstance(m, nn.MLP):
        return m.c_proj(F.gelu(m.c_fc(x), approximate="tanh"))
    q, k, v = (t.unflatten(2, (m.num_heads, -1)).transpose(1, 2) for t in m.c_attn(x).chunk(3, dim=2))
    return m.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def value_and_gradients(call, m, x, dy):
    x = x.clone().requires_grad_()
    m.zero_grad()
    y = call(x)
    y.backward(dy)
    assert all(p.grad is not None for p in m.parameters())
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in m.named_parameters()}}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind, name", LAYERS)
def test_a_changed_layer_is_called(kind, name, change):
    """As torch calls it: values, and a gradient for every parameter that the change brought along."""
    m, x, dy = of_kind(kind), *torch.randn(2, 2, 5, 8, dtype=F64)
    before = value_and_gradients(m, m, x, dy)
    handle = CHANGES[change](m, name)
    try:
        got = value_and_gradients(m, m, x, dy)
        want = value_and_gradients(partial(layer_by_layer, m), m, x, dy)
    finally:
        if change in GLOBAL_HOOKS:
            handle.remove()
    torch.testing.assert_close(got, want)
    assert any(not torch.allclose(got[key], before[key]) for key in ("y", "dx"))


@pytest.fixture
def fused(monkeypatch):
    """Tells how often a call of a module takes the fused op."""
    calls, mlp = [], functional.mlp
    monkeypatch.setattr(functional, "mlp", lambda *args: calls.append(args) or mlp(*args))

    def count(m):
        calls.clear()
        m(torch.randn(2, 8, dtype=F64))
        return len(calls)

    return count


UNDOING = {
    "forward hook": lambda layer, handle: handle.remove(),
    "forward pre-hook": lambda layer, handle: handle.remove(),
    "full backward hook": lambda layer, handle: handle.remove(),
    "full backward pre-hook": lambda layer, handle: handle.remove(),
    **dict.fromkeys(GLOBAL_HOOKS, lambda layer, handle: handle.remove()),
    "patched forward": lambda layer, handle: delattr(layer, "forward"),
    "parametrize": lambda layer, handle: parametrize.remove_parametrizations(layer, "weight"),
    "weight_norm": lambda layer, handle: parametrize.remove_parametrizations(layer, "weight"),
    "old weight_norm": lambda layer, handle: utils.remove_weight_norm(layer),
    "old spectral_norm": lambda layer, handle: utils.remove_spectral_norm(layer),
    "prune": lambda layer, handle: prune.remove(layer, "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", UNDOING)
@pytest.mark.parametrize("name", ["c_fc", "c_proj"])
def test_fused_until_a_layer_changes_and_when_it_is_itself_again(name, change, fused):
    m = of_kind("MLP")
    assert fused(m) == 1
    handle = CHANGES[change](m, name)
    try:
        assert fused(m) == 0
    finally:
        UNDOING[change](getattr(m, name), handle)
    assert fused(m) == 1


def test_torch_linears_are_fused_and_weights_of_a_subclass_are_not(fused):
    m = of_kind("MLP")
    to_class(torch.nn.Linear)(m, "c_fc")
    assert fused(m) == 1
    with torch.no_grad():
        state = {name: p + 1 for name, p in m.named_parameters()}
        assert fused(lambda x: torch.func.functional_call(m, state, x)) == 1  # plain tensors in place of parameters

    class Weight(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return super().__torch_function__(func, types, args, kwargs or {})

    m.c_proj.weight = Weight(m.c_proj.weight.detach())
    assert fused(m) == 0


def test_a_class_whose_forward_is_replaced_is_not_fused(fused, monkeypatch):
    m = of_kind("MLP")
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", torch.nn.Linear.forward)
        assert fused(m) == 0
    assert fused(m) == 1
    m.c_fc.compile(backend="eager")
    assert fused(m) == 0


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_by_layer_is_the_fused_op(activation, dtype):
    m, x = nn.MLP(8, activation=activation, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    fused = m(x)
    m.c_fc.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(m(x), fused)


@pytest.mark.parametrize("make", [lambda: nn.MLP(8, dropout=0.5), lambda: nn.CausalSelfAttention(8, 2, dropout=0.5)])
def test_hooks_of_dropout_in_evaluation(make):
    m, x = make().eval(), torch.randn(2, 5, 8)
    want = 2 * m(x)
    m.dropout.register_forward_hook(doubled)
    torch.testing.assert_close(m(x), want)


@pytest.mark.parametrize("change", [None, "adapter", "parametrize", "forward hook"])
def test_compiled_and_exported_modules_fuse_what_eager_ones_do(change):
    """Without a graph break."""
    m, x = of_kind("MLP"), torch.randn(2, 5, 8, dtype=F64)
    if change is not None:
        CHANGES[change](m, "c_fc")
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), m(x))
    with pygpt.backend("cpp"), torch.no_grad():
        program = torch.export.export(m, (x,), strict=False)
        fused = sum("mlp_fwd" in str(node.target) for node in program.graph.nodes)
    assert fused == (change is None)
    torch.testing.assert_close(program.module()(x), m(x))


def test_a_compiled_module_sees_a_forward_patched_later():
    m, x = of_kind("MLP"), torch.randn(2, 5, 8, dtype=F64)
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    compiled(x)
    patched(m.c_fc)
    torch.testing.assert_close(compiled(x), layer_by_layer(m, x))


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
