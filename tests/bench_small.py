"""A small benchmark suite on a machine known beforehand, for the tests of `pygpt bench`."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import cli as command
from bench.cases import gpt, ops
from bench.show import plots
from bench.timing import clocks, machine, race, results
from bench.timing.results import Result
from pygpt import cli

DTYPES = tuple(ops.DTYPES)
PEAKS = clocks.Peaks(dict.fromkeys(DTYPES, 100.0), dict.fromkeys(DTYPES, "guess"), 10.0, 10.0, 1.0)
TINY = [
    ops.case(ops.attention, 1, 2, 16, 16, 8, True, standard=DTYPES),
    ops.case(ops.attention, 1, 2, 32, 32, 8, True, standard=DTYPES),
    ops.case(ops.linear, 8, 16, 24, standard=DTYPES),
    ops.case(ops.layer_norm, 8, 16, standard=DTYPES),
    ops.case(ops.relu, (8, 16), standard=DTYPES),
]
FEW = ["--backends=torch", "--peers=eager", "--seconds=1e-9", "--dtypes=float32", "--out=out"]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A small suite on a machine known beforehand, in an empty folder."""
    monkeypatch.setattr(machine, "cpu", lambda: ("Some CPU", {"avx2"}))
    monkeypatch.setattr(clocks.CpuClock, "peaks", lambda self, dtypes, quick: PEAKS)
    monkeypatch.setattr(clocks, "BLOCK", 1e-6)
    monkeypatch.setattr(race, "FEWEST", {float("inf"): 5})
    monkeypatch.setattr(race, "BUSY_BLOCK", 1e-6)
    monkeypatch.setattr(clocks.CpuClock, "estimate", lambda self, call: self.once(call, 2))
    monkeypatch.setattr(clocks, "last_level_cache", lambda: 1)
    monkeypatch.setattr(ops, "CPU", TINY)
    monkeypatch.setattr(gpt, "CASES", [])
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would measure nothing
    monkeypatch.delenv("PYGPT_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plain(monkeypatch):
    """Without plots, which take longer than all the rest."""
    monkeypatch.setattr(plots, "all_figures", lambda *args: {})


def bench(*arguments) -> int:
    return cli.main(["bench", *map(str, arguments)])


def document(path="out/bench.json") -> dict:
    return json.loads(Path(path).read_text())


def rows(path="out/bench.json") -> list[Result]:
    return results.results(results.read(Path(path)))


def options(*arguments):
    parser = cli._Parser()
    command.add_arguments(parser)
    return command.complete(parser.parse_args([*FEW, *arguments]))
