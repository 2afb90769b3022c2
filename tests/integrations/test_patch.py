"""patch and unpatch on modules alone and on look-alikes of nanoGPT and minGPT; transformers is not needed."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

import pygpt
from bench.families import lookalikes
from pygpt.dispatch import OPS
from pygpt.integrations import kinds
from pygpt.integrations.transposed import FEW_ROWS
from pygpt.nn.fusing import FORWARDS
from pygpt.verify import ULPS


class RMSNorm(nn.Module):
    """Written by hand, as in Llama, or with ``offset`` 1 as in Gemma."""

    def __init__(self, width, eps=1e-6, offset=0.0):
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = nn.Parameter(torch.randn(width)), eps, offset

    def forward(self, x):
        wide = x.float() if x.dtype != torch.float64 else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.offset + self.weight) * normed.to(x.dtype)


class Conv1D(nn.Module):
    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.weight, self.bias = (
            outputs,
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class PackedGLU(nn.Module):
    """As in Phi3."""

    def __init__(self, act, width=8, hidden=12):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.act = act

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act(gate) * up)


class TwoLayers(nn.Module):
    def __init__(self, act, dropout=0.0, between=False):
        super().__init__()
        self.fc1, self.fc2, self.act, self.drop = nn.Linear(8, 12), nn.Linear(12, 8), act, nn.Dropout(dropout)
        self.between = between

    def forward(self, x):
        if self.between:
            return self.fc2(self.drop(self.act(self.fc1(x))))
        return self.drop(self.fc2(self.act(self.fc1(x))))


@pytest.fixture
def gpt():
    def new(block=lookalikes.NanoBlock, dropout=0.0, layers=2):
        return lookalikes.GPT(block, 40, 16, layers, 4, 32, dropout)

    return new


@pytest.fixture
def ids(generator):
    return torch.randint(40, (2, 12), generator=generator)


def ops_of(call):
    """The ops of pygpt that a call runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func._overloadpacket))
            return func(*args, **(kwargs or {}))

    seen = []
    with Seen():
        call()
    return [name.removeprefix("pygpt.").removesuffix("_fwd") for name in seen if name.startswith("pygpt.")]


# ------------------------------------------------------------------------------- recognising
MODULES = {
    "linear": (lambda: nn.Linear(8, 6), "linear"),
    "layer norm": (lambda: nn.LayerNorm(8), "layer_norm"),
    "rms norm": (lambda: nn.RMSNorm(8, eps=1e-4), "rms_norm"),
    "llama's norm": (lambda: RMSNorm(8), "rms_norm"),
    "gemma's norm": (lambda: RMSNorm(8, offset=1.0), "rms_norm"),
    "nanoGPT's norm": (lambda: lookalikes.LayerNorm(8, True), "layer_norm"),
    "nanoGPT's norm without bias": (lambda: lookalikes.LayerNorm(8, False), "layer_norm"),
    "gelu": (lambda: nn.GELU(), "gelu"),
    "gelu_tanh": (lambda: nn.GELU("tanh"), "gelu"),
    "minGPT's gelu": (lookalikes.NewGELU, "gelu"),
    "conv1d": (lambda: Conv1D(6, 8), "linear"),
    "mlp": (lambda: TwoLayers(nn.GELU()), "mlp"),
    "mlp, dropout between": (lambda: TwoLayers(nn.ReLU(), between=True), "mlp"),
    "mlp, gelu by hand": (lambda: TwoLayers(lookalikes.NewGELU()), "mlp"),
    "swiglu": (lambda: PackedGLU(nn.SiLU()), "mlp"),
    "geglu": (lambda: PackedGLU(nn.GELU()), "mlp"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_served(name, generator):
    """With its result, its gradients, and by one op."""
    new, op = MODULES[name]
    module = new()
    x = torch.randn(3, 5, 8, generator=generator, requires_grad=True)
    wanted = module(x)
    grad = torch.randn(wanted.shape, generator=generator)
    wanted_grads = torch.autograd.grad(wanted, [x, *module.parameters()], grad)
    cls, state = type(module), {name: t.clone() for name, t in module.state_dict().items()}
    report = pygpt.patch(module)
    assert report.served[""] == op and f"{op}: the model" in str(report)
    assert isinstance(module, cls) and type(module).__name__ == cls.__name__ and type(module) is not cls
    got = module(x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, [x, *module.parameters()], grad), wanted_grads)
    seen = ops_of(lambda: module(x.detach()))
    assert seen == ["linear_bwd" if name == "conv1d" else op]
    pygpt.unpatch(module)
    assert type(module) is cls and module(x).equal(wanted)
    assert all(t.equal(state[name]) for name, t in module.state_dict().items())


class Scaled(RMSNorm):
    def forward(self, x):
        return super().forward(x) * 1.01


class EpsOutside(RMSNorm):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Branching(TwoLayers):
    def forward(self, x):
        return super().forward(x) + x


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Swapped(PackedGLU):
    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act(gate) * up)


LEFT_ALONE = {
    "another norm": (lambda: Scaled(8), ""),
    "another eps": (lambda: EpsOutside(8, 1e-2), ""),
    "a residual": (lambda: Branching(nn.GELU()), "mlp"),
    "a subclass": (lambda: Subclass(8, 8), ""),
    "another gelu": (lambda: TwoLayers(QuickGELU()), "mlp"),
    "the value first": (lambda: Swapped(nn.SiLU()), "mlp"),
    "tanh": (lambda: TwoLayers(nn.Tanh()), "mlp"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_computes_something_else_is_left_alone(name, generator):
    new, op = LEFT_ALONE[name]
    module = new()
    cls, x = type(module), torch.randn(4, 8, generator=generator)
    wanted = module(x)
    try:
        assert op not in pygpt.patch(module).served.values() or op == ""
    except ValueError as e:
        assert "nothing in this" in str(e)
    assert type(module) is cls
    torch.testing.assert_close(module(x), wanted)


def test_nothing_is_recognised():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh())
    with pytest.raises(ValueError, match=r"pygpt.patch: nothing in this Sequential is recognised"):
        pygpt.patch(model)


@pytest.mark.parametrize("function", [pygpt.patch, pygpt.unpatch])
@pytest.mark.parametrize("model", ["gpt2", nn.Linear, 3, None])
def test_what_is_no_module(function, model):
    with pytest.raises(TypeError, match=f"pygpt.{function.__name__}: model must be a torch.nn.Module, got"):
        function(model)


def test_a_relu_that_clips_is_none():
    assert kinds.activation_of(nn.ReLU()) == "relu" and kinds.activation_of(nn.Hardtanh(0.0, 50.0)) is None


def test_a_forward_of_its_own_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = lambda x: x
    report = pygpt.patch(model)
    assert list(report.served) == ["1"] and report.left == {"0": "Linear has a forward of its own"}
    assert "not *: Linear has a forward of its own" in str(report)


def test_patching_changes_no_state(gpt):
    """Neither torch's generator, nor modes, nor hooks, nor gradients."""
    model = gpt(dropout=0.5)
    model.transformer.h[0].eval()
    before = torch.get_rng_state(), [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    pygpt.patch(model, loss=True)
    assert torch.get_rng_state().equal(before[0]) and [m.training for m in model.modules()] == before[1]
    assert attributes == [set(vars(m)) for m in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())


def test_patching_calls_no_hook(generator):
    """A hook that was there before is called by the model's own calls alone, and undoes the fusion."""
    mlp, norm, calls = TwoLayers(nn.GELU()), RMSNorm(8), []
    for module in (mlp.fc2, mlp.act, norm):
        module.register_forward_hook(lambda *_: calls.append("after"))
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
    assert pygpt.patch(mlp).served[""] == "mlp" and pygpt.patch(norm).served[""] == "rms_norm" and calls == []
    x = torch.randn(4, 8, generator=generator)
    assert ops_of(lambda: mlp(x)) == ["linear", "gelu", "linear"] and calls == ["before", "after"] * 2
    assert ops_of(lambda: norm(x)) == ["rms_norm"] and len(calls) == 6


def test_patch_and_unpatch_twice(gpt, ids):
    model = gpt()
    classes = [type(m) for m in model.modules()]
    first = pygpt.patch(model)
    patched = [type(m) for m in model.modules()]
    assert pygpt.patch(model).served == first.served and [type(m) for m in model.modules()] == patched
    pygpt.patch(model, loss=True)
    assert (
        not first.loss and pygpt.patch(model, loss=True).loss and pygpt.patch(model).loss and model(ids, ids)[0] is None
    )
    pygpt.unpatch(model)
    pygpt.unpatch(model)
    assert [type(m) for m in model.modules()] == classes


# ------------------------------------------------------------------------------- GPTs by structure
@pytest.mark.parametrize("block", [lookalikes.NanoBlock, lookalikes.MinBlock])
def test_gpts_are_recognised(block, gpt, ids):
    model = gpt(block)
    logits, loss = model(ids, ids)
    served = pygpt.patch(model).served
    assert served["transformer.h.1.attn"] == "qkv_attention" and served["transformer.ln_f"] == "layer_norm"
    assert ("mlp" in served.values()) == (block is lookalikes.NanoBlock)
    seen = ops_of(lambda: model(ids))
    assert {"qkv_attention", "linear", "layer_norm"} <= set(seen)
    torch.testing.assert_close(model(ids, ids), (logits, loss))
    pygpt.patch(model, loss=True)
    torch.testing.assert_close(model(ids, ids)[1], loss)
    assert "linear_cross_entropy" in ops_of(lambda: model(ids, ids)) and model(ids)[1] is None


def test_ignored_targets(gpt, ids):
    model = gpt()
    targets = ids.clone()
    targets[:, ::3] = -1
    wanted = model(ids, targets)[1]
    pygpt.patch(model, loss=True)
    torch.testing.assert_close(model(ids, targets)[1], wanted)


def test_a_loss_that_is_another_one_is_refused(gpt):
    class Capped(lookalikes.GPT):
        def forward(self, idx, targets=None):
            logits, _ = super().forward(idx)
            logits = 30 * torch.tanh(logits / 30)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    model = Capped(lookalikes.NanoBlock, 40, 16, 2, 4, 32, 0.0)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="the loss of this Capped is not the cross-entropy of plain logits"):
        pygpt.patch(model, loss=True)
    with pytest.raises(ValueError, match="its parameters are on meta"):
        pygpt.patch(model.to("meta"), loss=True)
    assert [type(m) for m in model.modules()] == classes


def test_dropout(gpt, ids):
    """Active dropout between two layers is not fused away, and one seed gives one result."""
    model, mlp = gpt(dropout=0.5), TwoLayers(nn.GELU(), 0.5, between=True)
    pygpt.patch(model), pygpt.patch(mlp)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(model(ids)[0])
    assert results[0].equal(results[1]) and not results[0].equal(model(ids)[0])
    x = torch.randn(4, 8)
    assert ops_of(lambda: mlp(x)) == ["linear", "gelu", "linear"] and ops_of(lambda: mlp.eval()(x)) == ["mlp"]


# ------------------------------------------------------------------------------- what users do with models
def test_state_dicts_pickles_and_copies(gpt, ids):
    plain, model = gpt(), gpt()
    pygpt.patch(model, loss=True)
    model.load_state_dict(plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    clone = copy.deepcopy(model)
    assert [type(m) for m in clone.modules()] == [type(m) for m in model.modules()]
    assert clone(ids)[0].equal(model(ids)[0]) and clone.lm_head.weight is not model.lm_head.weight
    shallow = copy.copy(model.lm_head)
    assert type(shallow) is type(model.lm_head) and shallow.weight is model.lm_head.weight
    loaded = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in plain.modules()]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded(ids)[0].equal(plain(ids)[0]) and type(loaded) is lookalikes.GPT


def test_hooks_run_and_undo_the_fusion(generator):
    mlp, x = TwoLayers(nn.GELU()), torch.randn(4, 8, generator=generator)
    pygpt.patch(mlp)
    calls = []
    handle = mlp.fc1.register_forward_hook(lambda *_: calls.append("fc1"))
    assert "mlp" not in ops_of(lambda: mlp(x)) and calls == ["fc1"]
    handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: calls.append("any"))
    try:
        assert "mlp" not in ops_of(lambda: mlp(x)) and calls.count("any") == 5
    finally:
        everywhere.remove()
    assert ops_of(lambda: mlp(x)) == ["mlp"]


@pytest.mark.parametrize("replace", ["fc1", "act"])
def test_a_replaced_child_is_called(replace, generator):
    mlp, x = TwoLayers(nn.GELU()), torch.randn(4, 8, generator=generator)
    pygpt.patch(mlp)
    setattr(mlp, replace, Subclass(8, 12) if replace == "fc1" else QuickGELU())
    wanted = mlp.fc2(mlp.act(mlp.fc1(x)))
    torch.testing.assert_close(mlp(x), wanted)
    assert "mlp" not in ops_of(lambda: mlp(x))


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_adapters(first, gpt, ids):
    from peft import LoraConfig, get_peft_model

    model, targets = gpt(), ids.roll(-1, 1)
    wanted = model(ids, targets)[1]
    if first == "patch":
        pygpt.patch(model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"]))
    if first == "adapter":
        assert "base_model.model.transformer.h.0.mlp.c_fc.base_layer" in pygpt.patch(model).served
    torch.testing.assert_close(model(ids, targets)[1], wanted)  # an adapter is born as zero
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in adapters.values():
        nn.init.normal_(p, std=0.1)
    model(ids, targets)[1].backward()
    assert len(adapters) == 16 and all(p.grad.abs().max() > 0 for p in adapters.values())
    model.merge_adapter()


def test_parametrizations_keep_their_class(generator):
    from torch.nn.utils import parametrize

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    mlp, x = TwoLayers(nn.GELU()), torch.randn(4, 8, generator=generator)
    pygpt.patch(mlp)
    cls = type(mlp.fc1)
    parametrize.register_parametrization(mlp.fc1, "weight", Double())
    torch.testing.assert_close(
        mlp(x), F.linear(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), *mlp.fc2.parameters())
    )
    pygpt.unpatch(mlp)
    assert parametrize.is_parametrized(mlp.fc1)
    parametrize.remove_parametrizations(mlp.fc1, "weight")
    assert type(mlp.fc1) is cls
    pygpt.unpatch(mlp)
    assert type(mlp.fc1) is nn.Linear


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, gpt, ids):
    model = gpt()
    pygpt.patch(model)
    x = model.transformer.wte(ids).detach().requires_grad_()
    block = model.transformer.h[0]
    (wanted,) = torch.autograd.grad(block(x).square().sum(), x)
    checkpoint.checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
    assert x.grad.equal(wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype, generator):
    """Of module and input alike; a norm whose input has another dtype has the dtype of its own expression."""
    for new, _ in MODULES.values():
        module = new().to(dtype)
        x = torch.randn(3, 8, generator=generator).to(dtype)
        theirs, exact = module(x), copy.deepcopy(module).double()(x.double())
        pygpt.patch(module)
        error, their_error = ((y.double() - exact).abs().max() for y in (module(x), theirs))
        assert module(x).dtype == dtype
        assert error <= 2 * their_error + ULPS * torch.finfo(dtype).eps * exact.abs().max()
    norm = RMSNorm(8)
    x = torch.randn(3, 8, generator=generator).bfloat16()
    wanted = norm(x)
    pygpt.patch(norm)
    assert norm(x).equal(wanted)


# ------------------------------------------------------------------------------- compile
@pytest.mark.parametrize("block", [lookalikes.NanoBlock, lookalikes.MinBlock])
def test_compile_without_graph_breaks(block, gpt, ids):
    model = gpt(block, layers=1)
    pygpt.patch(model, loss=True)
    _, wanted = model(ids, ids)
    torch._dynamo.reset()
    _, loss = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, ids)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    assert model.transformer.wte.weight.grad.abs().max() > 0


def test_few_rows_are_torchs(generator):
    layer = Conv1D(6, 8)
    pygpt.patch(layer)
    x = torch.randn(FEW_ROWS, 8, generator=generator)
    assert ops_of(lambda: layer(x)) == ["linear_bwd"] and ops_of(lambda: layer(x[1:])) == []


def test_every_kind_names_an_op():
    for kind in kinds.KINDS:
        assert kind.serves in OPS
        made = kinds.patched_class(kind, nn.Linear, ())
        assert FORWARDS[made] is made.forward and made._original is nn.Linear


def test_patching_warns_of_nothing(gpt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pygpt.patch(gpt(), loss=True)
