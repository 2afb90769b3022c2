"""The table of a run, what stands above it, and the notes below it."""

import re
import shutil
import sys
from collections import defaultdict
from statistics import geometric_mean

from pygpt.progress import table as aligned

from ..cases import goals
from ..timing.results import Entry, Result, verdict

DRIFT = 0.05  # between the peaks before and after a run: worth a line
COLOURS = {"faster": "green", "slower": "red"}


def head(m: dict) -> str:
    """The machine of a run in a few lines."""
    forced = ", ".join(f"{k}={v}" for k, v in m["forced"].items())
    isa = f"instruction sets: ours {m['isa_ours']}, PyTorch {m['isa_torch']}"
    isa += f"; forced by {forced}" if forced else ""
    name = m.get("gpu") or f"{m['cpu']} ({' '.join(m['cpu_features'])}), {m['threads']} threads"
    by = m["peak_by"] if isinstance(m["peak_by"], dict) else dict.fromkeys(m["peak_gflops"], m["peak_by"])
    flops = [f"{dtype} {rate(value, 'GFLOP/s')} ({by[dtype]})" for dtype, value in m["peak_gflops"].items()]
    memory = [f"{kind} {rate(m[f'{kind}_peak_gbs'], 'GB/s')}" for kind in ("copy", "read") if f"{kind}_peak_gbs" in m]
    lines = [f"{name}, torch {m['torch']}", isa, f"peaks: {', '.join([*flops, *memory])}"]
    if m.get("clocks"):
        lines.append(f"under load: {', '.join(f'{k} {v}' for k, v in m['clocks'].items())}")
    for kind, after in m.get("peaks_after", {}).items():
        before = m["copy_peak_gbs"] if kind == "copy" else m["peak_gflops"][kind]
        if abs(change := after / before - 1) > DRIFT:
            lines.append(f"the {kind} peak had changed by {change:+.0%} at the end: its shares are that uncertain")
    if m.get("cpu_share") is not None and m["cpu_share"] < 0.9:
        got = f"{m['cpu_share']:.0%} of {m['threads']} cores"
        lines.append(f"the machine is busy: this run got {got}; distrust every figure")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- cells
def number(value: float | None, digits: int = 3) -> str:
    """So many digits, zeros at the end included, and all digits before the point."""
    if value is None:
        return ""
    value = float(f"{value:.{digits}g}") if value < 10**digits else value
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def rate(value: float | None, unit: str) -> str:
    if value is not None and value >= 10_000 and unit.startswith("G"):
        value, unit = value / 1000, f"T{unit[1:]}"
    return f"{number(value)} {unit}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def megabytes(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 2**20:.1f}"


def ratio(result: Result, ours: Entry, peer: str) -> str:
    """Shows the ratio to a peer; ~ where that was in one round only."""
    value = result.ratio(ours, peer)
    return "" if value is None else f"{'~' if result.entries[peer].rounds == 1 else ''}{value:.2f}"


def milliseconds(result: Result, peer: str) -> str:
    return number(result.entries[peer].ms, 4) if peer in result.entries else ""


def fastest_peer(result: Result, ours: Entry) -> str:
    """Names it, and says how many times its speed we have."""
    peer = result.best_peer
    return "" if peer is None else f"{peer.name} {ratio(result, ours, peer.name)}"


def words(result: Result, ours: Entry) -> str:
    reservations = {"launch-bound": ours.launch_bound, "unchecked": ours.unchecked}
    return ", ".join([verdict(result, ours), *(word for word, holds in reservations.items() if holds)])


def line(result: Result) -> str:
    """Shows one row in one line, while a run goes on."""
    parts = []
    for ours in result.ours:
        peers = ", ".join(f"{ratio(result, ours, p.name)}x {p.name}" for p in result.peers) or "no peer"
        speed = rate(ours.rate, ours.unit) + (f" ({percent(ours.share)})" if ours.share is not None else "")
        parts.append(f"{ours.name} {number(ours.ms, 4)} ms, {speed}; {peers}; {words(result, ours)}")
    return f"{result}: {'; '.join(parts)}"


# ------------------------------------------------------------------------------- the table
def table(results: list[Result], brief: bool = False) -> str:
    """A line for each of our candidates, with a column for each peer. brief: for a narrow terminal."""
    peers = list(dict.fromkeys(peer.name for result in results for peer in result.peers))
    peers = [peer for peer in peers if peer.startswith("eager") or not brief]
    timed = peers if any(result.busy for result in results) else []
    names = "ms", *(() if brief else ("±", "rate", "MB")), "of peak", *(f"vs {peer}" for peer in peers)
    names += tuple(f"{peer} ms" for peer in timed)
    columns = dict.fromkeys(("op", "shape", "dtype", "direction", "ours"), "<") | dict.fromkeys(names, ">")
    lines = []
    for result in results:
        for ours in result.ours:
            word = words(result, ours)
            more = (f"{ours.spread / 2:.0%}", rate(ours.rate, ours.unit), megabytes(ours.memory))
            lines.append((
                *(result.op, result.shape, result.dtype, result.direction, ours.name),
                *(number(ours.ms, 4), *(() if brief else more), percent(ours.share)),
                *(ratio(result, ours, peer) for peer in peers), *(milliseconds(result, peer) for peer in timed),
                fastest_peer(result, ours),
                (word, COLOURS.get(verdict(result, ours), "")),
            ))  # fmt: skip
    return aligned(columns | {"fastest peer": "<", "verdict": "<"}, lines)


def failures(about: dict) -> list[str]:
    """Which candidates of ours failed at which rows."""
    return [" ".join(row[k] for k in ("op", "shape", "dtype", "direction", "candidate")) for row in about["failed"]]


def notes(about: dict) -> list[str]:
    """What is not in the table, and the reason."""
    lines = [f"FAILED: {what}: {row['why']}" for what, row in zip(failures(about), about["failed"], strict=True)]
    lines += [f"not used: {name}: {why}" for name, why in about["absent"].items()]
    for why, rows in about["refused"].items():
        lines.append(f"{why} ({rows[0] if len(rows) == 1 else f'{len(rows)} rows'})")
    if left := about["left_out"]:
        lines.append(f"not reached in time: {len(left)} rows, from {left[0]} on")
    return lines


def slowdowns(results: list[Result]) -> list[str]:
    """Says how many times its quiet time each candidate takes among busy processes."""
    quiet, factors = {str(result): result.entries for result in results}, defaultdict(list)
    for result in (result for result in results if result.busy):
        beside = f", {result.busy} busy"
        for name, entry in quiet.get(str(result).replace(beside, ""), {}).items():
            factors[entry.label + beside].append(result.entries[name].ms / entry.ms)
    mean = "times the quiet time (geometric mean of"
    return [f"{label}: {geometric_mean(each):.2f} {mean} {len(each)} rows)" for label, each in factors.items()]


def below_the_bar(results: list[Result], machine: dict) -> list[Result]:
    return [result for result in results if goals.passes(result, machine) is False]


def judged(results: list[Result], about: dict) -> list[str]:
    """Says how the standard rows stand to the first bar."""
    machine, below = about["machine"], below_the_bar(results, about["machine"])
    lines = []
    for result in below:
        bar = goals.first_bar(result, machine)
        values = [value for ours in result.ours if (value := bar.value(result, ours)) is not None]
        measured = number(min(values)) if values else "not measured beside eager"
        lines.append(f"below the bar: {result}: {measured}, wanted {number(bar.wanted)} {bar.unit}")
    total, left = sum(goals.passes(result, machine) is not None for result in results), len(about["left_out"])
    lines.append(f"first bar: {total - len(below)} of {total} rows pass" + (f"; {left} not reached" if left else ""))
    return lines


def show(results: list[Result], about: dict):
    """Prints head, table and notes."""
    full = table(results)
    widest = max(len(re.sub("\33.*?m", "", line)) for line in full.splitlines())  # without the colours
    brief = widest > (shutil.get_terminal_size().columns if sys.stdout.isatty() else 250)
    print(head(about["machine"]), end="\n\n")
    print(table(results, brief=True) if brief else full)
    if brief:
        print("(this terminal is too narrow for all columns; the page has them)")
    for note in [*slowdowns(results), *notes(about)]:
        print(note)
