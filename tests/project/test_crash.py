"""A process that crashes names its test: see crash.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import ctypes
import pytest

@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_free(twice):
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    memory = libc.malloc(32)
    libc.free(memory)
    if twice:
        libc.free(memory)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the words are glibc's")
@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["alone", "xdist"])
def test_a_crash_names_the_test_and_glibcs_reason(workers, tmp_path):
    (tmp_path / "test_free.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.crash", "-p", "no:cacheprovider", *workers, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode
    said = done.stdout if workers else done.stderr
    assert "crashed while running" in said and "test_free[twice]" in said and "free(): double free detected" in said, (
        said
    )
