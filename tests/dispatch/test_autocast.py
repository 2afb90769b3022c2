"""Autocast: the cast of a leaf is shared by its uses while a graph holds it, and is never an old one.

torch's own cache holds casts until the outermost region ends, whatever happens to the leaf meanwhile. Our cache holds
them weakly and compares the leaf's version and memory. Neither cache can see a change through ``.data``, so no cast may
outlive its region.
"""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cases
import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pygpt
from pygpt import autocast, functional, verify

AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)
CAST = {
    "linear": (1,),
    "mlp": (1, 2, 3),
    "attention": (0, 1, 2),
    "attention_lse": (0, 1, 2),
}  # arguments that are saved
TYPICAL = [*cases.variants(cases.TYPICAL)]


def leaf(*shape, values=(-2, 3)):
    """Small integers, with which bfloat16 computes exactly."""
    return torch.nn.Parameter(torch.randint(*values, shape).float())


def saved(result):
    """The tensors that the graph of an op's results holds, as the objects that they are."""
    result = result[0] if isinstance(result, tuple) else result
    return [t for t in result.grad_fn.saved_tensors if t is not None]


def cast_of(w, result):
    """The cast of w that the graph holds."""
    (found,) = (t for t in saved(result) if t.shape == w.shape and t.dtype == torch.bfloat16)
    return found


def memory(run):
    """Bytes of CPU memory that torch's allocator has lent out during ``run()`` and not got back."""
    with profile(profile_memory=True) as seen:
        results = run()
    del results
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


# ------------------------------------------------------------------------------- one cast for all uses
@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_uses_of_a_weight_share_one_cast(op):
    x, w = torch.randn(1, 256), torch.nn.Parameter(torch.randn(1024, 256))
    projection = torch.nn.Parameter(torch.randn(256, 1024))
    call = {
        "linear": lambda: functional.linear(x, w),
        "mlp": lambda: functional.mlp(x, w, None, projection, None),
    }[op]
    one = w.numel() * 2 * {"linear": 1, "mlp": 2}[op]
    with AUTOCAST():
        assert one <= memory(lambda: [call() for _ in range(32)]) < 2 * one
    with AUTOCAST(cache_enabled=False):  # as torch's, on request
        assert 32 * one <= memory(lambda: [call() for _ in range(32)])


@pytest.mark.parametrize("op, dims", [v for v in TYPICAL if v[0] in CAST], ids=cases.ids)
def test_uses_of_every_saved_argument_share_its_cast(op, dims, generator):
    args, _ = verify.draw(op, dims, torch.float32, generator)
    args = [torch.nn.Parameter(a) if verify._is_floating(a) else a for a in args]
    with AUTOCAST():
        results = [verify.SPECS[op].call(*args) for _ in range(3)]
    addresses = [[t.data_ptr() for t in saved(result)] for result in results]
    assert all(len({a[i] for a in addresses}) == 1 for i in CAST[op])


@pytest.mark.parametrize("op, dims", TYPICAL, ids=cases.ids)
def test_gradients_are_those_of_separate_casts(op, dims, backend, generator):
    """The same gradient twice: its sum is exact in every dtype."""
    args, grads = verify.draw(op, dims, torch.float32, generator)
    args = [torch.nn.Parameter(a) if verify._is_floating(a) else a for a in args]
    leaves = [a for a in args if verify._is_floating(a)]

    def gradients(cache):
        with AUTOCAST(cache_enabled=cache), pygpt.backend(backend):
            outputs = [o for _ in range(2) for o in verify.as_tuple(verify.SPECS[op].call(*args))]
        return torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads * 2, outputs, strict=True)])

    for shared, separate in zip(gradients(True), gradients(False), strict=True):
        assert shared.dtype == torch.float32 and torch.equal(shared, separate)


def test_gradients_are_torchs():
    x, w, b = leaf(3, 4), leaf(4, 4), leaf(4)

    def gradients(linear):
        with AUTOCAST():
            y = linear(linear(x, w, b), w, b)
        return torch.autograd.grad(y.sum(), (x, w, b))

    assert all(map(torch.equal, gradients(functional.linear), gradients(F.linear)))


def test_gradients_of_two_backward_passes():
    """They share the step back from the cast to the leaf."""
    x, w = leaf(3, 4), leaf(5, 4)
    with AUTOCAST():
        losses = [functional.linear(x, w).sum() for _ in range(2)]
    for loss in losses:
        loss.backward()
    assert torch.equal(w.grad, 2 * x.detach().sum(0).expand(5, 4))


def test_second_derivatives_are_torchs():
    x, w = leaf(1, 2, values=(-1, 2)), leaf(2, 2, values=(-1, 2))

    def second(linear):
        with AUTOCAST():
            y = linear(linear(x, w), w)
            first = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
            return [*first, *torch.autograd.grad(sum(g.sum() for g in first), (x, w))]

    assert all(map(torch.equal, second(functional.linear), second(F.linear)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    x, w = leaf(3, 2, values=(-1, 2)), leaf(2, 2, values=(-1, 2))

    def gradients(around):
        with AUTOCAST():
            y = functional.linear(x, w)
            y = functional.linear(around(lambda t: functional.linear(functional.linear(t, w), w), y), w)
        return torch.autograd.grad(y.sum(), (x, w)) if not reentrant else (y.sum().backward(), x.grad, w.grad)[1:]

    want = [g.clone() for g in gradients(lambda f, t: f(t))]
    x.grad = w.grad = None
    assert all(map(torch.equal, gradients(lambda f, t: checkpoint(f, t, use_reentrant=reentrant)), want))


# ------------------------------------------------------------------------------- and not for longer
def test_a_cast_dies_with_its_graph():
    x, w = leaf(3, 4), leaf(5, 4)
    with AUTOCAST():
        y = functional.linear(x, w)
        z = functional.linear(x, w)
        cast = weakref.ref(cast_of(w, y))
        del y
        assert cast() is not None  # z's graph holds it
        z.sum().backward()
        assert cast() is None  # backward has let go of what the graph saved
        functional.linear(x, w)
        with torch.no_grad():
            functional.linear(x, w)
        assert memory(lambda: functional.linear(x, w) is None) <= 0


def test_nothing_is_kept_of_a_leaf_or_a_region():
    x = leaf(3, 4)
    with AUTOCAST():
        w = leaf(5, 4)
        y = functional.linear(x, w)
        region = autocast._region.casts
        assert len(region()) == 2
        del w, y
        gc.collect()
        assert not region()
    assert region() is None


# ------------------------------------------------------------------------------- never an old one
def add_in_place(w):
    with torch.no_grad():
        w.add_(1)


def optimizer_step(w):
    w.grad = torch.ones_like(w)
    torch.optim.SGD([w], lr=1.0).step()


def copy_in_place(w):
    with torch.no_grad():
        w.copy_(leaf(*w.shape, values=(3, 6)))


def values(*range):
    """64 x 64 of them, in memory for one more row."""
    return leaf(65, 64, values=range).data[:64]


def swap(w):
    w.data = values(3, 6)


def swap_at_the_same_address(w):
    """As where memory goes back to the allocator and is lent out again: other values, and no version tells."""
    other = torch.from_dlpack(w.data)
    other.add_(1)
    address, w.data = w.data_ptr(), other
    assert w.data_ptr() == address


def transpose(w):
    w.data = w.data.t()


def shorten(w):
    w.data = w.data[:-1]


def shift(w):
    """To other rows of the same memory."""
    w.data = w.data.as_strided(w.shape, w.stride(), w.storage_offset() + 64)


CHANGES = [
    add_in_place, optimizer_step, copy_in_place, swap, swap_at_the_same_address, transpose, shorten, shift
]  # fmt: skip


@pytest.fixture
def used():
    """An input and a weight."""
    w = torch.nn.Parameter(torch.empty(0))
    w.data = values(-2, 3)
    return torch.randint(-1, 2, (3, 64)).float(), w


@pytest.mark.parametrize("change", CHANGES, ids=cases.ids)
def test_a_change_between_uses_is_seen(change, used):
    x, w = used
    with AUTOCAST():
        held = functional.linear(x, w)
        before = cast_of(w, held)
        change(w)
        y = functional.linear(x, w)
        assert cast_of(w, y) is not before
        assert cast_of(w, functional.linear(x, w)) is cast_of(w, y)
    assert torch.equal(y.float(), F.linear(x, w).detach())


def add_unseen(w):
    w.data.add_(1)


@pytest.mark.parametrize("change", [add_unseen, *CHANGES], ids=cases.ids)
def test_a_change_between_regions_is_seen(change, used):
    """Also one that leaves no trace on the leaf, by a graph that outlives its region; torch drops its casts there."""
    x, w = used
    with AUTOCAST():
        held = [functional.linear(x, w), F.linear(x, w)]
    change(w)
    with AUTOCAST():
        ours, torchs = functional.linear(x, w), F.linear(x, w)
    assert torch.equal(ours.float(), F.linear(x, w)) and torch.equal(torchs, ours) and len(held) == 2


def test_swapped_tensors_inside_a_region():
    """torch.utils.swap_tensors refuses tensors that somebody holds weakly; no leaf is."""
    x, w = torch.randn(3, 4), torch.nn.Parameter(torch.randn(5, 4))
    with AUTOCAST():
        held = functional.linear(x, w)
        torch.utils.swap_tensors(w, torch.nn.Parameter(torch.ones(5, 4)))
        y = functional.linear(x, w)
        assert torch.equal(y, F.linear(x, w)) and not torch.equal(y, held)


def test_float64_is_left_alone():
    with AUTOCAST(), pytest.raises((RuntimeError, TypeError), match="dtype|equal"):
        functional.linear(torch.randn(3, 4), torch.randn(5, 4).double())


def test_without_torchs_cache_every_change_is_seen(used):
    x, w = used
    with AUTOCAST(cache_enabled=False):
        held = functional.linear(x, w)
        w.data.add_(1)
        y = functional.linear(x, w)
    assert torch.equal(y.float(), F.linear(x, w)) and held is not y
    with AUTOCAST():
        held = functional.linear(x, w)
        w.data.add_(1)
        with AUTOCAST(cache_enabled=False):
            y = functional.linear(x, w)
    assert torch.equal(y.float(), F.linear(x, w)) and held is not y


def test_a_tensor_of_tensors():
    x, projection = torch.randint(-1, 2, (3, 4)).float(), leaf(5, 5)
    w = TwoTensor(leaf(5, 4).data, leaf(5, 4).data).requires_grad_()
    with AUTOCAST():
        held = functional.mlp(x, w, None, projection, None, "relu")
        add_in_place(w)
        y = functional.mlp(x, w, None, projection, None, "relu")
    with AUTOCAST(cache_enabled=False):
        want = functional.mlp(x, w, None, projection, None, "relu")
    assert type(held) is TwoTensor and torch.equal(y.a, want.a) and torch.equal(y.b, want.b)


def test_a_sparse_weight():
    x, w = torch.randint(-1, 2, (3, 4)).float(), leaf(5, 4).data.to_sparse().requires_grad_()
    with AUTOCAST():
        assert torch.equal(functional.linear(x, w), F.linear(x, w))


UNCACHED = {
    "16 bits": lambda: leaf(64, 64).data.half().requires_grad_(),
    "a view": lambda: leaf(65, 64).data[1:].requires_grad_(),
    "no leaf": lambda: leaf(64, 64) + 0,
}


@pytest.mark.parametrize("name", UNCACHED)
def test_what_torch_does_not_cache_is_never_old(name):
    """torch casts these at every use, and sees every change."""
    w = UNCACHED[name]()
    x = torch.randint(-1, 2, (3, 64)).to(w.dtype)
    with AUTOCAST():
        held = [functional.linear(x, w), F.linear(x, w)]
        w.data.add_(1)
        ours, torchs = functional.linear(x, w), F.linear(x, w)
    assert torch.equal(ours, torchs) and not torch.equal(ours, held[0])


def test_deepcopy_between_uses():
    model = pygpt.nn.Linear(64, 64, bias=False)
    model.weight = leaf(64, 64)
    x = torch.randint(-1, 2, (3, 64)).float()
    with AUTOCAST():
        y = model(x)
        twin = copy.deepcopy(model)
        add_in_place(twin.weight)
        assert cast_of(twin.weight, twin(x)) is not cast_of(model.weight, y) is cast_of(model.weight, model(x))
        assert torch.equal(twin(x), F.linear(x, twin.weight)) and torch.equal(model(x), y)


# ------------------------------------------------------------------------------- regions
def test_two_dtypes():
    x, w = leaf(3, 4), leaf(5, 4)
    with AUTOCAST():
        low = functional.linear(x, w)
        with torch.autocast("cpu", torch.float16):
            half = functional.linear(x, w)
            assert half.dtype == torch.float16
        again = functional.linear(x, w)
    assert low.dtype == again.dtype == torch.bfloat16 and torch.equal(low.float(), half.float())
    assert cast_of(w, again) is cast_of(w, low)
    assert [t.dtype for t in saved(half)] == [torch.float16] * 2


def test_nested_and_disabled_regions():
    x, w = leaf(3, 4), leaf(5, 4)
    with AUTOCAST():
        outer = functional.linear(x, w)
        with AUTOCAST():
            assert cast_of(w, functional.linear(x, w)) is cast_of(w, outer)
        with AUTOCAST(enabled=False):
            full = functional.linear(x, w)
            assert full.dtype == torch.float32 and any(t is w for t in saved(full))
        assert cast_of(w, functional.linear(x, w)) is cast_of(w, outer)
    with AUTOCAST():
        assert cast_of(w, functional.linear(x, w)) is not cast_of(w, outer)


def test_without_gradients_nothing_is_shared():
    """A cast made there has no step back to the leaf."""
    x, w = leaf(3, 4), leaf(5, 4)
    with AUTOCAST():
        with torch.no_grad():
            assert not functional.linear(x, w).requires_grad
        with torch.inference_mode():
            functional.linear(x, w)
        functional.linear(x, w).sum().backward()
        assert torch.equal(w.grad, x.detach().sum(0).expand(5, 4))
        w.requires_grad_(False)
        functional.linear(x, w).sum().backward()
        assert torch.equal(w.grad, x.detach().sum(0).expand(5, 4))


def test_a_parameter_made_in_inference_mode():
    with torch.inference_mode():
        w = leaf(5, 4)
    x = leaf(3, 4)
    with AUTOCAST():
        functional.linear(x, w).sum().backward()
    assert torch.equal(w.grad, x.detach().sum(0).expand(5, 4))


# ------------------------------------------------------------------------------- traces, modes, transforms
def test_a_trace_holds_the_weight_and_not_its_cast():
    x, model = torch.randint(-1, 2, (3, 64)).float(), pygpt.nn.Linear(64, 64, bias=False)
    model.weight = leaf(64, 64)
    with AUTOCAST():
        held = model(x)
        traced = torch.jit.trace(model, (x,), check_trace=False)
    with AUTOCAST():
        held = held, model(x)
        graph = make_fx(model)(x)
    add_in_place(model.weight)
    want = F.linear(x, model.weight)
    assert torch.equal(traced(x).float(), want) and torch.equal(graph(x).float(), want) and held


def test_make_fx_in_a_region_holds_the_weight():
    x, w = torch.randint(-1, 2, (3, 64)).float(), leaf(64, 64)
    with AUTOCAST():
        held = functional.linear(x, w)
        graph = make_fx(lambda t: functional.linear(t, w))(x)
        add_in_place(w)
        assert torch.equal(graph(x).float(), F.linear(x, w).float()) and held is not None


def test_modes_and_transforms():
    x, w = leaf(3, 4).data, leaf(5, 4)
    want = 2 * x.sum(0).expand(5, 4)

    def loss(weight):
        return (functional.linear(x, weight) + functional.linear(x, weight)).float().sum()

    with AUTOCAST():
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            fake = functional.linear(x, w)
        held = functional.linear(x, w)
        assert type(held) is torch.Tensor and type(fake) is not torch.Tensor
        assert torch.equal(torch.func.grad(loss)(w.detach()), want)
        assert torch.equal(torch.func.grad(loss)(w), want)
        stacked = torch.nn.Parameter(torch.stack([w.detach(), w.detach() + 1]))
        for got, weight in zip(torch.func.vmap(lambda t: functional.linear(x, t))(stacked), stacked, strict=True):
            assert torch.equal(got, F.linear(x, weight))
        with FlopCounterMode(display=False) as flops:
            functional.linear(x, w)
        assert flops.get_total_flops() == 2 * 3 * 4 * 5
        with torch.autograd.graph.save_on_cpu():
            loss(w).backward()
        assert torch.equal(w.grad, want) and held is not None
        assert torch.equal(torch.compile(loss, backend="aot_eager", fullgraph=True)(w), loss(w))


# ------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_threads_with_regions_of_their_own(op):
    """One weight, two dtypes, regions that begin and end at any time, a change by another thread between rounds."""
    one = -1, 2
    x, w, projection = leaf(3, 8, values=one).data, leaf(8, 8, values=one), leaf(8, 8, values=one)
    call = {
        "linear": lambda: functional.linear(functional.linear(x, w), projection),
        "mlp": lambda: functional.mlp(x, w, None, projection, None, "relu"),
    }[op]
    workers, rounds = 4, 50
    start = threading.Barrier(workers, action=lambda: w.data.copy_(leaf(8, 8, values=one)))
    end = threading.Barrier(workers)

    def work(i):
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        for _ in range(rounds):
            start.wait(60)
            want = torch.autograd.grad(call().sum(), w)[0]
            with torch.autocast("cpu", dtype):
                y = [call() for _ in range(i + 1)]
            got = torch.autograd.grad(sum(y).sum(), w)[0]
            assert y[0].dtype == dtype and torch.equal(got, (i + 1) * want)
            end.wait(60)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
