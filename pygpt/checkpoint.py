"""A checkpoint is one safetensors file: the tensors of a run, the model's under their own names, and JSON metadata."""

import ctypes
import json
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .data import UsageError
from .files import atomic

FORMAT = 1
METADATA: dict[str, Any] = {
    "step": int,
    "settings": dict,
    "config": dict,
    "vocabulary": (str, type(None)),
    "corpus": str,
    "scaler": dict,
}


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> int:
    total = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        total = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), total))
    return total


def _bytes(t: Tensor) -> Any:
    """The memory of a contiguous tensor, not copied. NumPy is not needed."""
    return (ctypes.c_char * t.nbytes).from_address(t.data_ptr()) if t.nbytes else b""


def need_numpy() -> None:
    """Raises ModuleNotFoundError before a run starts rather than when it is saved: safetensors writes through NumPy."""
    import numpy  # noqa: F401


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """OSError if the file cannot be written. The old file is then untouched."""
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    metadata = json.loads(json.dumps({"format": FORMAT, **metadata}))  # as `load` will read it
    header = json.dumps({"checksum": _checksum(tensors, metadata), **metadata})
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, {"pygpt": header})
        except SafetensorError as e:
            raise OSError(f"cannot write {path}: {e}") from e


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> tensors, metadata. UsageError if the file does not exist, is damaged or is no checkpoint."""
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as f:
            header = (f.metadata() or {}).get("pygpt")
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{path} is not a readable checkpoint: {e}") from None
    if header is None:
        raise UsageError(f"{path} is a safetensors file, but no pygpt checkpoint")
    try:
        metadata = json.loads(header)
        checksum, version = metadata.pop("checksum"), metadata["format"]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UsageError(f"{path} is damaged: its header cannot be read") from None
    if version != FORMAT:
        raise UsageError(f"{path} has checkpoint format {version}; this version reads {FORMAT}")
    if checksum != _checksum(tensors, metadata):
        raise UsageError(f"{path} is damaged: its contents do not match their checksum")
    if wrong := [key for key, types in METADATA.items() if not isinstance(metadata.get(key, ...), types)]:
        raise UsageError(f"{path} is damaged: its {', '.join(wrong)} cannot be read")
    return tensors, metadata
