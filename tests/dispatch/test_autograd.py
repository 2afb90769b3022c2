"""The autograd Functions on every backend: derivatives of any order, needs_input_grad, what is left untouched."""

import math
from itertools import product

import cases
import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import pygpt
from pygpt import functional, reference, verify
from pygpt.dispatch import OPS, TABLE

TINY = list(cases.variants(cases.TINY))
TYPICAL = list(cases.variants(cases.TYPICAL))
WITHOUT_PARAMETERS = {
    "linear": {"bias": 0},
    "mlp": {"bias": 0},
    "linear_cross_entropy": {"bias": 0},
    **{f"{n}norm": {"affine": 0} for n in ("layer_", "add_layer_", "rms_")},
}
TINY += [(op, {**cases.TINY[op], **less}) for op, less in WITHOUT_PARAMETERS.items()]


def apply(op, kernels, args):
    """The op's Function on tensors; the other canonical arguments are put in where they belong."""
    spec = verify.SPECS[op]
    function = OPS[spec.op].function
    rest = [None if verify._is_floating(a) else (a,) for a in args]

    def run(*tensors):
        given = iter(tensors)
        out = function.apply(kernels, *spec.canonical(*(next(given) if r is None else r[0] for r in rest)))
        return out[0] if isinstance(out, tuple) and len(spec.outputs) == 1 else out

    return run, [a.detach().requires_grad_() for a in args if verify._is_floating(a)]


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=cases.ids)
@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_finite_differences(op, dims, check, kernels, generator):
    args, _ = verify.draw(op, dims, torch.float64, generator)
    run, leaves = apply(op, kernels, args)
    # Rows of no sequence have lse = -inf, of which there are no differences.
    finite = lambda *tensors: tuple(o.masked_fill(o == -math.inf, 0.0) for o in verify.as_tuple(run(*tensors)))
    assert check(finite, leaves)


@pytest.mark.parametrize("op, dims", TYPICAL, ids=cases.ids)
def test_second_order_equals_pytorchs(op, dims, backend, generator):
    args, grads = verify.draw(op, dims, torch.float64, generator)

    def second(function):
        leaves = [a.detach().requires_grad_() if verify._is_floating(a) else a for a in args]
        tensors = [a for a in leaves if verify._is_floating(a)]
        first = torch.autograd.grad(verify.as_tuple(function(*leaves)), tensors, grads, create_graph=True)
        total = sum((g * g).sum() for g in first)  # a gradient penalty
        return torch.autograd.grad(total, tensors, allow_unused=True)

    with pygpt.backend(backend), sdpa_kernel(SDPBackend.MATH):  # the only one of torch's with a second derivative
        for ours, theirs in zip(second(verify.SPECS[op].call), second(verify.eager(op)), strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(*((zero if g is None else g) for g in (ours, theirs)), check_device=False)


@pytest.mark.parametrize("op", ["attention_lse", "varlen_attn"])
@pytest.mark.parametrize("wanted", [(0,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("used", [(0, 1), (1,)], ids=str)
def test_some_gradients_of_some_outputs_in_a_graph(op, wanted, used, backend, generator):
    """lse does not depend on v, whatever else is asked for."""
    args, grads = verify.draw(op, cases.TYPICAL[op], torch.float64, generator)

    def gradients(function, create_graph):
        leaves = [a.detach().requires_grad_(i in wanted) if verify._is_floating(a) else a for i, a in enumerate(args)]
        pairs = [(o, g) for i, (o, g) in enumerate(zip(function(*leaves), grads, strict=True)) if i in used]
        if not (pairs := [p for p in pairs if p[0].requires_grad]):
            return [None] * len(wanted)
        outs, upstream = zip(*pairs, strict=True)
        tensors = [leaves[i] for i in wanted]
        return torch.autograd.grad(outs, tensors, upstream, create_graph=create_graph, allow_unused=True)

    with pygpt.backend(backend):
        plain, graph = (gradients(verify.SPECS[op].call, create_graph) for create_graph in (False, True))
    for a, b in zip(plain, graph, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b)


def _twice(f):
    """f of a tensor, again of its result, which the same parameters have made."""
    return lambda t: f(f(t[0], *t[1:]), *t[1:])


SHARED = {  # tensors that meet in a call more than once: what is computed of (x, w, b)
    "self-attention": (lambda F: lambda t: F.scaled_dot_product_attention(*[t[0][None]] * 3, is_causal=True)),
    "linear": (lambda F: _twice(F.linear)),
    "layer_norm": (lambda F: _twice(lambda x, w, b: F.layer_norm(x, (8,), b, b))),
    "rms_norm": (lambda F: _twice(lambda x, w, b: F.rms_norm(x, (8,), b))),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_tensors_that_are_shared(name, create_graph, backend):
    """One tensor as several arguments, or as what another argument was computed from: it counts once for each."""
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 8), (8, 8), (8,))]

    def gradients(F):
        y = SHARED[name](F)(tensors)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=create_graph, allow_unused=True)
        first = [torch.zeros(()) if g is None else g for g in first]
        return first + list(
            torch.autograd.grad(sum(g.square().sum() for g in first), tensors, allow_unused=True)
            if create_graph
            else ()
        )

    with sdpa_kernel(SDPBackend.MATH):  # the only one of torch's with a second derivative
        with pygpt.backend(backend):
            ours = gradients(functional)
        theirs = gradients(torch.nn.functional)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("op, dims", TYPICAL, ids=cases.ids)
def test_every_subset_of_gradients(op, dims, dtype, backend, generator):
    """Bitwise the gradients of the full backward, and None for the others."""
    args, grads = verify.draw(op, dims, dtype, generator)
    at = [i for i, a in enumerate(args) if verify._is_floating(a)]

    def gradients(wanted):
        leaves = [a.detach().requires_grad_(i in wanted) if i in at else a for i, a in enumerate(args)]
        outs = verify.as_tuple(verify.SPECS[op].call(*leaves))
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
        assert bool(pairs) == bool(wanted)
        if wanted:
            torch.autograd.backward(*zip(*pairs, strict=True))
        return [leaves[i].grad for i in at]

    with pygpt.backend(backend):
        full = gradients(at)
        for mask in product((False, True), repeat=len(at)):
            got = gradients([i for i, m in zip(at, mask, strict=True) if m])
            for m, g, want in zip(mask, got, full, strict=True):
                assert (g is None) if not m else torch.equal(g, want)


@pytest.mark.parametrize("used", [(0,), (1,)])
@pytest.mark.parametrize("op", [op for op in cases.TYPICAL if len(verify.SPECS[op].outputs) == 2])
def test_one_output_unused(op, used, backend, generator):
    """Backward from one of two outputs is backward from both with a zero gradient for the other."""
    args, grads = verify.draw(op, cases.TYPICAL[op], torch.float64, generator)
    padded = [g if i in used else torch.zeros_like(g) for i, g in enumerate(grads)]
    leaves = [a.detach().requires_grad_() if verify._is_floating(a) else a for a in args]
    tensors = [a for a in leaves if verify._is_floating(a)]
    with pygpt.backend(backend):
        outs = verify.SPECS[op].call(*leaves)
        some = torch.autograd.grad([outs[i] for i in used], tensors, [grads[i] for i in used], allow_unused=True)
        both = torch.autograd.grad(verify.SPECS[op].call(*leaves), tensors, padded)
    for a, b in zip(some, both, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@pytest.mark.parametrize("layout", [cases.contiguous, cases.transposed, cases.expanded], ids=cases.ids)
@pytest.mark.parametrize("op, dims", TYPICAL, ids=cases.ids)
def test_inputs_are_left_alone(op, dims, layout, backend, generator):
    args, grads = verify.draw(op, dims, torch.float32, generator, view=layout)
    tensors = [a for a in (*args, *grads) if isinstance(a, torch.Tensor)]
    before = [(t.clone(), t._version) for t in tensors]
    with pygpt.backend(backend):
        verify.directions(op, verify.SPECS[op].call, args, grads)
    assert all(
        torch.equal(t, copy) and t._version == version for t, (copy, version) in zip(tensors, before, strict=True)
    )


@pytest.mark.parametrize("op", ["attention", "linear", "mlp", "layer_norm", "rms_norm", "gelu"])
def test_writing_to_a_saved_input_is_noticed(op, kernels, generator):
    args, grads = verify.draw(op, cases.TYPICAL[op], torch.float32, generator)
    run, leaves = apply(op, kernels, args)
    out = run(*leaves)
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grads[0])


@pytest.mark.parametrize("transform", ["dual", "jvp", "grad"])
@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_a_backward_pass_that_is_transformed(op, dims, transform, compiled, generator, monkeypatch):
    """The graph is recorded first. Then the upstream gradient is dual, or a transform's: a tangent is not dropped."""
    if dims.get("activation") == "swiglu":  # torch's silu has no such derivative
        monkeypatch.setitem(reference.ACTIVATIONS, "swiglu", (lambda x: x * torch.sigmoid(x),))
    args, grads = verify.draw(op, dims, torch.float64, generator)
    leaves = [a.detach().requires_grad_() if verify._is_floating(a) else a for a in args]
    tensors = [a for a in leaves if verify._is_floating(a)]
    tangents = tuple(torch.randn_like(g) for g in grads)

    def transformed(function):
        outs = verify.as_tuple(function(*leaves))[: len(grads)]

        def backward(*upstream, create_graph=False):
            return torch.autograd.grad(outs, tensors, upstream, retain_graph=True, create_graph=create_graph)

        if transform == "jvp":
            return torch.func.jvp(backward, grads, tangents)[1]
        if transform == "grad":
            penalty = lambda *upstream: sum(g.square().sum() for g in backward(*upstream, create_graph=True))
            return torch.func.grad(penalty, argnums=tuple(range(len(grads))))(*grads)
        with forward_ad.dual_level():
            duals = backward(*map(forward_ad.make_dual, grads, tangents))
            return [forward_ad.unpack_dual(g).tangent for g in duals]

    with sdpa_kernel(SDPBackend.MATH):  # the only one of torch's with a second derivative
        with pygpt.backend(compiled):
            ours = transformed(verify.SPECS[op].call)
        for a, b in zip(ours, transformed(verify.eager(op)), strict=True):
            torch.testing.assert_close(a, b)


LAST_BIAS = {"linear": 2, "mlp": 4, "layer_norm": 2, "add_layer_norm": 3}  # the position of a bias that is only added


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op", LAST_BIAS)
def test_a_bias_that_no_gradient_reads_is_not_saved(op, create_graph, compiled, generator):
    """An optimizer may write to it before backward, as with PyTorch's own linear."""
    args, grads = verify.draw(op, cases.TYPICAL[op], torch.float32, generator)

    def gradients(change):
        leaves = [a.detach().clone().requires_grad_() if verify._is_floating(a) else a for a in args]
        tensors = [a for a in leaves if verify._is_floating(a)]
        outs = verify.as_tuple(verify.SPECS[op].call(*leaves))
        with torch.no_grad():
            leaves[LAST_BIAS[op]].add_(change)
        return torch.autograd.grad(outs, tensors, grads, create_graph=create_graph)

    with pygpt.backend(compiled):
        for changed, same in zip(gradients(1.0), gradients(0.0), strict=True):
            assert torch.equal(changed, same)


@pytest.mark.parametrize("op, dims", TYPICAL, ids=cases.ids)
def test_outputs_are_fresh(op, dims, backend, generator):
    """No output shares memory with an input or another output, and may be written to in place."""
    args, grads = verify.draw(op, dims, torch.float32, generator)
    with pygpt.backend(backend):
        found = verify.directions(op, verify.SPECS[op].call, args, grads)
    tensors = [t for t in (*args, *grads, *found.values()) if isinstance(t, torch.Tensor)]
    pointers = [t.untyped_storage().data_ptr() for t in tensors]
    shared = {n for n, t in found.items() if pointers.count(t.untyped_storage().data_ptr()) > 1}
    assert shared <= {"dx", "dresidual"}  # the gradient of a sum is one tensor for both


LEAK = """
import gc, resource, sys, torch, cases, pygpt
from pygpt import verify
torch.set_num_threads(1)
calls = 500
def run(n):
    for _ in range(n):
        for op, (args, grads) in drawn.items():
            verify.directions(op, verify.SPECS[op].call, args, grads)
with pygpt.backend(sys.argv[1]):
    drawn = {op: verify.draw(op, dims, torch.float32, None) for op, dims in cases.TYPICAL.items()}
    run(50)
    gc.collect()
    peak, objects = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(gc.get_objects())
    run(calls)
    gc.collect()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * (1 if sys.platform == "darwin" else 1024)
    smallest = min(g.nbytes for _, grads in drawn.values() for g in grads)
    print(grown, smallest, len(gc.get_objects()) - objects)
    assert grown < calls * smallest / 4, (grown, smallest)  # less than a quarter of one output leaked per call
    assert len(gc.get_objects()) - objects < calls
"""


def test_500_calls_do_not_grow(compiled, run_new_python):  # a fork's memory grows by the pages that it copies
    done = run_new_python(LEAK, compiled)
    assert done.returncode == 0, done.stdout + done.stderr


FROZEN = {  # what of the rows of a frozen op is kept, in features
    "linear": (lambda x, w, b: functional.linear(x, w, b), 0),
    "mlp": (lambda x, w, b: functional.mlp(x, w, b, w.t().contiguous(), None, "gelu"), 8 + 12),  # x, pre
    "mlp, relu": (lambda x, w, b: functional.mlp(x, w, b, w.t().contiguous(), None, "relu"), 8 + 12),  # x, hidden
    "mlp, swiglu": (lambda x, w, b: functional.mlp(x, w, b, w[:6].t().contiguous(), None, "swiglu"), 8 + 12),  # x, pre
    "mlp, input": (lambda x, w, b: functional.mlp(x, w, b, w.t().contiguous(), None, save="input"), 8),  # x
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_weights_keep_few_activations(name, create_graph, compiled):
    """What is read for the gradient of a weight alone is not kept where that is frozen, and may be written to."""
    function, features = FROZEN[name]
    dtype = torch.float64 if torch.float64 in TABLE[compiled].dtypes else torch.float32
    x, w, b = torch.randn(3, 5, 8, dtype=dtype), torch.randn(12, 8, dtype=dtype), torch.randn(12, dtype=dtype)
    x.requires_grad_()
    saved = []
    with pygpt.backend(compiled), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = x * 1
        out = function(y, w, b)
    kept = {t.data_ptr(): t.numel() for t in saved if t.shape[:-1] == x.shape[:-1]}
    assert sum(kept.values()) == 3 * 5 * features
    if y.data_ptr() not in kept:
        with torch.no_grad():
            y.add_(1)
    dy = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, dy, create_graph=create_graph)
    with pygpt.backend("torch"):
        (want,) = torch.autograd.grad(function(x, w, b), x, dy)
    torch.testing.assert_close(got, want)
