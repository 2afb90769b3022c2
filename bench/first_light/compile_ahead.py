"""Compiles Triton kernels into Triton's cache before they are needed: ``python -m bench.first_light.compile_ahead --out FILE``.

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
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled; read when Triton is imported

import torch
import triton
from pygpt.triton_kernels import attention, common

import pygpt
from pygpt import triton_kernels, verify
from pygpt.dispatch import TABLE
from pygpt.files import atomic

from ..cases import gpu as gpu_rows
from ..compiled.sass import DEVICES
from ..timing.clocks import once
from . import steps

META = replace(TABLE["triton"], kernels=triton_kernels, missing="", devices=("meta",))


@dataclass(frozen=True)
class Job:
    """One kernel with one configuration, for arguments like these."""

    kernel: str
    module: str
    arguments: tuple
    constants: tuple
    config: common.Config

    @property
    def key(self) -> tuple:
        """Equal for two jobs that Triton compiles to the same code: kinds of arguments count, values do not."""
        return self.kernel, tuple(map(_kind, self.arguments)), self.constants, repr(self.config)


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


# ------------------------------------------------------------------------------- what is launched
def jobs(target: str, wanted: list[str]) -> Iterator[Job]:
    """Without repetitions."""
    seen = set()
    for name in wanted:
        for call, every_candidate in CALLS[name]():
            launches = []
            with common.compiling_for(target, lambda *launch, launches=launches: launches.append(launch)):
                call()
            for kernel, _, arguments, constants, configs in launches:
                for config in configs.candidates[: None if every_candidate else 1]:
                    constant = tuple(constants.items())
                    job = Job(kernel.__name__, kernel.fn.__module__, tuple(map(_detached, arguments)), constant, config)
                    if job.key not in seen:
                        seen.add(job.key)
                        yield job


def of_candidates() -> Iterator:
    """Attention's launches for every bucket of head dimensions, each with all of its candidates."""
    for bucket, itemsize in sorted({key[1:] for key in attention.FWD}, reverse=True):
        B, H, T = gpu_rows.ATTENTION[bucket]
        q = torch.empty(B, H, T, bucket, dtype=torch.float32 if itemsize == 4 else torch.bfloat16, device="meta")
        yield lambda q=q: [call() for call in gpu_rows.attention_calls(triton_kernels, q, q, q, q).values()], True


def of_benchmark() -> Iterator:
    for group in gpu_rows.plan(quick=True):
        dtype = getattr(torch, group.dtype)
        work = group.case.setup(lambda *shape, t=dtype: torch.empty(shape, dtype=t, device="meta"), *group.case.args)
        yield _on_meta(once(gpu_rows.ours("triton", work), work.tensors, "backward")), False


def of_verify() -> Iterator:
    generator = torch.Generator().manual_seed(0)
    for op, spec in verify.SPECS.items():
        for dims in spec.shapes:
            for dtype in META.dtypes:
                drawn = verify.draw(op, dims, dtype, generator)
                args, grads = ([t.to("meta") if isinstance(t, torch.Tensor) else t for t in some] for some in drawn)

                def call(op=op, spec=spec, args=args, grads=grads):
                    with pygpt.backend("triton"):
                        verify.directions(op, spec.call, args, grads)

                yield _on_meta(call), False


def _on_meta(call):
    """``call`` with the Triton kernels serving meta tensors."""

    def run():
        previous, TABLE["triton"] = TABLE["triton"], META
        try:
            call()
        finally:
            TABLE["triton"] = previous

    return run


CALLS = {"benchmark": of_benchmark, "candidates": of_candidates, "verify": of_verify}  # what is needed first is first


# ------------------------------------------------------------------------------- compiling
class NoGpu:
    """Stands for Triton's driver on a machine without a GPU: names a target, launches nothing."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        device = DEVICES[target]
        self.target = GPUTarget("cuda" if isinstance(device.arch, int) else "hip", device.arch, device.warp)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _start_worker(target: str):
    steps.die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the whole group gets it; the parent decides
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(NoGpu(target))


def compile_one(job: Job) -> tuple[str, float, str]:
    """-> its name, the seconds it took, what went wrong. With a GPU the kernel is loaded and its launcher built."""
    began = time.monotonic()
    blocks = job.config.blocks
    arguments = [a.descriptor(blocks) if isinstance(a, common.Tiled) else a for a in job.arguments]
    kernel = getattr(sys.modules[job.module], job.kernel)
    options = {"num_warps": job.config.num_warps, "num_stages": job.config.num_stages}
    wrong = ""
    try:
        compiled = kernel.warmup(*arguments, grid=(1,), **dict(job.constants), **blocks, **options)
        if torch.cuda.is_available():
            compiled._init_handles()
    except triton.runtime.errors.OutOfResources:
        pass  # the next candidate takes its place
    except Exception as e:  # noqa: BLE001 - of many kinds
        wrong = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
    return f"{job.kernel} {','.join(map(str, blocks.values()))}", time.monotonic() - began, wrong


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_light.compile_ahead", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="what was compiled, as JSON")
    add("--what", default=",".join(CALLS), metavar="A,B", help=f"some of {', '.join(CALLS)} (default: all)")
    add("--target", default="sm90", help="without a GPU: what to compile for (default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(argv)
    if options.jobs < 1 or options.target not in DEVICES:
        parser.error(f"--jobs takes 1 or more; --target one of {', '.join(DEVICES)}")
    if unknown := set(options.what.split(",")) - set(CALLS):
        parser.error(f"--what: unknown {', '.join(sorted(unknown))}; known: {', '.join(CALLS)}")
    began, done, futures = time.monotonic(), [], []
    target = common.target(torch.empty(0, device="cuda")) if torch.cuda.is_available() else options.target
    signal.signal(signal.SIGTERM, steps.stop)
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    pool = ProcessPoolExecutor(options.jobs, context, _start_worker, (target,))
    why = ""
    try:
        for job in jobs(target, options.what.split(",")):
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
    found = {
        "target": target,
        "kernels": len(futures),
        "compiled": len(done) - len(wrong),
        "seconds": took,
        "wrong": wrong,
    }
    with atomic(options.out) as temporary:
        slowest = sorted(done, key=lambda each: -each[1])[:10]
        temporary.write_text(json.dumps(found | {"slowest": [list(each[:2]) for each in slowest]}, indent=1))
    print(f"{found['compiled']} of {len(futures)} Triton kernels compiled in {took:.0f} s, {len(wrong)} fail{why}")
    code = 1 if wrong or not futures else 0
    if why:
        sys.stdout.flush()
        os._exit(code)  # the workers, which may still compile, die with this process
    return code


if __name__ == "__main__":
    sys.exit(main())
