"""csrc/bind/work_stealing.h: each piece is computed once, by whoever comes first; no caller waits in vain for long."""

import ctypes
import os

import pytest

from tests import native


@pytest.fixture(scope="module")
def library():
    file = native.build(
        "work_stealing.cpp", flags=["-pthread"], depends=(native.ROOT / "csrc" / "bind" / "work_stealing.h",)
    )
    library = ctypes.CDLL(str(file))
    library.shared.restype = ctypes.c_int64
    library.shared.argtypes = [ctypes.c_int64] * 4
    library.alone.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int, ctypes.c_int64]
    return library


@pytest.mark.parametrize("n, grain", [(1, 1), (2, 1), (7, 1), (100, 3), (1000, 1), (100_003, 64)])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_index_once(n, grain, count, library):
    for late in (-1, *range(count if count > 1 else 0)):
        for _ in range(20):
            pieces = library.shared(n, grain, count, late)
            assert 1 <= pieces <= min(-(-n // grain), 8 * count), (late, pieces)


def test_a_caller_that_waited_in_vain_computes_alone_for_a_while(library):
    together, at_once, still = 0, 1, 2
    assert library.alone(2, 10, 190, 1, 0) == together  # a wait too short to count
    assert library.alone(2, 1000, 1900, 1, 0) == together  # waiting was better than computing alone
    assert library.alone(2, 1000, 2100, 1, 0) == at_once + still
    assert library.alone(4, 1000, 3900, 1, 0) == together  # three others computed
    assert library.alone(2, 10, 500, 1, 4000) == at_once  # 2 ms later it tries again
    assert library.alone(2, 10, 500, 6, 10_000) == at_once + still  # later each time


LOST = """
import os, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # two threads on one CPU
torch.set_num_threads(2)
from pygpt import functional
x, w = torch.randn(16, 128), torch.randn(128, 128)
for _ in range(30_000):
    functional.linear(x, w)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="limits the CPUs")
@pytest.mark.parametrize("log", ["threads", ""])
def test_waiting_in_vain_is_said_once(log, run_new_python):
    done = run_new_python(LOST, PYGPT_LOG=log, OMP_WAIT_POLICY="active")
    lines = [line for line in done.stderr.splitlines() if line.startswith("pygpt: a CPU kernel computed for")]
    assert done.stdout == "done\n" and len(lines) == (log == "threads"), done.stderr
