"""bench.compiled --predict: the model of time, on short listings whose answers are known, and on our own kernels."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.cases import goals
from bench.compiled import pipes, predict, schedule

ROOT = Path(__file__).parents[2]


def sass(listing: str) -> str:
    """Lines "stall instruction" as cuobjdump prints them, 16 bytes each from address 0; a target is a line's number."""
    lines = []
    for n, line in enumerate(filter(None, map(str.strip, listing.splitlines()))):
        stall, _, text = line.partition(" ")
        if " @" in text:
            text, _, target = text.partition(" @")
            text += f" 0x{16 * int(target):x}"
        high = (int(stall) | 7 << 5 | 7 << 8) << 41
        lines.append(f"        /*{16 * n:04x}*/  {text} ;  /* 0x{0:016x} */\n  /* 0x{high:016x} */")
    return "\n".join(lines)


def played(listing: str, blocks: int = 1, warps: int = 4, trips: float = 100) -> schedule.Time:
    items = schedule.way(sass(listing), {})
    for loop in schedule.loops(items):
        loop.trips = [trips, 0]
    return schedule.block_time(items, schedule.Residency(blocks, warps, lambda i: 0.0))


# ------------------------------------------------------------------------------- instructions
def test_an_instructions_fields():
    """As ptxas 13.0 encoded it: 4 cycles, sets scoreboard 2, waits for 0 and 3."""
    text = "/*0010*/  @!P0 MUFU.EX2 R1, R2 ;  /* 0x0000000000000000 */\n  /* 0x{:016x} */"
    (i,) = pipes.decode(text.format((4 | 2 << 5 | 7 << 8 | 0b1001 << 11) << 41)).values()
    assert (i.name, i.op, i.stall, i.sets, i.reads, i.waits) == ("MUFU.EX2", "MUFU", 4, 2, 7, (0, 3))


@pytest.mark.parametrize(
    ("text", "pipe", "busy"),
    [
        ("FFMA R1, R2, R3, R4", "fma", 1),
        ("IMAD.WIDE R2, R3, R4, R5", "fma", 2),
        ("@P1 FMNMX R1, R2, R3, !PT", "alu", 2),
        ("MUFU.EX2 R1, R2", "mufu", 8),
        ("LDS.128 R4, [R1]", "shared", 16),
        ("LDSM.16.MT88.4 R4, [R1]", "shared", 16),
        ("STG.E desc[UR4][R2.64], R1", "shared", 4),
        ("@!PT BRA 0x10", "issue", 1),
    ],
)
def test_pipes(text, pipe, busy):
    i = pipes.Instruction(text, 1, 7, 7, ())
    assert (i.pipe, i.busy) == (pipe, busy)


def test_products():
    """64 x 128 x 16 by four warps; 16 x 8 x 16 by one. A multiprocessor makes 790 TFLOP/s of the first at 132 times."""
    group, warp = (
        pipes.Instruction(f"{name} R8, R4", 1, 7, 7, ()) for name in ("HGMMA.64x128x16.F32.BF16", "HMMA.16816.F32")
    )
    assert (group.flop, warp.flop) == (64 * 128 * 16 * 2 // 4, 16 * 8 * 16 * 2)
    assert 4 * group.flop / group.busy * pipes.MULTIPROCESSORS * pipes.CLOCK == pytest.approx(790e12)
    assert warp.busy / warp.flop > group.busy / group.flop


def test_an_unknown_opcode_is_named():
    assert pipes.unknown(pipes.decode(sass("1 FFMA R1, R2, R3, R4\n1 FROB.X R1\n1 EXIT"))) == {"FROB"}


# ------------------------------------------------------------------------------- loops
LOOP = "1 MOV R1, R2\n{}1 @P0 BRA @1\n1 EXIT"


def test_the_busiest_pipe_binds():
    work = "1 FFMA R1, R2, R3, R4\n" * 40 + "1 MUFU.EX2 R5, R6\n" * 2
    time = played(LOOP.format(work), warps=16)
    assert time.busy == pytest.approx(
        {"fma": 160, "mufu": 64, "issue": 172} | dict.fromkeys(("tensor", "alu", "shared", "uniform"), 0)
    )
    assert max(time.share, key=time.share.get) == "issue" and time.step == pytest.approx(172, rel=0.02)
    planted = played(LOOP.format(work + "1 MUFU.EX2 R5, R6\n" * 6), warps=16)
    assert max(planted.share, key=planted.share.get) == "mufu" and planted.step == pytest.approx(256, rel=0.02)


def test_stalls_bind_a_lone_warp():
    time = played(LOOP.format("4 FADD R1, R1, R2\n" * 50))
    assert time.step == pytest.approx(201, rel=0.01) and time.share["issue"] < 0.3
    assert played(LOOP.format("4 FADD R1, R1, R2\n" * 50), blocks=3).step == pytest.approx(67, rel=0.05)


PRODUCT = "1 HGMMA.64x128x16.F32.BF16 R8, gdesc[UR4], R8, gsb0\n"
WAIT = "1 WARPGROUP.DEPBAR.LE gsb0, 0x0\n"


def test_a_product_waited_for_at_once_adds_to_the_rest():
    rest = "1 FADD R1, R2, R3\n" * 100
    tensor = pipes.Instruction(PRODUCT.split(" ", 1)[1], 1, 7, 7, ()).busy
    alone = played(LOOP.format(PRODUCT + WAIT + rest))
    assert alone.step == pytest.approx(tensor + 102, rel=0.02)
    behind = played(LOOP.format(PRODUCT + rest + WAIT))
    assert behind.step == pytest.approx(104, rel=0.03)
    both = played(LOOP.format(PRODUCT + WAIT + rest), blocks=2)
    assert max(tensor, 102) <= both.step < 0.75 * alone.step  # the other block's work fills the gaps


def test_tiles_come_at_the_bandwidth_of_the_l2_cache():
    """Or, where two are under way at a time, two in the time of one from its start to its arrival."""
    items = schedule.way(sass("""
        1 UTMALDG.2D [UR4], [UR8]
        1 UTMALDG.2D [UR4], [UR8]
        1 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R3
        1 UTMALDG.2D [UR4], [UR8]
        1 @P0 BRA @2
        1 EXIT
    """), {})  # fmt: skip
    for count in (64e3, 1e3):
        time = schedule.block_time(items, schedule.Residency(1, 4, lambda i, count=count: count))
        alone = count / pipes.per_cycle(pipes.L2)
        assert time.step == pytest.approx(max(alone, (alone + pipes.TMA_LATENCY) / 2), rel=0.05)


def test_a_mask_that_a_branch_skips():
    """The short way leaves it out, the long way takes it; the products are on both."""
    items = schedule.way(sass("""
        1 MOV R1, R2
        1 HMMA.16816.F32 R8, R4, R6, R8
        1 @P1 BRA @5
        1 FSEL R8, R8, R9, P2
        1 FSEL R9, R8, R9, P2
        1 @P0 BRA @1
        1 EXIT
    """), {})  # fmt: skip
    (loop,) = schedule.loops(items)
    assert [i.op for i in loop.short] == ["HMMA", "BRA", "BRA"]
    assert [i.op for i in loop.long] == ["HMMA", "BRA", "FSEL", "FSEL", "BRA"]
    assert [i.op for i in items if i is not loop] == ["MOV", "EXIT"]


def test_preferred_branches():
    listing = "1 @P0 BRA @3\n1 MUFU.EX2 R1, R1\n1 BRA @4\n1 FADD R1, R1, R2\n1 EXIT"
    for wanted, unwanted in (("MUFU", "FADD"), ("FADD", "MUFU")):
        ops = [i.op for i in schedule.way(sass(listing), {wanted: 1})]
        assert wanted in ops and unwanted not in ops


def test_trips_of_causal_attention():
    assert predict.attention_trips(128, 1024, 64) == (
        7,
        2,
    )  # 0, 2, ... 14 whole tiles of 64 keys, and two on the diagonal
    assert predict.attention_trips(64, 64, 64) == (0, 1)


# ------------------------------------------------------------------------------- beside it
def benchmark(op: str, shape: str, rate: float, **more) -> dict:
    """One benchmark of a run's file, as far as it is read here."""
    facts = {"op": op, "shape": shape, "dtype": "bfloat16", "direction": "forward", "candidate": "cuda", "ours": True}
    facts |= {"unit": "", "amount": 1000 * rate} | more
    return {"extra_info": facts, "stats": {"median": 1.0, "q1": 1.0, "q3": 1.0, "rounds": 5}}


def written(path: Path, benchmarks: list[dict]) -> Path:
    path.write_text(json.dumps({"benchmarks": benchmarks, "pygpt": {"machine": {"date": "2026-12-01"}}}))
    return path


def test_measured(tmp_path):
    rows = [benchmark("mlp", "s", 400.0), benchmark("mlp", "s", 2.0, dtype="float32")]
    path = written(tmp_path / "x.json", [*rows, benchmark("mlp", "s", 300.0, candidate="eager", ours=False)])
    assert goals.measured(path) == {("mlp", "s", "forward", "cuda"): 400.0}


def test_every_row_is_one_of_the_gpu_benchmarks():
    for row in goals.EXPECTED:
        bar = goals.hopper_bar(row.op, row.shape, "bfloat16", row.direction, "H100", 3.0)
        assert predict.amount(row) > 0 and bar


def run(*options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compiled", "--predict", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)


def check(rows: int, *options):
    """Every row has a rate and every opcode its pipe."""
    done = run(*options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.partition("predicted  by hand")[2].splitlines()[1 : rows + 1]
    rates = [float(line.split("ward")[1].split()[1]) for line in lines]
    assert len(rates) == rows and all(math.isfinite(rate) and rate > 0 for rate in rates), done.stdout
    return lines, rates


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_predicted(tmp_path):
    row = benchmark("layer_norm", "16384 x 768", 1.5, candidate="triton")
    measured = ["--measured", str(written(tmp_path / "x.json", [row]))]
    lines, rates = check(4, "--backends", "triton", "--only", "layer_norm", *measured)
    assert lines[0].split()[-4:-2] == ["1.5", f"{1.5 / rates[0]:.2f}"] and "1.5" not in lines[1].split()


@pytest.mark.slow
def test_all_predicted():
    backends = [name for name, module in (("triton", "triton"), ("cuda", "pygpt._cuda")) if find_spec(module)]
    check(12 * len(backends), "--backends", ",".join(backends))
