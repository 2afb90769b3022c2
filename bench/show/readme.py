"""`pygpt bench --update-readme`: the README's table and plots, from the newest day's longest run in bench/results/."""

from pathlib import Path

from pygpt.data import UsageError
from pygpt.files import atomic

from . import plots, report, results

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- speed: written by pygpt bench --update-readme -->", "<!-- end of speed -->"
SHOWN = {"ratios": "speed over PyTorch eager's", "speed": "speed by sequence length", "roofline": "roofline"}


def update(readme: Path = README, folder: Path = report.RESULTS) -> int:
    """UsageError where there is nothing to write, or no place for it."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"{readme} must have the lines\n{BEGIN} and\n{END}, with what is to be rewritten in between")
    path = newest(folder)
    document = results.read(path)
    rows, machine = results.rows(document), results.about(document)["machine"]
    figures = plots.all_figures(rows, machine, {})
    if figures is None:
        raise UsageError("the README's plots need matplotlib: pip install matplotlib")
    figures = {name: figure for name, figure in figures.items() if name in SHOWN}
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in figures.items():
        plots.write(figure, folder / "plots" / f"{name}.svg")
    place = (folder / "plots").relative_to(readme.parent).as_posix()
    parts = [table(rows, machine), *(f"![{SHOWN[name]}]({place}/{name}.svg)" for name in figures)]
    link = f"[{path.name}]({path.relative_to(readme.parent).as_posix()})"
    parts.append(f"(`{machine['command']}`, {machine['date'][:10]}: {link})")
    with atomic(readme) as temporary:
        temporary.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + after, encoding="utf-8")
    print(f"{readme.name}: table and {len(figures)} plots from {path}")
    return 0


def newest(folder: Path) -> Path:
    """By the day inside, of one day's the longest, of equals the last; files of other kinds are passed over."""
    dated = {}
    for path in folder.glob("*.json"):
        try:
            document = results.read(path)
            date = results.about(document)["machine"]["date"]
            dated[path] = date[:10], len(results.rows(document)), date
        except UsageError:
            continue
    if not dated:
        raise UsageError(f"no run in pytest-benchmark's format in {folder}; pygpt bench --save writes one")
    return max(dated, key=dated.get)


def table(rows: list, machine: dict) -> str:
    """Standard rows of the first dtype there is: PyTorch eager's time over ours, and our share of the peak."""
    rows = results.standard(rows)
    dtype = next((row.dtype for row in rows), None)
    cells: dict[tuple, dict] = {}
    for row in rows:
        if row.dtype == dtype:
            entry = row.ours[0]
            ratio = report.ratio(row, entry, "eager")
            text = f"{ratio}x ({entry.share:.0%})" if ratio else f"{entry.share:.0%} of the peak"
            cells.setdefault((row.op, row.shape), {})[row.direction] = text
    lines = [f"| {dtype} | forward | backward |", "|---|---|---|"]
    for (op, shape), found in cells.items():
        both = [found.get(way, "") for way in ("forward", "backward")]
        lines.append(f"| {op}, {shape} | {' | '.join([found['step'], ''] if 'step' in found else both)} |")
    told = "PyTorch eager's time over ours, and our share of what the machine itself did in the same run"
    return "\n".join([f"{'; '.join(report.head(machine).splitlines())}. {told}:", "", *lines])
