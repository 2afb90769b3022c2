"""Every Triton kernel compiled for GPUs that are not here, and held to the rules of bench.compiled."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pygpt.dispatch import TABLE

if TABLE["triton"].missing:
    pytest.fail(TABLE["triton"].missing, pytrace=False)
from pygpt.triton_kernels import common

ROOT = Path(__file__).parents[2]
OLDEST_TRITON = Path(sys.prefix) / "triton-3.6.0"  # where the Makefile installs it
needs_oldest_triton = pytest.mark.skipif(
    not (OLDEST_TRITON / "triton").is_dir(), reason="make oldest-triton installs it"
)


def wrong_kernels(*command, triton_from: Path | None = None) -> str:
    """The lines of bench.compiled's table that are wrong."""
    environment = os.environ | ({"PYTHONPATH": str(triton_from)} if triton_from else {})
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1500
    )
    assert "\ntriton: " in done.stdout, done.stderr[-3000:]
    wrong = [line for line in done.stdout.splitlines() if "WRONG: " in line]
    assert done.returncode == bool(wrong)
    return "\n".join(wrong)


def compile_all(*options, **how):
    wrong = wrong_kernels("-m", "bench.compiled", "--backends", "triton", *options, **how)
    assert not wrong, wrong


# The calls whose kernels have configurations of a target's own, but for attention's options.
TARGET_DEPENDENT = "attention 64,attention 128,attention 256,mlp gelu"
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "targets, dtype, only",
    [
        ("sm90", "bf16", "attention 128,varlen_attn 64,mlp gelu,norm 768,rope 128"),
        ("sm80", "fp32", "attention 64"),
        slow("sm90", "bf16", ""),
        slow("sm80,sm100,gfx942", "bf16", TARGET_DEPENDENT),
        slow("sm80", "fp32", TARGET_DEPENDENT),
    ],
)
def test_first_choices_compile(targets, dtype, only):
    """No error, no spill, no more shared memory than there is, and tensor cores for 16-bit products, not serialized.

    sm80 has the least shared memory of the NVIDIA targets. The rest is for `make test-all`, below.
    """
    compile_all("--targets", targets, "--dtypes", dtype, "--only", only, "--jobs", "1")


@needs_oldest_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_first_choices_compile_with_oldest_triton(target):
    compile_all("--targets", target, "--jobs", "1", triton_from=OLDEST_TRITON)


@needs_oldest_triton
@pytest.mark.slow
def test_what_oldest_triton_serializes_is_seen():
    """A tile of the plain GEMM that ptxas serializes there, which is why it is not the first choice there."""
    program = """
from bench.compiled import table as static
from pygpt.triton_kernels import mlp
mlp.GEMM["sm90", 2, "plain"].candidates = mlp._candidates((128, 256, 64, 8, 3))
raise SystemExit(static.main())
"""
    options = ["--backends", "triton", "--targets", "sm90", "--dtypes", "bf16", "--jobs", "1", "--only", "mlp gelu"]
    wrong = wrong_kernels("-c", program, *options, triton_from=OLDEST_TRITON)
    assert wrong.count("C7515") == wrong.count("WRONG: wgmma instructions are serialized") == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", common.TARGETS)
def test_every_configuration_compiles(target):
    compile_all("--targets", target, "--all", "--dtypes", "bf16,fp16,fp32")
