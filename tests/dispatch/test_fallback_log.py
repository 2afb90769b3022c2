"""PYGPT_LOG=fallback: each distinct reason for which PyTorch serves a call, printed once, to stderr."""

import threading
import time
from dataclasses import replace

import pytest
import torch

import pygpt
from pygpt import dispatch
from pygpt import functional as F


class Meters(torch.Tensor):
    """With a __torch_function__ of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, Meters) else a for a in args]
        return function(*plain, **(kwargs or {}))


x, wide = torch.randn(3, 8), torch.randn(1, 2, 3, 600)
# What falls back on every machine: the call, the op, and a part of the reason.
FALLBACKS = [
    (lambda: F.relu(torch.arange(3)), "relu", "torch.int64"),
    (lambda: F.gelu(x.as_subclass(Meters)), "gelu", "a tensor subclass, Meters"),
    (lambda: F.linear(x, x[0]), "linear", "weight must be a matrix, got shape (8,)"),
    (lambda: F.layer_norm(x, (8,), x[0].double()), "layer_norm", "tensors of different dtypes"),
    (lambda: F.add_layer_norm(x, x, (8,), x[0].double()), "add_layer_norm", "tensors of different dtypes"),
    (lambda: F.rms_norm(x, (8,), x[0].double()), "rms_norm", "tensors of different dtypes"),
    (lambda: F.add_rms_norm(x, x, (8,), x[0].double()), "add_rms_norm", "tensors of different dtypes"),
    (lambda: F.cross_entropy(x, x.softmax(1)), "cross_entropy", "PyTorch serves probabilities"),
    (lambda: F.linear_cross_entropy(x, x, x[:, :3]), "linear_cross_entropy", "PyTorch serves probabilities"),
    (lambda: F.dropout_add_layer_norm(x, x.double(), 8), "dropout_add_layer_norm", "tensors of different dtypes"),
    (lambda: F.dropout_add_rms_norm(x, x.bfloat16(), 8), "dropout_add_rms_norm", "tensors of different dtypes"),
    (lambda: torch.func.vmap(F.relu)(x), "relu", "a torch.func transform"),
    (lambda: torch.func.vmap(lambda t: F.mlp(t, x, None, x.mT, None))(x), "mlp", "a torch.func transform"),
    (lambda: F.scaled_dot_product_attention(wide, wide, wide), "attention", "head dimension above 512"),
]


def attempt_all():
    for call, *_ in FALLBACKS:
        try:
            call()
        except (RuntimeError, TypeError, ValueError):  # PyTorch refuses some too
            pass


@pytest.fixture
def printed(capsys, monkeypatch):
    """The lines that were printed since the last time, with logging on."""
    monkeypatch.setattr(dispatch, "LOG_FALLBACK", True)
    monkeypatch.setattr(dispatch, "_LOGGED", {})
    for cache in dispatch.DISPATCH_CACHES.values():
        cache.clear()

    def lines():
        out, err = capsys.readouterr()
        assert not out
        return err.splitlines()

    return lines


# ------------------------------------------------------------------------------- the environment variable
IN_A_PROCESS = "from tests.dispatch import test_fallback_log as t; t.attempt_all(); t.attempt_all()"


@pytest.fixture
def lines_of_a_process(run_python):
    def run(log, chosen=""):
        done = run_python(IN_A_PROCESS, PYGPT_LOG=log, PYGPT_BACKEND=chosen)
        assert done.returncode == 0 and not done.stdout, done.stderr
        return [line for line in done.stderr.splitlines() if line.startswith("pygpt:")]

    return run


def test_it_is_one_word_of_a_list(lines_of_a_process):
    assert len(lines_of_a_process("other,fallback")) == len(FALLBACKS)


@pytest.mark.parametrize("log, chosen", [("", ""), ("fall", ""), ("fallback", "torch"), ("fallback", "cpp")])
def test_nothing_is_printed_unasked_or_by_choice(log, chosen, lines_of_a_process):
    assert lines_of_a_process(log, chosen) == []


# ------------------------------------------------------------------------------- what is printed, and when
def test_every_reason_is_printed_once(printed):
    attempt_all()
    for line, (_, op, reason) in zip(printed(), FALLBACKS, strict=True):
        assert line.startswith(f"pygpt: PyTorch serves {op}; cpp: ") and reason in line.split("; triton")[0]
    attempt_all()
    assert not printed()


def test_nothing_is_printed_of_calls_that_kernels_serve(printed):
    w = torch.nn.Parameter(torch.randn(8, 8))
    for _ in range(2):
        F.relu(x), F.gelu(x), F.layer_norm(x, (8,)), F.rms_norm(x, (8,)), F.add_layer_norm(x, x, (8,))
        F.add_rms_norm(x, x, (8,)), F.dropout_add_layer_norm(x, x, (8,), p=0.1), F.dropout_add_rms_norm(x, x, (8,))
        F.cross_entropy(x, torch.arange(3)), F.linear_cross_entropy(x, w, torch.arange(3)).backward()
        F.scaled_dot_product_attention(x, x, x)
        F.mlp(F.linear(x, w), w, None, w, None).sum().backward()
    assert not printed()


@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_nothing_is_printed_under_an_explicit_choice(name, printed):
    with pygpt.backend(name):
        attempt_all()
    assert not printed()
    F.relu(torch.arange(3))
    assert len(printed()) == 1


def test_a_choice_in_one_thread_does_not_silence_another(printed):
    chosen, done = threading.Event(), threading.Event()

    def choose():
        with pygpt.backend("torch"):
            F.relu(torch.arange(3))
            chosen.set()
            done.wait(60)

    thread = threading.Thread(target=choose)
    thread.start()
    chosen.wait(60)
    assert not printed()
    F.relu(torch.arange(3))
    done.set()
    thread.join()
    assert len(printed()) == 1


def test_plain_calls_are_printed_before_they_are_remembered(printed, monkeypatch):
    for name in ("cpp", "triton"):
        monkeypatch.setitem(dispatch.TABLE, name, replace(dispatch.TABLE[name], ops=("linear",)))
    try:
        for call, op in ((F.relu, "relu"), (F.gelu, "gelu")):
            for _ in range(3):
                call(x)
            (line,) = printed()
            assert line.startswith(f"pygpt: PyTorch serves {op};") and f"{op} is not among its ops" in line
            assert dispatch.lookup(op, x) is dispatch.OPS[op].composite
    finally:
        dispatch.state.cache.clear()


def test_backward_prints_nothing_more(printed):
    w = torch.randn(8, requires_grad=True)
    for _ in range(2):
        (g,) = torch.autograd.grad(F.linear(x, w).square().sum(), w, create_graph=True)
        g.sum().backward()
    assert len(printed()) == 1


def test_threads_print_a_reason_once(printed):
    """Each thread lets the others catch up at every line of the function that prints."""
    start, reasons = threading.Barrier(4), 10

    def trace(frame, event, _):
        if frame.f_code is dispatch.log_fallback.__code__:
            time.sleep(0.002)
            return trace

    def work():
        for n in range(reasons):
            start.wait(60)
            F.linear(x[:, :1].expand(3, n), x.new_empty(n))

    threads = [threading.Thread(target=work) for _ in range(4)]
    threading.settrace(trace)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        threading.settrace(None)
    lines = printed()
    assert len(lines) == len(set(lines)) == reasons


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_is_not_broken_by_it(fullgraph, printed):
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: F.relu(t.long()) + F.relu(t), backend="aot_eager", fullgraph=fullgraph)
    assert torch.equal(compiled(x), torch.relu(x.long()) + torch.relu(x))
    assert not printed()
    F.relu(x.long())
    assert len(printed()) == 1
