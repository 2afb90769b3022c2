"""The CPU kernels without torch, in tests/cross/driver.cpp, which `make aarch64` runs on another architecture."""

import subprocess

import pytest
import torch

from bench.instructions import count
from pygpt.verify import DTYPES
from tests.cross.__main__ import DRIVER, errors

SANITIZER = "-fsanitize=signed-integer-overflow,shift", "-fno-sanitize-recover=all"


@pytest.fixture
def isa():
    if why := count.missing():
        pytest.skip(why)
    return count.instruction_set(count.recipe().ISAS)


def test_its_results_are_right(isa, tmp_path):
    """To half of a dtype's digits; how exact kernels are is tested elsewhere."""
    program = count.build_program(tmp_path, DRIVER, isa, kernels=count.kernels_of_library(isa))
    found = errors(program)
    wrong = {key: error for key, error in found.items() if not error < torch.finfo(DTYPES[key[1]]).eps ** 0.5}
    assert {dtype for _, dtype in found} == set(DTYPES) and not wrong


@pytest.mark.slow  # it builds the kernels
def test_signed_integers_neither_overflow_nor_are_shifted_too_far(isa, tmp_path):
    """C++ leaves that undefined, and setup.py's flags tell compilers that it does not happen."""
    program = count.build_program(tmp_path, DRIVER, isa, *SANITIZER, link=SANITIZER)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
