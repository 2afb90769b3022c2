"""A wrong value of an environment variable: an exception for a program, one line and code 2 for the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pygpt
from pygpt.dispatch import TABLE
from pygpt.info import gather

ROOT = Path(pygpt.__file__).parents[1]
WRONG = [name for name in ("nonsense", "AVX2", "amx") if name not in gather()["cpu_capabilities"]]


def run(*command, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, *map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture
def script(tmp_path):
    """What pip installs as the command."""
    path = tmp_path / "pygpt"
    path.write_text("import sys\nfrom pygpt.cli import main\nsys.exit(main())\n")
    return path


def assert_refused(name, *command):
    found = run(*command, PYGPT_CPU_CAPABILITY=name)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1), found.stderr
    assert found.stderr.startswith(
        f"pygpt: error: PYGPT_CPU_CAPABILITY={name} is not among what this machine has: baseline"
    )


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_instruction_set(name):
    assert_refused(name, "-m", "pygpt", "info")


def test_every_way_to_the_command_line(script):
    for command in ([script, "info"], ["-m", "bench", "--list"], ["-m", "pygpt"]):
        assert_refused("nonsense", *command)


def test_a_program_gets_the_exception():
    found = run("-c", "import pygpt", PYGPT_CPU_CAPABILITY="nonsense")
    assert found.returncode == 1 and "RuntimeError: pygpt: PYGPT_CPU_CAPABILITY" in found.stderr


def test_a_right_instruction_set():
    found = run("-m", "pygpt", "info", PYGPT_CPU_CAPABILITY="baseline")
    assert (found.returncode, found.stderr) == (0, "") and "baseline (available" in found.stdout


MISSING = [name for name, row in TABLE.items() if row.missing]


@pytest.mark.parametrize(
    "name, why", [("nonsense", "unknown backend"), *((name, "not available") for name in MISSING[:1])]
)
def test_a_wrong_backend(name, why, script):
    """Refused at import, not at the first op."""
    for command in (["-m", "pygpt", "info"], [script, "info"]):
        found = run(*command, PYGPT_BACKEND=name)
        assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1), found.stderr
        assert found.stderr.startswith("pygpt: error: PYGPT_BACKEND: ") and why in found.stderr
    found = run("-c", "import pygpt; print('imported')", PYGPT_BACKEND=name)
    assert (
        found.returncode == 1
        and found.stdout == ""
        and f"PYGPT_BACKEND: pygpt: {why}" in found.stderr.replace(f"backend {name!r} is ", "")
    )
