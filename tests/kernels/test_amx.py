"""The AMX kernels on a machine that has AVX512_BF16 but no AMX: built once more, with AMX's intrinsics emulated.

A machine that has AMX runs the real kernels in test_parity. See emulator/amx.h.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("pygpt", "csrc", "tests", "triton_kernels", "bench", "setup.py", "pyproject.toml", "README.md")
COUNT = """
import ctypes, sys
import pytest
from pygpt import _C
assert _C.__file__.startswith(sys.argv[1]), _C.__file__
products = ctypes.c_longlong.in_dll(ctypes.CDLL(_C.__file__), "emulated_amx_products")
files = ["tests/ops/test_parity.py", "tests/kernels/test_kernels.py"]
status = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", sys.argv[2], *files])
assert products.value > 1000, products
sys.exit(status)
"""


@pytest.mark.slow
def test_emulated_amx(tmp_path):
    from pygpt import _C

    if "avx512_bf16" not in _C.cpu_capabilities():
        pytest.skip("this CPU has no AVX512_BF16, which the kernels use beside AMX")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "build", "out")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part, **({"ignore": ignore} if copy is shutil.copytree else {}))
    env = {
        **os.environ,
        "CPPFLAGS": f"-include {tmp_path / 'tests/emulator/amx.h'}",
        "PYGPT_BUILD_CUDA": "0",
        "PYTHONPATH": str(tmp_path),
        "PYGPT_CPU_CAPABILITY": "avx512_bf16",
    }

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], env=env, cwd=tmp_path, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]

    run("setup.py", "build_ext", "--inplace")
    run("-c", COUNT, str(tmp_path), "cpp and bfloat16 and (attention or linear or mlp)")
