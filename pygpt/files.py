"""How every file of this package is written: whole or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path):
    """Yields a path in the same folder to write; on success it is synced to disk and moved to ``path``."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes it readable by its owner only
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself is durable once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
