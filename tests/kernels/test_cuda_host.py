"""What the CUDA backend's host code asks of CUDA and of torch, and in which order: recorded by stubs, without a GPU."""

import ctypes
import shutil
import sysconfig

import pytest
import torch

from tests import native

ROOT = native.ROOT
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.fixture(scope="module")
def with_stream():
    """(device, what cudaSetDevice returns, whether the body throws) -> the calls, in order."""
    flags = ["-O1", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{sysconfig.get_paths()['include']}"]
    depends = tuple((ROOT / "csrc").glob("*.h")) + tuple((ROOT / "csrc" / "bind").iterdir())
    library = native.build(
        "record_binding.cpp", flags=[*flags, *native.torch_flags()], depends=depends, version=f"-{torch.__version__}"
    )
    function = ctypes.CDLL(str(library)).record_with_stream
    function.restype = ctypes.c_char_p
    return lambda *arguments: function(*arguments).decode().splitlines()


SET_UP = ["guard 3", "cudaSetDevice 3", "stream of 3"]
BODY = ["body on 3, its stream", "empty 100 on 3", "empty 7 on 3", "two memories"]
SCRATCH_IS_FREED = ["free", "free"]


def test_kernels_run_on_their_device_and_its_stream(with_stream):
    """Both runtimes are set to the device first, scratch memory is freed afterwards, and then the guard ends."""
    assert with_stream(3, 0, False) == [*SET_UP, *BODY, *SCRATCH_IS_FREED, "end of guard"]


def test_an_error_leaves_nothing_behind(with_stream):
    calls = with_stream(3, 0, True)
    assert calls == [*SET_UP, *BODY, *SCRATCH_IS_FREED, "end of guard", "error: the body's error"]


def test_a_device_that_cannot_be_set_is_an_error(with_stream):
    *calls, error = with_stream(3, 1, False)
    assert calls == [*SET_UP[:2], "end of guard"] and "pygpt: a planted error" in error


@pytest.fixture
def runtime():
    """platform.cuh's launches, compiled by nvcc, over a recording CUDA runtime."""
    if NVCC is None:
        pytest.skip("no nvcc")
    compiler = (NVCC, "-std=c++17", "-O1", "-arch=sm_80", "-Xcompiler=-fPIC", "-shared", "-cudart=none")
    depends = ROOT / "csrc" / "cuda" / "platform.cuh", ROOT / "csrc" / "ops.h"
    library = native.build("record_launch.cu", "record_runtime.cpp", compiler=compiler, depends=depends)
    fresh = shutil.copy(library, library.with_suffix(".fresh.so"))  # which has allowed no kernel anything yet
    return _Runtime(ctypes.CDLL(str(fresh)))


class _Runtime:
    def __init__(self, library):
        self.library = library
        library.record_launch.restype = library.recorded.restype = ctypes.c_char_p

    def launch(self, first: bool, device: int, shared: int, stream: int = 7) -> tuple[str, list[str]]:
        """The error, if any, and the calls."""
        error = self.library.record_launch(first, device, shared, stream) or b""
        return error.decode(), self.library.recorded().decode().splitlines()


def test_launches(runtime):
    """On the stream, with the shared memory asked for; more than 48 KB is allowed once per kernel and device."""

    def launched(kernel, shared, allowed):
        more = [f"{kernel}: may have {shared}"] if allowed else []
        return "", [*more, f"{kernel}: grid 5, block 64, shared {shared}, stream 7", "last error"]

    assert runtime.launch(True, 0, 1000) == launched("first", 1000, False)
    assert runtime.launch(True, 0, 60_000) == launched("first", 60_000, True)
    assert runtime.launch(True, 0, 60_000) == launched("first", 60_000, False)
    assert runtime.launch(True, 0, 50_000) == launched("first", 50_000, False)
    assert runtime.launch(True, 1, 60_000) == launched("first", 60_000, True)
    assert runtime.launch(False, 0, 60_000) == launched("second", 60_000, True)
    assert runtime.launch(True, 0, 70_000) == launched("first", 70_000, True)
    assert runtime.launch(True, 0, 47 << 10) == launched("first", 47 << 10, False)  # 1 KB is for static variables
    assert runtime.library.record_most_shared(3) == 1003

    runtime.library.record_errors(0, 1)  # a kernel that may not have it is not launched, and is asked for again
    for _ in range(2):
        assert runtime.launch(True, 0, 80_000) == ("a planted error", ["first: may have 80000", "last error"])
    runtime.library.record_errors(1, 0)
    assert runtime.launch(True, 0, 1000)[0] == "a planted error"
    runtime.library.record_errors(0, 0)
    assert runtime.launch(True, 0, 1000)[0] == ""
