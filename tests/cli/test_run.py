"""`pygpt run SCRIPT ARGS...`: as `python SCRIPT ARGS...`, but with torch's functions on the kernels."""

import os
import subprocess
import sys

import pytest

from tests import processes
from tests.cli import commands

SHOWS = """
import os, pickle, sys
class Here: pass
print(sys.argv, __name__, os.path.basename(__file__), os.path.basename(sys.path[0]))
pickle.loads(pickle.dumps(Here()))
import beside
"""
MODEL = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())
model(torch.randn(3, 8)).sum().backward()
nn.functional.linear(torch.arange(8), torch.ones(4, 8, dtype=torch.long))
"""


@pytest.fixture
def both(tmp_path, forks):
    """Runs the source as a script by `pygpt run`, and by Python alone."""

    def run(source, *arguments):
        script = tmp_path / "scripts" / "script.py"
        script.parent.mkdir()
        script.write_text(source)
        script.with_name("beside.py").write_text("print('imported')")
        environment = {**os.environ, "PYTHONPATH": processes.search_path(), "PYGPT_BACKEND": "", "TRITON_INTERPRET": ""}
        ours, *line = processes.source_of(["-m", "pygpt", "run", script, *arguments])
        how = {"capture_output": True, "text": True, "env": environment, "check": False}
        return forks.run(ours, line, environment), subprocess.run([sys.executable, str(script), *arguments], **how)

    return run


def test_the_script_sees_what_python_shows_it(both):
    ours, pythons = both(SHOWS, "--flag", "-x", "run")
    assert ours.stdout == pythons.stdout and "imported" in ours.stdout and ours.returncode == 0, ours.stderr
    assert ours.stderr == "pygpt: served no call\n"


def test_the_line_at_the_end(both):
    done, _ = both(MODEL)
    assert done.returncode == 0 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("pygpt: served gelu 1, gelu_backward 1, layer_norm 1, linear 1; left to PyTorch linear 1 (")
    assert "must be floating point, got torch.int64" in line


@pytest.mark.parametrize(
    "ending, code",
    [("sys.exit(7)", 7), ("sys.exit()", 0), ("sys.exit('gone')", 1), ("open('none')", 1), ("raise MemoryError", 1)],
)
def test_the_exit_code_and_the_message_are_pythons(ending, code, both):
    ours, pythons = both(f"import sys\ndef end():\n    {ending}\nend()\n")
    assert ours.returncode == pythons.returncode == code
    assert ours.stderr == pythons.stderr + "pygpt: served no call\n"


def test_a_script_that_is_not_there(capsys):
    message = commands.refused(capsys, "run", "none.py")
    assert message == "pygpt: error: cannot read the script none.py: No such file or directory\n"
