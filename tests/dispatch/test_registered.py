"""torch.ops.pygpt.* by themselves and in graphs: gradients, export, FLOP counts, torch's other views of a call."""

import copy
from functools import partial

import cases
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import pygpt
from pygpt import functional, nn, verify
from pygpt.dispatch import OPS, TABLE

GPU_SHARE = {"triton": 4}  # see conftest
TINY = list(cases.variants(cases.TINY))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def registered_op(op, kernels):
    """The registered <op>_fwd of what `verify.draw` gives, without the results that only backward reads."""
    spec = verify.SPECS[op]
    fwd, n = getattr(kernels, f"{spec.op}_fwd"), OPS[spec.op].results
    return lambda *args: verify.as_tuple(fwd(*spec.canonical(*args)))[:n]


# ------------------------------------------------------------------------------- gradients of the ops themselves
@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_an_op_called_directly_has_the_functions_gradients(op, dims, compiled, generator):
    """Bitwise: the same formulas over the same kernels."""
    args, grads = verify.draw(op, dims, torch.float32, generator)
    with pygpt.backend(compiled):
        want = verify.directions(op, verify.SPECS[op].call, args, grads)
    got = verify.directions(op, registered_op(op, TABLE[compiled].registered), args, grads)
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_second_derivative_through_an_op(op, dims, generator):
    args, grads = verify.draw(op, dims, torch.float64, generator)

    def second(function):
        leaves = [a.detach().requires_grad_() if verify._is_floating(a) else a for a in args]
        tensors = [a for a in leaves if verify._is_floating(a)]
        outs = verify.as_tuple(function(*leaves))[: len(grads)]
        first = torch.autograd.grad(outs, tensors, grads, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors, allow_unused=True)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        ours = second(registered_op(op, torch.ops.pygpt))
        for a, b in zip(ours, second(verify.eager(op)), strict=True):
            torch.testing.assert_close(*(torch.zeros(()) if g is None else g for g in (a, b)))


@pytest.mark.parametrize("op, dims", cases.TINY.items())
def test_backward_ops_refuse_a_derivative(op, dims, generator):
    """PyTorch would give zeros and a warning."""
    args, grads = verify.draw(op, dims, torch.float32, generator)
    _, (name, arguments) = cases.kernel_calls(op, args, grads, torch.ops.pygpt)
    leaves = [a.detach().requires_grad_() if verify._is_floating(a) else a for a in arguments]
    out = verify.as_tuple(getattr(torch.ops.pygpt, name)(*leaves))[0]
    with pytest.raises(RuntimeError, match=f"{name} has no derivative"):
        out.sum().backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", ["gelu", "mlp"])
def test_an_unknown_name_is_refused_by_kernels_and_fake_kernels_alike(op, device, kernels, generator):
    args, grads = verify.draw(op, cases.TINY[op], torch.float32, generator)
    for name, arguments in cases.kernel_calls(op, args, grads, torch.ops.pygpt):
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else "swish" if isinstance(a, str) else a
                     for a in arguments]  # fmt: skip
        with pytest.raises(RuntimeError, match=rf"pygpt.{name}: .*(approximate must be|unknown activation).*'swish'"):
            getattr(torch.ops.pygpt if device == "meta" else kernels, name)(*arguments)


@pytest.mark.parametrize("op", OPS)
def test_what_only_backward_reads_is_not_differentiable(op, generator):
    args, _ = verify.draw(op, cases.TINY[op], torch.float32, generator)
    leaves = [a.requires_grad_() if verify._is_floating(a) else a for a in args]
    results = verify.as_tuple(getattr(torch.ops.pygpt, f"{op}_fwd")(*verify.SPECS[op].canonical(*leaves)))
    assert [t.requires_grad for t in results] == [i < OPS[op].results for i in range(len(results))]


@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
@pytest.mark.share(4)
def test_opcheck_of_ops_with_gradients(op, dims, generator):
    args, _ = verify.draw(op, dims, torch.float32, generator)
    leaves = [a.requires_grad_() if verify._is_floating(a) else a for a in args]
    spec = verify.SPECS[op]
    torch.library.opcheck(getattr(torch.ops.pygpt, f"{spec.op}_fwd").default, spec.canonical(*leaves))


# ------------------------------------------------------------------------------- graphs
class Everything(torch.nn.Module):
    """All eight ops."""

    def __init__(self):
        super().__init__()
        self.ln, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.attn, self.mlp = nn.CausalSelfAttention(8, 2), nn.MLP(8)

    def forward(self, x):
        h, s = self.ln(self.attn(self.ln(x)), x)
        return self.rms(functional.gelu(functional.relu(self.mlp(h))) + s)


USED = {"layer_norm", "add_layer_norm", "rms_norm", "linear", "qkv_attention", "mlp", "gelu", "relu"}


def named_gradients(module, call, x):
    module.zero_grad()
    call(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_trains(strict, tmp_path):
    m, x = Everything(), torch.randn(2, 5, 8)
    program = torch.export.export(m, (x,), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    names = {str(node.target) for node in program.graph.nodes}
    assert names >= {f"pygpt.{op}_fwd.default" for op in USED}
    exported, want = program.module(), named_gradients(m, m, x)
    for name, grad in named_gradients(exported, exported, x).items():
        torch.testing.assert_close(grad, want[name], msg=name)
    optimizer = torch.optim.SGD(exported.parameters(), lr=1e-4)
    before = [exported(x).square().sum().item()]
    for _ in range(3):
        optimizer.zero_grad()
        exported(x).square().sum().backward()
        optimizer.step()
        before.append(exported(x).square().sum().item())
    assert before[-1] < before[0]


def test_export_with_a_dynamic_batch():
    m, x = Everything(), torch.randn(2, 5, 8)
    program = torch.export.export(m, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=64)},))
    other = torch.randn(7, 5, 8)
    torch.testing.assert_close(program.module()(other), m(other))


@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_make_fx_keeps_gradients(op, dims, compiled, generator):
    args, grads = verify.draw(op, dims, torch.float32, generator)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]

    def call(*given):
        left = iter(given)
        return verify.SPECS[op].call(*(next(left) if isinstance(a, torch.Tensor) else a for a in args))

    with pygpt.backend(compiled):
        graph = make_fx(call)(*tensors)
        name = f"{verify.SPECS[op].op}_fwd"
        assert any(name in str(node.target) for node in graph.graph.nodes)
        want = verify.directions(op, verify.SPECS[op].call, args, grads)
    rest = [a for a in args if not isinstance(a, torch.Tensor)]
    got = verify.directions(op, lambda *a: graph(*(t for t in a if isinstance(t, torch.Tensor))), args, grads)
    assert all(torch.equal(got[key], want[key]) for key in want), rest


SHARED = {  # one tensor in two places
    "sdpa(q, q, q)": (lambda q: functional.scaled_dot_product_attention(q, q, q), [(1, 2, 5, 8)]),
    "sdpa(q, kv, kv)": (lambda q, kv: functional.scaled_dot_product_attention(q, kv, kv), [(1, 2, 5, 8), (1, 2, 6, 8)]),
    "add_layer_norm(x, x)": (lambda x: functional.add_layer_norm(x, x, (8,)), [(4, 8)]),
    "linear(x, x)": (lambda x: functional.linear(x, x), [(8, 8)]),
    "layer_norm(x, w, w)": (lambda x, w: functional.layer_norm(x, (8,), w, w), [(4, 8), (8,)]),
    "layer_norm(w, w, w)": (lambda w: functional.layer_norm(w, (8,), w, w), [(8,)]),
    "add_rms_norm(x, x, x)": (lambda x: functional.add_rms_norm(x, x, (8,), x), [(8,)]),
    "dropout_add_rms_norm(x, x, x)": (lambda x: functional.dropout_add_rms_norm(x, x, (8,), x), [(8,)]),
    "rms_norm(w, w)": (lambda w: functional.rms_norm(w, (8,), w), [(8,)]),
    "mlp, tied": (lambda x, w, b: functional.mlp(x, w, b, w, b), [(4, 8), (8, 8), (8,)]),
    "mlp, input": (lambda x, w, b: functional.mlp(x, w, b, w, b, save="input"), [(4, 8), (8, 8), (8,)]),
    "swiglu, input": (
        lambda x, w, b: functional.mlp(x, w, b, w[:, :4], b, "swiglu", save="input"), [(4, 8), (8, 8), (8,)],
    ),
    "linear, twice": (lambda x, w: functional.linear(functional.linear(x, w), w), [(4, 8), (8, 8)]),
}  # fmt: skip


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_a_compiled_forward_keeps_what_save_says(activation):
    """Its graph returns what its backward graph reads."""
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((4, 8), (24, 8), (8, 12))]
    if activation != "swiglu":
        tensors[1] = torch.randn(12, 8, requires_grad=True)
    found = {}

    def compiler(graph, _, save):
        (output,) = graph.graph.find_nodes(op="output")
        found[save] = {t for t in output.args[0] if t.meta["val"].shape in ((4, 12), (4, 24))}
        return make_boxed_func(graph.forward)

    for save in ("all", "input"):
        backend = aot_autograd(fw_compiler=partial(compiler, save=save), bw_compiler=lambda g, _: make_boxed_func(g))
        x, fc, proj = tensors
        function = lambda x, fc, proj, save=save: functional.mlp(x, fc, None, proj, None, activation, save=save)
        y = torch.compile(function, fullgraph=True, backend=backend)(x, fc, proj)
        grads = torch.autograd.grad(y.sum(), tensors)
        assert all(map(torch.equal, grads, torch.autograd.grad(function(*tensors).sum(), tensors)))
    assert found["all"] and not found["input"]


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_tensor_compiles_whole(name):
    function, shapes = SHARED[name]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def everything(call):
        outs = verify.as_tuple(call(*tensors))
        return *outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), tensors)

    compiled = everything(torch.compile(function, fullgraph=True, backend="aot_eager"))
    assert all(map(torch.equal, compiled, everything(function)))


def test_a_choice_inside_a_compiled_function(compiled):
    """Called again, from another thread's state or under another choice, and followed by other compilations."""

    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def inside(x):
        with pygpt.backend("torch"):
            y = functional.gelu(x)
        return y + functional.gelu(x)

    x = torch.randn(1000)
    for _ in range(3):
        assert torch.equal(inside(x), F.gelu(x) + functional.gelu(x))
    with pygpt.backend("torch"):
        assert torch.equal(inside(x), 2 * F.gelu(x))
    with pygpt.backend(compiled):
        y = torch.compile(functional.gelu, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(y, functional.gelu(x))
    assert torch.equal(inside(x), F.gelu(x) + functional.gelu(x))


# ------------------------------------------------------------------------------- upstream gradients of None
class Severed(torch.autograd.Function):
    """The identity, through which no gradient comes back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_no_gradient_stays_none(op, dims, backend, generator):
    """As in torch: zeros would let weight decay move weights that torch leaves alone."""
    args, _ = verify.draw(op, dims, torch.float32, generator)
    leaves = [a.requires_grad_() if verify._is_floating(a) else a for a in args]
    with pygpt.backend(backend):
        outs = verify.as_tuple(verify.SPECS[op].call(*leaves))
        sum(Severed.apply(out).sum() for out in outs).backward()
    assert all(a.grad is None for a in leaves if isinstance(a, torch.Tensor))


# ------------------------------------------------------------------------------- FLOP counts
def flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        out = verify.as_tuple(function(*args))[0]
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_flops_of_linear_and_mlp_are_torchs(trained, bias, compiled):
    x, w, b = leaf(2, 3, 8), leaf(5, 8), leaf(5) if bias else None
    fc, fb, proj, pb = leaf(12, 8), leaf(12), leaf(7, 12), leaf(7)
    for t, needed in zip((x, w), trained, strict=True):
        t.requires_grad_(needed)
    fc.requires_grad_(trained[1])
    with pygpt.backend(compiled):
        assert flops(functional.linear, x, w, b) == flops(F.linear, x, w, b)
        ours = flops(functional.mlp, x, fc, fb, proj, pb)
    assert ours == flops(lambda *_: F.linear(F.gelu(F.linear(x, fc, fb)), proj, pb))


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_attention_are_torchs(causal, kv_heads, compiled):
    """Grouped heads of keys count as if each query head had its own."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    q, k, v = leaf(2, 6, 7, 8), leaf(2, kv_heads, 9, 8), leaf(2, kv_heads, 9, 5)
    call = partial(functional.scaled_dot_product_attention, is_causal=causal, enable_gqa=kv_heads != 6)
    with pygpt.backend(compiled):
        forward, backward = flops(call, q, k, v)
    shapes = q.shape, (2, 6, 9, 8), (2, 6, 9, 5)
    assert forward == sdpa_flop_count(*shapes)
    assert backward == sdpa_backward_flop_count((2, 6, 7, 5), *shapes)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "gelu", "relu"])
def test_flops_of_the_others_are_torchs(op, compiled):
    args = (leaf(3, 8), (8,)) if "norm" in op else (leaf(3, 8),)
    with pygpt.backend(compiled):
        assert flops(getattr(functional, op), *args) == flops(getattr(F, op), *args) == (0, 0)


# ------------------------------------------------------------------------------- torch's functions replaced by ours
REPLACED = """
import torch, torch.nn.functional as F, pygpt
from pygpt import functional
theirs = {name: getattr(F, name) for name in functional.__all__ if hasattr(F, name)}
for name in theirs:
    setattr(F, name, getattr(functional, name))
x, w, q = torch.randn(3, 4), torch.randn(4, 4), torch.randn(1, 2, 5, 600)  # wider heads than any kernel takes
calls = {
    "linear": (x.cfloat(), w.cfloat()), "relu": (x.long(),), "gelu": (x.to_sparse(),),
    "rms_norm": (x, (4,), w[0].double()),
    "cross_entropy": (x, w[:3].softmax(1)), "linear_cross_entropy": (x, w, w[:3].softmax(1)),
    "layer_norm": (x.bfloat16(), (4,), w[0]), "scaled_dot_product_attention": (q, q, q, torch.ones(5, 5).bool()),
}
assert calls.keys() >= theirs.keys()
for name, args in ((name, calls[name]) for name in theirs):
    for chosen in ("torch", None):
        context = pygpt.backend(chosen) if chosen else torch.enable_grad()
        with context:
            try:
                got, want = getattr(F, name)(*args), theirs[name](*args)
            except RecursionError:
                raise SystemExit(f"{name} calls itself")
            except (RuntimeError, TypeError) as e:
                assert name == "gelu", (name, e)
                continue
            assert torch.equal(got, want), name
with pygpt.backend("torch"):
    functional.mlp(x, w, None, w, None, "relu2").sum()
    functional.add_layer_norm(x, x, (4,))
    functional.add_rms_norm(x, x, (4,))
print("right")
"""


def test_torchs_functions_replaced_by_ours(run_python):
    done = run_python(REPLACED)
    assert done.stdout == "right\n", done.stdout + done.stderr[-2000:]


# ------------------------------------------------------------------------------- torch functions' protocol
def public_calls():
    x, w, b, q = torch.randn(3, 8), torch.randn(8, 8), torch.randn(8), torch.randn(1, 2, 5, 8)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    return {
        "linear": (x, w, b), "mlp": (x, w, b, w, b), "layer_norm": (x, (8,), b, b),
        "add_layer_norm": (x, x, (8,), b, b), "add_rms_norm": (x, x, (8,), b),
        "dropout_add_layer_norm": (x, x, (8,), b, b), "dropout_add_rms_norm": (x, x, (8,), b),
        "rms_norm": (x, (8,), b), "gelu": (x,), "relu": (x,), "scaled_dot_product_attention": (q, q, q),
        "qkv_attention": (x[None], 2, 1), "varlen_attn": (*[q[0].transpose(0, 1)] * 3, cu, cu, 3, 3),
        "rope": (q, q, w[:5, :4], w[3:, 4:]),
        "cross_entropy": (x, cu.long()), "linear_cross_entropy": (x, w, cu.long()),
    }  # fmt: skip


class Log(TorchFunctionMode):
    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", functional.__all__)
def test_function_modes_see_the_public_function(name, grad):
    args = public_calls()[name]
    if grad:
        args = [a.requires_grad_() if verify._is_floating(a) else a for a in args]
    function = getattr(functional, name)
    for _ in range(2):  # also when plain calls like it have been served
        want = function(*args)
        with Log() as log:
            got = function(*args)
        assert log.seen[0] is function
        assert all(map(torch.equal, verify.as_tuple(got), verify.as_tuple(want)))


@pytest.mark.parametrize("name", functional.__all__)
def test_symbolic_trace_records_the_public_function(name):
    function, args = getattr(functional, name), public_calls()[name]

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x, *args[1:])

    graph = torch.fx.symbolic_trace(Module())
    assert function in [node.target for node in graph.graph.nodes]
    assert all(map(torch.equal, verify.as_tuple(graph(args[0])), verify.as_tuple(function(*args))))


class Wrapper(torch.Tensor):
    """A subclass that dispatches for itself, as quantised and sharded tensors do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.within = inner

    seen = []  # noqa: RUF012 (shared on purpose)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        unwrap = lambda a: a.within if isinstance(a, cls) else a
        out = func(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda a: cls(a) if isinstance(a, torch.Tensor) else a, out)


class Intercepting(torch.Tensor):
    """A subclass with a torch function of its own, which knows torch's functions by name."""

    seen = []  # noqa: RUF012 (shared on purpose)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Subclass(torch.Tensor):
    """A subclass without either."""


@pytest.mark.parametrize("name", [name for name in functional.__all__ if hasattr(F, name)])
def test_subclasses_that_dispatch_for_themselves(name):
    args, function = public_calls()[name], getattr(functional, name)
    want = getattr(F, name)(*args)
    for kind, wrap in (("Wrapper", Wrapper), ("Intercepting", lambda t: t.as_subclass(Intercepting))):
        wrapped = [wrap(a) if verify._is_floating(a) else a for a in args]
        got = function(*wrapped)
        assert type(got).__name__ == kind
        torch.testing.assert_close(got.within if kind == "Wrapper" else got.as_subclass(torch.Tensor), want)
        choice = pygpt.explain(function, *wrapped)
        assert choice.backend == "torch" and f"a tensor subclass, {kind}" in choice.rejected["cpp"]
        with pygpt.backend("cpp"), pytest.raises(RuntimeError, match=f"a tensor subclass, {kind}"):
            function(*wrapped)
        one = [args[0], *(wrap(a) if isinstance(a, torch.Tensor) else a for a in args[1:])]  # all but the first one
        if len(args) > 1 and name != "layer_norm":
            assert pygpt.explain(function, *one).backend == "torch"
    assert any("pygpt" not in seen for seen in Wrapper.seen) and not any("pygpt" in seen for seen in Wrapper.seen)


@pytest.mark.parametrize("name", functional.__all__)
def test_plain_subclasses_and_parameters_keep_their_kernels(name, compiled):
    args, function = public_calls()[name], getattr(functional, name)
    want = verify.as_tuple(function(*args))
    for wrap in (torch.nn.Parameter, lambda t: t.as_subclass(Subclass)):
        wrapped = [wrap(a) if verify._is_floating(a) else a for a in args]
        assert pygpt.explain(function, *wrapped).backend == "cpp"
        got = verify.as_tuple(function(*wrapped))
        assert all(torch.equal(a.as_subclass(torch.Tensor), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_torchs(layout):
    parts = [torch.randn(2, 8), torch.randn(5, 8)]
    nested, w = torch.nested.nested_tensor(parts, layout=layout), torch.randn(6, 8)
    for name, rest in (("linear", (w,)), ("gelu", ()), ("relu", ()), ("layer_norm", ((8,), w[0], w[1]))):
        function, theirs = getattr(functional, name), getattr(F, name)
        choice = pygpt.explain(function, nested, *rest)
        assert choice.backend == "torch" and "nested" in choice.rejected["cpp"][0].lower()
        for got, want in zip(function(nested, *rest).unbind(), parts, strict=True):
            torch.testing.assert_close(got, theirs(want, *rest))


def test_a_copied_module_shares_nothing_with_the_cache():
    """Models are copied (EMA, peft) between calls that were resolved before."""
    m, x = Everything(), torch.randn(2, 5, 8)
    want = named_gradients(m, m, x)
    other = copy.deepcopy(m)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert not torch.equal(other(x), m(x))
    assert all(torch.equal(g, want[name]) for name, g in named_gradients(m, m, x).items())
