"""What Triton's compiler makes of every kernel, for GPUs that need not be present.

The launchers of pygpt.triton_kernels run on meta tensors, which have shapes and strides but no data. What they would
launch is compiled instead, by Triton's own path of a launch, for a target that a stand-in for its driver names.
"""

import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import triton
from pygpt.triton_kernels import common
from triton import knobs
from triton.backends.compiler import GPUTarget

from pygpt import triton_kernels as kernels

from .calls import DTYPES, attention_options, calls, packed_attention
from .result import DEVICES, Result
from .sass import Function, functions, serialized


# ------------------------------------------------------------------------------- what is launched
@dataclass(frozen=True)
class Job:
    """One kernel with one configuration, for arguments like these."""

    kernel: str
    module: str
    arguments: tuple
    constants: tuple
    config: common.Config
    programs: int = field(compare=False)  # that are launched

    @property
    def key(self) -> tuple:
        """It is equal for two jobs that Triton compiles to the same code: kinds of arguments count, values do not."""
        return self.kernel, tuple(map(_kind, self.arguments)), self.constants, repr(self.config)

    def compile(self):
        """Triton's compiled kernel, for the target of its active driver. Raises whatever the compiler does."""
        config = self.config
        arguments = [a.descriptor(config.blocks) if isinstance(a, common.Tiled) else a for a in self.arguments]
        kernel = getattr(sys.modules[self.module], self.kernel)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return kernel.warmup(*arguments, grid=(1,), **dict(self.constants), **config.blocks, **options)


def _kind(argument):
    if isinstance(argument, common.Tiled):
        return "descriptor", argument.tensor.dtype, argument.block
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    if isinstance(argument, int) and not isinstance(argument, bool):
        return argument == 1, argument % 16 == 0, argument >= 2**31
    return type(argument)


def _detached(argument):
    """A tensor of a graph cannot be sent to another process."""
    if isinstance(argument, common.Tiled):
        return replace(argument, tensor=argument.tensor.detach())
    return argument.detach() if isinstance(argument, torch.Tensor) else argument


def launched(run: Callable, target: str, every_candidate: bool = False) -> Iterator[Job]:
    """What run() launches, in order, with the first candidate configuration or with every one."""
    launches = []
    with common.compiling_for(target, lambda *launch: launches.append(launch)):
        run()
    for kernel, grid, arguments, constants, configs in launches:
        arguments, constants = tuple(map(_detached, arguments)), tuple(constants.items())
        for config in configs.candidates[: None if every_candidate else 1]:
            programs = grid(config.blocks)
            yield Job(kernel.__name__, kernel.fn.__module__, arguments, constants, config, programs)


def jobs(target: str, dtype: str, wide: bool) -> Iterator[tuple[str, str, str, Job]]:
    """(call, dtype, target, job) of every launch of `calls`, without repetitions. wide: with every candidate."""
    seen = set()
    arguments = kernels, DTYPES[dtype], "meta", wide
    for call, run in chain(calls(*arguments), attention_options(*arguments), packed_attention(*arguments)):
        for job in launched(run, target, wide):
            if job.key not in seen:
                seen.add(job.key)
                yield call, dtype, target, job


# ------------------------------------------------------------------------------- compiling
class NoGpu:
    """Stands for Triton's driver on a machine without a GPU: it names a target and launches nothing."""

    def __init__(self, target: str):
        device = DEVICES[target]
        self.name = target
        self.target = GPUTarget("cuda" if isinstance(device.arch, int) else "hip", device.arch, device.warp)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        """Triton keeps what it has compiled by device, so each target is a device."""
        return self.name

    def get_current_stream(self, device):
        return 0


def keep_ptxas_log():
    """From now on ptxas' messages are part of what Triton keeps of a kernel, in a cache of their own."""
    knobs.runtime.add_stages_inspection_hook = _with_log
    knobs.nvidia.dump_ptxas_log = True
    if Path(knobs.cache.dir).name != "bench.compiled":  # Triton 3.6 does not ask for a key
        knobs.cache.dir = str(Path(knobs.cache.dir) / "bench.compiled")


def _with_log(*stage_arguments):
    """A hook of Triton's. Without arguments Triton asks what to add to the cache's key."""
    if not stage_arguments:
        return ("ptxas log",) * 2
    stages = stage_arguments[1]
    if "cubin" in stages:  # else AMD's
        stages["cubin"] = partial(_assemble, stages["cubin"])
    return None


def _assemble(make_cubin, ptx, metadata):
    with redirect_stdout(io.StringIO()) as log:
        cubin = make_cubin(ptx, metadata)
    metadata["ptxas_log"] = log.getvalue()
    if "registers" not in metadata["ptxas_log"]:
        raise RuntimeError("Triton did not print ptxas' log")
    return cubin


def inspect(call: str, dtype: str, target: str, job: Job) -> Result:
    """A line of the table."""
    device, config = DEVICES[target], job.config
    tma = " TMA" if any(isinstance(a, common.Tiled) for a in job.arguments) else ""
    blocks = ",".join(map(str, config.blocks.values()))
    result = Result(
        call, job.kernel.removesuffix("_kernel"), dtype, target,
        f"{blocks} w{config.num_warps} s{config.num_stages}{tma}", config.num_warps,
    )  # fmt: skip
    triton.runtime.driver.set_active(NoGpu(target))
    try:
        compiled = job.compile()
    except Exception as e:  # noqa: BLE001 - of many kinds
        result.wrong = f"does not compile: {type(e).__name__}: {str(e).strip().rpartition(chr(10))[2]}"
        return result
    result.shared = compiled.metadata.shared
    assembly = (_inspect_nvidia if isinstance(device.arch, int) else _inspect_amd)(compiled, result)
    result.count(assembly, dict.fromkeys((device.tensor_core, "mma.sync")))
    multiplies = job.kernel.startswith(("gemm", "attention")) and "delta" not in job.kernel
    result.judge(device.tensor_core if multiplies and dtype != "fp32" else "")
    return result


def machine_code(compiled) -> Function:
    """Reads the machine code of a kernel compiled for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = functions(Path(file.name))
    return kernel


def _inspect_nvidia(compiled, result: Result) -> str:
    """Fills in what the machine code shows; returns PTX."""
    result.take(machine_code(compiled))
    result.serialized = serialized(compiled.metadata.ptxas_log) or result.serialized
    return compiled.asm["ptx"]


def _inspect_amd(compiled, result: Result) -> str:
    """Does the same for AMD; spilled registers count as spilled in a loop."""
    text = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    result.registers, result.spilled = field("vgpr_count"), field("vgpr_spill_count")
    result.loop_spills = result.spilled
    return text
