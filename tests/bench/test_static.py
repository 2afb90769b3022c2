"""bench.compiled's reading of NVIDIA's machine code, on short listings that it must judge right."""

import pytest

from bench.compiled import result as results
from bench.compiled import sass as gpu_code


def sass(listing: str) -> str:
    """Lines "address instruction" as cuobjdump prints them."""
    lines = (line.split(maxsplit=1) for line in listing.strip().splitlines())
    return "\n".join(f"        /*{at}*/                   {text} ;  /* 0x0 */" for at, text in lines)


def found(listing: str) -> list[tuple]:
    """(start, end, number of instructions, whether innermost) of each loop."""
    return [(f"{x.start:x}", f"{x.end:x}", len(x.instructions), x.innermost) for x in gpu_code.loops(sass(listing))]


# ------------------------------------------------------------------------------- loops
def test_a_loop_in_a_loop():
    assert found("""
        0000 MOV R1, R2
        0010 IADD3 R2, R2, 0x1, RZ
        0020 FFMA R3, R3, R4, R5
        0030 @P0 BRA 0x20
        0040 @!P1 BRA 0x10
        0050 EXIT
    """) == [("10", "40", 4, False), ("20", "30", 2, True)]


def test_no_loop():
    """Neither the trap behind a kernel's end nor a branch back to what is not on every way to it."""
    assert found("""
        0000 @P0 BRA 0x40
        0010 FADD R1, R1, R2
        0020 FADD R1, R1, R3
        0030 EXIT
        0040 FADD R1, R1, R4
        0050 BRA 0x20
        0060 BRA 0x60
    """) == []  # fmt: skip


def test_blocks_moved_behind_the_kernels_end():
    """The retry of a wait branches back into the middle of the loop that waits: one loop, without what lies between."""
    listing = """
        0000 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16+0x20000], R3
        0010 @!P1 BRA 0x60
        0020 FFMA R3, R3, R4, R5
        0030 @P0 BRA 0x0
        0040 STL [R1], R3
        0050 EXIT
        0060 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16+0x20000], R3
        0070 @!P1 BRA 0x60
        0080 BRA 0x20
        0090 BRA 0x90
    """
    assert found(listing) == [("0", "80", 7, True)]
    assert all("STL" not in text for _, text in gpu_code.loops(sass(listing))[0].instructions)


def test_two_branches_back_are_one_loop():
    assert found("""
        0000 IADD3 R2, R2, 0x1, RZ
        0010 BRA P1, 0x0
        0020 BRA.DIV UR4, 0x50
        0030 @P0 BRA 0x0
        0040 EXIT
        0050 SHFL.BFLY P1, R137, R173, R138, R139
        0060 BRA 0x30
    """) == [("0", "60", 6, True)]


def test_a_called_function_is_not_part_of_the_loop():
    assert found("""
        0000 MOV R20, 0x20
        0010 CALL.REL.NOINC 0x40
        0020 @P0 BRA 0x0
        0030 EXIT
        0040 MUFU.RCP R2, R3
        0050 @P1 BRA 0x40
        0060 RET.REL.NODEC R20 0x0
    """) == [("0", "20", 3, True), ("40", "50", 2, True)]


# ------------------------------------------------------------------------------- spills
def function(listing: str) -> gpu_code.Function:
    return gpu_code.Function("kernel", "sm_90", 64, 8, 0, sass(listing))


def test_spills_in_any_loop_are_seen():
    """Here in the outer of two; the access before the loops and the one after them are none."""
    outer = """
        0000 STL [R1], R2
        0010 LDL.64 R2, [R1+0x8]
        0020 FFMA R3, R3, R4, R5
        0030 @P0 BRA 0x20
        0040 @!P1 BRA 0x10
        0050 LDL R2, [R1]
        0060 EXIT
    """
    assert function(outer).loop_spills == 1
    assert function(outer.replace("LDL.64 R2, [R1+0x8]", "LDS.64 R2, [R1+0x8]")).loop_spills == 0
    assert function(outer.replace("FFMA R3, R3, R4, R5", "STL.128 [R1], R4")).loop_spills == 2


# ------------------------------------------------------------------------------- wgmma
GROUP = """
    0000 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16+0x20000], R3
    0010 WARPGROUP.ARRIVE
    0020 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24
    0030 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24
    0040 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0
    0050 WARPGROUP.DEPBAR.LE gsb0, {left}
    0060 @!P1 BRA 0x0
    0070 WARPGROUP.DEPBAR.LE gsb0, 0x0
    0080 EXIT
"""
EACH = """
    0000 WARPGROUP.ARRIVE
    0010 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24, gsb0
    0020 WARPGROUP.DEPBAR.LE gsb0, {left}
    0030 WARPGROUP.ARRIVE
    0040 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24, gsb0
    0050 IADD3 R2, R2, 0x1, RZ
    0060 WARPGROUP.DEPBAR.LE gsb0, {left}
    0070 @!P0 BRA 0x0
    0080 EXIT
"""


def test_one_wait_per_hgmma_is_seen():
    assert function(EACH.format(left="0x0")).serialized == "one wait per HGMMA"
    assert function(EACH.format(left="0x1")).serialized == ""  # which lets one group go on
    first = EACH.format(left="0x0").replace("0030 WARPGROUP", "0030 @P2 BRA 0x40\n    0038 WARPGROUP")
    assert function(first).serialized == "one wait per HGMMA"  # whatever blocks it takes


def test_a_wait_per_group_is_right():
    assert function(GROUP.format(left="0x0")).serialized == ""
    assert function(GROUP.format(left="0x1")).serialized == ""


def test_one_hgmma_in_a_loop_is_a_group():
    one = EACH.format(left="0x0").replace("0040 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24, gsb0", "0040 NOP")
    assert function(one).serialized == ""


def test_products_outside_of_loops_may_be_waited_for():
    assert function(EACH.format(left="0x0").replace("0070 @!P0 BRA 0x0", "0070 NOP")).serialized == ""


# ------------------------------------------------------------------------------- ptxas' messages
LOSS = "ptxas info    : ({}) Potential Performance Loss: wgmma.mma_async instructions are serialized due to {}"


@pytest.mark.parametrize(
    "number, why",
    [
        ("C7508", "the presence of Extern calls in the function 'f'"),
        ("C7510", "wgmma pipeline crossing function boundary at a function call in the function 'f'"),
        ("C7514", "non wgmma instructions defining input registers of a wgmma in the function 'f'"),
        ("C7515", "non wgmma instructions defining accumulator registers of a wgmma in the function 'f'"),
    ],
)
def test_ptxas_says_so(number, why):
    log = f"ptxas info    : 0 bytes gmem\n{LOSS.format(number, why)}\nptxas info    : Used 186 registers\n"
    assert gpu_code.serialized(log) == number
    assert gpu_code.serialized(log * 2) == number


def test_other_messages_of_ptxas():
    """That ptxas adds a wait alone loses nothing."""
    assert gpu_code.serialized("ptxas info    : (C7519) warpgroup.arrive is injected in around line 377") == ""
    assert gpu_code.serialized("ptxas info    : Used 112 registers, used 1 barriers") == ""


# ------------------------------------------------------------------------------- the verdict
def judged(must="", **row) -> str:
    result = results.Result("call", "gemm", "bf16", "sm90", "128,128", warps=8, registers=112, shared=98336, **row)
    result.judge(must)
    assert result.blocks_per_sm == 2
    (line,) = results.table([result]).splitlines()[1:]
    assert line.endswith(f"WRONG: {result.wrong}") == bool(result.wrong)
    return result.wrong


def test_verdict():
    assert judged() == judged(spilled=results.FEW_BYTES) == ""
    assert judged(spilled=8, loop_spills=1) == "spills in a loop"
    assert judged(spilled=results.FEW_BYTES + 8) == "spills"
    assert judged(serialized="C7515") == "wgmma instructions are serialized"
    assert judged("wgmma", products="4 wgmma") == ""
    assert judged("wgmma", products="4 mma.sync") == "no wgmma"
