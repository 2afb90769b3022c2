"""Compares the emulator's instructions with a GPU's.

    python -m tests.emulator.conformance                                   with a GPU and nvcc: everything below
    python -m tests.emulator.conformance --build FILE [--arch 90a]         needs nvcc, no GPU
    python -m tests.emulator.conformance --library FILE --out ANSWERS      needs a GPU and torch; writes ANSWERS only
    python -m tests.emulator.conformance --compare ANSWERS                 needs the emulator, no GPU

Every case of conformance.cu maps the same random words to output words. The GPU's outputs are stored in a JSON file,
and the emulator's are compared with them bit by bit. The last cases multiply matrices of small integers, whose
products are exact, with hopper_gemm.cu. Without arguments the GPU's answers go to golden/, where `make test` finds
them; on a machine without a GPU the emulator is compared with the files in golden/.
"""

import argparse
import base64
import ctypes
import hashlib
import json
import multiprocessing
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from bench.compiled.sass import tool
from bench.first_light.steps import die_with_parent

from . import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GOLDEN = HERE / "golden"
SOURCES = [HERE / "conformance.cu", HERE / "hopper_gemm.cu"]
APPROXIMATE = "exp2_approx"  # the one case whose answers may differ: PTX allows each an error of 2^-22
TIMEOUT = 5  # seconds that a case may take
FORK = multiprocessing.get_context("fork")  # torch is imported once; this process itself never initialises CUDA


def inputs(words: int) -> np.ndarray:
    """Random words, the same on every machine."""
    return np.frombuffer(hashlib.shake_256(b"pygpt conformance").digest(4 * words), np.uint32).copy()


def build_for_device(arch: str, library: Path) -> None:
    """Compiles the cases into a shared library for one architecture, such as "90a". It runs with any torch."""
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-shared", "-Xcompiler", "-fPIC", "-cudart=static"]
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-I", str(ROOT / "csrc" / "cuda")]
    command = [tool("nvcc"), *flags, *target, *map(str, SOURCES), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


# ---------------------------------------------------------------- cases


GEMMS = {
    f"hopper_gemm {m}x{n}x{k} {str(dtype).removeprefix('torch.')} {'b_n_k' if b_k_major else 'b_k_n'}": (
        m, n, k, dtype, b_k_major)
    for m, n, k in ((128, 128, 64), (1, 1, 1), (200, 150, 390))
    for dtype in (torch.bfloat16, torch.float16)
    for b_k_major in (True, False)
}  # fmt: skip


class Cases:
    """The cases and the GEMM that one library contains, run on a GPU or in the emulator (device "cpu")."""

    def __init__(self, library: ctypes.CDLL, device: str, capability: int):
        self.library, self.device = library, device
        for function in ("conformance_name", "conformance_run", "hopper_gemm"):
            if hasattr(library, function):
                getattr(library, function).restype = ctypes.c_char_p
        has_wgmma = 900 <= capability < 1000
        self.index = {}
        for i in range(library.conformance_count() if hasattr(library, "conformance_count") else 0):
            name = library.conformance_name(i).decode()
            if capability >= library.conformance_arch(i) and (has_wgmma or not name.startswith("wgmma")):
                self.index[name] = i
        self.gemms = GEMMS if has_wgmma and hasattr(library, "hopper_gemm") else {}
        self.names = [*self.index, *self.gemms]

    def run(self, name: str) -> np.ndarray:
        """The output words of a case. A GEMM, whose result is exact or an error, outputs the single word 1."""
        if name in self.gemms:
            if not integer_gemm(self, *self.gemms[name]):
                raise RuntimeError("wrong values")
            return np.ones(1, np.uint32)
        x = torch.from_numpy(inputs(self.library.conformance_words()).view(np.int32)).to(self.device)
        y = torch.zeros_like(x)
        self._call(self.library.conformance_run, self.index[name], x, y)
        return y.cpu().numpy().view(np.uint32)

    def gemm(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, b_k_major: bool) -> None:
        """c = a b, where b is (n, k) or (k, n); last dimensions contiguous."""
        (m, k), n = a.shape, c.shape[1]
        sizes = (ctypes.c_int64 * 6)(m, n, k, a.stride(0), b.stride(0), c.stride(0))
        flags = ctypes.c_bool(a.dtype == torch.bfloat16), ctypes.c_bool(b_k_major)
        self._call(self.library.hopper_gemm, a, b, c, sizes, *flags)

    def _call(self, function, *arguments):
        pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]
        error = function(*pointers)
        if self.device != "cpu":
            torch.cuda.synchronize()  # raises errors of the kernel
        if error:
            raise RuntimeError(error.decode())


def integer_gemm(cases: Cases, m: int, n: int, k: int, dtype: torch.dtype, b_k_major: bool) -> bool:
    """True if hopper_gemm multiplies integers of -8 .. 8 exactly and writes nothing outside c."""

    def integers(rows: int, cols: int) -> torch.Tensor:
        return torch.randint(-8, 9, (rows, (cols + 15) // 8 * 8), generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(k)
    a, b = integers(m, k), integers(n, k) if b_k_major else integers(k, n)
    whole = torch.full((m + 1, (n + 15) // 8 * 8), 99.0, dtype=dtype)
    want, out = whole.clone(), whole.to(cases.device)
    factors = a[:, :k].double(), b[:, :k].double().T if b_k_major else b[:, :n].double()
    want[:m, :n] = (factors[0] @ factors[1]).to(dtype)
    a, b = a.to(cases.device), b.to(cases.device)
    cases.gemm(a[:, :k], b[:, : k if b_k_major else n], out[:m, :n], b_k_major)
    return torch.equal(out.cpu(), want)


def in_emulator(schedule: str = "fifo", seed: int = 0, sanitizer: str | None = None, capability: int = 900) -> Cases:
    module = build.load_tests(*SOURCES, sanitizer=sanitizer)
    module.schedule(schedule, seed)
    return Cases(module.library, "cpu", capability)


# ---------------------------------------------------------------- the GPU's answers


def gpu_capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def open_library(library: Path) -> tuple[dict, Cases]:
    """A library's device and cases: the GPU for a library of `build_for_device`, the CPU for one of the emulator."""
    loaded = ctypes.CDLL(str(library.resolve()))
    if hasattr(loaded, "PyInit_pygpt_emulator"):
        return {"device": "emulator", "capability": "9.0", "cuda": None}, Cases(loaded, "cpu", 900)
    capability = gpu_capability()
    if capability is None:
        raise RuntimeError("torch finds no GPU here")
    torch.zeros(1, device="cuda")  # the context that the library shares
    major, minor = capability
    device = {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
    }
    return device, Cases(loaded, "cuda", 100 * major + 10 * minor)


def _serve(connection, library: Path, done: list[str]) -> None:
    """Runs in a process of its own: sends the device and the names of the cases, then the answer of each case that is
    not in ``done``. Stops after a case that fails, because it may have destroyed the CUDA context."""
    die_with_parent()  # ends a case that hangs when the parent ends
    torch.set_num_threads(1)
    try:
        device, cases = open_library(library)
    except (OSError, RuntimeError) as e:
        connection.send(str(e))
        return
    connection.send((device, cases.names))
    for name in cases.names:
        if name not in done:
            try:
                connection.send(cases.run(name))
            except RuntimeError as e:
                connection.send(str(e))
                return


class Worker:
    """The process that runs the cases, as its parent sees it."""

    def __init__(self, library: Path, done: list[str]):
        self.connection, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_serve, args=(theirs, library, done), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self, seconds: float):
        """The process's next message, or a string that says why there is none."""
        if not self.connection.poll(max(seconds, 0)):
            return f"no answer within {seconds:.0f} s"
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join(TIMEOUT)
            return f"its process ended with exit code {self.process.exitcode}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join(TIMEOUT)


def write(path: Path, answers: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(answers, indent=1) + "\n")
    partial.replace(path)


def run_library(library: Path, out: Path, limit: float) -> int:
    """Runs the cases of a library. After each case all answers and errors so far are written to ``out``.
    Returns 0 if every case answered, 1 if some failed, 2 if the run was cut short."""
    answers = {"stopped": "it was interrupted", "cases": {}, "errors": {}}
    end = time.monotonic() + limit
    stopped, failed = None, True
    while stopped is None and failed:  # after a failure a new process runs the remaining cases
        worker = Worker(library, [*answers["cases"], *answers["errors"]])
        started = worker.answer(end - time.monotonic())
        if isinstance(started, str):
            stopped = started
            break
        device, names = started
        answers, failed = device | answers, False
        for name in names:
            if name in answers["cases"] or name in answers["errors"]:
                continue
            left = end - time.monotonic()
            answer = worker.answer(min(TIMEOUT, left))
            failed = isinstance(answer, str)
            if failed and time.monotonic() >= end:
                stopped = f"the limit of {limit:.0f} s"
                break
            answers["errors" if failed else "cases"][name] = answer if failed else encode(answer)
            write(out, answers)
            print(f"{name}: {answer if failed else 'answered'}", flush=True)
            if failed:
                break
        worker.stop()
    worker.stop()
    answers["stopped"] = stopped or ""
    write(out, answers)
    where = answers.get("device", library)
    print(f"{where}: {len(answers['cases'])} cases answered, {len(answers['errors'])} failed", end="", flush=True)
    print(f"; stopped: {stopped}" if stopped else "", flush=True)
    return 2 if stopped else int(bool(answers["errors"]))


# ---------------------------------------------------------------- comparison


def encode(words: np.ndarray) -> str:
    """A case's words as text for the file of answers."""
    return base64.b64encode(zlib.compress(words.astype("<u4").tobytes(), 9)).decode()


def decode(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4")


def difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    """Describes how two answers differ; empty if they agree."""
    if ours.shape != theirs.shape:
        return f"{ours.size} words, on the GPU {theirs.size}"
    if name == APPROXIMATE:
        a, b = (x.view(np.float32).astype(np.float64) for x in (ours, theirs))
        same = np.isclose(a, b, rtol=2**-21, atol=2**-125, equal_nan=True)
    else:
        same = ours == theirs
    if same.all():
        return ""
    where = np.flatnonzero(~same)
    i = where[0]
    return f"{where.size} words differ, first {i}: {ours[i]:08x}, on the GPU {theirs[i]:08x}"


def capability_of(answers: dict) -> int:
    major, minor = map(int, answers["capability"].split("."))
    return 100 * major + 10 * minor


def disagreements(cases: Cases, answers: dict) -> dict[str, str]:
    """{case: how it differs from the file of answers}, for the cases that do."""
    wrong = {}
    for name in cases.names:
        if name not in answers["cases"]:
            wrong[name] = "on the GPU: " + answers["errors"].get(name, f"not run, {answers['stopped']}")
        elif how := difference(name, cases.run(name), decode(answers["cases"][name])):
            wrong[name] = how
    return wrong


def compare(path: Path) -> int:
    """Compares the emulator with a file of answers."""
    try:
        answers = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        print(f"{path} has no answers: {e}")
        return 1
    if "capability" not in answers:
        print(f"{path.name}: no case was run: {answers['stopped']}")
        return 1
    cases = in_emulator(capability=capability_of(answers))
    wrong = disagreements(cases, answers)
    print(f"{path.name} ({answers['device']}): {len(cases.names) - len(wrong)} of {len(cases.names)} cases agree")
    for name, how in wrong.items():
        print(f"  {name}: {how}")
    return int(bool(wrong))


def golden_files() -> list[Path]:
    return sorted(GOLDEN.glob("*.json"))


def check() -> int:
    """Compares the emulator with golden/."""
    if not golden_files():
        print(f"no GPU here, and no answers of one in {GOLDEN.relative_to(ROOT)}/: nothing to compare with")
    return max((compare(path) for path in golden_files()), default=0)


def measure(capability: tuple[int, int]) -> int:
    """Runs the cases on this machine's GPU, writes golden/ and says where the emulator differs."""
    major, minor = capability
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    library = ROOT / "build" / "emulator" / f"conformance-sm_{arch}.so"
    build_for_device(arch, library)
    GOLDEN.mkdir(exist_ok=True)
    path = GOLDEN / f"sm_{major}{minor}.json"
    failed = run_library(library, path, limit=600)
    try:
        return compare(path) or failed
    except (ImportError, OSError, RuntimeError) as e:
        print(f"the emulator can't be built here, so nothing was compared: {e}")
        return 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulator.conformance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--build", type=Path, metavar="FILE", help="compile the cases into this shared library")
    parser.add_argument("--arch", default="90a", help="for this architecture")
    parser.add_argument("--library", type=Path, metavar="FILE", help="run the cases of this library")
    parser.add_argument("--out", type=Path, metavar="ANSWERS", help="and keep their answers and errors here")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for at most so long")
    parser.add_argument("--compare", type=Path, metavar="ANSWERS", help="compare the emulator with these answers")
    options = parser.parse_args(arguments)
    if (options.library is None) != (options.out is None):
        parser.error("--library and --out go together")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out: {options.out.parent} is no folder")
    if options.build:
        build_for_device(options.arch, options.build)
        return 0
    if options.library:
        return run_library(options.library, options.out, options.limit)
    if options.compare:
        return compare(options.compare)
    with FORK.Pool(1) as pool:
        capability = pool.apply(gpu_capability)
    return measure(capability) if capability else check()


if __name__ == "__main__":
    sys.exit(main())
