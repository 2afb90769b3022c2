"""Checkpoints and logs that are damaged or do not belong: one line, exit code 2, and nothing is lost."""

from pathlib import Path

import pytest
import torch

from pygpt import checkpoint as checkpoints
from pygpt import cli
from tests.cli.commands import refused


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


def rewritten(checkpoint, change):
    """The checkpoint with a right checksum over what ``change`` did to its tensors and metadata."""
    tensors, metadata = checkpoints.load(checkpoint)
    tensors = {name: t.clone() for name, t in tensors.items()}
    change(tensors, metadata)
    checkpoints.save(checkpoint, tensors, metadata)


WEIGHT = "transformer.h.0.attn.c_attn.weight"
WRONG_ENTRIES = {
    "exp_avg missing": lambda t, m: t.pop(f"adamw.exp_avg.{WEIGHT}"),
    "step missing": lambda t, m: t.pop(f"adamw.step.{WEIGHT}"),
    "all missing": lambda t, m: [t.pop(name) for name in list(t) if name.startswith("adamw.")],
    "unknown key": lambda t, m: t.update({f"adamw.momentum.{WEIGHT}": torch.zeros(48, 16)}),
    "unknown parameter": lambda t, m: t.update({"adamw.exp_avg.nobody": torch.zeros(3)}),
    "no parameter": lambda t, m: t.update({"adamw.": torch.zeros(3)}),
    "exp_avg_sq's shape": lambda t, m: t.update({f"adamw.exp_avg_sq.{WEIGHT}": torch.zeros(16, 48)}),
    "step's shape": lambda t, m: t.update({f"adamw.step.{WEIGHT}": torch.ones(1)}),
    "dtype": lambda t, m: t.update({f"adamw.exp_avg.{WEIGHT}": torch.zeros(48, 16, dtype=torch.float64)}),
    "weight's dtype": lambda t, m: t.update({WEIGHT: torch.zeros(48, 16, dtype=torch.float64)}),
    "weight missing": lambda t, m: t.pop(WEIGHT),
    "unknown weight": lambda t, m: t.update({"lm_head.bias": torch.zeros(256)}),
    "negative step": lambda t, m: m.update(step=-1),
    "a scaler": lambda t, m: m.update(scaler={"scale": 2.0}),
    "no scaler": lambda t, m: m.pop("scaler"),
    "no step": lambda t, m: m.update(step=None),
    "no settings": lambda t, m: m.pop("settings"),
    "setting's kind": lambda t, m: m["settings"].update(n_layer="one"),
    "unknown setting": lambda t, m: m["settings"].update(depth=3),
}


@pytest.mark.parametrize("what", WRONG_ENTRIES)
def test_checkpoints_with_wrong_entries(what, checkpoint, capsys):
    """Each is refused, in one line, before anything of it is loaded."""
    rewritten(checkpoint, WRONG_ENTRIES[what])
    before = checkpoint.read_bytes()
    message = refused(capsys, "train", "--resume", "--steps=3", "--out", checkpoint.parent)
    assert "does not fit" in message or "is damaged" in message
    assert checkpoint.read_bytes() == before


def test_a_right_checkpoint_may_be_rewritten(checkpoint):
    """The test above refuses what it changes, not how it writes."""
    rewritten(checkpoint, lambda t, m: None)
    assert cli.main(["train", "--resume", "--steps=3", "--out", str(checkpoint.parent)]) == 0


@pytest.mark.parametrize("line", [
    b"\xff\xfe", "é".encode("latin-1"), b"[1]", b"5", b"null", b"{}", b'{"loss": 1.0}', b'{"step": "1"}', b"text",
    b'{"step": 1, "loss": "low"}', b"", b"[" * 100_000,
], ids=repr)  # fmt: skip
def test_a_log_that_is_none(line, checkpoint, capsys):
    log = checkpoint.parent / "log.jsonl"
    content = log.read_bytes() + line[:10] * (len(line) // 10 or 1) + b"\n" + log.read_bytes()
    log.write_bytes(content)
    message = refused(capsys, "train", "--resume", "--steps=3", "--out", checkpoint.parent)
    assert f"{log} is no log of a training run: line 5" in message and log.read_bytes() == content
