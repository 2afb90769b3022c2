"""Every op x backend x dtype x case, forward and every gradient, by the rule of `pygpt.verify`.

Fresh memory is poisoned. (test_poison.py also fills the results of fast calls, which come from the heap.)
"""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch

import pygpt
from pygpt import _C, functional, reference, verify
from pygpt.dispatch import TABLE
from pygpt.ops.attention import scores
from tests.ops.test_activation import assert_exact_in_every_binade, numbers, with_gradient

GPU_SHARE = {"triton": 8, "cuda": 3}  # see conftest


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def every(table):
    return [pytest.param(op, dims, id=f"{op}-{cases.ids(dims)}") for op, all_dims in table.items() for dims in all_dims]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op, dims", every(cases.CASES))
def test_shapes(op, dims, dtype, compiled, device, generator):
    cases.assert_exact(op, dims, dtype, generator, compiled, device=device)


@pytest.mark.parametrize("op, dims", [*cases.variants(cases.TYPICAL), *cases.FEW.items()], ids=cases.ids)
def test_the_fallback_is_pytorchs_own(op, dims, generator):
    """By its own name, and as exact as itself."""
    (row, *_) = rows = verify.measure(op, dims, torch.float32, generator, "torch")
    assert row.backend == "torch" and all(row.passed for row in rows)


def test_a_nan_in_one_draw_of_many_fails(generator, monkeypatch):
    """Later draws, which are right, do not make up for it."""
    calls, row = [], TABLE["cpp"]

    def gelu_fwd(*args):
        calls.append(args)
        return row.kernels.gelu_fwd(*args) * (torch.nan if len(calls) == 1 else 1.0)

    kernels = SimpleNamespace(gelu_fwd=gelu_fwd, gelu_bwd=row.kernels.gelu_bwd)
    monkeypatch.setitem(TABLE, "cpp", replace(row, kernels=kernels))
    monkeypatch.setattr(verify, "MOST", 3)
    fwd, dx = verify.measure("gelu", {"M": 4}, torch.float32, generator, "cpp")
    assert len(calls) == 3 and not fwd.passed and dx.passed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op, dims", every(cases.SLOW))
def test_many_shapes(op, dims, dtype, compiled, device, generator):
    if dtype == torch.float64 and 3072 in dims.values():  # in 80 bits: PyTorch's error 4e-15, ours 7e-16
        pytest.skip("the reference, PyTorch's own float64, adds 3072 products in one chain")
    cases.assert_exact(op, dims, dtype, generator, compiled, device=device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op, dims", [*cases.variants(cases.TYPICAL), *cases.FEW.items()], ids=cases.ids)
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=cases.ids)
def test_layouts(layout, op, dims, dtype, compiled, device, generator):
    cases.assert_exact(op, dims, dtype, generator, compiled, view=layout, device=device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_overlapping_rows(dtype, generator):
    """On a CPU, rows that begin one element apart, as a sliding window's do, give the bits of a copy of them."""
    rows = torch.randn(143, generator=generator).to(dtype).unfold(0, 64, 1)
    w = torch.randn(20, 64, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(80, 20, generator=generator).to(dtype)
    heads = torch.randn(1, 1, 80, 64, generator=generator).to(dtype)

    def results(x):
        q = x[None, None].detach().requires_grad_()
        y, out = functional.linear(x, w), functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return [y, out, *torch.autograd.grad(y, w, dy), *torch.autograd.grad(out, q, heads)]

    with pygpt.backend("cpp"):
        assert all(map(torch.equal, results(rows), results(rows.contiguous())))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op, dims", cases.SOME_ROWS, ids=cases.ids)
def test_some_rows(op, dims, dtype, generator):
    cases.assert_exact(op, dims, dtype, generator, "cpp")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("name", reference.GATED)
def test_a_gate_in_every_binade(name, dtype, compiled, kernels_of, device, generator):
    """hidden = act(gate) where the value is 1, and dgate = act'(gate) where d is 1 too."""
    gate = numbers(dtype, generator)
    # Further down silu is 0, because subnormal numbers are slow. AVX512_BF16's products take a subnormal gate for 0.
    gate = gate[(gate.abs() < 80) & (gate.abs() >= torch.finfo(dtype).smallest_normal)]
    if compiled in GPU_SHARE:
        gate = gate[torch.randperm(len(gate), generator=generator)[:4096]]
    x = torch.ones(1, 1, dtype=dtype, device=device)
    fc_weight = torch.cat((gate, torch.ones_like(gate)))[:, None].to(device)
    proj_weight = torch.ones(1, len(gate), dtype=dtype, device=device)
    _, hidden, pre = kernels_of.mlp_fwd(x, fc_weight, None, proj_weight, None, name, "all")
    args = x, x, fc_weight, proj_weight, hidden, pre, name, [False, False, True, False, False]
    dgate = kernels_of.mlp_bwd(*args)[2][: len(gate)]
    torchs, value, gradient = reference.ACTIVATIONS[name]
    exact = value(gate.double()), gradient(torch.ones(len(gate)).double(), gate.double())
    assert_exact_in_every_binade(gate, (hidden[0].cpu(), dgate.cpu()), with_gradient(torchs, gate), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.ids)
@pytest.mark.parametrize("name", reference.GATED)
def test_a_gates_product_is_rounded_once(name, dtype, compiled, kernels_of, device, generator):
    """act(gate) is not rounded before it is multiplied: a second rounding would make errors of up to eps."""
    gate, value = torch.randn(2, 4096, dtype=torch.float64, generator=generator).to(dtype)
    fc_weight = torch.cat((gate, value))[:, None].to(device)
    one, proj_weight = fc_weight.new_ones(1, 1), fc_weight.new_zeros(1, 4096)
    _, hidden, pre = kernels_of.mlp_fwd(one, fc_weight, None, proj_weight, None, name, "all")
    assert torch.equal(pre[0], fc_weight[:, 0])
    exact = reference.ACTIVATIONS[name][1](gate.double()) * value.double()
    normal = exact.abs() > torch.finfo(dtype).smallest_normal
    error = ((hidden[0].cpu().double() - exact) / exact)[normal].abs().max()
    assert error < 0.75 * torch.finfo(dtype).eps


def apart(args):
    """Whether the rounding of the scores themselves hardly shows: no row's two largest all but tie."""
    q, k, _, is_causal, scale = args
    s = scores(q.double(), k.double(), is_causal, scale)
    runner_up = torch.softmax(s, -1).topk(2).values[..., 1] * s.amax(-1).abs()  # times eps: how wrong it may be
    eps = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
    return runner_up.max() * eps < verify.allowance(q.dtype) / 8


@pytest.mark.parametrize(
    "dtype, size", [(torch.float64, 1e3), (torch.float32, 1e3), (torch.bfloat16, 1e3), (torch.float16, 60.0)]
)
@pytest.mark.parametrize("op", ["attention", "attention_lse", *cases.NORMS, "gelu"])
def test_large_values(op, dtype, size, compiled, device, generator, monkeypatch):
    """Scores of 1e6 (beyond float16, and exp of it beyond everything), squares of 1e6."""

    def large(t):
        return t * size

    if op.startswith("attention"):
        monkeypatch.setitem(verify.SPECS, op, replace(verify.SPECS[op], settled=apart))
    cases.assert_exact(op, cases.TYPICAL[op], dtype, generator, compiled, view=large, device=device)


@pytest.mark.parametrize("dtype, size", [(torch.bfloat16, 60.0), (torch.float16, 22.0)], ids=cases.ids)
@pytest.mark.parametrize("op", ["attention", "attention_lse"])
def test_scores_around_the_limit(op, dtype, size, compiled, device, generator, monkeypatch):
    """Exponents of about 2^21 eps, where GPU kernels turn from fused to separate products and sums."""
    monkeypatch.setitem(verify.SPECS, op, replace(verify.SPECS[op], settled=apart))
    cases.assert_exact(op, cases.TYPICAL[op], dtype, generator, compiled, view=lambda t: t * size, device=device)


# Scores up to which the CUDA kernels compute p by one multiply-add: see attention/fwd.cu. (float never does.)
LIMITS = {torch.float32: 2**14 * math.log(2), torch.bfloat16: 2**14 * math.log(2), torch.float16: 2**11 * math.log(2)}


@pytest.mark.parametrize("dtype", LIMITS, ids=cases.ids)
def test_a_single_key_has_probability_one(dtype, kernels, device, generator):
    """However large its score: rows within and beyond the limit stand side by side, each with a key of its own."""
    L, scale = 64, 0.37
    beside = torch.tensor([0.1, 0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 7.0, 7.2, 7.4, 16.0])
    beside = beside[torch.randint(len(beside), (L,), generator=generator)]
    beside = beside * (1 + torch.rand(L, generator=generator) / 16)
    score = (LIMITS[dtype] * beside / scale).to(dtype)
    k = torch.eye(L, dtype=dtype)[None, None]
    v, dout = torch.randn(2, 1, 1, L, L, generator=generator).to(dtype)
    q, k, v, dout = (x.to(device) for x in (k * score[:, None], k, v, dout))
    out, lse = kernels.attention_fwd(q, k, v, False, scale)
    assert torch.equal(out, v)
    torch.testing.assert_close(lse[0, 0].cpu(), score.float() * scale, rtol=0, atol=0)
    dv = kernels.attention_bwd(dout, None, q, k, v, out, lse, False, scale, [True] * 3)[2]
    assert torch.equal(dv, dout)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.ids)
def test_scores_on_both_sides_of_the_limit(dtype, is_causal, kernels, device, generator):
    """Rows whose maximum crosses the limit from one tile of keys to the next, upwards or from below -limit, beside rows
    that stay far within it or beyond."""
    L, S, E = 70, 150, 64
    base = round(LIMITS[dtype])  # as 128 a + b, both in few bits
    q, k, v, dout = (torch.randn(1, 1, n, E, generator=generator) / 64 for n in (L, S, S, L))
    k[..., 0], k[..., 1] = base // 128, base % 128 + torch.randint(-24, 24, (S,), generator=generator) / 8
    k[..., 64:100, 1] += 2.0
    factor = torch.tensor([1.0, -1.0, 1 / 128, 2.0])[torch.arange(L) % 4]
    q[..., 0], q[..., 1] = 128 * factor, factor
    q, k, v, dout = (x.to(device, dtype) for x in (q, k, v * 64, dout * 64))
    out, lse = kernels.attention_fwd(q, k, v, is_causal, 1.0)
    found = out, *kernels.attention_bwd(dout, None, q, k, v, out, lse, is_causal, 1.0, [True] * 3)[:3]

    q, k, v, dout = (x[0, 0].cpu().double() for x in (q, k, v, dout))
    hidden = torch.ones(L, S).triu(1).bool() if is_causal else torch.zeros(L, S).bool()
    p = torch.softmax((q @ k.T).masked_fill(hidden, -math.inf), -1)
    dp = dout @ v.T
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    terms = p * (dp.abs() + ((p @ v) * dout).abs().sum(-1, keepdim=True))  # what their rounding is relative to
    want = {"out": (p @ v, p @ v.abs()), "dq": (ds @ k, terms @ k.abs()), "dk": (ds.T @ q, terms.T @ q.abs()),
            "dv": (p.T @ dout, p.T @ dout.abs())}  # fmt: skip
    for (name, (exact, size)), ours in zip(want.items(), found, strict=True):
        wrong = (ours[0, 0].cpu().double() - exact).abs() / (size + torch.finfo(dtype).tiny)
        # Four roundings of eps / 2: p or ds, out (delta is computed from it), the result, p's exponent at the limit.
        assert wrong.max() <= 2 * torch.finfo(dtype).eps, f"{name}: {wrong.max() / torch.finfo(dtype).eps:.2f} eps"


def assert_same_kinds(op, args, grads, backend, where):
    """NaN and infinities are where PyTorch has them, in this dtype or (its float32 gelu(inf) is NaN) in float64."""
    with pygpt.backend(backend):
        ours, theirs = (verify.directions(op, f, args, grads) for f in (verify.SPECS[op].call, verify.eager(op)))
    wide = [[a.double() if verify._is_floating(a) else a for a in group] for group in (args, grads)]
    wide = verify.directions(op, verify.eager(op), *wide)
    for key, want in theirs.items():
        # in a gradient, where infinities meet to make NaN is a matter of the order of its sums
        exactly = (torch.isnan, torch.isposinf) if key in verify.SPECS[op].outputs else ()
        for kind in (torch.isfinite, *exactly):
            wrong = (kind(ours[key]) != kind(want)) & (kind(ours[key]) != kind(wide[key]))
            assert not wrong.any(), (
                f"{kind.__name__}({key}), {where}: at {wrong.sum()} of {want.numel()}, "
                f"such as {ours[key][wrong][0]} where PyTorch has {want[wrong][0]}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "op, dims",
    [v for v in (*cases.variants(cases.TYPICAL), *cases.FEW.items()) if v[0] != "attention_lse"],
    ids=cases.ids,
)
def test_nan_and_inf_go_where_pytorchs_go(op, dims, value, dtype, compiled, device, generator):
    dims = {
        **dims,
        **{key: free for key, free in (("causal", 0), ("right", -1)) if key in dims},
    }  # hidden keys are skipped
    args, grads = verify.draw(op, dims, dtype, generator, device=device)
    for at in (i for i, a in enumerate(args) if verify._is_floating(a)):
        spoilt = [a.clone() if i == at else a for i, a in enumerate(args)]
        one = spoilt[at].view(-1)[torch.randint(spoilt[at].numel(), (), generator=generator)]
        one.copy_(cases.fullest_nan(one.dtype) if math.isnan(value) else torch.tensor(value, dtype=one.dtype))
        assert_same_kinds(op, spoilt, grads, compiled, f"{value} in argument {at}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("L, S", [(3, 300), (70, 85), (71, 85)])
def test_an_infinite_key_that_no_query_sees(L, S, dtype, compiled, device, generator):
    """Its gradient is 0, whatever fills up the last tile of queries."""
    dims = {"B": 1, "H": 2, "L": L, "S": S, "E": 24}
    (q, k, *rest), grads = verify.draw("attention", dims, dtype, generator, device=device)
    q[..., 0].abs_()
    k[:, :, S // 2, 0] = -torch.inf
    assert_same_kinds("attention", (q, k, *rest), grads, compiled, "an infinite key")


SUBSET = """
import sys, torch, cases, pygpt
from pygpt import _C, verify
assert _C.cpu_capability() == sys.argv[1], (_C.cpu_capability(), sys.argv[1])
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(int(sys.argv[2]))
shapes = [*cases.variants(cases.TYPICAL), *cases.FEW.items()]
shapes += [(op, dims) for op in cases.OPTIONS for dims in cases.CASES[op]]
shapes += [("attention", {"L": 65, "S": 65, "E": E, "causal": 1}) for E in (1, 64, 80, 256)]
shapes += [("linear", {"M": M, "K": 257, "N": N}) for M, N in ((1, 129), (65, 7), (130, 131))]
failed = [
    row
    for op, dims in shapes
    for dtype in cases.DTYPES
    for row in verify.measure(op, dims, dtype, generator, "cpp")
    if not row.passed
]
if failed:
    sys.exit("\\n".join(map(str, failed)))
import pytest
sys.exit(pytest.main(["-q", "-k", "cpp", "-p", "no:cacheprovider", *sys.argv[3:]]))
"""


def in_capability(run_python, name, seed):
    tests = Path(__file__).with_name("test_activation.py"), f"{__file__}::test_a_gate_in_every_binade"
    return run_python(SUBSET, name, str(seed), *map(str, tests), PYGPT_CPU_CAPABILITY=name)


@pytest.mark.parametrize("name", [name for name in _C.cpu_capabilities() if name != _C.cpu_capability()])
def test_the_other_instruction_sets(name, run_python, seed):
    """All that this machine has but the one that every test uses."""
    done = in_capability(run_python, name, seed)
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]


def test_the_baseline_is_always_there():
    assert "baseline" in _C.cpu_capabilities() and _C.cpu_capability() in _C.cpu_capabilities()


def test_unknown_instruction_set_is_refused(run_python, seed):
    done = in_capability(run_python, "avx9000", seed)
    assert done.returncode != 0 and "avx9000" in done.stderr and "baseline" in done.stderr
