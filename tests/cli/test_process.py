"""The command line in a process of its own: its streams, what is not installed, its environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pygpt
from tests import processes
from tests.cli.commands import TINY


@pytest.fixture
def forked(run_python):
    """Runs what stands on a command line after "python"."""
    return lambda *command, **environment: run_python(*processes.source_of(command), **environment)


def process(*arguments, **environment) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(Path(pygpt.__file__).parents[1])} | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_streams_that_are_not_utf8(encoding, checkpoint):
    """What an encoding lacks becomes a question mark."""
    arguments = "-m", "pygpt", "generate", str(checkpoint), "--prompt=né →", "--max-new-tokens=50", "--temperature=9"
    found = process(*arguments, PYTHONIOENCODING=encoding)
    assert (found.returncode, found.stderr) == (0, b"")
    assert found.stdout.startswith("né →".encode(encoding, "replace"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output(unbuffered, checkpoint):
    env = os.environ | {"PYTHONPATH": str(Path(pygpt.__file__).parents[1]), "PYTHONUNBUFFERED": unbuffered}
    for arguments in ["info"], ["generate", str(checkpoint)]:
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "pygpt", *arguments]
            found = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        line = "pygpt: error: cannot write to standard output: No space left on device\n"
        assert (found.returncode, found.stderr) == (2, line)


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_closed_standard_output(checkpoint):
    env = os.environ | {"PYTHONPATH": str(Path(pygpt.__file__).parents[1])}
    for arguments in ["info"], ["generate", str(checkpoint), "--max-new-tokens=5"]:
        command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "pygpt", *arguments]
        found = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
        assert (found.returncode, found.stderr) == (0, "")


WITHOUT = """
import sys, warnings
sys.modules[sys.argv[1]] = None  # importing it is a ModuleNotFoundError
warnings.simplefilter("ignore")  # torch's, about NumPy
from pygpt import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def test_without_numpy(checkpoint, text, tmp_path):
    """What can do without it does; what saves says so before it begins."""
    run = str(tmp_path / "new")
    for arguments in (["train", *TINY, "--data", text], ["demo", "--steps=3"]):
        found = process("-c", WITHOUT, "numpy", *arguments, "--out", run)
        line = b"pygpt: error: this command needs numpy, which is not installed\n"
        assert (found.returncode, found.stdout, found.stderr) == (2, b"", line) and not os.path.exists(run)
    for arguments in (["generate", str(checkpoint)], ["verify", "--ops=relu,mlp", "--dtypes=float32"]):
        found = process("-c", WITHOUT, "numpy", *arguments)
        assert (found.returncode, found.stderr) == (0, b"") and found.stdout


def test_without_rich(text, tmp_path, forked):
    """Tables are plain, and a run in a terminal prints lines."""
    for arguments in (
        ["verify", "--ops=relu", "--dtypes=float32"],
        ["train", *TINY, "--data", text, f"--out={tmp_path / 'run'}"],
    ):
        found = forked("-c", WITHOUT, "rich", *arguments)
        assert (found.returncode, found.stderr) == (0, "") and found.stdout
    code = "import sys; sys.stdout.isatty = lambda: True\n" + WITHOUT
    found = forked("-c", code, "rich", "train", "--force", *TINY, "--data", text, f"--out={tmp_path / 'run'}")
    assert found.returncode == 0 and "training  2/2" in found.stdout


def test_without_safetensors(tmp_path, forked):
    found = forked("-c", WITHOUT, "safetensors", "generate", str(tmp_path))
    assert (found.returncode, found.stderr.count("\n")) == (2, 1) and "this command needs safetensors" in found.stderr


def test_a_wrong_backend_in_the_environment_of_a_process(forked):
    for command in ("info", "bench"):
        found = forked("-m", "pygpt", command, PYGPT_BACKEND="cpu")
        assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1), found.stderr
        assert "unknown backend 'cpu'; known: cpp" in found.stderr


@pytest.mark.parametrize("setting", ["0", "-1", "two", "1.5", "0x4", "9" * 30])
def test_a_wrong_number_of_compilers(setting):
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1]); jobs = runpy.run_path(sys.argv[1] + '/setup.py')['jobs']"
    )
    root = str(Path(__file__).parents[2])
    found = process("-c", code + "; print(jobs())", root, MAX_JOBS=setting)
    line = f"pygpt: MAX_JOBS must be a number from 1 on, got {setting!r}\n".encode()
    assert (found.returncode, found.stdout, found.stderr) == (2, b"", line)


def test_a_right_number_of_compilers(monkeypatch):
    import runpy

    jobs = runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))["jobs"]
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    for setting, number in (("3", 3), (" 12 ", 12), ("", 7)):
        monkeypatch.setenv("MAX_JOBS", setting)
        assert jobs() == number
    monkeypatch.delenv("MAX_JOBS")
    assert jobs() == 7


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


def test_module_as_a_process(tmp_path, forked):
    result = forked("-m", "pygpt", "generate", tmp_path / "nothing")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"pygpt: error: no checkpoint at {tmp_path / 'nothing'}\n"
