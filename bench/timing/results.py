"""The format of rows: as objects, and as a file that `pytest-benchmark compare` reads.

Each candidate of a row is one benchmark of the file, and the row is its group. What pytest-benchmark has no field for
(rates, memory, errors, whether it is ours) is in the benchmark's `extra_info`, and what concerns the run is the file's
`pygpt`.
"""

import json
import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pygpt.data import UsageError
from pygpt.files import atomic

from .candidates import RowRun
from .clocks import Times

NOISE = 0.03  # a ratio of two medians moves by so much between quiet runs
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Entry:
    """One candidate of a row."""

    name: str
    ours: bool
    ms: float  # median of a call
    q1: float
    q3: float
    rounds: int
    rate: float | None = None
    unit: str = ""
    share: float | None = None  # of the machine's measured peak in this dtype and unit, where that is a limit
    memory: int | None = None  # bytes
    launch_bound: bool = False
    unchecked: bool = False  # the reference could not be computed

    @property
    def label(self) -> str:
        return f"ours ({self.name})" if self.ours else self.name

    @property
    def spread(self) -> float:
        """The width of the middle half, relative to the median."""
        return (self.q3 - self.q1) / self.ms


@dataclass(frozen=True)
class Result:
    """A row, and what was measured of each candidate."""

    op: str
    shape: str
    dtype: str
    direction: str
    standard: bool = False
    busy: int = 0  # how many busy processes there were; they are part of the shape's name
    dims: dict = field(default_factory=dict)
    intensity: float | None = None  # FLOPs per byte that must move
    entries: dict[str, Entry] = field(default_factory=dict)

    def __str__(self):
        return f"{self.op} {self.shape} {self.dtype} {self.direction}"

    @property
    def ours(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.ours]

    @property
    def peers(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if not entry.ours]

    @property
    def best_peer(self) -> Entry | None:
        return min(self.peers, key=lambda entry: entry.ms, default=None)

    def ratio(self, ours: Entry, peer: str = "eager") -> float | None:
        """Tells how many times a peer's speed ours has."""
        return self.entries[peer].ms / ours.ms if peer in self.entries else None


def standard(results: list[Result]) -> list[Result]:
    """The standard rows of ours; all rows of ours where none is standard."""
    ours = [result for result in results if result.ours]
    return [result for result in ours if result.standard] or ours


def margin(a: Entry, b: Entry) -> float:
    """The least relative difference of two medians that means something."""
    return max(NOISE, (a.spread + b.spread) / 2)


def compared(a: Entry, b: Entry) -> str:
    """Says whether a is faster or slower than b, by more than what the measurements spread, or even."""
    ratio, least = b.ms / a.ms, 1 + margin(a, b)
    return "faster" if ratio > least else "even" if ratio >= 1 / least else "slower"


def verdict(result: Result, ours: Entry) -> str:
    """Compares ours with the fastest peer."""
    return compared(ours, result.best_peer) if result.best_peer else "alone"


# ------------------------------------------------------------------------------- what is written
def benchmark(run: RowRun, name: str, times: Times) -> dict:
    """Describes one candidate as pytest-benchmark does."""
    group, data = str(run.row), sorted(times.device)
    q1, _, q3 = statistics.quantiles(data, n=4, method="inclusive") if len(data) > 1 else data * 3
    mean, deviation = statistics.mean(data), statistics.pstdev(data)
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    outliers = [sum(not a <= x <= b for x in data) for a, b in ((mean - deviation, mean + deviation), (low, high))]
    stats = {
        "min": data[0], "max": data[-1], "mean": mean, "stddev": deviation, "rounds": len(data),
        "median": statistics.median(data), "iqr": q3 - q1, "q1": q1, "q3": q3, "iqr_outliers": outliers[1],
        "stddev_outliers": outliers[0], "outliers": f"{outliers[0]};{outliers[1]}", "ops": 1 / mean, "total": sum(data),
        "ld15iqr": data[bisect_left(data, low)], "hd15iqr": data[bisect_right(data, high) - 1],
        "iterations": times.block.calls,
    }  # fmt: skip
    facts = run.row.facts | run.facts[name] | {
        "candidate": name, "unit": run.unit, "amount": run.amount, "peak": run.peak, "intensity": run.intensity,
        "input_sets": run.input_sets, "launch_bound": times.launch_bound,
    }  # fmt: skip
    return {
        "group": group, "name": f"{group} [{name}]", "fullname": f"bench/suite.py::{group} [{name}]", "params": None,
        "param": name, "extra_info": facts, "options": {}, "stats": stats,
    }  # fmt: skip


def document(benchmarks: list[dict], about: dict) -> dict:
    """The whole file. ``about``: machine, absent, refused, failed, left_out."""
    machine = about["machine"]
    info = {"cpu": {"brand_raw": machine["cpu"]}, "python_version": machine["python"]}
    return {"machine_info": info, "commit_info": {}, "datetime": machine["date"], "version": "5.3.1", "pygpt": about,
            "benchmarks": benchmarks}  # fmt: skip


def write(path: Path, document: dict):
    """Writes one line per benchmark; the file appears whole or not at all."""
    lines = ",\n".join("    " + json.dumps(_short(b)) for b in document["benchmarks"])
    rest = json.dumps({key: _short(value) for key, value in document.items() if key != "benchmarks"}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(f'{rest[:-2]},\n  "benchmarks": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def _short(value):
    """Prepares a value for JSON: floats have five digits, and those that are not finite become null."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def saved_path(machine: dict, kind: str) -> Path:
    """bench/results/<cpu>-<instruction set>.json, or <gpu>.json; one file for each machine and kind of run."""
    name = machine["gpu"] if "gpu" in machine else f"{machine['cpu']} {machine['isa_ours']}"
    words = "".join(c if c.isalnum() else " " for c in f"{name} {kind}".lower()).split()
    return RESULTS / f"{'-'.join(words)}.json"


# ------------------------------------------------------------------------------- what is read
def read(path: Path) -> dict:
    """UsageError unless it is a run's file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except (ValueError, OSError) as e:
        raise UsageError(f"{path} cannot be read: {e}") from None
    if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
        raise UsageError(f"{path} is not in pytest-benchmark's format")
    try:
        results(document)
        recency(document)
    except (KeyError, TypeError):
        raise UsageError(f"{path} has benchmarks, but not pygpt's") from None
    return document


def recency(document: dict) -> tuple:
    """The order in which the longest run of the newest day is the last."""
    date = document["pygpt"]["machine"]["date"]
    return date[:10], len(document["benchmarks"]), date


def newest(folder: Path, wanted: Callable[[Path, list[Result]], bool]) -> Path | None:
    """The longest run of the newest day, of the wanted ones in a folder."""
    runs = {}
    for path in folder.glob("*.json"):
        try:
            document = read(path)
        except UsageError:
            continue
        if wanted(path, results(document)):
            runs[path] = recency(document)
    return max(runs, key=runs.get, default=None)


def results(document: dict) -> list[Result]:
    """Returns the rows in the order in which they were measured."""
    rows: dict[str, Result] = {}
    keys = ("op", "shape", "dtype", "direction", "standard", "busy", "dims", "intensity")
    for benchmark in document["benchmarks"]:
        facts, stats = benchmark["extra_info"], benchmark["stats"]
        result = Result(**{key: facts[key] for key in keys if key in facts})
        rate, peak = facts["amount"] / stats["median"], facts.get("peak")
        share = rate / peak if peak and rate <= peak else None  # memory can be faster later in a run
        entry = Entry(
            facts["candidate"], facts["ours"], stats["median"] * 1e3, stats["q1"] * 1e3, stats["q3"] * 1e3,
            stats["rounds"], rate, facts["unit"], share, facts.get("memory"),
            bool(facts.get("launch_bound")), bool(facts.get("unchecked")),
        )  # fmt: skip
        rows.setdefault(str(result), result).entries[entry.name] = entry
    return list(rows.values())


def merge(document: dict, newer: dict) -> dict:
    """``document`` with the benchmarks that ``newer`` measured again."""
    again = {b["fullname"]: b for b in newer["benchmarks"]}
    return document | {"benchmarks": [again.get(b["fullname"], b) for b in document["benchmarks"]]}
