"""What a run leaves, as objects and as a file in pytest-benchmark's format.

Each candidate of a row is one benchmark of the file, with the row as its group; what pytest-benchmark has no
place for (rates, memory, who is ours) is its extra_info, and what concerns the run the file's "pygpt".
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from pygpt.data import UsageError
from pygpt.files import atomic

from .report import NOISE, short


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
    share: float | None = None  # of the machine's measured peak
    memory: int | None = None  # bytes

    @property
    def label(self) -> str:
        return f"ours ({self.name})" if self.ours else self.name

    @property
    def spread(self) -> float:
        """Of the middle half, relative to the median."""
        return (self.q3 - self.q1) / self.ms


@dataclass(frozen=True)
class Result:
    """A row: one op, shape, dtype and direction, and everybody's figures."""

    op: str
    shape: str
    dtype: str
    direction: str
    standard: bool = False
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
        """How many times a peer's speed."""
        return self.entries[peer].ms / ours.ms if peer in self.entries else None


def standard(rows: list[Result]) -> list[Result]:
    """Those of ours that are standard; all of ours where none is."""
    ours = [row for row in rows if row.ours]
    return [row for row in ours if row.standard] or ours


def margin(a: Entry, b: Entry) -> float:
    """What two medians must differ by, relatively, to mean anything: half their spreads together, at least NOISE."""
    return max(NOISE, (a.spread + b.spread) / 2)


def verdict(result: Result, ours: Entry) -> str:
    """Against the fastest peer."""
    peer = result.best_peer
    if peer is None:
        return "alone"
    ratio, wide = peer.ms / ours.ms, margin(ours, peer)
    if ratio > 1 + wide:
        return "faster"
    return "even" if ratio >= 1 / (1 + wide) else f"slower than {peer.name}"


# ------------------------------------------------------------------------------- while a run goes on
def add(session, row, found, name: str, times):
    """One candidate's times into pytest-benchmark's ``session``; ``row`` and ``found`` are candidates.py's."""
    from pytest_benchmark.stats import Metadata

    group = str(row)
    about = {**row.about, **found.about[name], "candidate": name, "unit": found.unit, "amount": found.amount,
             "peak": found.peak, "intensity": found.intensity, "input_sets": found.input_sets}  # fmt: skip
    entry = Metadata(
        SimpleNamespace(
            name=f"{group} [{name}]", fullname=f"bench/suite.py::{group} [{name}]", group=group, param=name,
            params=None, extra_info=about, cprofile_stats=None, has_error=False,
        ),
        iterations=times.calls,
        options={},
    )  # fmt: skip
    for seconds in times.seconds:
        entry.update(seconds * times.calls)
    session.benchmarks.append(entry)


# ------------------------------------------------------------------------------- the file
def write(path: Path, document: dict):
    """One line per benchmark; the file appears whole or not at all."""
    lines = ",\n".join("    " + json.dumps(short(b)) for b in document["benchmarks"])
    rest = json.dumps({key: short(value) for key, value in document.items() if key != "benchmarks"}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(f'{rest[:-2]},\n  "benchmarks": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def read(path: Path) -> dict:
    """UsageError unless it is a run's file: pytest-benchmark's format with our additions, or bench.gpu's."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except (ValueError, OSError) as e:
        raise UsageError(f"{path} cannot be read: {e}") from None
    if isinstance(document, dict) and isinstance(document.get("rows"), list) and "gpu" in document.get("machine", ()):
        return document
    if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
        raise UsageError(f"{path} is not in pytest-benchmark's format")
    try:
        rows(document)
        document["pygpt"]["machine"]["date"]
    except (KeyError, TypeError):
        raise UsageError(f"{path} has benchmarks, but not pygpt's") from None
    return document


def about(document: dict) -> dict:
    """The run: machine, what was refused, failed and left out."""
    if "rows" in document:
        m = document["machine"]
        failed = [r | {"candidate": r["backend"], "why": r["failed"]} for r in document["rows"] if "failed" in r]
        return {"machine": m, "refused": m.get("skipped", {}), "failed": failed, "left_out": [], "absent": {}}
    return document["pygpt"]


def rows(document: dict) -> list[Result]:
    """In the order in which they were measured."""
    found: dict[str, Result] = {}
    for about, entry in _gpu_entries(document) if "rows" in document else map(_entry, document["benchmarks"]):
        keys = ("op", "shape", "dtype", "direction", "standard", "dims", "intensity")
        result = Result(**{key: about[key] for key in keys if key in about})
        found.setdefault(str(result), result).entries[entry.name] = entry
    return list(found.values())


def _entry(benchmark: dict) -> tuple[dict, Entry]:
    x, stats = benchmark["extra_info"], benchmark["stats"]
    ms, rate = stats["median"] * 1e3, x["amount"] / stats["median"]
    quartiles = stats["q1"] * 1e3, stats["q3"] * 1e3
    more = stats["rounds"], rate, x["unit"], rate / x["peak"], x.get("memory")
    return x, Entry(x["candidate"], x["ours"], ms, *quartiles, *more)


def _gpu_entries(document: dict):
    """bench.gpu's rows: one per backend, each with its peers."""
    for row in document["rows"]:
        if "failed" in row:
            continue
        more = row["rate"], row["unit"], row["share_of_limit"]
        yield row, Entry(row["backend"], True, row["ms"], row["q1_ms"], row["q3_ms"], row["rounds"], *more)
        for name, peer in row["peers"].items():
            yield row, Entry(name, False, peer["ms"], peer["q1_ms"], peer["q3_ms"], row["rounds"])


def merge(document: dict, newer: dict) -> dict:
    """``document`` with the benchmarks that ``newer`` measured again."""
    again = {b["fullname"]: b for b in newer["benchmarks"]}
    return document | {"benchmarks": [again.get(b["fullname"], b) for b in document["benchmarks"]]}
