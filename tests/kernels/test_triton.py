"""What is Triton's own: the registered ops, and every target's configurations, which read tiles in either way.

test_triton_schedule.py has which tiles a kernel takes and in which order, test_triton_attention.py the numbers that are
attention's own, test_triton_far_apart.py offsets beyond 32 bits, test_triton_launch.py launching and autotuning.

Parity with float64 is in test_parity.py, torch.compile in test_compile.py. Without a GPU all of it runs
in Triton's interpreter, whose errors are in test_triton_interpreter.py. test_triton_compiled.py compiles the kernels.
"""

import itertools

import cases
import pytest
import torch

from pygpt import verify
from pygpt.dispatch import OPS, TABLE

if TABLE["triton"].missing:
    pytest.fail(TABLE["triton"].missing, pytrace=False)
from pygpt.triton_kernels import common

KERNELS = TABLE["triton"].kernels
DEVICE = TABLE["triton"].devices[0]
NAMES = [f"{op}_{way}" for op in OPS for way in ("fwd", "bwd")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def registered(name):
    return getattr(torch.ops.pygpt_triton, name).default


def draw(op, dims, dtype, generator, **how):
    return verify.draw(op, dims, dtype, generator, device=DEVICE, **how)


# ------------------------------------------------------------------------------- the ops
@pytest.mark.parametrize("name", NAMES)
def test_schema_is_that_of_the_compiled_op(name):
    """But for the names of what is returned."""

    def plain(schema):
        arguments = [(a.name, str(a.type)) for a in schema.arguments]
        return arguments, [str(r.type) for r in schema.returns]

    assert plain(registered(name)._schema) == plain(getattr(torch.ops.pygpt, name).default._schema)


@pytest.mark.parametrize("op, dims", list(cases.variants(cases.TINY)), ids=cases.ids)
def test_opcheck(op, dims, generator):
    args, grads = draw(op, dims, torch.float32, generator)
    for name, call in cases.kernel_calls(op, args, grads, KERNELS):
        torch.library.opcheck(registered(name), call)


# ------------------------------------------------------------------------------- every path
def targets_and_dtypes():
    """Targets and dtypes that have configurations of their own are for `make test`, the others for `make test-all`.

    float16 has bfloat16's. float32 has sm90's, which test_parity.py runs too, or sm80's (the GEMM on gfx942).
    """
    for target, dtype in itertools.product(common.TARGETS, DTYPES):
        quick = dtype == torch.bfloat16 or target == "sm80"
        yield pytest.param(target, dtype, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize("target, dtype", list(targets_and_dtypes()), ids=cases.ids)
@pytest.mark.parametrize("op", ["attention_lse", "linear", "mlp"])
@pytest.mark.share(2)
def test_every_targets_configurations(op, target, dtype, generator):
    """And both ways of reading tiles: through descriptors (sm90, sm100) and through pointers."""
    L, S = (70, 70) if dtype == torch.float32 else (150, 140)  # two tiles or more each way
    dims = {"attention_lse": {"B": 1, "H": 2, "L": L, "S": S, "E": 64, "causal": 1}, "linear": {"M": 130, "K": 96}}
    with common.compiling_for(target):
        assert common.tileable(torch.zeros(16, 64, dtype=dtype)) == (target in ("sm90", "sm100"))
        dims = dims.get(op, {"M": 130, "C": 48, "H": 136})
        cases.assert_exact(op, dims, dtype, generator, "triton", device=DEVICE)
