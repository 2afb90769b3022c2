"""Every program in examples/ runs offline on a CPU and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
HALF_THE_DIGITS = torch.finfo(torch.float32).eps ** 0.5


def run(name: str, *arguments) -> str:
    path = os.pathsep.join((str(EXAMPLES.parent), *filter(None, sys.path)))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYGPT_BACKEND": ""}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}


def test_own_block():
    found = run("own_block.py")
    assert float(re.search(r"difference between the backends: (\S+)", found)[1]) < HALF_THE_DIGITS
    assert "layer_norm: cpp" in found


def test_hf_model():
    pytest.importorskip("transformers")
    found = run("hf_model.py")
    assert "2 calls of attention went to pygpt" in found
    differences = [float(n) for n in re.findall(r"logits differ by (\S+)", found)]
    assert len(differences) == 2 and max(differences) < HALF_THE_DIGITS, found


def test_packed_sequences():
    found = run("packed_sequences.py")
    assert float(re.search(r"largest difference: (\S+)", found)[1]) < HALF_THE_DIGITS
    assert re.search(r"packed: [\d.]+ ms; PyTorch, padded: [\d.]+ ms", found)


def test_verify_my_shapes():
    passed, rows = re.search(r"(\d+) of (\d+) pass", run("verify_my_shapes.py")).groups()
    assert passed == rows and int(rows) == 2 * (4 + 6 + 4)


def test_train_and_generate():
    found = run("train_and_generate.py")
    losses = [float(n) for n in re.findall(r"loss (\S+)", found.partition("---")[0])]
    assert len(losses) == 3 and losses[-1] < losses[0] / 2, losses
    assert found.partition("---\n")[2].startswith('"""Trains a small GPT on'), found


def test_benchmark_my_gpu():
    found = run("benchmark_my_gpu.py")
    milliseconds = {name: float(ms) for name, ms in re.findall(r"^(\w+) +([\d.]+) ms", found, re.MULTILINE)}
    ratio = float(re.search(r"is ([\d.]+) times as fast", found)[1])
    assert ratio == pytest.approx(milliseconds["PyTorch"] / milliseconds["pygpt"], rel=0.02)
