"""Atomic writes of files, and the lock that gives a run's folder one writer."""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .data import UsageError

try:
    import fcntl
except ImportError:  # on Windows, two runs in one folder do not notice each other
    fcntl = None  # type: ignore[assignment]

LOCK, TEMPORARY = ".pygpt-lock", ".pygpt-tmp-"
ABANDONED = 3600.0  # seconds without a write after which a temporary file counts as left by a dead process


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a path to write; on success it is synced to disk and moved to ``path``. OSError names ``path``.

    Where that is a symbolic link, its target is replaced. The yielded path is in a new temporary folder beside the
    file, so that no two writers share one. What a killed writer leaves, safetensors' own temporary file included, is
    removed later.
    """
    target = Path(os.path.realpath(path))
    try:
        _remove_leftovers(target.parent, time.time() - ABANDONED)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=target.parent, ignore_cleanup_errors=True) as folder:
            temporary = Path(folder, path.name)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes the file readable by its owner only
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, target)
        if os.name == "posix":  # the rename is durable once the folder is synced
            parent = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
    except OSError as e:
        raise naming(path, e) from e


def naming(path: Path, e: OSError) -> OSError:
    """The same error with the file name that the caller used."""
    return e if e.errno is None else OSError(e.errno, e.strerror, str(path))


def must_be_folder(path: Path) -> None:
    """UsageError where ``path`` is a file."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates ``folder`` and locks it for this process. UsageError while another process holds the lock.

    The kernel frees the lock of a process that died. The holder removes what killed runs left half written.
    """
    must_be_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        if _acquired(file, folder):
            _remove_leftovers(folder, math.inf)
        yield


def _acquired(file: IO[str], folder: Path) -> bool:
    """False where the system or the file system has no locks. UsageError where another process holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another run is writing to {folder}") from None
    except OSError:
        return False
    return True


def _remove_leftovers(folder: Path, before: float) -> None:
    """Removes the temporary folders of `atomic` that were last written to before this time."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        try:
            written = max(f.stat().st_mtime for f in (leftover, *leftover.iterdir()))
        except OSError:  # its writer has just removed it
            continue
        if written < before:
            shutil.rmtree(leftover, ignore_errors=True)
