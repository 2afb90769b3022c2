"""CPU tensors that end at a protected page: see guarded.cpp."""

import ctypes
import functools
from contextlib import contextmanager

import torch

from tests import native


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(native.build("guarded.cpp", flags=native.torch_flags(), version=f"-{torch.__version__}")))


@contextmanager
def tensors(aligned: bool):
    """Tensors made meanwhile end at a protected page; if ``aligned``, they start at a multiple of 64 bytes instead."""
    _library().guard(aligned)
    overrun = 0
    try:
        yield
    finally:
        overrun = _library().unguard()
    assert not overrun, f"{overrun} tensors were overrun: the bytes before or behind them were written to"
