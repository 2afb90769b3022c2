"""`pygpt doctor`: what works on this machine, what does not, and the commands that mend it.

In a checkout it loads setup.py, which knows the sources, the compilers and their flags, and compiles one small source
with it. That shows whether the compiler works, and how long a build takes here. The kernels are tried in a process of
their own for each backend and device, because a kernel that does not fit the machine can end its process.
"""

import argparse
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..dispatch import OPS, REFERENCE, SPECS, TABLE
from ..progress import clock, table

CHECKOUT = Path(__file__).resolve().parents[2]  # the folder that setup.py is in, unless pygpt is installed elsewhere
WORKS, ABSENT, BROKEN = "works", "absent", "broken"
BUILD = "pip install --no-build-isolation ."
COMPILER = (
    "install g++ >= 11 or clang >= 11 (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: "
    "xcode-select --install), or name another compiler with CXX=..."
)
PROBE_DTYPES = torch.float32, torch.bfloat16
PROBE = (  # the program that tries a backend on a device
    "import json, sys; from dataclasses import asdict; from pygpt.inspect import machine\n"
    "for probe in machine.probe(*sys.argv[1:]): print(json.dumps(asdict(probe)), flush=True)"
)
PROBE_SIZE = 16  # the largest size in a probe
PROBE_SECONDS = 600.0  # after which a probe counts as hanging


# ------------------------------------------------------------------------------- the result
@dataclass(frozen=True)
class Finding:
    """Something that a machine has or lacks. It is "works", "absent" (it could be had) or "broken" (it should work)."""

    what: str
    state: str
    detail: str
    mend: str = ""  # what to do about it


@dataclass(frozen=True)
class Build:
    """What building a library from nothing takes on this machine, as a prediction."""

    library: str
    built: bool
    units: int  # compiler runs
    jobs: int  # of them at a time
    seconds: float
    memory: float  # in bytes, where the largest units are compiled at the same time


@dataclass(frozen=True)
class Probe:
    """A small call of an op, forward and backward, by the rule of `pygpt verify`. ``error`` is empty if it passed."""

    backend: str
    device: str
    op: str
    dtype: str
    error: str


@dataclass(frozen=True)
class Diagnosis:
    """The answer of `doctor`. ``print(diagnosis)`` shows what ``pygpt doctor`` does."""

    facts: dict[str, str]
    findings: list[Finding]
    builds: list[Build]
    probes: list[Probe] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether everything works that ought to."""
        return all(f.state != BROKEN for f in self.findings) and not any(p.error for p in self.probes)

    def __str__(self) -> str:
        colours = {WORKS: "green", ABSENT: "", BROKEN: "red"}
        lines: list[tuple] = []
        for f in self.findings:
            lines.append(((f.state, colours[f.state]), f.what, f.detail))
            lines += [("", "", f"-> {f.mend}")] if f.mend else []
        parts = ["\n".join(f"{name:16}{value}" for name, value in self.facts.items())]
        parts.append(table(dict.fromkeys(("state", "what", "detail"), "<"), lines))
        for b in self.builds:
            parts.append(
                f"{b.library} is {'built' if b.built else f'not built; {BUILD} builds it'}. A new build takes "
                f"{b.units} compiler runs, {b.jobs} at a time: about {clock(b.seconds)} minutes and at most "
                f"{b.memory / 2**30:.1f} GiB."
            )
        parts.append("Everything works that ought to." if self.healthy else "Something that ought to work does not.")
        return "\n\n".join(parts)


# ------------------------------------------------------------------------------- what the build needs
# CPU seconds and bytes of one compiler (docs/measured.md P5). CUDA's seconds are for each GPU that it compiles for.
REFERENCE_SECONDS = 2.1  # for csrc/cpu/dispatch.cpp, which is compiled here to compare this machine
COST = {"pygpt._C": (28.0, 0.5 * 2**30), "pygpt._cuda": (19.0, 0.5 * 2**30)}  # the mean seconds, the largest memory


def load_recipe() -> ModuleType | None:
    """setup.py as a module. None outside a checkout. SystemExit or ImportError where it cannot work here."""
    if not (CHECKOUT / "csrc" / "bind").is_dir():
        return None
    spec = spec_from_file_location("pygpt_setup", CHECKOUT / "setup.py")
    assert spec and spec.loader
    recipe = module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def compile_once(recipe: ModuleType, compiler: list[str]) -> tuple[float, str]:
    """Compiles csrc/cpu/dispatch.cpp with the flags of every instruction set -> CPU seconds, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*recipe.FLAGS, *list(recipe.ISAS.values())[-1], "-fPIC"]
        command = [*compiler, *flags, "-c", str(CHECKOUT / recipe.DISPATCH), "-o", os.path.join(folder, "probe.o")]
        before, start = os.times(), time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as e:
            return 0.0, str(e)
        after, wall = os.times(), time.perf_counter() - start
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    errors = [line for line in done.stderr.splitlines() if "error" in line] or [last_line(done.stderr)]
    return seconds or wall, errors[0] if done.returncode else ""


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def diagnose_build(facts: dict[str, Any]) -> tuple[list[Finding], list[Build]]:
    """Whether this machine can build the libraries, and what that takes."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            recipe = load_recipe()
            if recipe is not None:
                recipe.torch_paths()
                jobs, nvcc = recipe.jobs(), recipe.cuda_compiler()
                codes = recipe.cuda_code(recipe.cuda_archs(nvcc)) if nvcc else []
    except (SystemExit, ImportError) as e:
        mend = "pip install 'setuptools>=77'" if isinstance(e, ImportError) else ""
        return [Finding("build", ABSENT, " ".join((printed.getvalue() or str(e)).split()), mend)], []
    if recipe is None:
        where = shutil.which(compiler[0])
        detail = f"{where or 'no C++ compiler'}; the sources are in a checkout of pygpt, and none is here"
        return [Finding("build", WORKS if where else ABSENT, detail, "" if where else COMPILER)], []
    seconds, error = compile_once(recipe, compiler)
    if error:
        return [Finding("C++ compiler", ABSENT, f"{shlex.join(compiler)} does not compile: {error}", COMPILER)], []
    findings = [Finding("C++ compiler", WORKS, version_of(compiler))]
    if nvcc:
        findings.append(Finding("nvcc", WORKS, f"{nvcc}, {version_of([nvcc])}; builds for {', '.join(codes)}"))
    elif os.environ.get("PYGPT_BUILD_CUDA") == "0":
        findings.append(Finding("nvcc", ABSENT, "left out by PYGPT_BUILD_CUDA=0"))
    else:
        where = "not in CUDA_HOME, PATH or /usr/local/cuda"
        findings.append(Finding("nvcc", ABSENT, where, "install NVIDIA's CUDA toolkit"))
    return findings, predict(recipe, jobs, len(codes), seconds / REFERENCE_SECONDS, facts)


def predict(recipe: ModuleType, jobs: int, targets: int, slower: float, facts: dict[str, Any]) -> list[Build]:
    """What a build takes. targets: what CUDA is built for, 0 without nvcc. slower: than the machine of COST."""
    cuda = len(recipe.sources("csrc/cuda/**/*.cu")) + 1
    libraries = [("pygpt._C", len(recipe.CPU) * len(recipe.ISAS) + 2, 1, facts["extension"])]
    libraries += [("pygpt._cuda", cuda, targets, facts["cuda_extension"])] if targets else []
    builds = []
    for library, units, each, path in libraries:
        seconds, memory = COST[library]
        at_once = min(jobs, os.cpu_count() or 1)
        builds.append(
            Build(
                library, bool(path), units, jobs, units * each * seconds * slower / at_once, memory * min(jobs, units)
            )
        )
    return builds


def version_of(command: list[str]) -> str:
    """The line of ``--version`` that has the release, or the first one."""
    try:
        lines = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError as e:
        return str(e)
    return next((line for line in lines if "release" in line), (lines or ["unknown version"])[0])


# ------------------------------------------------------------------------------- what is installed
def torch_build() -> str:
    """torch's version, and what it was built for."""
    built_for = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    gpu = next((f"built for {name} {version}" for name, version in built_for.items() if version), "a CPU build")
    return f"{torch.__version__}, {gpu}"


def gpus() -> list[str]:
    """The GPUs that torch can use."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(i) for i in range(count)]


def gpus_of_the_driver() -> list[str]:
    """The GPUs that NVIDIA's driver knows, also where torch cannot use them."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def diagnose_kernels(facts: dict[str, Any]) -> list[Finding]:
    """A finding for each backend of the table but PyTorch's own, and one for GPUs that torch cannot use."""
    findings = []
    for row in TABLE.values():
        if row.kernels is REFERENCE:
            continue
        objection = row.missing or next(filter(None, (row.device_objection(d) for d in devices_of(row.devices))), "")
        if not objection:
            libraries = {
                "cpp": facts["extension"],
                "cuda": facts["cuda_extension"],
                "triton": f"Triton {facts['triton']}",
            }
            findings.append(Finding(f"{row.name} kernels", WORKS, libraries.get(row.name, "")))
            continue
        ought = row.name == "cpp" or (gpus() and (row.name == "cuda" or facts["triton"]))
        findings.append(Finding(f"{row.name} kernels", BROKEN if ought else ABSENT, objection))
    if not gpus() and (others := gpus_of_the_driver()):
        detail = f"{', '.join(others)}: torch cannot use it ({torch_build()})"
        findings.append(Finding("GPU", ABSENT, detail, "install a build of torch for CUDA that this driver supports"))
    return findings


def devices_of(types: tuple[str, ...]) -> list[torch.device]:
    """The devices here of these types."""
    counts = {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    return [torch.device(t, i) if t == "cuda" else torch.device(t) for t in types for i in range(counts.get(t, 0))]


# ------------------------------------------------------------------------------- the probes
def probe(backend: str, device: str) -> Iterator[Probe]:
    """Calls each op that the backend serves on the device, forward and backward, and judges it by `pygpt verify`."""
    from ..verify import measure

    generator, row = torch.Generator().manual_seed(0), TABLE[backend]
    for op in OPS if row.ops is None else row.ops:
        dims = {key: min(n, PROBE_SIZE) for key, n in SPECS[op].dims.items() if type(n) is int}
        for dtype in PROBE_DTYPES:
            try:
                rows = measure(op, dims, dtype, generator, backend, elements=1, device=device)
                failed = [row for row in rows if not row.passed]
                error = "; ".join(f"{r.direction}'s error is {r.ours:.1e}, PyTorch's {r.torch:.1e}" for r in failed)
            except Exception as e:  # noqa: BLE001 - whatever a kernel raises is the finding
                error = f"{type(e).__name__}: {last_line(str(e))}"
            yield Probe(backend, device, op, str(dtype).removeprefix("torch."), error)


def run_probe(backend: str, device: str) -> list[Probe]:
    """`probe` in a process of its own. Its end before the last op is an error of the op that it was at."""
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYGPT_BACKEND": ""}
    command = [sys.executable, "-c", PROBE, backend, device]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS
        )
        output, error = done.stdout, f"the process ended with {done.returncode}: {last_line(done.stderr)}"
        if done.returncode == 0:
            error = ""
    except subprocess.TimeoutExpired as e:
        output, error = (e.stdout or b"").decode(), f"no answer in {PROBE_SECONDS:g} seconds"
    probes = [Probe(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]
    if error:
        row = TABLE[backend]
        done_ops = len(probes) // len(PROBE_DTYPES)
        ops = list(OPS if row.ops is None else row.ops)
        probes.append(Probe(backend, device, ops[min(done_ops, len(ops) - 1)], "", error))
    return probes


def doctor() -> Diagnosis:
    """Says what is installed and built here, what could be, and tries every kernel on every device.

    The result is a `Diagnosis`; ``diagnosis.healthy`` is False where something that ought to work does not. Nothing is
    raised for what is missing or fails.
    """
    from ..info import gather

    facts = gather()
    findings = diagnose_kernels(facts)
    building, builds = diagnose_build(facts)
    probes: list[Probe] = []
    for row in TABLE.values():
        if row.kernels not in (None, REFERENCE):
            for device in devices_of(row.devices):
                probes += run_probe(row.name, str(device))
    shown = {
        "pygpt": facts["pygpt"],
        "torch": torch_build(),
        "Python": f"{facts['python']} on {platform.platform()}",
        "CPU": f"{facts['machine']}, {facts['cpu_capability'] or 'no kernels'}; threads: {facts['threads']}",
        "OpenMP": facts["openmp"],
        "GPUs": ", ".join(gpus()) or "none that torch can use",
        "Triton": facts["triton"] or "not installed",
    }
    return Diagnosis(shown, [*findings, *probe_findings(probes), *building], builds, probes)


def probe_findings(probes: list[Probe]) -> list[Finding]:
    """One finding for the probes of each backend on each device."""
    findings = []
    for backend, device in dict.fromkeys((p.backend, p.device) for p in probes):
        mine = [p for p in probes if (p.backend, p.device) == (backend, device)]
        failed = [p for p in mine if p.error]
        ops = len({p.op for p in mine})
        detail = f"{ops} ops forward and backward, as exact as PyTorch"
        if failed:
            first = failed[0]
            detail = f"{len(failed)} of {len(mine)} calls fail, first {first.op} {first.dtype}: {first.error}"
        findings.append(Finding(f"{backend} on {device}", BROKEN if failed else WORKS, detail))
    return findings


# ------------------------------------------------------------------------------- command line
def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 where the kernels work, 1 where something that ought to work does not."""
    diagnosis = doctor()
    print(json.dumps(asdict(diagnosis) | {"healthy": diagnosis.healthy}, indent=2) if args.json else diagnosis)
    return 0 if diagnosis.healthy else 1
