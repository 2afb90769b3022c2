"""`pygpt bench --update-readme`: the speed table and plots of a page, from a run in bench/results/.

The run is the longest of the newest day; the page is the one that has the two lines BEGIN and END.
"""

import os
from pathlib import Path

from pygpt.data import UsageError
from pygpt.files import atomic

from ..timing import results
from ..timing.results import Result
from . import plots, table

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
BEGIN, END = "<!-- speed: written by pygpt bench --update-readme -->", "<!-- end of speed -->"
SHOWN = {"ratios": "speed over PyTorch eager's", "speed": "speed by sequence length", "roofline": "roofline"}


def update(pages: tuple[Path, ...] = PAGES, folder: Path = results.RESULTS) -> int:
    """UsageError where there is nothing to write, or no page that has the lines."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages if page.is_file()}
    page = next((page for page, text in texts.items() if BEGIN in text and END in text.partition(BEGIN)[2]), None)
    if page is None:
        names = " or ".join(str(page) for page in pages)
        raise UsageError(f"{names} must have the lines\n{BEGIN} and\n{END}, between which the table is written")
    before, _, rest = texts[page].partition(BEGIN)
    path = newest(folder)
    if path is None:
        raise UsageError(f"no run in pytest-benchmark's format in {folder}; pygpt bench --save writes one")
    document = results.read(path)
    rows, machine = results.results(document), document["pygpt"]["machine"]
    figures = plots.all_figures(rows, machine, {})
    if figures is None:
        raise UsageError("the plots need matplotlib: pip install matplotlib")
    figures = {name: figure for name, figure in figures.items() if name in SHOWN}
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in figures.items():
        plots.write(figure, folder / "plots" / f"{name}.svg")
    link = lambda target: Path(os.path.relpath(target, page.parent)).as_posix()
    parts = [speed_table(rows, machine)]
    parts += [f"![{SHOWN[name]}]({link(folder / 'plots' / f'{name}.svg')})" for name in figures]
    parts.append(f"(`{machine['command']}`, {machine['date'][:10]}: [{path.name}]({link(path)}))")
    with atomic(page) as temporary:
        text = before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + rest.partition(END)[2]
        temporary.write_text(text, encoding="utf-8")
    print(f"{page.name}: table and {len(figures)} plots from {path}")
    return 0


def newest(folder: Path) -> Path | None:
    """The run for the page must have standard rows in float32; a sweep has none."""
    return results.newest(folder, lambda path, rows: any(row.standard and row.dtype == "float32" for row in rows))


def speed_table(rows: list[Result], machine: dict) -> str:
    """Standard rows of the first dtype: for each direction our speed over PyTorch eager's and the fastest peer's."""
    rows = results.standard(rows)
    dtype = next((row.dtype for row in rows), None)
    cells: dict[tuple, dict] = {}
    for row in rows:
        if row.dtype == dtype:
            ours = row.ours[0]
            eager = table.ratio(row, ours, "eager")
            share = f" ({table.percent(ours.share)})" if ours.share else ""
            pair = (f"{eager}x" if eager else "-") + share, table.fastest_peer(row, ours) or "-"
            cells.setdefault((row.op, row.shape), {})[row.direction] = pair
    lines = [f"| {dtype} | forward | fastest peer | backward | fastest peer |", "|---|---|---|---|---|"]
    for (op, shape), ways in cells.items():
        whole = ways.get("step") or ways.get("token")
        pairs = [whole, ("", "")] if whole else [ways.get(way, ("", "")) for way in ("forward", "backward")]
        lines.append(f"| {op}, {shape} | {' | '.join(cell for pair in pairs for cell in pair)} |")
    head = "; ".join(table.head(machine).splitlines())
    caption = "PyTorch eager's time over ours (our share of the peak); the fastest peer, and its time over ours"
    return "\n".join([f"{head}. {caption}:", "", *lines])
