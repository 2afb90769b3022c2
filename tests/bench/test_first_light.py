"""The first minutes on a GPU, rehearsed: steps under time limits, what a killed run leaves, each step's work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench.cases import goals, ops
from bench.first_light import checks as gpu_checks
from bench.first_light import plan as first_light
from bench.first_light import steps
from bench.first_light.steps import REFUSED, Runner, Step


def source(name: str, code: str, seconds: float = 60, **how) -> Step:
    return Step(name, seconds, (sys.executable, "-c", code), **how)


def summary(folder: Path) -> dict:
    return {step["step"]: step for step in json.loads((folder / "summary.json").read_text())["steps"]}


# ------------------------------------------------------------------------------- steps
def test_no_step_takes_another_down(tmp_path, capfd):
    runner = Runner(tmp_path, 100)
    runner.run(source("good", "print('warm'); print('3 rows in 1 s'); print('bye')", result=" rows in "))
    runner.run(source("bad", "print('why'); exit(9)"))
    runner.run(source("crash", "import os; print('x', flush=True); os.abort()"))
    runner.run(source("refused", f"print('no such tool'); exit({REFUSED})"), source("silent", ""))
    runner.run(Step("absent", 5, ("/nowhere/at/all",)))
    runner.run(source("optional", "exit(1)", optional=True))
    found = summary(tmp_path)
    names = ("good", "bad", "crash", "optional")
    assert [(found[name]["verdict"], found[name]["result"]) for name in names] == [
        ("ok", "3 rows in 1 s"), ("failed (9)", "why"), ("failed (-6)", "x"), ("failed (1)", "no result")
    ]  # fmt: skip
    assert found["refused"]["verdict"] == "refused" and found["silent"]["verdict"] == "ok"
    assert "/nowhere/at/all" in found["absent"]["result"] and found["absent"]["verdict"] == "failed (127)"
    assert [o.step for o in runner.outcomes if o.failed] == ["bad", "crash", "absent"]
    assert "[good] warm" in (tmp_path / "log.txt").read_text() and "--- bad" in capfd.readouterr().out


def test_steps_end_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "GRACE", 0.5)
    polite = "trap 'echo 3 passed; exit' INT; echo on; sleep 60 & wait"
    deaf = "trap '' TERM; echo on; sleep 60"
    shell = lambda name, code, **how: Step(name, 2, ("/bin/sh", "-c", code), **how)
    began = time.monotonic()
    runner = Runner(tmp_path, 30)
    runner.run(shell("polite", polite, stop=signal.SIGINT), shell("deaf", deaf))
    found = summary(tmp_path)
    assert (found["polite"]["verdict"], found["polite"]["result"]) == ("out of time", "3 passed")
    assert (found["deaf"]["verdict"], found["deaf"]["exit_code"]) == ("out of time", -signal.SIGKILL)
    assert time.monotonic() - began < 25
    runner.end = time.monotonic() + 1.0
    runner.run(source("late", "print(1)"))
    assert summary(tmp_path)["late"]["verdict"] == "skipped"


def test_a_killed_run_leaves_what_it_found(tmp_path):
    """And its steps end with it."""
    code = f"""
import sys
from pathlib import Path
from bench.first_light.steps import Runner, Step
runner = Runner(Path({str(tmp_path)!r}), 100, {{"device": "cpu"}})
runner.run(Step("first", 9, (sys.executable, "-c", "print('known')")))
sleeps = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
runner.run(Step("second", 99, (sys.executable, "-c", sleeps)))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if line.startswith("[second] "))
        process.kill()
    found, child = json.loads((tmp_path / "summary.json").read_text()), int(line.split()[1])
    assert found["device"] == "cpu" and [(s["step"], s["result"]) for s in found["steps"]] == [("first", "known")]
    assert line in (tmp_path / "log.txt").read_text()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the step outlived its run")


def test_an_earlier_run_is_not_overwritten(tmp_path, capsys, monkeypatch):
    """The second run has files of its own; the same one again needs another folder."""
    for name in ("", "-rest"):
        Runner(tmp_path, 9, {"run": name}, name)
        with pytest.raises(FileExistsError):
            Runner(tmp_path, 9, {"run": "again"}, name)
    assert [json.loads((tmp_path / f"summary{name}.json").read_text())["run"] for name in ("", "-rest")] == [
        "",
        "-rest",
    ]
    monkeypatch.setattr(first_light.Plan, "first", lambda self: [])
    for out in (tmp_path, tmp_path / "log.txt"):
        assert first_light.main(["--device=cpu", f"--out={out}"]) == 1
        assert "--out must be a folder without such a run" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--seconds=0"], ["--seconds=nan"], ["--seconds=-1"], ["--rest", "--all"]])
def test_arguments_that_make_no_sense(arguments):
    with pytest.raises(SystemExit):
        first_light.parse(["--out=x", *arguments])


def test_variables_that_change_what_is_measured_do_not_reach_it(tmp_path, monkeypatch):
    for name in ("PYGPT_BACKEND", "PYGPT_POISON", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    code = (
        "import os; print(sorted(k for k in os.environ if k in ('PYGPT_BACKEND', 'PYGPT_POISON', 'TRITON_INTERPRET')))"
    )
    monkeypatch.setattr(first_light.Plan, "first", lambda self: [[[source("variables", code)]]])
    assert first_light.main(["--device=cpu", f"--out={tmp_path}"]) == 0
    assert summary(tmp_path)["variables"]["result"] == "[]"


# ------------------------------------------------------------------------------- the plan
def plan(*arguments) -> first_light.Plan:
    return first_light.Plan(first_light.parse(["--out=/nowhere/out", *arguments]))


@pytest.mark.parametrize("part, seconds, timed", [
    ("first", first_light.FIRST_SECONDS, ["benchmark", "candidates"]), ("rest", first_light.REST_SECONDS, ["table"])
])  # fmt: skip
def test_the_plan_fits(part, seconds, timed):
    """Every limit together, nothing beside what is timed, and at most eight files in one flat folder."""
    groups = getattr(plan(), part)()
    assert sum(max(sum(s.seconds for s in lane) for lane in group) for group in groups) <= seconds - steps.GRACE
    alone = [group[0][0].name for group in groups if len(group) == 1 and len(group[0]) == 1]
    assert set(timed) <= set(alone)
    flat = [argument for group in groups for lane in group for step in lane for argument in step.command]
    files = {argument for argument in flat if argument.startswith("/nowhere/out")}
    assert {Path(file).parent for file in files} == {Path("/nowhere/out")} and len(files) <= 6  # log.txt, summary.json
    assert not any("nvcc" in argument or "build" in argument for argument in flat if argument.startswith("-"))


def test_the_first_run_builds_nothing(monkeypatch):
    assert not any("setup.py" in s.command for group in plan().first() for lane in group for s in lane)
    missing = plan(f"--conformance={ROOT}/nothing.so")
    monkeypatch.setattr(first_light, "LIBRARIES", ("pygpt/nothing.so",))
    assert [step.name for step in missing.build()[0][0]] == ["build pygpt/nothing.so", "build conformance"]
    monkeypatch.setattr(first_light, "LIBRARIES", ())
    assert plan(f"--conformance={__file__}").build() == []


# ------------------------------------------------------------------------------- the steps' own work
def test_better_candidates():
    rows = [
        {"kernel": "fwd", "head_dim": 64, "dtype": "bfloat16", "config": c, "ms": ms} for c, ms in ((1, 2.0), (2, 1.0))
    ]
    rows += [
        {"kernel": "dq", "head_dim": 64, "dtype": "bfloat16", "config": c, "ms": ms} for c, ms in ((1, 1.0), (2, 0.98))
    ]
    rows += [{"kernel": "dq", "head_dim": 64, "dtype": "float32", "config": 1, "refused": "OutOfResources"}]
    assert gpu_checks.better_candidates(rows) == ["fwd D64 bfloat16: 2 2.00x"]


def test_verify_keeps_what_is_wrong(tmp_path, monkeypatch, capsys):
    """A kernel that is off and one that raises are both reported, and the rest is verified all the same."""
    from dataclasses import replace

    from pygpt import reference
    from pygpt.dispatch import TABLE

    def off(x):
        return reference.relu_fwd(x) * 1.5

    def raises(x, approximate):
        raise RuntimeError("no such kernel")

    names = [name for name in vars(reference) if name.endswith(("_fwd", "_bwd"))]
    kernels = SimpleNamespace(**{n: getattr(reference, n) for n in names} | {"relu_fwd": off, "gelu_fwd": raises})
    row = replace(TABLE["cuda"], kernels=kernels, missing="", devices=("cpu",), dtypes=(torch.float32,))
    monkeypatch.setitem(TABLE, "cuda", row)
    monkeypatch.setattr(gpu_checks, "play_cuda_on_the_cpu", lambda: None)
    out = tmp_path / "verify.json"
    for broken in ("{", "[1]"):
        out.write_text(broken)
        assert gpu_checks.read(out) == {}
    out.write_text('{"triton": 1}')
    assert gpu_checks.main(["verify", "--device=cpu", f"--out={out}"]) == 1
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert found["triton"] == 1 and len(found["cuda"]["errors"]) == 1 and "no such kernel" in found["cuda"]["errors"][0]
    wrong = {row["op"] for row in found["cuda"]["rows"] if not row["passed"]}
    assert wrong == {"relu"} and {row["op"] for row in found["cuda"]["rows"]} >= {"attention", "attention_gqa", "mlp"}
    assert "WRONG: relu" in said and said.strip().splitlines()[-1].endswith(" s")


def test_measurements_stand_beside_what_was_expected(tmp_path, monkeypatch, capsys):
    row = goals.EXPECTED[0]
    facts = {"op": row.op, "shape": row.shape, "direction": row.direction, "dtype": "bfloat16", "ours": True}
    facts |= {"candidate": "cuda", "unit": "GFLOP/s", "amount": 105e3, "peak": None}
    stats = {"median": 1.0, "q1": 1.0, "q3": 1.0, "rounds": 5}
    path = tmp_path / "benchmark.json"
    machine = {"machine": {"date": "2026-12-01"}}
    path.write_text(json.dumps({"benchmarks": [{"extra_info": facts, "stats": stats}], "pygpt": machine}))
    found = {backend: rate for each, backend, rate in goals.beside(path) if each is row}
    assert found == {"triton": None, "cuda": 105.0}
    monkeypatch.setattr(sys, "argv", ["goals", str(path)])
    assert goals.main() == 0
    assert f"measured 105, {105 / row.by_hand['cuda']:.2f} of the estimate" in capsys.readouterr().out
    assert {(row.op, row.shape) for row in goals.EXPECTED} <= {(case.op, case.shape) for case in ops.PREDICTED}


@pytest.mark.parametrize(
    "code, line, verdict",
    [
        (0, "========= ERROR SUMMARY: 0 errors", "ok"),
        (9, "========= ERROR SUMMARY: 3 errors", "failed"),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "failed"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "ok"),
        (1, "========= Error: Device not supported. Please refer to the documentation", "refused"),
        (9, "========= Unable to read the symbols of libcuda.so", "failed"),
        (1, "Traceback (most recent call last)", "failed"),
        (None, "", "out of time"),
    ],
)
def test_what_a_sanitizer_says(code, line, verdict):
    assert gpu_checks.sanitizer_verdict(code, [line]) == verdict


def test_only_our_kernels_are_sanitized():
    assert gpu_checks.our_kernels("cuda") == ["pygpt"]
    assert {"attention_fwd_kernel", "gemm_kernel", "norm_bwd_kernel"} <= set(gpu_checks.our_kernels("triton"))


def test_a_broken_device_ends_a_check(tmp_path, monkeypatch, capsys):
    """What follows a sticky error would fail with the same message, and be taken for refused candidates."""
    monkeypatch.setattr(gpu_checks, "unusable", lambda: "the device is unusable after an error: illegal access")
    assert gpu_checks.main(["candidates", "--device=cpu", f"--out={tmp_path / 'c.json'}"]) == 1
    assert len(json.loads((tmp_path / "c.json").read_text())["rows"]) == 1
    assert capsys.readouterr().out.strip().endswith("illegal access")
    refusal = type("OutOfResources", (Exception,), {})("shared memory")
    for error, word in ((refusal, "refused"), (RuntimeError("illegal access"), "failed")):
        assert word in gpu_checks.time_once(SimpleNamespace(time=lambda calls, e=error: _raise(e)), None, 1.0)


def _raise(error):
    raise error


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles for a GPU that is not there")
def test_compile_ahead_fills_tritons_cache(tmp_path):
    """What it compiles, a second run finds; a kernel that does not compile is named."""
    code = """
import sys, torch
from pathlib import Path
from bench.first_light import compile_ahead as c
from pygpt import triton_kernels as k
def relu():
    yield lambda: k.relu_fwd(torch.empty(64, 48, dtype=torch.bfloat16, device="meta")), False
c.CALLS["relu"] = relu
cubins = []
for n in range(2):
    assert c.main(["--what=relu", "--jobs=1", f"--out={sys.argv[1]}/{n}.json"]) == 0
    cubins.append({path: path.stat().st_mtime_ns for path in Path(sys.argv[1], "cache").rglob("*.cubin")})
assert cubins[0] == cubins[1] and len(cubins[0]) == 1, cubins
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, env=environment, text=True, check=False, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]
    assert all((found["kernels"], found["compiled"], found["wrong"]) == (1, 1, []) for found in runs)


def test_what_is_timed_was_compiled_ahead(run_python):
    """The kernels of the candidates step, for its own tensors, are among those that are compiled before."""
    source = """
from bench.first_light import attention_calls, compile_ahead as c
import torch
from pygpt import triton_kernels
from pygpt.triton_kernels import attention
ahead = {job.key for job in c.jobs("sm90", ["candidates"])}
B, H, T = attention_calls.SHAPES[64]
def timed():
    q = torch.empty(B, H, T, 64, dtype=torch.bfloat16, device="meta")
    yield lambda: [call() for call in attention_calls.calls(triton_kernels, q, q, q, q).values()], True
c.CALLS = {"timed": timed}
needed = {job.key for job in c.jobs("sm90", ["timed"])}
print(len(needed), needed <= ahead, len(ahead))
"""
    number, known, total = run_python(source, PYTHONPATH=str(ROOT)).stdout.split()
    assert int(number) > 8 and known == "True" and int(total) > int(number)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is nothing to rehearse")
@pytest.mark.parametrize("part", [[], ["--rest"]], ids=["first", "rest"])
def test_rehearsal(part, tmp_path):
    """Every step on the CPU, with the emulator and the interpreter in the GPU's place."""
    command = [sys.executable, "-m", "bench.first_light", "--device=cpu", f"--out={tmp_path}", "--seconds=1500", *part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = summary(tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    refused = {"streams", "sanitize"} if part else set()
    assert {name for name, step in found.items() if step["verdict"] == "refused"} == refused
    assert all(step["verdict"] == "ok" for name, step in found.items() if name not in refused)
    assert len(found) == (6 if part else 9) and len(list(tmp_path.iterdir())) <= 8
