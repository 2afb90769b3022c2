"""Draws the README's chart and writes three tables of docs/performance.md, from the runs saved in bench/results/.

    python docs/chart.py

A figure is PyTorch eager's time over ours, forward and backward together, at the first shape of an op. The chart shows
the longest run of the newest day. Its axis is logarithmic and starts at 1, where both take equally long. The table has
a line for each machine, instruction set and dtype, taken from the newest run that got at least 90 % of its cores. The
second table has the newest measurements of attention's options and of a training step's other ops. The third one has
every row whose newest measurement is slower than PyTorch eager's, by more than the two spread.
"""

import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the checkout, whose bench/ this reads

from bench.timing import results
from bench.timing.results import RESULTS, recency

COLOURS = {"float32": "#30638e", "bfloat16": "#d1495b"}
LEFT, TOP, ROW, BAR, RIGHT, WIDTH = 300, 62, 34, 13, 60, 720  # pixels
OPS = "attention", "linear", "mlp", "layer_norm", "add_layer_norm", "rms_norm", "gelu", "relu", "gpt"
FURTHER_OPS = (
    "attention_mask", "attention_window", "attention_gqa", "varlen_attn", "qkv_attention", "rope",
    "dropout_add_layer_norm", "dropout_add_rms_norm", "cross_entropy", "linear_cross_entropy",
)  # fmt: skip
DIRECTIONS = "forward", "backward"


def saved_runs() -> list[dict]:
    """The runs of pygpt bench, oldest first; files in other formats do not count."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    return sorted((run for run in runs if "pygpt" in run and "benchmarks" in run), key=date)


def date(run: dict) -> str:
    return run["pygpt"]["machine"]["date"]


def newest(runs: list[dict]) -> dict:
    """The longest run of the newest day, of those that have every dtype of the chart."""
    return max((run for run in runs if COLOURS.keys() <= ratios(run).keys()), key=recency)


def ratios(run: dict) -> dict[str, dict[tuple, float]]:
    """dtype -> (op, shape) -> PyTorch eager's seconds over ours, summed over forward and backward."""
    shapes, seconds = {}, {}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        op, shape, candidate = info["op"], info["shape"], info["candidate"]
        counts = info["standard"] and op in OPS and candidate in ("cpp", "eager")
        if counts and shape == shapes.setdefault(op, shape):
            row = seconds.setdefault(info["dtype"], {}).setdefault((op, shape), dict.fromkeys(("cpp", "eager"), 0.0))
            row[candidate] += benchmark["stats"]["median"]
    return {
        dtype: {
            key: rows[key]["eager"] / rows[key]["cpp"]
            for key in sorted(rows, key=lambda key: OPS.index(key[0]))
            if all(rows[key].values())
        }
        for dtype, rows in seconds.items()
    }


# ------------------------------------------------------------------------------- the table
def table(runs: list[dict]) -> str:
    """Lines without attention, the op that matters most, are left out."""
    lines = {}
    for run in runs:
        about = run["pygpt"]["machine"]
        if about["cpu_share"] >= 0.9:
            for dtype, row in ratios(run).items():
                known = lines.setdefault((about["cpu"], about["isa_ours"], dtype), {})
                known.update({op: f"{ratio:.2f}" for (op, _), ratio in row.items()})
    head = "| machine | instruction set | dtype | " + " | ".join(OPS) + " |"
    cells = [
        f"| {' | '.join([cpu.replace('(R)', ''), isa, dtype, *(row.get(op, '') for op in OPS)])} |"
        for (cpu, isa, dtype), row in lines.items()
        if "attention" in row
    ]
    return "\n".join([head, "|---" * (3 + len(OPS)) + "|", *sorted(cells)])


def newest_rows(runs: list[dict]) -> dict[tuple, results.Result]:
    """(machine, instruction set, row) -> its newest measurement of ours beside PyTorch eager's."""
    return {
        (about["cpu"].replace("(R)", ""), about["isa_ours"], str(row)): row
        for run in runs
        for about in (run["pygpt"]["machine"],)
        for row in results.results(run)
        if {"cpp", "eager"} <= row.entries.keys()
    }


def ratio(row: results.Result) -> str:
    """PyTorch's time over ours, in three digits."""
    value = row.ratio(row.entries["cpp"])
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def further(runs: list[dict]) -> str:
    """A line for each machine, instruction set, op, shape and dtype."""
    lines: dict[tuple, dict[str, str]] = {}
    for (cpu, isa, _), row in newest_rows(runs).items():
        if row.op in FURTHER_OPS:
            key = FURTHER_OPS.index(row.op), cpu, isa, row.shape, row.dtype
            lines.setdefault(key, {})[row.direction] = ratio(row)
    head = "| op | shape | dtype | machine | instruction set | forward | backward |"
    cells = [
        f"| {' | '.join([FURTHER_OPS[op], shape, dtype, cpu, isa, *(found.get(d, '') for d in DIRECTIONS)])} |"
        for (op, cpu, isa, shape, dtype), found in sorted(lines.items())
    ]
    return "\n".join([head, "|---" * 7 + "|", *cells])


def slower(runs: list[dict]) -> str:
    """A line for each machine, instruction set and row."""
    lines = [
        f"| {' | '.join([cpu, isa, row.op, row.shape, row.dtype, row.direction, ratio(row)])} |"
        for (cpu, isa, _), row in sorted(newest_rows(runs).items())
        if results.compared(row.entries["cpp"], row.entries["eager"]) == "slower"
    ]
    head = "| machine | instruction set | op | shape | dtype | direction | ratio |"
    return "\n".join([head, "|---" * 7 + "|", *lines])


TABLES = {"machines": table, "further": further, "slower": slower}


def with_tables(page: str, runs: list[dict]) -> str:
    for name, write in TABLES.items():
        begin, end = f"<!-- {name}: written by docs/chart.py -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{write(runs)}\n{end}{rest.partition(end)[2]}"
    return page


# ------------------------------------------------------------------------------- the chart
def machine(run: dict) -> str:
    about = run["pygpt"]["machine"]
    isa = about["isa_ours"].upper().replace("_BF16", " with bfloat16 products")
    return (
        f"{about['cpu']}, {isa}, {about['threads']} threads, PyTorch {about['torch'].split('+')[0]}, {date(run)[:10]}"
    )


def label(op: str, shape: str) -> str:
    return f"{'GPT training step' if op == 'gpt' else op}, {shape}".replace("->", "to")


def draw(run: dict) -> str:
    """The chart as the text of an SVG."""
    found = ratios(run)
    rows = list(found["float32"])
    largest = max(ratio for dtype in COLOURS for ratio in found[dtype].values())
    bottom = TOP + ROW * len(rows)

    def x(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * max(0.0, math.log(ratio)) / math.log(largest)

    def text(at: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{at:.0f}" y="{y:.0f}" {more}>{words}</text>'

    size = f'viewBox="0 0 {WIDTH} {bottom + 30}" width="{WIDTH}"'
    font = 'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222222"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        f'<rect width="{WIDTH}" height="{bottom + 30}" fill="#ffffff"/>',
        text(12, 22, "Times as fast as PyTorch eager, forward and backward", 'font-size="15" font-weight="bold"'),
        text(12, 42, machine(run), 'fill="#666666"'),
    ]
    for i, (dtype, colour) in enumerate(COLOURS.items()):
        at = WIDTH - 180 + 84 * i
        parts += [f'<rect x="{at}" y="32" width="11" height="11" fill="{colour}"/>', text(at + 16, 42, dtype)]
    for tick in [t for t in (1, 1.5, 2, 3, 5, 10, 20, 50, 100) if t <= largest]:
        line = f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 6}" y2="{bottom}"'
        parts += [f'{line} stroke="#dddddd"/>', text(x(tick), bottom + 17, f"{tick:g}x", 'text-anchor="middle"')]
    for i, row in enumerate(rows):
        y = TOP + ROW * i
        parts.append(text(LEFT - 10, y + BAR + 4, label(*row), 'text-anchor="end"'))
        for j, (dtype, colour) in enumerate(COLOURS.items()):
            top, ratio = y + BAR * j, found[dtype][row]
            bar = f'<rect x="{LEFT}" y="{top}" width="{x(ratio) - LEFT:.1f}" height="{BAR - 1}"'
            parts += [f'{bar} fill="{colour}"/>', text(x(ratio) + 5, top + BAR - 2, f"{ratio:.2f}")]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    runs, page = saved_runs(), HERE / "performance.md"
    (HERE / "speed.svg").write_text(draw(newest(runs)), encoding="utf-8")
    page.write_text(with_tables(page.read_text(encoding="utf-8"), runs), encoding="utf-8")
