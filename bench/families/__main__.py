"""The command line: see the package's __init__.py."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pygpt.files import atomic

from ..cli import positive
from . import __doc__ as description
from . import parallel, speed, ways
from .models import FAMILIES, Size

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLES = "speed", "ways", "parallel"


def with_table(page: str, name: str, table: str) -> str:
    """The page with this table in the place of the old one of that name."""
    begin, end = f"<!-- {name}: written by python -m bench.families --write -->\n", "\n<!-- end of table -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if not rest or not after:
        raise ValueError(f"{PAGE} has no place for the table {name}")
    return before + begin + table + end + after


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.families", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES), help="default: %(default)s")
    parser.add_argument("--families", help=f"comma-separated, of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each ratio of times; 0 measures no speed")
    parser.add_argument("--steps", type=positive(int), default=20, help="of each model in two processes")
    parser.add_argument("--threads", type=positive(int), default=torch.get_num_threads())
    parser.add_argument("--width", type=positive(int), default=512, help="of the models that are timed")
    parser.add_argument("--layers", type=positive(int), default=4)
    parser.add_argument("--length", type=positive(int), default=256, help="tokens of each sequence")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    args = parser.parse_args()
    names, wanted = (args.families or ",".join(FAMILIES)).split(","), args.tables.split(",")
    for option, given, known in (("families", names, FAMILIES), ("tables", wanted, TABLES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"--{option}: unknown {unknown[0]!r}; known: {', '.join(known)}")
    if args.write:
        for name in wanted:
            with_table(PAGE.read_text(encoding="utf-8"), name, "")  # an error comes before anything runs
    torch.set_num_threads(args.threads)
    size = Size(args.width, args.layers, 8192, args.length)
    tables: dict[str, Callable[[], Iterator[str]]] = {
        "speed": lambda: speed.lines(names, size, args.seconds),
        "ways": lambda: ways.lines(names, Size()),
        "parallel": lambda: parallel.lines(names, size, args.steps),
    }
    for name in wanted:
        lines = []
        for line in tables[name]():
            print(line, flush=True)
            lines.append(line)
        if args.write:
            with atomic(PAGE) as path:
                path.write_text(with_table(PAGE.read_text(encoding="utf-8"), name, "\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
