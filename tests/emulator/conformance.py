"""Do the emulator's instructions answer as a GPU's do? ``python -m tests.emulator.conformance``

Every case of conformance.cu turns the same random words into words. With a GPU: nvcc builds the cases for it, they
run, and the answers are compared with the emulator's in every bit and written to golden/, where `make test`
finds them. Without one: the emulator is compared with what golden/ holds. The second half of a run multiplies matrices
of small integers, whose products are exact, with hopper_gemm.cu. Needs nvcc and torch, no network.
"""

import ctypes
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from bench.gpu_code import tool
from pygpt.files import atomic

from . import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GOLDEN = HERE / "golden"
SOURCES = [HERE / "conformance.cu", HERE / "hopper_gemm.cu"]
APPROXIMATE = "exp2_approx"  # the one case whose answers may differ: PTX allows each an error of 2^-22


def inputs(words: int) -> np.ndarray:
    """Random words, the same everywhere and for ever."""
    return np.frombuffer(hashlib.shake_256(b"pygpt conformance").digest(4 * words), np.uint32).copy()


def build_for_device(arch: str, folder: Path) -> Path:
    """A shared library of the cases for one architecture, such as "90a"."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"conformance-sm_{arch}.so"
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-shared", "-Xcompiler", "-fPIC"]
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-I", str(ROOT / "csrc" / "cuda")]
    command = [tool("nvcc"), *flags, *target, *map(str, SOURCES), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return library


class Cases:
    """The cases and the GEMM of one library, or what it has of them: on a GPU, or in the emulator (device "cpu")."""

    def __init__(self, library: ctypes.CDLL, device: str, capability: int):
        self.library, self.device = library, device
        for function in ("conformance_name", "conformance_run", "hopper_gemm"):
            if hasattr(library, function):
                getattr(library, function).restype = ctypes.c_char_p
        self.index = {}
        for i in range(library.conformance_count() if hasattr(library, "conformance_count") else 0):
            name = library.conformance_name(i).decode()
            has_wgmma = 900 <= capability < 1000
            if capability >= library.conformance_arch(i) and (has_wgmma or not name.startswith("wgmma")):
                self.index[name] = i

    def run(self, name: str) -> np.ndarray:
        x = torch.from_numpy(inputs(self.library.conformance_words()).view(np.int32)).to(self.device)
        y = torch.zeros_like(x)
        self._call(self.library.conformance_run, self.index[name], x, y)
        return y.cpu().numpy().view(np.uint32)

    def gemm(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, b_k_major: bool) -> None:
        """c = a b, where b is (n, k) or (k, n); last dimensions contiguous."""
        (m, k), n = a.shape, c.shape[1]
        strides = (ctypes.c_int64 * 3)(a.stride(0), b.stride(0), c.stride(0))
        sizes = (ctypes.c_int64(v) for v in (m, n, k))
        flags = ctypes.c_bool(a.dtype == torch.bfloat16), ctypes.c_bool(b_k_major)
        self._call(self.library.hopper_gemm, a, b, c, *sizes, strides, *flags)

    def _call(self, function, *arguments):
        pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]
        error = function(*pointers)
        if self.device != "cpu":
            torch.cuda.synchronize()  # raises what the kernel did wrong
        if error:
            raise RuntimeError(error.decode())


def on_device(folder: Path) -> Cases:
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    torch.zeros(1, device="cuda")  # the context that the library shares
    return Cases(ctypes.CDLL(str(build_for_device(arch, folder))), "cuda", 100 * major + 10 * minor)


def in_emulator(schedule: str = "fifo", seed: int = 0, sanitizer: str | None = None) -> Cases:
    module = build.load_tests(*SOURCES, sanitizer=sanitizer)
    module.schedule(schedule, seed)
    return Cases(module.library, "cpu", 900)


def record(name: str, answer: np.ndarray):
    """What golden/ keeps of an answer."""
    if name == APPROXIMATE:
        return answer[:512].tolist()
    return hashlib.sha256(answer.astype("<u4").tobytes()).hexdigest()


def agrees(name: str, ours, theirs) -> bool:
    """Whether two records agree."""
    if name != APPROXIMATE:
        return ours == theirs
    a, b = (np.array(x, np.uint32).view(np.float32).astype(np.float64) for x in (ours, theirs))
    return np.allclose(a, b, rtol=2**-21, atol=2**-125, equal_nan=True)


def disagreements(cases: Cases, golden: dict) -> list[str]:
    """The names of the cases whose answers are not the golden ones."""
    both = cases.index.keys() & golden["cases"].keys()
    return sorted(name for name in both if not agrees(name, record(name, cases.run(name)), golden["cases"][name]))


def golden_files() -> list[Path]:
    return sorted(GOLDEN.glob("*.json"))


def integer_gemm(cases: Cases, m: int, n: int, k: int, dtype: torch.dtype, b_k_major: bool) -> bool:
    """Whether hopper_gemm multiplies integers of -8 .. 8 exactly, and writes inside of c only."""

    def integers(rows: int, cols: int) -> torch.Tensor:
        whole = torch.randint(-8, 9, (rows, (cols + 15) // 8 * 8), generator=generator)
        return whole.to(cases.device, dtype)[:, :cols]

    generator = torch.Generator().manual_seed(k)
    a, b = integers(m, k), integers(n, k) if b_k_major else integers(k, n)
    whole = torch.full((m + 1, (n + 15) // 8 * 8), 99.0, dtype=dtype, device=cases.device)
    want = whole.clone()
    want[:m, :n] = (a.double() @ (b.double().T if b_k_major else b.double())).to(dtype)
    cases.gemm(a, b, whole[:m, :n], b_k_major)
    return torch.equal(whole, want)


GEMMS = [
    (m, n, k, dtype, b_k_major)
    for m, n, k in ((128, 128, 64), (1, 1, 1), (200, 150, 390))
    for dtype in (torch.bfloat16, torch.float16)
    for b_k_major in (True, False)
]


def measure() -> int:
    """Runs the cases on this machine's GPU, writes golden/ and says where the emulator differs."""
    device = on_device(ROOT / "build" / "emulator")
    answers = {}
    for name in device.index:
        print(name, end=": ", flush=True)  # a case that never ends is the last one named
        try:
            answers[name] = device.run(name)
            print("answered")
        except RuntimeError as e:
            print(e)
    major, minor = torch.cuda.get_device_capability()
    golden = {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
        "cases": {name: record(name, answer) for name, answer in answers.items()},
    }
    GOLDEN.mkdir(exist_ok=True)
    path = GOLDEN / f"sm_{major}{minor}.json"
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{len(answers)} cases on {golden['device']}: {path.relative_to(ROOT)}")

    wrong = len(device.index) - len(answers)
    if major == 9:
        for case in GEMMS:
            if not integer_gemm(device, *case):
                wrong += 1
                print("hopper_gemm is wrong on the GPU:", *case)
    try:
        emulator = in_emulator()
    except (ImportError, OSError, RuntimeError) as e:
        print(f"the emulator can't be built here, so nothing was compared: {e}")
        return 2
    for name in disagreements(emulator, golden):
        wrong += 1
        ours, theirs = emulator.run(name), answers[name]
        where = np.flatnonzero(ours != theirs)
        i = where[0]
        print(f"{name}: {len(where)} words differ, first {i}: emulator {ours[i]:08x}, GPU {theirs[i]:08x}")
    print(f"{wrong} failures" if wrong else "the emulator agrees in every case")
    return wrong != 0


def check() -> int:
    """Compares the emulator with golden/."""
    emulator, wrong = in_emulator(), 0
    for path in golden_files():
        golden = json.loads(path.read_text())
        bad = disagreements(emulator, golden)
        wrong += len(bad)
        agree = len(golden["cases"]) - len(bad)
        print(f"{path.name} ({golden['device']}): {agree} cases agree", *bad, sep="\n  differs: ")
    if not golden_files():
        print(f"no GPU here, and no answers of one in {GOLDEN.relative_to(ROOT)}/: nothing to compare with")
    return wrong != 0


if __name__ == "__main__":
    sys.exit(measure() if torch.cuda.is_available() else check())
