"""What Triton's compiler makes of every kernel, for GPUs that need not be there.

The launchers of pygpt.triton_kernels run on meta tensors, which have shapes and strides but no data;
what they would launch is compiled instead, each shipped configuration, for each target.
"""

import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from pygpt.triton_kernels import common
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from pygpt import triton_kernels as kernels

from .gpu_code import DEVICES, Result, functions

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in TYPES.items()}


# ------------------------------------------------------------------------------- what is launched
def calls(dtype: torch.dtype, wide: bool) -> Iterator[tuple[str, callable]]:
    """(name, call) of launchers on meta tensors that between them use every bucket of configurations.

    wide: also sizes that need odd tiles, or that alignment keeps from descriptors.
    """

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    def attention(E, EV, L=1024, S=1024):
        q, k, v = empty(2, 4, L, E), empty(2, 4, S, E), empty(2, 4, S, EV)
        out, lse = kernels.attention_fwd(q, k, v, True, 0.1)
        kernels.attention_bwd(out, lse, q, k, v, out, lse, True, 0.1, (True, True, True))

    def mlp(M, C, H, activation):
        x, fc, fb, proj, pb = empty(M, C), empty(H, C), empty(H), empty(C, H), empty(C)
        y, hidden, pre = kernels.mlp_fwd(x, fc, fb, proj, pb, activation)
        kernels.mlp_bwd(y, x, fc, proj, hidden, pre, activation, (True,) * 5)

    def norm(M, N):
        x, w = empty(M, N), empty(N)
        y, s, mean, rstd = kernels.add_layer_norm_fwd(x, x, w, w, 1e-5)
        kernels.add_layer_norm_bwd(y, s, x, w, mean, rstd, (True,) * 3)

    def elements(n):
        x = empty(n)
        for approximate in ("none", "tanh"):
            kernels.gelu_bwd(kernels.gelu_fwd(x, approximate), x, approximate)
        kernels.relu_bwd(kernels.relu_fwd(x), x)

    for E, EV in ((64, 64), (128, 128), (256, 256), *(((80, 48), (20, 20)) if wide else ())):
        yield f"attention {E}" + (f",{EV}" if EV != E else ""), lambda E=E, EV=EV: attention(E, EV)
    for activation in ("gelu", "relu2") if wide else ("gelu",):
        yield f"mlp {activation}", lambda activation=activation: mlp(16384, 768, 3072, activation)
    yield "mlp few rows", lambda: mlp(16, 768, 3072, "gelu_tanh")
    if wide:
        yield "mlp odd", lambda: mlp(1000, 771, 517, "gelu")
    for N in (*(2**k for k in range(4, 15)), 40000) if wide else (64, 1024, 4096, 8192, 16384, 40000):
        yield f"norm {N}", lambda N=N: norm(8192, N)
    yield "activation", lambda: elements(1 << 24)


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


def jobs(target: str, dtype: str, wide: bool) -> Iterator[Job]:
    """Every launch of `calls`, with every candidate configuration (only the first unless wide)."""
    seen = set()
    for call, run in calls(DTYPES[dtype], wide):
        found = []
        with common.compiling_for(target, lambda *launch, found=found: found.append(launch)):
            run()
        for kernel, args, constants, configs in found:
            for config in configs.candidates[: None if wide else 1]:
                job = _job(call, target, DTYPES[dtype], kernel, args, constants, config)
                if (key := repr(replace(job, call=""))) not in seen:
                    seen.add(key)
                    yield job


def _job(call, target, dtype, kernel, args, constants, config) -> Job:
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
        config.blocks, options, products,
    )  # fmt: skip


# ------------------------------------------------------------------------------- compiling
def compile_job(job: Job) -> Result:
    device, blocks = DEVICES[job.target], ",".join(str(v) for v in job.blocks.values())
    tma = " TMA" if any(t.startswith("tensordesc") for t in job.signature.values()) else ""
    result = Result(
        job.call, job.kernel.removesuffix("_kernel"), job.dtype, job.target,
        f"{blocks} w{job.options['num_warps']} s{job.options['num_stages']}{tma}", job.options["num_warps"],
    )  # fmt: skip
    kernel = getattr(sys.modules[job.module], job.kernel)
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=job.signature,
        constexprs={(place(name),): value for name, value in job.constants.items()},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in job.aligned},
    )
    gpu = GPUTarget("cuda" if isinstance(device.arch, int) else "hip", device.arch, device.warp)
    try:
        compiled = triton.compile(source, target=gpu, options=job.options)
    except Exception as e:  # noqa: BLE001 - of many kinds
        result.wrong = f"does not compile: {type(e).__name__}: {str(e).strip().rpartition(chr(10))[2]}"
        return result
    result.shared = compiled.metadata.shared
    inspect = _inspect_nvidia if gpu.backend == "cuda" else _inspect_amd
    assembly, result.registers, result.spilled, in_loop = inspect(compiled)
    used = [(name, assembly.count(name)) for name in dict.fromkeys((device.tensor_core, "mma.sync"))]
    result.products = " ".join(f"{count} {name}" for name, count in used if count)
    result.judge(in_loop, device.tensor_core if job.products else "")
    return result


def _inspect_nvidia(compiled) -> tuple[str, int, int, bool]:
    """PTX, registers, bytes of stack (where spilled registers go) of a thread, and whether a loop touches them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = functions(Path(file.name))
    return compiled.asm["ptx"], kernel.registers, kernel.stack, kernel.spills_in_a_loop()


def _inspect_amd(compiled) -> tuple[str, int, int, bool]:
    text = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return text, field("vgpr_count"), field("vgpr_spill_count"), field("vgpr_spill_count") > 0
