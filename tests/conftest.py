"""What every test gets: its backends, a fresh seed, one thread.

PYGPT_TEST_BACKENDS (default "cpp,torch") names the backends under test. One that is missing fails its
tests; none is skipped. PYGPT_TEST_SEED repeats a run whose output shows it.
"""

import os
import subprocess
import sys

import pytest
import torch

BACKENDS = os.environ.get("PYGPT_TEST_BACKENDS", "cpp,torch").split(",")
COMPILED = [name for name in BACKENDS if name != "torch"]


def pytest_generate_tests(metafunc):
    for fixture, names in (("backend", BACKENDS), ("compiled", COMPILED)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names, scope="session")


@pytest.fixture(autouse=True)
def seed():
    """A fresh seed for every test, shown when it fails; one thread, where threads aren't the subject."""
    value = int(os.environ.get("PYGPT_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"PYGPT_TEST_SEED={value}")
    torch.manual_seed(value)
    torch.set_num_threads(1)
    return value


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def kernels(backend):
    """The namespace of ``<op>_fwd`` and ``<op>_bwd`` that the backend under test is."""
    from pygpt.backend import _named  # raises where the backend is missing

    return _named(backend).kernels


@pytest.fixture
def run_python():
    """Runs Python source in a fresh process with the given arguments and environment variables."""

    def run(source: str, *args: str, **environment: str):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
        return subprocess.run(
            [sys.executable, "-c", source, *args], env=env, check=False, capture_output=True, text=True, timeout=600
        )

    return run
