"""The samples by which PyTorch tests its own functions: ours give the same, and a kernel serves those of attention."""

import cases
import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_map_only

import pygpt
from pygpt import functional

NAMES = ("scaled_dot_product_attention", "linear", "layer_norm", "rms_norm", "gelu", "relu", "cross_entropy")
NAMES += ("linear_cross_entropy",) if hasattr(torch.nn.functional, "linear_cross_entropy") else ()
OPS = {name: next(op for op in op_db if op.name == f"nn.functional.{name}") for name in NAMES}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def samples(name, dtype):
    """(tensors and other arguments, keyword arguments) of each sample; its leaves require gradients."""
    for sample in OPS[name].sample_inputs("cpu", dtype, requires_grad=True):
        yield (sample.input, *sample.args), sample.kwargs


def results(function, args, kwargs, dtype=None):
    """The result and every gradient, in float64. dtype: what to compute in."""

    def leaf(t):
        needed, t = t.requires_grad, t.detach()
        t = t.to(dtype or t.dtype) if t.is_floating_point() else t
        return t.requires_grad_(needed)

    args, kwargs = tree_map_only(Tensor, leaf, (args, kwargs))
    leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    out = function(*args, **kwargs)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, weights) if out.numel() else []
    return out, [t.detach().double() for t in (out, *gradients)]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name, dtype):
    """Equal in three fifths of the digits. (That gradients are as exact as PyTorch's is test_parity's subject.)"""
    ours, theirs, count = getattr(functional, name), OPS[name].op, 0
    for args, kwargs in samples(name, dtype):
        if kwargs.get("dropout_p"):
            continue  # random bits are not PyTorch's
        out, found = results(ours, args, kwargs)
        want_out, _ = results(theirs, args, kwargs)
        _, exact = results(theirs, args, kwargs, torch.float64)
        atol = torch.finfo(dtype).eps ** 0.6 * max([1.0, *(t.abs().max().item() for t in exact if t.numel())])
        assert (out.shape, out.dtype) == (want_out.shape, want_out.dtype)
        assert cases.layout_of(out) == cases.layout_of(want_out)
        torch.testing.assert_close(found, exact, rtol=0, atol=atol)
        count += 1
    assert count > 3


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
def test_a_kernel_serves_every_sample_of_attention(dtype):
    for args, kwargs in samples("scaled_dot_product_attention", dtype):
        choice = pygpt.explain("scaled_dot_product_attention", *args, **kwargs)
        assert choice.backend == "cpp", choice
    q, k, v = args  # with what the samples lack: a boolean mask, and grouped heads
    for more in ({"attn_mask": torch.ones(3, 6, dtype=torch.bool)}, {"enable_gqa": True}):
        shared = (k[:, :2], v[:, :2]) if "enable_gqa" in more else (k, v)
        assert pygpt.explain("scaled_dot_product_attention", q, *shared, **more).backend == "cpp"


def test_samples_of_dropout():
    """Without chance in them they are PyTorch's; else their mean is the result without dropout."""
    attention, count = functional.scaled_dot_product_attention, 0
    for args, kwargs in samples("scaled_dot_product_attention", torch.float32):
        if not kwargs.get("dropout_p"):
            continue
        args = [t.detach() for t in args]
        whole = attention(*args, **kwargs | {"dropout_p": 0.0})
        assert not attention(*args, **kwargs | {"dropout_p": 1.0}).any()
        drawn = torch.stack([attention(*args, **kwargs) for _ in range(256)])
        deviation = drawn.std(0) / len(drawn) ** 0.5
        assert ((drawn.mean(0) - whole).abs() <= 7 * deviation + 1e-6).all()
        count += 1
    assert count >= 8


@pytest.mark.parametrize("name", [name for name in NAMES if OPS[name].error_inputs_func is not None])
def test_errors(name):
    """What PyTorch refuses, ours refuses, too."""
    for error in OPS[name].error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            getattr(functional, name)(sample.input, *sample.args, **sample.kwargs)
