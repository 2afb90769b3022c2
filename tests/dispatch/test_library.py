"""The registered ops torch.ops.pygpt.* called directly: opcheck, schemas, and bad calls that must raise, not crash."""

import inspect

import cases
import pytest
import torch

import pygpt  # noqa: F401  (registers the ops)
from pygpt import _C, reference, verify
from pygpt.dispatch import KERNEL_NAMES as NAMES

TYPICAL = list(cases.variants(cases.TYPICAL))
VARIANTS = [(op, dims) for (op, dims), (previous, _) in zip(TYPICAL[1:], TYPICAL, strict=False) if op == previous]
SAMPLES = TYPICAL + [
    (op, {**cases.TINY[op], **dims})
    for op, dims in (
        ("attention", {"S": 0}),
        ("attention", {"L": 0}),
        ("attention", {"L": 1, "causal": 0}),
        ("linear", {"bias": 0}),
        ("linear", {"K": 0}),
        ("mlp", {"bias": 0}),
        ("layer_norm", {"affine": 0}),
        ("add_layer_norm", {"affine": 0, "M": 0}),
        ("rms_norm", {"affine": 0}),
        ("add_rms_norm", {"affine": 0}),
        ("rms_norm", {"offset": 1.0}),
        ("add_rms_norm", {"offset": 1.0}),
        ("dropout_add_layer_norm", {"affine": 0, "dropout": 0.0}),
        ("dropout_add_rms_norm", {"affine": 0}),
    )
]


def kernel(name):
    return getattr(torch.ops.pygpt, name).default


class Registered:
    """torch.ops.pygpt as a namespace of kernels."""

    __getattr__ = staticmethod(kernel)


def calls(op, dims, dtype, generator, layout=cases.contiguous):
    args, grads = verify.draw(op, dims, dtype, generator, view=layout)
    return cases.kernel_calls(op, args, grads, Registered())


def test_every_kernel_is_registered_once():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pygpt::")}
    assert registered == {f"pygpt::{name}" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_the_references_signature(name):
    schema = kernel(name)._schema
    assert [a.name for a in schema.arguments] == list(inspect.signature(getattr(reference, name)).parameters)
    assert not schema.is_mutable


WITHOUT_THE_EXTENSION = """
import sys; sys.path.insert(0, "tests"); sys.modules["pygpt._C"] = None
import cases, torch
from pygpt import reference, verify
from pygpt.dispatch import TABLE
assert TABLE["cpp"].missing and TABLE["cpp"].kernels is None
generator = torch.Generator().manual_seed(0)
for op, dims in cases.TINY.items():
    for name, args in cases.kernel_calls(op, *verify.draw(op, dims, torch.float32, generator), reference):
        op = getattr(torch.ops.pygpt, name).default
        for t, want in zip(*(verify.as_tuple(f(*args)) for f in (op, getattr(reference, name))), strict=True):
            assert torch.equal(t, want), name
        torch.library.opcheck(op, args)
print("all")
"""


def test_ops_work_without_the_extension(run_python):
    done = run_python(WITHOUT_THE_EXTENSION)
    assert done.stdout.split() == ["all"], done.stderr


@pytest.mark.parametrize("layout", [cases.contiguous, cases.transposed, cases.expanded], ids=cases.ids)
@pytest.mark.parametrize("op, dims", SAMPLES, ids=cases.ids)
def test_opcheck(op, dims, layout, generator):
    # Tracing a graph depends neither on strides nor on an activation's name.
    every = layout is cases.contiguous and (op, dims) not in VARIANTS
    tests = {} if every else {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    for name, args in calls(op, dims, torch.float32, generator, layout):
        torch.library.opcheck(kernel(name), args, **tests)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op, dims", SAMPLES, ids=cases.ids)
def test_results_look_like_the_references(op, dims, dtype, generator):
    """Shape, dtype and strides; with every gradient wanted, and with none."""
    for name, args in calls(op, dims, dtype, generator):
        for wanted in (True, False):
            args = [[wanted] * len(a) if isinstance(a, list) else a for a in args]
            ours, theirs = (verify.as_tuple(f(*args)) for f in (kernel(name), getattr(reference, name)))
            for a, b in zip(ours, theirs, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype), name
                assert cases.layout_of(a) == cases.layout_of(b), name


def spoil(t):
    """What is wrong with each replacement of an argument: (reason, replacement)."""
    if isinstance(t, torch.Tensor):
        yield "integers", t.long()
        yield "complex", t.to(torch.complex64)
        yield "larger", t.new_zeros([n + 1 for n in t.shape])
        yield "no dimension", t.new_zeros(())
        yield "one more dimension", t[None]
        yield "another dtype", t.to(torch.float16)
    elif isinstance(t, list):
        yield "too few", t[:-1]
        yield "too many", [*t, True]
    elif isinstance(t, str):
        yield "unknown", "swish"


FREE = {"no dimension", "one more dimension", "larger", "another dtype"}  # right where a tensor stands alone
ALLOWED = {("relu_fwd", 0): FREE, ("gelu_fwd", 0): FREE, ("qkv_attention_fwd", 0): {"another dtype"}}
ALLOWED |= {
    (f"dropout_add_{norm}_{d}", 0): {"another dtype"} for norm in ("layer_norm", "rms_norm") for d in ("fwd", "bwd")
}
ALLOWED |= {
    (f"dropout_add_{name}", seed): {"integers"}
    for name, seed in (("layer_norm_fwd", 5), ("layer_norm_bwd", 7), ("rms_norm_fwd", 4), ("rms_norm_bwd", 6))
}  # the seed is one
ALLOWED |= {(f"{op}_fwd", 0): {"one more dimension"} for op in ("linear", "mlp", "layer_norm", "rms_norm")}
ALLOWED |= {  # a mean is a scalar, as is its gradient
    ("cross_entropy_fwd", 0): {"another dtype"}, ("cross_entropy_fwd", 1): {"integers"},
    ("cross_entropy_bwd", 0): {"larger", "no dimension"}, ("cross_entropy_bwd", 1): {"another dtype"},
    ("cross_entropy_bwd", 2): {"integers"}, ("linear_cross_entropy_fwd", 2): {"integers"},
    ("linear_cross_entropy_bwd", 0): {"larger", "no dimension"}, ("linear_cross_entropy_bwd", 3): {"integers"},
}  # fmt: skip


def bad_calls():
    for op, dims in cases.TINY.items():
        generator = torch.Generator().manual_seed(0)
        for name, args in cases.kernel_calls(op, *verify.draw(op, dims, torch.float32, generator), reference):
            for i, a in enumerate(args):
                for reason, wrong in spoil(a):
                    if reason not in ALLOWED.get((name, i), ()) and not (
                        a is not None and getattr(a, "numel", lambda: 1)() == 0
                    ):
                        yield pytest.param(
                            name, [*args[:i], wrong, *args[i + 1 :]], id=f"{op}: {name}, argument {i}: {reason}"
                        )


@pytest.mark.parametrize("name, args", list(bad_calls()))
def test_bad_calls_raise(name, args):
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)) as caught:
        kernel(name)(*args)
    assert str(caught.value).strip()


@pytest.mark.parametrize("op, dims", cases.TINY.items(), ids=cases.ids)
def test_sparse_tensors_raise_or_are_computed(op, dims, generator):
    """The dispatcher gives them to the reference, which takes some."""
    for name, args in calls(op, dims, torch.float32, generator):
        want = verify.as_tuple(getattr(reference, name)(*args))
        for i, a in enumerate(args):
            if isinstance(a, torch.Tensor):
                try:
                    results = verify.as_tuple(kernel(name)(*args[:i], a.to_sparse(), *args[i + 1 :]))
                except (RuntimeError, TypeError, NotImplementedError):
                    continue
                for t, w in zip(results, want, strict=True):
                    torch.testing.assert_close(t.to_dense() if t.is_sparse else t, w)


@pytest.mark.parametrize("E, Ev", [(_C.max_head_dim + 1, 8), (8, _C.max_head_dim + 1)])
def test_head_dimension_above_the_limit(E, Ev):
    q, v = torch.zeros(1, 1, 3, E), torch.zeros(1, 1, 3, Ev)
    with pytest.raises(RuntimeError, match=str(_C.max_head_dim)):
        kernel("attention_fwd")(q, q, v, False, 1.0)
