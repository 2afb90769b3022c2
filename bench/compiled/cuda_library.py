"""What nvcc made of every CUDA kernel: read from the library pygpt._cuda, for the GPUs it was built for.

The library has registers, spills and instructions. It does not have ptxas' messages, so that serialized wgmma
instructions are recognized by their waits. The launchers decide how many threads and how much shared memory a launch
requests: they run without a GPU, and the emulator of tests/emulator records what they would launch.
"""

import re
import subprocess
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch

from .calls import DTYPES, calls, packed_attention
from .result import DEVICES, Result
from .sass import Function, functions

TENSOR_CORES = ("HMMA", "HGMMA")  # mma.sync and wgmma in machine code


def inspect(targets: list[str], dtypes: list[str], only: tuple[str, ...]) -> list[Result]:
    """Returns one result for each kernel that a call launches, on each target that the library was built for."""
    from tests import emulator

    compiled = {(plain(name), f.arch): f for name, f in demangled(Path(find_spec("pygpt._cuda").origin))}
    rows, seen = [], set()
    for dtype in dtypes:
        arguments = torch.ops.pygpt_emulator, DTYPES[dtype], "cpu"
        for call, run in chain(calls(*arguments, options=True), packed_attention(*arguments)):
            for name, block, shared, _ in emulator.launches(run) if call.startswith(only) else ():
                name = plain(name)
                for target in targets:
                    arch = f"sm_{DEVICES[target].arch}"
                    function = compiled.get((name, f"{arch}a")) or compiled.get((name, arch))
                    if function and (name, target, block, shared) not in seen:
                        seen.add((name, target, block, shared))
                        rows.append(result(call, name, dtype, target, block, shared, function))
    return rows


def result(call: str, name: str, dtype: str, target: str, block: int, shared: int, function: Function) -> Result:
    kernel, arguments = short(name)
    row = Result(call, kernel, dtype, target, arguments.rstrip(">"), -(-block // 32), shared=function.shared + shared)
    row.take(function)
    row.count(function.sass, TENSOR_CORES)
    products = dtype != "fp32" and re.match(r"mma_gemm|attention_(fwd|dkdv|dq|bias)", kernel)
    row.judge("HMMA" if products else "")
    return row


def demangled(library: Path, arch: str = "") -> list[tuple[str, Function]]:
    kernels = functions(library, arch)
    mangled = "\n".join(f.name for f in kernels)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    return list(zip(names, kernels, strict=True))


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


def short(name: str) -> tuple[str, str]:
    """A kernel's name without namespaces, and its template arguments, of a plain name."""
    kernel, _, arguments = re.sub(r"\b(\w+::)+", "", name).replace("_kernel", "").partition("<")
    return kernel, arguments
