"""The faults of tests/mutants are noticed by the tests that they name."""

import fcntl
import sys
import time
from dataclasses import replace

import pytest

from tests import mutate
from tests.mutants import EQUIVALENT, MUTANTS

(FAULT,) = (m for m in MUTANTS if m.name == "python: a choice of backend outlives its block")
GONE = replace(FAULT, name="gone", old=r"no such line")
HARMLESS = replace(FAULT, name="harmless", new="state.cache, state.chosen = reversed(previous)")


def test_every_fault_can_be_planted():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 40
    for mutant in (*MUTANTS, *EQUIVALENT):
        path, wrong = mutate.place(mutant, mutate.ROOT)
        assert wrong != path.read_text()


def test_a_fault_is_noticed_what_is_harmless_survives_and_what_is_gone_is_not_judged(capsys):
    verdicts = mutate.run([GONE, FAULT, HARMLESS])
    assert verdicts == {GONE: mutate.NOT_JUDGED, FAULT: mutate.NOTICED, HARMLESS: mutate.SURVIVED}
    assert "has 0 times 'no such line'" in capsys.readouterr().out


ENDLESS = """
import fcntl, subprocess, sys, time
held = open("held", "w")
fcntl.flock(held, fcntl.LOCK_EX)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], pass_fds=[held.fileno()])
time.sleep(99)
"""


def test_what_does_not_end_is_noticed_and_none_of_its_children_stays(tmp_path, monkeypatch):
    def endless(tree, tests, *options, seconds):
        return mutate.run_process([sys.executable, "-c", ENDLESS], tree, seconds)

    file = tmp_path / FAULT.file
    file.parent.mkdir()
    file.write_text((mutate.ROOT / FAULT.file).read_text())
    monkeypatch.setattr(mutate, "run_tests", endless)
    start = time.monotonic()
    assert mutate.judge(FAULT, tmp_path, 1.0) == "noticed (did not end)"
    with open(tmp_path / "held") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # waits for the child
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_every_fault_is_noticed():
    verdicts = mutate.run(MUTANTS)
    assert [m.name for m, verdict in verdicts.items() if not verdict.startswith(mutate.NOTICED)] == []
