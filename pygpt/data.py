"""Corpora, tokenizers, and batches that are a pure function of the seed and the step."""

import codecs
import hashlib
import math
import os
import sys
import sysconfig
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

STDLIB_BYTES = 12_000_000  # the default corpus ends here, so that it differs little between Python versions
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class UsageError(ValueError):
    """Bad input from the user. The command line prints the message in one line and exits with code 2."""


def check_number(flag: str, value: float, low: float | None = None, below: float = 2**63) -> None:
    """UsageError unless ``value`` is finite, at least ``low`` and, for an integer, less than ``below``."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{flag} must be a finite number, got {value}")
    if low is not None and value < low:
        raise UsageError(f"{flag} must be at least {low}, got {value}")
    if isinstance(value, int) and value >= below:
        raise UsageError(f"{flag} must be less than {below}, got {value}")


def check_memory(what: str, needed: int) -> None:
    """UsageError where this machine has less memory. Linux would grant the allocation and kill the process later."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # on Windows the allocation itself fails
        return
    if needed > total:
        raise UsageError(f"out of memory: {what} take {needed:,} bytes, this machine has {total:,}")


class Bytes:
    """Token = byte of the UTF-8 text."""

    name, vocabulary, size = "byte", None, 256

    def encode(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Tokens past the vocabulary (a model may have more rows) become '?'."""
        return bytes(t if t < 256 else 0x3F for t in tokens)


class Chars:
    """Token = index into the sorted characters of the training text."""

    name = "char"

    def __init__(self, vocabulary: str):
        self.vocabulary, self.size = vocabulary, len(vocabulary)
        self.index = {c: i for i, c in enumerate(vocabulary)}

    def encode(self, data: bytes) -> Tensor:
        try:
            return torch.tensor([self.index[c] for c in _text(data)], dtype=torch.int32)
        except KeyError as e:
            raise UsageError(f"the character {e.args[0]!r} is not in the model's vocabulary") from None

    def decode(self, tokens: Iterable[int]) -> bytes:
        return "".join(self.vocabulary[t] if t < self.size else "?" for t in tokens).encode()


def tokenizer(vocabulary: str | None) -> Bytes | Chars:
    return Bytes() if vocabulary is None else Chars(vocabulary)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"the text is not UTF-8 ({e.reason} at byte {e.start}); --tokens byte takes anything"
        ) from None


def read_text(path: str | None) -> bytes:
    """The bytes of a file, of all text files under a folder (sorted by path), or by default the standard library's.

    Byte order marks are removed. Files of a folder that hold zero bytes are skipped and named on stderr.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        data = b"".join(f.read_bytes() for f in _files(root, skip=_NOT_LIBRARY) if f.suffix == ".py")
        if not data:
            raise UsageError(f"this Python has no library sources under {root}; pass --data FILE_OR_FOLDER")
        return data[: data.rfind(b"\n", 0, STDLIB_BYTES) + 1]
    root = Path(path)
    if not root.exists():
        raise UsageError(f"no such file or folder: {path}")
    if not (root.is_file() or root.is_dir()):
        raise UsageError(f"--data {path} is neither a file nor a folder (a pipe cannot be read again on --resume)")
    files = _files(root) if root.is_dir() else [root]
    try:
        contents = [f.read_bytes().removeprefix(codecs.BOM_UTF8) for f in files]
    except OSError as e:
        raise UsageError(f"cannot read {e.filename}: {e.strerror}") from None
    skipped = [f.relative_to(root).as_posix() for f, c in zip(files, contents, strict=True) if _skips(root, c)]
    data = b"".join(c for c in contents if not _skips(root, c))
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    note = f"skipped {', '.join(skipped[:3])}{more}, which hold zero bytes, as UTF-16 text and binary files do"
    if not data:
        raise UsageError(f"no text in {path}" + (f"; {note}" if skipped else ""))
    if skipped:
        print(f"pygpt: {path}: {note}", file=sys.stderr)
    return data


def _skips(root: Path, content: bytes) -> bool:
    """Whether a file of the folder ``root`` holds no text. A file that the user named is never skipped."""
    return root.is_dir() and b"\0" in content


def _files(root: Path, skip: Collection[str] = ()) -> list[Path]:
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [d for d in folders if d not in skip and not d.startswith(".")]
        paths += [Path(folder, f) for f in files if not f.startswith(".")]
    return sorted((path for path in paths if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


@dataclass
class Corpus:
    """A text as 1-D tensors of tokens, the first 90 % in ``train``. ``digest`` identifies the text."""

    tokenizer: Bytes | Chars
    train: Tensor
    val: Tensor
    digest: str

    @classmethod
    def load(cls, path: str | None, tokens: str, block_size: int) -> "Corpus":
        """UsageError if the text is missing, empty, or either part is shorter than a block and its targets."""
        data = read_text(path)
        tokenizer = Bytes() if tokens == Bytes.name else Chars("".join(sorted(set(_text(data)))))
        encoded = tokenizer.encode(data)
        n = len(encoded) * 9 // 10
        train, val = encoded[:n], encoded[n:]
        if len(val) <= block_size:
            raise UsageError(
                f"the text has {len(encoded)} tokens, its validation part (the last 10 %) {len(val)}: "
                f"too short for --block-size {block_size}"
            )
        return cls(tokenizer, train, val, hashlib.sha256(data).hexdigest())

    def batch(self, split: str, batch_size: int, block_size: int, *key: object) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) int64 at random offsets, drawn from the split and the key (seed, step, ...)."""
        tokens = self.train if split == "train" else self.val
        generator = torch.Generator().manual_seed(seed_of(split, *key))
        starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
        window = tokens[starts + torch.arange(block_size + 1)].long()
        return window[:, :-1], window[:, 1:]


def seed_of(*key: object) -> int:
    """A 63-bit seed from any key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1
