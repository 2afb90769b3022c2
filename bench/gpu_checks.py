"""What the first minutes on a GPU check, one check a process: ``python -m bench.gpu_checks NAME --out FILE``.

    versions    what is installed and loads, and what the GPU is
    verify      `pygpt verify` of one backend, every row kept as soon as it is known
    candidates  every shipped configuration of Triton's attention kernels, timed once
    streams     an op on a side stream; a training step of the GPT captured as a CUDA graph and replayed: same bits
    sanitize    our kernels, and no others, under NVIDIA's compute-sanitizer

Each ends with one line that says what it found. ``--device cpu`` rehearses: the emulator plays CUDA C++, the
interpreter (TRITON_INTERPRET=1) plays Triton, on tiny shapes. Exit codes as in steps.py.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import pygpt
from pygpt import verify
from pygpt.backend import TABLE
from pygpt.files import atomic
from pygpt.info import gather

from . import gpu_code, gpu_timer
from .gpu_rows import play_cuda_on_the_cpu
from .steps import REFUSED, ROOT

TINY = {"attention": {"B": 1, "H": 2, "L": 24, "E": 16, "Ev": 16}, "mlp": {"M": 16, "C": 16, "H": 32}}
TINY |= {"attention_lse": TINY["attention"], "linear": {"M": 16, "K": 16}, "gelu": {"M": 64}, "relu": {"M": 64}}
TINY |= {name: {"M": 4, "N": 32} for name in ("layer_norm", "add_layer_norm", "rms_norm")}


def write(path: Path, found):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1))


# ------------------------------------------------------------------------------- versions
def versions(options) -> int:
    found = gather() | {"platform": platform.platform(), "libc": " ".join(platform.libc_ver())}
    found |= {"cuda": torch.version.cuda, "variables": {k: v for k, v in os.environ.items() if k.startswith("PYGPT_")}}
    for name in ("numpy", "triton", "pytest", "xdist"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError as e:
            found[name] = f"missing: {e}"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"multiprocessors": properties.multi_processor_count, "l2_mb": properties.L2_cache_size / 1e6}
        found |= {"memory_gb": properties.total_memory / 1e9, "clocks": gpu_timer.clocks()}
        torch.ones(8, device="cuda").sum().item()  # the context comes up
    found["backends"] = {name: row.missing or "there" for name, row in TABLE.items()}
    write(options.out, found)
    wanted = ("triton", "cuda") if options.device == "cuda" else ("cpp", "triton")
    missing = [f"{name}: {TABLE[name].missing}" for name in wanted if TABLE[name].missing]
    what = (
        f"{found.get('gpu', 'no GPU')}, Python {found['python']}, torch {torch.__version__}, Triton {found['triton']}"
    )
    print("; ".join([what, *missing]))
    return 1 if missing else 0


# ------------------------------------------------------------------------------- verify
def verify_backend(options) -> int:
    row = TABLE[options.backend]
    if row.missing:
        print(f"{options.backend}: {row.missing}")
        return 1
    generator, began, rows, errors = torch.Generator().manual_seed(options.seed), time.monotonic(), [], []
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}  # the other backend's
    tiny = options.tiny
    if tiny:
        verify.ELEMENTS = 1  # a direction that passes is drawn once: an emulated call takes long
    for op, spec in verify.SPECS.items():
        for dims in ({**spec.shapes[0], **TINY[op]},) if tiny else spec.shapes:
            for dtype in row.dtypes:
                try:
                    rows += verify.measure(op, dims, dtype, generator, options.backend, device=options.device)
                except Exception as e:  # noqa: BLE001 - of any kind, and the next may still work
                    errors.append(f"{verify.describe(op, dims)} {dtype}: {type(e).__name__}: {str(e).splitlines()[0]}")
                    print(errors[-1], flush=True)
                wrong = [r for r in rows if not r.passed]
                plain = [asdict(r) | {"passed": r.passed} for r in rows]
                write(options.out, kept | {options.backend: {"seed": options.seed, "errors": errors, "rows": plain}})
    for r in wrong:
        print(f"WRONG: {r.op} {r.shape} {r.dtype} {r.direction}: error {r.ours:.2e}, PyTorch's {r.torch:.2e}")
    took = time.monotonic() - began
    print(f"{len(rows) - len(wrong)} of {len(rows)} results as exact as PyTorch's, {len(errors)} errors, {took:.0f} s")
    return 1 if wrong or errors or not rows else 0


# ------------------------------------------------------------------------------- candidates
SHAPES = {64: (16, 12, 1024), 128: (2, 16, 4096), 256: (2, 8, 2048)}  # head dimension: batch, heads, positions
PRODUCTS = {"fwd": 2, "dkdv": 4, "dq": 3}  # each of 2 B H T^2 D FLOP, half of it where causal


def candidates(options) -> int:
    if TABLE["triton"].missing:
        print(f"triton: {TABLE['triton'].missing}")
        return 1
    from pygpt.triton_kernels import attention, common

    rehearsal, found = options.device == "cpu", []
    timer = gpu_timer.CpuTimer() if rehearsal else gpu_timer.CudaTimer()
    tables = {"fwd": attention.FWD, "dkdv": attention.DKDV, "dq": attention.DQ}
    for bucket, itemsize in sorted({key[1:] for key in attention.FWD}, key=lambda key: (key[1], key[0])):
        B, H, T = (1, 1, 20) if rehearsal else SHAPES[bucket]
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        q, k, v, dout = (torch.randn(B, H, T, bucket, device=options.device).to(dtype) for _ in range(4))
        about = {"head_dim": bucket, "dtype": str(dtype).removeprefix("torch."), "B": B, "H": H, "T": T}
        for kernel, call in attention_calls(q, k, v, dout).items():
            configs = tables[kernel][common.target(q), bucket, itemsize]
            for candidate in configs.candidates:
                configs.chosen[q.device] = candidate
                found.append({"kernel": kernel, **about, "config": list(candidate.blocks.values())})
                found[-1]["config"] += [candidate.num_warps, candidate.num_stages]
                found[-1] |= time_once(timer, call, PRODUCTS[kernel] * B * H * T * T * bucket)
                write(options.out, {"target": common.target(q), "triton": common.triton.__version__, "rows": found})
                print(", ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
            del configs.chosen[q.device]
    refused, better = sum("refused" in row for row in found), "; ".join(better_candidates(found)) or "none"
    print(f"{len(found)} candidates, {refused} refused; faster than the first one: {better}")
    return 0


def attention_calls(q, k, v, dout) -> dict[str, Callable]:
    """A call for each kernel; those of backward launch attention_delta_kernel as well."""
    kernels, scale = TABLE["triton"].kernels, q.shape[-1] ** -0.5
    out, lse = kernels.attention_fwd(q, k, v, True, scale)

    def backward(*needs):
        kernels.attention_bwd(dout, None, q, k, v, out, lse, True, scale, list(needs))

    return {
        "fwd": lambda: kernels.attention_fwd(q, k, v, True, scale),
        "dkdv": lambda: backward(False, True, True),
        "dq": lambda: backward(True, False, False),
    }


def time_once(timer, call: Callable, flops: float) -> dict:
    """The best of a few warm calls, or why there is none."""
    try:
        timer.time([(call, 0.0)])
        ms = min(each[0] for each in timer.time([(call, 1.0)] * timer.least_rounds))
        return {"ms": round(ms, 4), "tflops": round(flops / ms / 1e9, 1)}
    except Exception as e:  # noqa: BLE001 - what does not fit is refused in several ways
        return {"refused": f"{type(e).__name__}: {str(e).splitlines()[0]}"}


def better_candidates(rows: list[dict]) -> list[str]:
    """Where a later candidate is more than 3 % faster than the first that runs."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "ms" in row:
            groups.setdefault((row["kernel"], row["head_dim"], row["dtype"]), []).append(row)
    best = {key: min(group, key=lambda row: row["ms"]) for key, group in groups.items()}
    return [
        f"{kernel} D{head_dim} {dtype}: {best[kernel, head_dim, dtype]['config']} {group[0]['ms'] / ms:.2f}x"
        for (kernel, head_dim, dtype), group in groups.items()
        if group[0]["ms"] > 1.03 * (ms := best[kernel, head_dim, dtype]["ms"])
    ]


# ------------------------------------------------------------------------------- streams and graphs
def streams(options) -> int:
    if options.device == "cpu":
        print("no streams and no graphs without a GPU")
        return REFUSED
    found, wrong = {}, []
    for name in ("triton", "cuda"):
        if TABLE[name].missing:
            continue
        for check in (on_a_side_stream, in_a_cuda_graph):
            try:
                with pygpt.backend(name):
                    found[f"{name} {check.__name__}"] = check()
            except Exception as e:  # noqa: BLE001 - of any kind; the next check may still work
                found[f"{name} {check.__name__}"] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
            if found[f"{name} {check.__name__}"] != "same bits":
                wrong.append(f"{name} {check.__name__}: {found[f'{name} {check.__name__}']}")
            write(options.out, found)
    print("; ".join(wrong) or f"{len(found)} checks, the same bits in all")
    return 1 if wrong or not found else 0


def _step(model, tokens):
    """A closure that runs forward and backward and returns the loss and all gradients."""

    def step():
        for p in model.parameters():
            p.grad = None
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    return step


def _gpt():
    torch.manual_seed(0)
    config = pygpt.GPTConfig(vocab_size=256, block_size=128, n_layer=2, n_head=4, n_embd=256)
    model = pygpt.GPT(config).to("cuda", torch.bfloat16)
    return _step(model, torch.randint(256, (4, 129), device="cuda"))


def on_a_side_stream() -> str:
    """Forward and backward on another stream, behind a long wait there: work on the wrong stream would come too early."""
    step = _gpt()
    want = [t.clone() for t in step()]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = step()
    stream.synchronize()
    return "same bits" if all(map(torch.equal, got, want)) else "other bits"


def in_a_cuda_graph() -> str:
    """The whole step captured once and replayed twice."""
    step = _gpt()
    want = [t.clone() for t in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(2):
        for t in got:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        if not all(map(torch.equal, got, want)):
            return "other bits"
    return "same bits"


# ------------------------------------------------------------------------------- compute-sanitizer
CHECKS = ("memcheck", "racecheck")


def sanitize(options) -> int:
    """`verify` of the CUDA C++ kernels, small, under each check. A machine that refuses the tool is reported, not failed."""
    tool = gpu_code.tool("compute-sanitizer")
    if tool is None or options.device == "cpu":
        print("no compute-sanitizer here" if tool is None else "no GPU to watch")
        return REFUSED
    found, wrong = {}, []
    with_ours_only = ["--kernel-name", "kernel_substring=pygpt", "--report-api-errors", "no", "--error-exitcode", "9"]
    command = [sys.executable, "-m", "bench.gpu_checks", "verify", "--tiny", f"--out={options.out}.rows"]
    for check in CHECKS:
        began = time.monotonic()
        done = subprocess.run([tool, f"--tool={check}", *with_ours_only, *command], cwd=ROOT, check=False,
                              capture_output=True, text=True)  # fmt: skip
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
        refused = any(word in line for line in lines for word in ("not supported", "Unable to", "Internal Sanitizer"))
        verdict = "refused" if refused else "failed" if done.returncode else "ok"
        found[check] = {"verdict": verdict, "exit": done.returncode, "seconds": time.monotonic() - began}
        found[check]["lines"] = lines[:200]
        write(options.out, found)
        print("\n".join([*lines[:40], f"{check}: {verdict}"]), flush=True)
        wrong += [check] if verdict == "failed" else []
    Path(f"{options.out}.rows").unlink(missing_ok=True)
    print("; ".join(f"{check}: {each['verdict']}" for check, each in found.items()))
    refused = all(each["verdict"] == "refused" for each in found.values())
    return 1 if wrong else REFUSED if refused else 0


CHECK = {"versions": versions, "verify": verify_backend, "candidates": candidates, "streams": streams}
CHECK |= {"sanitize": sanitize}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_checks", description=__doc__.split("\n\n")[0])
    parser.add_argument("check", choices=CHECK)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what was found, as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda", help="for verify")
    parser.add_argument("--seed", type=int, default=0, help="for verify")
    parser.add_argument("--tiny", action="store_true", help="for verify: one small shape of each op, drawn once")
    options = parser.parse_args(argv)
    options.tiny |= options.device == "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here")
        return 1
    if options.device == "cpu" and options.backend == "cuda" and options.check == "verify":
        play_cuda_on_the_cpu()
    torch.set_float32_matmul_precision("highest")
    return CHECK[options.check](options)


if __name__ == "__main__":
    sys.exit(main())
