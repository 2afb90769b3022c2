"""What every GPU kernel needs of a GPU, on a machine without one: `python -m bench.compiled`.

Triton kernels are compiled for each target with their shipped configurations; nvcc compiled the CUDA kernels when the
package was built. The table shows registers and spilled bytes of a thread, shared memory, warps, how many blocks fit a
multiprocessor and which share of its threads they fill (occupancy), the tensor-core instructions, and whether these
wait for each other (serialized). Exit code 1 if a kernel does not compile, spills registers in a loop (or many
anywhere), needs more shared memory than the device has, multiplies 16-bit values without tensor cores, or serializes
wgmma instructions.

--predict instead shows what an H100 should reach in bfloat16, from the machine code of the main loops (predict.py).
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled; read when Triton is imported

from pygpt.files import atomic

from ..cli import some_of
from .calls import DTYPES
from .result import DEVICES, table

BACKENDS = ("triton", "cuda")


def missing(backend: str) -> str:
    """Says why a backend has no compiled kernels here; empty if it has."""
    if backend == "triton":
        return "" if find_spec("triton") else "Triton is not installed"
    return "" if find_spec("pygpt._cuda") else "the CUDA kernels were not built (no nvcc)"


def results(backend: str, options) -> list:
    if backend == "cuda":
        from . import cuda_library

        return cuda_library.inspect(options.targets, options.dtypes, options.only)
    from . import triton_jobs

    launched = (triton_jobs.jobs(target, dtype, options.all) for target in options.targets for dtype in options.dtypes)
    jobs = [job for job in chain.from_iterable(launched) if job[0].startswith(options.only)]
    with ProcessPoolExecutor(options.jobs, initializer=triton_jobs.keep_ptxas_log) as pool:
        return list(pool.map(triton_jobs.inspect, *zip(*jobs, strict=True))) if jobs else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--backends", type=some_of(BACKENDS), metavar="A,B", help="triton, cuda or both; default: those there are")
    add("--targets", type=some_of(DEVICES), default=list(DEVICES), metavar="A,B", help=f"some of {', '.join(DEVICES)}")
    add("--dtypes", type=some_of(DTYPES), default=["bf16", "fp32"], metavar="A,B", help="default: bf16,fp32; also fp16")
    add("--all", action="store_true", help="of Triton every candidate, width and activation, not only the first")
    add("--only", type=lambda text: tuple(text.split(",")), default="", metavar="A,B",
        help="calls whose names start with one of these: attention, mlp, norm, activation; default: all")  # fmt: skip
    add("--jobs", type=int, default=os.cpu_count(), help="processes; default: %(default)s")
    add("--json", type=Path, metavar="PATH", help="write the table to this file")
    add("--predict", action="store_true", help="instead: rates to expect of an H100, and what bounds them")
    add("--measured", type=Path, metavar="PATH", help="the file of a run to show beside them; default: an H100's")
    options = parser.parse_args()
    reasons = {name: missing(name) for name in options.backends or BACKENDS}
    for name, why in reasons.items():
        if why and options.backends:
            parser.error(f"{name}: {why}")
    if options.predict:
        from ..cases import goals
        from . import predict

        there = [name for name, why in reasons.items() if not why]
        return predict.show(there, options.only, options.measured or goals.newest())
    kernels = {name: results(name, options) for name, why in reasons.items() if not why}
    wrong = {name: sum(bool(row.wrong) for row in rows) for name, rows in kernels.items()}
    for name, rows in kernels.items():
        print(f"\n{name}\n{table(rows)}")
    print()
    for name, why in reasons.items():
        print(f"{name}: {why or f'{len(kernels[name])} kernels, {wrong[name]} wrong'}")
    if options.json:
        rows = [{"backend": name, **asdict(row)} for name in kernels for row in kernels[name]]
        with atomic(options.json) as temporary:
            temporary.write_text(json.dumps(rows, indent=1))
    return 1 if any(wrong.values()) or not all(kernels.values()) or not kernels else 0
