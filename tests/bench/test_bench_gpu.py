"""The benchmarks on a GPU, tried without one: clock, rows, check, and what a run leaves. No figure is judged."""

import argparse
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import cli
from bench.cases import goals, ops, peers, shapes
from bench.cases import rows as case_rows
from bench.cases.refusal import Refused, reason, trying
from bench.first_light import checks
from bench.timing import candidates, check, clocks, nvidia, race, results
from bench.timing.run import Run
from pygpt import cli as pygpt_cli
from pygpt.dispatch import TABLE

DRY = ["--rehearse", "--quick", "--seconds=0.001", "--peers=eager", "--ops=relu", "--backends=cpp"]
needs_cpp = pytest.mark.skipif(bool(TABLE["cpp"].missing), reason="the dry run measures the C++ ops")


@pytest.fixture(autouse=True)
def undo():
    """What a run changes in its process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    gc.unfreeze()


# ------------------------------------------------------------------------------- timing
class FakeClock(clocks.CudaClock):
    """Without a GPU; takes its times from the calls themselves, each of which returns (device, host) seconds."""

    flush = 1e-3

    def __init__(self):
        self.seen = []

    def time(self, blocks):
        self.seen.append(blocks)
        return [block.call() for block in blocks]


def test_a_block_has_a_head_start():
    clock, calls = FakeClock(), {name: lambda n=n: (n / 1e3, 1e-4) for n, name in enumerate("abc", 1)}
    blocks = {name: clock.block(call) for name, call in calls.items()}
    head_start = 1.5e-4 + 3e-5
    assert blocks["b"].head_start == pytest.approx(head_start)
    assert blocks["b"].seconds == pytest.approx(2e-3 + head_start + 1e-3)
    clock.seen.clear()
    times = race.race(clock, blocks, seconds=0.1)
    assert len(clock.seen) == int(0.1 / (2e-3 + head_start + 1e-3))
    assert {name: set(t.device) for name, t in times.items()} == {"a": {1e-3}, "b": {2e-3}, "c": {3e-3}}
    assert not times["a"].launch_bound


def test_a_late_host_is_noticed():
    block = clocks.Block(None, head_start=2e-4)
    assert clocks.Times(block, [3.0], [1e-4, 3e-4, 3e-4]).launch_bound
    assert not clocks.Times(block, [3.0], [1e-4, 1e-4, 3e-4]).launch_bound
    assert not clocks.Times(clocks.Block(None), [3.0], [0.0]).launch_bound  # a CPU has no head start


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
    clock = clocks.CudaClock()
    assert clock.cycles == 1e7 / 5e-3 and clock.flush == 5e-3
    queue.clear()
    blocks = [clocks.Block(lambda: queue.append("a"), head_start=5e-4), clocks.Block(lambda: queue.append("b"))]
    found = clock.time(blocks)
    assert queue == ["wait", 1_000_000, "flush", "event", "a", "event", "flush", "event", "b", "event", "wait"]
    assert [device for device, _ in found] == [5e-3, 5e-3] and all(0 <= host < 1 for _, host in found)


@pytest.mark.parametrize("known", ["clocks_event_reasons.active", "clocks_throttle_reasons.active", "none"])
def test_clocks(known, tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    answer = "580.1, 1980, 1980, 3201, 40, 300.1, 700.0, 0x0000000000000044"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *{known}*) echo "{answer}";; *) exit 2;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = nvidia.clocks()
    if known == "none":
        assert found == {}
    else:
        assert found["clocks.sm"] == "1980" and found["throttled_by"] == ["power cap", "thermal (hardware)"]


# ------------------------------------------------------------------------------- rows
def requested(*arguments):
    """Options of `pygpt bench`, complete but for the device, which need not be there."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    cuda = "--device=cuda" in arguments
    options = cli.complete(parser.parse_args([*(a for a in arguments if a != "--device=cuda"), "--backends=torch"]))
    options.device = "cuda" if cuda else "cpu"
    return options


def test_rows_on_a_gpu():
    found = case_rows.rows(requested("--device=cuda", "--directions=forward,backward"))
    assert len(set(found)) == len(found) and {row.case.op for row in found} == set(ops.OPS)
    dtypes = [row.dtype for row in found]
    assert sorted(dtypes, key=("bfloat16", "float32", "float16").index) == dtypes
    assert {row.case for row in found if row.dtype == "float16"} == set(shapes.first_of_each_op(ops.GPU))
    for case in ops.GPU:  # every set-up function gets its arguments, and has something to count
        assert min(case.setup(lambda *shape: torch.empty(shape, device="meta"), *case.args).amount) > 0
    quick = case_rows.rows(requested("--device=cuda", "--quick", "--dtypes=bfloat16", "--directions=forward"))
    assert {row.case for row in quick} == {*shapes.first_of_each_op(ops.GPU), *ops.PREDICTED}
    assert {(e.op, e.shape) for e in goals.EXPECTED} == {(c.op, c.shape) for c in ops.PREDICTED}
    small = case_rows.rows(requested("--rehearse"))
    assert {row.case.op for row in small} == set(ops.OPS) and len({str(row) for row in small}) == len(small)
    assert all(c.setup(torch.empty, *c.args).tensors[0].numel() < 2000 for c in {row.case for row in small})


def test_bars():
    bar = goals.hopper_bar
    assert bar("attention", "B16 H25 T1024 D64 causal", "bfloat16", "forward", "NVIDIA H200", 4.3) == 290
    assert bar("attention", "B2 H32 T8192 D128 causal", "bfloat16", "backward", "NVIDIA H100", 3.0) == 380
    assert bar("attention", "B2 H32 T8192 D128 full", "bfloat16", "forward", "NVIDIA H200", 4.3) is None
    assert bar("mlp", "B16 T1024 C4096 gelu_tanh", "bfloat16", "forward", "NVIDIA H200", 4.3) == 600
    assert bar("layer_norm", "16384 x 768", "bfloat16", "forward", "NVIDIA H200", 4.0) == 3.4
    assert bar("layer_norm", "16384 x 768", "bfloat16", "backward", "NVIDIA H100", 2.15) == pytest.approx(1.15)
    assert bar("layer_norm", "16384 x 768", "float32", "forward", "NVIDIA H200", 4.3) is None
    assert bar("layer_norm", "16384 x 768", "bfloat16", "forward", "NVIDIA A100", 1.5) is None


def test_reasons():
    def refuse():
        for text in ("Flash attention kernel not used because:", "wants Half", "CuDNN has been runtime disabled."):
            warnings.warn(f"{text} (Triggered internally at x.cpp:1.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    with pytest.raises(Refused, match="^wants Half$"):
        trying(refuse)
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("x" * 999))) == 200


def test_math_is_refused_where_scores_do_not_fit(monkeypatch):
    monkeypatch.setattr(peers, "available", lambda device: 16e9)
    case = ops.case(ops.attention, 2, 32, 8192, 8192, 128, True)
    work = case.setup(lambda *shape: torch.empty(shape, device="meta"), *case.args)
    adapt = peers.PEERS["sdpa-math"].ops["attention"]
    with pytest.raises(Refused, match="would need some 137 GB for copies of the scores, of 16 GB"):
        adapt(work, case.dims)
    peers.PEERS["sdpa-flash"].ops["attention"](work, case.dims)


# ------------------------------------------------------------------------------- the check
def _work(dtype=torch.bfloat16, T=256):
    return ops.attention(lambda *shape: torch.randn(shape).to(dtype), 2, 4, T, T, 32, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("direction", ops.DIRECTIONS)
def test_check_passes_what_is_right(dtype, direction):
    work = _work(dtype)
    found = check.Reference(work, direction).judge(candidates.on_backend("torch", work.ours), work.tensors, ours=True)
    assert not found.wrong and 0 < found.eager < 0.01 and found.ours < 0.01


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
    for how, wrong in ((forward, "forward"), (backward, "backward"), (nan, "forward")):
        spoil = _spoil(how)
        for direction in ops.DIRECTIONS:
            reference = check.Reference(work, direction)
            bad = lambda q, k, v, spoil=spoil: spoil(work.eager(q, k, v))
            judge = partial(reference.judge, bad, work.tensors, ours=True)
            if direction == wrong:
                with pytest.raises(Refused, match="^WRONG: error"):
                    judge()
            else:
                assert not judge().wrong


def test_check_finds_tf32():
    work = ops.linear(lambda *shape: torch.randn(shape), 64, 128, 64)
    tf32 = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in work.tensors]
    y, exact = work.eager(*tf32), work.eager(*work.tensors)
    wide = work.eager(*(t.double() for t in work.tensors))
    assert check.compare(y, exact, wide).wrong and not check.compare(exact, exact, wide).wrong


def test_check_allows_for_a_row_that_cancels():
    """As the first row of a causal dq, of which rounding alone is left."""
    wide = torch.randn(64, 8).double()
    wide[0] = 0
    eager = wide.float()
    off = eager.clone()
    off[0] = 1e-8
    assert not check.compare(off, eager, wide).wrong
    off[0] = 1e-4
    assert check.compare(off, eager, wide).wrong


def test_check_finds_who_writes_to_the_inputs():
    work = ops.relu(torch.randn, (8, 16))
    before, reference = work.tensors[0].clone(), check.Reference(work, "forward")
    with pytest.raises(Refused, match="it writes to its inputs"):
        reference.judge(lambda x: x.relu_(), work.tensors, ours=False)
    assert torch.equal(work.tensors[0], before)  # for those that follow


def test_check_looks_at_dtypes_and_zeros():
    x, zero = torch.randn(3, 4), torch.zeros(3, 4)
    assert check.compare(x.double(), x, x.double()).wrong and not check.compare(x, x, x.double()).wrong
    assert not check.compare(zero, zero, zero.double()).wrong and check.compare(x, zero, zero.double()).wrong


# ------------------------------------------------------------------------------- a run
def _run(*flags, rows=None, **how) -> Run:
    options = requested("--rehearse", "--quick", "--seconds=0.001", "--peers=eager", *flags)
    run = Run(options, **how)
    run.measure(case_rows.rows(options) if rows is None else rows)
    return run


def measured(run: Run) -> list[str]:
    return list(dict.fromkeys(b["group"] for b in run.benchmarks))


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch):
    peaks = clocks.Peaks(dict.fromkeys(ops.DTYPES, 100.0), dict.fromkeys(ops.DTYPES, "guess"), 10.0, 10.0)
    monkeypatch.setattr(clocks.CpuClock, "peaks", lambda self, dtypes, quick: peaks)
    monkeypatch.delenv("PYGPT_BACKEND", raising=False)


def test_the_budget_cuts_the_tail():
    wanted = case_rows.rows(requested("--rehearse", "--quick", "--ops=relu,gelu,linear"))
    ticks = itertools.chain([0] * 12, itertools.repeat(11))
    run = _run("--ops=relu,gelu,linear", "--budget=10", now=ticks.__next__)
    done = measured(run)
    assert done and done == [str(row) for row in wanted][: len(done)] and len(done) < len(wanted)
    assert run.about["left_out"] == [str(row) for row in wanted][len(done) :]


def test_compile_has_a_share(monkeypatch):
    peer = replace(peers.PEERS["compile"], ops=peers.PEERS["eager"].ops, program="")
    monkeypatch.setitem(peers.PEERS, "compile", peer)
    run = _run("--ops=mlp", "--peers=eager,compile", "--budget=1000")
    assert len(run.benchmarks) == 6 and 0 < run.compile_left < 350
    row = case_rows.rows(run.options)[0]
    run.compile_left, run.benchmarks = 0, []
    run.about["left_out"] = [str(row)]
    run.row(row)
    assert len(run.benchmarks) == 2 and "compile: it has used its share of the budget" in run.about["refused"]


def test_a_broken_device_ends_the_run(monkeypatch):
    def broken(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(clocks.CpuClock, "release", broken)
    run = _run("--ops=relu,gelu,linear")
    assert run.stopped == "broken" and len(run.about["left_out"]) == len(case_rows.rows(run.options)) - 1
    assert "illegal memory access" in run.about["failed"][-1]["why"]


@needs_cpp
def test_sigterm_keeps_what_there_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    prepare, seen = candidates.prepare, []

    def third_time(*args):
        seen.append(args[0])
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(*args)

    monkeypatch.setattr(candidates, "prepare", third_time)
    assert pygpt_cli.main(["bench", *DRY, "--ops=relu,gelu"]) == 130
    assert len(results.results(results.read(tmp_path / "out/bench/bench.json"))) == 2


def test_one_rows_error_costs_that_row():
    def error(make):
        raise RuntimeError("no such shape")

    def huge(make):
        raise torch.OutOfMemoryError("no memory")

    good = case_rows.rows(requested("--rehearse", "--quick", "--ops=relu"))
    bad = [case_rows.Row(ops.Case(setup, (), "bad"), "bfloat16", "forward") for setup in (error, huge)]
    run = _run(rows=[*bad, *good])
    assert measured(run) == [str(row) for row in good]
    assert [row["why"] for row in run.about["failed"]] == ["no such shape"]
    assert run.about["refused"] == {"no memory": ["huge bad bfloat16 forward"]}


@needs_cpp
def test_rehearsal(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "new" / "rows.json"
    assert pygpt_cli.main(["bench", *DRY, f"--json={path}"]) == 0
    out, found = capsys.readouterr().out, results.read(path)
    assert "2 rows in" in out and "0 FAILED" in out and f"wrote {path}" in out and list(path.parent.iterdir()) == [path]
    rows = results.results(found)
    assert [(row.dtype, row.direction) for row in rows] == [("bfloat16", "forward"), ("bfloat16", "backward")]
    facts = found["benchmarks"][0]["extra_info"]
    assert facts["candidate"] == "cpp" and facts["error"] <= 4 * facts["eager_error"] + 0.01
    (ours,) = rows[0].ours
    assert ours.q1 <= ours.ms <= ours.q3 and ours.unit == "GB/s"
    assert rows[0].ratio(ours) == pytest.approx(rows[0].entries["eager"].ms / ours.ms)
    assert found["pygpt"]["machine"]["rehearsal"] is True
    assert pygpt_cli.main(["bench", *DRY, "--save"]) == 2 and "no result" in capsys.readouterr().err


@needs_cpp
def test_prepare_times_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pygpt_cli.main(["bench", *DRY, "--prepare"]) == 0
    assert not list(tmp_path.iterdir()) and " ms" not in capsys.readouterr().out


@pytest.mark.parametrize("ratio, rate, passes", [(1.2, 300e3, True), (1.2, 289e3, False), (0.5, 300e3, True)])
def test_the_first_bar_of_a_gpu(ratio, rate, passes):
    ours = results.Entry("cuda", True, 1.0, 1.0, 1.0, 9, rate, "GFLOP/s")
    eager = results.Entry("eager", False, ratio, ratio, ratio, 9)
    row = results.Result("attention", "B16 H12 T1024 D64 causal", "bfloat16", "forward", True,
                         entries={"cuda": ours, "eager": eager})  # fmt: skip
    assert goals.passes(row, {"gpu": "NVIDIA H200", "copy_peak_gbs": 4300.0}) is passes
    assert goals.passes(row, {"gpu": "NVIDIA A100", "copy_peak_gbs": 1500.0}) is None
    assert goals.passes(replace(row, dtype="float32"), {}) is (ratio > 1)


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks.main(["versions", "--out=nowhere"]) == 2
    assert "no GPU: torch" in capsys.readouterr().out
    assert pygpt_cli.main(["bench", "--device=cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_where_results_are_saved():
    m = {"gpu": "NVIDIA H200", "date": "2026-11-22 10:00:00+0000"}
    assert results.saved_path(m, "") == ROOT / "bench/results/nvidia-h200.json"
    m = {"cpu": "AMD EPYC", "isa_ours": "not built", "date": "2026-11-22 10:00:00+0000"}
    assert results.saved_path(m, "sweep").name == "amd-epyc-not-built-sweep.json"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.json"
    with pytest.raises(TypeError):
        results.write(path, {"benchmarks": [{"a": object()}], "pygpt": {}})
    assert list(tmp_path.iterdir()) == []
    results.write(path, {"benchmarks": [{"error": float("inf"), "ms": 1 / 3}], "pygpt": {"copy": 2 / 3}})
    assert json.loads(path.read_text())["benchmarks"] == [{"error": None, "ms": 0.33333}]


@needs_cpp
def test_without_optional_modules(tmp_path):
    """rich, cpuinfo and the rest are not needed: neither here nor by what the GPU tests import."""
    source = f"""
import sys
for name in ("rich", "cpuinfo", "safetensors", "matplotlib", "xdist", "pytest_benchmark", "tinygrad", "jinja2"):
    sys.modules[name] = None
from pygpt import cli
import bench.first_light.plan, bench.first_light.checks, pygpt.verify
sys.path.insert(0, "tests")
import conftest, cases
sys.exit(cli.main(["bench", "--out={tmp_path}", *{DRY!r}]))
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
