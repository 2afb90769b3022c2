"""The command line: what it prints, and that bad input is one line, exit code 2, and no damage."""

import codecs
import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import pygpt
from pygpt import cli
from pygpt.data import Corpus
from pygpt.dispatch import OPS, TABLE
from tests.cli.commands import TINY, refused


# ------------------------------------------------------------------------------- info
def test_info(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert pygpt.__version__ in shown and torch.__version__ in shown and all(op in shown for op in OPS)
    for row in TABLE.values():
        assert not row.missing or f"{row.name}: {row.missing}" in shown
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["ops"]) == set(OPS) and set(found["ops"]["mlp"]) == set(TABLE)
    assert found["ops"]["mlp"]["torch"] is None and bool(found["ops"]["mlp"]["cuda"]) == bool(TABLE["cuda"].missing)
    if not TABLE["cpp"].missing:
        assert found["cpu_capability"] in found["cpu_capabilities"] and Path(found["extension"]).is_file()


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"pygpt {pygpt.__version__}\n"
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0


# ------------------------------------------------------------------------------- generate
def test_generate(checkpoint, capsys):
    def text_of(*options):
        assert cli.main(["generate", str(checkpoint), "--prompt", "A é", "--max-new-tokens=20", *options]) == 0
        return capsys.readouterr().out

    assert text_of() == text_of() != text_of("--seed=5")
    assert text_of("--temperature=0") == text_of("--top-k=1", "--seed=9")
    assert text_of().startswith("A é") and text_of().endswith("\n")
    assert text_of("--backend=torch", "--temperature=0") == text_of("--temperature=0")


def test_generate_characters(text, tmp_path, capsys):
    out = str(tmp_path / "chars")
    assert cli.main(["train", "--preset=shakespeare-char-cpu", *TINY, "--data", text, "--out", out]) == 0
    capsys.readouterr()
    assert cli.main(["generate", out, "--prompt=text", "--max-new-tokens=30"]) == 0
    shown = capsys.readouterr().out
    assert len(shown) == 4 + 30 + 1 and set(shown) <= set(Path(text).read_text())
    assert "'Z' is not in the model's vocabulary" in refused(capsys, "generate", out, "--prompt=Z")


# ------------------------------------------------------------------------------- train
def test_a_run_is_not_overwritten(checkpoint, text, capsys):
    before, out = checkpoint.read_bytes(), checkpoint.parent
    assert "pass --resume" in refused(capsys, "train", *TINY, "--data", text, "--out", out)
    assert "trained with --n-layer 1" in refused(capsys, "train", "--resume", "--n-layer=2", "--out", out)
    assert "no such file" in refused(capsys, "train", "--force", "--data=missing", "--out", out)
    assert "does not divide" in refused(capsys, "train", "--force", *TINY, "--n-head=3", "--data", text, "--out", out)
    assert checkpoint.read_bytes() == before
    assert cli.main(["train", "--resume", "--steps=4", "--out", str(out)]) == 0
    assert "(step 4)" in capsys.readouterr().out
    assert cli.main(["train", "--force", *TINY, "--data", text, "--out", str(out)]) == 0
    assert checkpoint.read_bytes() == before


def test_flags_that_resuming_would_ignore(checkpoint, text, capsys):
    before, out = checkpoint.read_bytes(), checkpoint.parent
    for flag in ("--force", "--preset=demo"):
        message = refused(capsys, "train", "--resume", flag, "--steps=4", "--out", out)
        assert f"{flag.partition('=')[0]} is for a new one" in message
    assert checkpoint.read_bytes() == before


def test_resuming_a_finished_run_says_so(checkpoint, capsys):
    before, out = checkpoint.read_bytes(), str(checkpoint.parent)
    finished = "the run is finished: it is at step 2 of {}; a larger --steps trains on\n"
    for flags, steps in ([], 2), (["--steps=1"], 1):
        assert cli.main(["train", "--resume", *flags, "--out", out]) == 0
        assert finished.format(steps) in capsys.readouterr().out and checkpoint.read_bytes() == before
    assert cli.main(["train", "--resume", "--steps=3", "--out", out]) == 0
    assert "the run is finished" not in capsys.readouterr().out


def test_skipped_files_are_named(files, capsys):
    """On stderr, in one line; what is left is trained on."""
    for name in ("x", "y", "z"):
        Path("utf16", f"{name}.bin").write_bytes(b"\0")
    Path("utf16", "good.txt").write_text("some text " * 1000)
    assert cli.main(["train", *TINY, "--data=utf16", "--out=run"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("pygpt: utf16: skipped a.txt, b/c.txt, x.bin and 2 more, which hold zero bytes")
    assert captured.err.count("\n") == 1 and "9,000 training tokens" in captured.out


@pytest.mark.parametrize("tokens", ["byte", "char"])
def test_a_byte_order_mark_is_no_token(tokens, files):
    mark = codecs.BOM_UTF8
    for name in ("a.txt", "b.txt"):
        Path("folder", name).write_bytes(mark + b"text " * 100)
    Path("one.txt").write_bytes(mark + b"text " * 100 + mark)  # inside, it is a character
    folder, one = (Corpus.load(path, tokens, 2) for path in ("folder", "one.txt"))
    assert len(folder.train) + len(folder.val) == 1000 and folder.tokenizer.vocabulary in (None, " etx")
    assert one.tokenizer.decode(one.val[-3:].tolist()).endswith(mark)


def test_compiling_is_announced(text, tmp_path, monkeypatch, capsys):
    """Before it begins, as it is silent for up to a minute."""
    train = importlib.import_module("pygpt.train")

    def compiled(model):
        assert "torch.compile is tried now" in capsys.readouterr().out
        return model

    monkeypatch.setattr(train, "_compiled", compiled)
    assert cli.main(["train", *TINY, "--compile", "--data", text, "--out", str(tmp_path / "run")]) == 0
    assert "compile" not in capsys.readouterr().out


BAD = [
    ("train --preset=gpt5", "invalid choice: 'gpt5'"),
    ("train --backend=rocm", "invalid choice: 'rocm'"),
    ("train --dtype=int8", "invalid choice: 'int8'"),
    ("train --data=missing.txt", "no such file or folder: missing.txt"),
    ("train --data=empty.txt", "no text in empty.txt"),
    ("train --data=folder", "no text in folder"),
    ("train --data=short.txt", "the text has 100 tokens"),
    ("train --data=latin.txt --tokens=char --block-size=2", "not UTF-8"),
    ("train --n-embd=100 --n-head=3", "n_embd 100 does not divide by n_head 3"),
    ("train --vocab-size=10", "--vocab-size 10 is less than"),
    ("train --steps=0", "--steps must be at least 1, got 0"),
    ("train --batch-size=-1", "--batch-size must be at least 1"),
    ("train --learning-rate=nan", "--learning-rate must be a finite number, got nan"),
    ("train --learning-rate=inf", "--learning-rate must be a finite number, got inf"),
    ("train --weight-decay=-inf", "--weight-decay must be a finite number, got -inf"),
    ("train --learning-rate=-1", "--learning-rate must be at least"),
    ("train --dropout=1", "--dropout must be below 1"),
    ("train --beta2=1", "--beta2 must be below 1"),
    ("train --threads=0", "--threads must be at least 1"),
    ("train --threads=9999999999", "--threads must be less than 2147483648, got 9999999999"),
    (f"train --vocab-size={10**30}", f"--vocab-size must be less than {2**63}, got 1000"),
    (f"train --batch-size={10**30}", f"--batch-size must be less than {2**63}, got 1000"),
    ("train --data=long.txt --vocab-size=1000000000000", "moments take 2,048,000,"),
    (
        "train --data=long.txt --n-embd=1000000",
        "out of memory: the weights, their gradients and AdamW's moments take 768,",
    ),
    (f"train --data=long.txt --vocab-size={10**18}", "out of memory"),
    ("train --steps=many", "invalid int value: 'many'"),
    ("train --step=3", "unrecognized arguments: --step=3"),
    ("train --data=long.txt --block-size=16 --out=long.txt/run", "long.txt"),
    ("train --data=long.txt --block-size=16 --out=/proc/pygpt", "/proc/pygpt"),
    ("train --data=long.txt --out=long.txt", "long.txt is a file, not a folder"),
    ("train --resume --out=long.txt", "long.txt is a file, not a folder"),
    ("train --data=pipe", "pipe is neither a file nor a folder"),
    ("train --data=/dev/null", "/dev/null is neither a file nor a folder"),
    ("train --data=utf16", "no text in utf16; skipped a.txt, b/c.txt, which hold zero bytes, as UTF-16"),
    ("train --data=bom.txt", "no text in bom.txt"),
    ("train --resume --out=folder", "no checkpoint at folder/checkpoint.safetensors"),
    ("generate missing", "no checkpoint at missing"),
    ("generate folder", "no checkpoint at folder/checkpoint.safetensors"),
    ("generate long.txt", "long.txt is not a readable checkpoint"),
    ("generate long.txt --max-new-tokens=0", "--max-new-tokens must be at least 1"),
    ("generate long.txt --temperature=-1", "--temperature must be at least 0"),
    ("generate long.txt --temperature=nan", "--temperature must be a finite number, got nan"),
    ("generate long.txt --seed=99999999999999999999", f"--seed must be less than {2**64}, got 99999999999999999999"),
    ("generate long.txt --seed=-1", "--seed must be at least 0"),
    ("generate long.txt --top-k=0", "--top-k must be at least 1"),
    ("generate long.txt --prompt=", "--prompt is empty"),
    ("generate", "the following arguments are required: checkpoint"),
    ("verify --ops=foo", "unknown op 'foo'; known: attention"),
    ("verify --dtypes=int8", "unknown dtype 'int8'"),
    ("verify --backend=rocm", "invalid choice: 'rocm'"),
    ("verify --shape=X=1", "no op has the dimensions X"),
    ("verify --ops=gelu --shape=B=1", "gelu has no dimension 'B'"),
    ("verify --ops=gelu --shape=M=x", "M='x' is not valid"),
    (
        "verify --ops=gelu --shape=M=100000000000000",
        "out of memory: gelu's inputs in float64 take 800,000,000,000,000 bytes",
    ),
    ("verify --ops=attention --shape=L=100000000000000", "out of memory"),
    (f"verify --ops=linear --shape=M={10**18},K=64", "out of memory"),
    ("verify --ops=attention --shape=L=1000000000", "out of memory"),
    (f"verify --ops=gelu --shape=M={2**63}", f"M='{2**63}' is not valid"),
    ("verify --seed=99999999999999999999", f"--seed must be less than {2**64}"),
    ("verify --seed=-99999999999999999999", f"--seed must be at least {-(2**63)}"),
    ("demo --out=long.txt", "long.txt is a file, not a folder"),
    ("demo --seconds=inf", "--seconds must be a finite number"),
    ("demo --threads=9999999999", "--threads must be less than 2147483648"),
    ("demo --seconds=0", "--seconds must be positive"),
    ("demo --steps=-3", "--steps must be positive"),
    ("demo --data=missing.txt", "no such file or folder: missing.txt"),
    ("", "the following arguments are required: COMMAND"),
    ("sing", "invalid choice: 'sing'"),
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "short.txt").write_text("x" * 100)
    (tmp_path / "long.txt").write_text("some text " * 1000)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 1000)
    (tmp_path / "bom.txt").write_bytes(codecs.BOM_UTF8)
    (tmp_path / "utf16" / "b").mkdir(parents=True)
    for name in ("a.txt", "b/c.txt"):
        (tmp_path / "utf16" / name).write_text("some text " * 1000, encoding="utf-16")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command, message", BAD, ids=[c or "nothing" for c, _ in BAD])
def test_bad_input(command, message, files, capsys):
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*")}
    assert message in refused(capsys, *command.split())
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*")} == before


@pytest.mark.parametrize("name", [n for n, row in TABLE.items() if row.missing])
@pytest.mark.parametrize("command", ["train --block-size=16 --data=long.txt", "generate long.txt", "verify"])
def test_missing_backend(name, command, files, capsys):
    assert TABLE[name].missing in refused(capsys, *command.split(), f"--backend={name}")


@pytest.mark.parametrize("command", ["info", "verify", "train", "bench --list"])
def test_a_wrong_name_in_the_environment(command, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("pygpt.dispatch"), "FROM_ENVIRONMENT", "cpu")
    assert "PYGPT_BACKEND: pygpt: unknown backend 'cpu'; known: cpp" in refused(capsys, *command.split())


def test_backend_that_cannot_serve_the_model(checkpoint, compiled, capsys, monkeypatch):
    """Said before anything is printed."""
    monkeypatch.setitem(TABLE, compiled, dataclasses.replace(TABLE[compiled], max_head_dim=1))
    monkeypatch.setattr(importlib.import_module("pygpt.dispatch"), "DISPATCH_CACHES", {})
    assert "head dimension above 1" in refused(capsys, "generate", str(checkpoint), f"--backend={compiled}")


def test_backend_that_cannot_train_the_model(files, capsys):
    wide = "train --data=long.txt --block-size=16 --n-head=1 --n-embd=512 --backend=cpp"
    if TABLE["cpp"].max_head_dim < 512 and not TABLE["cpp"].missing:
        assert "head dimension above 256" in refused(capsys, *wide.split())


# ------------------------------------------------------------------------------- errors of other kinds
def test_a_missing_module_of_ours_is_no_bad_input(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygpt.info", None)
    with pytest.raises(ModuleNotFoundError, match=r"pygpt\.info"):
        cli.main(["info"])


def test_other_errors_keep_their_traceback(monkeypatch):
    def fails(argv):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(cli, "_run_command", fails)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main(["info"])


def test_out_of_memory(monkeypatch, capsys):
    """Python's, PyTorch's on each device, and C++'s."""
    cpu = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    cpu += "allocate 512000000000000 bytes. Error code 12 (Cannot allocate memory)"
    for error, line in (
        (MemoryError(), "out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            "out of memory: Tried to allocate 20.00 GiB",
        ),
        (RuntimeError(cpu), "out of memory: tried to allocate 512000000000000 bytes"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
    ):  # fmt: skip
        monkeypatch.setattr(cli, "_run_command", lambda argv, error=error: (_ for _ in ()).throw(error))
        assert refused(capsys, "info") == f"pygpt: error: {line}\n"


def test_bench_outside_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "pygpt" / "cli.py"))
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert "a checkout of pygpt has them" in refused(capsys, "bench")


def test_verify_takes_the_names_of_the_public_functions(capsys):
    shape = "--shape=B=1,H=1,L=4,S=4,E=8,causal=1"
    assert cli.main(["verify", "--ops=scaled_dot_product_attention", shape, "--dtypes=float32", "--seed=1"]) == 0
    by_public_name = capsys.readouterr().out
    assert cli.main(["verify", "--ops=attention", shape, "--dtypes=float32", "--seed=1"]) == 0
    assert capsys.readouterr().out == by_public_name


@pytest.mark.parametrize(
    "op, shape, described",
    [
        ("mlp", "M=2,C=8", "M=2,C=8,H=32,O=8"),
        ("mlp", "M=2,C=8,H=5", "M=2,C=8,H=5,O=8"),
        ("linear", "M=2,K=5", "M=2,K=5,N=5"),
        ("attention", "H=1,L=4,E=8", "B=2,H=1,L=4,S=4,E=8,Ev=8"),
    ],
)
def test_verify_derives_the_sizes_that_are_left_out(op, shape, described, capsys):
    assert cli.main(["verify", f"--ops={op}", f"--shape={shape}", "--dtypes=float32"]) == 0
    assert capsys.readouterr().out.startswith(f"{op}  {described},")
