"""rope and nn.RotaryEmbedding: the meaning, the memory order and the errors of their arguments."""

import copy
import io
import re

import cases
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import nn
from pygpt.dispatch import TABLE
from pygpt.functional import rope, scaled_dot_product_attention

GPU_SHARE = {"triton": 1, "cuda": 1}  # see conftest
B, HQ, HKV, T, D, R = 2, 4, 2, 5, 12, 8


def heads(H=HQ, dtype=torch.float32, length=T, width=D):
    return torch.randn(B, H, length, width).to(dtype)


def tables(*shape, dtype=torch.float32):
    angles = torch.randn(*shape, R // 2, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def by_complex_numbers(x, cos, sin, weight=None, eps=1e-6, interleaved=False):
    """In float64: a pair is a complex number, which the rotation multiplies by cos + i sin."""
    x, table = x.double(), torch.complex(cos.double(), sin.double())
    if weight is not None:
        x = F.rms_norm(x, x.shape[-1:], weight.double(), eps)
    half = table.shape[-1]
    pairs = x[..., : 2 * half]
    pairs = pairs.unflatten(-1, (half, 2)) if interleaved else pairs.unflatten(-1, (2, half)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * (table if table.dim() == 2 else table[:, None])
    turned = torch.view_as_real(turned)
    turned = turned if interleaved else turned.mT
    return torch.cat((turned.flatten(-2), x[..., 2 * half :]), -1)


def assert_near(found, want):
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), want, rtol=4 * eps, atol=8 * eps)


# ------------------------------------------------------------------------------- meaning
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=cases.ids)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("weights", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("per_batch", [False, True])
def test_is_a_product_of_complex_numbers(per_batch, weights, interleaved, dtype, backend):
    q, k = heads(HQ, dtype), heads(HKV, dtype)
    cos, sin = tables(*((B, T) if per_batch else (T,)))
    wq, wk = (torch.randn(D) if given else None for given in weights)
    with pygpt.backend(backend):
        found = rope(q, k, cos, sin, q_weight=wq, k_weight=wk, interleaved=interleaved)
    for y, x, w in zip(found, (q, k), (wq, wk), strict=True):
        assert y.dtype == dtype
        assert_near(y, by_complex_numbers(x, cos, sin, w, interleaved=interleaved))


@pytest.mark.parametrize("eps", [1e-6, 0.1, 1])
def test_eps(eps, backend):
    q, w, (cos, sin) = heads() * 0.1, torch.randn(D), tables(T)
    with pygpt.backend(backend):
        assert_near(rope(q, None, cos, sin, q_weight=w, eps=eps)[0], by_complex_numbers(q, cos, sin, w, eps))


@pytest.mark.parametrize("gradient", [False, True])
def test_without_keys(gradient, backend):
    q, (cos, sin) = heads(), tables(T)
    with pygpt.backend(backend):
        for _ in range(2):  # also when a call like it has been served
            alone, none = rope(q.requires_grad_(gradient), None, cos, sin)
            assert none is None and torch.equal(alone, rope(q, heads(HKV), cos, sin)[0])
    if gradient:
        alone.sum().backward()
        assert q.grad.shape == q.shape


def test_scores_depend_on_the_distance_alone(backend):
    """What the embedding is for (Su et al. 2021): rotated q at position m and k at n have a product of m - n."""
    embedding = nn.RotaryEmbedding(D)
    q, k = (torch.randn(1, 1, 1, D).expand(1, 1, 30, D).contiguous() for _ in range(2))
    with pygpt.backend(backend):
        q, k = embedding(q, k)
    scores = (q @ k.mT)[0, 0]
    for distance in (-7, 0, 3):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(T,), (1, T), (B, T)], ids=str)
@pytest.mark.parametrize("per_batch", [False, True])
def test_position_ids_select_rows(per_batch, shape, dtype, backend):
    q, k, rows = heads().requires_grad_(), heads(HKV), 9
    cos, sin = tables(*((B, rows) if per_batch else (rows,)))
    ids = torch.randint(rows, shape)
    index = ids.expand(B, T)[..., None].expand(B, T, R // 2)
    selected = [t.expand(B, rows, R // 2).gather(1, index) for t in (cos, sin)]
    with pygpt.backend(backend):
        for _ in range(2):
            found, want = rope(q, k, cos, sin, position_ids=ids.to(dtype)), rope(q, k, *selected)
            assert all(map(torch.equal, found, want))
            assert torch.equal(*(torch.autograd.grad(y[0].square().sum(), q)[0] for y in (found, want)))


@pytest.mark.parametrize("wrong", [-1, 9, -(2**40), 2**40])
def test_positions_out_of_range_raise_on_a_cpu(wrong):
    q, (cos, sin) = heads(), tables(9)
    ids = torch.arange(T)
    rope(q, None, cos, sin, position_ids=ids)
    for shape in ((T,), (B, T)):
        bad = ids.expand(shape).clone()
        bad.view(-1)[-1] = wrong
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"pygpt.rope: position_ids must be from 0 to 8, got {wrong}"):
                rope(q, None, cos, sin, position_ids=bad)
        with pytest.raises(RuntimeError, match=rf"rope_fwd: position_ids must be from 0 to 8, got {wrong}"):
            torch.ops.pygpt.rope_fwd(q, None, cos, sin, None, None, bad, 1e-6, False)
        with pytest.raises(RuntimeError, match=rf"rope_bwd: position_ids must be from 0 to 8, got {wrong}"):
            torch.ops.pygpt.rope_bwd(
                q, None, None, None, cos, sin, None, None, None, None, bad, False, [True, False, False, False]
            )
    rope(q, None, cos, sin, position_ids=ids)


@pytest.mark.parametrize("name", ["triton", "cuda", "torch"])
@pytest.mark.parametrize("norm", [False, True])
def test_positions_out_of_range_are_nan_on_a_gpu(norm, name, request):
    """Nothing is read out of bounds: the tables lie in the middle of zeros."""
    if name == "cuda" and not torch.cuda.is_available():
        request.getfixturevalue("emulated")()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels, q = TABLE[name].kernels, heads().to(device)
    cos, sin = (t.to(device) for t in tables(9))
    cos, sin = (torch.nn.functional.pad(t, (0, 0, 5, 5))[5:-5] for t in (cos, sin))
    ids, bad = torch.tensor([3, -1, 0, 9, 8], device=device), [1, 3]
    w = torch.rand(D, device=device) if norm else None
    out, _, rstd, _ = kernels.rope_fwd(q, None, cos, sin, w, None, ids, 1e-6, False)
    saved = (q, None, cos, sin, w, None, rstd, None) if norm else (None, None, cos, sin, *(None,) * 4)
    needs = [True, False, norm, False]
    dq = kernels.rope_bwd(torch.ones_like(out), None, *saved, ids, False, needs)[0]
    for t in (out, dq):
        rotated = t[..., :R].isnan()
        assert rotated[:, :, bad].all() and not t[:, :, [0, 2, 4]].isnan().any()


def test_channels_that_are_not_rotated_keep_their_values(backend, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, (cos, sin) = heads(dtype=dtype), tables(T)
        q[..., -3:] = torch.stack((cases.fullest_nan(dtype), *torch.tensor([torch.inf, -0.0]).to(dtype)))
        with pygpt.backend(backend):
            y, _ = rope(q.to(device), None, cos.to(device), sin.to(device))
        torch.testing.assert_close(y[..., R:], q[..., R:].to(device), rtol=0, atol=0, equal_nan=True)
        assert y[..., -1].signbit().all()


# ------------------------------------------------------------------------------- gradients
def test_tables_are_constants(backend):
    q, k = heads().requires_grad_(), heads(HKV)
    cos, sin = (t.requires_grad_() for t in tables(T))
    with pygpt.backend(backend):
        q_out, k_out = rope(q, k, cos, sin)
        (q_out.square().sum() + k_out.square().sum()).backward()
    assert cos.grad is None and sin.grad is None and q.grad is not None


def saved_by(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = call()
    return kept, results


def test_backward_keeps_heads_only_for_a_norm(compiled):
    q, k, w = heads().requires_grad_(), heads(HKV).requires_grad_(), torch.rand(D, requires_grad=True)
    cos, sin = tables(T)
    with pygpt.backend(compiled):
        for weights, want in (({}, []), ({"q_weight": w}, [q.shape]), ({"k_weight": w}, [k.shape])):
            kept, _ = saved_by(lambda weights=weights: rope(q, k, cos, sin, **weights))
            assert [t.shape for t in kept if t.dim() == 4] == want


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("norm", [False, True])
def test_one_result_used(norm, used, create_graph, backend):
    dtype = torch.float64 if torch.float64 in TABLE[backend].dtypes else torch.float32
    q, k = heads(dtype=dtype).requires_grad_(), heads(HKV, dtype).requires_grad_()
    cos, sin = tables(T, dtype=dtype)
    weights = [torch.rand(D, dtype=dtype, requires_grad=True) for _ in range(2 * norm)]
    named = dict(zip(("q_weight", "k_weight"), weights, strict=False))
    leaves = [q, k, *weights]

    def gradients(name):
        with pygpt.backend(name):
            y = rope(q, k, cos, sin, **named)[used]
            return torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=create_graph, allow_unused=True)

    for i, (found, want) in enumerate(zip(gradients(backend), gradients("torch"), strict=True)):
        assert (found is None) == (i % 2 != used)
        if found is not None:
            tolerance = 64 * torch.finfo(dtype).eps * want.abs().max().item()
            torch.testing.assert_close(found, want, rtol=0, atol=tolerance)


def test_weights_in_16_bits(backend):
    """Their gradients are summed in float32 and rounded once."""
    q, (cos, sin) = heads(dtype=torch.bfloat16), tables(T)
    narrow = torch.rand(D).bfloat16().requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    with pygpt.backend(backend):
        results = [rope(q, None, cos, sin, q_weight=w)[0] for w in (narrow, wide)]
    assert torch.equal(*results)
    for y in results:
        y.square().sum().backward()
    assert narrow.grad.dtype == torch.bfloat16 and torch.equal(narrow.grad, wide.grad.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.ids)
def test_autocast_changes_no_dtype(dtype, backend):
    """A model under autocast has float32 weights beside bfloat16 heads."""
    q, w, (cos, sin) = heads(dtype=dtype), torch.rand(D), tables(T)
    with pygpt.backend(backend):
        want = rope(q, q, cos, sin, q_weight=w)
        with torch.autocast("cpu", torch.bfloat16):
            found = rope(q, q, cos, sin, q_weight=w)
    assert all(y.dtype == dtype for y in found) and all(map(torch.equal, found, want))


# ------------------------------------------------------------------------------- memory
def packed(dtype=torch.float32):
    """q and k as views of one projection."""
    qkv = torch.randn(B, T, (HQ + 2 * HKV) * D).to(dtype)
    q, k, _ = (t.view(B, T, -1, D).transpose(1, 2) for t in qkv.split([HQ * D, HKV * D, HKV * D], -1))
    return q, k


LAYOUTS = {
    "packed": packed,
    "heads first": lambda: (heads(), heads(HKV)),
    "positions outside": lambda: (
        torch.randn(T, B, HQ, D).permute(1, 2, 0, 3),
        torch.randn(T, HKV, B, D).permute(2, 1, 0, 3),
    ),
    "channels cut": lambda: (heads(width=D + 3)[..., 1 : D + 1], heads(HKV, width=2 * D)[..., D:]),
    "expanded": lambda: (heads()[:1].expand(B, -1, -1, -1), heads(HKV)[:, :1].expand(-1, HKV, -1, -1)),
    "channels strided": lambda: (heads(width=2 * D)[..., ::2], heads(HKV).mT.contiguous().mT),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("norm", [False, True])
def test_memory_orders(norm, name, kernels, device):
    """Results are laid out as attention's are for such a query, gradients as what comes in."""
    q, k = (t.to(device) if device != "cpu" else t for t in LAYOUTS[name]())
    cos, sin = (t.to(device) for t in tables(T))
    w = torch.rand(D, device=device) if norm else None
    *outs, q_rstd, k_rstd = kernels.rope_fwd(q, k, cos, sin, w, w, None, 1e-6, False)
    dense = kernels.rope_fwd(q.contiguous(), k.contiguous(), cos, sin, w, w, None, 1e-6, False)
    for y, x, want in zip(outs, (q, k), dense, strict=False):
        assert cases.layout_of(y) == cases.layout_of(F.scaled_dot_product_attention(x.cpu(), x.cpu(), x.cpu()))
        torch.testing.assert_close(y, want)
    saved = (q, k, cos, sin, w, w, q_rstd, k_rstd) if norm else (None, None, cos, sin, *[None] * 4)
    needs = [True, True, norm, norm]
    found, want = (
        kernels.rope_bwd(*dy, *saved, None, False, needs) for dy in ((q, k), (q.contiguous(), k.contiguous()))
    )
    for g, h, x in zip(found, want, (q, k), strict=False):
        assert cases.layout_of(g) == cases.layout_of(F.scaled_dot_product_attention(x.cpu(), x.cpu(), x.cpu()))
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("name", LAYOUTS)
def test_heads_are_not_copied(name):
    q, k = LAYOUTS[name]()
    cos, sin = tables(T)
    with torch.profiler.profile() as profile:
        torch.ops.pygpt.rope_fwd(q, k, cos, sin, None, None, None, 1e-6, False)
        torch.ops.pygpt.rope_bwd(q, k, None, None, cos, sin, *[None] * 5, False, [True, True, False, False])
    copied = [event.name for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]
    assert bool(copied) == (name == "channels strided")


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=cases.ids)
def test_tables_of_any_strides(layout, backend):
    q, rows = heads(), 9
    cos, sin, ids = *tables(B, rows), torch.randint(rows, (B, T))
    with pygpt.backend(backend):
        for given in ((layout(cos), layout(sin), None), (layout(cos), layout(sin), ids.mT.contiguous().mT)):
            cos_, sin_, some = given
            if some is None:
                cos_, sin_ = cos_[:, :T], sin_[:, :T]
            want = rope(q, None, cos_.contiguous(), sin_.contiguous(), position_ids=ids if some is not None else None)
            assert torch.equal(rope(q, None, cos_, sin_, position_ids=some)[0], want[0])


def test_attention_reads_the_result_where_it_is():
    """From a packed projection to attention's output: one allocation each for q, k and out."""
    (q, k), (cos, sin) = packed(), tables(T)
    q_out, k_out = rope(q, k, cos, sin)
    out = scaled_dot_product_attention(q_out, k_out, k_out, enable_gqa=True)
    assert all(t.transpose(1, 2).is_contiguous() for t in (q_out, k_out, out))


# ------------------------------------------------------------------------------- errors
Q, COS = torch.zeros(B, HQ, T, D), torch.zeros(T, R // 2)
K, W, IDS = Q[:, :HKV], torch.zeros(D), torch.zeros(T, dtype=torch.int64)
BAD = [
    ((None, K, COS, COS), {}, TypeError, "q must be a Tensor.*NoneType"),
    ((Q[0], K, COS, COS), {}, ValueError, r"q must have shape \(B, H, T, D\), got \(4, 5, 12\)"),
    ((Q.int(), K, COS, COS), {}, TypeError, "q must be floating point.*int32"),
    ((Q, K.double(), COS, COS), {}, TypeError, "k is torch.float64, q is torch.float32"),
    ((Q, K[:, :, :4], COS, COS), {}, ValueError, r"k must have shape \(2, H, 5, 12\), got \(2, 2, 4, 12\)"),
    ((Q, K[..., :8], COS, COS), {}, ValueError, r"k must have shape \(2, H, 5, 12\), got \(2, 2, 5, 8\)"),
    ((Q, K[:1], COS, COS), {}, ValueError, r"k must have shape \(2, H, 5, 12\), got \(1, 2, 5, 12\)"),
    ((Q, K, COS[:4], COS[:4]), {}, ValueError, r"cos must be \(5, R/2\).*got \(4, 4\)"),
    ((Q, K, COS.repeat(1, 2), COS), {}, ValueError, r"cos must be .*R <= 12, got \(5, 8\)"),
    ((Q, K, COS.expand(3, T, 4), COS), {}, ValueError, r"cos must be .*got \(3, 5, 4\)"),
    ((Q, K, COS[0], COS), {}, ValueError, r"cos must be .*got \(4,\)"),
    ((Q, K, COS, COS[:, :3]), {}, ValueError, r"cos has shape \(5, 4\), sin \(5, 3\)"),
    ((Q, K, COS, COS.double()), {}, TypeError, "sin must be torch.float32 for q of torch.float32, got torch.float64"),
    ((Q.bfloat16(), None, COS.bfloat16(), COS), {}, TypeError, "cos must be torch.float32.*got torch.bfloat16"),
    ((Q.double(), None, COS, COS), {}, TypeError, "cos must be torch.float64.*got torch.float32"),
    ((Q, K, COS.to("meta"), COS), {}, ValueError, "cos is on meta"),
    ((Q, K, COS, COS), {"q_weight": W[1:]}, ValueError, r"q_weight must have shape \(12,\), got \(11,\)"),
    ((Q, K, COS, COS), {"k_weight": W[None]}, ValueError, r"k_weight must have shape \(12,\), got \(1, 12\)"),
    ((Q, K, COS, COS), {"k_weight": W.int()}, TypeError, "k_weight must be floating point.*int32"),
    ((Q, K, COS, COS), {"k_weight": 1.0}, TypeError, "k_weight must be a Tensor.*float"),
    ((Q, None, COS, COS), {"k_weight": W}, ValueError, "k_weight is given, but k is None"),
    ((Q, K, COS, COS), {"eps": "1"}, TypeError, "eps must be a number, got str"),
    ((Q, K, COS, COS), {"interleaved": 1}, TypeError, "interleaved must be a bool, got int"),
    ((Q, K, COS, COS), {"position_ids": 3}, TypeError, "position_ids must be a Tensor, got int"),
    ((Q, K, COS, COS), {"position_ids": IDS.float()}, TypeError, "position_ids must be integers, got torch.float32"),
    (
        (Q, K, COS, COS),
        {"position_ids": IDS[1:]},
        ValueError,
        r"position_ids must have shape \(5,\) or \(2, 5\).*\(4,\)",
    ),
    ((Q, K, COS, COS), {"position_ids": IDS.expand(3, T)}, ValueError, r"position_ids must have shape .*\(3, 5\)"),
    ((Q, K, COS, COS), {"position_ids": IDS.to("meta")}, ValueError, "position_ids is on meta, q on cpu"),
    ((Q, K, COS, COS), {"position_ids": IDS + 5}, ValueError, "position_ids must be from 0 to 4, got 5"),
]


@pytest.mark.parametrize("args, options, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_arguments(args, options, error, message, backend):
    with pygpt.backend(backend):
        rope(Q, K, COS, COS, q_weight=W, position_ids=IDS)
        for _ in range(2):
            with pytest.raises(error, match=f"pygpt.rope: {message}"):
                rope(*args, **options)


# ------------------------------------------------------------------------------- nn.RotaryEmbedding
def test_module_is_the_function(backend):
    for options in ({}, {"rotary_dim": R}, {"base": 500.0, "interleaved": True}):
        m = nn.RotaryEmbedding(D, max_positions=20, **options)
        q, k, rotary, base = heads(), heads(HKV), options.get("rotary_dim", D), options.get("base", 10000.0)
        angles = torch.arange(20).double()[:, None] / base ** (torch.arange(0, rotary, 2).double() / rotary)
        with pygpt.backend(backend):
            found = {first: m(q, k, first) for first in (None, 3, torch.arange(3, 3 + T), torch.arange(T).expand(B, T))}
        for first, outs in found.items():
            start = 3 if isinstance(first, int) or (first is not None and first.dim() == 1) else 0
            rows = angles[start : start + T]
            for y, x in zip(outs, (q, k), strict=True):
                assert_near(y, by_complex_numbers(x, rows.cos(), rows.sin(), interleaved=m.interleaved))


def test_module_normalises():
    m, q, k, w = nn.RotaryEmbedding(D), heads(), heads(HKV), torch.rand(D)
    found = m(q, k, q_weight=w, eps=0.1)
    assert all(map(torch.equal, found, rope(q, k, m.cos[:T], m.sin[:T], q_weight=w, eps=0.1)))


CONVERSIONS = {
    "bfloat16": lambda m: m.to(torch.bfloat16), "half": lambda m: m.half(), "double": lambda m: m.double(),
    "there and back": lambda m: m.bfloat16().float(), "meta": lambda m: m.to("meta").to_empty(device="cpu"),
    "copy": lambda m: copy.deepcopy(m).bfloat16(), "shared": lambda m: m.share_memory(),
    "pickled": lambda m: pickled(m.bfloat16()),
}  # fmt: skip


def pickled(m):
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_tables_keep_their_precision(name):
    want = nn.RotaryEmbedding(D, max_positions=3000)
    model = CONVERSIONS[name](torch.nn.Sequential(nn.RotaryEmbedding(D, max_positions=3000), torch.nn.Linear(2, 2)))
    for table in ("cos", "sin"):
        found = getattr(model[0], table)
        assert found.dtype == torch.float32 and torch.equal(found, getattr(want, table))
    assert not model[0].state_dict() and not list(model[0].parameters())
    q = heads(dtype=torch.bfloat16)
    assert torch.equal(model[0](q, None)[0], want(q, None)[0])
    for dtype in cases.DTYPES:
        assert all(y.dtype == dtype for y in model[0](heads(dtype=dtype), heads(HKV, dtype)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: nn.RotaryEmbedding(8, 10), "rotary_dim must be even and from 0 to head_dim 8, got 10"),
        (lambda: nn.RotaryEmbedding(8, 3), "rotary_dim must be even.*got 3"),
        (lambda: nn.RotaryEmbedding(8, max_positions=-1), "max_positions must not be negative, got -1"),
        (lambda: nn.RotaryEmbedding(D, max_positions=9)(heads(), None, 5), "positions 5 to 9, tables for 9"),
        (lambda: nn.RotaryEmbedding(D, max_positions=9)(heads(), None, -1), "positions -1 to 3, tables for 9"),
    ],
    ids=range(5),
)
def test_errors_of_the_module(call, message):
    with pytest.raises(ValueError, match=f"pygpt.nn.RotaryEmbedding: {message}"):
        call()


@pytest.mark.parametrize("first", [0, 3])
def test_module_compiles(first):
    m, q, k = nn.RotaryEmbedding(D), heads(), heads(HKV)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(q, k, first), m(q, k, first)))
    ids = torch.arange(first, first + T)
    assert all(map(torch.equal, compiled(q, k, ids), m(q, k, ids)))


def test_module_prints_its_sizes():
    assert re.search(r"head_dim=12, rotary_dim=8, base=10000.0", repr(nn.RotaryEmbedding(D, R)))
