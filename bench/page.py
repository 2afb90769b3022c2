"""The run as one HTML file that needs nothing else: figures are inline SVG, style and script are in it."""

import io
import math
import re
from importlib.util import find_spec
from pathlib import Path

from pygpt.files import atomic

from . import report
from .results import Result, verdict

TEMPLATE = Path(__file__).with_name("page.html")
TITLES = {
    "ratios": "Ours and PyTorch eager",
    "speed": "Speed by sequence length",
    "memory": "Memory",
    "roofline": "Roofline",
    "training": "Training",
}


def write(path: Path, rows: list[Result], about: dict, figures: dict):
    from jinja2 import Environment  # PyTorch depends on it

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    page = template.render(
        head=report.head(about["machine"]).splitlines(),
        machine=about["machine"],
        tiles=tiles(rows),
        figures=[(name, TITLES[name], inline(figure, name)) for name, figure in figures.items()],
        matplotlib=find_spec("matplotlib") is not None,
        peers=list(dict.fromkeys(peer.name for row in rows for peer in row.peers)),
        lines=[line(row, entry) for row in rows for entry in row.ours],
        notes=report.notes(about),
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def line(row: Result, entry) -> dict:
    """A line of the table."""
    word = verdict(row, entry)
    return {
        "row": row, "entry": entry, "ms": report.number(entry.ms, 4), "rate": report.number(entry.rate),
        "mb": report.megabytes(entry.memory), "verdict": word, "colour": word.split()[0],
        "ratios": {peer.name: row.ratio(entry, peer.name) for peer in row.peers},
    }  # fmt: skip


def tiles(rows: list[Result]) -> list[tuple[str, str]]:
    """(figure, what it is): the run in four numbers."""
    found = []
    for direction, what in (("forward", "forward"), ("backward", "backward"), ("step", "training step")):
        ratios = [r for row in rows if row.direction == direction for e in row.ours if (r := row.ratio(e))]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            found.append((f"{mean:.2f}x", f"PyTorch eager's speed, {what}, geometric mean of {len(ratios)}"))
    words = [verdict(row, entry).split()[0] for row in rows for entry in row.ours if row.peers]
    if words:
        found.append((f"{words.count('faster')} of {len(words)}", "rows faster than the fastest peer"))
    return found


def inline(figure, name: str) -> str:
    """A figure as an <svg> whose ids cannot meet another's."""
    import matplotlib

    from .plots import TIDY

    text = io.StringIO()
    with matplotlib.rc_context(TIDY):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'((?:id="|href="#|url\(#))', rf"\g<1>{name}-", svg)
