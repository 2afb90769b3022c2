"""What nvcc made of every CUDA kernel: read from the library pygpt._cuda, for the GPUs it was built for.

Registers, spills and instructions stand in the library; how many threads and how much shared memory a launch
asks for is decided by the launchers, which run here without a GPU: the emulator of tests/emulator notes what
they would launch, and launches nothing.
"""

import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from .gpu_code import DEVICES, Function, Result, functions

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = ("HMMA", "HGMMA")  # mma.sync and wgmma in machine code


def calls(dtype: torch.dtype) -> Iterator[tuple[str, callable]]:
    """(name, call) of launchers on tensors whose content does not matter."""
    ops = torch.ops.pygpt_emulator

    def empty(*shape):
        return torch.empty(shape, dtype=dtype)

    def attention(E):
        q = empty(2, 4, 1024, E)
        out, lse = ops.attention_fwd(q, q, q, True, 0.1)
        ops.attention_bwd(out, lse, q, q, q, out, lse, True, 0.1, [True] * 3)

    def mlp(M, C, H):
        x, fc, fb, proj, pb = empty(M, C), empty(H, C), empty(H), empty(C, H), empty(C)
        y, hidden, pre = ops.mlp_fwd(x, fc, fb, proj, pb, "gelu")
        ops.mlp_bwd(y, x, fc, proj, hidden, pre, "gelu", [True] * 5)

    def norm(N):
        x, w = empty(8192, N), empty(N)
        y, s, mean, rstd = ops.add_layer_norm_fwd(x, x, w, w, 1e-5)
        ops.add_layer_norm_bwd(y, s, x, w, mean, rstd, [True] * 3)

    def elements():
        x = empty(1 << 20)
        for approximate in ("none", "tanh"):
            ops.gelu_bwd(ops.gelu_fwd(x, approximate), x, approximate)
        ops.relu_bwd(ops.relu_fwd(x), x)

    for E in (64, 128, 256):
        yield f"attention {E}", lambda E=E: attention(E)
    yield "mlp", lambda: mlp(16384, 768, 3072)
    yield "mlp few tiles", lambda: mlp(256, 768, 3072)
    yield "mlp few rows", lambda: mlp(4, 768, 3072)
    for N in (64, 768, 4096, 16384, 40000):
        yield f"norm {N}", lambda N=N: norm(N)
    yield "activation", elements


def inspect(targets: list[str], dtypes: list[str], only: str) -> list[Result]:
    """One result for each kernel that a call launches, on each target that the library was built for."""
    from tests import emulator

    compiled = {(plain(name), f.arch): f for name, f in demangled(Path(find_spec("pygpt._cuda").origin))}
    found, seen = [], set()
    for dtype in dtypes:
        for call, run in calls(TYPES[dtype]):
            for name, block, shared in emulator.launches(run) if call.startswith(only) else ():
                name = plain(name)
                for target in targets:
                    function = compiled.get((name, f"sm_{DEVICES[target].arch}"))
                    if function and (name, target, block, shared) not in seen:
                        seen.add((name, target, block, shared))
                        found.append(result(call, name, dtype, target, block, shared, function))
    return found


def result(call: str, name: str, dtype: str, target: str, block: int, shared: int, function: Function) -> Result:
    short = re.sub(r"\b(\w+::)+", "", name).replace("_kernel", "")
    row = Result(call, short.partition("<")[0], dtype, target, short.partition("<")[2].rstrip(">"), -(-block // 32))
    row.registers, row.spilled, row.shared = function.registers, function.stack, function.shared + shared
    used = [(instruction, function.count(instruction)) for instruction in TENSOR_CORES]
    row.products = " ".join(f"{count} {instruction}" for instruction, count in used if count)
    products = dtype != "fp32" and re.match(r"mma_gemm|attention_(fwd|dkdv|dq)", short)
    row.judge(function.spills_in_a_loop(), "HMMA" if products else "")
    return row


def demangled(library: Path) -> list[tuple[str, Function]]:
    found = functions(library)
    names = subprocess.run(
        ["c++filt"], input="\n".join(f.name for f in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return list(zip(names, found, strict=True))


def plain(name: str) -> str:
    """A kernel's name and template arguments as both compilers know them, without return type and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").replace("pygpt::cuda::", "")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "f16")
