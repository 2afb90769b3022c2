"""The table of who takes what of a training step."""

import pytest
import torch

from bench import amdahl


def test_the_parts_of_a_step(capsys):
    amdahl.main(["--model", "tiny", "--repeats", "1", "--dropout", "0.1"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    parts = {cells[0]: cells[1:] for cells in lines[2:]}
    assert parts.keys() >= {"optimizer", "loss", "norms", "linear and mlp", "step"}
    whole = float(parts.pop("step")[0])
    assert sum(float(cells[0]) for cells in parts.values()) == pytest.approx(whole, rel=0.02, abs=1)


def test_an_operation_belongs_to_the_region_around_it():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        with torch.profiler.record_function("clip"):
            torch.ones(3).norm()
        torch.nn.functional.layer_norm(torch.ones(2, 3), (3,))
        torch.ones(3).sort()
    parts = {event.name: amdahl.part_of(event) for event in recorded.events()}
    assert parts["aten::linalg_vector_norm"] == "gradient clipping"
    assert parts["aten::native_layer_norm"] == "norms" and parts["aten::sort"] == "rest"


def test_the_table_adds_up():
    best = {
        "torch": dict.fromkeys(amdahl.PARTS, 0.0) | {"loss": 30.0, "norms": 70.0},
        "cpp": dict.fromkeys(amdahl.PARTS, 0.0) | {"loss": 10.0, "norms": 40.0},
    }
    assert amdahl.table(best).splitlines()[2:] == [
        "| loss | 30.0 | 30.0% | 10.0 | 20.0% | 3.00 | 1.25x |",
        "| norms | 70.0 | 70.0% | 40.0 | 80.0% | 1.75 | 5.00x |",
        "| step | 100.0 | | 50.0 | | 2.00 | |",
    ]
