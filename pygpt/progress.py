"""What a run prints and draws: a progress bar or lines of progress, tables, and a plot of the losses."""

import importlib.util
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from .files import atomic

LINE_SECONDS = 5.0  # between two lines of progress where standard output is no terminal


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Shows the steps done, a status and the time left: a live bar on a terminal, lines elsewhere.

    >>> with Progress("training", total=100) as progress:
    ...     progress.update(1, "loss 5.5")
    """

    def __init__(self, label: str, total: int, done: int = 0, steady: bool = False):
        """steady: the bar is redrawn only by `update`, so that no thread of its own disturbs what is being timed."""
        self.label, self.total, self.first, self.start = label, total, done, time.monotonic()
        self.last_line, self.steady = -LINE_SECONDS, steady
        self.bar: Any = None  # a rich.progress.Progress on a terminal
        if sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich import progress as rich

            columns = "{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), "{task.fields[status]}"
            self.bar = rich.Progress(*columns, rich.TimeRemainingColumn(compact=True), "left", auto_refresh=not steady)
            self.task = self.bar.add_task(label, total=total, completed=done, status="")

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, status: str) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, status=status, refresh=self.steady)
            return
        elapsed = time.monotonic() - self.start
        if elapsed - self.last_line >= LINE_SECONDS or done == self.total:
            self.last_line = elapsed
            left = elapsed / max(done - self.first, 1) * (self.total - done)
            self.print(f"{self.label}  {done}/{self.total}  {status}  {clock(left)} left")

    def print(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)


COLOURS = {"green": "32", "red": "31", "bold red": "1;31"}


def table(columns: dict[str, str], rows: Iterable[Sequence[str | tuple[str, str]]]) -> str:
    """A table with aligned cells. columns: name -> "<" or ">". A cell is a text, or (text, colour on a terminal)."""
    lines = [[cell if isinstance(cell, tuple) else (cell, "") for cell in row] for row in rows]
    widths = [max(map(len, (name, *(row[i][0] for row in lines)))) for i, name in enumerate(columns)]
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def line(cells: list[tuple[str, str]]) -> str:
        shown = [f"{text:{side}{w}}" for (text, _), side, w in zip(cells, columns.values(), widths, strict=True)]
        if coloured:
            shown = [f"\33[{COLOURS[c]}m{s}\33[0m" if c else s for s, (_, c) in zip(shown, cells, strict=True)]
        return "  ".join(shown).rstrip()

    return "\n".join(map(line, [[(name, "") for name in columns], *lines]))


def plot_losses(path: Path, title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bool:
    """Writes a PNG of label -> (steps, losses). False, and no file, where matplotlib cannot be imported.

    A curve with many points is drawn faint, with its running mean on top.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:  # of matplotlib or of NumPy
        return False

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = zip(("#1f77b4", "#d62728", "#2ca02c", "#9467bd"), ("-", "--", "-", "--"), strict=True)
    for (label, (steps, losses)), (colour, dash) in zip(curves.items(), styles, strict=False):
        if len(steps) > 60:
            axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(steps, _running_mean(losses, len(losses) // 60), dash, color=colour, linewidth=1.8, label=label)
        else:
            axes.plot(steps, losses, dash, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary)
    return True


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean over up to ``reach`` values on each side."""
    sums = list(accumulate(values, initial=0.0))
    spans = ((max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]
