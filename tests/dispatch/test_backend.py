"""The backend table: choice, refusal with reasons, fallback, explain; and what torch.func and autocast get."""

import inspect
import threading
from functools import partial
from types import SimpleNamespace

import cases
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import pygpt
from pygpt import functional, reference, verify
from pygpt.backends import cuda_objection
from pygpt.dispatch import OPS, REFERENCE, TABLE, Backend, choose, chosen, pick

X = torch.randn(4, 8)
TYPICAL = list(cases.variants(cases.TYPICAL))


def test_the_extension_is_built(compiled):
    assert not TABLE[compiled].missing, TABLE[compiled].missing


def test_unknown_name_is_refused_on_entry():
    with pytest.raises(ValueError, match="unknown backend 'cpu'.*cpp.*torch"), pygpt.backend("cpu"):
        raise AssertionError("entered")


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.missing])
def test_unavailable_name_is_refused_on_entry(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: .+"), pygpt.backend(name):
        raise AssertionError("entered")


def test_choice_nests_and_survives_exceptions(compiled):
    assert chosen() is None
    with pygpt.backend(compiled):
        with pytest.raises(KeyError), pygpt.backend("torch"):
            assert chosen() == "torch" and pick("relu", [X]).kernels is REFERENCE
            raise KeyError
        assert chosen() == compiled and pick("relu", [X]) is TABLE[compiled]
    assert chosen() is None


def test_choice_is_per_thread():
    seen = []
    with pygpt.backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
        assert chosen() == "torch" and seen == [None]


def test_backward_uses_the_backend_of_its_forward(compiled, monkeypatch):
    calls = []
    kernels = TABLE[compiled].kernels
    real = kernels.relu_bwd
    monkeypatch.setattr(kernels, "relu_bwd", lambda *a: calls.append(1) or real(*a))
    with pygpt.backend(compiled):
        y = functional.relu(X.clone().requires_grad_())
    with pygpt.backend("torch"):
        y.sum().backward()
    assert calls == [1]


def test_environment_variable(run_python):
    source = """
import pygpt, torch
print(pygpt.explain("relu", torch.ones(1)))
"""
    done = run_python(source, PYGPT_BACKEND="torch")
    assert done.stdout.startswith("relu: torch") and "backend 'torch' was asked for" in done.stdout, done.stderr
    done = run_python(source, PYGPT_BACKEND="nonsense")
    assert done.returncode != 0 and "unknown backend 'nonsense'" in done.stderr


def test_explain_is_data(compiled):
    choice = pygpt.explain("layer_norm", X, (8,))
    assert (choice.op, choice.backend, choice.rejected) == ("layer_norm", compiled, {})
    wide = torch.randn(2, 513)
    choice = pygpt.explain(functional.scaled_dot_product_attention, wide, wide, wide)
    assert choice.backend == "torch" and list(choice.rejected) == [name for name in TABLE if name != "torch"]
    assert all(isinstance(why, str) for whys in choice.rejected.values() for why in whys)
    (why,) = choice.rejected[compiled]
    assert why.startswith("head dimension above ") and f"not {compiled}: {why}" in str(choice)
    with pygpt.backend("torch"):
        choice = pygpt.explain("relu", X)
        assert choice.backend == "torch" and choice.rejected[compiled] == ["backend 'torch' was asked for"]
    assert functional.relu(X).shape == X.shape  # explaining is over


@pytest.mark.parametrize("op", ["softmax", "_run", "explain", "torch", None, 3, torch.relu])
def test_explain_refuses_what_is_no_op(op):
    with pytest.raises(ValueError, match="explain: unknown op"):
        pygpt.explain(op, X)


def test_explain_passes_on_bad_arguments():
    with pytest.raises(ValueError, match="layer_norm: normalized_shape"):
        pygpt.explain("layer_norm", X, (7,))
    with pytest.raises(TypeError, match=r"^pygpt.layer_norm: missing a required argument: 'input'"):
        pygpt.explain("layer_norm")
    with pytest.raises(TypeError, match=r"^pygpt.relu: got an unexpected keyword argument 'p'"):
        pygpt.explain(functional.relu, X, p=1)
    assert functional.relu(X).shape == X.shape


def test_explain_says_what_depends_on_pytorch(compiled):
    """Which takes relu of integers, and no layer_norm of them."""
    x, why = X.long(), "input must be floating point, got torch.int64"
    for op, args in (("relu", (x,)), ("layer_norm", (x, (8,)))):
        choice = pygpt.explain(op, *args)
        assert choice.backend == "torch" and f"{op}: torch (no kernel takes this call" in str(choice)
        assert why in str(choice.error) and choice.rejected[compiled] == [str(choice.error)]
    assert torch.equal(functional.relu(x), x.relu())
    with pytest.raises(TypeError, match=why):
        functional.layer_norm(x, (8,))
    assert pygpt.explain("relu", X).error is None


@pytest.mark.parametrize("op", OPS)
def test_every_objection_is_told(op):
    row = Backend("toy", object(), devices=("cuda",), dtypes=(torch.float16,), ops=("nothing",), max_head_dim=4)
    q = torch.randn(1, 1, 3, 8)
    others = len(OPS[op].tensors) - 1
    why = "; ".join(row.objections(op, [q, *[q.double()] * others, q.int()], ["window"]))
    for part in (f"{op} is not among its ops", "cpu tensors", "torch.float32", "window not served"):
        assert part in why
    assert ("different dtypes" in why) == (others > 0 and not OPS[op].statistics)
    assert ("head dimension above 4" in why) == (op in ("attention", "varlen_attn"))


GENERAL = "sm_80 sm_90 compute_90"
HOPPER = "sm_90a"


@pytest.mark.parametrize(
    "built, capability, driver, why",
    [
        (GENERAL, (8, 0), 13000, ""), (GENERAL, (8, 6), 13010, ""), (GENERAL, (9, 0), 13000, ""),
        (GENERAL, (12, 0), 14000, ""),
        (GENERAL, (7, 5), 13000, "built for sm_80, sm_90, compute_90, this GPU is sm_75"),
        (GENERAL, (9, 0), 12080, "built with CUDA 13, this machine's driver is of CUDA 12"),
        (HOPPER, (9, 0), 13000, ""),
        (HOPPER, (8, 0), 13000, "built for sm_90a, this GPU is sm_80; set PYGPT_CUDA_ARCHS"),
        (HOPPER, (10, 0), 13000, "built for sm_90a, this GPU is sm_100; set PYGPT_CUDA_ARCHS"),
        ("sm_80 sm_90a compute_80", (10, 0), 13000, ""), ("sm_80 sm_90a compute_80", (8, 9), 13000, ""),
        ("sm_86 compute_86", (8, 0), 13000, "built for sm_86, compute_86, this GPU is sm_80"),
        ("sm_100f", (10, 3), 13000, ""), ("sm_100f", (12, 0), 13000, "this GPU is sm_120"),
        ("sm_100a", (10, 3), 13000, "this GPU is sm_103"), ("sm_103f", (10, 0), 13000, "this GPU is sm_100"),
    ],
)  # fmt: skip
def test_gpus_that_the_cuda_kernels_cannot_run_on(built, capability, driver, why, monkeypatch):
    library = SimpleNamespace(code=lambda: built, versions=lambda: (driver, 13000))
    monkeypatch.setattr(pygpt, "_cuda", library, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    objection = cuda_objection.__wrapped__(torch.device("cuda", 0))
    assert why in objection and bool(why) == bool(objection)


def test_default_serves_cpu_floats_by_the_compiled_backend(compiled):
    for op, dims in TYPICAL:
        for dtype in cases.DTYPES:
            args, _ = verify.draw(op, dims, dtype, None)
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            assert choose(verify.SPECS[op].op, tensors).backend == compiled


def test_sparse_and_mixed_tensors_fall_back(compiled):
    sparse = X.relu().to_sparse()
    assert torch.equal(functional.relu(sparse).to_dense(), F.relu(sparse).to_dense())
    with pygpt.backend(compiled), pytest.raises(RuntimeError, match="not strided"):
        functional.relu(sparse)


def test_a_remembered_call_notices_what_changed(compiled):
    """How a call was served last time holds for calls like it alone."""
    x, leaf = X.clone(), X.clone().requires_grad_()
    for _ in range(2):
        with pygpt.backend(compiled):
            assert not functional.gelu(x).requires_grad and not functional.gelu(leaf.detach()).requires_grad
            assert functional.gelu(leaf).grad_fn.name() == "GELUBackward"
            with torch.no_grad():
                assert not functional.gelu(leaf).requires_grad
            assert functional.gelu(x.double()).dtype == torch.float64
            assert pygpt.explain("gelu", x).backend == compiled
            with pytest.raises(RuntimeError, match="torch.func transform"):
                torch.func.vmap(functional.gelu)(x)
            with pytest.raises(RuntimeError, match="not strided"):
                functional.gelu(x.to_sparse())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert functional.linear(x, x).dtype == torch.bfloat16
            assert functional.linear(x, x).dtype == torch.float32
            with pytest.raises(TypeError, match="weight is torch.float64, input is torch.float32"):
                functional.linear(x, x.double())
            with pytest.raises(RuntimeError, match="different dtypes"):
                functional.layer_norm(x, (8,), x[0].double())
            assert functional.layer_norm(x, (8,), x[0], x[1]).shape == x.shape
            q = torch.randn(1, 1, 3, 513)
            assert functional.scaled_dot_product_attention(q[..., :8], q[..., :8], q[..., :8]).shape == (1, 1, 3, 8)
            with pytest.raises(RuntimeError, match="head dimension above (256|512)"):
                functional.scaled_dot_product_attention(q, q, q)
        with pygpt.backend("torch"):
            assert functional.gelu(leaf).grad_fn.name() == "GeluBackward0"


def test_tensors_that_escaped_from_torch_func(compiled):
    """They need no gradient outside, whatever they say."""
    escaped = []
    torch.func.grad(lambda x: (x.sum(), escaped.append(2 * x))[0])(X)
    weight = torch.randn(8, requires_grad=True)
    with pygpt.backend(compiled):
        assert not functional.gelu(escaped[0]).requires_grad
        for w in (weight, weight):  # the second time remembered
            y = functional.layer_norm(escaped[0], (8,), w)
            (dw,) = torch.autograd.grad(y.sum(), w)
            torch.testing.assert_close(dw, torch.autograd.grad(F.layer_norm(2 * X, (8,), w).sum(), w)[0])


@pytest.mark.parametrize("op", functional.__all__)
def test_what_is_no_tensor_is_named(op, backend):
    """None too, unless the signature allows it."""
    function, x = getattr(functional, op), torch.randn(1, 1, 8, 8)
    parameters = inspect.signature(function).parameters.values()
    kinds = {p.name: p.annotation for p in parameters if p.annotation in (torch.Tensor, torch.Tensor | None)}
    others = {"normalized_shape": (8,)} if "norm" in op else {}
    if op == "varlen_attn":
        cu = torch.tensor([0, 1], dtype=torch.int32)
        x, others, kinds["cu_seq_k"] = x[None], {"max_q": 1, "max_k": 1}, torch.Tensor  # no None without block_table
    if op == "qkv_attention":
        x, others = torch.randn(1, 1, 1, 8, 9), {"num_heads": 1}
    good = {**others, **{n: None if kind != torch.Tensor else x[0, 0] for n, kind in kinds.items()}}
    good |= {n: cu for n in good if n.startswith("cu_seq")}
    if op == "rope":
        good |= {"q": x, "cos": x[0, 0, :, :4], "sin": x[0, 0, :, :4]}
    good |= {n: torch.arange(8) for n in good if n == "target"}
    with pygpt.backend(backend):
        for name, kind in kinds.items():
            for bad in (3, [1.0], *[None] * (kind == torch.Tensor)):
                with pytest.raises(TypeError, match=f"{op}: {name} must be a Tensor, got {type(bad).__name__}"):
                    function(**{**good, name: bad})
        function(**good)


# ------------------------------------------------------------------------------- torch.func
def closed(op, args):
    """The public op as a function of its tensors."""
    where = [i for i, a in enumerate(args) if verify._is_floating(a)]

    def function(call, *tensors):
        full = list(args)
        for i, t in zip(where, tensors, strict=True):
            full[i] = t
        return call(*full)

    return function, tuple(args[i] for i in where)


TRANSFORMS = {
    "vmap": lambda f, ts: torch.func.vmap(f)(*(torch.stack([t, t + 1]) for t in ts)),
    "jvp": lambda f, ts: torch.func.jvp(f, ts, tuple(t + 1 for t in ts)),
    "grad": lambda f, ts: torch.func.grad(lambda *a: verify.as_tuple(f(*a))[0].sum())(*ts),
    "forward mode": lambda f, ts: forward_mode(f, ts),
}


def forward_mode(f, tensors):
    with torch.autograd.forward_ad.dual_level():
        out = f(*(torch.autograd.forward_ad.make_dual(t, t + 1) for t in tensors))
        return [tuple(torch.autograd.forward_ad.unpack_dual(o)) for o in verify.as_tuple(out)]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("op, dims", [v for v in TYPICAL if v[0] != "attention_lse"], ids=cases.ids)
def test_function_transforms(op, dims, name, compiled, generator):
    """Right by default; refused with the reason by a forced backend."""
    args, _ = verify.draw(op, dims, torch.float64, generator)
    function, tensors = closed(op, args)

    def run(call):
        with torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH
        ):  # the only one torch has jvp and vmap for
            return TRANSFORMS[name](lambda *ts: function(call, *ts), tensors)

    torch.testing.assert_close(run(verify.SPECS[op].call), run(verify.eager(op)))
    with pygpt.backend(compiled), pytest.raises(RuntimeError, match=r"torch.func transform|forward-mode"):
        run(verify.SPECS[op].call)


# ------------------------------------------------------------------------------- autocast
def _torchs_hidden(pre, activation):
    act = reference.ACTIVATIONS[activation][0]
    if activation not in reference.GATED:
        return act(pre)
    gate, value = pre.chunk(2, -1)
    return act(gate) * value


TORCHS = {
    "attention": lambda q, k, v, causal, scale: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale),
    "linear": F.linear,
    "mlp": lambda x, w, b, p, pb, act, save: F.linear(_torchs_hidden(F.linear(x, w, b), act), p, pb),
    "layer_norm": lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps),
    "rms_norm": lambda x, w, eps, *_: F.rms_norm(x, x.shape[-1:], w, eps),
    "gelu": lambda x, approximate: F.gelu(x, approximate=approximate),
    "relu": F.relu,
}


def test_modes_of_torch_functions_can_be_disabled(compiled):
    class Forbid(TorchFunctionMode):
        def __torch_function__(self, *_):
            raise AssertionError("called")

    with Forbid(), torch._C.DisableTorchFunction():
        assert functional.relu(X).shape == X.shape


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=cases.ids)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=cases.ids)
@pytest.mark.parametrize("op, dims", [v for v in TYPICAL if v[0] in TORCHS], ids=cases.ids)
def test_autocast_gives_torchs_dtype(op, dims, given, low, backend, generator):
    args, _ = verify.draw(op, dims, given, generator)
    args = [a.requires_grad_() if verify._is_floating(a) else a for a in args]
    with torch.autocast("cpu", dtype=low):
        want = TORCHS[op](*args)
        with pygpt.backend(backend):
            got = verify.SPECS[op].call(*args)
    assert got.dtype == want.dtype
    torch.testing.assert_close(
        got.to(low), want.to(low), rtol=0, atol=8 * torch.finfo(low).eps * want.abs().max().item()
    )
    got.float().sum().backward()
    assert all(a.grad.dtype == given for a in args if verify._is_floating(a))


def test_autocast_of_mixed_arguments(backend):
    """What a model under autocast does: a bfloat16 activation meets float32 weights."""
    x, w, b = torch.randn(3, 8).bfloat16(), torch.randn(5, 8), torch.randn(5)
    with torch.autocast("cpu", dtype=torch.bfloat16), pygpt.backend(backend):
        assert functional.linear(x, w, b).dtype == functional.mlp(x, w, b, w.t(), None).dtype == torch.bfloat16
        q = torch.randn(1, 1, 3, 8)
        assert functional.scaled_dot_product_attention(q, q.bfloat16(), q).dtype == torch.bfloat16


def test_autocast_of_tensors_without_memory(recwarn):
    """A FakeTensor has no address by which a shared cast of it could be known again."""
    with torch._subclasses.FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        x, weight = torch.empty(2, 8, requires_grad=True), torch.empty(3, 8, requires_grad=True)
        y = functional.linear(x, weight) + functional.linear(x, weight)
        y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.shape == (3, 8)
    assert not [w for w in recwarn if "data pointer" in str(w.message)]


@pytest.mark.parametrize(
    "features", [{"window": (3, 0)}, {"alibi_slopes": torch.tensor([0.3, 0.7])}, {"softcap": 2.0}, {}], ids=cases.ids
)
def test_autocast_leaves_attentions_scores_in_float32(features, compiled):
    """As the kernels have them; what autocast makes 16 bits wide is the arguments."""
    q, k, v = torch.randn(3, 1, 2, 9, 8).bfloat16()
    call = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True, return_lse=True, **features)
    with pygpt.backend("torch"):
        want = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(call(), want, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = call()
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(lse, want[1])


@pytest.mark.parametrize("op, dims", TYPICAL, ids=cases.ids)
def test_meta_tensors_have_shapes(op, dims, generator):
    args, _ = verify.draw(op, dims, torch.float32, generator)
    want = verify.as_tuple(verify.SPECS[op].call(*args))
    got = verify.as_tuple(verify.SPECS[op].call(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)))
    assert [(t.shape, t.dtype, t.device.type) for t in got] == [(t.shape, t.dtype, "meta") for t in want]
