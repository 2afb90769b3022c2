"""What a compiled kernel asks of a GPU: registers, spills, shared memory, occupancy, tensor-core instructions."""

from collections.abc import Iterable
from dataclasses import dataclass

from pygpt.progress import table as aligned

from .sass import Function


@dataclass(frozen=True)
class Device:
    """What a multiprocessor (NVIDIA) or compute unit (AMD) offers."""

    arch: int | str
    shared: int  # bytes a block may use
    shared_all: int  # bytes in all
    tensor_core: str  # the instruction that Triton's 16-bit products must become
    registers: int = 65536
    threads: int = 2048
    warp: int = 32

    def blocks(self, warps: int, registers: int, shared: int) -> int:
        """How many blocks fit, of so many warps, registers a thread, and bytes of shared memory."""
        threads = warps * self.warp
        by_registers = self.registers // (max(-(-registers // 8) * 8, 8) * threads)
        by_shared = self.shared_all // (shared + 1024) if shared else 32
        return min(by_registers, by_shared, self.threads // threads, 32)


DEVICES = {
    "sm80": Device(80, 163 << 10, 164 << 10, "mma.sync"),
    "sm90": Device(90, 227 << 10, 228 << 10, "wgmma.mma_async"),
    "sm100": Device(100, 227 << 10, 228 << 10, "tcgen05.mma"),
    "gfx942": Device("gfx942", 64 << 10, 64 << 10, "v_mfma", 4 * 512 * 64, warp=64),
}
FEW_BYTES = 64  # of stack: so many may hold registers across a loop


@dataclass
class Result:
    """A line of the table: one kernel as it is launched for one call."""

    call: str
    kernel: str
    dtype: str
    target: str
    config: str
    warps: int = 0
    registers: int = 0
    spilled: int = 0  # bytes
    loop_spills: int = 0  # instructions in loops that access spilled registers
    shared: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    products: str = ""
    serialized: str = ""  # the sign that wgmma instructions wait for each other
    wrong: str = ""

    def take(self, kernel: Function):
        """Fills in what NVIDIA's machine code shows."""
        self.registers, self.spilled, self.loop_spills = kernel.registers, kernel.stack, kernel.loop_spills
        self.serialized = kernel.serialized

    def count(self, assembly: str, instructions: Iterable[str]):
        """Fills in the tensor-core instructions."""
        used = {name: assembly.count(name) for name in instructions}
        self.products = " ".join(f"{count} {name}" for name, count in used.items() if count)

    def judge(self, must: str = ""):
        """Fills in how many blocks fit, and what is wrong. ``must``: the instruction that its products must use."""
        device = DEVICES[self.target]
        self.blocks_per_sm = device.blocks(self.warps, self.registers, self.shared)
        self.occupancy = self.blocks_per_sm * self.warps * device.warp / device.threads
        if self.loop_spills:
            self.wrong = "spills in a loop"
        elif self.spilled > FEW_BYTES:
            self.wrong = "spills"
        elif self.shared > device.shared:
            self.wrong = f"needs more shared memory than the device's {device.shared}"
        elif must and must not in self.products:
            self.wrong = f"no {must}"
        elif self.serialized:
            self.wrong = "wgmma instructions are serialized"


def table(results: list[Result]) -> str:
    head = ("call", "kernel", "dtype", "target", "configuration", "registers", "spilled", "in loops",
            "shared", "blocks", "occupancy", "tensor cores", "serialized", "")  # fmt: skip
    lines = [
        (r.call, r.kernel, r.dtype, r.target, r.config, str(r.registers), str(r.spilled), str(r.loop_spills),
         str(r.shared), str(r.blocks_per_sm), f"{r.occupancy:.0%}", r.products, r.serialized,
         f"WRONG: {r.wrong}" if r.wrong else "")
        for r in results
    ]  # fmt: skip
    return aligned(dict.fromkeys(head, "<"), lines)
