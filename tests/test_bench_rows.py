"""`pygpt bench`: its rows, whose turn it is, memory, and the adapters of other libraries."""

import sys
import threading
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as TF
from bench_small import PEAKS, TINY, options, small

from bench import suite
from bench.cases import gpt, ops, peers
from bench.cases.gpu import Refused
from bench.timing import candidates, memory
from bench.timing import clocks as harness
from bench.timing import cuda as gpu_timer

__all__ = ["small"]  # fixtures


# ------------------------------------------------------------------------------- rows
def test_the_suite(monkeypatch):
    monkeypatch.undo()
    every = suite.rows(options("--dtypes=float32,bfloat16,float16"))
    assert {row.case.op for row in every} == {*ops.OPS, *gpt.DIRECTIONS} and len(set(every)) == len(every)
    standard = [row.dtype in row.case.standard for row in every]
    assert standard == sorted(standard, reverse=True)  # what matters most comes first
    assert all(row.dtype in row.case.standard for row in suite.rows(options("--only-standard")))
    quick = suite.rows(options("--quick"))
    assert len(quick) == 2 * len(ops.OPS) + len(gpt.DIRECTIONS) and {row.dtype for row in quick} == {"float32"}
    assert options("--quick").budget < 120
    lengths = [row.case.dims["L"] for row in suite.rows(options("--sweep", "--directions=backward"))]
    assert lengths == [256, 512, 1024, 2048, 4096, 8192, 16384]
    assert len(suite.rows(options("--sweep=600", "--directions=forward"))) == 2


def test_custom_shapes():
    (case,) = ops.custom("T=20,H=3,causal=0", ops.OPS)
    dims = {"B": 1, "H": 3, "L": 20, "S": 20, "D": 8, "causal": False}
    assert case.shape == "B1 H3 T20 D8 full" and case.dims == dims
    assert [c.shape for c in ops.custom("N=5", ops.OPS)] == ["8 x 16 -> 5", "5 x 16", "5 x 16"]
    assert ops.custom("L=1,T=9", ["attention"])[0].shape == "B1 H2 L1 S9 D8 causal"


def test_turns_are_fair(monkeypatch):
    turns = []
    monkeypatch.setattr(harness, "_block", lambda call, calls: turns.append(call()) or 0.01)
    calls = {name: lambda n=name: n for name in "abc"}
    times = harness.CpuClock().race(calls, dict.fromkeys(calls, 0.01), seconds=0.1)
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 10 and {tuple(sorted(r)) for r in rounds} == {("a", "b", "c")} and len(set(rounds)) > 3
    assert all(len(t.seconds) == 10 and t.calls == 1 for t in times.values())


def test_the_clock_of_a_gpu(monkeypatch):
    """Over gpu_timer.py, whose own timer needs a GPU; the dry run's stands in."""
    monkeypatch.setattr(gpu_timer, "CudaTimer", gpu_timer.CpuTimer)
    clock, calls = harness.GpuClock(), dict.fromkeys("ab", lambda: None)
    times = clock.race(calls, {name: clock.estimate(call) for name, call in calls.items()}, 1e-9)
    assert all(t.calls == 1 and len(t.seconds) == 2 and max(t.seconds) < 0.1 for t in times.values())
    found = clock.peaks(("float32",), quick=True)
    assert set(found.flops) == {"float32"} and min(found.copy, *found.flops.values()) > 0


def test_candidates_take_turns_with_inputs(monkeypatch):
    monkeypatch.setattr(harness, "last_level_cache", lambda: 1 << 20)
    o, seen = options("--ops=relu"), {"eager": [], "torch": []}
    work = ops.relu(torch.randn, 8, 16)
    for name, pick in (("eager", "eager"), ("torch", "ours")):
        record = lambda x, n=name: seen[n].append(x.data_ptr()) or x.relu()
        work = replace(work, **{pick: record})
    drawn = [replace(work, tensors=(torch.randn(8, 16),)) for _ in range(8)]
    monkeypatch.setattr(harness, "input_sets", lambda setup: drawn)
    monkeypatch.setattr(candidates.gpu_rows, "ours", lambda name, work: work.ours)
    found = candidates.prepare(
        candidates.Row(TINY[-1], "float32", "forward"), o.backends, o.peers, PEAKS, harness.CpuClock()
    )
    for each in seen.values():
        each.clear()
    for _ in range(8):
        found.calls["torch"](), found.calls["eager"]()
    assert len(set(seen["torch"])) == 8 == len(set(seen["eager"]))
    assert all(a != b for a, b in zip(seen["torch"], seen["eager"], strict=True))


@pytest.mark.parametrize("blocks, rounds", [
    ((0.004, 0.008), (125, 125)), ((0.004, 0.096), (15, 15)), ((0.01, 0.4), (75, 5)), ((0.1, 0.1, 4.0), (7, 7, 3)),
    ((0.2, 20.0), (5, 1)), ((3.0, 20.0), (1, 1)), ((20.0, 0.2), (1, 5)),
])  # fmt: skip
def test_the_slow_are_in_few_rounds(blocks, rounds, monkeypatch):
    monkeypatch.undo()  # LEAST
    cost = dict(enumerate(blocks))
    assert harness.rounds_of(cost, seconds=0.75) == dict(enumerate(rounds))
    clock, seen = harness.CpuClock(), []
    monkeypatch.setattr(harness, "_block", lambda call, calls: seen.append(call) or cost[call])
    times = clock.race({name: name for name in cost}, cost, 0.75)
    assert tuple(len(t.seconds) for t in times.values()) == rounds == tuple(map(seen.count, cost))
    assert set(seen[: len(cost)]) == set(cost)  # the first round has all


def test_a_slow_peer_is_called_four_times(monkeypatch):
    """A call can take half a minute: once for its results, its time, its memory, and against ours."""
    calls, eager = [], lambda x: calls.append(1) or x.relu()
    work = replace(ops.relu(torch.randn, 8, 16), eager=eager)
    monkeypatch.setattr(harness.CpuClock, "estimate", lambda self, call: call() or 20.0)
    o = options()
    clock, row = harness.CpuClock(), candidates.Row(ops.Case(lambda make: work, (), ""), "float32", "forward")
    found = candidates.prepare(row, [], o.peers, PEAKS, clock)
    monkeypatch.undo()
    clock.race(found.calls, found.estimates, 0.75)
    assert found.estimates == {"eager": 20.0} and len(calls) == 1 + 4  # and in float32


# ------------------------------------------------------------------------------- memory
@pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux says")
def test_peak_memory():
    megabyte = 1 << 20

    def worst():
        first = torch.ones(16 * megabyte, dtype=torch.int8)
        del first
        return torch.ones(4 * megabyte, dtype=torch.int8)

    assert memory.peak_bytes(worst) == pytest.approx(16 * megabyte, abs=megabyte)
    assert memory.peak_bytes(lambda: None) < megabyte / 2
    kept = threading.local()  # as a kernel's scratch memory, which was there before

    def keeping():
        kept.block = getattr(kept, "block", None) or bytearray(8 * megabyte)

    keeping()
    assert memory.peak_bytes(keeping) == pytest.approx(8 * megabyte, abs=megabyte)
    # The same among holes in the heap, one for each block (peak_bytes left mmap to blocks of 32 MB and more).
    blocks = [torch.ones(n * megabyte, dtype=torch.int8) for n in (20, 1, 5, 1)]
    del blocks[0], blocks[1]
    assert memory.peak_bytes(worst) == pytest.approx(16 * megabyte, abs=megabyte)

    def attention(T):
        q = torch.randn(1, 4, T, 32)
        return memory.peak_bytes(lambda: TF.softmax(q @ q.transpose(-1, -2), -1) @ q)

    assert attention(1024) == pytest.approx(4 * attention(512), rel=0.2)


# ------------------------------------------------------------------------------- peers
def module(name, **contents):
    found = ModuleType(name)
    vars(found).update(contents)
    return found


def rms(x, weight, eps):
    return TF.rms_norm(x, weight.shape, weight, eps)


def sdpa_inside(q, k, v, causal):
    """(B, T, H, D), as the libraries want it."""
    return TF.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal).transpose(1, 2)


class TransformerEngine(ModuleType):
    Linear, RMSNorm, LayerNorm = torch.nn.Linear, torch.nn.RMSNorm, torch.nn.LayerNorm

    class DotProductAttention(torch.nn.Module):
        def __init__(self, heads, size, attn_mask_type, qkv_format, attention_dropout):
            super().__init__()
            self.causal = {"causal": True, "no_mask": False}[attn_mask_type]

        def forward(self, q, k, v):
            return sdpa_inside(q, k, v, self.causal).flatten(-2)


def two_linears(x, w1, b1, w2, b2):
    assert x.dim() == 2
    return TF.linear(TF.gelu(TF.linear(x, w1, b1), approximate="tanh"), w2, b2)


FAKES = {
    "flash-attn": {"flash_attn": {"flash_attn_func": sdpa_inside}},
    "xformers": {
        "xformers.ops": {
            "LowerTriangularMask": str,
            "memory_efficient_attention": lambda q, k, v, attn_bias: sdpa_inside(q, k, v, attn_bias is not None),
        }
    },
    "liger": {
        "liger_kernel.transformers.functional": {
            "liger_layer_norm": lambda x, w, b, eps: TF.layer_norm(x, w.shape, w, b, eps),
            "liger_rms_norm": lambda x, w, eps, in_place: rms(x, w, eps),
        }
    },
    "apex": {
        "apex.normalization.fused_layer_norm": {
            "fused_layer_norm_affine": lambda x, w, b, shape, eps: TF.layer_norm(x, shape, w, b, eps),
            "fused_rms_norm_affine": lambda x, w, shape, eps: rms(x, w, eps),
        },
        "apex.fused_dense.fused_dense": {"fused_dense_gelu_dense_function": two_linears},
    },
    "transformer-engine": {"transformer_engine.pytorch": vars(TransformerEngine)},
}
SHAPES = [
    *TINY[:4], ops.case(ops.mlp, 2, 3, 8, "gelu_tanh"), ops.case(ops.add_layer_norm, 4, 8),
    ops.case(ops.rms_norm, 4, 8), ops.case(ops.gelu, 4, 8, "none"), ops.case(ops.gelu, 4, 8, "tanh"), TINY[4],
]  # fmt: skip


def agrees(peer, case, direction="forward"):
    work = case.setup(torch.randn, *case.args)
    function = peer.function(case.op, direction, work, case.dims)
    tensors = peer.convert(work.tensors)
    wanted = candidates.results(work.eager, work.tensors, direction)
    got = candidates.results(lambda *ts: peer.export(function(*ts)), tensors, direction)
    return candidates.difference(got, wanted, wanted) == ""


def test_another_computation():
    exact, half_off, bad = (torch.full((1, 4), x) for x in (1.0, 1.5, 1.6))
    fine = lambda got, theirs: candidates.difference(got, theirs, exact) == ""
    assert fine(exact, exact) and fine(exact * 1.04, exact) and fine(exact, half_off) and fine(half_off, half_off)
    assert not any(
        (fine(half_off, exact), fine(bad, half_off), fine(exact * torch.nan, exact), fine(exact[:, :3], exact))
    )


@pytest.mark.parametrize("name", FAKES)
def test_adapters(name, monkeypatch):
    """On stand-ins with the libraries' signatures: layouts, names of parameters, masks."""
    for path, contents in FAKES[name].items():
        for depth in range(1, path.count(".") + 2):
            parent = ".".join(path.split(".")[:depth])
            if parent not in FAKES[name]:
                monkeypatch.setitem(sys.modules, parent, module(parent, __path__=[]))
        monkeypatch.setitem(sys.modules, path, module(path, **contents))
        parent, _, last = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, sys.modules[path])
    peer = peers.PEERS[name]
    served = [case for case in SHAPES if case.op in peer.ops and not (name == "flash-attn" and "norm" in case.op)]
    assert served and all(agrees(peer, case, way) for case in served for way in ops.DIRECTIONS)


def test_adapters_of_pytorch():
    for name in ("eager", "sdpa-flash", "sdpa-math"):
        peer = peers.PEERS[name]
        assert all(agrees(peer, case, way) for case in SHAPES if peer.serves(case.op) for way in ops.DIRECTIONS)
    with pytest.raises(Refused, match="GB for copies of the scores"):
        huge = {"B": 1, "H": 64, "L": 1 << 18, "S": 1 << 18, "D": 8, "causal": True}
        peers.PEERS["sdpa-math"].function("attention", "forward", SimpleNamespace(tensors=[torch.ones(1)]), huge)


def test_adapters_of_tinygrad():
    from tinygrad.helpers import Context

    with Context(DEV="PYTHON"):
        small = [ops.case(c.setup, *(2 if type(v) is int else v for v in c.args)) for c in SHAPES]
        assert all(agrees(peers.PEERS["tinygrad"], case) for case in small)
        with pytest.raises(Refused, match="apart from its forward"):
            peers.PEERS["tinygrad"].function("relu", "backward", None, {})
        with pytest.raises(Refused, match="bfloat16"):
            peers.PEERS["tinygrad"].convert((torch.ones(2, dtype=torch.bfloat16),))


def test_absent_peers_say_why(monkeypatch):
    monkeypatch.setattr(peers, "_importable", lambda name: name == "xformers")
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    used, absent = peers.chosen(None, "cpu")
    assert set(used) == {"eager", "sdpa-flash", "sdpa-math"} and set(used) | set(absent) == set(peers.PEERS)
    assert absent["liger"] == "liger-kernel is not installed" and absent["xformers"] == "serves cuda tensors only"
    assert "is not installed" in absent["compile"]
    monkeypatch.setattr(peers.shutil, "which", lambda name: name)
    assert "--peers compile" in peers.chosen(None, "cpu")[1]["compile"]
    assert "compile" in peers.chosen(list(peers.PEERS), "cpu")[0]
