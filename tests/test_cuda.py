"""What is CUDA C++'s own: what was built, how it is loaded, and the machine code that nvcc made.

Parity with float64 is in test_parity.py and test_kernels.py; without a GPU it runs on the emulator, which has its own
tests in test_emulator.py.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pygpt

ROOT = Path(__file__).parents[1]
LIBRARY = find_spec("pygpt._cuda")
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the CUDA kernels were not built: no nvcc")


def test_built_where_there_is_nvcc():
    """A library that is missing is never a silent failure of its build."""
    if os.environ.get("PYGPT_BUILD_CUDA") != "0" and shutil.which("nvcc"):
        assert LIBRARY is not None


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"PYGPT_BUILD_CUDA": "yes"}, "PYGPT_BUILD_CUDA must be 0 or 1, got 'yes'"),
        (
            {"PYGPT_BUILD_CUDA": "1", "PATH": "/nowhere", "CUDA_HOME": "/nowhere"},
            "PYGPT_BUILD_CUDA=1, but nvcc is neither",
        ),
        ({"PYGPT_BUILD_CUDA": "1", "PYGPT_CUDA_ARCHS": "hopper"}, "must be compute capabilities from 80 on"),
        ({"PYGPT_BUILD_CUDA": "1", "PYGPT_CUDA_ARCHS": "75 90"}, "must be compute capabilities from 80 on"),
    ],
)
def test_bad_wishes_stop_the_build_before_it_begins(variables, message):
    if "PYGPT_CUDA_ARCHS" in variables and not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    if variables.get("PATH") and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is where it is always found")
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and message in done.stderr, done.stderr


@needs_library
def test_what_is_left_to_torchs_cuda_part():
    """Everything else is in the library, in torch without CUDA, or in the system: it can be built on any machine."""
    shown = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY.origin], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in shown.stdout.splitlines()}
    in_any_torch = "aoti_torch_device_type_cuda"
    assert {n for n in names if "cuda" in n.lower()} - {in_any_torch} == {"aoti_torch_get_current_cuda_stream"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_not_loaded_without_a_gpu(run_python):
    done = run_python(
        "import sys; from pygpt.backend import TABLE; print('pygpt._cuda' in sys.modules, TABLE['cuda'].missing)"
    )
    assert done.stdout.startswith("False torch finds no GPU here"), done.stdout + done.stderr
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: torch finds no GPU here"):
        pygpt.backend("cuda").__enter__()


@needs_library
def test_machine_code():
    """No kernel spills in a loop, needs more shared memory than there is, or multiplies 16 bits without tensor cores."""
    command = [sys.executable, "-m", "bench.static", "--backends", "cuda", "--dtypes", "bf16,fp16,fp32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    wrong = [line for line in done.stdout.splitlines() if "WRONG: " in line]
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for kernel in (
        "attention_fwd",
        "attention_dkdv",
        "mma_gemm",
        "ffma_gemm",
        "few_rows",
        "norm_fwd",
        "activation_fwd",
    ):
        assert kernel in done.stdout, kernel
