"""The first minutes on a GPU: ``python3 -m bench.first_light --out FOLDER``.

GPU time is scarce: nothing is built, nothing is downloaded, and every step has a time limit of its own, so that the
whole ends in time whatever one of them does. The libraries are built elsewhere: pygpt/_C.abi3.so, pygpt/_cuda.abi3.so
and, for conformance, the one that ``python -m tests.emulator.conformance --build FILE`` makes.

    versions      what is installed and loads, and what the GPU is
    conformance   the device's answers for every wrapper of an inline PTX instruction, as a golden file
    compile       every Triton kernel that the steps below launch, one process a core
    verify        each backend's results against float64, beside PyTorch's own error
    benchmark     bfloat16, beside PyTorch eager and each of its attention backends
    expected      what the benchmark measured beside estimates, goals and the best rates seen elsewhere
    candidates    every configuration shipped for Triton's attention kernels, timed once

``--rest`` goes on from there: the GPU tests, the same with PYGPT_POISON=1, compute-sanitizer, a side stream and a CUDA
graph, and the full benchmark table with torch.compile. ``make gpu`` builds what is missing, then does both.

Every result goes to FOLDER at once: one small file a step, log.txt, and summary.json (log-rest.txt and
summary-rest.json of the second run). A run that is already there is not overwritten. ``--device cpu`` is a rehearsal
on tiny shapes: the emulator and Triton's interpreter play the GPU. Exit codes: 0; 1 where a step failed; 2 without a
GPU.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from .steps import NO_GPU, ROOT, Runner, Step, python

FIRST_SECONDS, REST_SECONDS, BUILD_SECONDS = 300, 480, 420
REHEARSAL_SLOWNESS = 4  # factor of every limit, because the CPU that plays the GPU may be busy
LIBRARIES = ("pygpt/_C.abi3.so", "pygpt/_cuda.abi3.so")
CONFORMANCE = ROOT / "build" / "conformance-sm_90a.so"
EMULATED = ROOT / "build" / "emulator" / "sm_90" / "plain-conformance-hopper_gemm.so"  # the same cases, in a rehearsal
BUILD_EMULATOR = "from tests.emulator import build, conformance as c; build.load(), build.load_tests(*c.SOURCES)"
TESTS = (
    "tests/ops/test_parity.py",
    *(f"tests/kernels/test_{name}.py" for name in ("kernels", "cuda", "triton", "triton_interpreter")),
)
BENCHMARK = ("--quick", "--peers=eager,sdpa-flash,sdpa-cudnn,sdpa-efficient", "--directions=forward,backward")


# ------------------------------------------------------------------------------- the steps
Group = Sequence[Sequence[Step]]  # lanes that run side by side; the steps of a lane run one after the other


class Plan:
    """The steps as groups in order. Nothing runs beside what is timed."""

    def __init__(self, options):
        self.options, self.out, self.rehearsal = options, options.out, options.device == "cpu"
        self.device = ("--device", options.device)
        self.interpreted = (("TRITON_INTERPRET", "1"),) if self.rehearsal else ()

    def first(self) -> list[Group]:
        library, answers = EMULATED if self.rehearsal else self.options.conformance, self.out / "conformance.json"
        conformance = python("tests.emulator.conformance", "--library", library, "--out", answers, "--limit", 45)
        less = ("--what=benchmark", "--jobs=1") if self.rehearsal else ()
        compilation = python("bench.first_light.compile_ahead", "--out", self.out / "compile.json", *less)
        rows, benchmark = self.out / "benchmark.json", BENCHMARK
        if self.rehearsal:
            benchmark = ("--quick", "--peers=eager", "--seconds=0.01", "--backends=triton,cuda")
        return [
            *([[[Step("emulator", 100, (sys.executable, "-c", BUILD_EMULATOR))]]] if self.rehearsal else []),
            [[self.check("versions", 15, self.interpreted)]],
            [
                [Step("compile", 60, compilation, result="compiled in")],
                [
                    Step("conformance", 50, conformance, result=" cases answered"),
                    self.check("verify", 45, (), "--backend", "cuda"),
                ],
            ],
            [[self.check("verify", 30, self.interpreted, "--backend", "triton")]],
            [[self.table("benchmark", 85, *benchmark, "--budget=65", "--json", rows)]],
            [[Step("expected", 10, python("bench.cases.goals", rows))]],
            [[self.check("candidates", 40, self.interpreted)]],
        ]

    def rest(self) -> list[Group]:
        rows = ("--directions=forward,backward", "--peers=default,compile")
        if self.rehearsal:
            rows = ("--quick", "--seconds=0.01", "--ops=relu", "--backends=triton", "--peers=eager")
        save = ("--json", self.out / "table.json", *(["--save"] if self.options.save else []))
        return [
            [
                [self.tests("tests"), self.tests("poisoned tests", ("PYGPT_POISON", "1"))],
                [self.check("streams", 80), self.check("sanitize", 155)],
                [self.table("compile peers", 200, *rows, "--prepare", optional=True, result="")],
            ],
            [[self.table("table", 220, *rows, "--budget=200", *save)]],
        ]

    def build(self) -> list[Group]:
        """Builds what is missing, or older than a source."""
        sources = [*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"]
        newest = max(path.stat().st_mtime for path in sources)
        built = {name: ROOT / name for name in LIBRARIES}
        old = [name for name, path in built.items() if not path.exists() or path.stat().st_mtime < newest]
        command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        steps = [Step(f"build {', '.join(old)}", BUILD_SECONDS, command)] if old else []
        if not self.rehearsal and not self.options.conformance.exists():
            command = python("tests.emulator.conformance", "--build", self.options.conformance)
            steps.append(Step("build conformance", 90, command))
        return [[steps]] if steps else []

    def check(self, name: str, seconds: float, environment=(), *arguments) -> Step:
        command = python("bench.first_light.checks", name, "--out", self.out / f"{name}.json", *self.device, *arguments)
        return Step(" ".join([name, *arguments[1:]]), seconds, command, environment)

    def table(self, name: str, seconds: float, *arguments, optional=False, result=" rows in ") -> Step:
        device = ("--rehearse",) if self.rehearsal else self.device
        command = python("bench", *device, *arguments)
        return Step(name, seconds, command, self.interpreted, result=result, optional=optional)

    def tests(self, name: str, *variables: tuple[str, str]) -> Step:
        """The GPU tests. No failure stops them, and PyTorch's own matrix products are deterministic."""
        arguments = ["-q", "-p", "no:cacheprovider", "--tb=short", "-m", "not slow", "--maxfail=1000"]
        if self.rehearsal:
            arguments += ["-k", "test_shapes and relu"]
        elif find_spec("xdist"):
            arguments += ["-n", str(min(8, os.cpu_count() or 1))]
        variables += (("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), ("PYGPT_TEST_BACKENDS", "cuda,triton"))
        return Step(name, 120, python("pytest", *arguments, *TESTS), variables, signal.SIGINT, result=" in ")


# ------------------------------------------------------------------------------- the command
def seconds(text: str) -> float:
    """A limit: positive and finite."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_light", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the results are written")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rest", action="store_true", help="the second run instead of the first")
    which.add_argument("--all", action="store_true", help="build what is missing, then both runs (make gpu)")
    add("--conformance", type=Path, default=CONFORMANCE, metavar="FILE", help="the built cases (default: %(default)s)")
    add("--seconds", type=seconds, metavar="S", help=f"in all (default: {FIRST_SECONDS}; --rest {REST_SECONDS})")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    add("--save", action="store_true", help="of --rest, and with --all: the table to bench/results/ too")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    options.save = (options.save or options.all) and options.device == "cuda"  # a rehearsal is no result
    return options


def main(argv=None) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    plan = Plan(options)
    groups, limit = (plan.rest(), REST_SECONDS) if options.rest else (plan.first(), FIRST_SECONDS)
    if options.all:
        groups = plan.build() + plan.first() + plan.rest()
        limit = BUILD_SECONDS + FIRST_SECONDS + REST_SECONDS
    slow = REHEARSAL_SLOWNESS if options.device == "cpu" else 1
    began = time.time()
    about = {"command": " ".join(sys.argv), "device": options.device, "began": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    try:
        runner = Runner(options.out, options.seconds or limit, about, "-rest" if options.rest else "")
    except OSError as e:
        print(f"first_light: --out must be a folder without such a run: {e}")
        return 1
    for lanes in groups:
        if any(outcome.exit_code == NO_GPU and outcome.step == "versions" for outcome in runner.outcomes):
            return NO_GPU
        runner.run(*([replace(step, seconds=slow * step.seconds) for step in lane] for lane in lanes))
    failed = [outcome.step for outcome in runner.outcomes if outcome.failed]
    runner.print("\n".join(["", *(f"  {outcome}" for outcome in runner.outcomes)]))
    runner.save(seconds=time.time() - began)
    verdict = f"{len(failed)} of {len(runner.outcomes)} steps failed: {', '.join(failed)}"
    runner.print(f"{verdict if failed else 'every step ok'}; {time.time() - began:.0f} s; {options.out}")
    return 1 if failed else 0
