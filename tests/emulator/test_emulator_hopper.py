"""Hopper in the emulator: a TMA + mbarrier + wgmma GEMM, its planted bugs, and the conformance cases of ptx.cuh."""

import ctypes
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench.compiled import sass as gpu_code
from tests.emulator import SCHEDULES, build, conformance

GEMM, CASES = conformance.SOURCES[1], conformance.SOURCES[0]


@pytest.fixture(params=SCHEDULES)
def machine(request, seed):
    return conformance.in_emulator(request.param, seed % 2**32)


# ---------------------------------------------------------------- the GEMM


@pytest.mark.parametrize("b_k_major", [True, False], ids=["b_n_k", "b_k_n"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", [(128, 128, 64), (1, 1, 1), (129, 8, 65), (200, 150, 390), (64, 300, 1000)], ids=str)
def test_gemm_of_integers_is_exact(machine, shape, dtype, b_k_major):
    assert conformance.integer_gemm(machine, *shape, dtype, b_k_major)


def test_gemm_is_as_exact_as_pytorch(machine):
    for dtype in (torch.bfloat16, torch.float16):
        a, b = torch.randn(150, 400).to(dtype), torch.randn(400, 136).to(dtype)
        c = torch.empty(150, 136, dtype=dtype)
        machine.gemm(a, b, c, b_k_major=False)
        exact = a.double() @ b.double()
        assert (c.double() - exact).abs().max() <= 2 * ((a @ b).double() - exact).abs().max()


def test_nan_and_inf_reach_their_rows_only(machine):
    a, b, c = torch.ones(130, 64), torch.ones(64, 8), torch.empty(130, 8)
    a[3, 5], a[129, 63] = torch.nan, torch.inf
    a, b, c = a.bfloat16(), b.bfloat16(), c.bfloat16()
    machine.gemm(a, b, c, b_k_major=False)
    want = torch.full((130, 8), 64.0)
    want[3], want[129] = torch.nan, torch.inf
    torch.testing.assert_close(c.float(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns, complaint", [(60, "16 bytes"), (64, None)])
def test_tensor_maps_are_checked(machine, columns, complaint):
    a, b, c = (torch.ones(64, columns, dtype=torch.bfloat16) for _ in range(3))
    if complaint:
        with pytest.raises(RuntimeError, match=complaint):
            machine.gemm(a, b, c, b_k_major=True)
    else:
        machine.gemm(a, b, c, b_k_major=True)


# ---------------------------------------------------------------- planted bugs

# What is planted, where, what the source says and what it says then; and what must be found: by a report that
# matches, or (None) by wrong or differing results.
BUGS = {
    "no wait for an empty stage": (GEMM, "ptx::mbarrier_wait(&empty[turn.stage], (turn.round + 1) % 2);", "", None),
    "empty waits for the wrong parity": (GEMM, "(turn.round + 1) % 2", "turn.round % 2", "deadlock"),
    "too few bytes expected": (GEMM, "mbarrier_expect(bar, kTileA + kTileB)", "mbarrier_expect(bar, kTileA)", None),
    "too many bytes expected": (
        GEMM, "mbarrier_expect(bar, kTileA + kTileB)", "mbarrier_expect(bar, 40960)", "deadlock"),
    "one arrival too many asked for": (GEMM, "4 * kConsumers)", "4 * kConsumers + 1)", "deadlock"),
    "one arrival too few asked for": (GEMM, "4 * kConsumers)", "4 * kConsumers - 1)", None),
    "arrivals of groups, not warps, asked for": (GEMM, "4 * kConsumers)", "kConsumers)", None),
    "no barrier after mbarrier_init": (GEMM, "__syncthreads();", "", "not initialised"),
    "no wait for the last products": (GEMM, "ptx::wgmma_wait<0>(d);", "", None),
    "a stage given back while it is read": (GEMM, "ptx::wgmma_wait<1>();", "", None),
    "no fence for the zeroed accumulators": (GEMM, "ptx::wgmma_fence(d);", "", "wgmma_fence"),
    "a descriptor's stride": (GEMM, "consumer * 64 * kRow, 16, 8 * kRow", "consumer * 64 * kRow, 16, 4 * kRow", None),
    "a descriptor's leading offset": (GEMM, "b_k_major ? 16 : 64 * kRow", "b_k_major ? 16 : 32 * kRow", None),
    "a descriptor's swizzle": (GEMM, "b_k_major ? 16 : 64 * kRow, 8 * kRow, kSwizzle",
                               "b_k_major ? 16 : 64 * kRow, 8 * kRow, ptx::Swizzle::bytes64", None),
    "an operand in the middle of its swizzle": (
        GEMM, "tiles.a(stage) + consumer * 64 * kRow", "tiles.a(stage) + consumer * 4 * kRow", "middle of its swizzle"),
    "a producer that keeps its registers": (GEMM, "ptx::decrease_registers<40>();", "", "increase_registers"),
    "more registers than there are": (
        GEMM, "ptx::increase_registers<232>();", "ptx::increase_registers<240>();", "increase_registers"),
    "a barrier of which a warp's first lane reports": (
        CASES, "    ptx::named_barrier_arrive(1, 64);", "    if (lane == 0) ptx::named_barrier_arrive(1, 64);",
        "named barrier", "named_barrier_arrive"),
    "a block that ends while its neighbour reads": (
        CASES, "  ptx::mbarrier_wait(done, 0);", "", None, "multicast"),
    "a k step": (GEMM, "a + k * 32 / 16", "a + k * 16 / 16", None),
    "the epilogue's swizzle": (GEMM, "j % 8 ^ r % 8", "j % 8", None),
    "no proxy fence before the store": (GEMM, "ptx::fence_proxy_async();", "", None),
    "no barrier before the store": (GEMM, "ptx::named_barrier(1 + consumer, 128);", "", None),
    "no wait for the store": (GEMM, "ptx::tma_store_wait<0>();", "", "this store reads"),
    "no cluster barrier before reading": (
        CASES, "ptx::cluster_arrive();\n  ptx::cluster_wait();\n  out[2", "out[2", None, "cluster"),
    "no cluster barrier before the end": (
        CASES, "= rank;\n  ptx::cluster_arrive();\n  ptx::cluster_wait();", "= rank;", None, "cluster"),
    "a buffer filled before it was read": (
        CASES, "if (i > 0) ptx::named_barrier(2, 64);", "", None, "named_barrier_arrive"),
    "the first lane taken for the elected one": (
        CASES, "again = ptx::elect_one();", "again = threadIdx.x % 32 == 0;", None, "elect_one"),
    "a stored matrix that is not transposed": (CASES, "ptx::stmatrix_x4_trans(", "ptx::stmatrix_x4(", None, "stmatrix"),
    "no wait for a bulk load": (
        CASES, "ptx::mbarrier_wait(full, 0);\n  for (int i = threadIdx.x; i < 260",
        "for (int i = threadIdx.x; i < 260", None, "bulk_load"),
    "a bulk load of one byte too many": (
        CASES, "in + 404, 16, full", "in + 404, 17, full", "multiples of 16", "bulk_load"),
    "a batch's matrix and its entry exchanged": (
        CASES, "full, corner.x, corner.y, corner.z, corner.w", "full, corner.x, corner.y, corner.w, corner.z", None,
        "tma_load_4d"),
    "a store of a batch as one of a matrix": (
        CASES, "tma_store_4d(&map, shared, corner.x, corner.y, corner.z, corner.w)",
        "tma_store_2d(&map, shared, corner.x, corner.y)", "4 dimensions", "tma_store_4d"),
    "a multicast that leaves out the next block": (
        CASES, "uint16_t(1 << rank | 1 << next)", "uint16_t(1 << rank)", "deadlock", "multicast"),
    "a multicast to a block that is not ready": (
        CASES, "ptx::cluster_arrive();\n  ptx::cluster_wait();\n  if (threadIdx.x == 0)\n", "if (threadIdx.x == 0)\n",
        "not initialised", "multicast"),
    "an arrival at a block outside of the cluster": (
        CASES, "mbarrier_arrive_at(done, next)", "mbarrier_arrive_at(done, rank + 1)", "no block 4", "multicast"),
}  # fmt: skip


ORDERS = [("fifo", 0), ("reversed", 0), *(("random", seed) for seed in range(4))]


def findings(machine, source, case=None):
    """Per order of events what the emulator says of a source, or one of its cases: a report, "wrong", or None."""
    if source == CASES:
        right = conformance.in_emulator().run(case)
    for schedule, seed in ORDERS:
        machine.schedule(schedule, seed)
        cases = conformance.Cases(machine.library, "cpu", 900)
        try:
            if source == CASES:
                yield "wrong" if conformance.difference(case, cases.run(case), right) else None
            else:
                shapes = (200, 150, 1000, torch.bfloat16, True), (200, 150, 390, torch.float16, False)
                yield None if all(conformance.integer_gemm(cases, *s) for s in shapes) else "wrong"
        except RuntimeError as e:
            yield str(e)


def planted(bug):
    """The file with the bug in it."""
    source, right, wrong, *_ = BUGS[bug]
    text = source.read_text()
    assert text.count(right) == 1, f"{source.name} has {text.count(right)} times {right!r}"
    file = build.BUILD / "planted" / re.sub(r"\W", "_", f"{bug}.cu").replace("_cu", ".cu")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text.replace(right, wrong):
        file.write_text(text.replace(right, wrong))
    return file


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.share(2)
def test_planted_bug_is_found(bug):
    source, _, _, complaint, *case = BUGS[bug]
    file = planted(bug)
    found = list(findings(build.load_tests(file), source, *case))
    assert any(found), f"not found under any of {ORDERS}"
    assert not complaint or any(complaint in (f or "") for f in found), found
    print(*found, sep="\n")


RACES = """
import sys, torch
from tests.emulator import build, conformance
machine = build.load_tests(sys.argv[1], sanitizer="thread")
cases = conformance.Cases(machine.library, "cpu", 900)
print(conformance.integer_gemm(cases, 200, 150, 390, torch.bfloat16, True))
"""


@pytest.mark.parametrize("bug", [None, "no barrier before the store"])
def test_race_checker_sees_tma_and_wgmma(bug, run_new_python):
    file = planted(bug) if bug else GEMM
    done = run_new_python(RACES, str(file), **build.environment("thread"))
    assert ("data race" in done.stderr) == bool(bug), done.stderr[-3000:]
    assert bug or (done.returncode == 0 and done.stdout == "True\n"), done.stdout + done.stderr[-3000:]


# ---------------------------------------------------------------- conformance


def test_conformance_cases_do_not_depend_on_the_schedule(machine):
    first = conformance.in_emulator()
    answers = {name: first.run(name) for name in first.index}
    other = conformance.in_emulator("random", 1)
    for name, answer in answers.items():
        assert answer.any() and (other.run(name) == answer).all(), name


def test_emulator_answers_as_gpus_did():
    for path in conformance.golden_files():
        assert conformance.disagreements(conformance.in_emulator(), json.loads(path.read_text())) == {}, path.name


@pytest.mark.skipif(not gpu_code.tool("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("arch", ["90a", pytest.param("80", marks=pytest.mark.slow)])
def test_conformance_is_built_for_a_device_elsewhere(arch, tmp_path):
    file = tmp_path / "cases.so"
    assert conformance.main(["--build", str(file), "--arch", arch]) == 0
    library = ctypes.CDLL(str(file))
    assert library.conformance_count() == len(conformance.in_emulator().index)
    kernels = gpu_code.functions(file)
    assert {kernel.arch for kernel in kernels} == {f"sm_{arch}"}
    for instruction in ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS"):
        assert any(instruction in kernel.sass for kernel in kernels) == (arch == "90a"), instruction
    shown = subprocess.run(["objdump", "-T", file], capture_output=True, text=True, check=True).stdout
    assert max(tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", shown)) <= (2, 34)
    needed = subprocess.run(["objdump", "-p", file], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|torch)", needed)  # it runs with any torch


# What stands in for a GPU's library: cases that answer, fail, hang and die.
UNRULY = """
#include <cstdlib>
#include <unistd.h>
static const char* names[] = {"one", "fails", "hangs", "dies", "two"};
extern "C" {
int PyInit_pygpt_emulator;
int conformance_words() { return 4; }
int conformance_count() { return 5; }
int conformance_arch(int) { return 750; }
const char* conformance_name(int i) { return names[i]; }
const char* conformance_run(int i, const unsigned* in, unsigned* out) {
  if (i == 1) return "planted";
  while (i == 2) sleep(1);
  if (i == 3) abort();
  for (int k = 0; k < 4; ++k) out[k] = in[k] + i;
  return nullptr;
}
}
"""


@pytest.fixture(scope="module")
def unruly(tmp_path_factory):
    source = tmp_path_factory.mktemp("unruly") / "unruly.cpp"
    source.write_text(UNRULY)
    subprocess.run([build.CXX, "-shared", "-fPIC", source, "-o", source.with_suffix(".so")], check=True)
    return source.with_suffix(".so")


RUN = """
import sys
from tests.emulator import conformance
conformance.TIMEOUT = float(sys.argv.pop(1))
sys.exit(conformance.main(sys.argv[1:]))
"""


def test_a_case_that_fails_hangs_or_dies_leaves_the_rest(unruly, tmp_path, run_python):
    out = tmp_path / "answers.json"
    done = run_python(RUN, "1", "--library", str(unruly), "--out", str(out))
    found = json.loads(out.read_text())
    assert (done.returncode, found["stopped"], list(found["cases"])) == (1, "", ["one", "two"]), done.stderr
    assert found["errors"] == {
        "fails": "planted", "hangs": "no answer within 1 s", "dies": "its process ended with exit code -6"}  # fmt: skip
    assert "fails: planted\nhangs: no answer" in done.stdout and "2 cases answered, 3 failed" in done.stdout
    first = conformance.inputs(4)
    assert (conformance.decode(found["cases"]["two"]) == first + 4).all()
    assert list(tmp_path.iterdir()) == [out]


def test_the_time_for_all_cases_is_limited(unruly, tmp_path, run_python):
    out = tmp_path / "answers.json"
    done = run_python(RUN, "60", "--library", str(unruly), "--out", str(out), "--limit", "3")
    found = json.loads(out.read_text())
    assert (done.returncode, found["stopped"]) == (2, "the limit of 3 s"), done.stderr
    assert list(found["cases"]) == ["one"] and list(found["errors"]) == ["fails"]


def test_what_is_known_stays_when_the_run_is_killed(unruly, tmp_path):
    out = tmp_path / "answers.json"
    job = [sys.executable, "-m", "tests.emulator.conformance", "--library", unruly, "--out", out]
    with subprocess.Popen(job, cwd=build.ROOT, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]  # the third case hangs
        process.kill()
    found = json.loads(out.read_text())
    assert lines == ["one: answered\n", "fails: planted\n"]
    assert found["stopped"] == "it was interrupted" and list(found["cases"]) == ["one"]
    assert process.stdout.closed  # reached the end: the case that hangs went with its parent


def test_answers_are_compared_elsewhere(tmp_path, capsys):
    """The emulator stands in for the GPU."""
    library, out = conformance.in_emulator().library._name, tmp_path / "answers.json"
    job = [sys.executable, "-m", "tests.emulator.conformance", "--library", library, "--out", out]
    subprocess.run(job, cwd=build.ROOT, check=True, stdout=subprocess.DEVNULL)
    assert conformance.compare(out) == 0
    assert "79 of 79 cases agree" in capsys.readouterr().out

    found = json.loads(out.read_text())
    words = conformance.decode(found["cases"]["ldmatrix"]).copy()
    words[17] ^= 1
    found["cases"]["ldmatrix"] = conformance.encode(words)
    found["errors"]["mbarrier"] = "no answer within 10 s"
    del found["cases"]["mbarrier"], found["cases"]["cluster"]
    out.write_text(json.dumps(found | {"stopped": "it was interrupted"}))
    assert conformance.compare(out) == 1
    shown = capsys.readouterr().out
    assert "76 of 79 cases agree" in shown
    assert f"ldmatrix: 1 words differ, first 17: {words[17] ^ 1:08x}, on the GPU {words[17]:08x}" in shown
    assert "mbarrier: on the GPU: no answer within 10 s" in shown
    assert "cluster: on the GPU: not run, it was interrupted" in shown


def test_exp2_may_be_off_by_what_ptx_allows():
    one = np.ones(4, np.float32)
    for error, same in ((2**-23, True), (2**-20, False)):
        other = (one * np.float32(1 + error)).view(np.uint32)
        assert (conformance.difference("exp2_approx", one.view(np.uint32), other) == "") == same
        assert conformance.difference("mma bf16", one.view(np.uint32), other)


def test_running_a_library_needs_torch_alone(run_python):
    """Not pygpt, which may be what is broken there, nor what builds the emulator."""
    source = "import sys, tests.emulator.conformance; print(*{'pygpt', 'pybind11', 'triton'} & sys.modules.keys())"
    assert run_python(source).stdout == "\n"


def test_a_library_that_cannot_be_opened_is_reported(tmp_path, run_python):
    out = tmp_path / "answers.json"
    done = run_python(RUN, "10", "--library", str(tmp_path / "nowhere.so"), "--out", str(out))
    assert done.returncode == 2 and "nowhere.so: cannot open" in json.loads(out.read_text())["stopped"], done.stderr
    assert conformance.compare(out) == 1
