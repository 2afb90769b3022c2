"""linear_cross_entropy: gradients that the forward pass forms, chunks of rows, and float16's range."""

import importlib
import math

import cases
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import autograd, nn
from pygpt.functional import cross_entropy, linear_cross_entropy
from tests.ops.test_loss import assert_same, classes, logits

GPU_SHARE = {"triton": 2, "cuda": 2}  # see conftest
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


# ------------------------------------------------------------------------------- float16
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
