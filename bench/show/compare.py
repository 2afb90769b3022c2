"""`pygpt bench --compare A.json B.json`: what became slower or faster, beyond what the measurements spread."""

from dataclasses import dataclass
from pathlib import Path

from pygpt.progress import table as aligned

from ..timing import results
from ..timing.results import Entry, Result
from . import table


@dataclass(frozen=True)
class Change:
    row: Result
    old: Entry
    new: Entry

    @property
    def factor(self) -> float:
        """Time now over time then."""
        return self.new.ms / self.old.ms

    @property
    def word(self) -> str:
        word = results.compared(self.new, self.old)
        return "same" if word == "even" else word

    @property
    def regression(self) -> bool:
        return self.new.ours and self.word == "slower"


def changes(old: list[Result], new: list[Result]) -> list[Change]:
    """Pairs every candidate that both runs measured."""
    before = {str(row): row.entries for row in old}
    pairs = ((row, before.get(str(row), {}).get(name), entry) for row in new for name, entry in row.entries.items())
    return [Change(row, then, now) for row, then, now in pairs if then is not None]


def show(first: Path, second: Path) -> int:
    """Prints the comparison -> 1 where one of ours became slower or failed, else 0.

    UsageError if the runs have nothing in common.
    """
    documents = [results.read(path) for path in (first, second)]
    old, new = (results.results(document) for document in documents)
    compared = changes(old, new)
    if not compared:
        raise results.UsageError(f"{first} and {second} have no row in common")
    heads = [table.head(document["pygpt"]["machine"]) for document in documents]
    print("\n".join(dict.fromkeys(heads)))
    if heads[0].splitlines()[:2] != heads[1].splitlines()[:2]:
        print("These are two machines or set-ups: what differs may be theirs.")
    print(changes_table([change for change in compared if change.new.ours or change.word != "same"]))
    then, now = ({(str(row), entry.name) for row in rows for entry in row.ours} for rows in (old, new))
    failed = [set(table.failures(document["pygpt"])) for document in documents]
    for what in sorted(failed[1] - failed[0]):
        print(f"FAILED in {second} only: {what}")
    if gone := then ^ now:
        print(f"{len(gone)} timings of ours are in one file only")
    bad = sum(change.regression for change in compared)
    ours = sum(change.new.ours for change in compared)
    print(f"{bad} of {ours} timings of ours became slower by more than their spread")
    return 1 if bad or failed[1] - failed[0] else 0


def changes_table(shown: list[Change]) -> str:
    columns = dict.fromkeys(("op", "shape", "dtype", "direction", "candidate"), "<")
    columns |= dict.fromkeys(("A ms", "B ms", "B/A", "spread", "A MB", "B MB"), ">") | {"": "<"}
    lines = []
    for c in sorted(shown, key=lambda change: -change.factor):
        word = "REGRESSION" if c.regression else c.word
        lines.append((
            c.row.op, c.row.shape, c.row.dtype, c.row.direction, c.new.name,
            table.number(c.old.ms, 4), table.number(c.new.ms, 4), f"{c.factor:.2f}",
            f"{results.margin(c.old, c.new):.0%}", table.megabytes(c.old.memory), table.megabytes(c.new.memory),
            (word, {"REGRESSION": "bold red", "faster": "green"}.get(word, "")),
        ))  # fmt: skip
    return aligned(columns, lines)
