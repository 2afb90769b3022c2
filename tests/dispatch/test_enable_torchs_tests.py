"""pygpt.enable on the samples by which PyTorch tests its own functions and modules: as torch is without it."""

import copy

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves, tree_map_only

import pygpt
from tests.ops import test_opinfo

NAMES = "linear", "layer_norm", "rms_norm", "scaled_dot_product_attention", "gelu"
CLASSES = (
    nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip
MODULES = {info.module_cls.__name__: info for info in module_db if info.module_cls in CLASSES}
FEW, MANY = [torch.float32], [torch.float64, torch.bfloat16]
DTYPES = [*FEW, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in MANY)]
STRIDE = 5  # the quick tests take one sample of so many


def assert_near(found, exact, dtype):
    """Equal in three fifths of the digits, as pygpt's own functions are on these samples."""
    atol = torch.finfo(dtype).eps ** 0.6 * max([1.0, *(t.abs().max().item() for t in exact if t.numel())])
    torch.testing.assert_close(found, exact, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("name", NAMES)
def test_functions(name, dtype, counts):
    function = test_opinfo.OPS[name].op
    for args, kwargs in test_opinfo.samples(name, dtype):
        if kwargs.get("dropout_p"):
            continue  # random bits are not PyTorch's
        want_out, _ = test_opinfo.results(function, args, kwargs)
        _, exact = test_opinfo.results(function, args, kwargs, torch.float64)
        with pygpt.enable():
            out, found = test_opinfo.results(function, args, kwargs)
        assert (out.shape, out.dtype) == (want_out.shape, want_out.dtype)
        assert cases.layout_of(out) == cases.layout_of(want_out)
        assert_near(found, exact, dtype)
    assert counts.served[name] > 3


@pytest.mark.parametrize("name", [name for name in NAMES if test_opinfo.OPS[name].error_inputs_func is not None])
def test_errors(name):
    for error in test_opinfo.OPS[name].error_inputs("cpu"):
        sample = error.sample_input
        with pygpt.enable(), pytest.raises(error.error_type, match=error.error_regex):
            test_opinfo.OPS[name].op(sample.input, *sample.args, **sample.kwargs)


def results(module, inputs, dtype):
    """Outputs, gradients of the parameters, and gradients of the inputs, of one call of a module in some dtype."""

    def leaf(t):
        needed, t = t.requires_grad, t.detach()
        t = t.to(dtype) if t.is_floating_point() else t.clone()
        return t.requires_grad_(needed)

    args, kwargs = tree_map_only(Tensor, leaf, (inputs.args, inputs.kwargs))
    outs = [t for t in tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)]
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    leaves += [p for p in module.parameters() if p.requires_grad]
    made = [t for t in outs if t.requires_grad]
    weights = [torch.linspace(-1, 2, t.numel(), dtype=torch.float64).view(t.shape).to(t.dtype) for t in made]
    gradients = torch.autograd.grad(made, leaves, weights, allow_unused=True) if made else []
    return outs, [t.detach().double() for t in (*outs, *gradients) if t is not None]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, dtype, training, counts):
    check_modules(name, dtype, training, STRIDE)
    assert counts.served


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_modules_on_every_sample(name):
    check_modules(name, torch.float32, True, 1)


def check_modules(name, dtype, training, stride):
    info = MODULES[name]
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    for sample in samples[::stride]:
        made = sample.constructor_input
        module = info.module_cls(*made.args, **made.kwargs, device="cpu", dtype=dtype).train(training)
        want, _ = results(module, sample.forward_input, dtype)
        _, exact = results(copy.deepcopy(module).double(), sample.forward_input, torch.float64)
        with pygpt.enable():
            outs, found = results(module, sample.forward_input, dtype)
        assert [(t.shape, t.dtype, t.stride()) for t in outs] == [(t.shape, t.dtype, t.stride()) for t in want]
        assert_near(found, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("name", NAMES)
def test_backendbench(name, dtype, counts):
    """meta-pytorch's judge of kernels, where it is installed, on all of PyTorch's samples."""
    judge = pytest.importorskip("BackendBench.eval", reason="BackendBench is not installed", exc_type=ImportError)
    from BackendBench.suite.opinfo import OpInfoOpTest

    info = test_opinfo.OPS[name]
    samples = [s for s in info.sample_inputs("cpu", dtype) if not s.kwargs.get("dropout_p")]

    def enabled(*args, **kwargs):
        with pygpt.enable(name):
            return info.op(*args, **kwargs)

    right, verdicts = judge.eval_correctness(
        info.op, enabled, OpInfoOpTest(info.op, samples, range(len(samples))).correctness_tests
    )
    assert right == 1.0, [verdict for verdict in verdicts if not verdict.is_correct]
    assert counts.served[name] > 3
