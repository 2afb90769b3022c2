"""The file log.jsonl of a run of `pygpt train`: the losses of its steps and evaluations."""

import json
from contextlib import suppress
from pathlib import Path

from .data import UsageError
from .files import atomic, naming


class Log:
    """log.jsonl: one JSON object per step or evaluation. Opening a log keeps the entries up to step ``done``.

    UsageError if the file holds anything else. A last line that was cut short when the process died is dropped.
    """

    def __init__(self, path: Path, done: int):
        self.path = path
        text = path.read_bytes() if path.exists() else b""
        lines = text[: text.rfind(b"\n") + 1].split(b"\n")[:-1]
        self.entries = [e for number, line in enumerate(lines, 1) if (e := _entry(path, number, line))["step"] <= done]
        with atomic(path) as temporary:
            temporary.write_text("".join(json.dumps(e) + "\n" for e in self.entries), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed with the process, flushed per line)

    def write(self, **entry: float) -> None:
        self.entries.append(entry)
        try:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
        except OSError as e:
            raise naming(self.path, e) from e

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        points = [(e["step"], e[key]) for e in self.entries if key in e]
        return [step for step, _ in points], [value for _, value in points]


def _entry(path: Path, number: int, line: bytes) -> dict[str, float]:
    with suppress(ValueError, RecursionError):  # the line is not UTF-8, not JSON or nested too deeply
        entry = json.loads(line.decode("utf-8"))
        is_entry = isinstance(entry, dict) and all(isinstance(value, int | float) for value in entry.values())
        if is_entry and isinstance(entry.get("step"), int):
            return entry
    raise UsageError(f"{path} is no log of a training run: line {number} is no step of one; move the file away")
