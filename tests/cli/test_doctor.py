"""`pygpt doctor`: it tries every kernel, tells what is missing with the command that mends it, and never raises."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import pygpt
from pygpt import cli, info
from pygpt.dispatch import TABLE
from pygpt.inspect import machine
from pygpt.inspect.machine import ABSENT, BROKEN, WORKS


@pytest.fixture
def facts():
    return info.gather()


@pytest.fixture
def quick(monkeypatch):
    """Nothing is compiled, and the probes are those of two ops, in this process."""
    monkeypatch.setattr(machine, "diagnose_build", lambda facts: ([], []))
    monkeypatch.setattr(machine, "run_probe", lambda *args: list(machine.probe(*args)))
    for row in list(TABLE.values()):
        monkeypatch.setitem(TABLE, row.name, replace(row, ops=("gelu", "relu")))


def by_name(findings) -> dict:
    return {finding.what: finding for finding in findings}


# ------------------------------------------------------------------------------- the command
def test_doctor_tries_every_kernel(capsys, monkeypatch):
    """In processes of their own. The exit code is 0, as the JSON says."""
    monkeypatch.setenv("TRITON_INTERPRET", "")
    for name in set(TABLE) - {"cpp", "torch"}:  # the interpreter is slow, and a GPU has its own tests
        monkeypatch.setitem(TABLE, name, replace(TABLE[name], kernels=None, missing="not here"))
    monkeypatch.setattr(machine, "gpus", list)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = {finding["what"]: finding["state"] for finding in found["findings"]}
    assert found["healthy"] and states["cpp kernels"] == states["cpp on cpu"] == states["C++ compiler"] == WORKS
    assert states["triton kernels"] == states["cuda kernels"] == ABSENT
    tried = {(probe["op"], probe["dtype"]) for probe in found["probes"]}
    assert tried == {(op, dtype) for op in TABLE["cpp"].ops for dtype in ("float32", "bfloat16")}
    assert not any(probe["error"] for probe in found["probes"])
    (cpu, *_) = found["builds"]
    assert cpu["library"] == "pygpt._C" and cpu["built"] and 20 < cpu["seconds"] < 1e5 and cpu["memory"] > 1e8


def test_what_it_prints(quick, capsys):
    code = cli.main(["doctor"])
    shown = capsys.readouterr().out
    assert code == 0 and shown.endswith("Everything works that ought to.\n")
    assert torch.__version__ in shown and pygpt.__version__ in shown and "2 ops forward and backward" in shown
    for row in TABLE.values():
        assert row.missing in shown


def test_kernels_that_are_missing_are_broken_with_the_command(quick, capsys, monkeypatch):
    """The C++ kernels ought to work everywhere; those of a GPU where torch finds one."""
    reason = "the compiled extension is missing (no file); build it with: pip install --no-build-isolation ."
    monkeypatch.setitem(TABLE, "cpp", replace(TABLE["cpp"], kernels=None, missing=reason))
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert reason in shown and shown.endswith("Something that ought to work does not.\n")


def test_kernels_of_a_gpu(facts, monkeypatch):
    monkeypatch.setitem(TABLE, "cuda", replace(TABLE["cuda"], kernels=None, missing="not built"))
    for found, state in ([], ABSENT), (["NVIDIA H200"], BROKEN):
        monkeypatch.setattr(machine, "gpus", lambda found=found: found)
        monkeypatch.setattr(machine, "gpus_of_the_driver", lambda: ["NVIDIA H200"])
        findings = by_name(machine.diagnose_kernels(facts))
        assert findings["cuda kernels"].state == state and findings["cuda kernels"].detail == "not built"
        assert ("GPU" in findings) == (not found)
    driver = by_name(machine.diagnose_kernels(facts | {"triton": None}))
    assert driver["cuda kernels"].state == BROKEN
    monkeypatch.setitem(TABLE, "cuda", replace(TABLE["cuda"], kernels=object(), missing="", devices=("cpu",),
                                               device_objection=lambda device: f"not for {device}"))  # fmt: skip
    assert by_name(machine.diagnose_kernels(facts))["cuda kernels"].detail == "not for cpu"


def test_the_driver_knows_gpus_that_torch_cannot_use(facts, monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200'; echo 'NVIDIA L4'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "gpus", list)
    finding = by_name(machine.diagnose_kernels(facts))["GPU"]
    assert finding.state == ABSENT and finding.mend and torch.__version__ in finding.detail
    assert finding.detail.startswith("NVIDIA H200, NVIDIA L4: torch cannot use it")


# ------------------------------------------------------------------------------- probes
def test_a_wrong_kernel_is_found(quick, capsys, monkeypatch):
    """One that is off by more than rounding, and one that raises. The other op passes."""
    row = TABLE["cpp"]
    wrong = SimpleNamespace(
        gelu_fwd=lambda *args: row.kernels.gelu_fwd(*args) * (1 + 1e-3),
        gelu_bwd=row.kernels.gelu_bwd,
        relu_fwd=row.kernels.relu_fwd,
        relu_bwd=row.kernels.relu_bwd,
    )
    monkeypatch.setitem(TABLE, "cpp", replace(row, kernels=wrong))
    errors = {(p.op, p.dtype): p.error for p in machine.probe("cpp", "cpu")}
    assert "fwd's error is 1.0e-03, PyTorch's" in errors["gelu", "float32"]
    assert errors["relu", "float32"] == errors["relu", "bfloat16"] == ""

    def raises(*args):
        raise RuntimeError("an illegal access\nwas encountered")

    wrong.gelu_fwd = raises
    assert {p.error for p in machine.probe("cpp", "cpu") if p.op == "gelu"} == {"RuntimeError: was encountered"}
    assert cli.main(["doctor"]) == 1
    assert "cpp on cpu" in (shown := capsys.readouterr().out) and "2 of 4 calls fail, first gelu float32" in shown


def test_a_process_that_dies_is_an_error_of_its_op(monkeypatch):
    """As one does that runs an instruction which the processor does not have."""
    one = machine.Probe("cpp", "cpu", "attention", "float32", "")
    source = f"import json, os; print(json.dumps({one.__dict__!r}), flush=True); os.abort()"
    monkeypatch.setattr(machine, "PROBE", source)
    first, died = machine.run_probe("cpp", "cpu")
    assert first == one and died.op == "attention" and died.error.startswith("the process ended with -6")
    (finding,) = machine.probe_findings([first, died])
    assert finding.state == BROKEN and "1 of 2 calls fail" in finding.detail


def test_a_process_that_hangs_is_an_error(monkeypatch):
    monkeypatch.setattr(machine, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.5)
    (probe,) = machine.run_probe("cpp", "cpu")
    assert probe.error == "no answer in 0.5 seconds" and probe.op == TABLE["cpp"].ops[0]


# ------------------------------------------------------------------------------- the build
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler(compiler, facts, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    findings, builds = machine.diagnose_build(facts)
    assert not builds and findings[0].state == ABSENT and "apt install g++" in findings[0].mend
    assert findings[0].detail.startswith(f"{compiler} does not compile")


def test_outside_a_checkout(facts, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    (finding,), builds = machine.diagnose_build(facts)
    assert not builds and "the sources are in a checkout" in finding.detail


@pytest.mark.parametrize("variable, value", [("MAX_JOBS", "many"), ("PYGPT_BUILD_CUDA", "2")])
def test_a_bad_setting_is_told(variable, value, facts, monkeypatch):
    monkeypatch.setenv(variable, value)
    (finding,), builds = machine.diagnose_build(facts)
    assert not builds and finding.state == ABSENT and f"{variable} must be" in finding.detail


def test_the_prediction_follows_the_machine(facts, monkeypatch):
    """Twice as slow a compiler, or half the jobs, take twice as long; half the jobs need half the memory."""
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)

    def build(seconds, jobs):
        monkeypatch.setattr(machine, "compile_once", lambda *args: (seconds, ""))
        monkeypatch.setenv("MAX_JOBS", str(jobs))
        return machine.diagnose_build(facts)[1][0]

    one, slow, narrow = build(2.0, 4), build(4.0, 4), build(2.0, 2)
    assert slow.seconds == narrow.seconds == 2 * one.seconds and one.memory == slow.memory == 2 * narrow.memory
    assert build(2.0, 64).seconds == one.seconds  # there are four cores


def test_cuda_may_be_left_out(facts, monkeypatch):
    monkeypatch.setenv("PYGPT_BUILD_CUDA", "0")
    findings, builds = machine.diagnose_build(facts)
    assert by_name(findings)["nvcc"].detail == "left out by PYGPT_BUILD_CUDA=0"
    assert [build.library for build in builds] == ["pygpt._C"]
