"""How every file of this package is written: whole or not at all; and how a run keeps others out of its folder."""

import math
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from .data import UsageError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder do not notice each other there
    fcntl = None

LOCK, TEMPORARY = ".pygpt-lock", ".pygpt-tmp-"
ABANDONED = 3600.0  # seconds: a temporary file that nobody wrote to for so long belongs to a process that died


@contextmanager
def atomic(path: Path):
    """Yields a path to write; on success it is synced to disk and moved to ``path``. OSError names ``path``.

    It lies in a temporary folder of its own beside ``path``: no two writers share a file, and what a killed one leaves,
    safetensors' own temporary file included, is found and removed later.
    """
    try:
        _remove_leftovers(path.parent, time.time() - ABANDONED)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent, ignore_cleanup_errors=True) as folder:
            temporary = Path(folder, path.name)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes it readable by its owner only
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        if os.name == "posix":  # the rename itself is durable once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as e:
        raise naming(path, e) from e


def naming(path: Path, e: OSError) -> OSError:
    """The same error, of the file that was asked for."""
    return e if e.errno is None else OSError(e.errno, e.strerror, str(path))


def must_be_folder(path: Path):
    """UsageError where a file is in the way of ``path``."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a folder")


@contextmanager
def locked(folder: Path):
    """Makes ``folder`` and holds it for this process; UsageError while another one holds it.

    The kernel frees the lock of a process that died. Whoever holds it removes what killed runs left half written.
    """
    must_be_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        if _acquired(file, folder):
            _remove_leftovers(folder, math.inf)
        yield


def _acquired(file, folder: Path) -> bool:
    """False where the system, or the file system, knows no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another run is writing to {folder}") from None
    except OSError:
        return False
    return True


def _remove_leftovers(folder: Path, before: float):
    """Removes the temporary folders of `atomic` that were last written to before this time."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        try:
            written = max(f.stat().st_mtime for f in (leftover, *leftover.iterdir()))
        except OSError:  # its writer has just removed it
            continue
        if written < before:
            shutil.rmtree(leftover, ignore_errors=True)
