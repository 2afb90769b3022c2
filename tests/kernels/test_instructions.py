"""The kernels execute no more instructions than bench/instructions/figures.json says, and more would be noticed."""

import json

import pytest

from bench.instructions import count as instructions
from bench.instructions.count import MARGIN, Case

FIGURES = {"relu_fwd": 10_000, "relu_bwd": 20_000}
CASES = [Case(name, 5_000, n) for name, n in FIGURES.items()]


@pytest.fixture
def committed():
    """The figures of this machine's compiler."""
    if why := instructions.missing():
        pytest.skip(why)
    key = instructions.target()
    if key not in instructions.figures():
        pytest.skip(f"no figures of {key}: record them with python -m bench.instructions --save")
    return instructions.figures()[key]


def test_no_kernel_executes_more(committed, tmp_path):
    driver = instructions.build(tmp_path)
    cases = instructions.count(driver)
    print(instructions.table(cases, committed))
    assert not instructions.faults(cases, committed)
    part = [case for case in cases if "gelu_fwd" in case.name]
    assert part and instructions.count(driver, "gelu_fwd") == part  # to the instruction


@pytest.mark.slow  # it builds the kernels
def test_worse_code_fails(committed, tmp_path):
    cases = instructions.count(instructions.build(tmp_path, "-O1"), "f32 M64 K400")
    assert [instructions.verdict(case, committed) for case in cases] == ["SLOWER"] * 2


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """main() where CASES are what is counted: run(figures, *arguments) -> (exit code, what it printed)."""
    monkeypatch.setattr(instructions, "missing", lambda: "")
    monkeypatch.setattr(instructions, "target", lambda: "g++ 99 avx2")
    monkeypatch.setattr(instructions, "build", lambda folder: folder)
    monkeypatch.setattr(instructions, "count", lambda driver, part: [case for case in CASES if part in case.name])
    monkeypatch.setattr(instructions, "FIGURES", tmp_path / "figures.json")

    def main(figures, *arguments):
        instructions.FIGURES.write_text(json.dumps(figures))
        return instructions.main(list(arguments)), capsys.readouterr().out

    return main


def lowered(by: float) -> dict:
    return {"g++ 99 avx2": FIGURES | {"relu_bwd": round(20_000 / (1 + by))}}


@pytest.mark.parametrize(
    "figures, code, said",
    [
        (lowered(0), 0, "none above"),
        (lowered(0.9 * MARGIN), 0, "none above"),
        (lowered(1.1 * MARGIN), 1, "relu_bwd: SLOWER"),
        (lowered(-1.1 * MARGIN), 0, "faster"),
        ({"g++ 99 avx2": {"relu_fwd": 10_000}}, 1, "relu_bwd: NO FIGURE"),
        ({"g++ 99 avx2": FIGURES | {"gelu_fwd": 1}}, 1, "gelu_fwd: GONE"),
        ({"g++ 12 avx2": {"relu_fwd": 1}}, 0, "no figures of g++ 99 avx2"),
    ],
)
def test_main(run, figures, code, said):
    found, out = run(figures)
    assert found == code and said in out


def test_a_part_is_held_to_its_own_figures(run):
    assert run(lowered(0.5), "relu_fwd")[0] == 0
    with pytest.raises(SystemExit):
        run({}, "no such case")


def test_save(run):
    other = {"g++ 12 avx2": {"relu_fwd": 1}}
    assert run(other | lowered(0.5), "--save")[0] == 0
    assert instructions.figures() == other | {"g++ 99 avx2": FIGURES}
    with pytest.raises(SystemExit):
        run(other, "relu_fwd", "--save")


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(instructions, "CXX", ["no-such-compiler"])
    assert "no-such-compiler" in instructions.missing()
    with pytest.raises(SystemExit):
        instructions.main([])
