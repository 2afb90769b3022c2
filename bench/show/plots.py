"""The figures of a run, in matplotlib."""

import json
import math
from collections import defaultdict
from pathlib import Path

from pygpt.data import UsageError
from pygpt.files import atomic

from ..timing.results import Result, standard

OURS = {"cpp": "#d1495b", "cuda": "#d1495b", "triton": "#8f2d56", "torch": "#c17c74"}
PEERS = ("#30638e", "#4c9f70", "#edae49", "#6d597a", "#00798c", "#9c6644", "#7f7f7f", "#b5838d")
MARKS = "osD^vPX*<>"
TIDY = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9,
        "axes.titlesize": 9, "axes.titlelocation": "left", "legend.frameon": False, "svg.hashsalt": "pygpt",
        "svg.fonttype": "path"}  # fmt: skip
WIDTH = 6.4  # inches: on the page a figure is shown at its own size, so 9 points stay 9 points
UNDATED = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # metadata that an SVG does without


def all_figures(rows: list[Result], machine: dict, curves: dict) -> dict | None:
    """{name: Figure} of what ``rows`` can show; None without matplotlib, or NumPy. curves: see `training_curves`."""
    try:
        import matplotlib.figure
    except ImportError:
        return None
    quiet = [row for row in rows if not row.busy]
    with matplotlib.rc_context(TIDY):
        drawn = {
            "ratios": ratios(rows),
            "speed": by_length(quiet, "rate"),
            "memory": by_length(quiet, "memory") or memory_bars(quiet),
            "roofline": roofline(quiet, machine),
            "training": training(curves),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write(figure, path: Path):
    """Writes a figure in the format of the suffix; the same figure gives the same file."""
    import matplotlib

    with matplotlib.rc_context(TIDY), atomic(path) as temporary:
        figure.savefig(temporary, metadata=UNDATED if path.suffix == ".svg" else {}, dpi=150)


def _subplots(height: float, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _colours(rows: list[Result]) -> dict[str, str]:
    """Each candidate's colour, the same in every figure of a run."""
    peers = sorted({peer.name for row in rows for peer in row.peers}, key=lambda name: (name != "eager", name))
    return OURS | {name: PEERS[i % len(PEERS)] for i, name in enumerate(peers)}


def _legend(figure, axes):
    """Places the legend above the axes."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _lines(axes, labels: list[str]):
    """Names the lines of a chart, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


# ------------------------------------------------------------------------------- ours over theirs
def ratios(rows: list[Result]):
    """A line per shape and dtype, a point per direction: how many times PyTorch eager's speed."""
    points = defaultdict(dict)
    for row in standard(rows):
        if (ratio := row.ratio(row.ours[0])) is not None:
            points[row.op, row.shape, row.dtype][row.direction] = ratio
    if not points:
        return None
    figure, (axes,) = _subplots(1 + 0.2 * len(points))
    looks = {"forward": ("#d1495b", "o"), "backward": ("#30638e", "D"), "step": ("#4c9f70", "s")}
    looks["token"] = looks["step"]
    for direction, (colour, mark) in looks.items():
        xy = [(ways[direction], y) for y, ways in enumerate(points.values()) if direction in ways]
        if xy:
            axes.scatter(*zip(*xy, strict=True), color=colour, marker=mark, s=26, label=direction, zorder=3)
    for y, ways in enumerate(points.values()):
        axes.plot([min(ways.values()), max(ways.values())], [y, y], color="0.75", zorder=1)
    axes.axvspan(1e-9, 1, color="0.94", zorder=0)
    low, high = (pick(ratio for ways in points.values() for ratio in ways.values()) for pick in (min, max))
    axes.set_xscale("log")
    axes.set_xlim(min(low, 0.9) / 1.1, max(high, 1.2) * 1.1)
    ticks = [x for x in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low / 1.3 <= x <= high * 1.3 or x == 1]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)
    _lines(axes, [f"{op}  {shape}  {dtype}" for op, shape, dtype in points])
    axes.set(xlabel="PyTorch eager's time over ours; shaded: ours is slower")
    _legend(figure, axes)
    return figure


# ------------------------------------------------------------------------------- by sequence length
def families(rows: list[Result]) -> list[list[Result]]:
    """Attention rows that differ in the sequence length alone: the longest such list of each direction."""
    alike = defaultdict(list)
    for row in rows:
        if row.op == "attention" and row.dims and row.dims["L"] == row.dims["S"]:
            rest = tuple(value for key, value in row.dims.items() if key not in "LS")
            alike[row.direction, row.dtype, rest].append(row)
    longest = {}
    for (direction, *_), members in alike.items():
        if len(members) > max(1, len(longest.get(direction, ()))):
            longest[direction] = sorted(members, key=lambda row: row.dims["L"])
    return list(longest.values())


def by_length(rows: list[Result], what: str):
    """Attention's "rate" or "memory" over the sequence length, a line per candidate, a panel per direction."""
    known = [f for f in families(rows) if any(getattr(e, what) is not None for row in f for e in row.entries.values())]
    if not known:
        return None
    colours = _colours(rows)
    figure, panels = _subplots(3.2, len(known))
    for axes, members in zip(panels, known, strict=True):
        labels = {entry.name: entry.label for row in members for entry in (*row.ours, *row.peers)}
        for i, (name, mark) in enumerate(zip(labels, MARKS * 3, strict=False)):
            entries = [(row.dims["L"], row.entries[name]) for row in members if name in row.entries]
            xs = [T for T, e in entries if getattr(e, what)]
            ys = [y / 2**20 if what == "memory" else y for _, e in entries if (y := getattr(e, what))]
            thick = max(1, 3 - 0.6 * i)  # where lines coincide, the lower one is wider
            axes.plot(xs, ys, marker=mark, markersize=4, linewidth=thick, label=labels[name], color=colours[name])
        first = members[0]
        if what == "rate":
            peaks = [e.rate / e.share for row in members for e in row.ours if e.share]
            if peaks:
                axes.axhline(peaks[0], color="0.3", linewidth=1, linestyle="--")
                axes.annotate(" measured peak", (0, peaks[0]), xycoords=("axes fraction", "data"), va="bottom")
            axes.set(ylabel=first.ours[0].unit if first.ours else "")
            axes.set_ylim(0, 1.1 * max(axes.dataLim.y1, *peaks, 0))
        else:
            axes.set(ylabel="MB at the worst moment of a call")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.set_xscale("log", base=2)
        lengths = [row.dims["L"] for row in members]
        axes.set_xticks(lengths, lengths, rotation=45 * (len(lengths) > 4))
        rest = " ".join(part for part in first.shape.split() if not part.startswith("T"))
        axes.set(xlabel="sequence length", title=f"attention {first.direction}\n{rest}, {first.dtype}")
    _legend(figure, panels[0])
    return figure


def memory_bars(rows: list[Result]):
    """Peak memory of ours and of PyTorch eager, where there is no sweep."""
    pairs = {
        str(row): (row.ours[0].memory, row.entries["eager"].memory) for row in standard(rows) if "eager" in row.entries
    }
    pairs = {label: pair for label, pair in pairs.items() if all(pair)}
    if not pairs:
        return None
    figure, (axes,) = _subplots(1 + 0.28 * len(pairs))
    looks = ((-0.18, "ours", OURS["cpp"]), (0.18, "PyTorch eager", PEERS[0]))
    for (shift, label, colour), sizes in zip(looks, zip(*pairs.values(), strict=True), strict=True):
        ys = [y + shift for y in range(len(sizes))]
        axes.barh(ys, [size / 2**20 for size in sizes], height=0.34, color=colour, label=label)
    _lines(axes, list(pairs))
    axes.set(xlabel="MB at the worst moment of a call")
    _legend(figure, axes)
    return figure


# ------------------------------------------------------------------------------- roofline
def roofline(rows: list[Result], machine: dict):
    """The standard rows of the first dtype, and the machine's two measured limits in that dtype."""
    known = [row for row in standard(rows) if row.intensity and row.ours[0].share]
    known = [row for row in known if row.dtype == known[0].dtype]
    if not known:
        return None
    dtype, memory = known[0].dtype, max(machine["copy_peak_gbs"], machine.get("read_peak_gbs", 0))  # not in old files
    peak = machine["peak_gflops"][dtype]
    figure, (axes,) = _subplots(4)
    intensities = [row.intensity for row in known] + [peak / memory / 10]  # shows the slope too
    low, high = min(intensities) / 2, max(intensities) * 4
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    axes.plot(xs, [min(peak, memory * x) for x in xs], color="0.3", linewidth=1.5)
    axes.annotate(f"{peak:.0f} GFLOP/s in {dtype}", (high, peak), ha="right", va="bottom")
    axes.annotate(f"{memory:.0f} GB/s from memory ", ((peak / memory) / 3, peak / 3), ha="right", va="bottom")
    ops = dict.fromkeys(row.op for row in known)
    for op, mark, colour in zip(ops, MARKS * 2, (OURS["cpp"], *PEERS) * 2, strict=False):
        members = [row for row in known if row.op == op]
        for direction, face in (("forward", colour), ("backward", "none")):
            points = [(row.intensity, _flops(row)) for row in members if row.direction == direction]
            if points:
                label = op if direction == members[0].direction else None
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, marker=mark, s=30, facecolors=face, edgecolors=colour, label=label, zorder=3)
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(min(peak / 10, *map(_flops, known)) / 2, 2 * max(peak, *map(_flops, known)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set_minor_formatter(lambda x, _: "")
    axes.set(xlabel=f"FLOPs per byte that must move; {dtype}, hollow: backward", ylabel="GFLOP/s")
    _legend(figure, axes)
    return figure


def _flops(row: Result) -> float:
    """GFLOP/s; where bytes are counted, their rate times the conventional operations per byte."""
    entry = row.ours[0]
    return entry.rate * row.intensity if entry.unit == "GB/s" else entry.rate


# ------------------------------------------------------------------------------- training
def training_curves(path: Path) -> dict[str, tuple[list, list]]:
    """Label -> (steps, losses) of a log.jsonl of `pygpt train`, or of its folder. UsageError if it is none."""
    path = path / "log.jsonl" if path.is_dir() else path
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        labels = {"loss": "train", "val_loss": "validation"}
        points = {key: [(e["step"], e[key]) for e in entries if key in e] for key in labels}
    except FileNotFoundError:
        raise UsageError(f"--training: no such file: {path}") from None
    except (ValueError, TypeError, KeyError, OSError) as e:
        raise UsageError(f"--training: {path} is not a log of `pygpt train`: {e}") from None
    if not any(points.values()):
        raise UsageError(f"--training: {path} has no losses")
    return {
        f"{path.parent.name} {labels[key]}": tuple(map(list, zip(*curve, strict=True)))
        for key, curve in points.items()
        if curve
    }


def training(curves: dict):
    """Losses by step."""
    if not curves:
        return None
    figure, (axes,) = _subplots(3.4)
    for (label, (steps, losses)), colour in zip(curves.items(), (OURS["cpp"], *PEERS) * 3, strict=False):
        few = len(steps) <= 60
        label += f", lowest {min(filter(math.isfinite, losses), default=math.nan):.3f}"
        axes.plot(steps, losses, color=colour, marker="o" if few else "", markersize=3.5, linewidth=1.5, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    _legend(figure, axes)
    return figure
