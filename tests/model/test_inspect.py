"""`report` and `audit`: right FLOPs and reasons, planted faults are named, and the model is as it was before."""

import copy
import random
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import pygpt
import pygpt.functional as P
from pygpt import nn
from pygpt.dispatch import TABLE
from pygpt.inspect import layers, plot, step

CONFIG = pygpt.GPTConfig(vocab_size=61, block_size=24, n_layer=2, n_head=2, n_embd=32)
IDS = torch.arange(40).reshape(2, 20) % 61


def rows_of(report) -> dict:
    return {(row.phase, row.op): row for row in report.rows}


class Branches(torch.nn.Module):
    """What a step may change: buffers, random numbers of torch and of Python, a parameter, a mode, and a cache."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
        self.frozen = torch.nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(8), persistent=False)
        self.fails = False

    def forward(self, x):
        self.seen = self.seen + x.detach().sum(0)
        with torch.no_grad():
            self.frozen.weight.add_(random.random())
        if self.fails:
            raise ValueError("in the middle")
        return self.drop(self.norm(self.frozen(x)))


# ------------------------------------------------------------------------------- report
def test_a_gpt_is_served_completely():
    """Its FLOPs are those of the same model on PyTorch, which torch's own counter finds but for CPU attention."""
    model = pygpt.GPT(CONFIG)
    ours = pygpt.report(model, IDS, IDS)
    with pygpt.backend("torch"):
        theirs = pygpt.report(model, IDS, IDS)
        with FlopCounterMode(display=False) as counter:
            model(IDS, IDS)[1].backward()
    attention = sum(row.flops for row in theirs.rows if "attention" in row.op)
    assert ours.flops == theirs.flops == counter.get_total_flops() + attention and attention > 0
    assert ours.served == 1.0 and theirs.served == 0.0
    assert not ours.reasons() and {row.backend for row in ours.rows} == {"cpp", "torch"}
    assert list(theirs.reasons()) == ["cpp: backend 'torch' was asked for; triton: backend 'torch' was asked for"] or (
        all("backend 'torch' was asked for" in reason for reason in theirs.reasons())
    )


def test_a_share_of_the_flops():
    """Two equal layers, one of them torch's: half is served, and the reason is that torch's function was called."""
    model = torch.nn.Sequential(nn.Linear(16, 16), torch.nn.Linear(16, 16))
    report = pygpt.report(model, torch.randn(5, 16, requires_grad=True))
    rows, one = rows_of(report), 2 * 5 * 16 * 16
    assert rows["forward", "linear"].flops == rows["forward", "aten.addmm"].flops == one
    assert rows["backward", "linear"].flops == rows["backward", "aten.mm"].flops == 2 * one
    assert report.served == 0.5 and rows["backward", "aten.mm"].reasons == {}
    ((reason, left),) = report.reasons().items()
    assert reason == "the model calls PyTorch's own function; cpp serves pygpt.functional.linear"
    assert (left.op, left.calls, left.flops) == ("aten.addmm", 1, one)


class Everything(torch.nn.Module):
    """Calls of torch that pygpt could serve, some inside other functions of torch, and one that it could not."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 16, 0.0, activation="gelu", batch_first=True)
        self.norm, self.weight = torch.nn.RMSNorm(16), torch.nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        h = self.norm(self.layer(x)) @ self.weight
        h = F.relu(h) + torch.bmm(torch.softmax(torch.bmm(h, h.mT), -1), h)
        return F.cross_entropy(h.flatten(0, 1), torch.arange(12))


def test_what_is_left_to_pytorch():
    report = pygpt.report(Everything(), torch.randn(2, 6, 16))
    rows = rows_of(report)
    forward = {op: row.calls for (phase, op), row in rows.items() if phase == "forward" and row.reasons}
    attention = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert forward == {
        "aten.addmm": 3, "aten.mm": 2, "aten.bmm": 2, attention: 1, "aten.native_layer_norm": 2, "aten.gelu": 1,
        "aten.relu": 1, "rms_norm": 1, "cross_entropy": 1,
    }  # fmt: skip
    assert rows["backward", f"{attention}_backward"].flops == 2.5 * rows["forward", attention].flops > 0
    assert report.served == 0 and sum(row.calls for row in report.reasons().values()) == sum(forward.values())
    for op, name in (
        ("rms_norm", "rms_norm"),
        ("cross_entropy", "cross_entropy"),
        ("aten.gelu", "gelu"),
        (attention, "scaled_dot_product_attention"),
    ):
        assert [reason for reason in rows["forward", op].reasons if f"cpp serves pygpt.functional.{name}" in reason]
    assert "batched product" in next(iter(rows["forward", "aten.bmm"].reasons))


def test_the_reason_of_a_fallback():
    """A function of pygpt that goes to PyTorch gives the objection of `explain`, for all ops that PyTorch runs then."""

    class Wide(torch.nn.Module):
        def forward(self, q):
            return P.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 4, TABLE["cpp"].max_head_dim + 1, requires_grad=True)
    report = pygpt.report(Wide(), q)
    assert report.served == 0 and report.flops > 0
    (reason,) = report.reasons()
    assert reason.startswith(f"cpp: head dimension above {TABLE['cpp'].max_head_dim}")
    assert str(TABLE["cuda"].missing or "-") not in reason  # backends that are not here are left out


def test_a_kernel_inside_an_op_of_torch():
    """Where ATen's own kernel is replaced, the op is torch's, and the kernel is ours."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():  # torch warns of the first override in a process
            warnings.simplefilter("ignore")
            library.impl("gelu", lambda x, *, approximate="none": TABLE["cpp"].kernels.gelu_fwd(x, approximate), "CPU")
        rows = rows_of(pygpt.report(torch.nn.GELU(), torch.randn(3, requires_grad=True)))
    finally:
        library._destroy()
    assert rows["forward", "aten.gelu"].backend == "cpp" and not rows["forward", "aten.gelu"].reasons
    assert rows["backward", "aten.gelu_backward"].backend == "torch"


def test_checkpointing_computes_again():
    model, x = nn.MLP(8), torch.randn(4, 8, requires_grad=True)
    again = torch.nn.Module()
    again.mlp, again.forward = model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    once, twice = rows_of(pygpt.report(model, x)), rows_of(pygpt.report(again, x))
    assert twice["backward", "mlp_fwd"].flops == twice["forward", "mlp"].flops == once["forward", "mlp"].flops > 0
    assert ("backward", "mlp_fwd") not in once and once["backward", "mlp"].flops == twice["backward", "mlp"].flops


def test_a_compiled_model_runs_eagerly():
    model = torch.nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 4)
    compiled(x)
    assert pygpt.report(compiled, x).flops == pygpt.report(model, x).flops > 0


def test_one_screen():
    text = str(pygpt.report(Everything(), torch.randn(2, 6, 16)))
    assert text.count("\n") < 40 and max(map(len, text.splitlines())) <= 120
    assert text.startswith("Everything: a training step of ") and "0.0% of " in text and "aten.addmm" in text


@pytest.mark.parametrize("output", ["dict", "object", "tuple", "number"])
def test_the_models_own_loss(output):
    x = torch.randn(3, requires_grad=True)
    loss, logits = (x * x).sum(), x * 2
    made = {
        "dict": {"logits": logits, "loss": loss},
        "object": SimpleNamespace(loss=loss, logits=logits),
        "tuple": (logits, loss),
        "number": loss,
    }[output]
    assert step.loss_of(made) is loss
    step.train_step(lambda: made, (), {})
    assert torch.equal(x.grad, 2 * x)


def test_without_a_loss_outputs_get_the_same_gradients_in_every_dtype():
    def gradients(dtype):
        x = torch.ones(50, dtype=dtype, requires_grad=True)
        step.train_step(lambda: {"logits": [x * 1, x.sum()[None]], "loss": None}, (), {})
        return x.grad.double()

    wide = gradients(torch.float64)
    assert len(set(wide.tolist())) > 10 and torch.equal(gradients(torch.bfloat16), wide.bfloat16().double())


# ------------------------------------------------------------------------------- what a step leaves behind
def state_of(model):
    """Everything that must stay: also which objects are held, and the next random numbers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: (id(t), t.clone(), t.grad, t.grad is not None and t.grad.clone()) for name, t in tensors.items()}
    next_numbers = torch.get_rng_state(), random.getstate()
    return values, [m.training for m in model.modules()], next_numbers, set(model.__dict__)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, (tuple, list)) else a == b


@pytest.mark.parametrize("function", [pygpt.report, pygpt.audit])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(function, fails):
    model, x = Branches(), torch.randn(6, 8, requires_grad=True)
    model(x).sum().backward()
    model.norm.eval()
    x.grad = None
    model.fails, before = fails, state_of(model)
    table, call = dict(TABLE), torch.nn.Module.__call__
    if fails:
        with pytest.raises(ValueError, match="in the middle"):
            function(model, x)
    else:
        function(model, x)
    assert same(before, state_of(model)) and x.grad is None
    assert dict(TABLE) == table and torch.nn.Module.__call__ is call and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("function", [pygpt.report, pygpt.audit])
def test_bad_input(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got builtin_function"):
        function(torch.relu, torch.randn(3))
    with pytest.raises(ValueError, match=r"weight has no values yet"):
        function(torch.nn.Linear(2, 2, device="meta"), torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"weight has no values yet"):
        function(torch.nn.LazyLinear(2), torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"the input \[0\]\[0\] is on the meta device"):
        function(torch.nn.Linear(2, 2), torch.randn(3, 2, device="meta"))
    with pytest.raises(ValueError, match="no output of the model needs a gradient"):
        pygpt.report(torch.nn.Linear(2, 2).requires_grad_(False), torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"audit: the reference has other parameters than the model: bias"):
        pygpt.audit(torch.nn.Linear(2, 2), torch.randn(3, 2), reference=torch.nn.Linear(2, 2, bias=False))


# ------------------------------------------------------------------------------- audit
class Attention(torch.nn.Module):
    """Keys have a bias, whose gradient is zero: the terms that it is the sum of cancel."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return P.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_right_models_pass(dtype):
    gpt = pygpt.audit(pygpt.GPT(CONFIG, dtype=dtype), IDS, IDS)
    assert gpt.passed and gpt.first is None, gpt
    attention = pygpt.audit(Attention().to(dtype), torch.randn(2, 9, 16, dtype=dtype))
    assert attention.passed, attention
    assert ("PyTorch's own results (the model is float64 itself)" == gpt.truth) == (dtype == torch.float64)
    named = {(layer.name, layer.what) for layer in gpt.layers}
    assert ("transformer.h.0.ln_2", "output[1]") in named and ("", "output[1]") in named  # a pair; the loss
    assert {name for name, what in named if what == "gradient"} == {
        name.replace("lm_head", "transformer.wte") for name, _ in pygpt.GPT(CONFIG).named_parameters()
    }
    assert ("transformer.h.0.mlp.c_fc", "output") not in named  # the fused layers stay fused
    assert str(gpt).startswith(f"GPT: all {len(gpt.layers)} outputs and gradients are as exact as PyTorch's")


def faulty(monkeypatch, name, change, at=None):
    """Lets ``change`` spoil the results of a C++ kernel, in every call, or in each second one, from ``at`` on."""
    row, calls = TABLE["cpp"], []

    class Faulty:
        def __getattr__(self, attribute):
            kernel = getattr(row.kernels, attribute)
            if attribute.removesuffix("_results") != name:
                return kernel

            def spoiled(*args):
                calls.append(args)
                results = kernel(*args)
                return change(results) if at is None or (len(calls) - 1) % 2 == at else results

            return spoiled

    monkeypatch.setitem(TABLE, "cpp", replace(row, kernels=Faulty()))


def test_a_faulty_forward_kernel_is_named(monkeypatch):
    """The second block's mlp, which is off by a hundredth of a percent."""
    faulty(monkeypatch, "mlp_fwd", lambda results: (results[0] * (1 + 1e-4), *results[1:]), at=1)
    audit = pygpt.audit(pygpt.GPT(CONFIG), IDS, IDS)
    assert (audit.first.name, audit.first.what) == ("transformer.h.1.mlp", "output") and not audit.passed
    assert audit.draws == 1 and 1e-6 < audit.first.ours < 1e-3  # it is too far off for an accident
    assert "the first layer that differs by more than rounding is transformer.h.1.mlp (MLP)" in audit.verdict()
    before = audit.layers[: audit.layers.index(audit.first)]
    assert len(before) > 10 and all(layer.passed for layer in before)


def test_a_small_fault_is_no_accident(monkeypatch):
    """A few times the limit: it is still there after every draw."""
    faulty(monkeypatch, "mlp_fwd", lambda results: (results[0] * (1 + 4e-6), *results[1:]), at=1)
    audit = pygpt.audit(pygpt.GPT(CONFIG), IDS, IDS)
    assert audit.draws == layers.DRAWS and audit.first.name == "transformer.h.1.mlp"
    assert audit.first.limit < audit.first.ours < layers.NO_ACCIDENT * audit.first.limit


def test_a_faulty_backward_kernel_is_named(monkeypatch):
    """Only gradients are wrong. The first is that of the last norm's weight, which backward reaches before the rest."""
    faulty(monkeypatch, "add_layer_norm_bwd", lambda results: (results[0], results[1] * (1 + 1e-4), *results[2:]))
    audit = pygpt.audit(pygpt.GPT(CONFIG), IDS, IDS)
    assert (audit.first.name, audit.first.what) == ("transformer.ln_f.weight", "gradient")
    assert "transformer.ln_f.weight (LayerNorm): its gradient's error is" in audit.verdict()
    wrong = {layer.name for layer in audit.layers if not layer.passed}
    assert wrong == {
        "transformer.ln_f.weight",
        *(f"transformer.h.{i}.{n}.weight" for i, n in ((1, "ln_1"), (0, "ln_2"), (1, "ln_2"))),
    }


def test_a_missing_gradient_is_named(monkeypatch):
    """It is what a module leaves out, not a fused child that is not called."""

    class Detached(torch.nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.detach(), self.bias)

    original = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model = copy.deepcopy(original)
    model[0].__class__ = Detached
    audit = pygpt.audit(model, torch.randn(5, 8), reference=original)
    assert audit.first.name == "0.weight" and audit.first.ours == float("inf")
    assert [layer.name for layer in audit.layers if not layer.passed] == ["0.weight"]


@pytest.mark.parametrize("castable", [True, False])
def test_a_perturbed_layer_is_named(castable):
    """Beside a reference. Where the model does not run in float64, PyTorch's own results are the truth."""

    class Narrow(torch.nn.Linear):
        def forward(self, x):
            if x.dtype == torch.float64 and not castable:
                raise TypeError("no float64 here\nnor there")
            return super().forward(x)

    original = torch.nn.Sequential(*(Narrow(16, 16) for _ in range(4)))
    model, x = copy.deepcopy(original), torch.randn(7, 16)
    assert pygpt.audit(model, x, reference=original).passed
    with torch.no_grad():
        model[2].bias[3] += 1e-4
    audit = pygpt.audit(model, x, reference=original)
    assert (audit.first.name, audit.first.what) == ("2", "output")
    told = "PyTorch's own results (the model does not run in float64: TypeError: no float64 here)"
    assert audit.truth == ("the model in float64" if castable else told)


def test_the_truth_is_float64_throughout():
    """Also where a model casts to float32 by itself, or makes tensors of another dtype."""

    class Casts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(64) + 0.5)

        def forward(self, x):
            x = x.float() * torch.full((), 1 / 3, dtype=torch.float32) + torch.ones(64) / 3
            return (x.to(torch.float32) / 3).sum(-1, dtype=torch.float32) * self.weight

    audit = pygpt.audit(Casts(), x := torch.rand(64, 64))
    truth = ((x.double() / 3 + 1 / 3) / 3).sum(-1)
    model = Casts()
    with layers._in_float64():
        wide = model.double()(x.double())
    assert wide.dtype == torch.float64
    # 1/3 is rounded once, to float32, by the model itself where it is a tensor of that dtype.
    assert ((wide / model.weight - truth).abs() <= 1e-7 * truth).all()
    assert audit.passed and all(layer.ours == layer.torch > 0 for layer in audit.layers if layer.what == "output")


def test_outputs_that_only_one_model_has():
    """What is missing on one side, as the logits of a model that computes its loss without them, is not compared."""

    class Head(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits, self.weight = logits, torch.nn.Parameter(torch.randn(9, 8))

        def forward(self, x):
            logits = x @ self.weight.T
            return {"loss": F.cross_entropy(logits, torch.arange(4)), "logits": logits if self.logits else None}

    model, original = Head(False), Head(True)
    model.load_state_dict(original.state_dict())
    audit = pygpt.audit(model, torch.randn(4, 8), reference=original)
    assert audit.passed and [layer.what for layer in audit.layers] == ["output.loss", "gradient"]


def test_the_plot(monkeypatch, tmp_path):
    faulty(monkeypatch, "mlp_fwd", lambda results: (results[0] * float("nan"), *results[1:]))
    audit = pygpt.audit(pygpt.GPT(CONFIG), IDS, IDS)
    assert audit.first.name == "transformer.h.0.mlp" and audit.first.ours != audit.first.ours
    audit.plot(tmp_path / "audit.svg")
    root = ElementTree.fromstring((tmp_path / "audit.svg").read_text(encoding="utf-8"))
    circles = root.findall("{*}circle")
    failing = [circle for circle in circles if circle.get("fill") == plot.FAILS]
    assert len(circles) == len(audit.layers) and len(failing) == sum(not layer.passed for layer in audit.layers) > 0
    assert "nan" not in str([circle.attrib for circle in circles])
    assert "transformer.h.0.mlp" in "".join(root.itertext()) and audit.table().count("\n") == len(audit.layers)


def test_an_audit_of_nothing():
    class Silent(torch.nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ValueError, match="no output or gradient of the model can be compared"):
        pygpt.audit(Silent(), torch.ones(2))
