"""A pytest plugin: a process that crashes names the test that it was running, and gives the reason if there is one.

With xdist the reason stands in the report of the crashed test; else it is printed to stderr. See crash.cpp.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests import native

_library = None


def _file(node) -> Path:
    """Where a worker of xdist leaves its report."""
    about = node.workerinput
    return Path(tempfile.gettempdir()) / f"pygpt-crash-{about['testrunuid']}-{about['workerid']}"


@pytest.hookimpl(trylast=True)  # pytest's own handler, which prints the stack, is asked after ours
def pytest_configure(config):
    global _library
    starts_workers = config.getoption("numprocesses", 0) and not hasattr(config, "workerinput")
    if os.name != "posix" or starts_workers or not shutil.which(native.CXX[0]):
        return
    where = os.open(_file(config), os.O_WRONLY | os.O_CREAT) if hasattr(config, "workerinput") else os.dup(2)
    try:
        _library = ctypes.CDLL(str(native.build("crash.cpp")))
    except (OSError, subprocess.CalledProcessError):
        return  # a compiler that cannot build it costs the reports of crashes, and no test
    _library.report_crashes(where)


def pytest_runtest_logstart(nodeid):
    if _library:
        _library.set_test(nodeid.encode())


def pytest_unconfigure(config):
    if hasattr(config, "workerinput"):
        _file(config).unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report):
    """In the process that started the workers."""
    file = _file(report.node)
    if file.exists():
        report.longrepr = f"{report.longrepr}\n{file.read_text(errors='replace').strip()}"
        file.unlink()
