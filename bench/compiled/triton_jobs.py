"""What Triton's compiler makes of every kernel, for GPUs that need not be there.

The launchers of pygpt.triton_kernels run on meta tensors, which have shapes and strides but no data;
what they would launch is compiled instead, each shipped configuration, for each target.
"""

import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import triton
from pygpt.triton_kernels import common
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from pygpt import triton_kernels as kernels

from .calls import calls
from .sass import DEVICES, Function, Result, functions, serialized

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in TYPES.items()}


# ------------------------------------------------------------------------------- what is launched
@dataclass(frozen=True)
class Job:
    """One kernel as it would be launched with one configuration."""

    call: str
    dtype: str
    target: str
    module: str
    kernel: str
    signature: dict
    constants: dict
    aligned: tuple  # arguments known to be divisible by 16
    blocks: dict
    options: dict  # of the compiler
    products: bool  # whether it multiplies 16-bit matrices
    programs: int = field(compare=False)  # that are launched


def jobs(target: str, dtype: str, wide: bool) -> Iterator[Job]:
    """Every launch of `calls`, with every candidate configuration (only the first unless wide)."""
    seen = set()
    for call, run in calls(kernels, DTYPES[dtype], "meta", wide):
        for job in launched(call, run, target, dtype, wide):
            if (key := repr(replace(job, call="", programs=0))) not in seen:
                seen.add(key)
                yield job


def launched(call: str, run: Callable, target: str, dtype: str, wide: bool = False) -> Iterator[Job]:
    """What run() launches, in order, with each candidate configuration (only the first unless wide)."""
    found = []
    with common.compiling_for(target, lambda *launch: found.append(launch)):
        run()
    for kernel, grid, args, constants, configs in found:
        for config in configs.candidates[: None if wide else 1]:
            yield _job(call, target, DTYPES[dtype], kernel, grid(config.blocks), args, constants, config)


def _job(call, target, dtype, kernel, programs, args, constants, config) -> Job:
    named = dict(zip(kernel.arg_names, args, strict=False)) | constants | config.blocks
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = named.pop("enable_fp_fusion")
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    signature, known, aligned = {}, {}, []
    for name in kernel.arg_names:
        value = named[name]
        if isinstance(value, common.Tiled):
            value = value.descriptor(config.blocks)
        if name in fixed or value is None or (isinstance(value, int) and value == 1) and name not in free:
            signature[name], known[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in free:
                aligned.append(name)
    products = (
        dtype.itemsize == 2 and kernel.__name__.startswith(("gemm", "attention")) and "delta" not in kernel.__name__
    )
    return Job(
        call, TYPES[dtype], target, kernel.fn.__module__, kernel.__name__, signature, known, tuple(aligned),
        config.blocks, options, products, programs,
    )  # fmt: skip


# ------------------------------------------------------------------------------- compiling
def _keep_ptxas_log(*stage_arguments):
    """A hook of Triton's: ptxas' messages become part of what Triton's cache knows of a kernel.

    Without arguments Triton asks what to add to the cache's key.
    """
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


knobs.runtime.add_stages_inspection_hook = _keep_ptxas_log
knobs.nvidia.dump_ptxas_log = True
knobs.cache.dir = str(Path(knobs.cache.dir) / "bench.compiled")  # Triton 3.6 does not ask for a key


def compile_job(job: Job) -> Result:
    device, blocks = DEVICES[job.target], ",".join(str(v) for v in job.blocks.values())
    tma = " TMA" if any(t.startswith("tensordesc") for t in job.signature.values()) else ""
    result = Result(
        job.call, job.kernel.removesuffix("_kernel"), job.dtype, job.target,
        f"{blocks} w{job.options['num_warps']} s{job.options['num_stages']}{tma}", job.options["num_warps"],
    )  # fmt: skip
    try:
        compiled = compiled_job(job)
    except Exception as e:  # noqa: BLE001 - of many kinds
        result.wrong = f"does not compile: {type(e).__name__}: {str(e).strip().rpartition(chr(10))[2]}"
        return result
    result.shared = compiled.metadata.shared
    inspect = _inspect_nvidia if isinstance(device.arch, int) else _inspect_amd
    assembly = inspect(compiled, result)
    used = [(name, assembly.count(name)) for name in dict.fromkeys((device.tensor_core, "mma.sync"))]
    result.products = " ".join(f"{count} {name}" for name, count in used if count)
    result.judge(device.tensor_core if job.products else "")
    return result


def compiled_job(job: Job):
    """Triton's compiled kernel. Raises whatever the compiler does."""
    device = DEVICES[job.target]
    kernel = getattr(sys.modules[job.module], job.kernel)
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=job.signature,
        constexprs={(place(name),): value for name, value in job.constants.items()},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in job.aligned},
    )
    gpu = GPUTarget("cuda" if isinstance(device.arch, int) else "hip", device.arch, device.warp)
    return triton.compile(source, target=gpu, options=job.options)


def machine_code(compiled) -> Function:
    """Of a kernel compiled for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = functions(Path(file.name))
    return kernel


def _inspect_nvidia(compiled, result: Result) -> str:
    """Fills in what the machine code shows; returns PTX."""
    kernel = machine_code(compiled)
    result.registers, result.spilled, result.loop_spills = kernel.registers, kernel.stack, kernel.loop_spills
    result.serialized = serialized(compiled.metadata.ptxas_log) or kernel.serialized
    return compiled.asm["ptx"]


def _inspect_amd(compiled, result: Result) -> str:
    """The same; spilled registers count as spilled in a loop."""
    text = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    result.registers, result.spilled = field("vgpr_count"), field("vgpr_spill_count")
    result.loop_spills = result.spilled
    return text
