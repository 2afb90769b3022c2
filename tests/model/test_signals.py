"""A training run that is told to stop is saved first: by Ctrl-C, SIGTERM, SIGHUP, or because its reader has gone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pygpt
from pygpt import checkpoint, cli

ROOT = Path(pygpt.__file__).parents[1]
TINY = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16", "--batch-size=2", "--eval-iters=1", "--warmup=1"]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


@pytest.fixture
def start(tmp_path):
    """Starts an endless run in tmp_path / "run" and returns it once it trains; ends it after the test."""
    (tmp_path / "text").write_text("A text about nothing, but long enough for a block.\n" * 20)
    started = []

    def start(wrapper=(), steps=3, **options):
        command = [*wrapper, sys.executable, "-m", "pygpt", "train", *TINY, "--steps=1000000", "--eval-interval=100000"]
        command += [f"--data={tmp_path / 'text'}", f"--out={tmp_path / 'run'}"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        started.append(subprocess.Popen(command, env=env, **options))
        wait_for_steps(started[0], tmp_path, steps)
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_steps(process, tmp_path: Path, steps: int):
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < steps + 1:
        assert process.poll() is None
        time.sleep(0.01)


def assert_saved(tmp_path: Path):
    """The checkpoint is of the last step that the log knows, and the run can be resumed."""
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    step = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")[1]["step"]
    assert step == entries[-1]["step"] > 0
    assert cli.main(["train", "--resume", f"--out={tmp_path / 'run'}", f"--steps={step + 1}"]) == 0


@pytest.mark.parametrize("name, line", [
    ("SIGINT", "interrupted"), ("SIGTERM", "stopped by SIGTERM"),
    pytest.param("SIGHUP", "stopped by SIGHUP", marks=pytest.mark.slow),  # a closed terminal sends it, below
])  # fmt: skip
def test_a_signal_saves_the_run(name, line, start, tmp_path):
    process = start()
    process.send_signal(getattr(signal, name))
    out, err = process.communicate()
    assert (process.returncode, err) == (128 + getattr(signal, name), f"pygpt: {line}\n")
    assert "continue with --resume" in out
    assert_saved(tmp_path)


SLOW_STEP = """
import signal, sys, time
from pygpt import cli, train
def step(self):
    print("step", flush=True)
    time.sleep(99)
train.Trainer.step = step
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("first, second, code", [
    ("SIGTERM", "SIGINT", 130), ("SIGINT", "SIGHUP", -1),
    *(pytest.param(first, "SIGTERM", -15, marks=pytest.mark.slow) for first in ("SIGTERM", "SIGHUP")),
])  # fmt: skip
def test_a_second_signal_acts_at_once(first, second, code, tmp_path):
    """The first waits for the end of the step."""
    (tmp_path / "text").write_text("A text about nothing, but long enough for a block.\n" * 20)
    command = [
        sys.executable,
        "-c",
        SLOW_STEP,
        "train",
        *TINY,
        f"--data={tmp_path / 'text'}",
        f"--out={tmp_path / 'run'}",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert any(line == "step\n" for line in process.stdout)
        process.send_signal(getattr(signal, first))
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(getattr(signal, second))
        assert process.wait(20) == code


def test_what_is_ignored_stays_ignored(start, tmp_path):
    """Under nohup the run goes on when the terminal closes."""
    process = start(("nohup",), stdin=subprocess.DEVNULL)
    process.send_signal(signal.SIGHUP)
    now = len((tmp_path / "run" / "log.jsonl").read_bytes().splitlines())
    wait_for_steps(process, tmp_path, now + 5)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    assert_saved(tmp_path)


def test_a_terminal_that_closes(start, tmp_path):
    """Its end is a SIGHUP, and every line printed after it an error."""
    master, slave = os.openpty()

    def lead():
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = start(stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=lead)
    os.close(slave)
    os.close(master)
    assert process.wait(60) == 129
    assert_saved(tmp_path)


def test_a_reader_that_leaves(start, tmp_path):
    process = start()
    process.stdout.close()
    process.stdout = None
    assert process.wait(60) == 1
    assert_saved(tmp_path)
