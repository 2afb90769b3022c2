"""The clocks of an NVIDIA GPU, and what lowers them, as nvidia-smi reports them."""

import math
import shutil
import subprocess

import torch

LOAD_SECONDS = 1.0  # of queued work while nvidia-smi is asked
FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
REASONS = {  # bits of NVML's clock event reasons that lower a clock below what the work could use
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


def gpu() -> dict:
    """What PyTorch knows about the GPU."""
    p = torch.cuda.get_device_properties(0)
    return {"gpu": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_gb": p.total_memory / 1e9, "l2_mb": p.L2_cache_size / 1e6}  # fmt: skip


def clocks() -> dict:
    """What nvidia-smi says now; empty where it is missing or does not answer. Reads only."""
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


def clocks_under_load(clock) -> dict:
    """`clocks` while the device multiplies matrices."""
    if not shutil.which("nvidia-smi"):
        return {}
    a = torch.randn(clock.MATMUL, clock.MATMUL, device=clock.device, dtype=torch.bfloat16)
    for _ in range(math.ceil(LOAD_SECONDS / max(clock.once(lambda: a @ a), 1e-4))):
        a @ a
    under_load = clocks()
    torch.cuda.synchronize()
    return under_load
