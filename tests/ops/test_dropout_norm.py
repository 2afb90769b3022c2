"""dropout_add_layer_norm, dropout_add_rms_norm and weight_offset on every backend."""

import itertools

import cases
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import pygpt
from pygpt.dispatch import REFERENCE
from pygpt.functional import (
    add_layer_norm,
    add_rms_norm,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    rms_norm,
)
from tests.ops.attention_by_hand import kept

GPU_SHARE = {"triton": 3, "cuda": 2}  # see conftest
pytestmark = pytest.mark.usefixtures("poisoned_memory")
OPS = "dropout_add_layer_norm", "dropout_add_rms_norm"
EITHER = pytest.mark.parametrize("function", [dropout_add_layer_norm, dropout_add_rms_norm], ids=cases.ids)
DTYPES = [(d, d) for d in cases.DTYPES] + [(d, torch.float32) for d in (torch.bfloat16, torch.float16)]


def forward(kernels, op, x, residual, weight, *dropout):
    layer = op == "dropout_add_layer_norm"
    args = (weight, None, 1e-5) if layer else (weight, 1e-5)
    return getattr(kernels, f"{op}_fwd")(x, residual, *args, *dropout, *(() if layer else (0.0,)))


def backward(kernels, op, dy, ds, s, weight, statistics, *dropout):
    layer = op == "dropout_add_layer_norm"
    needs, offset = ([True, True, False, False], ()) if layer else ([True, True, False], (0.0,))
    return getattr(kernels, f"{op}_bwd")(dy, ds, s, weight, *statistics, needs, *dropout, *offset)


# ------------------------------------------------------------------------------- dropout's bits
@pytest.mark.parametrize("dtype, of_sum", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("shape", [(7, 61), (3, 2, 72), (2, 9001)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_which_elements_are_dropped(op, shape, dtype, of_sum, backend, device, seed, kernels):
    """Forward and backward drop the same ones, those of the contract, in every kernel."""
    p = (0.1, 0.5, 0.9)[seed % 3]
    key = int.from_bytes(seed.to_bytes(4, "little") * 2, "little", signed=True)
    dropout = torch.tensor([key], device=device), p
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    rows = ones[..., 0].numel()
    want = kept(key, p, 1, 1, rows, shape[-1])[0, 0].view(shape)
    factors = want.double() * (1 / (1 - p))
    _, s, *statistics = forward(kernels, op, ones.to(dtype), zeros.to(of_sum), None, *dropout)
    assert s.dtype == of_sum and torch.equal(s.cpu(), factors.to(of_sum))
    dx, dresidual, *_ = backward(kernels, op, zeros.to(dtype), ones.to(of_sum), s, None, statistics, *dropout)
    assert dx.dtype == dtype and torch.equal(dx.cpu(), factors.to(dtype))
    assert torch.equal(dresidual.cpu(), ones.cpu().to(of_sum))


@pytest.mark.parametrize("dtype, of_sum", DTYPES[1:], ids=cases.ids)
@pytest.mark.parametrize("op", OPS)
def test_the_sum_has_the_same_bits_on_every_backend(op, dtype, of_sum, compiled, device, kernels_of, generator):
    x, residual = torch.randn(2, 5, 77, generator=generator).to(device)
    x, residual, dropout = x.to(dtype), residual.to(of_sum), (torch.tensor([7], device=device), 0.3)
    found = forward(kernels_of, op, x, residual, None, *dropout)[1]
    assert torch.equal(found, forward(REFERENCE, op, x, residual, None, *dropout)[1])


@EITHER
@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_the_share_that_is_kept(p, function, backend, device):
    """Within five standard deviations, over all elements and over those of each word of the generator."""
    x = torch.ones(128, 256, device=device)
    with pygpt.backend(backend):
        seen = function(x, x * 0, 256, p=p)[1] != 0
    for part in (seen, *(seen[:, word::4] for word in range(4)), seen[::2], seen[0], seen[:, 1]):
        deviation = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(part.double().mean().item() - (1 - p)) < 5 * deviation


@EITHER
def test_dropout_follows_manual_seed(function, backend, device):
    x, residual = torch.randn(2, 20, 8, device=device)
    with pygpt.backend(backend):
        torch.manual_seed(3)
        first = function(x, residual, 8, p=0.5)
        state = torch.get_rng_state()
        for nothing in ({}, {"p": 0.5, "training": False}):
            assert torch.equal(function(x, residual, 8, **nothing)[1], x + residual)
        pygpt.explain(function, x, residual, 8, p=0.5)
        assert torch.equal(torch.get_rng_state(), state)  # what has no dropout draws nothing
        second = function(x, residual, 8, p=0.5)
        torch.manual_seed(3)
        again = [function(x, residual, 8, p=0.5) for _ in range(2)]
        for found, want in zip(itertools.chain(*again), (*first, *second), strict=True):
            assert torch.equal(found, want)
        assert not torch.equal(first[1], second[1])
        assert torch.equal(function(x, residual, 8, p=1.0)[1], residual)


@EITHER
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_is_replayed_by_checkpoints(use_reentrant, function, compiled, device):
    inputs = [torch.randn(20, 8, device=device, requires_grad=True) for _ in range(2)]
    context = {} if use_reentrant else {"context_fn": lambda: (pygpt.backend(compiled), pygpt.backend(compiled))}

    def block(x, residual):
        return function(x, residual, 8, p=0.4)

    results = []
    for call in (block, lambda *a: checkpoint(block, *a, use_reentrant=use_reentrant, **context)):
        torch.manual_seed(5)
        with pygpt.backend(compiled):
            y, s = call(*inputs)
            results.append((y, s, *gradients(y, s, inputs)))
    for found, want in zip(*results, strict=True):
        assert torch.equal(found, want)


def gradients(y, s, inputs):
    """By backward(), as reentrant checkpoints need it."""
    for t in inputs:
        t.grad = None
    ((y * y.detach()).sum() + s.square().sum()).backward()
    return [t.grad for t in inputs]


# ------------------------------------------------------------------------------- dtypes
def widened(*wide):
    """A view that makes float32, with all of its digits, of the tensors that ``wide`` says of every so many."""
    count = itertools.count()
    return lambda t: t.float() / 3 if wide[next(count) % len(wide)] else t


MIXED = [  # op, more dims, which of x, residual, weight, (bias,) dy and ds are float32; ds follows the sum
    ("dropout_add_layer_norm", {}, (0, 1, 1, 1, 0, 0)),
    ("dropout_add_layer_norm", {}, (0, 1, 0, 0, 0, 0)),
    ("dropout_add_layer_norm", {}, (0, 0, 1, 1, 0, 0)),
    ("dropout_add_layer_norm", {"dropout": 0.0}, (0, 1, 1, 1, 0, 0)),
    ("dropout_add_layer_norm", {"affine": 0}, (0, 1, 0, 0)),
    ("dropout_add_rms_norm", {"offset": 1.0}, (0, 1, 1, 0, 0)),
    ("dropout_add_rms_norm", {"dropout": 0.0}, (0, 1, 0, 0, 0)),
    ("dropout_add_rms_norm", {"offset": 1.0}, (0, 0, 1, 0, 0)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.ids)
@pytest.mark.parametrize("M, N", [(33, 64), (5, 771), (3, 13000)])
@pytest.mark.parametrize("op, more, wide", MIXED, ids=str)
def test_float32_beside_16_bits(op, more, wide, M, N, dtype, compiled, device, generator):
    """As exact as PyTorch in the same dtypes, with rows in registers, in pieces, aligned or not."""
    cases.assert_exact(op, {"M": M, "N": N, **more}, dtype, generator, compiled, view=widened(*wide), device=device)


@pytest.mark.parametrize("op, more, wide", MIXED[:1] + MIXED[5:6], ids=str)
def test_the_fallback_in_mixed_dtypes(op, more, wide, generator):
    cases.assert_exact(op, {"M": 9, "N": 40, **more}, torch.bfloat16, generator, "torch", view=widened(*wide))


DTYPES_OF_ARGUMENTS = ["float64", "float32", "bfloat16", "float16"]


@pytest.mark.parametrize("x, residual, weight", list(itertools.product(DTYPES_OF_ARGUMENTS, repeat=3)))
def test_which_dtypes_kernels_serve(x, residual, weight):
    """And every other mixture has the promised dtypes by PyTorch."""
    wide = {"float32"} if x.endswith("16") else set()
    tensors = [
        torch.randn(n, dtype=getattr(torch, d), requires_grad=True)
        for n, d in (((3, 8), x), ((3, 8), residual), (8, weight))
    ]
    args, w = (tensors[0], tensors[1], 8), tensors[2]
    served = {residual, weight} <= {x} | wide
    for function, parameters in (
        (dropout_add_rms_norm, (w,)), (dropout_add_layer_norm, (w,)), (dropout_add_layer_norm, (None, w)),
        (dropout_add_layer_norm, (w, w)),
    ):  # fmt: skip
        assert (pygpt.explain(function, *args, *parameters).backend == "cpp") == served
        with pygpt.backend("cpp" if served else "torch"):
            y, s = function(*args, *parameters, p=0.5)
        assert (y.dtype, s.dtype) == (tensors[0].dtype, tensors[1].dtype)
        for t, g in zip(tensors, torch.autograd.grad(y.sum().double() + s.sum().double(), tensors), strict=True):
            assert g.dtype == t.dtype and g.isfinite().all()


def test_a_weight_and_a_bias_of_two_dtypes_go_to_pytorch():
    x, w = torch.randn(3, 8).bfloat16(), torch.ones(8)
    assert pygpt.explain(dropout_add_layer_norm, x, x, 8, w, w.bfloat16()).backend == "torch"
    assert dropout_add_layer_norm(x, x, 8, w, w.bfloat16())[0].dtype == torch.bfloat16


@EITHER
def test_autocast_keeps_a_float32_stream(function):
    """On a CPU, where autocast leaves norms alone: a branch in bfloat16 on a stream and parameters in float32."""
    stream, weight = torch.randn(4, 8), torch.ones(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch = pygpt.functional.linear(stream, torch.eye(8))
        assert branch.dtype == torch.bfloat16 and pygpt.explain(function, branch, stream, 8, weight).backend == "cpp"
        y, s = function(branch, stream, 8, weight)
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(s, branch.float() + stream)


# ------------------------------------------------------------------------------- without dropout
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("without", [{}, {"p": 0.5, "training": False}], ids=str)
def test_without_dropout_it_is_the_norm_of_a_sum(without, dtype, compiled, device, generator):
    """The same bits, forward and backward."""
    x, residual, w, b, dy, ds = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((5, 40), (5, 40), (40,), (40,)) + ((5, 40),) * 2
    )
    pairs = [
        (dropout_add_layer_norm, add_layer_norm, (w, b), {}),
        (dropout_add_rms_norm, add_rms_norm, (w,), {}),
        (dropout_add_rms_norm, add_rms_norm, (w,), {"weight_offset": 1.0}),
    ]
    for ours, theirs, parameters, offset in pairs:
        leaves = [t.requires_grad_() for t in (x, residual, *parameters)]
        results = []
        with pygpt.backend(compiled):
            for function, more in ((ours, without), (theirs, {})):
                outs = function(x, residual, 40, *parameters, **more, **offset)
                results.append((*outs, *torch.autograd.grad(outs, leaves, (dy, ds))))
        for found, want in zip(*results, strict=True):
            assert torch.equal(found, want)


# ------------------------------------------------------------------------------- gradients
@EITHER
@pytest.mark.parametrize("dtype, of_sum", [DTYPES[0], DTYPES[-2]], ids=cases.ids)
def test_each_result_alone_and_each_gradient_alone(function, dtype, of_sum, backend, device, generator):
    """An upstream None stays None, and what needs no gradient changes no bit of the others."""
    x, residual, w, dy = (
        torch.randn(shape, generator=generator).to(device, d)
        for shape, d in (((6, 24), dtype), ((6, 24), of_sum), ((24,), of_sum), ((6, 24), dtype))
    )

    def grads(outs, needs, upstream):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, residual, w), needs, strict=True)]
        torch.manual_seed(1)
        with pygpt.backend(backend):
            results = function(leaves[0], leaves[1], 24, leaves[2], p=0.25)
        wanted = [t for t in leaves if t.requires_grad]
        pairs = [(results[i], u) for i, u in zip(outs, upstream, strict=True) if results[i].requires_grad]
        return torch.autograd.grad([o for o, _ in pairs], wanted, [u for _, u in pairs], allow_unused=True)

    ds = torch.randn(6, 24, generator=generator).to(device, of_sum)
    full = grads((0, 1), (True,) * 3, (dy, ds))
    for needs in itertools.product((False, True), repeat=3):
        if any(needs):
            found = grads((0, 1), needs, (dy, ds))
            for g, want in zip(found, (t for t, need in zip(full, needs, strict=True) if need), strict=True):
                assert torch.equal(g, want)
    dx, dresidual, dw = grads((1,), (True,) * 3, (ds,))
    torch.manual_seed(1)
    with pygpt.backend(backend):
        factor = function(torch.ones_like(x), torch.zeros_like(residual), 24, p=0.25)[1]
    assert dw is None and torch.equal(dresidual, ds) and torch.equal(dx, (ds * factor).to(dtype))
    alone = grads((0,), (True,) * 3, (dy,))
    both = grads((0, 1), (True,) * 3, (dy, torch.zeros_like(ds)))
    assert all(map(torch.equal, alone, both))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype, of_sum", DTYPES[1:], ids=cases.ids)
def test_nan_and_infinity_go_where_pytorchs_go(dtype, of_sum, value, op, compiled, device, kernels_of):
    """A dropped infinity is NaN, in the branch, the residual and both gradients."""
    dropout = torch.tensor([3], device=device), 0.5
    x, residual, dy, ds = torch.randn(4, 6, 40).to(device)
    x[1, :2], residual[2, 3], ds[4, :8], dy[5, 1] = value, value, value, value
    x, residual, dy, ds = x.to(dtype), residual.to(of_sum), dy.to(dtype), ds.to(of_sum)
    results = []
    for k in (kernels_of, REFERENCE):
        y, s, *statistics = forward(k, op, x, residual, None, *dropout)
        results.append((y, s, *backward(k, op, dy, ds, s, None, statistics, *dropout)[:2]))
    for found, want in zip(*results, strict=True):
        assert torch.equal(found.isnan(), want.isnan()) and torch.equal(found.isinf(), want.isinf())


FLOATS = [(op, name) for op in OPS for name in ("residual", "weight", "bias", "s", "ds")]
FLOATS.remove(("dropout_add_rms_norm", "bias"))


@pytest.mark.parametrize("op, where", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.ids)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_every_nan_of_a_float32_is_one_in_16_bits(p, dtype, op, where, device, kernels_of, generator):
    """Also the one with every bit set, which a careless rounding carries on to zero."""
    of_sum, of_parameters = (dtype, torch.float32) if where in ("weight", "bias") else (torch.float32, dtype)
    names = {"x": dtype, "residual": of_sum, "weight": of_parameters, "bias": of_parameters, "dy": dtype, "ds": of_sum}
    t = {
        name: torch.randn(77 if name in ("weight", "bias") else (6, 77), generator=generator).to(device, d)
        for name, d in names.items()
    }
    dropout = torch.tensor([3], device=device) if p else None, p
    layer = op == "dropout_add_layer_norm"

    def poison(name, tensor):
        if name == where:
            for column in (0, 5, 76):
                tensor.view(-1, 77)[-1, column] = cases.fullest_nan(tensor.dtype)

    for name, tensor in t.items():
        poison(name, tensor)
    results = []
    for k in (kernels_of, REFERENCE):
        parameters, offset = (t["weight"], t["bias"]) if layer else (t["weight"],), () if layer else (1.0,)
        y, s, *statistics = getattr(k, f"{op}_fwd")(t["x"], t["residual"], *parameters, 1e-5, *dropout, *offset)
        poison("s", s)
        inputs = t["dy"], t["ds"], s, t["weight"], *statistics
        needs = [True] * (4 if layer else 3)
        results.append((y, s, *getattr(k, f"{op}_bwd")(*inputs, needs, *dropout, *offset)))
    assert any(r.isnan().any() for r in results[1])
    for found, want in zip(*results, strict=True):
        assert torch.equal(found.isnan(), want.isnan())


# ------------------------------------------------------------------------------- the offset of a weight
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_an_offset_is_added_before_the_weight_is_rounded(dtype, backend, device):
    """The error is that of one rounding of the result, and of a few in float32."""
    x, weight = torch.randn(40, 200, dtype=torch.float64).to(dtype), (torch.randn(200) / 30).to(dtype)
    want = F.rms_norm(x.double(), (200,), None, 1e-6) * (1 + weight.double())
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    size = want.abs().clamp_min(torch.finfo(dtype).smallest_normal)
    allowed = size * (torch.finfo(dtype).eps / 2 + 8 * torch.finfo(accumulator).eps)
    x, weight = x.to(device), weight.to(device)
    with pygpt.backend(backend):
        y = rms_norm(x, 200, weight, 1e-6, weight_offset=1.0)
        assert ((y.double().cpu() - want).abs() <= allowed).all()
        found, s = add_rms_norm(x, x * 0, 200, weight, 1e-6, weight_offset=1.0)
        assert torch.equal(found, y) and torch.equal(s, x)


@pytest.mark.parametrize("offset", [1.0, -0.5, 1])
def test_an_offset_is_part_of_the_weight(offset, backend, device, generator):
    x, residual, w, dy, ds = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, torch.float32).requires_grad_()
        for shape in ((6, 40), (6, 40), (40,), (6, 40), (6, 40))
    )
    with pygpt.backend(backend):
        found = (
            rms_norm(x, 40, w, 1e-6, weight_offset=offset),
            *add_rms_norm(x, residual, 40, w, 1e-6, weight_offset=offset),
        )
        want = F.rms_norm(x, (40,), w + offset, 1e-6), F.rms_norm(x + residual, (40,), w + offset, 1e-6), x + residual
        grads = [torch.autograd.grad(outs, (x, residual, w), (dy, ds, dy)) for outs in (found, want)]
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_an_offset_follows_the_memory_format(backend):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    with pygpt.backend(backend):
        y = rms_norm(x, 5, torch.ones(5), weight_offset=1.0)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, 2 * F.rms_norm(x, (5,)))


# ------------------------------------------------------------------------------- errors
def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


X = zeros(2, 4)
BAD = [
    (dropout_add_layer_norm, (None, X, 4), {}, TypeError, "input must be a Tensor.*NoneType"),
    (dropout_add_layer_norm, (X, None, 4), {}, TypeError, "residual must be a Tensor.*NoneType"),
    (dropout_add_rms_norm, (X, None, 4), {}, TypeError, "residual must be a Tensor.*NoneType"),
    (dropout_add_layer_norm, (X.int(), X, 4), {}, TypeError, "input must be floating point.*int32"),
    (dropout_add_rms_norm, (X, X.int(), 4), {}, TypeError, "residual must be floating point.*int32"),
    (dropout_add_layer_norm, (X, zeros(4), 4), {}, ValueError, r"residual must have shape \(2, 4\).*\(4,\)"),
    (dropout_add_layer_norm, (X, X, 5), {}, ValueError, r"normalized_shape \(5,\)"),
    (dropout_add_rms_norm, (X, X, 4, zeros(2)), {}, ValueError, r"weight must have shape \(4,\).*\(2,\)"),
    (dropout_add_layer_norm, (X, X, 4, None, zeros(2)), {}, ValueError, r"bias must have shape \(4,\).*\(2,\)"),
    (dropout_add_layer_norm, (X, X, 4, None, None, None), {}, TypeError, "eps must be a number, got NoneType"),
    (dropout_add_layer_norm, (X, X, 4), {"p": 1.5}, ValueError, r"p must be in \[0, 1\], got 1.5"),
    (dropout_add_layer_norm, (X, X, 4), {"p": float("nan")}, ValueError, r"p must be in \[0, 1\], got nan"),
    (dropout_add_rms_norm, (X, X, 4), {"p": "0.1"}, TypeError, "p must be a number, got str"),
    (dropout_add_rms_norm, (X, X, 4), {"p": -0.1, "training": False}, ValueError, r"p must be in \[0, 1\], got -0.1"),
    (dropout_add_rms_norm, (X, X, 4), {"weight_offset": 1.0}, ValueError, "weight_offset 1.0 needs a weight, got None"),
    (rms_norm, (X, 4), {"weight_offset": 1.0}, ValueError, "weight_offset 1.0 needs a weight, got None"),
    (add_rms_norm, (X, X, 4), {"weight_offset": 1.0}, ValueError, "weight_offset 1.0 needs a weight, got None"),
    (rms_norm, (X, 4, zeros(4)), {"weight_offset": "1"}, TypeError, "weight_offset must be a number, got str"),
    (rms_norm, (X.int(), 4, zeros(4)), {"weight_offset": 1.0}, TypeError, "input must be floating point.*int32"),
    (add_rms_norm, (X.int(), X, 4, zeros(4)), {"weight_offset": 1.0}, TypeError, "input must be floating.*int32"),
]


@pytest.mark.parametrize(
    "function, args, keywords, error, message", BAD, ids=[f"{f.__name__}: {m}" for f, _, _, _, m in BAD]
)
def test_bad_arguments(function, args, keywords, error, message, backend):
    w = zeros(4)
    with pygpt.backend(backend):
        for _ in range(2):  # from the second time on, calls like it are fast
            with pytest.raises(error, match=f"{function.__name__}: {message}"):
                function(*args, **keywords)
            rms_norm(X, 4, w), add_rms_norm(X, X, 4, w), dropout_add_layer_norm(X, X, 4), dropout_add_rms_norm(X, X, 4)


def test_the_ops_check_what_their_kernels_read():
    op, x, seed = torch.ops.pygpt, zeros(2, 4), torch.tensor([1])
    y, s, rstd = op.dropout_add_rms_norm_fwd(x, x, None, 1e-5, seed, 0.5, 0.0)
    for message, call in (
        ("dropout needs a seed", lambda: op.dropout_add_rms_norm_fwd(x, x, None, 1e-5, None, 0.5, 0.0)),
        (r"dropout_p must be in \[0, 1\]", lambda: op.dropout_add_layer_norm_fwd(x, x, None, None, 1e-5, seed, 1.5)),
        ("seed must be int64", lambda: op.dropout_add_rms_norm_fwd(x, x, None, 1e-5, seed.float(), 0.5, 0.0)),
        (
            "bias must be float32",
            lambda: op.dropout_add_layer_norm_fwd(x, x, None, zeros(4).double(), 1e-5, None, 0.0),
        ),
        ("residual must be float32", lambda: op.dropout_add_rms_norm_fwd(x, x.double(), None, 1e-5, seed, 0.5, 0.0)),
        (
            "ds must be float32",
            lambda: op.dropout_add_rms_norm_bwd(y, s.half(), s, None, rstd, [True] * 3, seed, 0.5, 0.0),
        ),
        ("needs must have 3", lambda: op.dropout_add_rms_norm_bwd(y, s, s, None, rstd, [True] * 2, seed, 0.5, 0.0)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
