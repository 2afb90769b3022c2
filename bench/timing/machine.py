"""What the figures of a run depend on: the machine, the versions, what the options and the environment set."""

import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path

import torch

import pygpt

from .clocks import Peaks
from .nvidia import clocks_under_load, gpu
from .processes import SPIN

VARIABLES = (  # they lower the instruction set of ours and of each library
    "PYGPT_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
    "TORCHINDUCTOR_CPP_MARCH",
)  # fmt: skip
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")


def cpu() -> tuple[str, set[str]]:
    """The name and the flags of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return (name[1] if name else platform.processor() or platform.machine()), set(flags[1].split() if flags else ())


def describe(peaks: Peaks, clock, options) -> dict:
    """Describes the machine as the file of a run does. `peaks_after` follows at the end of the run."""
    name, flags = cpu()
    facts = {
        "cpu": name,
        "cpu_features": [feature for feature in FEATURES if feature in flags],
        "isa_ours": pygpt._C.cpu_capability() if hasattr(pygpt, "_C") else "not built",
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "forced": {name: os.environ[name] for name in (*VARIABLES, "PYGPT_BACKEND") if os.environ.get(name)},
        "spin": {name: os.environ[name] for name in SPIN if name in os.environ},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),  # where a backend has imported it
        "pygpt": pygpt.__version__,
        "python": platform.python_version(),
        "peak_gflops": peaks.flops,
        "peak_by": peaks.source,
        "copy_peak_gbs": peaks.copy,
        "read_peak_gbs": peaks.read,
        "cpu_share": peaks.cpu_share,
        "backends": options.backends,
        "peers": list(options.peers),
        "command": shlex.join(["pygpt", "bench", *getattr(options, "given", ())]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }
    if options.rehearse:
        facts["rehearsal"] = True
    if clock.device == "cuda":
        facts |= gpu() | {
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "clocks": clocks_under_load(clock),
        }
    return facts
