"""`pygpt bench`: what a run leaves, what is refused, how runs are compared. No figure is judged here."""

import json
import os
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_small import FEW, PEAKS, ROOT, TINY, bench, document, plain, rows, small

import pygpt
from bench import cli as command
from bench.cases import goals, gpt, ops, peers
from bench.cases import rows as case_rows
from bench.show import compare, plots, readme, table
from bench.timing import candidates, results
from bench.timing.results import Entry, Result
from pygpt.data import UsageError

__all__ = ["plain", "small"]  # fixtures


# ------------------------------------------------------------------------------- a run
def test_a_run_and_what_it_leaves(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 0, "val_loss": 5.0}\n{"step": 1, "loss": 4.5, "lr": 0.1}\n')
    assert bench(*FEW, "--peers=eager,sdpa-math", "--training=run") == 0
    out, found, saved = capsys.readouterr().out, rows(), document()
    assert [str(row) for row in found] == [f"{c.op} {c.shape} float32 {way}" for c in TINY for way in ops.DIRECTIONS]
    for row in found:
        assert set(row.entries) == {"torch", "eager"} | ({"sdpa-math"} if row.op == "attention" else set())
        (ours,) = row.ours
        assert ours.name == "torch" and 0 < ours.q1 <= ours.ms <= ours.q3 and ours.rounds == 5 and ours.memory >= 0
        case = next(c for c in TINY if (c.op, c.shape) == (row.op, row.shape))
        work = case.setup(torch.randn, *case.args)
        assert ours.rate == pytest.approx(work.amount_of(row.direction) / ours.ms / 1e6, rel=1e-3)
        assert ours.share == pytest.approx(ours.rate / (PEAKS.copy if work.bound == "memory" else 100.0))
        assert f"{row.op} " in out and results.verdict(row, ours) in out
        peer = row.best_peer
        near = (row.ratio(ours, peer.name) + rounding for rounding in (-0.01, 0.0, 0.01))  # the file has rounded times
        assert any(f"{peer.name} {ratio:.2f}" in out for ratio in near)
    assert saved["machine_info"]["cpu"] == {"brand_raw": "Some CPU"} and "node" not in saved["machine_info"]
    assert saved["pygpt"]["machine"]["command"].startswith("pygpt bench --backends=torch")
    names = {p.name for p in Path("out").iterdir() if not p.name.startswith(".")}
    pictures = {
        f"{name}.{suffix}"
        for name in ("ratios", "speed", "memory", "roofline", "training")
        for suffix in ("svg", "png")
    }
    assert names == {"bench.json", "report.html"} | pictures
    assert Path("out/speed.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in Path("out/speed.svg").read_text()
    page = Path("out/report.html").read_text()
    assert page.count("<svg") == 5 and page.count("<tr><td>") == len(found)
    assert not re.findall(r'(?:src|href)="(?!#)|@import|url\((?!#)', page)  # nothing from elsewhere
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_the_file_is_pytest_benchmarks(plain, capsys, monkeypatch):
    from pytest_benchmark.cli import main

    assert bench(*FEW, "--ops=relu") == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["pytest-benchmark", "compare", "out/bench.json", "--columns=median,iqr,rounds"])
    main()
    shown = capsys.readouterr().out
    assert (
        "benchmark 'relu 8 x 16 float32 backward': 2 tests" in shown and "relu 8 x 16 float32 forward [eager]" in shown
    )
    entry = document()["benchmarks"][0]
    assert (
        entry["stats"]["rounds"] == 5
        and "data" not in entry["stats"]
        and entry["group"] == "relu 8 x 16 float32 forward"
    )


def test_default_backend_and_threads(plain):
    from pygpt.dispatch import TABLE

    if TABLE["cpp"].missing:
        assert bench("--ops=relu") == 2
    else:
        assert bench("--peers=eager", "--seconds=1e-9", "--ops=relu,linear", "--threads=2") == 0
        assert {e.name for row in rows("out/bench/bench.json") for e in row.ours} == {"cpp"}
        assert {row.dtype for row in rows("out/bench/bench.json")} == set(ops.DTYPES)
        assert document("out/bench/bench.json")["pygpt"]["machine"]["threads"] == 2


def test_an_interrupted_run_keeps_its_rows(plain, monkeypatch, capsys):
    """Each row is in the file before the next one begins; Ctrl-C ends with table and page of what there is."""
    prepare, seen = candidates.prepare, []

    def third_time(*args):
        seen.append(len(rows()) if Path("out/bench.json").exists() else 0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return prepare(*args)

    monkeypatch.setattr(candidates, "prepare", third_time)
    assert bench(*FEW) == 130
    shown = capsys.readouterr().out
    assert seen == [0, 1, 2] and len(rows()) == 2 and "wrote out/report.html" in shown
    assert "not reached in time: 8 rows, from attention B1 H2 T32 D8 causal float32 forward on" in shown
    assert not list(Path("out").glob(".pygpt-tmp-*"))


def test_one_rows_error_costs_that_row(plain, monkeypatch, capsys):
    prepare = candidates.prepare

    def fails(row, *args):
        if row.case.op == "linear" and row.direction == "forward":
            raise RuntimeError("no such luck\nsecond line")
        return prepare(row, *args)

    monkeypatch.setattr(candidates, "prepare", fails)
    assert bench(*FEW, "--ops=linear,relu") == 1
    assert (
        len(rows()) == 3 and "FAILED: linear 8 x 16 -> 24 float32 forward : no such luck\n" in capsys.readouterr().out
    )
    assert document()["pygpt"]["failed"][0]["why"] == "no such luck"


def test_a_wrong_result_cannot_look_fast(plain, monkeypatch, capsys):
    monkeypatch.setattr(ops, "CPU", [ops.case(ops.relu, (8, 16))])
    wrong = replace(peers.PEERS["eager"], ops={"*": lambda work, dims: lambda x: x.relu() * 1.2})
    monkeypatch.setitem(peers.PEERS, "liger", wrong)
    assert bench(*FEW, "--peers=eager,liger", "--directions=forward") == 0
    assert set(rows()[0].entries) == {"torch", "eager"}
    assert "liger: its result is 20% off PyTorch's: another computation" in capsys.readouterr().out
    for wrong, error in ((lambda x: x.relu() * 1.01, "1.0e-02"), (lambda x: x * float("nan"), "nan")):
        monkeypatch.setattr(candidates, "on_backend", lambda name, function, wrong=wrong: wrong)
        assert bench(*FEW, "--directions=forward") == 1
        said = f"FAILED: relu 8 x 16 float32 forward torch: WRONG: error {error}"
        assert rows() == [] and said in capsys.readouterr().out


def test_an_unchecked_result_says_so(plain, monkeypatch, capsys):
    def fails(*args):
        raise torch.OutOfMemoryError("no memory for float64")

    monkeypatch.setattr(candidates, "Reference", fails)
    monkeypatch.setattr(ops, "CPU", [ops.case(ops.relu, (8, 16))])
    assert bench(*FEW, "--directions=forward") == 0
    assert all(entry.unchecked for entry in rows()[0].entries.values())
    assert re.search("(faster|even|slower), unchecked", capsys.readouterr().out)


def test_budget(plain, capsys):
    assert bench(*FEW, "--budget=1e-9") == 1
    assert (
        "not reached in time: 10 rows, from attention B1 H2 T16 D8 causal float32 forward on" in capsys.readouterr().out
    )


@pytest.mark.parametrize("setup, tokens", [(gpt.gpt, 2 * 8), (gpt.decode, 2)])
def test_whole_models(setup, tokens, plain, monkeypatch):
    tiny = gpt.case(setup, (1, 2, 16), 2, 8, 7, standard=("float32",))
    monkeypatch.setattr(gpt, "CASES", [tiny])
    assert bench(*FEW, f"--ops={tiny.op}", "--dtypes=float32,bfloat16,float16") == 0
    way = gpt.DIRECTIONS[tiny.op]
    assert [(row.dtype, row.direction) for row in rows()] == [("float32", way), ("bfloat16", way)]
    (ours,) = rows()[0].ours
    assert ours.unit == "tok/s" and ours.rate == pytest.approx(tokens / ours.ms * 1e3, rel=1e-3) and ours.memory >= 0


@pytest.mark.parametrize("setup", [gpt.gpt, gpt.decode])
def test_a_model_that_computes_something_else(setup, plain, monkeypatch, capsys):
    tiny, candidate = gpt.case(setup, (1, 2, 16), 2, 8, 7, standard=("float32",)), gpt.candidate

    def wrong(row, device, name, peaks):
        call, *others = candidate(row, device, name, peaks)
        return (call if name == "eager" else lambda: tuple(1.1 * t for t in call())), *others

    monkeypatch.setattr(gpt, "CASES", [tiny])
    monkeypatch.setattr(gpt, "candidate", wrong)
    assert bench(*FEW, f"--ops={tiny.op}") == 1 and "another computation" in capsys.readouterr().out


def test_decoding_repeats_one_place():
    row = case_rows.Row(gpt.case(gpt.decode, (1, 2, 16), 2, 8, 7), "bfloat16", "token")
    call, tokens, peak = gpt.candidate(row, "cpu", "torch", PEAKS)
    seen = []
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(out[0]) if isinstance(module, pygpt.GPT) else None
    ):
        call(), call()
    assert tokens == 2 and peak > 0 and seen[0].shape == (2, 1, 7) and torch.equal(*seen)
    assert gpt.names("decode", ("eager", "compile")) == ["eager"]


@pytest.mark.parametrize("wanted, code, times", [(0.0, 0, 1), (1e9, 1, 1 + command.ATTEMPTS)])
def test_check(wanted, code, times, plain, monkeypatch, capsys):
    sessions, session = [], command.session
    monkeypatch.setattr(goals, "first_bar", lambda row, machine: goals.Bar(wanted, "x eager"))
    monkeypatch.setattr(command, "session", lambda o, *args: sessions.append(o.seconds) or session(o, *args))
    assert bench(*FEW, "--ops=relu", "--check") == code
    assert sessions == [1e-9 * factor for factor in (1, 2, 4, 6)][:times] and len(rows()) == 2
    assert f"first bar: {0 if code else 2} of 2 rows pass" in capsys.readouterr().out


def test_as_a_module_and_through_pytest(plain, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *FEW, "--ops=relu", "--list"])
    with pytest.raises(SystemExit) as e:
        runpy.run_module("bench", run_name="__main__")
    assert (
        e.value.code == 0
        and "2 rows; ours: torch; peers: eager" in capsys.readouterr().out
        and not Path("out").exists()
    )
    options = ["-pno:cacheprovider", "-pno:xdist", "-oaddopts=", f"--rootdir={ROOT}", "--benchmark-json=new.json"]
    assert pytest.main([*options, *FEW[:-1], "--ops=relu", str(ROOT / "bench" / "suite.py")]) == 0
    assert len(rows("new.json")) == 2 and "vs eager" in capsys.readouterr().out


# ------------------------------------------------------------------------------- bad input
BAD = [
    ("--ops=add", "add is not among attention, attention_window"),
    ("--dtypes=float64", "float64 is not among float32"),
    ("--peers=numpy", "numpy is not among eager, compile"),
    ("--peers=eager,all", "all goes with no other name"),
    ("--peers=eager,flash-attn", "--peers: flash-attn: "),
    ("--backends=cpp,rocm", "rocm is not among"),
    ("--seconds=0", "must be positive"),
    ("--budget=nan", "must be positive"),
    ("--threads=two", "must be positive"),
    *((f"--busy={wrong}", f"--busy: must be positive, got '{wrong}'") for wrong in ("0", "-1", "x", "1.5", "")),
    ("--shape=B", "--shape: wants KEY=VALUE,..., got 'B'"),
    ("--shape=Q=3", "no op has the dimensions Q"),
    ("--shape=B=0", "B must be a positive integer"),
    ("--shape=causal=yes", "causal must be one of 0, 1"),
    ("--sweep=100", "from T = 256 on"),
    ("--sweep --ops=relu", "--sweep measures attention"),
    ("--sweep --shape=B=1", "exclude each other"),
    ("--ops=gpt --dtypes=float16", "no row is left"),
    ("--directions=step --ops=relu", "no row is left"),
    ("--backends=torch --json=.", "is no regular file"),
    ("--backends=torch --json=/dev/null", "is no regular file"),
    ("--backends=torch --json=file/new.json", "file"),
    ("--compare missing.json file", "no such file: missing.json"),
    ("--compare file file", "file cannot be read"),
    ("--render other.json", "other.json is not in pytest-benchmark's format"),
    ("--render foreign.json", "foreign.json has benchmarks, but not pygpt's"),
    ("--training=missing", "--training: no such file: missing"),
    ("--training=file", "--training: file is not a log"),
    ("--training=none.jsonl", "has no losses"),
    ("--check --peers=none", "--check judges by PyTorch eager"),
    ("--quickly", "unrecognized arguments: --quickly"),
    *([] if torch.cuda.is_available() else [("--device=cuda", "sees no GPU")]),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[a for a, _ in BAD])
def test_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("no JSON")
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "foreign.json").write_text('{"benchmarks": [{"stats": {}}]}')
    (tmp_path / "none.jsonl").write_text('{"step": 1}\n')
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(command, "session", lambda *args: pytest.fail("it ran"))
    assert bench(*arguments.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err, shown.err
    assert set(tmp_path.rglob("*")) <= before | {tmp_path / "out", tmp_path / "out" / "bench"}


# ------------------------------------------------------------------------------- verdicts, comparison
def entry(name, ms, spread=0.02, ours=False, **more):
    return Entry(name, ours, ms, ms * (1 - spread / 2), ms * (1 + spread / 2), 9, **more)


@pytest.mark.parametrize("ours, peer, spread, word", [
    (1.0, 1.1, 0.02, "faster"), (1.0, 1.02, 0.02, "even"), (1.02, 1.0, 0.02, "even"), (1.1, 1.0, 0.02, "slower than b"),
    (1.0, 1.1, 0.3, "even"), (1.1, 1.0, 0.3, "even"), (2.0, 1.0, 0.3, "slower than b"),
])  # fmt: skip
def test_verdict(ours, peer, spread, word):
    mine = entry("cpp", ours, spread, ours=True)
    entries = {e.name: e for e in (mine, entry("a", 9.0), entry("b", peer, spread))}
    row = Result("relu", "1", "float32", "forward", entries=entries)
    assert results.verdict(row, mine) == word.split()[0]
    assert results.verdict(replace(row, entries={"cpp": mine}), mine) == "alone"


@pytest.mark.parametrize("peak, share", [(2.0, 0.5), (None, None), (0.5, None)])
def test_a_share_of_what_is_a_limit(peak, share):
    """A row that ran faster than the measured peak was not limited by it."""
    facts = {"op": "relu", "shape": "1", "dtype": "float32", "direction": "forward", "candidate": "cpp", "ours": True}
    stats = {"median": 1.0, "q1": 1.0, "q3": 1.0, "rounds": 5}
    (row,) = results.results({"benchmarks": [
        {"extra_info": facts | {"unit": "GB/s", "amount": 1.0, "peak": peak}, "stats": stats}
    ]})  # fmt: skip
    assert row.ours[0].rate == 1.0 and row.ours[0].share == share
    assert table.percent(share) == ("50%" if share else "")


def test_a_single_round_is_marked():
    mine = entry("cpp", 1.0, ours=True, rate=1.0, unit="GB/s", share=0.5)
    once = replace(entry("eager", 85.0), rounds=1)
    row = Result("relu", "1", "float32", "forward", True, entries={"cpp": mine, "eager": once, "b": entry("b", 1.5)})
    assert [table.ratio(row, mine, peer) for peer in ("eager", "b", "c")] == ["~85.00", "1.50", ""]
    assert "~85.00x eager, 1.50x b; faster" in table.line(row)


def edited(path, factor, ours=True, noise=1.0):
    """The last run's file, with other times of ours, or of the peers."""
    saved = document()
    for b in saved["benchmarks"]:
        b["stats"] |= {"median": 1.0, "q1": 0.99, "q3": 1.01}
        if b["extra_info"]["ours"] == ours:
            b["stats"] |= {"median": factor, "q1": factor - 0.01 * noise, "q3": factor + 0.01 * noise}
    Path(path).write_text(json.dumps(saved))


def test_compare(plain, capsys):
    assert bench(*FEW, "--ops=relu,linear") == 0
    edited("a.json", 1.0)
    for factor, ours, noise, code, word in (
        (1.2, True, 1, 1, "REGRESSION"), (1.02, True, 1, 0, "same"), (1.2, True, 40, 0, "same"),
        (0.8, True, 1, 0, "faster"), (1.5, False, 1, 0, "slower"),
    ):  # fmt: skip
        edited("b.json", factor, ours, noise)
        capsys.readouterr()
        assert bench("--compare", "a.json", "b.json") == code
        shown = capsys.readouterr().out
        assert word in shown and f"{4 if code else 0} of 4 timings of ours became slower" in shown
    saved = document("b.json")
    saved["benchmarks"] = saved["benchmarks"][:2]
    saved["pygpt"]["machine"]["cpu"] = "Another CPU"
    Path("b.json").write_text(json.dumps(saved))
    assert bench("--compare", "a.json", "b.json") == 0
    shown = capsys.readouterr().out
    assert "3 timings of ours are in one file only" in shown and "two machines" in shown
    row = saved["benchmarks"][0]["extra_info"]
    broken = {key: row[key] for key in ("op", "shape", "dtype", "direction", "candidate")} | {"why": "wrong"}
    Path("b.json").write_text(json.dumps(saved | {"pygpt": saved["pygpt"] | {"failed": [broken]}}))
    assert bench("--compare", "a.json", "b.json") == 1 and "FAILED in b.json only" in capsys.readouterr().out
    saved["benchmarks"] = []
    Path("b.json").write_text(json.dumps(saved))
    assert bench("--compare", "a.json", "b.json") == 2 and "no row in common" in capsys.readouterr().err


# ------------------------------------------------------------------------------- the README
def test_readme(plain, monkeypatch, capsys):
    folder, page = Path("bench/results").absolute(), Path("README.md").absolute()
    folder.mkdir(parents=True)
    assert bench(*FEW, f"--json={folder / 'z.json'}") == 0
    saved = document(folder / "z.json")
    saved["pygpt"]["machine"]["date"] = "2020-01-01"
    (folder / "a-old.json").write_text(json.dumps(saved))
    (folder / "alien.json").write_text('{"machine": {}, "rows": []}')
    monkeypatch.setattr(plots, "all_figures", lambda *args: {"ratios": None, "training": None})
    monkeypatch.setattr(plots, "write", lambda figure, path: path.write_text("<svg/>"))
    page.write_text("before\n")
    with pytest.raises(UsageError, match="must have the lines"):
        readme.update((page,), folder)
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.update((page,), folder) == 0
    text = page.read_text()
    assert (
        text.startswith(f"before\n{readme.BEGIN}\n") and text.endswith(f"{readme.END}\nafter\n") and "old" not in text
    )
    cells = r"[\d.]+x( \(\d+%\))? \| eager [\d.]+"
    assert re.search(rf"\| attention, B1 H2 T16 D8 causal \| {cells} \| {cells} \|", text)
    assert "![speed over PyTorch eager's](bench/results/plots/ratios.svg)" in text and "training" not in text
    assert "[z.json](bench/results/z.json)" in text and (folder / "plots" / "ratios.svg").exists()
    readme.update((page,), folder)
    assert page.read_text() == text
    (folder / "z.json").unlink(), (folder / "a-old.json").unlink()
    with pytest.raises(UsageError, match="no run in pytest-benchmark's format"):
        readme.update((page,), folder)
    assert page.read_text() == text


def test_the_readme_has_a_place_for_it():
    text = "".join(page.read_text() for page in readme.PAGES if page.exists())
    assert text.count(readme.BEGIN) == 1 == text.count(readme.END)


def test_saved_in_a_checkout_only(plain, monkeypatch, capsys):
    folder = Path("results").absolute()
    monkeypatch.setattr(results, "RESULTS", folder)
    few = *FEW, "--ops=relu"
    assert bench(*few, "--save=part") == 2
    assert "only a checkout has" in capsys.readouterr().err
    folder.mkdir()
    assert bench(*few, "--save=part") == 0
    (path,) = folder.iterdir()
    assert path.name.startswith("some-cpu-") and path.name.endswith("-part.json") and rows(path) == rows()
    first = path.read_bytes()
    assert bench(*few, "--save=part", "--budget=1e-9") == 1 and path.read_bytes() == first  # nothing measured
    assert bench(*few, "--save=part") == 0 and path.read_bytes() != first  # no history
    for narrowed in few, (*FEW, "--quick"), (*FEW, "--shape=M=8,N=16"), (*FEW, "--directions=forward"):
        assert bench(*narrowed, "--save") == 2 and "name the part: --save KIND" in capsys.readouterr().err
    assert {each.name for each in folder.iterdir()} == {path.name}


def test_a_newer_sweep_is_not_the_page_s_run(plain, tmp_path):
    assert bench(*FEW, "--ops=relu", f"--json={tmp_path / 'whole.json'}") == 0
    assert bench(*FEW, "--sweep=256", "--dtypes=bfloat16", f"--json={tmp_path / 'sweep.json'}") == 0
    whole, sweep = document(tmp_path / "whole.json"), document(tmp_path / "sweep.json")
    assert whole["pygpt"]["machine"]["date"] <= sweep["pygpt"]["machine"]["date"]
    assert readme.newest(tmp_path) == tmp_path / "whole.json"


def test_isa_starts_again_under_its_variables(monkeypatch):
    class Again(Exception):
        pass

    def execv(program, argv):
        assert argv[1:5] == ["-m", "pygpt", "bench", "--isa=avx2"] and os.environ["PYGPT_CPU_CAPABILITY"] == "avx2"
        raise Again

    for name in command.VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Again):
        bench("--isa=avx2", "--ops=relu")
    monkeypatch.setenv("PYGPT_CPU_CAPABILITY", "")
    monkeypatch.setattr(pygpt._C, "cpu_capabilities", lambda: ["baseline"])
    assert bench("--isa=avx2", "--ops=relu") == 2


def test_compared():
    """Only what both runs measured, and only ours can be a regression."""
    then = {"cpp": entry("cpp", 1.0, ours=True), "eager": entry("eager", 1.0)}
    now = {"cpp": entry("cpp", 1.3, ours=True), "eager": entry("eager", 1.3), "liger": entry("liger", 1.0)}
    old, new = (Result("relu", "1", "float32", "forward", entries=entries) for entries in (then, now))
    found = [(c.new.name, c.word, c.regression) for c in compare.changes([old], [new])]
    assert found == [("cpp", "slower", True), ("eager", "slower", False)]
