"""pygpt.enable: torch's own functions run on the kernels, in every way that torch runs a function; and off again."""

import copy
import threading
from dataclasses import replace

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pygpt
from pygpt import dispatch, verify
from pygpt import functional as P
from pygpt.integrations import aten

NAMES = ["linear", "layer_norm", "rms_norm", "scaled_dot_product_attention", "gelu"]


def arguments(name, dtype=torch.float32):
    """The leaves of a call, and the function of them, given the namespace of the functions."""

    def leaf(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    if name == "linear":
        return (leaf(3, 8), leaf(5, 8), leaf(5)), lambda f, x, w, b: f.linear(x, w, b)
    if name == "layer_norm":
        return (leaf(3, 8), leaf(8), leaf(8)), lambda f, x, w, b: f.layer_norm(x, (8,), w, b, 1e-6)
    if name == "rms_norm":
        return (leaf(3, 8), leaf(8)), lambda f, x, w: f.rms_norm(x, (8,), w, 1e-6)
    if name == "gelu":
        return (leaf(3, 8),), lambda f, x: f.gelu(x, approximate="tanh")
    qkv = leaf(2, 3, 7, 8), leaf(2, 3, 9, 8), leaf(2, 3, 9, 8)
    return qkv, lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def results(function, leaves, namespace=F):
    """The result and the gradients."""
    out = function(namespace, *leaves)
    return out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(-1))


def equal(ours, theirs) -> bool:
    return all(map(torch.equal, ours, theirs))


class Calls(TorchDispatchMode):
    """The names of the ops that ran."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def on():
    return [name for name in NAMES if name in aten._overrides]


# ------------------------------------------------------------------------------- the kernels serve
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=cases.ids)
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_serve_forward_and_backward(name, dtype, counts):
    """The same bits as pygpt's function gives, and torch's own strides."""
    leaves, function = arguments(name, dtype)
    want, torchs = results(function, leaves, P), results(function, leaves)
    with pygpt.enable(name):
        for _ in range(2):  # the second call finds its kernel in the dispatch cache
            got = results(function, leaves)
            assert equal(got, want)
    assert counts.served == ({name: 2, "gelu_backward": 2} if name == "gelu" else {name: 2}) and not counts.torchs
    assert [t.stride() for t in got[:1]] == [t.stride() for t in torchs[:1]]
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in torchs]
    assert equal(results(function, leaves), torchs)


@pytest.mark.parametrize("name", NAMES[:4])
def test_ops_that_run(name):
    """Ours while on and none of ours while off. (gelu's kernel runs below the modes that see ops.)"""
    leaves, function = arguments(name)
    op = "attention" if name == "scaled_dot_product_attention" else name
    with pygpt.enable(), Calls() as ours:
        results(function, leaves)
    assert {f"pygpt::{op}_fwd", f"pygpt::{op}_bwd"} <= set(ours.names)
    with Calls() as theirs:
        results(function, leaves)
    assert theirs.names and not any(called.startswith("pygpt") for called in theirs.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("op", ["linear", "layer_norm", "rms_norm", "attention"])
def test_as_exact_as_pygpts_functions(op, dtype, generator, monkeypatch):
    """By the rule of pygpt.verify: PyTorch's error is that of the kernel that was there."""
    spec, name = verify.SPECS[op], dispatch.OPS[op].public.__name__
    calls = {
        "linear": F.linear,
        "layer_norm": lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps),
        "rms_norm": lambda x, w, eps, offset: F.rms_norm(x, x.shape[-1:], w, eps),
        "attention": lambda q, k, v, causal, scale: F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale
        ),
    }

    def yardstick(*args):
        with pygpt.backend("torch"):
            return verify.OPS[op].composite(*args)

    monkeypatch.setitem(verify.SPECS, op, replace(spec, call=calls[op], yardstick=yardstick))
    with pygpt.enable(name):
        rows = verify.measure(op, {}, dtype, generator)
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_both_orders(name):
    """A second derivative is torch's own expression, which must not come back to the override."""
    leaves, function = arguments(name, torch.float64)
    with pygpt.enable():
        assert torch.autograd.gradcheck(lambda *a: function(F, *a), leaves)
        assert torch.autograd.gradgradcheck(lambda *a: function(F, *a), leaves, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_outlives_the_switch(name):
    """Recorded on and differentiated off, and the other way round; both orders."""
    leaves, function = arguments(name, torch.float64)

    def second(out):
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = function(F, *leaves)  # which can be differentiated twice
    want_first, want = torch.autograd.grad(out.sum(), leaves, retain_graph=True), second(out)
    with pygpt.enable():
        out = function(F, *leaves)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves, retain_graph=True), want_first)
    torch.testing.assert_close(second(out), want)
    out = function(F, *leaves)
    with pygpt.enable():
        torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), want_first)


def test_options_of_attention(counts):
    q, k, v = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2))
    mask, few = torch.randn(6, 6), torch.randn(6, 8)
    calls = (
        lambda f: f(q, q, q, attn_mask=mask),
        lambda f: f(q, q, q, attn_mask=mask > 0),
        lambda f: f(q, k, v, enable_gqa=True, is_causal=True),
        lambda f: f(few, few, few),
    )
    want = [call(F.scaled_dot_product_attention) for call in calls]
    with pygpt.enable("scaled_dot_product_attention"):
        for call, theirs in zip(calls, want, strict=True):
            ours = call(F.scaled_dot_product_attention)
            assert torch.equal(ours, call(P.scaled_dot_product_attention))
            torch.testing.assert_close(ours, theirs)
            assert ours.stride() == theirs.stride()
        dropped = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        assert (dropped != want[2]).any() and counts.served == {"scaled_dot_product_attention": 5}


# ------------------------------------------------------------------------------- on and off
def test_nesting():
    first = pygpt.enable("linear")
    assert on() == ["linear"]
    with pygpt.enable("linear", "gelu") as inner:
        assert on() == ["linear", "gelu"] and repr(inner) == "<pygpt.enable: linear, gelu>"
        with pygpt.enable():
            assert on() == NAMES
            pygpt.disable("gelu")  # ends the innermost
            assert on() == NAMES
            pygpt.disable("rms_norm")
            assert on() == [name for name in NAMES if name != "rms_norm"]
        assert on() == ["linear", "gelu"]
    assert on() == ["linear"]
    pygpt.enable("linear")
    pygpt.disable()
    assert on() == ["linear"]
    with first:
        pass
    assert on() == []
    pygpt.disable()
    assert on() == []


def test_an_exception_restores():
    with pytest.raises(KeyError), pygpt.enable():
        raise KeyError
    assert on() == []


def test_unknown_names():
    for function in (pygpt.enable, pygpt.disable):
        with pytest.raises(ValueError, match="unknown op 'mm'; known: linear, layer_norm, rms_norm, scaled_dot"):
            function("linear", "mm")
    assert on() == []


def test_what_cannot_be_overridden_changes_nothing(monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(RuntimeError, match="get_kernel"):
        pygpt.enable()
    assert on() == []
    monkeypatch.undo()
    original = aten.Original

    def failing(name, key):
        if name == "rms_norm":
            raise RuntimeError("refused")
        return original(name, key)

    monkeypatch.setattr(aten, "Original", failing)
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="refused"):
        pygpt.enable()
    with Calls() as calls:
        F.linear(x, x)
    assert on() == [] and calls.names[-1] == "aten::mm"


def test_all_threads(counts):
    """A thread that was started before sees the switch, and threads that overlap do not switch each other off."""
    x, inside, left, seen = torch.randn(3, 8), threading.Event(), threading.Event(), []

    def work():
        with pygpt.enable("linear"):
            inside.set()
            assert left.wait(60)
            F.linear(x, x)
            seen.append(dict(counts.served))

    thread = threading.Thread(target=work)
    with pygpt.enable("linear"):
        thread.start()
        assert inside.wait(60)
        F.linear(x, x)
    left.set()
    thread.join()
    assert seen == [{"linear": 2}]


# ------------------------------------------------------------------------------- what torch serves
class Meters(Tensor):
    """With a __torch_function__ of its own, which calls torch's."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


x, wide = torch.randn(3, 8), torch.randn(1, 2, 3, 600)
LEFT = {  # what the kernels leave to torch: the call, the op, and a part of the reason
    "integers": (lambda: F.linear(torch.arange(8), torch.ones(4, 8, dtype=torch.long)), "linear", "torch.int64"),
    "a vector": (lambda: F.linear(x, x[0]), "linear", "weight must be a matrix"),
    "two dtypes": (lambda: F.layer_norm(x.bfloat16(), (8,), x[0]), "layer_norm", ""),
    "double weight": (lambda: F.rms_norm(x, (8,), x[0].double()), "rms_norm", "different dtypes"),
    "complex": (lambda: F.linear(x + 1j, x + 1j), "linear", "complex64"),
    "wide heads": (lambda: F.scaled_dot_product_attention(wide, wide, wide), "scaled_dot_product_attention", "above"),
    "a subclass": (lambda: F.linear(x.as_subclass(Meters), x), "linear", "Meters"),
    "meta": (lambda: F.layer_norm(x.to("meta"), (8,)), "layer_norm", "no kernels for meta"),
    "sparse": (lambda: F.linear(x, x.to_sparse()), "linear", "not strided"),
    "mkldnn": (lambda: F.gelu(x.to_mkldnn()).to_dense(), None, ""),
    "nested": (lambda: F.linear(torch.nested.nested_tensor([x, x[:2]]), x), None, ""),
}


@pytest.mark.parametrize("call, name, reason", LEFT.values(), ids=LEFT)
def test_the_kernel_that_was_there_serves_the_rest(call, name, reason, counts):
    want = call()
    with pygpt.enable():
        got = call()
    if name and reason:
        ((left, why),) = counts.torchs
        assert left == name and reason in why and not counts.served
    assert type(got) is type(want) and got.dtype == want.dtype and got.device == want.device
    if not want.is_meta:  # inside nested tensors, torch's kernel calls linear on strided ones
        torch.testing.assert_close(got.unbind(), want.unbind(), rtol=0 if name else None, atol=0 if name else None)


def test_the_fast_path_of_torchs_encoder(counts):
    """torch runs a whole layer in C++, on nested tensors where some positions are padding. Its layer_norm is ours."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder, padding = (
        torch.nn.TransformerEncoder(layer, 2).eval(),
        torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    )
    start = torch.randn(2, 5, 8)
    with torch.inference_mode():
        for options in ({}, {"src_key_padding_mask": padding}):
            want = encoder(start, **options)
            with pygpt.enable():
                torch.testing.assert_close(encoder(start, **options), want)
    assert counts.served["layer_norm"] >= 4 and set(counts.served) <= {"layer_norm", "linear"}


def test_math_is_torchs(counts):
    """sdpa_kernel without flash attention: the kernels are one."""
    q = torch.randn(1, 2, 4, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, q, q)
        with pygpt.enable():
            assert torch.equal(F.scaled_dot_product_attention(q, q, q), want)
    assert not counts.served and "sdpa_kernel" in str(counts)


WRONG = [
    lambda: F.linear(x, x[:, :3]),
    lambda: F.linear(x, "weight"),
    lambda: F.linear(x, x.double()),
    lambda: F.layer_norm(x, (7,)),
    lambda: F.layer_norm(x, ()),
    lambda: F.layer_norm(x, (8,), x[0, :4]),
    lambda: F.rms_norm(x, (3,)),
    lambda: F.rms_norm(x, (8,), x),
    lambda: F.gelu(x, approximate="cube"),
    lambda: F.gelu(torch.arange(3)),
    lambda: F.scaled_dot_product_attention(x, x[:, :4], x),
    lambda: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3), is_causal=True),
    lambda: F.scaled_dot_product_attention(x, x, x.double()),
    lambda: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(2, 2)),
    lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=2.0),
]


@pytest.mark.parametrize("call", WRONG, ids=range(len(WRONG)))
def test_errors_are_torchs(call):
    with pytest.raises(Exception) as want:
        call()
    with pygpt.enable(), pytest.raises(type(want.value)) as got:
        call()
    assert str(got.value) == str(want.value)


def test_the_choice_of_a_backend_holds(counts):
    leaves, function = arguments("linear")
    torchs = results(function, leaves)
    with pygpt.enable():
        with pygpt.backend("torch"):
            P.linear(*leaves)  # whose own expression is torch's function
            assert equal(results(function, leaves), torchs) and equal(results(function, leaves, P), torchs)
        with pygpt.backend("cpp"):
            results(function, leaves)
            with pytest.raises((RuntimeError, TypeError), match="int64"):
                F.linear(torch.arange(8), torch.ones(4, 8, dtype=torch.long))
    assert counts.served == {"linear": 1} and {why for _, why in counts.torchs} == {"backend 'torch' was asked for"}


def test_reasons_are_logged(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "LOG_FALLBACK", True)
    monkeypatch.setattr(dispatch, "_LOGGED", {})
    with pygpt.enable():
        for _ in range(2):
            F.linear(x, x[0])
    assert capsys.readouterr().err.count("PyTorch serves linear") == 1


# ------------------------------------------------------------------------------- with the rest of torch
@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_torchs_dtypes(name, counts):
    leaves, function = arguments(name)
    with torch.autocast("cpu", torch.bfloat16):
        torchs = results(function, leaves)
        with pygpt.enable():
            ours = results(function, leaves)
    assert [t.dtype for t in ours] == [t.dtype for t in torchs] and counts.served[name] == 1
    torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.05 * max(t.abs().max().item() for t in torchs))


@pytest.mark.parametrize("name", NAMES)
def test_function_transforms(name):
    leaves, function = arguments(name, torch.float64)
    plain = [t.detach() for t in leaves]

    def total(*args):
        return function(F, *args).square().sum()

    transforms = {
        "grad": lambda: torch.func.grad(total)(*plain),
        "jvp": lambda: torch.func.jvp(lambda *a: function(F, *a), tuple(plain), tuple(plain))[1],
        "vmap": lambda: torch.func.vmap(lambda t: function(F, t, *plain[1:]))(torch.stack([plain[0], plain[0] + 1])),
        "per sample": lambda: torch.func.vmap(torch.func.grad(total))(*(torch.stack([t, t + 1]) for t in plain)),
        "hessian": lambda: torch.func.hessian(total)(*plain),
    }
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = {key: transform() for key, transform in transforms.items()}
        with pygpt.enable():
            torch.testing.assert_close({key: transform() for key, transform in transforms.items()}, want)
    first = [key for key in transforms if key not in ("jvp", "hessian")]  # which torch's flash attention has
    with pygpt.enable():
        torch.testing.assert_close({key: transforms[key]() for key in first}, {key: want[key] for key in first})


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_and_no_grad(name, counts):
    leaves, function = arguments(name)
    want = function(P, *leaves)
    for mode in (torch.inference_mode, torch.no_grad):
        with pygpt.enable(), mode():
            got = function(F, *(t.clone() for t in leaves))
            assert torch.equal(got, want) and not got.requires_grad
            assert got.is_inference() == torch.is_inference_mode_enabled()
    assert counts.served == {name: 2}


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors(name):
    from torch._subclasses import FakeTensorMode

    leaves, function = arguments(name)
    want = results(function, leaves)
    with pygpt.enable(), FakeTensorMode() as mode:
        got = results(function, [mode.from_tensor(t) for t in leaves])
    assert [(t.shape, t.dtype, t.stride()) for t in got[:1]] == [(t.shape, t.dtype, t.stride()) for t in want[:1]]
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]


def test_jagged_tensors():
    parts = [torch.randn(n, 8) for n in (3, 5)]

    def run():
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
        heads = nested.unflatten(-1, [2, 4]).transpose(1, 2)
        out = F.gelu(F.linear(F.layer_norm(nested, (8,)), x))
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        (out.values().sum() + attended.values().sum()).backward()
        return out.values(), attended.values(), nested.grad.values()

    want = run()
    with pygpt.enable():
        torch.testing.assert_close(run(), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_and_deepcopy(reentrant):
    """A block of torch's modules: its copies and its checkpointed runs give the same bits."""
    block = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    start = torch.randn(2, 5, 8, requires_grad=True)

    def gradients(model, run):
        model.zero_grad()
        run(model).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    with pygpt.enable():
        want = gradients(block, lambda m: m(start))
        assert equal(gradients(copy.deepcopy(block), lambda m: m(start)), want)
        assert equal(gradients(block, lambda m: checkpoint(m, start, use_reentrant=reentrant)), want)


def _on_dtensors(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    for name in NAMES:
        leaves, function = arguments(name, torch.float64)
        want = results(function, leaves)
        places = [[Shard(0)] if leaf.shape[0] == leaves[0].shape[0] else [Replicate()] for leaf in leaves]
        if name in ("linear", "layer_norm", "rms_norm"):
            places = [[Shard(0)], *[[Replicate()]] * (len(leaves) - 1)]
        sharded = [distribute_tensor(t.detach(), mesh, p).requires_grad_() for t, p in zip(leaves, places, strict=True)]
        with pygpt.enable():
            got = results(function, sharded)
        torch.testing.assert_close([t.full_tensor() for t in got], [t.detach() for t in want])


def test_dtensors(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _on_dtensors(0, 1)
    finally:
        dist.destroy_process_group()
