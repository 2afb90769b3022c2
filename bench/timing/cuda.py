"""How a call is timed on a GPU: by events on the stream, with a cold L2 cache and a full queue.

Before each timed call the stream gets two things that are not timed: a spin (`torch.cuda._sleep`)
long enough for the host to queue the whole call meanwhile, so that a short kernel's launch does not
show as idle time, and a write over several times the L2 cache. That write leaves its own dirty lines
behind, as a model's previous op would: a kernel pays for writing back as much as it leaves unwritten.

`race` times all candidates of a row in turn, in an order drawn anew for each round, so that drifting
clocks hit all alike. `CpuTimer` has the same face without a GPU, for the dry run and the tests.
"""

import math
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

MOST_ROUNDS = 200
ESTIMATES = 3  # calls that tell how long a candidate takes, on the device and on the host
FLUSH_BYTES = 256 << 20  # written between calls: at least this, and four times the L2 cache
GEMM, COPY_BYTES = 8192, 1 << 30  # what the limits are measured on
LOAD_MS = 1000  # of queued work while nvidia-smi is asked for the clocks


@dataclass
class Timing:
    """Milliseconds of one candidate's calls, round by round."""

    lead: float = 0.0  # head start of the host
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # until the call returned

    def summary(self) -> dict:
        """Median and quartiles; launch_bound: the host was mostly late, so its time shows in the device's."""
        several = len(self.device) > 1
        q1, _, q3 = statistics.quantiles(self.device, n=4, method="inclusive") if several else self.device * 3
        host = statistics.median(self.host)
        found = {"ms": statistics.median(self.device), "q1_ms": q1, "q3_ms": q3, "host_ms": host}
        return found | ({"launch_bound": True} if host > self.lead else {})


def race(timer, calls: dict[str, Callable], seconds: float) -> dict[str, Timing]:
    """Times the candidates in rounds for about ``seconds``. They must be warm."""
    timings, cost = {}, 0.0
    for name, call in calls.items():
        host = statistics.median(timer.time([(call, 0.0)])[0][1] for _ in range(ESTIMATES))
        timings[name] = Timing(min(1.5 * host + 0.03, 20.0))
        device = statistics.median(timer.time([(call, timings[name].lead)])[0][0] for _ in range(ESTIMATES))
        cost += device + timings[name].lead + timer.flush_ms
    turns = random.Random(0)
    for _ in range(max(timer.least_rounds, min(MOST_ROUNDS, int(seconds * 1e3 / max(cost, 1e-6))))):
        order = turns.sample(list(calls), len(calls))
        found = timer.time([(calls[name], timings[name].lead) for name in order])
        for name, (device, host) in zip(order, found, strict=True):
            timings[name].device.append(device)
            timings[name].host.append(host)
    return timings


# ------------------------------------------------------------------------------- the two devices
class CudaTimer:
    device, least_rounds, gemm, copy_bytes = "cuda", 5, GEMM, COPY_BYTES

    def __init__(self):
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.empty(max(FLUSH_BYTES, 4 * l2), dtype=torch.int8, device=self.device)
        self.cycles_per_ms, self.flush_ms = 0.0, 0.0
        self.flush_ms = min(self._alone(self.buffer.zero_) for _ in range(5))
        self.cycles_per_ms = 10_000_000 / min(self._alone(lambda: torch.cuda._sleep(10_000_000)) for _ in range(3))

    def _alone(self, call) -> float:
        return self.time([(call, 0.0)])[0][0]

    def time(self, calls: list[tuple[Callable, float]]) -> list[tuple[float, float]]:
        """(call, head start in ms) each -> (device, host) ms each. All are queued before the first is awaited."""
        torch.cuda.synchronize()
        events, hosts = [], []
        for call, lead in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if cycles := int(lead * self.cycles_per_ms):
                torch.cuda._sleep(cycles)
            self.buffer.zero_()
            start.record()
            begin = time.perf_counter()
            call()
            hosts.append((time.perf_counter() - begin) * 1e3)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [(start.elapsed_time(end), host) for (start, end), host in zip(events, hosts, strict=True)]

    def release(self):
        """Gives memory back between rows. Raises if an earlier kernel broke the device's context."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class CpuTimer:
    """The dry run: the host's clock, nothing flushed, small limits."""

    device, least_rounds, gemm, copy_bytes, flush_ms = "cpu", 2, 256, 1 << 22, 0.0

    def time(self, calls):
        found = []
        for call, _ in calls:
            begin = time.perf_counter()
            call()
            found.append(((time.perf_counter() - begin) * 1e3, 0.0))
        return found

    def release(self):
        pass


# ------------------------------------------------------------------------------- the limits
def limits(timer, dtypes=("bfloat16", "float16", "float32")) -> dict[str, float]:
    """The best this device does now: TFLOP/s of a large matmul per dtype (float32: no TF32), TB/s of a large copy."""
    found = {}
    for name in dtypes:
        a, b = (torch.randn(timer.gemm, timer.gemm, device=timer.device).to(getattr(torch, name)) for _ in range(2))
        found[name] = 2 * timer.gemm**3 / _best(timer, lambda a=a, b=b: torch.mm(a, b)) / 1e9
    source = torch.randint(127, (timer.copy_bytes,), dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / _best(timer, lambda: target.copy_(source)) / 1e9
    return found


def _best(timer, call) -> float:
    """Milliseconds."""
    return min(timer.time([(call, 0.05)])[0][0] for _ in range(3 + 10))


# ------------------------------------------------------------------------------- clocks
FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
REASONS = {  # bits of NVML's clock event reasons that make a clock lower than the work would like
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


def clocks() -> dict:
    """What nvidia-smi says now; empty where it is missing or does not answer. Reads only."""
    if not shutil.which("nvidia-smi"):
        return {}
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None) if torch.cuda.is_available() else None
    which = ["--id", f"GPU-{uuid}"] if uuid else []
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the latter: older drivers
        query = f"--query-gpu={','.join((*FIELDS, reasons))}"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", *which]
        try:
            out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        values = [value.strip() for value in out.strip().splitlines()[0].split(",")] if out.strip() else []
        if len(values) == len(FIELDS) + 1:
            return dict(zip(FIELDS, values, strict=False)) | {"throttled_by": _reasons(values[-1])}
    return {}


def _reasons(text: str) -> list[str]:
    try:
        bits = int(text, 16)
    except ValueError:
        return []
    return [name for bit, name in REASONS.items() if bits & bit]


def clocks_under_load(timer) -> dict:
    """`clocks` while the device multiplies matrices."""
    if timer.device != "cuda" or not shutil.which("nvidia-smi"):
        return {}
    a = torch.randn(timer.gemm, timer.gemm, device="cuda", dtype=torch.bfloat16)
    for _ in range(math.ceil(LOAD_MS / max(timer.time([(lambda: a @ a, 0.0)])[0][0], 0.1))):
        a @ a
    found = clocks()
    torch.cuda.synchronize()
    return found
