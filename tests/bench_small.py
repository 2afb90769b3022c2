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
from bench.options import complete
from bench.show import plots, results
from bench.show.results import Result
from bench.timing import clocks as harness
from pygpt import cli

PEAKS = harness.Peaks({"float32": 100.0, "bfloat16": 100.0, "float16": 100.0}, "guess", 10.0, 10.0, 1.0)
TINY = [
    ops.case(ops.attention, 1, 2, 16, 16, 8, True, standard=ops.ALL),
    ops.case(ops.attention, 1, 2, 32, 32, 8, True, standard=ops.ALL),
    ops.case(ops.linear, 8, 16, 24, standard=ops.ALL),
    ops.case(ops.layer_norm, 8, 16, standard=ops.ALL),
    ops.case(ops.relu, 8, 16, standard=ops.ALL),
]
FEW = ["--backends=torch", "--peers=eager", "--seconds=1e-9", "--dtypes=float32", "--out=out"]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A small suite on a machine known beforehand, in an empty folder."""
    import cpuinfo
    import pytest_benchmark.plugin

    known = {"brand_raw": "Some CPU", "flags": ["avx2"]}
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: dict(known))
    monkeypatch.setattr(pytest_benchmark.plugin, "get_commit_info", lambda name: {"id": "abc"})
    monkeypatch.setattr(harness, "measure_peaks", lambda dtypes, quick: PEAKS)
    monkeypatch.setattr(harness, "BLOCK", 1e-6)
    monkeypatch.setattr(harness, "LEAST", {float("inf"): 5})
    monkeypatch.setattr(harness.CpuClock, "estimate", lambda self, call: harness._block(call, 2))
    monkeypatch.setattr(harness, "last_level_cache", lambda: 1)
    monkeypatch.setattr(ops, "CASES", TINY)
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
    return results.rows(results.read(Path(path)))


def options(*arguments):
    parser = cli._Parser()
    command.add_arguments(parser)
    return complete(parser.parse_args([*FEW, *arguments]))
