"""The run as one HTML file that needs nothing else: figures are inline SVG, style and script are in it."""

import io
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from statistics import geometric_mean

from pygpt.files import atomic

from ..timing.results import Result, verdict
from . import table

TEMPLATE = Path(__file__).with_name("page.html")
TITLES = {
    "ratios": "Ours beside PyTorch eager",
    "speed": "Speed by sequence length",
    "memory": "Memory of a call",
    "roofline": "Ours and the machine's measured limits",
    "training": "Training",
}
WAYS = {"forward": "forward", "backward": "backward", "step": "training", "token": "decoding"}


def write(path: Path, rows: list[Result], about: dict, figures: dict):
    from jinja2 import Environment  # PyTorch depends on it

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    page = template.render(
        head=table.head(about["machine"]).splitlines(),
        machine=about["machine"],
        tiles=tiles(rows),
        table=table,
        verdict=verdict,
        figures=[(name, TITLES[name], inline(figure, name)) for name, figure in figures.items()],
        matplotlib=find_spec("matplotlib") is not None,
        peers=list(dict.fromkeys(peer.name for row in rows for peer in row.peers)),
        lines=[(row, entry) for row in rows for entry in row.ours],
        timed=any(row.busy for row in rows),
        slowdowns=table.slowdowns(rows),
        notes=table.notes(about),
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def tiles(rows: list[Result]) -> list[tuple[str, list[tuple], str]]:
    """Per dtype: its name, for each direction the mean ratio to PyTorch eager, and the verdicts counted."""
    per_dtype = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        pairs = [
            (row, entry) for row in rows for entry in row.ours if row.dtype == dtype and row.peers and not row.busy
        ]
        means = []
        for direction, what in WAYS.items():
            ratios = [r for row, entry in pairs if row.direction == direction and (r := row.ratio(entry))]
            if ratios:
                means.append((f"{geometric_mean(ratios):.2f}x", what, len(ratios)))
        words = Counter(verdict(*pair) for pair in pairs)
        per_dtype.append((dtype, means, ", ".join(f"{words[word]} {word}" for word in ("faster", "even", "slower"))))
    return per_dtype


def inline(figure, name: str) -> str:
    """A figure as an <svg> whose ids cannot meet another's."""
    import matplotlib

    from .plots import TIDY, UNDATED

    text = io.StringIO()
    with matplotlib.rc_context(TIDY):
        figure.savefig(text, format="svg", metadata=UNDATED, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'((?:id="|href="#|url\(#))', rf"\g<1>{name}-", svg)
