"""Rates to expect of an H100, on a machine without one: `python -m bench.compiled --predict`.

A call's time is the sum of its kernels'. Those that do the work (products, norms) are simulated by schedule.py,
with the trips of their loops from the shape:

    time = max(cycles of a block on a multiprocessor * blocks / 132 / clock, bytes / memory's bandwidth) + launch

where the last wave counts whole, with the blocks that it has, if all do the same work. The others (column sums,
attention's delta) count by their bytes and their launch. Every number about the machine is in pipes.py, and serves all
rows alike; docs/measured.md B4 names the two that were set after the first comparison.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from pygpt.progress import table as aligned

from ..cases import goals, ops
from ..cases.goals import EXPECTED, Expected
from . import cuda_library, pipes, schedule
from .result import DEVICES
from .sass import Function

TARGET = "sm90"
WORK = re.compile(r"attention_(fwd|dkdv|dq)|(mma_)?gemm|norm_(fwd|bwd)")  # kernels that are simulated
ELEMENT = 2  # bytes
PRODUCTS = {"attention_fwd": 2, "attention_dkdv": 4, "attention_dq": 3}  # matrix products for each tile of scores


# ------------------------------------------------------------------------------- what is launched
@dataclass(frozen=True)
class Launch:
    """One kernel of a call as it is launched."""

    kernel: str
    arguments: str  # of a template, in CUDA C++
    function: Function
    warps: int
    shared: int  # bytes
    blocks: int
    tile: dict[str, int] = field(hash=False)  # Triton's constants

    @property
    def resident(self) -> int:
        """Blocks on a multiprocessor at one time."""
        fit = DEVICES[TARGET].blocks(self.warps, self.function.registers, self.shared)
        return min(fit, math.ceil(self.blocks / pipes.MULTIPROCESSORS))


def call(kernels, row: Expected, device: str) -> Callable:
    """The launcher of one row, on tensors whose content does not matter."""
    args = case(row).args

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device=device)

    if row.op == "attention":
        B, H, T, _, D, causal = args
        t, lse = empty(B, H, T, D), empty(B, H, T, dtype=torch.float32)
        forward, backward = (t, t, t, causal, D**-0.5), (t, None, t, t, t, t, lse, causal, D**-0.5, [True] * 3)
    elif row.op == "mlp":
        (B, T), C, activation = args
        x, hidden, fc, proj = empty(B, T, C), empty(B, T, 4 * C), empty(4 * C, C), empty(C, 4 * C)
        forward = x, fc, empty(4 * C), proj, empty(C), activation
        backward = x, x, fc, proj, hidden, hidden, activation, [True] * 5
    else:
        x, w, mean = empty(*args), empty(args[1]), empty(args[0], dtype=torch.float32)
        forward, backward = (x, w, w, 1e-5), (x, x, w, mean, mean, [True] * 3)
    if row.direction == "forward":
        return lambda: getattr(kernels, f"{row.op}_fwd")(*forward)
    return lambda: getattr(kernels, f"{row.op}_bwd")(*backward)


def case(row: Expected) -> ops.Case:
    """The row as the benchmarks have it."""
    return next(c for c in ops.GPU if (c.op, c.shape) == (row.op, row.shape))


def triton_launches(row: Expected) -> list[Launch]:
    from pygpt import triton_kernels

    from . import triton_jobs

    triton_jobs.triton.runtime.driver.set_active(triton_jobs.NoGpu(TARGET))
    launches = []
    for job in triton_jobs.launched(call(triton_kernels, row, "meta"), TARGET):
        compiled, config = job.compile(), job.config
        code, kernel = triton_jobs.machine_code(compiled), job.kernel.removesuffix("_kernel")
        shared, blocks = compiled.metadata.shared, job.programs
        launches.append(Launch(kernel, "", code, config.num_warps, shared, blocks, config.blocks))
    return launches


@functools.cache
def library() -> dict[str, Function]:
    kernels = cuda_library.demangled(Path(find_spec("pygpt._cuda").origin), f"sm_{DEVICES[TARGET].arch}")
    return {cuda_library.plain(name): function for name, function in kernels}


def cuda_launches(row: Expected) -> list[Launch]:
    from tests import emulator

    launches = []
    for name, threads, shared, blocks in emulator.launches(call(torch.ops.pygpt_emulator, row, "cpu")):
        name = cuda_library.plain(name)
        function, warps = library()[name], -(-threads // 32)
        launches.append(Launch(*cuda_library.short(name), function, warps, function.shared + shared, blocks, {}))
    return launches


LAUNCHES = {"triton": triton_launches, "cuda": cuda_launches}


# ------------------------------------------------------------------------------- how often each loop runs
def attention_trips(rows: int, length: int, step: int) -> tuple[float, float]:
    """Average steps without and with a mask of a tile of `rows` queries, causal. Tiles of keys take as many."""
    firsts = range(0, length, rows)
    whole = sum((row + 1) // step for row in firsts)
    walked = sum(math.ceil(min(row + rows, length) / step) for row in firsts)
    return whole / len(firsts), (walked - whole) / len(firsts)


def set_trips(items: list, launch: Launch, row: Expected) -> float:
    """Fills in the trips of the loops -> bytes of the tile that one UTMALDG loads."""
    loops, args = schedule.loops(items), case(row).args
    main = sorted((loop for loop in loops if loop.flop), key=lambda loop: len(list(schedule.flat(loop.short))))
    if row.op == "attention":
        B, H, T, _, D, _ = args
        rows = T * B * H // launch.blocks
        step = main[0].flop * launch.warps // (2 * PRODUCTS[launch.kernel] * rows * D)
        if len(main) > 1:  # the masked steps have another loop
            whole, masked = attention_trips(rows, T, step)
            main[0].trips, main[1].trips = [whole, 0], [masked, 0]
        else:  # each warp masks and skips steps by its own rows
            main[0].trips = list(attention_trips(rows // launch.warps, T, step))
        return step * D * ELEMENT
    if row.op == "mlp":
        (B, T), C, _ = args
        trips = 8 * B * T * C * C / launch.blocks / (main[0].flop * launch.warps)
        main[0].trips = [trips, 0]
        for loop in loops:
            if loop is not main[0]:  # the epilogue in CUDA C++: a warp takes every fourth row of the tile
                reads = sum(i.name.startswith("LDS") for i in schedule.flat(loop.short))
                loop.trips = [tile_of(launch)[0] / launch.warps / max(reads, 1), 0]
        m, n = tile_of(launch)
        return (m + n) / 2 * (main[0].flop * launch.warps // (2 * m * n)) * ELEMENT
    if launch.kernel == "norm_bwd":
        at_once = launch.tile.get("ROWS") or (4 if launch.arguments.endswith(" 32>") else 1)
        schedule.main_loop(items).trips = [args[0] / at_once / launch.blocks, 0]
    return 0.0


def tile_of(launch: Launch) -> tuple[int, int]:
    """Rows and columns of a GEMM's tile."""
    if launch.tile:
        return launch.tile["BLOCK_M"], launch.tile["BLOCK_N"]
    side = int(re.search(r"(\d+)>$", launch.arguments)[1])
    return side, side


def splits(launch: Launch, row: Expected) -> int:
    """Into how many parts K is split, which only the GEMMs of weight gradients do."""
    (B, T), C, _ = case(row).args
    elements = launch.blocks * math.prod(tile_of(launch))
    is_weight_gradient = row.direction == "backward" and elements not in (B * T * C, 4 * B * T * C)
    return max(1, elements // (4 * C * C)) if is_weight_gradient else 1


# ------------------------------------------------------------------------------- bytes, and branches
def memory_bytes(launch: Launch, row: Expected) -> float:
    """The least that a kernel moves: each operand and result once."""
    args = case(row).args
    if row.op == "attention":
        B, H, T, _, D, _ = args
        tensors = {"attention_fwd": 4, "attention_dkdv": 6, "attention_dq": 5, "attention_delta": 2}
        return tensors.get(launch.kernel, 0) * B * H * T * D * ELEMENT
    if row.op == "mlp":
        (B, T), C, _ = args
        if not WORK.fullmatch(launch.kernel) or "norm" in launch.kernel:
            return 0.0
        moved = ELEMENT * (5 * B * T * C + 4 * C * C)
        if launch.blocks * math.prod(tile_of(launch)) == 4 * B * T * C:  # pre is written, or read
            moved += ELEMENT * 4 * B * T * C
        if (parts := splits(launch, row)) > 1:  # written, and read by the next kernel
            moved += 2 * 4 * parts * 4 * C * C
        return moved
    return math.prod(args) * ELEMENT * {"norm_fwd": 2, "norm_bwd": 3}.get(launch.kernel, 0)


def preferences(launch: Launch, row: Expected) -> dict[str, float]:
    """Instructions that mark the branches which run, where CUDA C++ decides at run time. See schedule.way."""
    if launch.kernel.startswith("norm") and not launch.tile:  # without a residual
        backward = launch.kernel == "norm_bwd"
        return {"LDGSTS": -1, "LDG.E.U16": -10, "SHFL": 10} if backward else {"F2FP": -1, "STG.E.128": 5}
    if launch.kernel != "mma_gemm":
        return {}
    (B, T), C, _ = case(row).args
    if launch.blocks * math.prod(tile_of(launch)) == 4 * B * T * C:
        backward = row.direction == "backward"  # reads pre, and stores its column sums as STG.E.128; else stores pre
        return {"MUFU": 1, "LDG.E.64": 1, "STG": -1, "STG.E.128": 2} if backward else {"MUFU": 1, "LDG.E.64": -1}
    if splits(launch, row) > 1:
        return {"STG.E.128": 1}
    return {"LDS.128": 5, "MUFU": -1, "STG": -1}


# ------------------------------------------------------------------------------- time
@dataclass
class Kernel:
    """A kernel that was simulated, and the result."""

    launch: Launch
    time: schedule.Time
    trips: float
    instructions: int  # of one step
    seconds: float
    by_memory: bool

    @property
    def bound(self) -> str:
        """The busiest pipe and its share of the time; where that is below half, waiting warps bind more."""
        pipe = max(self.time.share, key=self.time.share.get)
        busiest = f"{pipe} {self.time.share[pipe]:.0%}"
        return "memory" if self.by_memory else busiest if self.time.share[pipe] >= 0.5 else f"waits; {busiest}"


@dataclass
class Prediction:
    row: Expected
    backend: str
    kernels: list[Kernel]
    seconds: float
    rate: float  # TFLOP/s or TB/s
    unknown: set[str]  # opcodes

    @property
    def longest(self) -> Kernel:
        return max(self.kernels, key=lambda kernel: kernel.seconds)


def kernel_time(launch: Launch, row: Expected) -> Kernel:
    items = schedule.way(launch.function.sass, preferences(launch, row))
    tile_bytes = set_trips(items, launch, row)
    on = schedule.Residency(
        launch.resident,
        launch.warps,
        lambda i: tile_bytes if i.op == "UTMALDG" else i.width * 32 * launch.warps,
        pipes.MEMORY_LATENCY if "norm" in launch.kernel else pipes.L2_LATENCY,
    )
    time = schedule.block_time(items, on)
    waves, rest = divmod(launch.blocks, on.blocks * pipes.MULTIPROCESSORS)
    cycles = waves * on.blocks * time.block
    if row.op == "attention":  # the longest blocks start first, so that all end together
        cycles = launch.blocks / pipes.MULTIPROCESSORS * time.block
    elif rest:
        last = replace(on, blocks=math.ceil(rest / pipes.MULTIPROCESSORS))
        cycles += last.blocks * (time if last == on else schedule.block_time(items, last)).block
    by_pipes, by_memory = cycles / pipes.CLOCK, (memory_bytes(launch, row) + pipes.DIRTY) / pipes.MEMORY
    main = schedule.main_loop(items)
    trips = sum(sum(loop.trips) for loop in schedule.loops(items) if loop is main or loop.flop)
    steps = len(list(schedule.flat(main.short if main else items)))
    seconds = max(by_pipes, by_memory) + pipes.LAUNCH
    return Kernel(launch, time, trips or 1, steps, seconds, by_memory > by_pipes)


def predict(row: Expected, backend: str) -> Prediction:
    kernels, seconds, unknown, known = [], 0.0, set(), {}
    for launch in LAUNCHES[backend](row):
        unknown |= pipes.unknown(pipes.decode(launch.function.sass))
        plays = WORK.fullmatch(launch.kernel) and not (row.op == "mlp" and "norm" in launch.kernel)
        if not plays:
            seconds += pipes.LAUNCH + memory_bytes(launch, row) / pipes.MEMORY
            continue
        key = launch.function.sass, launch.blocks
        if key not in known:
            known[key] = kernel_time(launch, row)
        kernels.append(known[key])
        seconds += known[key].seconds
    return Prediction(row, backend, kernels, seconds, amount(row) / seconds / 1e12, unknown)


def amount(row: Expected) -> float:
    """FLOP, of norms bytes, as the benchmarks count them."""
    shape = lambda *size: torch.empty(size, device="meta", dtype=torch.bfloat16)
    return case(row).setup(shape, *case(row).args).amount_of(row.direction)


# ------------------------------------------------------------------------------- what it says
def rates(predicted: list[Prediction], result: Path | None) -> str:
    """Predictions beside estimates, bars, goals, peers and what a GPU measured; TFLOP/s, of norms TB/s."""
    head = "op,shape,direction,ours,predicted,by hand,ratio,bar,goal,best peer,measured,of predicted,bound by"
    lines = []
    measured = goals.measured(result) if result else {}
    for p in predicted:
        row, hand = p.row, p.row.by_hand[p.backend]
        bar = goals.hopper_bar(row.op, row.shape, "bfloat16", row.direction, "H100", pipes.MEMORY / 1e12)
        rate = measured.get((row.op, row.shape, row.direction, p.backend))
        cells = [f"{p.rate:.3g}", f"{hand:g}", f"{p.rate / hand:.2f}", f"{bar:.3g}", f"{row.goal:g}", f"{row.peer:g}"]
        cells += [f"{rate:.3g}", f"{rate / p.rate:.2f}"] if rate else ["", ""]
        bound = f"{p.longest.launch.kernel}: {p.longest.bound}"
        lines.append([row.op, row.shape, row.direction, p.backend, *cells, bound])
    return aligned(dict.fromkeys(head.split(","), "<"), lines)


def steps(predicted: list[Prediction]) -> str:
    """The kernels that were simulated: cycles that one step of a block's main loop takes on a multiprocessor."""
    shown = ("tensor", "mufu", "fma", "alu", "shared", "issue")
    head = ["op", "shape", "direction", "ours", "kernel", "blocks", "warps", "instructions", "steps", "cycles", *shown]
    lines = []
    for p in predicted:
        for k in p.kernels:
            size = [str(k.launch.resident), str(k.launch.warps), str(k.instructions), f"{k.trips:.1f}"]
            cycles = [f"{n:.0f}" for n in (k.time.step, *(k.time.busy[pipe] for pipe in shown))]
            about = [p.row.op, p.row.shape, p.row.direction, p.backend, k.launch.kernel]
            lines.append([*about, *size, *cycles, f"{k.seconds * 1e6:.0f}", k.bound])
    return aligned(dict.fromkeys([*head, "us", "bound by"], "<"), lines)


NEAR = 0.25  # estimates by hand that are so close agree with the model


def show(backends: list[str], only: tuple[str, ...], result: Path | None) -> int:
    """Both tables of the rows whose op starts with one of ``only``. Exit code 1 for no row or an unknown opcode."""
    predicted = [predict(row, backend) for row in EXPECTED for backend in backends if row.op.startswith(only)]
    if not predicted:
        print("no row")
        return 1
    print(f"\nmain loops, bfloat16 on {TARGET}\n{steps(predicted)}")
    print(f"\nTFLOP/s, of norms TB/s, on an H100; measured: {result or 'nothing yet'}\n{rates(predicted, result)}")
    near = sum(abs(p.rate / p.row.by_hand[p.backend] - 1) <= NEAR for p in predicted)
    print(f"\n{near} of {len(predicted)} estimates by hand are within {NEAR:.0%} of the prediction")
    unknown = sorted(set().union(*(p.unknown for p in predicted)))
    if unknown:
        print(f"WRONG: opcodes of no known pipe: {', '.join(unknown)}")
    return 1 if unknown else 0
