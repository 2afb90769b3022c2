"""How a block of calls is timed: `CpuClock` by the host's clock, `CudaClock` by events on the stream.

On a CPU a block repeats short calls until they fill BLOCK seconds, and every call takes the next of several input sets,
so that its data comes from where a model would find it.

On a GPU a block is one call. The stream first gets two things that are not timed: a spin (`torch.cuda._sleep`), which
gives the host time to queue the whole call, so that a short kernel's launch does not show as idle time; and a write
over several times the L2 cache, so that the call finds its data in memory. The written lines stay dirty: the call pays
for writing them back, as it pays in a model for the output of the op before it.
"""

import glob
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

import pygpt
from pygpt.functional import linear

BLOCK = 0.004  # seconds: far above the resolution of the timer
MAX_SETS = 8
ESTIMATES = 3  # calls that tell how long a candidate takes, on the device and on the host
FLUSHED_BYTES = 256 << 20  # written between two calls on a GPU: at least this, and four times the L2 cache


@dataclass(frozen=True)
class Block:
    """Calls of one candidate that are timed together. The candidate is warm."""

    call: Callable
    calls: int = 1
    head_start: float = 0.0  # seconds that the host gets to queue the call before the device begins
    seconds: float = 0.0  # what the block costs, about
    least: float = 0.0  # seconds: on a CPU, so many calls are repeated until they have passed
    elsewhere: bool = False  # ``call``((calls, least)) times them in another process -> seconds per call


@dataclass
class Times:
    """Seconds per call of one candidate, block by block."""

    block: Block
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # on a GPU: until the call returned
    busy: "Times | None" = None  # of the same candidate among busy processes

    @property
    def launch_bound(self) -> bool:
        """Tells whether the host was usually late, so that its time shows in the device's."""
        return statistics.median(self.host) > self.block.head_start > 0


@dataclass(frozen=True)
class Peaks:
    """The best that this machine did in this run, on all threads."""

    flops: dict[str, float]  # dtype -> GFLOP/s
    source: dict[str, str]  # dtype -> what reached it
    copy: float  # Tensor.copy_ of memory larger than the caches, read plus write, GB/s
    read: float  # Tensor.sum of it, GB/s
    cpu_share: float | None = None  # the part of the cores' time that this process got meanwhile

    @property
    def memory(self) -> float:
        """GB/s. A copy also reads what it overwrites; of a kernel that avoids this, a plain read is the limit."""
        return max(self.copy, self.read)


def last_level_cache() -> int:
    """Returns the bytes of the largest cache that a core can reach; 32 MiB where the system doesn't say."""
    sizes = [0]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        with open(path) as file:
            sizes.append(int(file.read().strip().removesuffix("K") or 0) * 1024)
    return max(sizes) or 32 << 20


# ------------------------------------------------------------------------------- CPU
class CpuClock:
    device = "cpu"

    def input_sets(self, size: int) -> tuple[int, bool]:
        """Returns how many sets of ``size`` bytes make twice the cache, and whether they come from memory."""
        needed = math.ceil(2 * last_level_cache() / max(size, 1))
        return min(MAX_SETS, max(2, needed)), needed <= MAX_SETS

    def estimate(self, call: Callable) -> float:
        """Returns the seconds of a warm call: of the fastest, unless one alone takes half a second."""
        first = self.once(call)
        return first if first >= 0.5 else min(first, self.fastest(call, 0.05))

    def fastest(self, call: Callable, seconds: float) -> float:
        """Returns the seconds of the fastest of the calls, at least one, that begin within ``seconds``."""
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            times.append(self.once(call))
        return min(times)

    def block(self, call: Callable) -> Block:
        seconds = self.estimate(call)
        calls = max(1, math.ceil(BLOCK / seconds))
        return Block(call, calls, seconds=calls * seconds)

    def time(self, blocks: list[Block]) -> list[tuple[float, float]]:
        """(device, host) seconds per call of each block."""
        here = lambda block: self.once(block.call, block.calls, block.least)
        return [(block.call((block.calls, block.least)) if block.elsewhere else here(block), 0.0) for block in blocks]

    def once(self, call: Callable, calls: int = 1, least: float = 0.0) -> float:
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() - start < least:
            for _ in range(calls):
                call()
            done += calls
        return (time.perf_counter() - start) / done

    def release(self):
        pass

    def peaks(self, dtypes, quick: bool = False) -> Peaks:
        seconds = 0.3 if quick else 1.0
        wall, cpu = time.perf_counter(), time.process_time()
        fma = max(fma_rate(100) for _ in range(3 if quick else 10))
        flops, source = {}, {}
        for name in dtypes:
            operands = [torch.randn(2048, 2048).to(getattr(torch, name)) for _ in range(2)]
            rates = {"multiply-adds": fma}
            for what, product in (("PyTorch's matmul", torch.mm), ("our linear", linear)):
                # PyTorch emulates 16-bit products on some CPUs, where the whole would take minutes.
                few = 2 * 128 * 2048**2 / self.estimate(partial(product, operands[0][:128], operands[1])) / 1e9
                if operands[0].itemsize == 2 and few < fma / 8:
                    continue
                rates[what] = 2 * 2048**3 / self.fastest(partial(product, *operands), seconds) / 1e9
            source[name] = max(rates, key=rates.get)
            flops[name] = rates[source[name]]
        share = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
        original = torch.ones(max(128 << 20, (2 if quick else 4) * last_level_cache()) // 4)
        target = torch.empty_like(original).fill_(0.0)
        copy = 2 * original.nbytes / self.fastest(lambda: target.copy_(original), seconds) / 1e9
        read = original.nbytes / self.fastest(original.sum, seconds) / 1e9
        return Peaks(flops, source, copy, read, share)


def fma_rate(milliseconds: int) -> float:
    """GFLOP/s of the extension's loop of float32 multiply-adds; 0 where the extension isn't built."""
    return pygpt._C.fma_rate(milliseconds) if hasattr(pygpt, "_C") else 0.0


# ------------------------------------------------------------------------------- GPU
class CudaClock:
    device = "cuda"
    MATMUL, COPIED_BYTES = 8192, 1 << 30  # what the peaks are measured on

    def __init__(self):
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.empty(max(FLUSHED_BYTES, 4 * l2), dtype=torch.int8, device=self.device)
        self.cycles = self.flush = 0.0  # cycles of the spin per second; seconds of a flush
        self.flush = min(self.once(self.buffer.zero_) for _ in range(5))
        self.cycles = 1e7 / min(self.once(lambda: torch.cuda._sleep(10_000_000)) for _ in range(3))

    def input_sets(self, size: int) -> tuple[int, bool]:
        """One set suffices, because the cache is flushed before every call."""
        return 1, True

    def block(self, call: Callable) -> Block:
        self.time([Block(call)] * 2)
        host = statistics.median(self.time([Block(call)])[0][1] for _ in range(ESTIMATES))
        block = Block(call, head_start=min(1.5 * host + 3e-5, 0.02))
        device = statistics.median(self.time([block])[0][0] for _ in range(ESTIMATES))
        return Block(call, 1, block.head_start, device + block.head_start + self.flush)

    def time(self, blocks: list[Block]) -> list[tuple[float, float]]:
        """(device, host) seconds of each call. All calls are queued before the first is awaited."""
        torch.cuda.synchronize()
        events, hosts = [], []
        for block in blocks:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if cycles := int(block.head_start * self.cycles):
                torch.cuda._sleep(cycles)
            self.buffer.zero_()
            start.record()
            began = time.perf_counter()
            block.call()
            hosts.append(time.perf_counter() - began)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [(start.elapsed_time(end) / 1e3, host) for (start, end), host in zip(events, hosts, strict=True)]

    def once(self, call: Callable, head_start: float = 0.0) -> float:
        return self.time([Block(call, head_start=head_start)])[0][0]

    def release(self):
        """Gives memory back between rows. Raises if an earlier kernel broke the device's context."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def peaks(self, dtypes, quick: bool = False) -> Peaks:
        best = lambda call: min(self.once(call, 5e-5) for _ in range(13))
        flops, n = {}, self.MATMUL
        for name in dtypes:
            operands = [torch.randn(n, n, device=self.device).to(getattr(torch, name)) for _ in range(2)]
            flops[name] = 2 * n**3 / best(partial(torch.mm, *operands)) / 1e9
        original = torch.randint(127, (self.COPIED_BYTES,), dtype=torch.int8, device=self.device)
        target, floats = torch.empty_like(original), original.view(torch.float32)
        copy = 2 * original.nbytes / best(lambda: target.copy_(original)) / 1e9
        read = original.nbytes / best(floats.sum) / 1e9
        return Peaks(flops, dict.fromkeys(dtypes, f"{n}^3 matmul"), copy, read)
