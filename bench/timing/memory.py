"""Peak memory of one call, in addition to what was allocated before it began.

On a GPU the caching allocator counts. On a CPU several allocators are at work (PyTorch's, the scratch of MKL and
oneDNN, our kernels' own), so the operating system counts: free heap pages are returned, the high-water mark of resident
memory is reset, and the mark after the call less the memory resident before it is the figure. Results are part of it.
The call runs in a thread of its own, for which OpenMP starts new workers, so that buffers which libraries and our
kernels keep for each thread count as well.

During the call every large block comes from mmap, so that freed memory is returned at once (docs/measured.md B2). The
C library prefers free blocks of the heap: they are taken before the call and freed after it. Afterwards the C library's
thresholds are those of a program that has once freed 32 MB.
"""

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

RESET = Path("/proc/self/clear_refs")  # Linux: writing 5 resets VmHWM
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
EVERY, USUAL = 64 << 10, 32 << 20  # blocks from here on come from mmap


class _Mallinfo(ctypes.Structure):
    """glibc's mallinfo2: ten sizes, of which ``arena`` is what the heap holds, free or in use."""

    _fields_ = [("arena", ctypes.c_size_t), ("others", ctypes.c_size_t * 9)]


def peak_bytes(call: Callable, device: str = "cpu") -> int | None:
    """Measures ``call``, which must have run before; None where the system cannot say."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        with _no_heap(), ThreadPoolExecutor(1) as fresh:
            return fresh.submit(_beyond_before, call).result()
    except (OSError, KeyError, AttributeError):
        return None


def _beyond_before(call: Callable) -> int:
    torch.ones(1 << 20).add_(1)  # on all threads: starts this one's workers
    RESET.write_text("5")
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


@contextmanager
def _no_heap():
    """Blocks of ``EVERY`` bytes and more come from mmap; AttributeError where the C library is not glibc."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes, libc.mallinfo2.restype = ctypes.c_void_p, [ctypes.c_void_p], _Mallinfo
    libc.mallopt(M_MMAP_THRESHOLD, EVERY)
    taken, size = [], libc.mallinfo2().arena
    try:
        while libc.mallinfo2().arena <= size:  # the heap grows once no free block is large enough
            taken.append(libc.malloc(EVERY - 1024))
        libc.malloc_trim(0)
        yield
    finally:
        for block in taken:
            libc.free(block)
        libc.mallopt(M_MMAP_THRESHOLD, USUAL)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * USUAL)


def resident(which: str) -> int:
    """Returns bytes: VmRSS is the present value, VmHWM the largest since the last reset."""
    return _kilobytes("/proc/self/status")[which] * 1024


def available(device: str = "cpu") -> int | None:
    """Returns the bytes that the device can still give; None where the system doesn't say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return _kilobytes("/proc/meminfo")["MemAvailable"] * 1024
    except (OSError, KeyError):
        return None


def _kilobytes(path: str) -> dict[str, int]:
    fields = (line.split() for line in Path(path).read_text().splitlines())
    return {f[0].rstrip(":"): int(f[1]) for f in fields if f[-1] == "kB"}
