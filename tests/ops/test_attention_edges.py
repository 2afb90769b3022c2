"""Attention's options: derivatives, transforms, graphs, backends that lack them, memory, and what is refused."""

from dataclasses import replace

import cases
import pytest
import torch
from torch import Tensor

import pygpt
from pygpt.dispatch import TABLE
from pygpt.functional import scaled_dot_product_attention as sdpa
from tests.ops.attention_by_hand import by_hand
from tests.ops.attention_cases import (
    BY_NAME,
    FEATURES,
    MARKS,
    OPTIONS,
    TYPICAL,
    Sizes,
    assert_near,
    canonical,
    cast,
    draw_tensors,
    is_floating,
    public,
    with_gradients,
)

GPU_SHARE = {"triton": 9, "cuda": 6}  # see conftest
pytestmark = MARKS


# ------------------------------------------------------------------------------- derivatives, transforms, graphs
TINY = Sizes(1, 2, 1, 3, 4, 3, 2)
DIFFERENTIATED = [BY_NAME[n] for n in (
    "float mask", "window and causal", "alibi per batch", "softcap", "lower right", "sink", "dropout", "everything else"
)]  # fmt: skip


def as_function(option, generator, kernels, sizes=TINY):
    """A function of the floating tensors alone, and these."""
    drawn = draw_tensors(sizes, generator, **option.draw(sizes, generator))
    if is_floating(drawn.get("attn_mask")):
        drawn["attn_mask"] = drawn["attn_mask"].clamp(min=-3.0)  # -inf has no finite difference
    tensors = {n: t for n, t in drawn.items() if is_floating(t)}
    rest = {n: a for n, a in drawn.items() if n not in tensors}

    def function(*given):
        return canonical(kernels, **dict(zip(tensors, given, strict=True)), **rest, seed=3)

    return function, [t.requires_grad_() for t in tensors.values()]


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=cases.ids)
@pytest.mark.parametrize("dtype", [torch.float64], ids=cases.ids)
@pytest.mark.parametrize("option", DIFFERENTIATED, ids=cases.ids)
def test_finite_differences(option, dtype, check, compiled, generator, kernels_of):
    assert check(*as_function(option, generator, kernels_of), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64], ids=cases.ids)
@pytest.mark.parametrize("option", DIFFERENTIATED, ids=cases.ids)
def test_second_order(option, dtype, compiled, generator, kernels_of):
    """A gradient penalty through create_graph has the gradients of by_hand's."""
    sizes = Sizes(1, 2, 1, 7, 9, 3, 2)
    drawn = draw_tensors(sizes, generator, **option.draw(sizes, generator))
    weights = torch.randn(1, 2, 7, 2, generator=generator, dtype=torch.float64)

    def penalty(function):
        tensors = {n: t.detach().requires_grad_() if is_floating(t) else t for n, t in drawn.items()}
        leaves = [t for t in tensors.values() if is_floating(t)]
        out, lse = function(**tensors, seed=3)
        total = (out * weights).sum() + lse[lse.isfinite()].square().sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)

    def of_kernels(**kw):
        return canonical(kernels_of, **kw)

    for ours, theirs in zip(penalty(of_kernels), penalty(by_hand), strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(*(torch.broadcast_tensors(*(zero if g is None else g for g in (ours, theirs)))))


TRANSFORMED = [o for o in DIFFERENTIATED if "dropout_p" not in o.features]


@pytest.mark.parametrize("option", TRANSFORMED, ids=cases.ids)
def test_vmap_and_jvp(option, generator):
    """Both are served by PyTorch, and are right."""
    sizes = Sizes(2, 4, 2, 5, 6)
    drawn = draw_tensors(sizes, generator, **option.draw(sizes, generator))
    q, k, v = (drawn.pop(n) for n in "qkv")

    def attend(q, k, v):
        return public(q, k, v, **drawn)[0]

    several = torch.stack([q, q + 1, q * 2])
    each = torch.stack([attend(x, k, v) for x in several])
    torch.testing.assert_close(torch.func.vmap(attend, in_dims=(0, None, None))(several, k, v), each)
    tangent = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    out, along = torch.func.jvp(lambda x: attend(x, k, v), (q,), (tangent,))
    h = 1e-6
    torch.testing.assert_close(out, attend(q, k, v))
    slope = (attend(q + h * tangent, k, v) - attend(q - h * tangent, k, v)) / (2 * h)
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-6)


def test_vmap_of_dropout(generator):
    """torch's own rule: an error unless the caller says what is random."""
    q, k, v = (torch.randn(5, 1, 2, 6, 8, generator=generator) for _ in range(3))

    def attend(q, k, v):
        return sdpa(q, k, v, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(attend)(q, k, v)
    torch.manual_seed(1)
    out = torch.func.vmap(attend, randomness="different")(q, k, v)
    assert out.shape == q.shape and out.isfinite().all()


@pytest.mark.parametrize("option", DIFFERENTIATED[::2] + DIFFERENTIATED[-1:], ids=cases.ids)
def test_opcheck(option, generator):
    """The registered ops tell the truth about shapes, strides and what they change, and have gradients."""
    kernels = torch.ops.pygpt
    calls = []

    class Recorder:
        def attention_fwd(self, *args):
            calls.append(("attention_fwd", args))
            return kernels.attention_fwd(*args)

        def attention_bwd(self, *args):
            calls.append(("attention_bwd", [list(a) if isinstance(a, tuple) else a for a in args]))
            return kernels.attention_bwd(*args)

    sizes = Sizes(2, 4, 2, 5, 6)
    drawn = draw_tensors(sizes, generator, **option.draw(sizes, generator))
    with_gradients(lambda **kw: canonical(Recorder(), **kw, seed=3), drawn, generator)
    assert [name for name, _ in calls] == ["attention_fwd", "attention_bwd"]
    for name, args in calls:
        args = [a.detach().requires_grad_(name == "attention_fwd" and is_floating(a)) if isinstance(a, Tensor) else a
                for a in args]  # fmt: skip
        torch.library.opcheck(getattr(kernels, name).default, args, test_utils=(
            "test_schema", "test_faketensor", *(("test_autograd_registration",) if name == "attention_fwd" else ()),
        ))  # fmt: skip


COMPILED = [BY_NAME["float mask"], BY_NAME["everything"]]


@pytest.mark.parametrize("option", COMPILED, ids=cases.ids)
def test_compiled_graphs(option, generator):
    """torch.compile gives the same results and gradients; a seed is drawn in the graph, anew in every run."""
    torch._dynamo.reset()
    sizes = Sizes(2, 4, 2, 20, 33, 8, 5)
    drawn = draw_tensors(sizes, generator, torch.float32, **option.draw(sizes, generator))
    drawn = cast(drawn, "cpu", torch.float32)
    graph = torch.compile(public, fullgraph=True, backend="aot_eager")
    results, state = {}, generator.get_state()
    for name, function in (("eager", public), ("compiled", graph), ("again", graph)):
        torch.manual_seed(4 if name != "again" else 5)
        generator.set_state(state)
        results[name] = with_gradients(function, drawn, generator)
    assert_near(results["compiled"], results["eager"], torch.float32)
    same = torch.equal(results["again"]["out"], results["compiled"]["out"])
    assert same == ("dropout_p" not in option.features)


# ------------------------------------------------------------------------------- who serves what
@pytest.mark.parametrize("option", OPTIONS, ids=cases.ids)
def test_an_option_that_a_backend_lacks(option, generator, monkeypatch):
    """An explicit choice raises and names what is missing; the default falls back."""
    d = TYPICAL[0]
    drawn = draw_tensors(d, generator, **option.draw(d, generator))
    in_use = set(option.features)
    if "lower_right" in drawn and drawn.pop("attn_mask", None) is not None:
        in_use.remove("attn_mask")  # the public arguments take one of them
    monkeypatch.setitem(TABLE, "cpp", replace(TABLE["cpp"], features={"attention": ("return_lse",)}))
    with pygpt.backend("cpp"), pytest.raises(RuntimeError) as error:
        public(**drawn)
    assert str(error.value).endswith(f"{', '.join(sorted(in_use))} not served")
    torch.manual_seed(1)
    found = public(**drawn)
    monkeypatch.undo()
    torch.manual_seed(1)
    torch.testing.assert_close(found, public(**drawn))


def test_grouped_heads_that_a_backend_lacks(monkeypatch):
    for name in set(TABLE) - {"torch"}:
        monkeypatch.setitem(TABLE, name, replace(TABLE[name], features={}))
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    with pygpt.backend("cpp"), pytest.raises(RuntimeError, match="enable_gqa not served"):
        sdpa(q, k, k, enable_gqa=True)
    assert pygpt.explain(sdpa, q, k, k, enable_gqa=True).backend == "torch"


def test_the_cpu_serves_every_option():
    assert set(FEATURES) <= set(TABLE["cpp"].features["attention"])


# ------------------------------------------------------------------------------- memory
MEMORY = """
import resource, sys, torch, pygpt
from pygpt.functional import scaled_dot_product_attention as sdpa
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
torch.set_num_threads(1)
def run(n):
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for _ in range(3))
    options = {
        "mask of keys": lambda: {"attn_mask": (torch.arange(n) < n - 9).view(1, 1, 1, n)},
        "everything": lambda: {
            "attn_mask": torch.zeros(1, 1, 1, n, requires_grad=True), "softcap": 5.0, "dropout_p": 0.1,
            "alibi_slopes": torch.full((2,), 0.01, requires_grad=True), "sink": torch.zeros(2, requires_grad=True),
            "window": (n // 2, -1),
        },
    }[sys.argv[2]]()
    sdpa(q, k[:, :1], v[:, :1], **options, enable_gqa=True).sum().backward()
with pygpt.backend(sys.argv[1]):
    run(64)
    before, n = peak(), 4096
    run(n)
    grown, matrix = peak() - before, 4 * n * n
    assert grown < matrix / 4, (grown, matrix)
"""


@pytest.mark.parametrize("kind", ["mask of keys", "everything"])
def test_no_score_matrix_in_memory(kind, run_python):
    done = run_python(MEMORY, "cpp", kind)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- at the edges
def test_no_query_heads():
    q, k, v = (torch.randn(1, n, 5, 8, requires_grad=True) for n in (0, 2, 2))
    out = sdpa(q, k, v, enable_gqa=True)
    assert out.shape == (1, 0, 5, 8)
    for gradient in torch.autograd.grad(out.sum(), (k, v)):
        assert torch.equal(gradient, torch.zeros(1, 2, 5, 8))


@pytest.mark.parametrize("options", [{"window": (0, 0)}, {"softcap": 1.0}, {"return_lse": True}], ids=cases.ids)
def test_no_option_is_forgotten_where_only_pytorch_takes_the_tensors(options):
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged).transpose(
        1, 2
    )
    assert sdpa(nested, nested, nested).is_nested
    with pytest.raises(TypeError, match="nested"):
        sdpa(nested, nested, nested, **options)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_window_may_change(dynamic):
    q = torch.randn(1, 2, 9, 8)
    compiled = torch.compile(lambda q, left: sdpa(q, q, q, window=(left, 0)), backend="aot_eager", dynamic=dynamic)
    for left in (3, 2, 5):
        torch.testing.assert_close(compiled(q, left), sdpa(q, q, q, window=(left, 0)))


def test_booleans_are_refused_alike_after_a_call_of_halves():
    x, b = torch.randn(2, 3, 8).half(), torch.ones(2, 3, 8, dtype=torch.bool)
    errors = set()
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError)) as refused:
            sdpa(b, b, b)
        errors.add((refused.type, str(refused.value)))
        sdpa(x, x, x)
    assert len(errors) == 1


@pytest.mark.parametrize("L", [3, 5, 13, 30])
def test_an_infinite_key_does_not_spoil_the_gradient_of_slopes(L, backend):
    """The rows that fill up the last tile of queries have no share in it."""
    q, k, v = (torch.randn(1, 2, n, 8) for n in (L, 9, 9))
    q, k[0, 0, 3] = -q.abs(), torch.inf
    slopes = torch.rand(2, requires_grad=True)
    with pygpt.backend(backend):
        (gradient,) = torch.autograd.grad(sdpa(q, k, v, alibi_slopes=slopes).sum(), slopes)
    assert gradient.isfinite().all()


def test_what_torch_allows_of_masks():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with torch.inference_mode():
        mask = torch.rand(4, 4) > 0.3
    assert sdpa(q, q, q, mask).requires_grad
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            assert sdpa(q, q, q, torch.zeros(4, 4, dtype=dtype)).dtype == torch.bfloat16


def test_a_refused_call_draws_no_random_number():
    q = torch.randn(1, 1, 3, 513)
    before = torch.get_rng_state()
    with pygpt.backend("cpp"), pytest.raises(RuntimeError, match="head dimension"):
        sdpa(q, q, q, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong, message", [({"dropout_p": 0.5}, "needs a seed"), ({"softcap": -1.0}, "softcap")])
def test_the_op_refuses(wrong, message):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pygpt.attention_fwd(q, q, q, True, 1.0, **wrong)


@pytest.mark.parametrize("window", [(1.5, 0), (2**40, 0), (1,), ("a", 1), 3])
def test_a_window_is_two_integers(window):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="window must be"):
        sdpa(q, q, q, window=window)
