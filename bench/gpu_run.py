"""make gpu: builds in place, runs the GPU tests, then the GPU benchmarks, in eight minutes in all.

Offline, with what this interpreter has. While the tests run, other processes run each benchmark row
once, so that its kernels come from the compilers' caches when it is measured, and the CUDA C++ kernels
under compute-sanitizer. A step that fails or runs out of time does not keep the next from running. Exit
codes: 0; 1 where a step failed; 2 without a GPU.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from . import gpu_code

ROOT = Path(__file__).resolve().parents[1]
TOTAL, SPARE = 480, 20  # seconds; what ending everything may take
LIMITS = {"build": 150, "tests": 200, "benchmark": 270}
TESTS = ("tests/test_parity.py", "tests/test_kernels.py", "tests/test_cuda.py", "tests/test_triton.py")
FAMILIES = ("attention", "mlp", "linear,gelu,relu", "layer_norm,add_layer_norm,rms_norm")  # prepared side by side
PATIENCE = 15  # seconds between asking a step to stop and killing it
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def no_gpu() -> str | None:
    """Why there is nothing to run on."""
    if find_spec("torch") is None:
        return f"{sys.executable} has no torch"
    import torch

    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} in {sys.executable} sees no GPU"


class Steps:
    """Runs commands one after the other under one deadline; ``said`` collects a summary line of each."""

    def __init__(self, environment: dict[str, str], total: float = TOTAL):
        self.environment, self.end = environment, time.monotonic() + total
        self.said: list[str] = []
        self.failed = False

    def left(self) -> float:
        return self.end - SPARE - time.monotonic()

    def say(self, step: str, what: str, failed: bool = False):
        self.said.append(f"{step}: {what}")
        self.failed |= failed

    def run(self, step: str, command: list[str], seconds: float, first=signal.SIGINT) -> tuple[int, list[str], bool]:
        """-> exit code, the lines it printed, whether it ran out of time. Then it gets ``first``, and is killed later."""
        print(f"\n=== {step}: {' '.join(command)} (at most {seconds:.0f} s)", flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - a background job ignores it
        )  # fmt: skip
        late, timers = threading.Event(), []

        def after(seconds, action):
            timers.append(threading.Timer(seconds, action))
            timers[-1].daemon = True
            timers[-1].start()

        def stop():
            late.set()
            signal_group(process, first)
            after(PATIENCE, lambda: signal_group(process, signal.SIGKILL))  # counted from now: a machine may sleep

        after(seconds, stop)
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                print(line, end="", flush=True)
            return process.wait(), lines, late.is_set()
        finally:
            for timer in timers:
                timer.cancel()
            signal_group(process, signal.SIGKILL)


def signal_group(process: subprocess.Popen, number: int):
    """To a process and its children, if they still run. It leads a group of its own."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


# ------------------------------------------------------------------------------- the steps
def build(steps: Steps):
    if find_spec("setuptools") is None:
        return steps.say("build", "skipped, setuptools is missing; the C++ ops are missing too", failed=True)
    began = time.monotonic()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    code, _, late = steps.run("build", command, min(LIMITS["build"], steps.left()))
    how = "out of time" if late else "ok" if code == 0 else f"failed (exit code {code})"
    return steps.say("build", f"{how}, {time.monotonic() - began:.0f} s", failed=code != 0)


def present(steps: Steps, device: str) -> list[str]:
    """Our backends for the device, as a fresh process sees them after the build."""
    command = [sys.executable, "-m", "bench.gpu", "--list", "--device", device]
    found = subprocess.run(command, cwd=ROOT, env=steps.environment, capture_output=True, text=True, check=False)
    if found.returncode:
        steps.say("backends", f"cannot be listed: {found.stderr.strip() or found.stdout.strip()}", failed=True)
        return []
    names = [name for name in found.stdout.strip().split("\n")[-1].split(",") if name]
    if not names:
        steps.say("backends", f"none of ours serves {device} here; `pygpt info` says why", failed=True)
    return names


class Beside:
    """Processes that run beside the tests, and no longer: nothing may run beside the benchmarks."""

    def __init__(self, steps: Steps):
        self.steps, self.running = steps, []  # of (step, whether it must succeed, process, log)

    def start(self, step: str, command: list[str], must: bool):
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `stop`
        how = {"cwd": ROOT, "env": self.steps.environment, "start_new_session": True}
        self.running.append((step, must, subprocess.Popen(command, **how, stdout=log, stderr=log), log))

    def wait(self, seconds: float):
        end = time.monotonic() + seconds
        for step, must, process, log in self.running:
            try:
                code = process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.steps.say(step, "not done in time")
                continue
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no output"])[-1]
            self.steps.say(step, f"failed (exit code {code}): {last}" if code else "ok", failed=must and code != 0)

    def stop(self):
        for _, _, process, log in self.running:
            signal_group(process, signal.SIGKILL)
            process.wait()
            log.close()


def compile_ahead(beside: Beside, device: str, flags: list[str]):
    """Runs every benchmark row once, so that its kernels come from the compilers' caches."""
    command = [sys.executable, "-m", "bench.gpu", "--prepare", f"--budget={LIMITS['tests']}", f"--device={device}"]
    for ops in FAMILIES if device == "cuda" else FAMILIES[:1]:
        beside.start(f"compiled ahead: {ops}", [*command, *flags, f"--ops={ops}", "--peers=compile"], must=False)


def sanitize(steps: Steps, beside: Beside):
    """The CUDA C++ kernels on small shapes under compute-sanitizer; each wrapper of an instruction against the emulator."""
    sanitizer = gpu_code.tool("compute-sanitizer")
    if sanitizer is None:
        steps.say("compute-sanitizer", "skipped, not found")
    else:
        verify = [sys.executable, "-m", "pygpt", "verify", "--backend=cuda", "--device=cuda", "--json"]
        for check in ("memcheck", "racecheck"):
            beside.start(check, [sanitizer, f"--tool={check}", "--error-exitcode=9", *verify], must=True)
    beside.start("conformance", [sys.executable, "-m", "tests.emulator.conformance"], must=True)


def tests(steps: Steps, names: list[str], arguments: list[str]):
    if find_spec("pytest") is None:
        return steps.say("tests", "skipped, pytest is missing")
    files = [name for name in TESTS if (ROOT / name).exists()]
    for name in set(TESTS) - set(files):
        steps.say("tests", f"{name} does not exist")
    steps.environment["PYGPT_TEST_BACKENDS"] = ",".join(names)
    ours = ["-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=20", "-m", "not slow"]
    began = time.monotonic()
    several = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *ours, *(arguments or several), *files]
    code, lines, late = steps.run("tests", command, min(LIMITS["tests"], steps.left()))
    counts = outcome(lines)
    text = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no counts"
    text += f" in {time.monotonic() - began:.0f} s" + ("; out of time, the rest was skipped" if late else "")
    failed = any(counts.get(what) for what in ("failed", "error", "errors")) or (code != 0 and not late)
    return steps.say("tests", f"{text} ({', '.join(names)})", failed=failed)


def outcome(lines: list[str]) -> dict[str, int]:
    """{"passed": n, ...} of pytest's last line of counts."""
    for line in reversed(lines):
        if found := COUNTS.findall(line):
            return {what: int(number) for number, what in found}
    return {}


def benchmark(steps: Steps, flags: list[str]):
    seconds = min(LIMITS["benchmark"], steps.left() - PATIENCE)
    if seconds < 10:
        return steps.say("benchmark", "skipped, no time left", failed=True)
    command = [sys.executable, "-m", "bench.gpu", f"--budget={seconds:.0f}", *flags]
    code, lines, late = steps.run("benchmark", command, seconds + PATIENCE, first=signal.SIGTERM)
    rows = next((line for line in reversed(lines) if " rows in " in line), f"no result (exit code {code})")
    return steps.say("benchmark", rows + ("; stopped, out of time" if late else ""), failed=code != 0)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_run", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, tiny and quick")
    parser.add_argument(
        "--test-args", default="", metavar="ARGS", help="for pytest (default: -n 8 where pytest-xdist is)"
    )
    parser.add_argument("--bench-args", default="", metavar="ARGS", help="for python -m bench.gpu")
    options = parser.parse_args(argv)
    if options.device == "cuda" and (why := no_gpu()):
        print(f"make gpu: no GPU: {why}")
        return 2
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    flags, arguments = options.bench_args.split(), options.test_args.split()
    if options.device == "cuda":
        environment.pop("TRITON_INTERPRET", None)  # it would move the Triton kernels to the CPU
        flags = ["--save", *flags]
    else:
        flags = ["--device=cpu", "--quick", "--seconds=0.02", *flags]
        arguments += ["-k", "test_shapes and relu"]
    steps = Steps(environment)
    build(steps)
    if names := present(steps, options.device):
        beside, start = Beside(steps), time.monotonic()
        try:
            compile_ahead(beside, options.device, [flag for flag in flags if flag != "--save"])
            if "cuda" in names:
                sanitize(steps, beside)
            tests(steps, names, arguments)
            room = LIMITS["tests"] + start - time.monotonic()
            beside.wait(min(room, steps.left() - LIMITS["benchmark"] - PATIENCE))
        finally:
            beside.stop()
        benchmark(steps, flags)
    print(f"\nmake gpu: {'FAILED' if steps.failed else 'ok'} in {time.monotonic() - began:.0f} s")
    for line in steps.said:
        print(f"  {line}")
    return 1 if steps.failed else 0


if __name__ == "__main__":
    sys.exit(main())
