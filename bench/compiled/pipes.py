"""What an instruction of an H100 costs: its pipe, how long it occupies the pipe, and when its result is ready.

A multiprocessor has four sub-cores. Each issues one warp's instruction a cycle, and has its own tensor core and its
own lanes for everything but memory, which the four share. All times are cycles of one sub-core.
"""

import re
from dataclasses import dataclass
from functools import cached_property

# ------------------------------------------------------------------------------- the machine
MULTIPROCESSORS = 132  # H100 SXM
CLOCK = 1.755e9  # Hz. The datasheet's 989 TFLOP/s need 1.83e9, which no H100 holds under load; 1.98e9 is the highest
TENSOR = 790e12  # FLOP/s in bf16 that the best GEMMs reach before power lowers the clock (989 by the datasheet)
MMA_SYNC = 0.64  # of the datasheet's 989: measured on an H100 as 0.63 to 0.65 (arXiv 2501.12084)
MEMORY = 3.0e12  # bytes/s of a large copy, read plus write; 3.35 by the datasheet
L2 = 8.1e12  # bytes/s into shared memory. Reads of all different lines measure 5.5; blocks that read the same operand
#   at one time share requests: 689 TFLOP/s of Triton's 128 x 256 tiles without multicast (tritonbench) take 8.1
DIRTY = 25e6  # bytes of others in the L2 cache, half of it, whose write-back a call pays for (docs/measured.md B4)
LAUNCH = 2e-6  # s from the end of one kernel to full speed of the next, in a stream that is never empty


def per_cycle(rate: float) -> float:
    """A rate of the whole GPU, for one cycle of one multiprocessor."""
    return rate / (MULTIPROCESSORS * CLOCK)


# Lanes of a multiprocessor (NVIDIA's table of arithmetic throughput, compute capability 9.0)
LANES = {"fma": 128, "alu": 64, "mufu": 16, "uniform": 64}
SHARED_BYTES = 128  # a cycle, of shared memory and of the path to the L1 cache
# Cycles of work that can wait in a queue while its warp goes on (NVIDIA's profiler speaks of an MIO queue). Its length
# is not published: four ldmatrix.x4 are assumed (docs/measured.md B4).
QUEUE = {"mufu": 64, "shared": 64}
PIPES = ("tensor", "mufu", "fma", "alu", "shared", "uniform", "issue")

_BY_PIPE = {
    "fma": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I",
    "imad": "IMAD HFMA2 HADD2 HMUL2 IDP",  # half of the fma lanes
    "alu": "FMNMX FSEL FSETP FSET FCHK ISETP LOP3 LOP IADD3 IADD LEA SEL SHF PRMT P2R R2P PLOP3 VIADD VIADDMNMX VIMNMX "
    "IMNMX IABS SGXT I2FP F2FP MOV HSETP2 HMNMX2 CS2R BMSK VOTE LEPC",
    "mufu": "MUFU I2F F2I F2F I2I FRND POPC FLO BREV",
    "uniform": "UMOV UIADD3 UIMAD ULEA ULOP3 ULOP USHF UISETP USEL USGXT UPRMT UPLOP3 UP2UR UR2UP UFLO UPOPC UBMSK "
    "ULDC VOTEU R2UR REDUX",
    "shared": "LDS STS LDSM STSM SHFL ATOMS LDG STG LDL STL LD ST LDGSTS RED ATOM ATOMG MATCH",
    "tensor": "HMMA HGMMA",
    "issue": "BRA BSSY BSYNC BREAK EXIT WARPSYNC CALL RET NOP BAR SYNCS DEPBAR LDGDEPBAR WARPGROUP FENCE MEMBAR ERRBAR "
    "CCTL ELECT ENDCOLLECTIVE UTMALDG UTMASTG UTMACMDFLUSH UTMACCTL UBLKCP UCGABAR_ARV UCGABAR_WAIT S2R S2UR LDC YIELD "
    "ACQBULK PREEXIT USETMAXREG NANOSLEEP R2B B2R BPT",
}
PIPE_OF = {name: pipe for pipe, names in _BY_PIPE.items() for name in names.split()}

# Cycles from issue to result, where ptxas waits for a scoreboard and not for a fixed time (microbenchmarks of Hopper:
# arXiv 2402.13499); all others' latency is in the stall counts that ptxas wrote.
LATENCY = {"MUFU": 22, "LDS": 30, "LDSM": 33, "SHFL": 24, "S2R": 30, "S2UR": 30, "LDC": 40, "ULDC": 20, "R2UR": 10}
OTHER_LATENCY = 20  # conversions, votes, uniform registers, operands that have been read
L2_LATENCY = 300  # of a load that finds its line there
MEMORY_LATENCY = 750  # under load
TMA_LATENCY = 700  # UTMALDG of a tile in the L2 cache, until the mbarrier's phase ends
BARRIER = 25  # from the last arrival at BAR.SYNC to the next instruction


# ------------------------------------------------------------------------------- instructions
@dataclass(frozen=True)
class Instruction:
    """One line of a kernel with what ptxas planned: the fields that follow are in the encoding's bits 105 to 121."""

    text: str
    stall: int  # cycles until the same warp's next instruction
    sets: int  # the scoreboard that its result frees, 7 for none
    reads: int  # the scoreboard that frees when its operands have been read, 7 for none
    waits: tuple[int, ...]  # scoreboards that must be free first

    @cached_property
    def name(self) -> str:
        """The opcode with its suffixes, without a predicate."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @cached_property
    def op(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def pipe(self) -> str:
        """The issue slot for an opcode that is in no list; see `unknown`."""
        pipe = PIPE_OF.get(self.op, "issue")
        return "fma" if pipe == "imad" else pipe

    @cached_property
    def queue(self) -> int:
        """Cycles of other work that its pipe may still have to do when it is issued."""
        return QUEUE.get(self.pipe, 0)

    @cached_property
    def special(self) -> bool:
        """Tells whether it starts or awaits something that neither scoreboards nor stall counts describe."""
        names = ("UTMALDG", "LDGSTS", "LDGDEPBAR", "DEPBAR", "WARPGROUP.DEPBAR", "SYNCS.PHASECHK", "BAR.SYNC")
        return self.name.startswith(names) or (self.op == "HGMMA" and "gsb0" in self.text)

    @cached_property
    def flop(self) -> int:
        """FLOP of one warp: a quarter of those of a warp group's wgmma."""
        if self.op == "HGMMA":
            m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", self.name).groups())
            return 2 * m * n * k // 4
        if self.op == "HMMA":
            return 2 * 16 * 8 * int(re.search(r"\.168(\d+)", self.name)[1])
        return 0

    @cached_property
    def busy(self) -> float:
        """Cycles for which the pipe takes no other instruction of this sub-core."""
        if self.op == "HGMMA":
            return self.flop / (per_cycle(TENSOR) / 4)
        if self.op == "HMMA":
            return self.flop / (per_cycle(MMA_SYNC * 989e12) / 4)
        if self.pipe == "shared":
            return 4 * max(32 * self.width / SHARED_BYTES, 1)  # the other three sub-cores do the same
        if self.pipe == "issue":
            return 1
        lanes = LANES[self.pipe] // 2 if PIPE_OF[self.op] == "imad" else LANES[self.pipe]
        return 32 / (lanes / 4)

    @cached_property
    def width(self) -> int:
        """Bytes that a lane moves."""
        if self.op in ("LDSM", "STSM"):
            matrices = re.search(r"\.(\d)$", self.name)
            return 4 * int(matrices[1]) if matrices else 4
        bits = re.search(r"\.[US]?(128|64|16|8)\b", self.name)
        return int(bits[1]) // 8 if bits else 4

    def latency(self, memory: float) -> float:
        """Cycles. ``memory``: those of a load from global memory."""
        if self.op in ("LDG", "LD", "LDGSTS", "ATOMG", "LDL"):
            return memory
        return LATENCY.get(self.op, OTHER_LATENCY) + (self.busy if self.pipe in ("mufu", "shared") else 0)


def decode(sass: str) -> dict[int, Instruction]:
    """address -> instruction, from a listing with encodings as cuobjdump -sass prints it."""
    code = {}
    pattern = r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/"
    for at, text, high in re.findall(pattern, sass):
        bits = int(high, 16) >> 41
        waits = tuple(n for n in range(6) if bits >> 11 + n & 1)
        code[int(at, 16)] = Instruction(text.strip(), bits & 15, bits >> 5 & 7, bits >> 8 & 7, waits)
    return code


def unknown(code: dict[int, Instruction]) -> set[str]:
    """Opcodes that are in no list above."""
    return {i.op for i in code.values()} - set(PIPE_OF)
