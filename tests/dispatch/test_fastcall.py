"""csrc/bind/fastcall.h: plain calls leave out torch's dispatcher, and nobody can tell but by the clock.

A result made directly has storage that cannot be resized, which is how a test sees the way a call went.
"""

import gc
import resource
import sys
import threading

import cases
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pygpt import functional, verify
from pygpt.dispatch import TABLE, call_key

PLAIN, DISPATCHED = TABLE["cpp"].kernels, TABLE["cpp"].registered
SHAPES = [*cases.variants(cases.TYPICAL), *cases.FEW.items()]


@pytest.fixture(autouse=True)
def built():
    assert PLAIN is not None, "torch has a DLPack exchange table since 2.10"


def direct(t):
    return not t.untyped_storage().resizable()


def as_list(results):
    return list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op, dims", SHAPES, ids=cases.ids)
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=cases.ids)
def test_same_bits_and_layout_as_dispatched(layout, op, dims, dtype, generator):
    args, grads = verify.draw(op, dims, dtype, generator, view=layout)
    for name, arguments in cases.kernel_calls(op, args, grads, DISPATCHED):
        arguments = [tuple(a) if isinstance(a, list) else a for a in arguments]
        ours, theirs = (as_list(getattr(k, name)(*arguments)) for k in (PLAIN, DISPATCHED))
        some = as_list(getattr(PLAIN, f"{name}_results")(*arguments))
        for_backward = {
            "attention_fwd": 1,
            "qkv_attention_fwd": 1,
            "rms_norm_fwd": 1,
            "add_rms_norm_fwd": 1,
            "dropout_add_rms_norm_fwd": 1,
            "dropout_add_layer_norm_fwd": 2,
            "mlp_fwd": 2,
            "layer_norm_fwd": 2,
            "add_layer_norm_fwd": 2,
            "rope_fwd": 2,
            "cross_entropy_fwd": 2,
            "linear_cross_entropy_fwd": 5,
        }
        omitted = 3 if name == "attention_bwd" else 0  # the gradients of options, which are not asked for
        assert len(ours) == len(theirs) - omitted == len(some) + for_backward.get(name, 0)
        for t, want in [*zip(ours, theirs, strict=False), *zip(some, theirs, strict=False)]:
            assert direct(t) and not direct(want)
            assert (t.shape, t.dtype, cases.layout_of(t)) == (want.shape, want.dtype, cases.layout_of(want))
            torch.testing.assert_close(t, want, rtol=0, atol=0, equal_nan=True)


def test_public_functions_take_it():
    x, w = torch.randn(8, 64), torch.randn(64)
    assert direct(functional.layer_norm(x, (64,), w, w)) and direct(functional.relu(x))
    loss, target = functional.cross_entropy, torch.arange(8)
    assert torch.equal(loss(x, target), loss(x, target)) and direct(loss(x, target))  # also when it is remembered
    y = functional.layer_norm(x.requires_grad_(), (64,), torch.nn.Parameter(w), w)
    assert direct(y) and direct(torch.autograd.grad(y, x, torch.ones_like(y))[0])


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1, 1, 7), (1,) * 20, (70_000,), (0, 4), ()])
def test_results_are_aligned_as_torchs(shape):
    for dtype in cases.DTYPES:
        y = functional.relu(torch.randn(shape).to(dtype))
        assert direct(y) and y.data_ptr() % 64 == 0 and y.storage_offset() == 0


def test_a_result_larger_than_any_memory():
    """Its bytes do not fit into 64 bits, or they do and nobody has them."""
    one = torch.ones(1)
    for rows, columns, amount in ((2**40, 2**40, 2**63 - 1), (2**31, 2**31, 2**63 - 1), (2**31, 2**19, 2**52)):
        with pytest.raises(RuntimeError, match=f"not enough memory: tried to allocate {amount} bytes"):
            functional.linear(one.expand(rows, 1), one.expand(columns, 1))
    assert functional.linear(one.expand(2**40, 1), torch.ones(0, 1)).shape == (2**40, 0)


class Wrapper(torch.Tensor):
    pass


def negated(x):
    """x, its elements negated by a bit alone, as parts of conjugated complex tensors are."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


UNUSUAL = {
    "negative bit": lambda: negated(torch.randn(3, 4)),
    "negative bit, one element": lambda: negated(torch.randn(1)),
    "subclass": lambda: torch.randn(3).as_subclass(Wrapper),
    "tensor of zeros": lambda: torch._efficientzerotensor((3,)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_tensors_are_dispatched(name):
    x = UNUSUAL[name]()
    y = PLAIN.relu_fwd(x)
    assert not direct(y)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), torch.relu(x).as_subclass(torch.Tensor))
    torch.testing.assert_close(functional.relu(x), torch.relu(x))


@pytest.mark.parametrize("kernels", [PLAIN, DISPATCHED], ids=["fast", "dispatched"])
@pytest.mark.parametrize("op, dims", list(cases.variants(cases.TINY)), ids=cases.ids)
def test_the_negative_bit_counts_on_every_argument(op, dims, kernels, generator):
    args, grads = verify.draw(op, dims, torch.float32, generator)
    for name, arguments in cases.kernel_calls(op, args, grads, DISPATCHED):
        arguments = [tuple(a) if isinstance(a, list) else a for a in arguments]
        want = as_list(getattr(kernels, name)(*arguments))
        tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
        for some in [*([i] for i in tensors), tensors]:
            signed = [torch._neg_view(-a) if i in some else a for i, a in enumerate(arguments)]
            assert all(map(torch.equal, as_list(getattr(kernels, name)(*signed)), want)), (name, some)


@pytest.mark.parametrize("op, dims", list(cases.variants(cases.TINY)), ids=cases.ids)
def test_the_negative_bit_counts_in_public_functions(op, dims, generator):
    """Forward and backward, where it is on every tensor and on the gradient that comes in."""
    args, grads = verify.draw(op, dims, torch.float32, generator)
    signed = [[torch._neg_view(-a) if isinstance(a, torch.Tensor) else a for a in given] for given in (args, grads)]
    ours, want = (verify.directions(op, verify.SPECS[op].call, *given) for given in (signed, (args, grads)))
    assert ours.keys() == want.keys()
    for key in want:
        assert torch.equal(ours[key], want[key]), key


def test_a_tensor_without_memory_is_refused():
    x, w = torch.randn(3, 4), torch.randn(4)
    w.untyped_storage().resize_(0)
    for kernels in (PLAIN, DISPATCHED):
        for arguments in ((w, None, None, 0.1), (x, w, None, 0.1), (x, None, w, 0.1)):
            with pytest.raises(RuntimeError, match="memory|allocated|storage"):
                kernels.layer_norm_fwd(*arguments)


class Log(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


def test_modes_see_every_call():
    x = torch.randn(3)
    functional.relu(x)
    with Log() as log:
        functional.relu(x)
    assert "pygpt.relu_fwd.default" in log.seen
    with torch.profiler.profile() as profile:
        functional.relu(x)
    assert "pygpt::relu_fwd" in [event.name for event in profile.events()]
    traced = torch.jit.trace(functional.relu, x, check_trace=False)
    assert "pygpt::relu_fwd" in str(traced.graph) and torch.equal(traced(-x), torch.relu(-x))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert type(functional.relu(x)) is not torch.Tensor
    with torch.inference_mode():
        assert functional.relu(x).is_inference()
    assert direct(functional.relu(x))


def test_errors_are_the_dispatchers():
    x, w = torch.randn(3, 4), torch.randn(5)
    for arguments in (
        (x, w, None, 1e-5),
        (x, None, None, "eps"),
        (x,),
        (x, None, None, 1e-5, 1),
        (None,) * 4,
        (x.long(), None, None, 0.1),
        (x, w.double(), None, 1e-5),
    ):
        with pytest.raises(Exception) as theirs:
            DISPATCHED.layer_norm_fwd(*arguments)
        with pytest.raises(type(theirs.value)) as ours:
            PLAIN.layer_norm_fwd(*arguments)
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_kinds_of_calls():
    x, w = torch.randn(3, 4), torch.randn(4)
    kinds = [call_key(0, t) for t in (x, x.double(), x.bfloat16(), x.half(), x.clone().requires_grad_())]
    assert len(set(kinds)) == 5 and None not in kinds
    with torch.no_grad():
        assert call_key(0, x.clone().requires_grad_()) == kinds[0]
    assert call_key(0b10, x, None) == call_key(0, x, w) == call_key(0, x, torch.nn.Parameter(w, False)) == kinds[0]
    assert call_key(0, x, torch.nn.Parameter(w)) == kinds[4]
    for other in (None, w.double(), w.to("meta"), w.long(), w.to_sparse(), w.as_subclass(Wrapper), [1.0], 3):
        assert call_key(0, x, other) is None
    with torch.autocast("cpu"):
        assert call_key(0, x) is None
    with torch.autograd.forward_ad.dual_level():
        assert call_key(0, x) is None
    torch.func.vmap(
        lambda t: [
            t,
            call_key(0, t) is None or pytest.fail("a vmapped tensor"),
            call_key(0, x) is None or pytest.fail("vmap"),
        ][0]
    )(x)


def test_integers_have_no_part_in_the_key():
    x, i = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    key, second = call_key(0, x), 1 << 17
    assert call_key(second, x, i) == call_key(second, x, i.int()) == call_key(1 << 16, i, x) == key
    assert call_key(second | 0b10, x, None) == call_key(second, x, x) == key
    for other in (None, i.short(), i.bool(), i.byte(), i.to("meta"), x.double()):
        assert call_key(second, x, other) is None
    assert call_key(0, x, i) is None and call_key(1 << 16, i) is None and call_key(0b1, None) is None


class Seen(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions = [*getattr(self, "functions", []), func]
        return func(*args, **(kwargs or {}))


def test_function_modes_see_every_call():
    x = torch.randn(3, 4)
    key = call_key(0, x)
    with Seen() as seen:
        assert call_key(0, x) is None and not hasattr(seen, "functions")
        functional.relu(x)
    assert functional.relu in seen.functions and call_key(0, x) == key


def test_nothing_leaks():
    q, x, w = torch.randn(1, 2, 70, 16), torch.randn(300, 64), torch.randn(64)
    odd, dy = torch.randn(64, 300).T, torch.ones(()).expand(300, 64)

    def calls(n):
        for _ in range(n):
            functional.scaled_dot_product_attention(q, q, q)
            functional.layer_norm(x, (64,), w, w)
            functional.gelu(odd)
            y = functional.add_layer_norm(x.requires_grad_(), x, (64,), w)[0]
            torch.autograd.grad(y, x, dy)
            PLAIN.relu_fwd(torch.empty(0))

    calls(50)
    gc.collect()
    before, counted = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        [sys.getrefcount(t) for t in (q, x, w, odd, dy)],
    )
    calls(1000)
    gc.collect()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 1000 * 300 * 64 * 4 / 4, grown
    assert counted == [sys.getrefcount(t) for t in (q, x, w, odd, dy)]


def test_python_runs_on_meanwhile_and_threads_do_not_meet():
    x, w = torch.randn(2048, 512), torch.randn(512, 512)
    want, done, ticks = functional.linear(x, w), threading.Event(), 0
    wrong = []

    def work():
        for _ in range(20):
            wrong.extend([1] * (not torch.equal(functional.linear(x, w), want)))
        done.set()

    threads = [threading.Thread(target=work) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # no thread has to give way: this one runs when the others let it
    try:
        for t in threads:
            t.start()
        while not done.is_set():
            ticks += 1
            done.wait(1e-3)
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert ticks > 3 and not wrong


def test_compiled_autograd_traces_the_op():
    from torch._dynamo import compiled_autograd

    seen = []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, w = torch.randn(8, 64, requires_grad=True), torch.randn(64)
    (want,) = torch.autograd.grad(functional.layer_norm(x, (64,), w).square().sum(), x)
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend=look)):
        functional.layer_norm(x, (64,), w).square().sum().backward()
    assert torch.equal(x.grad, want) and "pygpt.layer_norm_bwd.default" in seen
