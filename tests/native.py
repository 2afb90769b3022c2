"""Builds the sources of this folder that tests load with ctypes."""

import fcntl
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CXX = (os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-shared", "-fPIC")


def build(*sources: str, flags=(), compiler=CXX, depends: tuple[Path, ...] = (), version: str = "") -> Path:
    """The library of the sources, compiled where it is missing or older than they and what they depend on.

    version: of what it was compiled against.
    """
    folder, paths = ROOT / "build" / "native", [HERE / source for source in sources]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{paths[0].stem}{version}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in (*paths, *depends))
        if not library.exists() or library.stat().st_mtime < newest:
            subprocess.run([*compiler, *paths, "-o", library, *flags], check=True)
    return library


def torch_flags() -> list[str]:
    """Of a library that is compiled against torch's headers and linked to torch."""
    from torch.utils import cpp_extension

    includes = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    return [*includes, *libraries, "-ltorch", "-ltorch_cpu", "-lc10"]
