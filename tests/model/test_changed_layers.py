"""Layers of a module that are more than a Linear are called as torch calls them; the others are fused into one op."""

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
from tests.model.test_nn import F64, of_kind, value_and_gradients


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


def layer_by_layer(m, x):
    if isinstance(m, nn.MLP):
        return m.c_proj(F.gelu(m.c_fc(x), approximate="tanh"))
    q, k, v = (t.unflatten(2, (m.num_heads, -1)).transpose(1, 2) for t in m.c_attn(x).chunk(3, dim=2))
    return m.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


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
