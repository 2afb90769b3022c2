"""What a run says: the machine it ran on, the table, the JSON file."""

import json
import math
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch

import pygpt

from .harness import Peaks

NOISE = 0.03  # the margin of the check: what a ratio of two medians still moves by between quiet runs
RESULTS = Path(__file__).parent / "results"
VARIABLES = (  # what can lower or redirect either side
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "PYGPT_CPU_CAPABILITY",
    "PYGPT_BACKEND",
)


def machine(peaks: Peaks) -> dict:
    """Everything a figure depends on."""
    import cpuinfo  # here, as rich below: the GPU benchmarks do without

    cpu = cpuinfo.get_cpu_info()
    features = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")
    return {
        "cpu": cpu.get("brand_raw", "unknown CPU"),
        "cpu_features": [name for name in features if name in cpu.get("flags", ())],
        "isa_ours": pygpt._C.cpu_capability() if hasattr(pygpt, "_C") else "not built",
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "forced": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pygpt": pygpt.__version__,
        "python": sys.version.split()[0],
        "fma_peak_gflops": peaks.fma,
        "fma_peak_by": peaks.fma_by,
        "copy_peak_gbs": peaks.copy,
        "cpu_share": peaks.cpu_share,
        "command": os.environ.get("PYGPT_BENCH_COMMAND") or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def head(m: dict) -> str:
    forced = ", ".join(f"{k}={v}" for k, v in m["forced"].items())
    isa = f"instruction sets: ours {m['isa_ours']}, PyTorch {m['isa_torch']}"
    lines = [
        f"{m['cpu']} ({' '.join(m['cpu_features'])}), {m['threads']} threads, torch {m['torch']}",
        isa + (f"; forced by {forced}" if forced else ""),
        f"peaks: {m['fma_peak_gflops']:.0f} GFLOP/s float32 ({m['fma_peak_by']}), {m['copy_peak_gbs']:.1f} GB/s copy",
    ]
    if m["cpu_share"] < 0.9:
        got = f"{m['cpu_share']:.0%} of {m['threads']} cores"
        lines.append(f"the machine is busy: this run got {got}; distrust every figure")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- verdicts
def bar(row: dict) -> float | None:
    """The ratio the first bar asks of this row, or None."""
    if not row["standard"]:
        return None
    if row["dtype"] == "float32":
        return 1.0
    four = row["op"] == "mlp" or (row["op"], row["direction"]) == ("attention", "backward")
    return 4.0 if row["dtype"] == "bfloat16" and four else None


def passes(row: dict) -> bool:
    wanted = bar(row)
    return wanted is None or (row["backend"] != "torch" and row["ratio"] >= wanted * (1 - NOISE))


def verdict(row: dict) -> str:
    if row["backend"] == "torch":
        return "not ours"
    return "faster" if row["ratio"] >= 1 else "even" if row["ratio"] >= 1 - NOISE else "slower"


# ------------------------------------------------------------------------------- the table
def table(rows: list[dict], title: str = ""):
    from rich.table import Table

    t = Table(title=title, title_justify="left", title_style="", header_style="bold", box=None, pad_edge=False)
    for name in ("op", "shape", "dtype", "direction"):
        t.add_column(name, no_wrap=True)
    for name in ("ours ms", "torch ms", "rate", "of peak", "torch/ours", "paired"):
        t.add_column(name, justify="right", no_wrap=True)
    t.add_column("verdict", no_wrap=True)
    colour = {"faster": "green", "slower": "red"}
    for row in rows:
        word = verdict(row)
        t.add_row(
            *(row[name] for name in ("op", "shape", "dtype", "direction")),
            *(f"{row[name]:.4g}" if row[name] < 1000 else f"{row[name]:.0f}" for name in ("ours_ms", "eager_ms")),
            f"{row['rate']:.4g} {row['unit']}" if row["rate"] < 1000 else f"{row['rate']:.0f} {row['unit']}",
            f"{row['share_of_peak']:.0%}",
            f"{row['ratio']:.2f}",
            f"{row['paired_ratio']:.2f}",
            f"[{colour[word]}]{word}[/]" if word in colour else word,
        )
    return t


def show(rows: list[dict], m: dict):
    """Prints head and table: coloured in a terminal, plain text of full width elsewhere."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160, no_color=True)
    console.print(head(m), soft_wrap=True)
    console.print()
    console.print(table(rows))


# ------------------------------------------------------------------------------- the file
def default_path(m: dict) -> Path:
    """bench/results/<cpu>-<instruction set>-<date>.json, or <gpu>-<date>.json"""
    name = m["gpu"] if "gpu" in m else f"{m['cpu']} {m['isa_ours']}"
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return RESULTS / f"{'-'.join(words)}-{m['date'][:10]}.json"


def save(path: Path, rows: list[dict], m: dict):
    """Writes {"machine": ..., "rows": [...]}; the file appears whole or not at all."""

    def short(value):
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        if isinstance(value, float):
            return float(f"{value:.5g}") if math.isfinite(value) else None  # JSON has no inf
        return value

    lines = ",\n".join("    " + json.dumps(short(row)) for row in rows)
    about = json.dumps(short(m), indent=2).replace("\n", "\n  ")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".tmp-", delete=False) as file:
        file.write(f'{{\n  "machine": {about},\n  "rows": [\n{lines}\n  ]\n}}\n')
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
