"""The CPU kernels do nothing with signed integers that C++ leaves undefined: setup.py's flags take it for granted."""

import subprocess

import pytest

from bench.instructions import count
from tests.cross.__main__ import DRIVER

FLAGS = "-fsanitize=signed-integer-overflow,shift", "-fno-sanitize-recover=all"


@pytest.mark.slow  # it builds the kernels
def test_integers_neither_overflow_nor_are_shifted_too_far(tmp_path):
    if why := count.missing():
        pytest.skip(why)
    isa = count.instruction_set(count.recipe().ISAS)
    program = count.build_program(tmp_path, DRIVER, isa, *FLAGS, link=FLAGS)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
