"""The CUDA kernels of csrc/cuda on a CPU. See README.md in this folder.

`kernels()` is a backend: a namespace of ``<op>_fwd`` and ``<op>_bwd``. Every call runs under each schedule of threads,
blocks and asynchronous copies, and raises if the results of two schedules differ in any bit.
"""

import functools
import subprocess
from collections.abc import Callable
from types import SimpleNamespace

import torch

from . import build

SCHEDULES = ("fifo", "reversed", "random")


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def _under(schedules, module, name: str, op):
    from pygpt.verify import as_tuple

    def call(*args):
        first = None
        for schedule in schedules:
            module.schedule(schedule, torch.initial_seed() % 2**32)
            result = op(*args)
            tensors = as_tuple(result)
            first = tensors if first is None else first
            for i, (a, b) in enumerate(zip(first, tensors, strict=True)):
                if not torch.equal(_bits(a), _bits(b)):
                    raise AssertionError(
                        f"{name}: output {i} under the {schedule} schedule differs from {schedules[0]}"
                    )
        return result

    return call


def launches(call: Callable) -> list[tuple[str, int, int, int]]:
    """The launches that ``call()`` would make: (kernel, threads per block, bytes of dynamic shared memory, blocks)."""
    module = build.load()
    symbols = subprocess.run(["nm", "-C", module.__file__], capture_output=True, text=True, check=True).stdout
    names = {int(line[:16], 16): line[19:] for line in symbols.splitlines() if line[:1] != " "}
    module.record(True)
    try:
        call()
    finally:
        module.record(False)
    return [(names[offset], *launch) for offset, *launch in module.launches()]


@functools.cache
def kernels(sanitizer: str | None = None, schedules: tuple[str, ...] = SCHEDULES) -> SimpleNamespace:
    from pygpt.dispatch import KERNEL_NAMES  # imported late, so that conformance.py runs without pygpt

    module = build.load(sanitizer)
    schedules = schedules[-1:] if sanitizer == "thread" else schedules  # the race checker needs only one schedule
    ops = {name: getattr(torch.ops.pygpt_emulator, name).default for name in KERNEL_NAMES}
    return SimpleNamespace(**{name: _under(schedules, module, name, op) for name, op in ops.items()})
