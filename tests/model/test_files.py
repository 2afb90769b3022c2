"""Files appear whole or not at all, whoever else writes; a run's folder has one writer; what killed runs left goes."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import pygpt
from pygpt import files
from pygpt.data import UsageError
from pygpt.files import LOCK, TEMPORARY, atomic, locked

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(pygpt.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def write_forever(path: Path, stop: threading.Event, errors: list):
    try:
        while not stop.is_set():
            with atomic(path) as temporary:
                temporary.write_bytes(os.urandom(1) * 1_000_000)
    except Exception as e:  # noqa: BLE001 - the test shows it
        errors.append(e)


def test_two_writers_of_one_file(tmp_path):
    """In turn, a file is one writer's or the other's: never a mixture, never a part."""
    path, stop, errors = tmp_path / "file.bin", threading.Event(), []
    writers = [threading.Thread(target=write_forever, args=(path, stop, errors)) for _ in range(2)]
    code = "import sys, threading; from pathlib import Path; from tests.model.test_files import write_forever as w\n"
    code += (
        "e = []; t = threading.Event(); threading.Timer(3, t.set).start(); w(Path(sys.argv[1]), t, e); sys.exit(len(e))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], env=ENVIRONMENT) as process:
        for writer in writers:
            writer.start()
        while process.poll() is None:
            content = path.read_bytes() if path.exists() else b""
            assert len(content) in (0, 1_000_000) and content == content[:1] * len(content)
        stop.set()
        for writer in writers:
            writer.join()
    assert process.returncode == 0 and errors == [] and os.listdir(tmp_path) == ["file.bin"]


def test_a_file_keeps_its_mode_and_its_name_in_errors(tmp_path):
    (tmp_path / "plain").touch()
    with atomic(tmp_path / "file") as temporary:
        temporary.write_text("x")
        temporary.chmod(0o600)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    for path in (tmp_path / "missing" / "file", tmp_path / "plain" / "file"):
        with pytest.raises(OSError) as e, atomic(path):
            pass
        assert e.value.filename == str(path)
    with pytest.raises(OSError, match="No space") as e, atomic(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert e.value.filename == str(tmp_path / "file") and (tmp_path / "file").read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == ["file", "plain"]


@pytest.mark.skipif(os.name != "posix", reason="links need a privilege on Windows")
def test_a_symbolic_link_stays_one(tmp_path):
    for folder in ("run", "disk"):
        (tmp_path / folder).mkdir()
    link, target = tmp_path / "run" / "file", tmp_path / "disk" / "other"
    link.symlink_to(Path("..", "disk", "other"))
    for text in ("new", "again"):  # at first the link dangles
        with atomic(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink() and target.read_text() == text and not target.is_symlink()
    assert os.listdir(link.parent) == ["file"] and os.listdir(target.parent) == ["other"]


@pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")
def test_a_full_disk_names_the_file(tmp_path):
    """A limit on the size of files stands for the full disk."""
    code = f"""
import resource, sys
from pathlib import Path
from pygpt import cli, train
log = train.Log(Path({str(tmp_path)!r}, "log.jsonl"), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
def command(argv):
    for step in range(100):
        log.write(step=step, loss=0.5)
cli._run_command = command if sys.argv[1:] == ["log"] else cli._run_command
sys.exit(cli.main(sys.argv[1:]))
"""
    (tmp_path / "text").write_text("some text " * 1000)
    train = f"train --data={tmp_path / 'text'} --out={tmp_path} --n-layer=1 --n-head=1 --n-embd=16 --force".split()
    train.append("--block-size=16")
    for arguments, name in (["log"], "log.jsonl"), (train, "checkpoint.safetensors"):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert str(tmp_path / name) in done.stderr and TEMPORARY not in done.stderr
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def abandoned(folder: Path, name: str, age: float) -> Path:
    """What a writer leaves that was killed."""
    left = folder / f"{TEMPORARY}{name}"
    left.mkdir()
    for path in (left / "file.bin", left):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    return left


def test_what_killed_writers_left_is_removed(tmp_path):
    """At once by whoever holds the folder, else when it is old; nobody else's files are touched."""
    other = tmp_path / ".tmpabc"
    other.touch()
    old, new = abandoned(tmp_path, "old", 2 * files.ABANDONED), abandoned(tmp_path, "new", files.ABANDONED / 2)
    with atomic(tmp_path / "file") as temporary:
        temporary.touch()
        assert not old.exists() and new.exists()
    with locked(tmp_path):
        assert not new.exists()
    assert sorted(os.listdir(tmp_path)) == [LOCK, ".tmpabc", "file"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder), pytest.raises(UsageError, match="another run is writing"), locked(folder):
        pass
    code = f"import time; from pathlib import Path; from pygpt.files import locked\nwith locked(Path({str(folder)!r})):"
    code += " print('here', flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        kept = abandoned(folder, "its", 0)
        with pytest.raises(UsageError, match="another run is writing"), locked(folder):
            pass
        assert kept.exists()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with locked(folder):
        assert not kept.exists()
    with pytest.raises(UsageError, match="is a file, not a folder"), locked(folder / LOCK):
        pass


@pytest.mark.parametrize("without", ["fcntl", "locks"])
def test_without_locks_a_run_goes_on(without, tmp_path, monkeypatch):
    """And it removes nothing that may be another's."""
    if without == "fcntl":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        fcntl = pytest.importorskip("fcntl")
        refuse = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available"))
        monkeypatch.setattr(fcntl, "flock", refuse)
    left = abandoned(tmp_path, "its", 0)
    with locked(tmp_path), locked(tmp_path):
        assert left.exists()
