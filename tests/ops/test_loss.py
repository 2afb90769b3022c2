"""The losses as torch has them, and z_loss: options, layouts, targets that are ignored or out of range, large logits.

What is linear_cross_entropy's own is in test_linear_cross_entropy.py, which arguments are refused in
test_loss_arguments.py.
"""

import copy
import math

import cases
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import nn, verify
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


def test_measured_results_pass_where_weights_and_smoothing_meet(generator):
    """The sum of the weights is part of the gradient's largest term."""
    dims = {"N": 40, "V": 300, "weight": 1, "smoothing": 0.9, "reduction": "sum", "z": 0.5}
    assert all(row.passed for row in verify.measure("cross_entropy", dims, torch.float32, generator, "cpp"))
