"""cross_entropy and linear_cross_entropy: the meaning and the errors of their arguments."""

import copy
import importlib
import math

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import autograd, nn, verify
from pygpt.functional import cross_entropy, linear_cross_entropy

GPU_SHARE = {"triton": 2, "cuda": 2}  # see conftest
F64 = torch.float64


def logits(*shape, dtype=torch.float32, scale=2.0):
    return (torch.randn(shape, dtype=F64) * scale).to(dtype).requires_grad_()


def classes(*shape, V, ignore=None, every=3):
    t = torch.randint(V, shape)
    if ignore is not None:
        t.view(-1)[::every] = ignore
    return t


def assert_same(ours, theirs, leaves, dtype):
    """Results and gradients, to three fifths of the digits."""
    found, want = (
        [out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 2, out.numel(), dtype=F64).view(out.shape).to(out))]
        for out in (ours, theirs)
    )
    for a, b in zip(found, want, strict=True):
        scale = max(1.0, b.detach().abs().nan_to_num(0).max().item()) if b.numel() else 1.0
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=torch.finfo(dtype).eps ** 0.6 * scale, equal_nan=True)


# ------------------------------------------------------------------------------- as in torch
LAYOUTS = [
    ((5,), ()),
    ((4, 5), (4,)),
    ((2, 5, 3), (2, 3)),
    ((2, 5, 3, 2), (2, 3, 2)),
    ((0, 5), (0,)),
    ((0, 5, 3), (0, 3)),
]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"ignore_index": 2},
    {"weight": 1},
    {"weight": 1, "label_smoothing": 0.3, "ignore_index": -7},
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("of_input, of_target", LAYOUTS, ids=str)
def test_layouts_and_options_as_in_torch(of_input, of_target, options, reduction, backend, device):
    x = logits(*of_input).to(device).detach().requires_grad_()
    target = classes(*of_target, V=5, ignore=options.get("ignore_index") if of_target else None).to(device)
    options = options | ({"weight": torch.rand(5, device=device)} if "weight" in options else {})
    with pygpt.backend(backend):
        found = cross_entropy(x, target, reduction=reduction, **options)
    assert_same(found, F.cross_entropy(x, target, reduction=reduction, **options), [x], torch.float32)


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=cases.ids)
def test_layouts_of_memory(layout, backend, device):
    """Of the logits, of the targets and of what comes from above."""
    x, target = layout(logits(6, 9).detach().to(device)).requires_grad_(), classes(6, 2, V=9)[:, 1].to(device)
    with pygpt.backend(backend):
        found = cross_entropy(x, target, reduction="none")
    assert_same(found, F.cross_entropy(x, target, reduction="none"), [x], torch.float32)
    upstream = torch.randn(6, 2, device=device)[:, 1]
    with pygpt.backend(backend):
        (got,) = torch.autograd.grad(cross_entropy(x, target, reduction="none"), x, upstream)
    (want,) = torch.autograd.grad(F.cross_entropy(x, target, reduction="none"), x, upstream)
    torch.testing.assert_close(got, want)


def test_probabilities_and_other_targets_go_to_pytorch():
    x, p = logits(4, 5), torch.rand(4, 5).softmax(1)
    assert_same(
        cross_entropy(x, p, label_smoothing=0.1), F.cross_entropy(x, p, label_smoothing=0.1), [x], torch.float32
    )
    few = torch.tensor([0, 1, 2, 4], dtype=torch.uint8)
    assert torch.equal(cross_entropy(x, few), F.cross_entropy(x, few))
    assert pygpt.explain(cross_entropy, x, p).backend == "torch"
    with_z = cross_entropy(x, p, z_loss=0.5)
    torch.testing.assert_close(with_z, F.cross_entropy(x, p) + 0.5 * x.logsumexp(1).square().mean())
    assert pygpt.explain(cross_entropy, x, few.long()).backend == "cpp"


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_the_result_has_torchs_dtype(op, dtype, backend, device):
    x, w = logits(6, 5, dtype=dtype).to(device), logits(7, 5, dtype=dtype).to(device)
    target = classes(6, V=5).to(device)
    ours, theirs = {
        "cross_entropy": (lambda: cross_entropy(x, target), lambda: F.cross_entropy(x, target)),
        "linear_cross_entropy": (
            lambda: linear_cross_entropy(x, w, target),
            lambda: F.cross_entropy(F.linear(x, w), target),
        ),
    }[op]
    with pygpt.backend(backend):
        assert ours().dtype == theirs().dtype == dtype
        for lower in (torch.bfloat16, torch.float16):
            with torch.autocast(device, lower):
                assert ours().dtype == theirs().dtype


def test_under_autocast_the_logits_are_not_copied():
    """Nor rounded: the loss of bfloat16 logits is float32's."""
    x, target = logits(64, 1000, dtype=torch.bfloat16), classes(64, V=1000)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(x, target)
    assert loss.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()
    torch.testing.assert_close(loss, F.cross_entropy(x.float(), target))


# ------------------------------------------------------------------------------- z_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("with_weight", [False, True])
def test_z_loss_by_hand(with_weight, reduction, backend, device):
    """Class weights and smoothing do not touch it; "mean" divides it by the number of kept targets."""
    z, x = 0.3, logits(9, 5).to(device).detach().requires_grad_()
    target = classes(9, V=5, ignore=-100).to(device)
    options = {"reduction": reduction, "label_smoothing": 0.2}
    options |= {"weight": torch.tensor([0.1, 3.0, 0.5, 2.0, 1.0], device=device)} if with_weight else {}
    kept = target != -100
    squares = torch.where(kept, z * x.logsumexp(1).square(), 0)
    part = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / kept.sum()}[reduction]
    with pygpt.backend(backend):
        found = cross_entropy(x, target, z_loss=z, **options)
        same = linear_cross_entropy(x, torch.eye(5, device=device), target, z_loss=z, **options)
    assert_same(found, F.cross_entropy(x, target, **options) + part, [x], torch.float32)
    torch.testing.assert_close(same, found)


# ------------------------------------------------------------------------------- what is not there
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_no_kept_target(op, rows, reduction, backend, device):
    """The mean of no loss is NaN as torch's, its sum 0, and every gradient 0."""
    x, w = (logits(n, 6).to(device).detach().requires_grad_() for n in (rows, 6))
    target = torch.full((rows,), -100, device=device)
    with pygpt.backend(backend):
        if op == "cross_entropy":
            loss, leaves = cross_entropy(x, target, reduction=reduction, z_loss=0.1), [x]
        else:
            loss, leaves = linear_cross_entropy(x, w, target, reduction=reduction, z_loss=0.1), [x, w]
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    if backend != "torch" or reduction != "mean":  # 0 / 0 of z_loss has a NaN for a gradient there
        assert not any(g.any() for g in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
def test_an_ignored_row_is_not_read(dtype, create_graph, backend, device):
    """Its gradient is 0, exactly, whatever its logits are, and the other rows are as without it."""
    x, target = logits(7, 300, dtype=dtype).detach().to(device), classes(7, V=300, ignore=-1).to(device)
    kept = target >= 0
    with pygpt.backend(backend):
        for value in (torch.nan, math.inf, -math.inf):
            spoilt = x.masked_fill(~kept[:, None], value).requires_grad_()
            clean = x[kept].requires_grad_()
            losses = [
                cross_entropy(spoilt, target, ignore_index=-1, label_smoothing=0.1, z_loss=0.1),
                cross_entropy(clean, target[kept], ignore_index=-1, label_smoothing=0.1, z_loss=0.1),
            ]
            torch.testing.assert_close(*losses)
            (dx,), (want,) = (
                torch.autograd.grad(a, b, create_graph=create_graph)
                for a, b in zip(losses, (spoilt, clean), strict=True)
            )
            assert not dx[~kept].any()
            torch.testing.assert_close(dx[kept], want)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("wrong", [5, -3, 2**40, -(2**40)])
def test_a_class_out_of_range(op, wrong, backend, device):
    """A CPU refuses it. On a GPU its row has loss and gradients NaN, and the others have theirs."""
    x = logits(4, 5).to(device).detach().requires_grad_()
    good = classes(4, V=5).to(device)
    target = good.clone()
    target[2] = wrong
    eye = torch.eye(5, device=device)
    call = cross_entropy if op == "cross_entropy" else lambda x, t, **how: linear_cross_entropy(x, eye, t, **how)
    with pygpt.backend(backend):
        for reduction in ("none", "sum"):
            if backend in ("cpp", "torch"):
                with pytest.raises(IndexError, match=rf"target.*{wrong}|Target {wrong} is out of bounds"):
                    call(x, target, reduction=reduction)
                continue
            losses, want = (call(x, t, reduction=reduction) for t in (target, good))
            (dx,), (exact,) = (torch.autograd.grad(loss.sum(), x) for loss in (losses, want))
            others = [0, 1, 3]
            assert dx[2].isnan().all() and torch.equal(dx[others], exact[others])
            if reduction == "none":
                assert losses[2].isnan() and torch.equal(losses[others], want[others])
            else:
                assert losses.isnan()


# ------------------------------------------------------------------------------- values
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_infinite_logits_as_in_torch(reduction, dtype, backend, device):
    """-inf masks a class, among them that of the target; a row of -inf alone, +inf and NaN give NaN as in torch."""
    x = logits(8, 70, dtype=dtype).detach().to(device)
    target = torch.tensor([3, 3, 69, 0, 5, 6, 7, 8], device=device)
    x[0, ::2], x[1, 3], x[2, :69], x[3] = -math.inf, -math.inf, -math.inf, -math.inf
    x[4, 9], x[5, 6], x[6, 1] = math.inf, math.inf, math.nan
    for rows in (slice(0, 3), slice(0, 8)):
        results = []
        for function in (cross_entropy, F.cross_entropy):
            leaf = x[rows].clone().requires_grad_()
            with pygpt.backend(backend):
                loss = function(leaf, target[rows], reduction=reduction)
            results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
        for ours, theirs in zip(*results, strict=True):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(ours), kind(theirs)), kind.__name__


def test_large_logits_keep_their_digits(backend, device):
    """The maximum is subtracted before anything is rounded, and so in backward."""
    x = (logits(6, 50) + 1000).to(device).detach().requires_grad_()
    target = classes(6, V=50).to(device)
    with pygpt.backend(backend):
        loss = cross_entropy(x, target)
    wide = x.detach().double().requires_grad_()
    exact, of_torch = F.cross_entropy(wide, target), F.cross_entropy(x, target)
    (dx,), (theirs,), (want,) = (torch.autograd.grad(*of) for of in ((loss, x), (of_torch, x), (exact, wide)))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    ours, torchs = ((result.double() - want).abs().max().item() for result in (dx, theirs))
    assert ours <= 2 * torchs + verify.allowance(torch.float32) * want.abs().max().item()


def test_float16_gradients_do_not_underflow(backend, device):
    """Those of one of 2000 targets are below float16's least number, until the upstream gradient scales them."""
    x, w = (
        logits(n, 8, dtype=torch.float16, scale=s).to(device).detach().requires_grad_()
        for n, s in ((2000, 0.01), (6, 1))
    )
    target, scale = classes(2000, V=6).to(device), 2.0**12
    with pygpt.backend(backend):
        dx, dw = torch.autograd.grad(linear_cross_entropy(x, w, target) * scale, (x, w))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    want = torch.autograd.grad(F.cross_entropy(F.linear(*wide), target) * scale, wide)
    for a, b in zip((dx, dw), want, strict=True):
        assert (a.double() - b).norm() < 4e-3 * b.norm()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 1e-4}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, 1e-8, 1e6, "shares"])
def test_float16_gradients_keep_their_digits(weight, reduction, options, compiled, device):
    """Whatever the size of the weights is, where an upstream gradient, as GradScaler's, brings them into its range.
    Here the largest one is between 500 and 1000. The rows of dw and db without a target, all of them small, are judged
    alone too."""
    N, K, V = 24, 16, 3000
    x, w, b = (logits(*shape, dtype=torch.float16, scale=0.3).to(device).detach() for shape in ((N, K), (V, K), (V,)))
    target = classes(N, V=V, ignore=-100).to(device)
    drawn = torch.rand(V, device=device) + 0.1
    weights = (
        {None: None, "shares": drawn / drawn.sum()}.get(weight) if not isinstance(weight, float) else drawn * weight
    )
    how = {"reduction": reduction, **options}
    z = how.pop("z_loss", 0.0)

    def exact(x, w, b):
        y = F.linear(x, w, b)
        wide = None if weights is None else weights.double()
        squares = z * y.logsumexp(1).square() * (target >= 0)
        squares = squares.sum() / (target >= 0).sum() if reduction == "mean" else squares.sum()
        return F.cross_entropy(y, target, wide, **how) + squares

    wide = [t.double().requires_grad_() for t in (x, w, b)]
    want = torch.autograd.grad(exact(*wide), wide)
    scale = 2.0 ** math.floor(math.log2(1000 / max(g.abs().max().item() for g in want)))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    with pygpt.backend(compiled), torch.autocast(device, torch.float16):
        loss = linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], weight=weights, z_loss=z, **how
        )
    found = torch.autograd.grad(loss * scale, leaves)
    others = torch.ones(V, dtype=torch.bool, device=device).index_fill_(0, target[target >= 0], False)
    pairs = [
        *zip(found, want, strict=True),
        *((a[others], c[others]) for a, c in zip(found[1:], want[1:], strict=True)),
    ]
    for a, c in pairs:
        assert (a.double() - c * scale).norm() < 1e-3 * (c * scale).norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scaling_is_not_in_place_nor_in_float32(reduction):
    """Backward's largest allocation is the result, or a block of fewer elements."""
    x, w = logits(8, 64, dtype=torch.float16), logits(4 * 2**16, 64, dtype=torch.float16)
    loss = linear_cross_entropy(x, w, classes(8, V=len(w)), reduction=reduction)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(loss, w)
    sizes = [
        e.cpu_memory_usage for e in profile.events() if e.name in ("aten::empty", "aten::empty_strided", "aten::mul")
    ]
    assert 0 < max(sizes) <= w.nbytes


# ------------------------------------------------------------------------------- linear_cross_entropy
CHUNKS = {  # several chunks of rows
    "cpp": {"N": 1100, "K": 5, "V": 1030},
    "triton": {"N": 21, "K": 24, "V": 40},
    "cuda": {"N": 1030, "K": 2, "V": 8200},
}
FORMED = {"bias": 1, "ignored": 3, "weight": 1, "smoothing": 0.1, "z": 1e-2}
RECOMPUTED = {"bias": 1, "reduction": "none"}


@pytest.mark.parametrize(
    "dtype, options",
    [(torch.float32, FORMED), (torch.float16, FORMED), (torch.bfloat16, RECOMPUTED)],
    ids=cases.ids,
)
def test_several_chunks(dtype, options, compiled, device, generator, monkeypatch):
    if compiled == "triton":
        kernels = importlib.import_module("pygpt.triton_kernels.loss")
        monkeypatch.setattr(kernels, "LEAST_ROWS", 8)
        monkeypatch.setattr(kernels, "L2_BYTES", 0)
    dims = CHUNKS[compiled] | options
    cases.assert_exact("linear_cross_entropy", dims, dtype, generator, compiled, device=device)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("N", [1, 3, 700])
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)], ids=str)
def test_which_gradients_are_needed(needs, N, reduction, compiled, device):
    tensors = [logits(*shape).detach().to(device) for shape in ((N, 7), (11, 7), (11,))]
    target = classes(N, V=11, ignore=-100, every=5).to(device)
    target[0] = 3
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(bool(need))
    x, w, b = tensors
    with pygpt.backend(compiled):
        loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, z_loss=0.1)
    want = F.cross_entropy(F.linear(x, w, b), target, reduction=reduction)
    squares = 0.1 * F.linear(x, w, b).logsumexp(1).square() * (target >= 0)
    want = want + {"none": squares, "sum": squares.sum(), "mean": squares.sum() / (target >= 0).sum()}[reduction]
    assert loss.requires_grad == any(needs)
    torch.testing.assert_close(loss, want)
    if any(needs):
        assert_same(loss, want, [t for t in tensors if t.requires_grad], torch.float32)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_graph_that_is_retained(reduction, compiled, device):
    """Backward changes nothing: every time, the same gradients; scaled, scaled ones."""
    x, w, b = (logits(*shape).to(device).detach().requires_grad_() for shape in ((9, 4), (6, 4), (6,)))
    with pygpt.backend(compiled):
        loss = linear_cross_entropy(x, w, classes(9, V=6).to(device), linear_bias=b, reduction=reduction)
    first, again, twice = (
        torch.autograd.grad(loss, (x, w, b), torch.full_like(loss, factor), retain_graph=True) for factor in (1, 1, 2)
    )
    assert all(map(torch.equal, first, again))
    assert all(torch.equal(2 * a, c) for a, c in zip(first, twice, strict=True))


def test_formed_and_recomputed_gradients_agree(compiled, device):
    """Those of a graph that was traced without gradients are computed in backward."""
    x, w, b = (logits(*shape, dtype=torch.float32).to(device).detach() for shape in ((9, 4), (6, 4), (6,)))
    target, function = classes(9, V=6).to(device), autograd.LinearCrossEntropy
    with pygpt.backend(compiled):
        kernels = pygpt.dispatch.named(compiled).kernels
    results = []
    for needs in ((True,) * 3, (False,) * 3):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        loss = function.apply(kernels, *leaves[:2], target, leaves[2], needs, -100, None, "mean", 0.1, 0.2)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_several_losses_per_input_go_to_pytorch(shape, reduction):
    x, w, b = logits(4, 6), logits(5, *shape, 6), logits(5, *shape)
    target = classes(4, *shape, V=5)
    found = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, z_loss=0.1)

    def out():
        return F.linear(x, w.reshape(-1, 6), b.reshape(-1)).view(4, 5, *shape)

    assert_same(found, cross_entropy(out(), target, reduction=reduction, z_loss=0.1), [x, w, b], torch.float32)
    plain = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    assert_same(plain, F.cross_entropy(out(), target, reduction=reduction), [x, w, b], torch.float32)


def test_linear_cross_entropy_of_one_input_and_of_probabilities():
    x, w = logits(6), logits(5, 6)
    one = torch.tensor(3)
    assert_same(linear_cross_entropy(x, w, one), F.cross_entropy(F.linear(x, w), one), [x, w], torch.float32)
    rows, p = logits(3, 6), torch.rand(3, 5).softmax(1)
    assert_same(linear_cross_entropy(rows, w, p), F.cross_entropy(F.linear(rows, w), p), [rows, w], torch.float32)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it since 2.13")
def test_options_change_nothing():
    x, w, target = logits(40, 6), logits(5, 6), classes(40, V=5)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8)
    assert torch.equal(linear_cross_entropy(x, w, target, options=options), linear_cross_entropy(x, w, target))
    (ours,) = torch.autograd.grad(linear_cross_entropy(x, w, target, options=options), w)
    (theirs,) = torch.autograd.grad(F.linear_cross_entropy(x, w, target), w)
    torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------- errors
X, T, W = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64), torch.zeros(7, 5)
ERRORS = [
    (lambda: cross_entropy(X, T, reduction="avg"), ValueError, "cross_entropy: reduction must be"),
    (
        lambda: cross_entropy(X, T, label_smoothing=1.5),
        ValueError,
        "cross_entropy: label_smoothing must be from 0 to 1",
    ),
    (lambda: cross_entropy(X, T, label_smoothing="a"), TypeError, "label_smoothing must be a number, got str"),
    (lambda: cross_entropy(X, T, z_loss=None), TypeError, "z_loss must be a number, got NoneType"),
    (lambda: cross_entropy(X, T, z_loss=math.nan), ValueError, "z_loss must be finite, got nan"),
    (lambda: cross_entropy(X, T, ignore_index=1.5), TypeError, "ignore_index must be an integer, got 1.5"),
    (lambda: cross_entropy(X, T, ignore_index=True), TypeError, "ignore_index must be an integer, got True"),
    (
        lambda: cross_entropy(X, T, ignore_index=2**63),
        ValueError,
        "ignore_index must be an int64, got 9223372036854775808",
    ),
    (
        lambda: linear_cross_entropy(X, W, T, ignore_index=-(2**70)),
        ValueError,
        "ignore_index must be an int64, got -118",
    ),
    (lambda: cross_entropy(X, [0]), TypeError, "target must be a Tensor, got list"),
    (lambda: cross_entropy(X, T, [0]), TypeError, "weight must be a Tensor, got list"),
    (lambda: cross_entropy(X, T[:3]), ValueError, r"target must have shape \(4,\), got \(3,\)"),
    (lambda: cross_entropy(X, T.int()), TypeError, "target must be int64, got torch.int32"),
    (lambda: cross_entropy(X.long(), T), TypeError, "input must be floating point, got torch.int64"),
    (lambda: cross_entropy(X, T, X[0, :3]), ValueError, r"weight must have shape \(5,\), got \(3,\)"),
    (lambda: cross_entropy(X, T, X[0].double()), TypeError, "weight is torch.float64, input is torch.float32"),
    (lambda: cross_entropy(X, T, X[0].clone().requires_grad_()), ValueError, "weight must not require a gradient"),
    (lambda: cross_entropy(X[0, 0], T[0]), ValueError, "input needs at least 1 dimension, got a scalar"),
    (lambda: linear_cross_entropy(X, W[:, :4], T), ValueError, r"input has 5 features, linear_weight \(7, 4\) wants 4"),
    (lambda: linear_cross_entropy(X, W, T, linear_bias=X[0]), ValueError, r"linear_bias must have shape \(7,\), got"),
    (lambda: linear_cross_entropy(X[None], W, T), ValueError, "input must have 1 or 2 dimensions, got 3"),
    (lambda: linear_cross_entropy(X, W[0], T), ValueError, "linear_weight must be a matrix, got shape"),
    (
        lambda: linear_cross_entropy(X, W.double(), T),
        TypeError,
        "linear_weight is torch.float64, input is torch.float32",
    ),
    (lambda: linear_cross_entropy(X, W, T, reduction=1), ValueError, "linear_cross_entropy: reduction must be"),
]


@pytest.mark.parametrize("call, error, message", ERRORS, ids=[message[:40] for *_, message in ERRORS])
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("index", [np.int64(2), torch.tensor(2), 2**63 - 1, -(2**63)], ids=repr)
def test_any_integer_is_an_ignore_index(index, backend, device):
    x, w, target = (
        torch.randn(4, 5, device=device),
        torch.eye(5, device=device),
        torch.tensor([0, 2, 1, 2], device=device),
    )
    with pygpt.backend(backend):
        want = F.cross_entropy(x, target, ignore_index=int(index))
        torch.testing.assert_close(cross_entropy(x, target, ignore_index=index), want)
        torch.testing.assert_close(linear_cross_entropy(x, w, target, ignore_index=index), want)


@pytest.mark.parametrize("kernels", [pygpt.dispatch.TABLE["cpp"].kernels, torch.ops.pygpt], ids=["fast", "dispatched"])
@pytest.mark.parametrize("x, target, weight, reduction, message", [
    (X, T, None, "avg", "cross_entropy_fwd: reduction must be 'none', 'mean' or 'sum', got 'avg'"),
    (X[0], T, None, "mean", r"cross_entropy_fwd: x must be a matrix, got \(5\)"),
    (X, T[:3], None, "mean", r"cross_entropy_fwd: target must have shape \(4\), got \(3\)"),
    (X, T.int(), None, "mean", "cross_entropy_fwd: target must be int64, got int32"),
    (X, T, X[0, :2], "mean", r"cross_entropy_fwd: weight must have shape \(5\), got \(2\)"),
    (X[:, :0], T, None, "mean", "cross_entropy_fwd: the logits need at least 1 class"),
])  # fmt: skip
def test_kernels_check_their_arguments(kernels, x, target, weight, reduction, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.cross_entropy_fwd(x, target, -100, weight, reduction, 0.0, 0.0)


# ------------------------------------------------------------------------------- modules
def test_cross_entropy_loss_is_torchs_with_z_loss():
    x, target, weight = logits(4, 5), classes(4, V=5), torch.rand(5)
    ours = nn.CrossEntropyLoss(weight, ignore_index=1, label_smoothing=0.1, z_loss=0.2)
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=1, label_smoothing=0.1)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    want = cross_entropy(x, target, weight, ignore_index=1, label_smoothing=0.1, z_loss=0.2)
    assert torch.equal(ours(x, target), want) and torch.equal(copy.deepcopy(ours)(x, target), want)
    assert nn.CrossEntropyLoss(reduction="sum")(x, target) == cross_entropy(x, target, reduction="sum")
    ours.z_loss = 0.0
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    on_meta = nn.CrossEntropyLoss(weight, device="meta", dtype=torch.float64).weight
    assert on_meta.is_meta and on_meta.dtype == torch.float64
    assert nn.CrossEntropyLoss(device="meta").weight is None


@pytest.mark.parametrize("out_features", [(), (2,)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_loss_is_torchs(bias, out_features):
    how = {"bias": bias, "out_features": out_features, "label_smoothing": 0.1, "weight": torch.rand(5)}
    ours, x = nn.LinearCrossEntropyLoss(6, 5, **how, z_loss=0.0), logits(4, 6)
    target = classes(4, *out_features, V=5)
    w, b = ours.linear.weight, ours.linear.bias
    out = F.linear(x, w, b).view(4, 5, *out_features)
    want = F.cross_entropy(out, target, how["weight"], label_smoothing=0.1)
    assert_same(ours(x, target), want, [x, w, *([b] if bias else [])], torch.float32)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(6, 5, **how)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(theirs(x, target), ours(x, target))
    for wrong in ({"weight": torch.rand(4)}, {"label_smoothing": 2.0}):
        with pytest.raises(ValueError, match=r"pygpt.nn.LinearCrossEntropyLoss: .* must be|must have"):
            nn.LinearCrossEntropyLoss(6, 5, **wrong)


def test_measured_results_pass_where_weights_and_smoothing_meet(generator):
    """The sum of the weights is part of the gradient's largest term."""
    dims = {"N": 40, "V": 300, "weight": 1, "smoothing": 0.9, "reduction": "sum", "z": 0.5}
    assert all(row.passed for row in verify.measure("cross_entropy", dims, torch.float32, generator, "cpp"))
