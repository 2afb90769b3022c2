"""What a run says: the machine it ran on, the table, and what is not in it."""

import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch

import pygpt
from pygpt.files import atomic
from pygpt.progress import table as aligned

NOISE = 0.03  # the margin of the check: what a ratio of two medians still moves by between quiet runs
RESULTS = Path(__file__).parents[1] / "results"
VARIABLES = (  # what lowers the instruction set of ours and of each library
    "PYGPT_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
    "TORCHINDUCTOR_CPP_MARCH",
)  # fmt: skip


def machine(peaks, options) -> dict:
    """Everything a figure depends on."""
    import cpuinfo  # here: the GPU benchmarks do without

    cpu = cpuinfo.get_cpu_info()
    features = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")
    gpu = {"gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda} if options.device == "cuda" else {}
    return gpu | {
        "cpu": cpu.get("brand_raw", "unknown CPU"),
        "cpu_features": [name for name in features if name in cpu.get("flags", ())],
        "isa_ours": pygpt._C.cpu_capability() if hasattr(pygpt, "_C") else "not built",
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "forced": {name: os.environ[name] for name in (*VARIABLES, "PYGPT_BACKEND") if os.environ.get(name)},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pygpt": pygpt.__version__,
        "python": sys.version.split()[0],
        "peak_gflops": peaks.flops,
        "peak_by": peaks.flops_by,
        "copy_peak_gbs": peaks.copy,
        "read_peak_gbs": peaks.read,
        "cpu_share": peaks.cpu_share,
        "backends": options.backends,
        "peers": list(options.peers),
        "command": shlex.join(["pygpt", "bench", *getattr(options, "given", ())]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def head(m: dict) -> str:
    """The machine in a few lines; ``m`` may be bench.gpu's."""
    if "peak_gflops" not in m:
        return f"{m['gpu']}, torch {m['torch']}"
    forced = ", ".join(f"{k}={v}" for k, v in m["forced"].items())
    isa = f"instruction sets: ours {m['isa_ours']}, PyTorch {m['isa_torch']}"
    name = m.get("gpu") or f"{m['cpu']} ({' '.join(m['cpu_features'])}), {m['threads']} threads"
    peaks = m["peak_gflops"] if "gpu" in m else {"float32": m["peak_gflops"]["float32"]}
    flops = ", ".join(f"{value:.0f} GFLOP/s {dtype}" for dtype, value in peaks.items())
    bandwidths = ", ".join(f"{m[f'{k}_peak_gbs']:.1f} GB/s {k}" for k in ("copy", "read") if f"{k}_peak_gbs" in m)
    lines = [
        f"{name}, torch {m['torch']}",
        isa + (f"; forced by {forced}" if forced else ""),
        f"peaks: {flops} ({m['peak_by']}), {bandwidths}",
    ]
    if m["cpu_share"] is not None and m["cpu_share"] < 0.9:
        got = f"{m['cpu_share']:.0%} of {m['threads']} cores"
        lines.append(f"the machine is busy: this run got {got}; distrust every figure")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- the first bar
def bar(result) -> float | None:
    """The ratio to PyTorch eager that the first bar asks of a row, or None."""
    if not result.standard:
        return None
    if result.dtype == "float32":
        return 1.0
    four = result.op == "mlp" or (result.op, result.direction) == ("attention", "backward")
    return 4.0 if result.dtype == "bfloat16" and four else None


def passes(result) -> bool:
    """Whether all of ours meet the first bar, noise allowed for."""
    wanted = bar(result)
    ratios = [result.ratio(entry) for entry in result.ours]
    return wanted is None or all(ratio is not None and ratio >= wanted * (1 - NOISE) for ratio in ratios)


# ------------------------------------------------------------------------------- the table
def number(value: float | None, digits: int = 3) -> str:
    """So many digits, zeros at the end too; all of those before the point."""
    if value is None:
        return ""
    value = float(f"{value:.{digits}g}") if value < 10**digits else value
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def megabytes(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 2**20:.1f}"


def ratio(result, ours, peer: str) -> str:
    """To a peer; ~ where that was in one round only."""
    value = result.ratio(ours, peer)
    return "" if value is None else f"{'~' if result.entries[peer].rounds == 1 else ''}{value:.2f}"


def line(result) -> str:
    """One row in one line, while a run goes on."""
    from .results import verdict

    parts = []
    for entry in result.ours:
        peers = ", ".join(f"{ratio(result, entry, p.name)}x {p.name}" for p in result.peers) or "no peer"
        speed = f"{number(entry.rate)} {entry.unit} ({entry.share:.0%})"
        parts.append(f"{entry.name} {number(entry.ms, 4)} ms, {speed}; {peers}; {verdict(result, entry)}")
    return f"{result}: {'; '.join(parts)}"


COLOURS = {"faster": "green", "slower": "red"}


def table(results: list, brief: bool = False) -> str:
    """A line for each of our candidates, with a column for each peer. brief: for a narrow terminal."""
    from .results import verdict

    peers = list(dict.fromkeys(peer.name for result in results for peer in result.peers))
    peers = [peer for peer in peers if peer == "eager" or not brief]
    names = "ms", *(() if brief else ("±", "rate", "MB")), "of peak", *(f"vs {peer}" for peer in peers)
    columns = dict.fromkeys(("op", "shape", "dtype", "direction", "ours"), "<") | dict.fromkeys(names, ">")
    lines = []
    for result in results:
        for entry in result.ours:
            word = verdict(result, entry)
            rate = f"{number(entry.rate)} {entry.unit}"
            more = () if brief else (f"{entry.spread / 2:.0%}", rate, megabytes(entry.memory))
            lines.append((
                *(result.op, result.shape, result.dtype, result.direction, entry.name),
                *(number(entry.ms, 4), *more, f"{entry.share:.0%}"),
                *(ratio(result, entry, peer) for peer in peers),
                (word, COLOURS.get(word.split()[0], "")),
            ))  # fmt: skip
    return aligned(columns | {"verdict": "<"}, lines)


def failures(about: dict) -> list[str]:
    """Which candidates of ours failed at which rows."""
    return [" ".join(row[k] for k in ("op", "shape", "dtype", "direction", "candidate")) for row in about["failed"]]


def notes(about: dict) -> list[str]:
    """What is not in the table, and why."""
    found = [f"FAILED: {what}: {row['why']}" for what, row in zip(failures(about), about["failed"], strict=True)]
    found += [f"not used: {name}: {why}" for name, why in about["absent"].items()]
    for why, what in about["refused"].items():
        found.append(f"{why} ({what[0] if len(what) == 1 else f'{len(what)} rows'})")
    if left := about["left_out"]:
        found.append(f"not reached in time: {len(left)} rows, from {left[0]} on")
    return found


def show(results: list, about: dict):
    """Prints head, table and notes."""
    full = table(results)
    widest = max(len(re.sub("\33.*?m", "", line)) for line in full.splitlines())  # without the colours
    brief = widest > (shutil.get_terminal_size().columns if sys.stdout.isatty() else 250)
    print(head(about["machine"]), end="\n\n")
    print(table(results, brief=True) if brief else full)
    if brief:
        print("(this terminal is too narrow for all columns; the page has them)")
    for note in notes(about):
        print(note)


# ------------------------------------------------------------------------------- the file
def default_path(m: dict) -> Path:
    """bench/results/<cpu>-<instruction set>-<date>.json, or <gpu>-<date>.json; with the time where that is there."""
    name = m["gpu"] if "gpu" in m else f"{m['cpu']} {m['isa_ours']}"
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    name = f"{'-'.join(words)}-{m['date'][:10]}"
    path = RESULTS / f"{name}.json"
    return path if not path.exists() else RESULTS / f"{name}-{m['date'][11:16].replace(':', '')}.json"


def short(value):
    """For JSON: floats of five digits, and none that is not finite."""
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def save(path: Path, rows: list[dict], m: dict):
    """Writes bench.gpu's {"machine": ..., "rows": [...]}; the file appears whole or not at all."""
    lines = ",\n".join("    " + json.dumps(short(row)) for row in rows)
    about = json.dumps(short(m), indent=2).replace("\n", "\n  ")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(f'{{\n  "machine": {about},\n  "rows": [\n{lines}\n  ]\n}}\n')
