"""A wrong value of an environment variable: an exception for a program, one line and code 2 for the command line."""

import pytest

from pygpt.dispatch import TABLE
from pygpt.info import gather
from tests import processes

WRONG = [name for name in ("nonsense", "AVX2", "amx") if name not in gather()["cpu_capabilities"]]


@pytest.fixture
def run(run_python):
    """Runs what stands on a command line after "python"."""
    return lambda *command, **environment: run_python(*processes.source_of(command), **environment)


@pytest.fixture
def script(tmp_path):
    """What pip installs as the command."""
    path = tmp_path / "pygpt"
    path.write_text("import sys\nfrom pygpt.cli import main\nsys.exit(main())\n")
    return path


def assert_refused(run, name, *command):
    found = run(*command, PYGPT_CPU_CAPABILITY=name)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1), found.stderr
    assert found.stderr.startswith(
        f"pygpt: error: PYGPT_CPU_CAPABILITY={name} is not among what this machine has: baseline"
    )


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_instruction_set(name, run):
    assert_refused(run, name, "-m", "pygpt", "info")


def test_every_way_to_the_command_line(script, run):
    for command in ([script, "info"], ["-m", "bench", "--list"], ["-m", "pygpt"]):
        assert_refused(run, "nonsense", *command)


def test_a_program_gets_the_exception(run):
    found = run("-c", "import pygpt", PYGPT_CPU_CAPABILITY="nonsense")
    assert found.returncode == 1 and "RuntimeError: pygpt: PYGPT_CPU_CAPABILITY" in found.stderr


def test_a_right_instruction_set(run):
    found = run("-m", "pygpt", "info", PYGPT_CPU_CAPABILITY="baseline")
    assert (found.returncode, found.stderr) == (0, "") and "baseline (available" in found.stdout


MISSING = [name for name, row in TABLE.items() if row.missing]


@pytest.mark.parametrize(
    "name, why", [("nonsense", "unknown backend"), *((name, "not available") for name in MISSING[:1])]
)
def test_a_wrong_backend(name, why, script, run):
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
