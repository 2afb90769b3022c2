"""Bitwise the same result: run to run, for any number of threads, and from several threads at once."""

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

import pygpt
from pygpt import verify

LARGE = {  # several tiles, rows and chunks for every thread, none a multiple of anything
    "attention": {"B": 2, "H": 3, "L": 333, "S": 270, "E": 40, "Ev": 72, "causal": 1},
    "attention_lse": {"B": 1, "H": 1, "L": 600, "S": 700, "E": 64, "causal": 0},
    "linear": {"M": 301, "K": 333, "N": 259},
    "mlp": {"M": 301, "C": 100, "H": 413, "O": 99},
    "layer_norm": {"M": 1001, "N": 257},
    "add_layer_norm": {"M": 1001, "N": 257},
    "rms_norm": {"M": 1001, "N": 257},
    "gelu": {"M": 300_007},
    "relu": {"M": 300_007},
}
EVERY = [*cases.variants(LARGE), ("linear", {"M": 100, "K": 301, "N": 233})]  # some rows of a W that stays unpacked
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def assert_equal(found, want, what):
    assert found.keys() == want.keys()
    for key, t in want.items():
        assert torch.equal(found[key], t), f"{key} {what}"


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op, dims", EVERY, ids=cases.ids)
def test_runs_and_thread_counts(op, dims, dtype, compiled, generator):
    args, grads = verify.draw(op, dims, dtype, generator)
    with pygpt.backend(compiled):
        want = verify.directions(op, verify.SPECS[op].call, args, grads)
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            assert_equal(verify.directions(op, verify.SPECS[op].call, args, grads), want, f"with {threads} threads")


@pytest.mark.parametrize("op", cases.TYPICAL)
def test_alignment_of_memory_does_not_matter(op, compiled, generator):
    """The same values at another address, in rows farther apart: the same bits."""
    args, grads = verify.draw(op, LARGE[op], torch.float32, generator)
    with pygpt.backend(compiled):
        want = verify.directions(op, verify.SPECS[op].call, args, grads)
        moved = [[cases.embedded(a) if isinstance(a, torch.Tensor) else a for a in group] for group in (args, grads)]
        assert_equal(verify.directions(op, verify.SPECS[op].call, *moved), want, "elsewhere in memory")


@pytest.mark.parametrize("inner", [1, 2])
def test_called_from_several_threads_at_once(inner, compiled, generator):
    work = [(op, *verify.draw(op, dims, torch.float32, generator)) for op, dims in cases.variants(cases.TYPICAL)]

    def run(item):
        op, args, grads = item
        with pygpt.backend(compiled):  # the choice is per thread
            return verify.directions(op, verify.SPECS[op].call, args, grads)

    serial = [run(item) for item in work]
    torch.set_num_threads(inner)
    with ThreadPoolExecutor(4) as pool:
        for found, want, item in zip(pool.map(run, work * 20), serial * 20, work * 20, strict=True):
            assert_equal(found, want, item[0])
