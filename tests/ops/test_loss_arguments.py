"""Which arguments the losses and their kernels take, and what they say of the others."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt.functional import cross_entropy, linear_cross_entropy

GPU_SHARE = {"triton": 2, "cuda": 2}  # see conftest
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
