"""`pygpt bench`: its rows, whose turn it is, memory, and the adapters of other libraries."""

import sys
import threading
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as TF
from bench_small import PEAKS, TINY, options, small

from bench.cases import gpt, ops, peers, shapes
from bench.cases import rows as case_rows
from bench.cases.refusal import Refused
from bench.timing import candidates, check, clocks, memory, race, results
from pygpt import verify

__all__ = ["small"]  # fixtures


# ------------------------------------------------------------------------------- rows
def test_the_suite(monkeypatch):
    monkeypatch.undo()
    every = case_rows.rows(options("--dtypes=float32,bfloat16,float16"))
    assert {row.case.op for row in every} == {*ops.OPS, *gpt.DIRECTIONS} and len(set(every)) == len(every)
    standard = [row.dtype in row.case.standard for row in every]
    assert standard == sorted(standard, reverse=True)  # what matters most comes first
    assert all(row.dtype in row.case.standard for row in case_rows.rows(options("--only-standard")))
    quick = case_rows.rows(options("--quick"))
    assert len(quick) == 2 * len(ops.OPS) + len(gpt.DIRECTIONS) and {row.dtype for row in quick} == {"float32"}
    assert options("--quick").budget < 120
    lengths = [row.case.dims["L"] for row in case_rows.rows(options("--sweep", "--directions=backward"))]
    assert lengths == [256, 512, 1024, 2048, 4096, 8192, 16384]
    assert len(case_rows.rows(options("--sweep=600", "--directions=forward"))) == 2


def test_custom_shapes():
    (case,) = shapes.custom("L=20,H=3,causal=0", ops.OPS)
    dims = {"B": 1, "H": 3, "L": 20, "S": 20, "E": 8, "causal": False}
    assert case.shape == "B1 H3 T20 D8 full" and case.dims == dims
    assert [c.shape for c in shapes.custom("M=2x3", ops.OPS)] == ["2 x 3 x 16 -> 24", "2 x 3 x 16", "2 x 3"]
    assert shapes.custom("L=1,S=9", ["attention"])[0].shape == "B1 H2 L1 S9 D8 causal"


def test_dimensions_are_named_as_in_verify(monkeypatch):
    monkeypatch.undo()
    for case in shapes.first_of_each_op(ops.CPU):
        assert set(ops.dimensions(case.setup)) <= set(verify.SPECS[case.op].dims)
        work, sizes = case.setup(lambda *shape: torch.empty(shape, device="meta"), *case.args), dict(case.dims)
        drawn = verify.SPECS[case.op].draw(
            lambda *shape: torch.empty(shape, device="meta"), verify.complete(case.op, sizes)
        )
        assert [t.shape for t in work.tensors] == [t.shape for t in drawn if verify._is_floating(t)]


@pytest.mark.parametrize("folder", [results.RESULTS, results.RESULTS / "sweep"])
def test_rows_keep_their_names(folder, monkeypatch):
    """Names of rows in saved results are still those of the suite, so that runs can be compared."""
    monkeypatch.undo()
    known = {
        row.op + row.shape
        for path in folder.glob("*.json")
        for row in results.results(results.read(path))
        if not row.busy
    }
    assert known and {c.op + c.shape for c in (*ops.CPU, *gpt.CASES, *shapes.sweep(shapes.SWEEP[-1]))} >= known


class FakeClock(clocks.CpuClock):
    """Takes the seconds of a block from the call itself."""

    def __init__(self):
        self.seen = []

    def time(self, blocks):
        self.seen.append([block.call for block in blocks])
        return [(block.seconds, 0.0) for block in blocks]


def test_turns_are_fair():
    clock, blocks = FakeClock(), {name: clocks.Block(name, seconds=0.01) for name in "abc"}
    times = race.race(clock, blocks, seconds=0.1)
    assert len(clock.seen) == 10 and {tuple(sorted(r)) for r in clock.seen} == {("a", "b", "c")}
    assert len(set(map(tuple, clock.seen))) > 3  # orders
    assert all(len(t.device) == 10 for t in times.values())


def test_candidates_take_turns_with_inputs(monkeypatch):
    o, seen = options("--ops=relu"), {"eager": [], "torch": []}
    work, drawn = ops.relu(torch.randn, (8, 16)), []
    for name, pick in (("eager", "eager"), ("torch", "ours")):
        record = lambda x, n=name: seen[n].append(x.data_ptr()) or x.relu()
        work = replace(work, **{pick: record})
    draw = lambda make: drawn.append(replace(work, tensors=(torch.randn(8, 16),))) or drawn[-1]
    monkeypatch.setattr(clocks, "last_level_cache", lambda: 4 * 8 * 16 * 4)
    monkeypatch.setattr(candidates, "on_backend", lambda name, function: function)
    row = case_rows.Row(ops.Case(draw, (), ""), "float32", "forward")
    monkeypatch.setattr(ops.Case, "op", "relu")
    found = candidates.prepare(row, o.backends, o.peers, PEAKS, clocks.CpuClock())
    assert len(drawn) == 8
    for each in seen.values():
        each.clear()
    for _ in range(8):
        found.blocks["torch"].call(), found.blocks["eager"].call()
    assert len(set(seen["torch"])) == 8 == len(set(seen["eager"]))
    assert all(a != b for a, b in zip(seen["torch"], seen["eager"], strict=True))


@pytest.mark.parametrize("blocks, rounds", [
    ((0.004, 0.008), (125, 125)), ((0.004, 0.096), (15, 15)), ((0.01, 0.4), (75, 5)), ((0.1, 0.1, 4.0), (7, 7, 3)),
    ((0.2, 20.0), (5, 1)), ((3.0, 20.0), (1, 1)), ((20.0, 0.2), (1, 5)),
])  # fmt: skip
def test_the_slow_are_in_few_rounds(blocks, rounds, monkeypatch):
    monkeypatch.undo()  # FEWEST
    cost, clock = dict(enumerate(blocks)), FakeClock()
    assert race.rounds_of(cost, seconds=0.75) == dict(enumerate(rounds))
    times = race.race(clock, {name: clocks.Block(name, seconds=seconds) for name, seconds in cost.items()}, 0.75)
    assert tuple(len(t.device) for t in times.values()) == rounds
    assert set(clock.seen[0]) == set(cost)  # the first round has all


def test_a_slow_peer_is_called_four_times(monkeypatch):
    """A call can take half a minute: once for its results, its time, its memory, and against ours."""
    calls, eager = [], lambda x: calls.append(x.dtype) or x.relu()
    work = replace(ops.relu(torch.randn, (8, 16)), eager=eager)
    monkeypatch.setattr(clocks.CpuClock, "estimate", lambda self, call: call() or 20.0)
    o = options()
    clock, row = clocks.CpuClock(), case_rows.Row(ops.Case(lambda make: work, (), ""), "float32", "forward")
    found = candidates.prepare(row, [], o.peers, PEAKS, clock)
    monkeypatch.undo()
    race.race(clock, found.blocks, 0.75)
    assert found.blocks["eager"].seconds == 20.0
    assert calls.count(torch.float32) == 4 and calls.count(torch.float64) == 1


# ------------------------------------------------------------------------------- memory
@pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux says")
def test_peak_memory(run_new_python):
    """In a process of its own: the threads of other tests leave heaps with free memory behind."""
    done = run_new_python("from tests.bench import test_bench_rows; test_bench_rows.peak_memory()")
    assert done.returncode == 0, done.stderr


def peak_memory():
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


def rms_of_sum(x, residual, weight, eps):
    """rms_norm, or with a residual also the sum."""
    return rms(x, weight, eps) if residual is None else (rms(x + residual, weight, eps), x + residual)


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
    "flash-attn-4": {
        "flash_attn.cute": {"flash_attn_func": lambda q, k, v, causal: (sdpa_inside(q, k, v, causal), None)},
    },
    "quack": {
        "quack.rmsnorm": {
            "rmsnorm": lambda x, w, eps, residual=None, prenorm=False: rms_of_sum(x, residual, w, eps),
            "layernorm_fwd": lambda x, w, b, eps: TF.layer_norm(x, w.shape, w, b, eps),
        }
    },
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
            "liger_fused_add_rms_norm": lambda x, r, w, eps, in_place: rms_of_sum(x, r, w, eps),
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
    *TINY[:4], ops.case(ops.mlp, (2, 3), 8, "gelu_tanh"), ops.case(ops.add_layer_norm, 4, 8),
    ops.case(ops.rms_norm, 4, 8), ops.case(ops.add_rms_norm, 4, 8),
    ops.case(ops.gelu, (4, 8), "none"), ops.case(ops.gelu, (4, 8), "tanh"), TINY[4],
]  # fmt: skip


def agrees(peer, case, direction="forward"):
    work = case.setup(torch.randn, *case.args)
    function = peer.function(case.op, direction, work, case.dims)
    tensors = peer.convert(work.tensors)
    reference = check.Reference(work, direction)
    return not reference.judge(lambda *ts: peer.export(function(*ts)), tensors, ours=False).ours > check.OFF


def test_another_computation():
    reference = check.Reference(ops.relu(torch.ones, (1, 4)), "forward")

    def fine(got, eager=1.0):
        reference.eager = (torch.full((1, 4), eager),)
        try:
            reference.judge(lambda x: got, reference.tensors, ours=False)
        except Refused:
            return False
        return True

    exact = torch.ones(1, 4)
    assert fine(exact) and fine(exact * 1.04) and fine(exact, 1.5) and fine(exact * 1.5, 1.5)
    assert not any((fine(exact * 1.5), fine(exact * 1.6, 1.5), fine(exact * torch.nan), fine(exact[:, :3])))


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
    backward = [case for case in served if (name, case.op) != ("quack", "layer_norm")]  # it has no backward
    assert served and all(agrees(peer, case) for case in served)
    assert backward and all(agrees(peer, case, "backward") for case in backward)


def test_adapters_of_pytorch():
    for name in ("eager", "sdpa-flash", "sdpa-math"):
        peer = peers.PEERS[name]
        assert all(agrees(peer, case, way) for case in SHAPES if peer.serves(case.op) for way in ops.DIRECTIONS)
    with pytest.raises(Refused, match="GB for copies of the scores"):
        huge = {"B": 1, "H": 64, "L": 1 << 18, "S": 1 << 18, "E": 8, "causal": True}
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


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "jax"])
def test_adapters_of_what_is_installed(name):
    peer = peers.PEERS[name]
    if why := peer.absent("cpu"):
        pytest.skip(why)
    assert all(agrees(peer, case) for case in SHAPES if peer.serves(case.op))


def test_absent_peers_say_why(monkeypatch):
    monkeypatch.setattr(peers, "_importable", lambda name: name == "xformers")
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    used, absent = peers.chosen(None, "cpu")
    assert set(used) == {"eager", "sdpa-flash", "sdpa-math"} and set(used) | set(absent) == set(peers.PEERS)
    assert absent["liger"] == "liger-kernel is not installed" and absent["xformers"] == "serves cuda tensors only"
    assert "is not installed" in absent["compile"]
    monkeypatch.setattr(peers.shutil, "which", lambda name: name)
    assert "--peers compile" in peers.chosen(None, "cpu")[1]["compile"]
    assert set(peers.chosen(["default", "compile"], "cpu")[0]) == set(peers.chosen(None, "cpu")[0]) | {"compile"}
    assert peers.chosen([], "cpu") == ({}, {})
    assert "compile" in peers.chosen(list(peers.PEERS), "cpu")[0]


@pytest.mark.parametrize("direction", ops.DIRECTIONS)
@pytest.mark.parametrize(
    "case", shapes.tiny(shapes.first_of_each_op(ops.CPU)), ids=lambda case: f"{case.op} {case.shape}"
)
def test_our_results_pass_the_check(case, direction):
    """Those of every op, so that no row fails in a run of hours."""
    work = case.setup(torch.randn, *case.args)
    check.Reference(work, direction).judge(candidates.on_backend("cpp", work.ours), work.tensors, ours=True)
