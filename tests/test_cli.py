"""The command line: what it prints, and that bad input is one line, exit code 2, and no damage."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pygpt
from pygpt import cli
from pygpt.dispatch import OPS, TABLE

TINY = [
    "--n-layer=1",
    "--n-head=2",
    "--n-embd=16",
    "--block-size=16",
    "--batch-size=2",
    "--eval-iters=1",
    "--steps=2",
    "--warmup=1",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A text about nothing, but long enough for a block.\n" * 20)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *TINY, "--data", text, "--out", str(out)]) == 0
    capsys.readouterr()
    return out / "checkpoint.safetensors"


def refused(capsys, *argv) -> str:
    """Runs a command that must fail as bad input -> its one line."""
    assert cli.main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("pygpt: error: ")
    return captured.err


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


def test_threads(text, tmp_path):
    command = ["train", *TINY, "--data", text, "--threads=2", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0 and torch.get_num_threads() == 2


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
    ("train --learning-rate=nan", "--learning-rate must be at least"),
    ("train --learning-rate=-1", "--learning-rate must be at least"),
    ("train --dropout=1", "--dropout must be below 1"),
    ("train --beta2=1", "--beta2 must be below 1"),
    ("train --threads=0", "--threads must be at least 1"),
    ("train --steps=many", "invalid int value: 'many'"),
    ("train --step=3", "unrecognized arguments: --step=3"),
    ("train --data=long.txt --block-size=16 --out=long.txt/run", "long.txt"),
    ("train --data=long.txt --block-size=16 --out=/proc/pygpt", "/proc/pygpt"),
    ("train --resume --out=folder", "no checkpoint at folder/checkpoint.safetensors"),
    ("generate missing", "no checkpoint at missing"),
    ("generate folder", "no checkpoint at folder/checkpoint.safetensors"),
    ("generate long.txt", "long.txt is not a readable checkpoint"),
    ("generate long.txt --max-new-tokens=0", "--max-new-tokens must be at least 1"),
    ("generate long.txt --temperature=-1", "--temperature must be at least 0"),
    ("generate long.txt --top-k=0", "--top-k must be at least 1"),
    ("generate long.txt --prompt=", "--prompt is empty"),
    ("generate", "the following arguments are required: checkpoint"),
    ("verify --ops=foo", "unknown op 'foo'; known: attention"),
    ("verify --dtypes=int8", "unknown dtype 'int8'"),
    ("verify --backend=rocm", "invalid choice: 'rocm'"),
    ("verify --shape=X=1", "no op has the dimensions X"),
    ("verify --ops=gelu --shape=B=1", "gelu has no dimension 'B'"),
    ("verify --ops=gelu --shape=M=x", "M='x' is not valid"),
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
    monkeypatch.setattr(importlib.import_module("pygpt.dispatch"), "_RESOLVED", {})
    assert "head dimension above 1" in refused(capsys, "generate", str(checkpoint), f"--backend={compiled}")


def test_backend_that_cannot_train_the_model(files, capsys):
    wide = "train --data=long.txt --block-size=16 --n-head=1 --n-embd=512 --backend=cpp"
    if TABLE["cpp"].max_head_dim < 512 and not TABLE["cpp"].missing:
        assert "head dimension above 256" in refused(capsys, *wide.split())


def damaged(data: bytes):
    from safetensors.torch import save

    middle = bytearray(data)
    middle[-100] ^= 1
    yield "cut", data[: len(data) // 2], "not a readable checkpoint"
    yield "flipped", bytes(middle), "damaged: its contents do not match their checksum"
    yield "relabelled", data.replace(b'steps\\":', b'stepz\\":'), "damaged: its contents do not match their checksum"
    yield "unreadable", data.replace(b'{\\"checksum', b'[\\"checksum'), "damaged: its header cannot be read"
    yield "empty", b"", "not a readable checkpoint"
    yield "other", save({"x": torch.zeros(3)}), "no pygpt checkpoint"


def test_damaged_checkpoints(checkpoint, text, capsys):
    for name, content, message in damaged(checkpoint.read_bytes()):
        out = checkpoint.parent.parent / name
        out.mkdir()
        path = out / "checkpoint.safetensors"
        path.write_bytes(content)
        assert message in refused(capsys, "generate", path)
        assert message in refused(capsys, "train", "--resume", "--data", text, "--out", out)
        assert path.read_bytes() == content


def test_checkpoint_of_another_text(checkpoint, text, capsys):
    Path(text).write_text("Quite another text, of sufficient length for blocks.\n" * 20)
    assert "another text" in refused(capsys, "train", "--resume", "--steps=9", "--out", checkpoint.parent)


# ------------------------------------------------------------------------------- as a process
def test_compile_without_a_compiler(tmp_path, text):
    """One line, before anything is written."""
    env = os.environ | {
        "PYTHONPATH": str(Path(pygpt.__file__).parents[1]),
        "CXX": "/nonexistent",
        "PATH": "/nonexistent",
    }
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pygpt", "train", "--compile", "--data", text, "--out", str(tmp_path / "out")]
    command += ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "--compile" in result.stderr and "compiler" in result.stderr
    assert not (tmp_path / "out").exists()


def test_module_as_a_process(tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(pygpt.__file__).parents[1])}
    command = [sys.executable, "-m", "pygpt", "generate", str(tmp_path / "nothing")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"pygpt: error: no checkpoint at {tmp_path / 'nothing'}\n"


def test_bench_outside_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "pygpt" / "cli.py"))
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert "a checkout of pygpt has them" in refused(capsys, "bench")
