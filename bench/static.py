"""Compiles every Triton kernel for GPUs that need not be there: `python -m bench.static`.

The launchers of pygpt.triton_kernels run on meta tensors, which have shapes and strides but no data;
what they would launch is compiled instead, each shipped configuration, for each target. The table
shows what a GPU would be given: registers and bytes spilled by a thread, shared memory, warps, how many
blocks fit a multiprocessor at a time and the share of its threads they fill (occupancy), and the
tensor-core instructions. Exit code 1 if something does not compile, spills registers in an inner loop
(or many anywhere), needs more shared memory than the device has, or multiplies 16-bit numbers without
tensor cores.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from pygpt.triton_kernels import common
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from pygpt import triton_kernels as kernels

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Device:
    """What a multiprocessor (NVIDIA) or compute unit (AMD) offers."""

    gpu: GPUTarget
    shared: int  # bytes a block may use
    shared_all: int  # bytes in all
    tensor_core: str  # the instruction that a 16-bit product must become
    registers: int = 65536
    threads: int = 2048


DEVICES = {
    "sm80": Device(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, "mma.sync"),
    "sm90": Device(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, "wgmma.mma_async"),
    "sm100": Device(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, "tcgen05.mma"),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, "v_mfma", 4 * 512 * 64),
}
FEW_BYTES = 64  # of stack, that may hold registers across a loop
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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


def jobs(target: str, dtype: torch.dtype, wide: bool) -> Iterator[Job]:
    """Every launch of `calls`, with every candidate configuration (only the first unless wide)."""
    seen = set()
    for call, run in calls(dtype, wide):
        found = []
        with common.compiling_for(target, lambda *launch: found.append(launch)):
            run()
        for kernel, args, constants, configs in found:
            for config in configs.candidates[: None if wide else 1]:
                job = _job(call, target, dtype, kernel, args, constants, config)
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
@dataclass
class Result:
    call: str
    kernel: str
    dtype: str
    target: str
    config: str
    warps: int = 0
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    products: str = ""
    wrong: str = ""


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
    try:
        compiled = triton.compile(source, target=device.gpu, options=job.options)
    except Exception as e:  # of many kinds
        result.wrong = f"does not compile: {type(e).__name__}: {str(e).strip().rpartition(chr(10))[2]}"
        return result
    result.shared = compiled.metadata.shared
    inspect = _inspect_nvidia if device.gpu.backend == "cuda" else _inspect_amd
    assembly, result.registers, result.spilled, in_loop = inspect(compiled)
    threads = result.warps * device.gpu.warp_size
    by_registers = device.registers // (max(-(-result.registers // 8) * 8, 8) * threads)
    by_shared = device.shared_all // (result.shared + 1024) if result.shared else 32
    result.blocks_per_sm = min(by_registers, by_shared, device.threads // threads, 32)
    result.occupancy = result.blocks_per_sm * threads / device.threads
    used = [(name, assembly.count(name)) for name in dict.fromkeys((device.tensor_core, "mma.sync"))]
    result.products = " ".join(f"{count} {name}" for name, count in used if count)
    if in_loop or result.spilled > FEW_BYTES:
        result.wrong = "spills"
    elif result.shared > device.shared:
        result.wrong = f"needs more shared memory than the device's {device.shared}"
    elif job.products and not used[0][1]:
        result.wrong = f"no {device.tensor_core}"
    return result


def _inspect_nvidia(compiled) -> tuple[str, int, int, bool]:
    """PTX, registers, bytes of stack (where spilled registers go) of a thread, and whether a loop touches them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [NVIDIA / "cuobjdump", "--dump-resource-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump).groups()
    return compiled.asm["ptx"], int(registers), int(stack), _spills_in_a_loop(dump)


def _spills_in_a_loop(sass: str) -> bool:
    """Whether an innermost loop, a backward branch around no other, reads or writes local memory.

    Up to a few registers put aside before a loop and fetched after it cost nothing; in one they cost bandwidth.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)]
    branches = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"\bBRA\S* .*0x([0-9a-f]+)", text))]
    loops = [(first, last) for first, last in branches if first < last]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    local = [at for at, text in code if re.search(r"\b(STL|LDL)\b", text)]
    return any(first <= at <= last for at in local for first, last in inner)


def _inspect_amd(compiled) -> tuple[str, int, int, bool]:
    text = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return text, field("vgpr_count"), field("vgpr_spill_count"), field("vgpr_spill_count") > 0


# ------------------------------------------------------------------------------- command line
def table(results: list[Result]) -> str:
    head = ("call", "kernel", "dtype", "target", "configuration", "registers", "spilled", "shared", "blocks", "occupancy",
            "tensor cores", "")  # fmt: skip
    lines = [head] + [
        (r.call, r.kernel, r.dtype, r.target, r.config, str(r.registers), str(r.spilled), str(r.shared),
         str(r.blocks_per_sm), f"{r.occupancy:.0%}", r.products, f"WRONG: {r.wrong}" if r.wrong else "")
        for r in results
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", default=",".join(DEVICES), help="some of %(default)s")
    parser.add_argument("--dtypes", default="bf16,fp32", help="some of bf16, fp16, fp32; default: %(default)s")
    parser.add_argument(
        "--all", action="store_true", help="every candidate, width and activation, not only the first choices"
    )
    parser.add_argument(
        "--only", default="", help="calls whose name starts with this: attention, mlp, norm, activation"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table to this file")
    options = parser.parse_args()
    names = {name: dtype for dtype, name in TYPES.items()}
    for given, known in ((options.targets, DEVICES), (options.dtypes, names)):
        if unknown := [name for name in given.split(",") if name not in known]:
            parser.error(f"{unknown[0]!r} is not among {', '.join(known)}")
    todo = [
        job
        for target in options.targets.split(",")
        for name in options.dtypes.split(",")
        for job in jobs(target, names[name], options.all)
        if job.call.startswith(options.only)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(compile_job, todo))
    print(table(results))
    wrong = [r for r in results if r.wrong]
    print(f"\n{len(results)} kernels compiled with Triton {triton.__version__}, {len(wrong)} wrong")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    return 1 if wrong or not results else 0


if __name__ == "__main__":
    sys.exit(main())
