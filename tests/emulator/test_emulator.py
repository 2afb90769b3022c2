"""The emulator itself: its parts against their definitions (emulator/basics.cu), and emulator/planted_bugs.cu.

Each bug must be found, by wrong values under some schedule, by an error or by a sanitizer, and the same kernel
without it must pass everything.
"""

import ctypes
import math
import os
import re
import subprocess
import sys

import cases
import numpy as np
import pytest
import torch

from tests import emulator
from tests.emulator import build

SCHEDULES = (*emulator.SCHEDULES, "ahead")
INT, FLOAT = np.int32, np.float32
SEEDS = range(3)


@pytest.fixture(params=SCHEDULES)
def basics(request, seed):
    """Runs a kernel of basics.cu under each schedule: (name, input, output, n=, grid=, block=, shared=)."""
    module = build.load_tests("basics")
    module.schedule(request.param, seed % 2**32)
    module.reset_statistics()

    def run(name, source, out, n=0, grid=(1, 1, 1), block=(32, 1, 1), shared=0):
        function = module.library.basics
        function.restype = ctypes.c_char_p
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (source, out)]
        error = function(name.encode(), *pointers, n, (ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*block), shared)
        if error:
            raise RuntimeError(error.decode())
        return out

    run.module, run.schedule = module, request.param
    return run


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_conversions_are_those_of_torch(basics, dtype):
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = basics(f"widen {name}", every, np.empty(every.size, FLOAT), every.size, (256, 1, 1), (256, 1, 1))
    expected = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(wide, expected)
    # Every float that is one of these numbers, halfway between two, or next to such a one.
    bits = wide.view(np.uint32).astype(np.int64)
    halfway = (bits[:-1] + bits[1:])[:, None] // 2 + np.arange(-1, 2)
    floats = np.concatenate([wide, halfway.astype(np.uint32).ravel().view(FLOAT)])
    narrow = basics(f"narrow {name}", floats, np.empty(floats.size, np.uint16), floats.size, (1024, 1, 1), (256, 1, 1))
    expected = torch.from_numpy(floats).to(dtype).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(floats)
    np.testing.assert_array_equal(narrow[~nan], expected[~nan])
    assert (narrow[nan] == 0x7FFF).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_mma_is_a_product(basics, dtype, generator):
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    a, b = (torch.randn(16, n, generator=generator).to(dtype) for n in (16, 8))
    d = torch.randn(16, 8, generator=generator)
    packed = np.concatenate([x.contiguous().view(torch.uint8).numpy().ravel() for x in (a, b, d)])
    out = basics(f"product {name}", packed, np.empty((16, 8), FLOAT))
    np.testing.assert_allclose(out, (a.double() @ b.double() + d.double()).numpy(), rtol=0, atol=2e-5)
    assert basics.module.statistics()["mma"] == 1


# ---------------------------------------------------------------- threads and warps


@pytest.mark.parametrize(
    "grid, block", [((3, 4, 5), (2, 3, 7)), ((17, 1, 1), (1024, 1, 1)), ((1, 1, 1), (1, 1, 1))], ids=str
)
def test_every_thread_of_every_block_runs_once(basics, grid, block):
    out = np.zeros((math.prod(grid), math.prod(block)), INT)
    basics("visit", out, out, grid=grid, block=block)
    assert (out == 1).all()


def test_order_of_threads(basics):
    order = basics("arrive", np.empty(0, INT), np.empty(64, INT), block=(64, 1, 1)).tolist()
    assert sorted(order) == list(range(64))
    expected = {"fifo": list(range(64)), "reversed": list(range(63, -1, -1))}
    if basics.schedule in expected:
        assert order == expected[basics.schedule]
        return
    assert order not in expected.values()
    basics.module.schedule("random", 7)
    first, second = (basics("arrive", np.empty(0, INT), np.empty(64, INT), block=(64, 1, 1)).tolist() for _ in range(2))
    basics.module.schedule("random", 7)
    again = basics("arrive", np.empty(0, INT), np.empty(64, INT), block=(64, 1, 1)).tolist()
    assert first == again != second


def test_exchanges_of_a_warp(basics):
    x, t = np.random.default_rng().permutation(96)[:32].astype(INT), np.arange(32)
    out = basics("exchange", x, np.empty((8, 32), INT))
    votes = sum(1 << i for i in range(32) if x[i] % 3 == 0)
    expected = [
        np.full(32, x[5]),
        x[t // 8 * 8 + (t + 3) % 8],
        x[np.where(t < 3, t, t - 3)],
        x[np.where(t % 16 + 3 < 16, (t + 3) % 32, t)],
        x[t ^ 9],
        np.full(32, votes, np.uint32).view(INT),
        np.full(32, 1),
        np.where(t < 10, x[t ^ 1], x[31]),
    ]
    np.testing.assert_array_equal(out, np.stack(expected))


def test_atomics(basics):
    x = np.random.default_rng().integers(1, 1 << 20, 128).astype(INT)
    out = basics("atomics", x, np.array([0, 0, 1 << 30, 0, 0, 0], INT), block=(128, 1, 1))
    expected = [x.sum(), x.max(), x.min(), np.bitwise_or.reduce(x), np.array(128, FLOAT).view(INT), 128]
    assert out.tolist() == [int(e) for e in expected]


# ---------------------------------------------------------------- shared memory


@pytest.mark.parametrize("stride, cycles", [(16, 1), (128, 8)], ids=["dense", "one_bank"])
def test_ldmatrix_and_its_bank_conflicts(basics, stride, cycles):
    x = np.random.default_rng().integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    out = basics(f"fragments {stride}", x, np.empty((2, 4, 32), np.uint32), shared=32 * stride)
    plain = np.ascontiguousarray(x).view(np.uint32).reshape(4, 32)
    transposed = np.ascontiguousarray(x.transpose(0, 2, 1)).view(np.uint32).reshape(4, 32)
    np.testing.assert_array_equal(out, np.stack([plain, transposed]))
    found = basics.module.statistics()
    assert (found["ldmatrix_phases"], found["ldmatrix_cycles"]) == (8, 8 * cycles)


def test_shared_memory_is_nan_for_every_block(basics):
    assert np.isnan(basics("fresh", np.empty(0, FLOAT), np.zeros(64, FLOAT), grid=(5, 1, 1), shared=128)).all()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "grid, block, shared, message",
    [
        ((1, 1, 1), (1025, 1, 1), 0, "1 to 1024 threads, got 1025"),
        ((0, 1, 1), (32, 1, 1), 0, "invalid grid"),
        ((1, 65536, 1), (32, 1, 1), 0, "invalid grid"),
        ((1, 1, 1), (32, 1, 1), 228 << 10, "shared memory, more than"),
    ],
)
def test_impossible_launches(basics, grid, block, shared, message):
    out = np.zeros(1, INT)
    with pytest.raises(RuntimeError, match=message):
        basics("visit", out, out, grid=grid, block=block, shared=shared)
    assert out == 0


def test_shared_memory_of_a_block_has_an_end(basics):
    with pytest.raises(RuntimeError, match="no room for the shared variable s"):
        basics("fresh", np.empty(0, FLOAT), np.zeros(64, FLOAT), shared=227 << 10)


@pytest.mark.parametrize("name", ["crash", "overflow"])
def test_a_crash_is_an_error_and_the_next_launch_works(basics, name):
    with pytest.raises(RuntimeError, match="a crash at address"):
        basics(name, np.zeros(1, INT), np.zeros(1, INT))
    out = np.zeros((1, 32), INT)
    assert (basics("visit", out, out) == 1).all()


def test_unknown_schedule():
    with pytest.raises(ValueError, match="'fifo', 'reversed', 'random' or 'ahead', got 'lifo'"):
        build.load_tests("basics").schedule("lifo")


# ---------------------------------------------------------------- planted bugs

# Wrong values: under every schedule but those named, which a lucky order hides it from.
BY_VALUES = {
    "no_syncthreads": (),
    "no_syncwarp": (),
    "overwrite_before_read": (),
    "one_buffer_for_two_rounds": ("fifo", "reversed", "random"),
    "uninitialised": (),
    "blocks_in_order": ("fifo", "ahead"),
    "no_wait": (),
    "wait_for_too_few": (),
    "no_commit": (),
    "no_barrier_after_wait": ("reversed",),
    "copy_before_barrier": (),
    "swapped_registers": (),
    "source_not_in_mask": (),
}
BY_ERROR = {
    "barrier_in_branch": r"planted_bugs.cu:\d+: __syncthreads\(\) while other threads .* in planted_bugs.cu:\d+",
    "lane_skips_syncwarp": r"(?s)deadlock.*__syncwarp.*31 threads \(0..4, 6..31\).*__syncthreads.*\(5, 32..127\)",
    "ldmatrix_past_end": "ldmatrix from no variable in shared memory",
    "store_past_end": "went 1 bytes past the end of s",
    "misaligned": r"planted_bugs.cu:\d+: an access at 4 modulo 16",
    "caller_not_in_mask": "the caller, lane [0-9]+, is not in its mask",
    "lanes_have_ended": "have ended|which ended",
    "different_instructions": "while other lanes wait for this one in __shfl",
    "different_masks": "with another mask",
}
BY_UNDEFINED = {
    "index_past_end": r"planted_bugs.cu:\d+: index \d+ is out of the array's bounds",
}
BY_ADDRESS = ("store_past_end", "global_past_end", "global_read_past_end")
BY_THREAD = (
    "no_syncthreads",
    "no_syncwarp",
    "shuffle_for_syncwarp",
    "overwrite_before_read",
    "one_buffer_for_two_rounds",
    "blocks_in_order",
    "no_barrier_after_wait",
    "copy_before_barrier",
)
CASES = sorted({*BY_VALUES, *BY_ERROR, *BY_UNDEFINED, *BY_ADDRESS, *BY_THREAD})


def run_case(module, name: str, bug: bool) -> str:
    """The outcome of a case of planted_bugs.cu: "" if its values are right, "wrong values", or the error."""
    function = module.library.planted_bug
    function.restype = ctypes.c_char_p
    source, out = np.tile(np.arange(128, dtype=FLOAT), 4), np.zeros(128, FLOAT)
    error = function(name.encode(), bug, *(ctypes.c_void_p(a.ctypes.data) for a in (source, out)))
    return error.decode() if error else "" if (out == np.arange(128)).all() else "wrong values"


def outcomes(module, name: str, bug: bool) -> dict[str, set[str]]:
    found = {}
    for schedule in SCHEDULES:
        for seed in SEEDS if schedule == "random" else (0,):
            module.schedule(schedule, seed)
            found.setdefault(schedule, set()).add(run_case(module, name, bug))
    return found


def test_every_case_is_listed():
    names = re.findall(r"PYGPT_CASE\((\w+)(?:, \d+, \d+)?\)[,}]", (build.HERE / "planted_bugs.cu").read_text())
    assert sorted(names) == CASES


@pytest.mark.parametrize("name", CASES)
def test_right_kernels_pass(name):
    assert outcomes(build.load_tests("planted_bugs"), name, bug=False) == {s: {""} for s in SCHEDULES}


@pytest.mark.parametrize("name", BY_VALUES)
def test_values_tell(name):
    lucky = BY_VALUES[name]
    found = outcomes(build.load_tests("planted_bugs"), name, bug=True)
    assert found == {s: {"" if s in lucky else "wrong values"} for s in SCHEDULES}


@pytest.mark.parametrize("name", BY_ERROR)
def test_errors_tell(name):
    for messages in outcomes(build.load_tests("planted_bugs"), name, bug=True).values():
        for message in messages:
            assert re.search(BY_ERROR[name], message)


@pytest.mark.parametrize("name", BY_UNDEFINED)
def test_the_undefined_sanitizer_tells(name):
    module = build.load_tests("planted_bugs", sanitizer="undefined")
    assert outcomes(module, name, bug=False) == {s: {""} for s in SCHEDULES}
    for messages in outcomes(module, name, bug=True).values():
        for message in messages:
            assert re.search(BY_UNDEFINED[name], message)


def run_sanitized(sanitizer: str, source: str, *arguments: str):
    """A Python process with the sanitizer; what it imports are this folder's and the checkout's modules."""
    env = {**os.environ, **build.environment(sanitizer)}
    env["PYTHONPATH"] = os.pathsep.join([str(build.ROOT), str(build.ROOT / "tests"), *filter(None, sys.path)])
    job = [sys.executable, "-c", source, sanitizer, *arguments]
    return subprocess.run(job, env=env, check=False, capture_output=True, text=True, timeout=1800)


RUN_CASES = """
import ctypes
import sys
import numpy as np
from tests.emulator import build
module = build.load_tests("planted_bugs", sanitizer=sys.argv[1])
module.library.planted_bug.restype = ctypes.c_char_p
for case in sys.argv[2:]:
    name, bug = case.split("=")
    x, y = np.tile(np.arange(128, dtype=np.float32), 4), np.zeros(128, np.float32)
    for schedule in ("fifo", "reversed", "random"):
        module.schedule(schedule, 0)
        module.library.planted_bug(name.encode(), bug == "1", *(ctypes.c_void_p(a.ctypes.data) for a in (x, y)))
    print("end of", case, file=sys.stderr, flush=True)
"""


def test_a_sanitizer_that_is_not_loaded_says_how():
    with pytest.raises(RuntimeError, match="LD_PRELOAD=.*libasan.*"):
        build.load_tests("planted_bugs", sanitizer="address")


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_ADDRESS)
def test_the_address_sanitizer_tells(name):
    done = run_sanitized("address", RUN_CASES, *(f"{c}=0" for c in CASES), f"{name}=1")
    assert "end of source_not_in_mask=0" in done.stderr and done.returncode
    assert re.search(rf"AddressSanitizer.*\n(.*\n)+?.*#0 .*{name}<true>.*planted_bugs.cu:\d+", done.stderr)


@pytest.mark.slow
def test_the_thread_sanitizer_tells():
    right, wrong = [f"{c}=0" for c in CASES], [f"{c}=1" for c in BY_THREAD]
    done = run_sanitized("thread", RUN_CASES, *right, *wrong)
    parts = dict(zip([*right, *wrong], re.split(r"end of .*\n", done.stderr), strict=False))
    assert {case for case, text in parts.items() if "data race" in text} == set(wrong), done.stderr[-3000:]
    for name in BY_THREAD:
        assert re.search(rf"#0 {name}<true>.*planted_bugs.cu:\d+", parts[f"{name}=1"])


# ---------------------------------------------------------------- the library's kernels: another schedule, other builds

WORK = [  # more than one tile, step or row for every warp and block
    *cases.variants(cases.TYPICAL),
    ("attention", {"L": 130, "S": 130, "E": 64, "causal": 1}),
    # Of a matrix whose rows are apart, PyTorch's own bfloat16 product on AMX reads what lies between them.
    ("linear", {"M": (2, 65), "K": 264, "N": 136}),
    ("layer_norm", {"M": 2, "N": 4099}),
    ("rms_norm", {"M": 8, "N": 1100}),
    ("rms_norm", {"M": 2, "N": 17_000}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.ids)
@pytest.mark.parametrize("op, dims", WORK, ids=cases.ids)
@pytest.mark.share(2)
def test_kernels_with_one_warp_ahead(op, dims, dtype, emulated, generator):
    emulated(schedules=("fifo", "ahead"))
    cases.assert_exact(op, dims, dtype, generator, "cuda")


KERNELS = """
import sys
from dataclasses import replace
import cases, test_emulator, test_norm, torch
from pygpt import verify
from pygpt.dispatch import TABLE
from tests import emulator

kernels = emulator.kernels(sys.argv[1])
TABLE["cuda"] = replace(TABLE["cuda"], kernels=kernels, missing="", devices=("cpu",))
torch.set_num_threads(1)
verify.ELEMENTS = 1
generator = torch.Generator().manual_seed(int(sys.argv[2]))
every = [(dtype, view) for dtype in (torch.bfloat16, torch.float32) for view in (cases.contiguous, cases.embedded)]
test_norm.assert_a_single_column_has_no_gradient(kernels, torch.float32, generator)
for op, dims in test_emulator.WORK:
    for dtype, view in every[::2] if sys.argv[1] == "thread" else every:  # each access costs it 20 times as much
        cases.assert_exact(op, dims, dtype, generator, "cuda", view=view)
    print(op, dims, flush=True)
print("all right")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["undefined", "address", "thread", "contracted"])
def test_kernels_under_a_sanitizer(sanitizer, seed):
    """Every kernel, under every schedule, within the rule of parity. "contracted" has products and sums fused."""
    done = run_sanitized(sanitizer, KERNELS, str(seed))
    assert done.returncode == 0 and "all right" in done.stdout, done.stderr[-5000:]
    assert "Sanitizer" not in done.stderr, done.stderr[:5000]
