"""torch.compile without graph breaks, forward and backward, static and dynamic shapes; checkpointing; deepcopy."""

import cases
import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import pygpt
from pygpt import verify

TINY = list(cases.variants(cases.TINY))

GPU_SHARE = {"triton": 4}  # see conftest


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.share(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_compiled_equals_eager(op, dims, dtype, backend, generator):
    """Bitwise: the same kernels run."""
    args, grads = verify.draw(op, dims, dtype, generator)
    call = verify.SPECS[op].call
    with pygpt.backend(backend):
        eager = verify.directions(op, call, args, grads)
        compiled = verify.directions(op, torch.compile(call, fullgraph=True, backend="aot_eager"), args, grads)
    for key, want in eager.items():
        assert compiled[key].dtype == want.dtype
        if backend == "torch":  # AOTAutograd decomposes PyTorch's ops into others
            tolerance = 8 * torch.finfo(want.dtype).eps
            torch.testing.assert_close(compiled[key], want, rtol=tolerance, atol=tolerance * want.abs().max().item())
        else:
            assert torch.equal(compiled[key], want), key


@pytest.mark.share(4)
@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_dynamic_shapes_compile_once(op, dims, compiled, generator):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(verify.SPECS[op].call, fullgraph=True, dynamic=True, backend=counter)
    lead = next(key for key in "LTMN" if key in dims)
    with pygpt.backend(compiled):
        frames = []
        for n in (6, 9, 31):
            size = (n, *dims["M"][1:]) if lead == "M" else n
            args, grads = verify.draw(op, {**dims, lead: size}, torch.float32, generator)
            got = verify.directions(op, call, args, grads)
            for key, want in verify.directions(op, verify.SPECS[op].call, args, grads).items():
                assert torch.equal(got[key], want), key
            frames.append(counter.frame_count)
    assert frames[0] > 0 and len(set(frames)) == 1  # other sizes need no other code


@pytest.mark.parametrize("name", ["vmap", "jvp", "grad"])
def test_function_transforms_within(name):
    """Traced, they don't reach autograd's Functions or the kernels, which know neither; PyTorch serves them."""
    x = torch.randn(4, 8, dtype=torch.float64)
    transformed = {
        "vmap": lambda f: torch.func.vmap(f)(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (x + 1,)),
        "grad": lambda f: torch.func.grad(lambda t: f(t).sum())(x),
    }[name]
    for ours, theirs in (
        (pygpt.functional.gelu, torch.nn.functional.gelu),
        (lambda t: pygpt.functional.layer_norm(t, (8,)), lambda t: torch.nn.functional.layer_norm(t, (8,))),
    ):
        compiled = torch.compile(lambda f=ours: transformed(f), backend="aot_eager")
        torch.testing.assert_close(compiled(), transformed(theirs))


@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_default_choice_compiles(op, dims, generator):
    """Without an explicit backend the table is walked while tracing."""
    args, grads = verify.draw(op, dims, torch.float32, generator)
    call = verify.SPECS[op].call
    got = verify.directions(op, torch.compile(call, fullgraph=True, backend="aot_eager"), args, grads)
    for key, want in verify.directions(op, call, args, grads).items():
        torch.testing.assert_close(got[key], want)


def test_a_changed_choice_recompiles(compiled):
    function = torch.compile(lambda x: pygpt.functional.gelu(x), fullgraph=True, backend="aot_eager")
    x = torch.randn(1000)
    for name in (compiled, "torch", compiled):
        with pygpt.backend(name):
            assert torch.equal(function(x), pygpt.functional.gelu(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("op, dims", TINY, ids=cases.ids)
def test_checkpoint(op, dims, reentrant, backend, generator):
    args, grads = verify.draw(op, dims, torch.float32, generator)
    call = verify.SPECS[op].call

    def gradients(function):
        leaves = [a.detach().requires_grad_() if verify._is_floating(a) else a for a in args]
        torch.autograd.backward(verify.as_tuple(function(*leaves)), grads)
        return [a.grad for a in leaves if verify._is_floating(a)]

    with pygpt.backend(backend):
        recomputed = gradients(lambda *a: checkpoint(call, *a, use_reentrant=reentrant))
        assert all(map(torch.equal, recomputed, gradients(call)))
