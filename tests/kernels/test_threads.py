"""Bitwise the same result: run to run, for any number of threads, from several at once, in workers after a fork.

And what a thread keeps for itself goes when it ends.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import cases
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import pygpt
from bench.timing.processes import Busy
from pygpt import functional, verify

LARGE = {  # several tiles, rows and chunks for every thread, none a multiple of anything
    "attention": {"B": 2, "H": 3, "L": 333, "S": 270, "E": 40, "Ev": 72, "causal": 1},
    "attention_lse": {"B": 1, "H": 1, "L": 600, "S": 700, "E": 64, "causal": 0},
    "qkv_attention": {"B": 2, "H": 1, "group": 3, "L": 333, "E": 40},
    "varlen_attn": {"N": 5, "H": 1, "group": 3, "L": 300, "S": 410, "E": 40, "right": 0},
    "linear": {"M": 301, "K": 333, "N": 259},
    "mlp": {"M": 301, "C": 100, "H": 413, "O": 99},
    "layer_norm": {"M": 1001, "N": 257},
    "add_layer_norm": {"M": 1001, "N": 257},
    "rms_norm": {"M": 1001, "N": 257},
    "add_rms_norm": {"M": 1001, "N": 257},
    "dropout_add_layer_norm": {"M": 1001, "N": 257},
    "dropout_add_rms_norm": {"M": 1001, "N": 257},
    "gelu": {"M": 300_007},
    "relu": {"M": 300_007},
    "rope": {"B": 2, "H": 3, "group": 2, "T": 333, "D": 80, "R": 40, "norm": 1},
    "cross_entropy": {"N": 301, "V": 4099, "ignored": 7},
    "linear_cross_entropy": {
        "N": 1301,
        "K": 70,
        "V": 259,
        "bias": 1,
        "ignored": 7,
        "weight": 1,
        "smoothing": 0.1,
        "z": 0.1,
    },
}
EVERY = [*cases.variants(LARGE), ("linear", {"M": 100, "K": 301, "N": 233})]  # some rows of a W that stays unpacked
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def assert_equal(found, want, what):
    assert found.keys() == want.keys()
    for key, t in want.items():
        assert torch.equal(found[key], t), f"{key} {what}"


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op, dims", EVERY, ids=cases.ids)
def test_runs_and_thread_counts(op, dims, dtype, compiled, generator):
    args, grads = verify.draw(op, dims, dtype, generator)
    with pygpt.backend(compiled):
        want = verify.directions(op, verify.SPECS[op].call, args, grads)
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            assert_equal(verify.directions(op, verify.SPECS[op].call, args, grads), want, f"with {threads} threads")


@pytest.mark.parametrize("batch, heads", [(1, 3), (4, 3), (1, 1)])
def test_the_gradient_of_a_mask(batch, heads, compiled, generator):
    """Batch entries and heads that share the mask add to the same elements, in one order."""
    q, k, v, dout = (torch.randn(4, 3, n, 40, generator=generator) for n in (333, 270, 270, 333))
    mask = torch.randn(batch, heads, 333, 270, generator=generator)

    def gradients(threads):
        torch.set_num_threads(threads)
        inputs = [t.clone().requires_grad_() for t in (q, k, v, mask)]
        with pygpt.backend(compiled):
            out = functional.scaled_dot_product_attention(*inputs[:3], attn_mask=inputs[3])
        return dict(enumerate(torch.autograd.grad(out, inputs, dout)))

    want = gradients(1)
    for threads in (2, 3, 5, 2):
        assert_equal(gradients(threads), want, f"with {threads} threads")


@pytest.fixture
def busy_machine():
    """As many processes as there are CPUs compute until the test ends."""
    with closing(Busy(len(os.sched_getaffinity(0)))) as busy, busy:
        yield


def test_bits_on_a_busy_machine(busy_machine, generator):
    """Threads that lose their cores compute less, others more."""
    for op, dims in EVERY:
        args, grads = verify.draw(op, dims, torch.float32, generator)
        torch.set_num_threads(1)
        want = verify.directions(op, verify.SPECS[op].call, args, grads)
        torch.set_num_threads(3)
        for _ in range(3):
            assert_equal(verify.directions(op, verify.SPECS[op].call, args, grads), want, "on a busy machine")


@pytest.mark.parametrize("op", cases.TYPICAL)
def test_alignment_of_memory_does_not_matter(op, compiled, generator):
    """The same values at another address, in rows farther apart: the same bits."""
    args, grads = verify.draw(op, LARGE[op], torch.float32, generator)
    with pygpt.backend(compiled):
        want = verify.directions(op, verify.SPECS[op].call, args, grads)
        moved = [[cases.embedded(a) if verify._is_floating(a) else a for a in group] for group in (args, grads)]
        assert_equal(verify.directions(op, verify.SPECS[op].call, *moved), want, "elsewhere in memory")


@pytest.mark.parametrize("inner", [1, 2])
def test_called_from_several_threads_at_once(inner, compiled, generator):
    work = [(op, *verify.draw(op, dims, torch.float32, generator)) for op, dims in cases.variants(cases.TYPICAL)]

    def run(item):
        op, args, grads = item
        with pygpt.backend(compiled):  # the choice is per thread
            return verify.directions(op, verify.SPECS[op].call, args, grads)

    serial = [run(item) for item in work]
    torch.set_num_threads(inner)
    with ThreadPoolExecutor(4) as pool:
        for found, want, item in zip(pool.map(run, work * 20), serial * 20, work * 20, strict=True):
            assert_equal(found, want, item[0])


def test_threads_with_numbers_of_threads_of_their_own(compiled, generator):
    work = [(op, *verify.draw(op, dims, torch.float32, generator)) for op, dims in EVERY]

    def run(count):
        torch.set_num_threads(count)
        with pygpt.backend(compiled):
            return [verify.directions(op, verify.SPECS[op].call, args, grads) for op, args, grads in work]

    want = run(1)
    with ThreadPoolExecutor(3) as pool:
        for count, results in zip((2, 1, 3) * 2, pool.map(run, (2, 1, 3) * 2), strict=True):
            for found, expected, (op, *_) in zip(results, want, work, strict=True):
                assert_equal(found, expected, f"of {op} with {count} threads")


# ------------------------------------------------------------------------------- backends and torch.compile
def differ(a, b):
    return any(not torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def compile_once():
    """Compiles all eight ops, forward and backward, anew."""
    x, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, 8)

    def eight(x):
        x = functional.mlp(functional.linear(x, w), w, None, w, None)
        x, residual = functional.add_layer_norm(functional.relu(x), functional.gelu(x), (8,))
        x = functional.rms_norm(functional.layer_norm(x, (8,)) + residual, (8,))
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True).sum()

    torch._dynamo.reset()
    (found,) = torch.autograd.grad(torch.compile(eight, backend="aot_eager", fullgraph=True)(x), x)
    torch.testing.assert_close(found, *torch.autograd.grad(eight(x), x))


def test_backends_by_thread_while_another_thread_compiles(generator):
    work = [(op, *verify.draw(op, dims, torch.float32, generator)) for op, dims in cases.variants(cases.TYPICAL)]

    def run(name):
        torch.set_num_threads(1)  # torch's own results may depend on it
        with pygpt.backend(name):
            return [verify.directions(op, verify.SPECS[op].call, args, grads) for op, args, grads in work]

    want = {name: run(name) for name in ("cpp", "torch")}
    assert differ(want["cpp"], want["torch"]), "so that a mix-up shows"
    with ThreadPoolExecutor(5) as pool:
        compiling = pool.submit(lambda: [compile_once() for _ in range(2)])
        rounds = 0
        while rounds < 2 or not compiling.done():
            for name, found in zip(("cpp", "torch") * 2, pool.map(run, ("cpp", "torch") * 2), strict=True):
                assert not differ(found, want[name])
            rounds += 1
        compiling.result()


@pytest.mark.parametrize("op, dims", [*cases.variants(cases.TYPICAL)], ids=cases.ids)
def test_backward_in_another_thread_is_by_the_forwards_backend(op, dims, generator):
    args, grads = verify.draw(op, dims, torch.float32, generator)
    args = [a.requires_grad_() if verify._is_floating(a) else a for a in args]
    leaves = [a for a in args if verify._is_floating(a)]

    def forward(name):
        torch.set_num_threads(1)
        with pygpt.backend(name):
            return verify.as_tuple(verify.SPECS[op].call(*args))

    def backward(outputs):
        return torch.autograd.grad(outputs, leaves, grads)

    with ThreadPoolExecutor(1) as pool:
        for name, other in (("cpp", "torch"), ("torch", "cpp")):
            outputs = pool.submit(forward, name).result()
            with pygpt.backend(other):
                found = backward(outputs)
            assert all(map(torch.equal, found, backward(forward(name))))


# ------------------------------------------------------------------------------- processes
class EveryOp(Dataset):
    """Item i: every direction of an op, of inputs that depend on i alone."""

    def __len__(self):
        return len(EVERY)

    def __getitem__(self, i):
        op, dims = EVERY[i]
        args, grads = verify.draw(op, dims, torch.float32, torch.Generator().manual_seed(i))
        return {key: t.detach() for key, t in verify.directions(op, verify.SPECS[op].call, args, grads).items()}


def load_in_workers(start_method):
    torch.set_num_threads(2)
    data = EveryOp()
    want = list(data)  # from here on this process has OpenMP's threads, which a fork does not copy
    workers = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=start_method, timeout=120)
    for i, found in enumerate(workers):
        assert_equal(found, want[i], f"of {EVERY[i]} in a worker")
    assert not differ([data[0]], [want[0]])
    print("all equal")


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_data_loader_workers_after_first_use(start_method, run_python):
    """torch sets one thread in a worker. With more, its own functions hang after a fork too, for OpenMP's sake."""
    done = run_python(f"from tests.kernels import test_threads; test_threads.load_in_workers({start_method!r})")
    assert done.stdout == "all equal\n", done.stderr


# ------------------------------------------------------------------------------- scratch memory
def use_scratch():
    """Makes this thread, and those that work for it, keep megabytes."""
    torch.set_num_threads(2)
    q = torch.randn(1, 2, 700, 64, requires_grad=True)
    functional.scaled_dot_product_attention(q, q, q).sum().backward()
    functional.linear(torch.randn(300, 1024), torch.randn(1024, 1024))


def resident_pages():
    """Of this process now. (Its peak would count its parent's from before exec.)"""
    return int(Path("/proc/self/statm").read_text().split()[1])


def end_threads(at_once, one_by_one):
    """Prints how much memory threads hold that live together, and how much is held after so many more in turn."""
    ready, go = threading.Barrier(at_once + 1), threading.Event()

    def stay():
        use_scratch()
        ready.wait(300)
        go.wait(300)

    use_scratch()
    before = resident_pages()
    threads = [threading.Thread(target=stay) for _ in range(at_once)]
    for t in threads:
        t.start()
    ready.wait(300)
    kept = resident_pages() - before
    go.set()
    for t in threads:
        t.join()
    for _ in range(one_by_one):
        t = threading.Thread(target=use_scratch)
        t.start()
        t.join()
    print(kept, resident_pages() - before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much memory is resident")
def test_a_thread_that_ends_gives_its_scratch_memory_back(run_python):
    done = run_python("from tests.kernels import test_threads; test_threads.end_threads(20, 200)")
    kept, grown = map(int, done.stdout.split())
    assert 0 < kept and grown < kept / 2, (kept, grown)
