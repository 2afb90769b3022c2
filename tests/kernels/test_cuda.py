"""What is CUDA C++'s own: what was built, how it is loaded, and the machine code that nvcc made.

Parity with float64 is in test_parity.py and test_kernels.py; without a GPU it runs on the emulator, which has its own
tests in test_emulator.py.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import pygpt

ROOT = Path(__file__).parents[2]
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
        ({"PYGPT_BUILD_CUDA": "1", "PYGPT_CUDA_ARCHS": "75 90"}, "such as '80 90', got '75'"),
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


@pytest.fixture
def build(tmp_path, monkeypatch):
    """setup.py as a module, and a machine whose nvcc knows a few GPUs and whose nvidia-smi tells those given."""
    spec = spec_from_file_location("pygpt_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def program(name, lines):
        (tmp_path / name).write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in lines))
        (tmp_path / name).chmod(0o755)

    def archs(wanted="", there=()):
        program("nvcc", ["compute_75", "compute_80", "compute_90", "compute_100", "compute_103"])
        program("nvidia-smi", there)
        monkeypatch.setenv("PYGPT_CUDA_ARCHS", wanted)
        return module.cuda_archs("nvcc")

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    module.archs = archs
    return module


@pytest.mark.parametrize(
    "wanted, there, archs, code",
    [
        ("", [], "80 90", "sm_80 sm_90 compute_90"),
        ("", ["9.0", "9.0"], "90a", "sm_90a"),
        ("", ["9.0", "8.0"], "80 90a", "sm_80 sm_90a compute_80"),
        ("", ["7.5", "12.1", "[N/A]"], "80 90", "sm_80 sm_90 compute_90"),  # none that nvcc and we can serve
        ("90a;80,9.0 80", ["8.0"], "80 90 90a", "sm_80 sm_90 sm_90a compute_90"),
        ("100 90a 103f 90", [], "90 90a 100 103f", "sm_90 sm_90a sm_100 sm_103f compute_100"),
    ],
)
def test_what_is_built(wanted, there, archs, code, build):
    assert build.archs(wanted, there) == archs.split()
    assert build.cuda_code(archs.split()) == code.split()


@pytest.mark.parametrize("wanted", ["hopper", "75", "85", "80a", "90f", "90b", "a", "90aa", "sm_90"])
def test_what_cannot_be_built_is_named_with_what_can(wanted, build):
    with pytest.raises(SystemExit, match=rf"(?s)got {wanted!r}.*nvcc knows 80 90 100 103; those from 90 on"):
        build.archs(f"80 {wanted}")


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
        "import sys; from pygpt.dispatch import TABLE; print('pygpt._cuda' in sys.modules, TABLE['cuda'].missing)"
    )
    assert done.stdout.startswith("False torch finds no GPU here"), done.stdout + done.stderr
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: torch finds no GPU here"):
        pygpt.backend("cuda").__enter__()


@needs_library
def test_machine_code():
    """No kernel spills in a loop, needs more shared memory than a GPU has, or skips tensor cores in 16 bits."""
    command = [sys.executable, "-m", "bench.compiled", "--backends", "cuda", "--dtypes", "bf16,fp16,fp32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    wrong = [line for line in done.stdout.splitlines() if "WRONG: " in line]
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for kernel in (
        "attention_fwd",
        "attention_dkdv",
        "mma_gemm",
        "ffma_gemm",
        "gemv",
        "norm_fwd",
        "activation_fwd",
    ):
        assert kernel in done.stdout, kernel
