"""bench.static's reading of NVIDIA's machine code, on short listings that it must judge right."""

from bench import gpu_code


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
