"""What the first minutes on a GPU check, one check a process: ``python -m bench.first_light.checks NAME --out FILE``.

    versions    what is installed and loads, and what the GPU is
    verify      `pygpt verify` of one backend, every row kept as soon as it is known
    candidates  every shipped configuration of Triton's attention kernels, timed once
    streams     an op on a side stream; a training step of the GPT captured as a CUDA graph and replayed: same bits
    sanitize    our kernels, and no others, under NVIDIA's compute-sanitizer

Each ends with one line that states its result. ``--device cpu`` rehearses: the emulator plays CUDA C++, the
interpreter (TRITON_INTERPRET=1) plays Triton, on tiny shapes. Exit codes as in steps.py.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import pygpt
from pygpt import verify
from pygpt.dispatch import TABLE
from pygpt.files import atomic
from pygpt.info import gather

from ..cases.refusal import reason
from ..cli import play_cuda_on_the_cpu
from ..compiled.sass import tool
from ..timing.clocks import Block, CpuClock, CudaClock
from ..timing.nvidia import clocks, gpu
from . import attention_calls
from .steps import NO_GPU, REFUSED, ROOT, python

TINY = {"attention": {"B": 1, "H": 2, "L": 24, "E": 16, "Ev": 16}, "mlp": {"M": 16, "C": 16, "H": 32}}
TINY |= {op: TINY["attention"] for op, spec in verify.SPECS.items() if spec.op == "attention"}
TINY |= {"qkv_attention": {"B": 1, "H": 2, "L": 24, "E": 16}}
TINY |= {"varlen_attn": {"N": 2, "H": 1, "L": 16, "E": 16, "Ev": 16}}
TINY |= {"cross_entropy": {"N": 8, "V": 40}, "linear_cross_entropy": {"N": 16, "K": 16, "V": 40}}
TINY |= {"linear": {"M": 16, "K": 16}, "gelu": {"M": 64}, "relu": {"M": 64}}
TINY |= {"rope": {"B": 1, "H": 1, "T": 8, "D": 16}}
TINY |= {name: {"M": 4, "N": 32} for name in verify.SPECS if name.endswith("norm")}


def write(path: Path, results):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1))


def read(path: Path) -> dict:
    """What `write` has written; empty if the file is missing or broken."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def kind_and_reason(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}"


# ------------------------------------------------------------------------------- versions
def versions(options) -> int:
    facts = gather() | {"platform": platform.platform(), "libc": " ".join(platform.libc_ver())}
    facts |= {"cuda": torch.version.cuda, "variables": {k: v for k, v in os.environ.items() if k.startswith("PYGPT_")}}
    for name in ("numpy", "triton", "pytest", "xdist"):
        try:
            facts[name] = importlib.import_module(name).__version__
        except ImportError as e:
            facts[name] = f"missing: {e}"
    if torch.cuda.is_available():
        facts |= gpu() | {"clocks": clocks()}
        torch.ones(8, device="cuda").sum().item()  # creates the context
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    backends = {name: row.missing or row.device_objection(device) for name, row in TABLE.items()}
    # Triton compiles its launchers with a C compiler, and pytest finds the tests' emulator as a module
    compilers = {name: shutil.which(name) for name in ("cc", "gcc", "clang", "nvcc")}
    headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    write(options.out, facts | {"backends": backends, "compilers": compilers, "python_headers": headers})
    wanted = ("triton", "cuda") if options.device == "cuda" else ("cpp", "triton")
    missing = [f"{name}: {backends[name]}" for name in wanted if backends[name]]
    missing += [] if headers and any(compilers.values()) else ["Triton needs a C compiler and Python.h to launch"]
    machine = f"{facts.get('gpu', 'no GPU')}, Python {facts['python']}"
    print("; ".join([f"{machine}, torch {torch.__version__}, Triton {facts['triton']}", *missing]))
    return 1 if missing else 0


# ------------------------------------------------------------------------------- verify
def verify_backend(options) -> int:
    row = TABLE[options.backend]
    if row.missing:
        print(f"{options.backend}: {row.missing}")
        return 1
    generator, began, rows, errors = torch.Generator().manual_seed(options.seed), time.monotonic(), [], []
    kept = read(options.out)  # the other backend's
    if options.tiny:
        verify.ELEMENTS = 1  # an emulated call takes long, so that a direction which passes is drawn once
    for op, spec in verify.SPECS.items():
        if not verify.announces(options.backend, op):
            continue
        for dims in ({**spec.shapes[0], **TINY[op]},) if options.tiny else spec.shapes:
            for dtype in row.dtypes:
                try:
                    rows += verify.measure(op, dims, dtype, generator, options.backend, device=options.device)
                except Exception as e:  # noqa: BLE001 - of any kind, and the next may still work
                    errors.append(f"{verify.describe(op, dims)} {dtype}: {kind_and_reason(e)}")
                    print(errors[-1], flush=True)
                    if why := unusable():
                        print(why)
                        return 1
                wrong = [r for r in rows if not r.passed]
                plain = [asdict(r) | {"passed": r.passed} for r in rows]
                write(options.out, kept | {options.backend: {"seed": options.seed, "errors": errors, "rows": plain}})
    for r in wrong:
        print(f"WRONG: {r.op} {r.shape} {r.dtype} {r.direction}: error {r.ours:.2e}, PyTorch's {r.torch:.2e}")
    took = time.monotonic() - began
    print(f"{len(rows) - len(wrong)} of {len(rows)} results as exact as PyTorch's, {len(errors)} errors, {took:.0f} s")
    return 1 if wrong or errors or not rows else 0


# ------------------------------------------------------------------------------- candidates
PRODUCTS = {"fwd": 2, "dkdv": 4, "dq": 3}  # each of 2 B H T^2 D FLOP, half of it where causal (D 256: dkdv has 5)


def candidates(options) -> int:
    if TABLE["triton"].missing:
        print(f"triton: {TABLE['triton'].missing}")
        return 1
    from pygpt.triton_kernels import attention, common

    rehearsal, rows = options.device == "cpu", []
    clock = CpuClock() if rehearsal else CudaClock()
    tables = {"fwd": attention.FWD, "dkdv": attention.DKDV, "dq": attention.DQ}
    for bucket, itemsize in sorted({key[1:] for key in attention.FWD}, key=lambda key: (key[1], key[0])):
        B, H, T = (1, 1, 20) if rehearsal else attention_calls.SHAPES[bucket]
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        q, k, v, dout = (torch.randn(B, H, T, bucket, device=options.device).to(dtype) for _ in range(4))
        about = {"head_dim": bucket, "dtype": str(dtype).removeprefix("torch."), "B": B, "H": H, "T": T}
        for kernel, call in attention_calls.calls(TABLE["triton"].kernels, q, k, v, dout).items():
            configs = tables[kernel][common.target(q), bucket, itemsize]
            for candidate in configs.candidates:
                configs.chosen[q.device] = candidate
                config = [*candidate.blocks.values(), candidate.num_warps, candidate.num_stages]
                products = PRODUCTS[kernel] + (kernel == "dkdv" and bucket == attention.WIDE)
                result = time_once(clock, call, products * B * H * T * T * bucket)
                rows.append({"kernel": kernel, **about, "config": config, **result})
                write(options.out, {"target": common.target(q), "triton": common.triton.__version__, "rows": rows})
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
                if why := unusable():
                    print(why)
                    return 1
            del configs.chosen[q.device]
    refused, failed = (sum(word in row for row in rows) for word in ("refused", "failed"))
    better = "; ".join(better_candidates(rows)) or "none"
    print(f"{len(rows)} candidates, {refused} refused, {failed} failed; faster than the first one: {better}")
    return 1 if failed else 0


def unusable() -> str:
    """Says why the GPU can't be used any more in this process; empty if it can."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return ""
    except RuntimeError as e:
        return f"the device is unusable after an error: {reason(e)}"


def time_once(clock, call: Callable, flops: float) -> dict:
    """The best of a few warm calls, or the reason why it cannot be timed."""
    try:
        clock.time([Block(call)])
        repeats = 5 if clock.device == "cuda" else 2
        ms = 1e3 * min(device for device, _ in clock.time([Block(call, head_start=1e-3)] * repeats))
        return {"ms": round(ms, 4), "tflops": round(flops / ms / 1e9, 1)}
    except Exception as e:  # noqa: BLE001 - it becomes the row's result
        return {"refused" if "OutOfResources" in type(e).__name__ else "failed": kind_and_reason(e)}


def better_candidates(rows: list[dict]) -> list[str]:
    """Names where a later candidate is more than 3 % faster than the first that runs."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "ms" in row:
            groups.setdefault((row["kernel"], row["head_dim"], row["dtype"]), []).append(row)
    better = []
    for (kernel, head_dim, dtype), (first, *others) in groups.items():
        best = min([first, *others], key=lambda row: row["ms"])
        if first["ms"] > 1.03 * best["ms"]:
            better.append(f"{kernel} D{head_dim} {dtype}: {best['config']} {first['ms'] / best['ms']:.2f}x")
    return better


# ------------------------------------------------------------------------------- streams and graphs
def streams(options) -> int:
    if options.device == "cpu":
        answer = compared(*(_gpt_step("cpu")() for _ in range(2)))
        print(f"no streams and no graphs without a GPU; the step itself: {answer}")
        return REFUSED if answer == SAME else 1
    results = {}
    for name in ("triton", "cuda"):
        for check in () if TABLE[name].missing else (on_a_side_stream, in_a_cuda_graph):
            try:
                with pygpt.backend(name):
                    answer = check()
            except Exception as e:  # noqa: BLE001 - of any kind; the next check may still work
                answer = kind_and_reason(e)
            results[f"{name} {check.__name__}"] = answer
            write(options.out, results)
    wrong = [f"{name}: {answer}" for name, answer in results.items() if answer != SAME]
    print("; ".join(wrong) or f"{len(results)} checks, the same bits in all")
    return 1 if wrong or not results else 0


SAME = "same bits"


def compared(tensors: list, expected: list) -> str:
    return SAME if all(map(torch.equal, tensors, expected)) else "other bits"


def _gpt_step(device: str = "cuda") -> Callable:
    """A closure that runs forward and backward of a GPT and returns the loss and all gradients."""
    torch.manual_seed(0)
    config = pygpt.GPTConfig(vocab_size=256, block_size=128, n_layer=2, n_head=4, n_embd=256)
    model = pygpt.GPT(config).to(device, torch.bfloat16)
    tokens = torch.randint(256, (4, 129), device=device)

    def step():
        for p in model.parameters():
            p.grad = None
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    return step


def on_a_side_stream() -> str:
    """Forward and backward on another stream, after a long wait: work on the wrong stream would come too early."""
    step = _gpt_step()
    expected = [t.clone() for t in step()]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        results = step()
    stream.synchronize()
    return compared(results, expected)


def in_a_cuda_graph() -> str:
    """The whole step captured once and replayed twice."""
    step = _gpt_step()
    expected = [t.clone() for t in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(2):
        for t in results:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        if (answer := compared(results, expected)) != SAME:
            break
    return answer


# ------------------------------------------------------------------------------- compute-sanitizer
SANITIZED = (("memcheck", "cuda"), ("racecheck", "cuda"), ("memcheck", "triton"))
SANITIZER_SECONDS = 50


def sanitize(options) -> int:
    """Small runs of `verify` under each check. Where the machine refuses the tool, that is reported and no failure."""
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None or options.device == "cpu":
        print("no compute-sanitizer here" if sanitizer is None else "no GPU to watch")
        return REFUSED
    results = {}
    for check, backend in SANITIZED:
        began = time.monotonic()
        code, lines = _sanitized(sanitizer, check, backend)
        lines = [line for line in lines if line.startswith("=========")] or lines[-20:]
        name, verdict = f"{check} {backend}", sanitizer_verdict(code, lines)
        results[name] = {"verdict": verdict, "exit": code, "seconds": time.monotonic() - began, "lines": lines[:200]}
        write(options.out, results)
        print("\n".join([*lines[:40], f"{name}: {verdict}"]), flush=True)
    print("; ".join(f"{name}: {each['verdict']}" for name, each in results.items()))
    verdicts = {each["verdict"] for each in results.values()}
    return 1 if "failed" in verdicts else 0 if "ok" in verdicts else REFUSED


SANITIZER_FOUND = 9  # its exit code for an error in a kernel


def _sanitized(sanitizer: str, check: str, backend: str) -> tuple[int | None, list[str]]:
    """Returns one run's exit code, None where time ran out, and what it printed."""
    command = [sanitizer, f"--tool={check}", "--report-api-errors=no", f"--error-exitcode={SANITIZER_FOUND}"]
    for name in our_kernels(backend):
        command += ["--kernel-name", f"kernel_substring={name}"]
    with tempfile.TemporaryDirectory() as folder:
        command += python("bench.first_light.checks", "verify", "--tiny", f"--backend={backend}", "--out")
        command.append(f"{folder}/rows.json")
        try:
            done = subprocess.run(command, cwd=ROOT, check=False, timeout=SANITIZER_SECONDS,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as e:
            code, output = None, e.stdout or b""
    return code, output.decode(errors="replace").splitlines()


def our_kernels(backend: str) -> list[str]:
    """Parts of the names of a backend's kernels, and of no others."""
    if backend == "cuda":
        return ["pygpt"]  # the namespace, in every mangled name
    from pygpt.triton_kernels import activation, attention, mlp, norm, rope

    modules = (activation, attention, mlp, norm, rope)
    return sorted({name for module in modules for name in vars(module) if name.endswith("_kernel")})


def sanitizer_verdict(code: int | None, lines: list[str]) -> str:
    """ok, failed, refused (the tool does not work here) or out of time."""
    if code is None:
        return "out of time"
    if code == SANITIZER_FOUND or any(re.search(r"ERROR SUMMARY: [1-9]|[1-9]\d* error", line) for line in lines):
        return "failed"
    if any(word in line for line in lines for word in ("not supported", "Unable to", "Internal Sanitizer")):
        return "refused"
    return "failed" if code else "ok"


CHECK = {"versions": versions, "verify": verify_backend, "candidates": candidates, "streams": streams}
CHECK |= {"sanitize": sanitize}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_light.checks", description=__doc__.split("\n\n")[0])
    parser.add_argument("check", choices=CHECK)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the results, as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda", help="for verify")
    parser.add_argument("--seed", type=int, default=0, help="for verify")
    parser.add_argument("--tiny", action="store_true", help="for verify: one small shape of each op, drawn once")
    options = parser.parse_args(argv)
    options.tiny |= options.device == "cpu"
    if not options.out.parent.is_dir():
        parser.error(f"--out: {options.out.parent} is no folder")
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} in {sys.executable} sees none (--device cpu is a rehearsal)")
        return NO_GPU
    if options.device == "cpu" and options.backend == "cuda" and options.check == "verify":
        play_cuda_on_the_cpu()
    torch.set_float32_matmul_precision("highest")
    return CHECK[options.check](options)


if __name__ == "__main__":
    sys.exit(main())
