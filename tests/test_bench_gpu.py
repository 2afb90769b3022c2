"""bench.gpu on CPU: how it times, checks, skips and reports. No figure is judged here."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import gpu
from bench.cases import expected, ops
from bench.cases import gpu as gpu_rows
from bench.cases.gpu import Group, Refused
from bench.first_light import checks as gpu_checks
from bench.show import report
from bench.timing import cuda as gpu_timer
from pygpt.dispatch import TABLE

DRY = ["--device=cpu", "--quick", "--seconds=0.001", "--peers=eager", "--ops=relu", "--backends=cpp"]
needs_cpp = pytest.mark.skipif(bool(TABLE["cpp"].missing), reason="the dry run measures the C++ ops")


@pytest.fixture(autouse=True)
def undo():
    """What a run changes in its process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    gc.unfreeze()


# ------------------------------------------------------------------------------- timing
class FakeTimer(gpu_timer.CpuTimer):
    """Takes its times from the calls themselves: each returns its (device, host) milliseconds."""

    flush_ms = 1.0

    def __init__(self):
        self.seen = []

    def time(self, calls):
        self.seen.append(calls)
        return [call() for call, _ in calls]


def test_race_is_interleaved_and_fair():
    timer, calls = FakeTimer(), {name: lambda n=n: (n, 0.1) for n, name in enumerate("abc", 1)}
    timings = gpu_timer.race(timer, calls, seconds=1.0)
    rounds = [seen for seen in timer.seen if len(seen) > 1]
    cost = 1 + 2 + 3 + 3 * (1.5 * 0.1 + 0.03) + 3 * 1.0
    assert len(rounds) == int(1000 / cost)
    assert all(sorted(c()[0] for c, _ in seen) == [1, 2, 3] for seen in rounds)
    assert len({tuple(c()[0] for c, _ in seen) for seen in rounds}) > 3  # orders
    assert {name: set(t.device) for name, t in timings.items()} == {"a": {1}, "b": {2}, "c": {3}}
    assert len(gpu_timer.race(FakeTimer(), {"slow": lambda: (1e6, 0.0)}, 1.0)["slow"].device) == timer.least_rounds


def test_what_is_queued_on_a_gpu(monkeypatch):
    """Per call: spin, flush, event, the call, event; one wait for all."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append("event")

        def elapsed_time(self, end):
            return 5.0

    class Buffer:
        def zero_(self):
            queue.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append(cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queue.append("wait"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(torch, "empty", lambda size, **how: Buffer() if size == 256 << 20 else None)
    timer = gpu_timer.CudaTimer()
    assert timer.cycles_per_ms == 10_000_000 / 5.0 and timer.flush_ms == 5.0
    queue.clear()
    found = timer.time([(lambda: queue.append("a"), 0.5), (lambda: queue.append("b"), 0.0)])
    assert queue == ["wait", 1_000_000, "flush", "event", "a", "event", "flush", "event", "b", "event", "wait"]
    assert [device for device, _ in found] == [5.0, 5.0] and all(0 <= host < 1000 for _, host in found)


def test_summary():
    times = gpu_timer.Timing(lead=0.2, device=[3.0, 1.0, 2.0, 5.0, 4.0], host=[0.1, 0.1, 0.3])
    assert times.summary() == {"ms": 3.0, "q1_ms": 2.0, "q3_ms": 4.0, "host_ms": 0.1}
    assert gpu_timer.Timing(0.2, [1.0], [0.3]).summary()["launch_bound"]


@pytest.mark.parametrize("known", ["clocks_event_reasons.active", "clocks_throttle_reasons.active", "none"])
def test_clocks(known, tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    answer = "580.1, 1980, 1980, 3201, 40, 300.1, 700.0, 0x0000000000000044"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *{known}*) echo "{answer}";; *) exit 2;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu_timer.clocks()
    if known == "none":
        assert found == {}
    else:
        assert found["clocks.sm"] == "1980" and found["throttled_by"] == ["power cap", "thermal (hardware)"]


# ------------------------------------------------------------------------------- rows
def test_plan():
    groups = gpu_rows.plan()
    assert len(set(groups)) == len(groups) and {g.case.op for g in groups} == set(ops.OPS)
    for op in ops.OPS:
        assert {g.dtype for g in groups if g.case.op == op} == set(ops.DTYPES)
    for group in groups:  # every set-up function gets its arguments, and has something to count
        work = group.case.setup(lambda *shape: torch.empty(shape, device="meta"), *group.case.args)
        assert min(work.amount) > 0
    for tiny in (False, True):
        quick = gpu_rows.plan(quick=True, tiny=tiny)
        assert {g.case.op for g in quick} == set(ops.OPS) and {g.dtype for g in quick} == {"bfloat16"}
        assert tiny or {g.case for g in quick} >= set(gpu_rows.PREDICTED)
    assert {g.case.op for g in gpu_rows.plan(["gelu"], ["float16"])} == {"gelu"}
    small = gpu_rows.plan(tiny=True)
    assert len({str(g) for g in small}) == len(small) and any(g.compiled for g in small)


def test_bars():
    bar = expected.bar
    assert bar("attention", "B16 H25 T1024 D64 causal", "bfloat16", "forward", "NVIDIA H200", 4.3) == 290
    assert bar("attention", "B2 H32 T8192 D128 causal", "bfloat16", "backward", "NVIDIA H100", 3.0) == 380
    assert bar("attention", "B2 H32 T8192 D128 full", "bfloat16", "forward", "NVIDIA H200", 4.3) is None
    assert bar("mlp", "B16 T1024 C4096 gelu_tanh", "bfloat16", "forward", "NVIDIA H200", 4.3) == 600
    assert bar("layer_norm", "16384 x 768", "bfloat16", "forward", "NVIDIA H200", 4.0) == 3.4
    assert bar("layer_norm", "16384 x 768", "bfloat16", "backward", "NVIDIA H100", 2.15) == pytest.approx(1.15)
    assert bar("layer_norm", "16384 x 768", "float32", "forward", "NVIDIA H200", 4.3) is None
    assert bar("layer_norm", "16384 x 768", "bfloat16", "forward", "NVIDIA A100", 1.5) is None


def test_math_is_refused_where_scores_do_not_fit():
    group = Group(gpu_rows._attention(2, 32, 8192, 128), "bfloat16")
    with pytest.raises(Refused, match="17 GB of scores"):
        gpu_rows.sdpa("math", group)
    gpu_rows.sdpa("flash", group)


def test_reasons():
    def refuse():
        for text in ("Flash attention kernel not used because:", "wants Half", "CuDNN has been runtime disabled."):
            warnings.warn(f"{text} (Triggered internally at x.cpp:1.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    with pytest.raises(Refused, match="^wants Half$"):
        gpu_rows.trying(refuse)
    assert gpu_rows.reason(ValueError("first\nsecond")) == "first"
    assert gpu_rows.reason(ValueError()) == "ValueError"
    assert len(gpu_rows.reason(ValueError("x" * 999))) == 200


# ------------------------------------------------------------------------------- the check
def _work(dtype=torch.bfloat16, T=256):
    return ops.attention(lambda *shape: torch.randn(shape).to(dtype), 2, 4, T, T, 32, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_check_passes_what_is_right(dtype):
    work = _work(dtype)
    found = gpu_rows.check({"a": work.eager, "b": gpu_rows.ours("torch", work)}, work)
    assert not any(c.wrong for ways in found.values() for c in ways.values())
    assert found["a"]["forward"].difference == 0 and 0 < found["a"]["forward"].error < 0.01


def _spoil(how):
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return how(x.clone()) if how.__name__ == "forward" else x.clone()

        @staticmethod
        def backward(ctx, g):
            return how(g.clone()) if how.__name__ == "backward" else g

    return Spoilt.apply


def test_check_finds_what_is_wrong():
    work = _work()

    def forward(t):  # one head's last rows, the smallest of a causal result
        t[0, 0, -16:] *= 1.2
        return t

    def backward(t):
        t[1, 2, 100:116] = 0
        return t

    def nan(t):
        t[0, 0, 0, 0] = torch.nan
        return t

    nan.__name__ = "forward"
    for how, wrong in ((forward, (True, False)), (backward, (False, True)), (nan, (True, False))):
        spoil = _spoil(how)
        found = gpu_rows.check({"bad": lambda q, k, v, s=spoil: s(work.eager(q, k, v))}, work)["bad"]
        assert tuple(found[way].wrong for way in ops.DIRECTIONS) == wrong, how.__name__


def test_check_finds_tf32():
    work = ops.linear(lambda *shape: torch.randn(shape), 64, 128, 64)
    tf32 = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in work.tensors]
    y, exact = work.eager(*tf32), work.eager(*work.tensors)
    wide = work.eager(*(t.double() for t in work.tensors))
    assert gpu_rows.compare(y, exact, wide).wrong and not gpu_rows.compare(exact, exact, wide).wrong


def test_check_reports_failures_and_types():
    work = _work()

    def broken(*tensors):
        raise RuntimeError("out of resources: shared memory\nmore")

    found = gpu_rows.check({"broken": broken, "fine": work.eager}, work)
    assert str(found["broken"]) == "out of resources: shared memory" and not found["fine"]["forward"].wrong
    x = torch.randn(3, 4)
    assert gpu_rows.compare(x.double(), x, x.double()).wrong and gpu_rows.compare(x[:2], x, x.double()).wrong
    zero = torch.zeros(3, 4)
    assert not gpu_rows.compare(zero, zero, zero.double()).wrong
    assert gpu_rows.compare(x, zero, zero.double()).wrong


# ------------------------------------------------------------------------------- a run
def _run(*flags, timer=None, now=None, names=("torch",)):
    options = gpu.parse([*DRY, *flags])
    groups = gpu_rows.plan(options.ops, options.dtypes, options.quick, tiny=True)
    clock = {} if now is None else {"now": now}
    return gpu.Run(options, timer or gpu_timer.CpuTimer(), list(names), groups, **clock)


def test_the_budget_cuts_the_tail():
    run = _run("--ops=relu,gelu,linear", "--budget=10", now=itertools.count(0, 0.5).__next__)
    run.measure()
    done = [row["op"] for row in run.rows]
    assert done and done == [g.case.op for g in run.groups for _ in ops.DIRECTIONS][: len(done)]
    assert run.skipped == {"the budget of 10 s": [str(g) for g in run.groups[len(done) // 2 :]]}
    assert len(done) < 2 * len(run.groups)


def test_compile_has_a_share(monkeypatch):
    monkeypatch.setattr(gpu_rows, "compiled", lambda work: work.eager)
    run = _run("--ops=mlp", "--peers=compile", "--budget=1000")
    run.compile_left = 0
    run.measure()
    assert [row["best_peer"] for row in run.rows] == [None, None] and run.rows[0]["ratio"] is None
    assert len(run.skipped["torch.compile has used its share of the budget"]) == 2
    run = _run("--ops=mlp", "--peers=compile", "--budget=1000")
    run.measure()
    assert [row["best_peer"] for row in run.rows] == ["compile"] * 2 and run.compile_left < 350


def test_a_broken_device_ends_the_run():
    class Breaks(gpu_timer.CpuTimer):
        calls = 0

        def release(self):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    run = _run("--ops=relu,gelu,linear", timer=Breaks())
    run.measure()
    assert "illegal memory access" in run.rows[-1]["failed"]
    (why,) = run.skipped
    assert "unusable" in why and len(run.skipped[why]) == 2  # the group it happened in, and the rest


def test_sigterm_keeps_what_there_is(monkeypatch):
    run, rows = _run("--ops=relu,gelu"), []
    signal.signal(signal.SIGTERM, gpu.stop)

    def show(row):
        rows.append(row)
        if len(rows) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    run.measure(show)
    assert len(run.rows) == 3 and "SIGTERM" in next(iter(run.skipped))


def test_one_groups_error_costs_that_group():
    run = _run("--ops=relu,gelu", "--budget=1000")
    bad = SimpleNamespace(op="gelu", shape="bad", args=(), setup=lambda make: make(-1))
    no_memory = torch.OutOfMemoryError("no memory")
    oom = SimpleNamespace(op="gelu", shape="huge", args=(), setup=lambda make: _raise(no_memory))
    run.groups = [Group(bad, "bfloat16"), Group(oom, "bfloat16"), *run.groups]
    run.measure()
    assert "failed" in run.rows[0] and not any("failed" in row for row in run.rows[1:]) and len(run.rows) == 5
    assert run.skipped == {"no memory": ["gelu huge bfloat16"]}


def _raise(error):
    raise error


@needs_cpp
def test_dry_run(capsys, tmp_path):
    path = tmp_path / "new" / "rows.json"
    assert gpu.main([*DRY, f"--json={path}"]) == 0
    out, saved = capsys.readouterr().out, json.loads(path.read_text())
    assert "0 WRONG, 0 FAILED" in out and f"wrote {path}" in out and list(path.parent.iterdir()) == [path]
    assert [row["direction"] for row in saved["rows"] if row["backend"] == "cpp"] == ["forward", "backward"]
    row = saved["rows"][0]
    assert row["q1_ms"] <= row["ms"] <= row["q3_ms"] and row["wrong"] is False and row["unit"] == "TB/s"
    assert row["ratio"] == pytest.approx(row["peers"]["eager"]["ms"] / row["ms"], rel=1e-3)
    assert row["share_of_limit"] == pytest.approx(row["rate"] / saved["machine"]["limits"]["copy"], rel=1e-3)
    lines = out[: out.index("\n\n")].splitlines()[1:]
    assert len({line.index(word) for line, word in zip(lines, ("best", "eager", "eager"), strict=False)}) <= 2
    assert saved["machine"]["skipped"] == json.loads(json.dumps(saved["machine"]["skipped"]))


@needs_cpp
def test_a_wrong_kernel_cannot_look_fast(capsys, monkeypatch):
    monkeypatch.setattr(gpu_rows, "ours", lambda name, work: lambda x: torch.relu(x) * 1.1)
    assert gpu.main(DRY) == 1
    assert "WRONG: error 1.0e-01" in capsys.readouterr().out
    monkeypatch.setattr(gpu_rows, "ours", lambda name, work: lambda x: _raise(RuntimeError("no such kernel")))
    assert gpu.main(DRY) == 1
    out = capsys.readouterr().out
    assert "FAILED: no such kernel" in out and "2 FAILED" in out


def test_check_judges_the_first_bar():
    row = {"rate": 300.0, "bar": 290, "wrong": False, "ratio": 1.2}
    assert gpu.met(row) and not gpu.met(row | {"rate": 289.0}) and not gpu.met(row | {"wrong": True})
    assert gpu.met(row | {"bar": None}) is None and gpu.met({"failed": "x"}) is None
    assert gpu.verdict(row) == "faster"
    assert [gpu.verdict(row | {"ratio": r}) for r in (1.04, 1.02, 0.98, 0.96)] == ["faster", "even", "even", "slower"]
    assert gpu.verdict(row | {"ratio": 0.5, "launch_bound": True}) == "slower, launch-bound"
    assert gpu.verdict({"ratio": None}) == ", unchecked"
    for flags, code in (((), 0), (("--check",), 1)):
        run = _run(*flags)
        run.rows = [row | {"rate": 1.0}]
        assert gpu.finish(run, {}, run.options) == code


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main, arguments in ((gpu.main, []), (gpu_checks.main, ["versions", "--out=nowhere"])):
        assert main(arguments) == 2
        out = capsys.readouterr().out
        assert "no GPU: torch" in out and len(out.splitlines()) == 1
    with pytest.raises(SystemExit):
        gpu.parse(["--device=cpu", "--save"])


def test_the_file():
    m = {"gpu": "NVIDIA H200", "date": "2026-11-22 10:00:00+0000"}
    assert report.default_path(m) == ROOT / "bench/results/nvidia-h200-2026-11-22.json"
    m = {"cpu": "AMD EPYC", "isa_ours": "not built", "date": "2026-11-22 10:00:00+0000"}
    assert report.default_path(m).name == "amd-epyc-not-built-2026-11-22.json"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.json"
    with pytest.raises(TypeError):
        report.save(path, [{"a": object()}], {})
    assert list(tmp_path.iterdir()) == []
    report.save(path, [{"error": float("inf"), "peers": {"eager": {"ms": 1 / 3}}}], {"limits": {"copy": 2 / 3}})
    assert json.loads(path.read_text())["rows"] == [{"error": None, "peers": {"eager": {"ms": 0.33333}}}]


@needs_cpp
def test_without_optional_modules():
    """rich, cpuinfo and the rest are not needed: neither here nor by what the GPU tests import."""
    source = f"""
import sys
for name in ("rich", "cpuinfo", "safetensors", "matplotlib", "xdist", "pytest_benchmark", "tinygrad", "micrograd"):
    sys.modules[name] = None
from bench import gpu
import bench.first_light, bench.first_light.checks, pygpt, pygpt.verify
sys.path.insert(0, "tests")
import conftest, cases
sys.exit(gpu.main({DRY!r}))
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
