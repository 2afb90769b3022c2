"""Compiles Triton kernels before they are needed: ``python -m bench.first_light.compile_ahead --out FILE``.

The launchers run on meta tensors, which have sizes and strides but no data; what they would launch is compiled
instead, in one process a core: every call of `pygpt verify`, every row of the quick benchmark, and every candidate of
attention. With a GPU the kernels are compiled for it by Triton's own path, so that the launches find them in its cache.
Without one ``--target`` is compiled for all the same, as a rehearsal. Exit codes: 0; 1 if a kernel does not compile.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled; read when Triton is imported

import torch
import triton
from pygpt.triton_kernels import attention, common

import pygpt
from pygpt import triton_kernels, verify
from pygpt.dispatch import TABLE
from pygpt.files import atomic

from ..cases import ops, shapes
from ..cases.refusal import reason
from ..cli import positive, some_of
from ..compiled.result import DEVICES
from ..compiled.triton_jobs import Job, NoGpu, launched
from ..timing.calls import once
from ..timing.candidates import on_backend
from . import attention_calls, steps

META = replace(TABLE["triton"], kernels=triton_kernels, missing="", devices=("meta",))  # for meta tensors


# ------------------------------------------------------------------------------- what is launched
def jobs(target: str, wanted: list[str]) -> Iterator[Job]:
    """Yields each job once. From now on this process launches no Triton kernel."""
    TABLE["triton"], seen = META, set()
    for name in wanted:
        for call, every_candidate in CALLS[name]():
            for job in launched(call, target, every_candidate):
                if job.key not in seen:
                    seen.add(job.key)
                    yield job


def of_candidates() -> Iterator:
    """Attention's launches for every bucket of head dimensions, each with all of its candidates."""
    for bucket, itemsize in sorted({key[1:] for key in attention.FWD}, reverse=True):
        B, H, T = attention_calls.SHAPES[bucket]
        q = torch.empty(B, H, T, bucket, dtype=torch.float32 if itemsize == 4 else torch.bfloat16, device="meta")
        yield lambda q=q: [call() for call in attention_calls.calls(triton_kernels, q, q, q, q).values()], True


def of_benchmark() -> Iterator:
    quick = [*shapes.first_of_each_op(ops.GPU), *ops.PREDICTED]
    for case in dict.fromkeys(quick):
        work = case.setup(lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta"), *case.args)
        yield once(on_backend("triton", work.ours), work.tensors, "backward"), False


def of_verify() -> Iterator:
    generator = torch.Generator().manual_seed(0)
    for op, spec in verify.SPECS.items():
        for dims in spec.shapes if verify.announces("triton", op) else ():
            for dtype in META.dtypes:
                drawn = verify.draw(op, dims, dtype, generator)
                args, grads = ([t.to("meta") if isinstance(t, torch.Tensor) else t for t in some] for some in drawn)

                def call(op=op, spec=spec, args=args, grads=grads):
                    with pygpt.backend("triton"):
                        verify.directions(op, spec.call, args, grads)

                yield call, False


CALLS = {"benchmark": of_benchmark, "candidates": of_candidates, "verify": of_verify}  # in the order of need


# ------------------------------------------------------------------------------- compiling
def _start_worker(target: str):
    steps.die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the whole group receives it; the parent decides
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(NoGpu(target))


def compile_one(job: Job) -> tuple[str, float, str]:
    """-> its name, the seconds it took, the error. With a GPU the kernel is loaded and its launcher built."""
    began, wrong = time.monotonic(), ""
    try:
        compiled = job.compile()
        if torch.cuda.is_available():
            compiled._init_handles()
    except triton.runtime.errors.OutOfResources:
        pass  # the next candidate takes its place
    except Exception as e:  # noqa: BLE001 - of many kinds
        wrong = f"{type(e).__name__}: {reason(e)}"
    return f"{job.kernel} {','.join(map(str, job.config.blocks.values()))}", time.monotonic() - began, wrong


def main(argv=None) -> int:
    what = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.first_light.compile_ahead", description=what)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="what was compiled, as JSON")
    add("--what", type=some_of(CALLS), default=list(CALLS), metavar="A,B", help=f"some of {', '.join(CALLS)}")
    add("--target", choices=DEVICES, default="sm90", help="without a GPU: what to compile for (default: %(default)s)")
    add("--jobs", type=positive(int), default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(argv)
    began, done, futures = time.monotonic(), [], []
    target = common.target(torch.empty(0, device="cuda")) if torch.cuda.is_available() else options.target
    signal.signal(signal.SIGTERM, steps.stop)
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")  # CUDA rules out a fork
    pool = ProcessPoolExecutor(options.jobs, context, _start_worker, (target,))
    why = ""
    try:
        for job in jobs(target, options.what):
            futures.append(pool.submit(compile_one, job))
        for future in as_completed(futures):
            done.append(future.result())
            if done[-1][2]:
                print(f"does not compile: {done[-1][0]}: {done[-1][2]}", flush=True)
    except steps.TimeUp:
        why = ", out of time"
        pool.shutdown(wait=False, cancel_futures=True)
        done = [f.result() for f in futures if f.done() and not f.cancelled() and f.exception() is None]
    wrong = [f"{name}: {error}" for name, _, error in done if error]
    took = time.monotonic() - began
    slowest = [each[:2] for each in sorted(done, key=lambda each: -each[1])[:10]]
    results = {"target": target, "kernels": len(futures), "compiled": len(done) - len(wrong), "seconds": took}
    with atomic(options.out) as temporary:
        temporary.write_text(json.dumps(results | {"wrong": wrong, "slowest": slowest}, indent=1))
    print(f"{results['compiled']} of {len(futures)} Triton kernels compiled in {took:.0f} s, {len(wrong)} fail{why}")
    code = 1 if wrong or not futures else 0
    if why:
        sys.stdout.flush()
        os._exit(code)  # the workers, which may still compile, die with this process
    return code


if __name__ == "__main__":
    sys.exit(main())
