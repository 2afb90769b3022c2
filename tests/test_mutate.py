"""The faults of mutants.py are noticed by the tests that they name."""

import pytest

from tests import mutate
from tests.mutants import EQUIVALENT, MUTANTS, TRAIN, Mutant

SAMPLE = [m for m in MUTANTS if m.name in (
    "python: bfloat16's gradients are scaled too",
    "python: bfloat16 is trained as float16",
    "triton: a unit that is 0 passes its gradient on",
)]  # fmt: skip
HARMLESS = Mutant(
    "harmless",
    "pygpt/train.py",
    r"the training loop, bit-exactly",
    "the loop, bit-exactly",
    (TRAIN, "16_bits"),
)


def test_every_fault_can_be_planted():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 40
    for mutant in (*MUTANTS, *EQUIVALENT):
        path, wrong = mutate.place(mutant, mutate.ROOT)
        assert wrong != path.read_text()


def test_a_line_that_is_gone_is_an_error():
    gone = Mutant("gone", "pygpt/train.py", r"no such line", "", ())
    with pytest.raises(mutate.Broken, match="has 0 times 'no such line'"):
        mutate.run([gone])


def test_a_sample_is_noticed_and_what_is_harmless_survives():
    assert len(SAMPLE) == 3 and mutate.run([*SAMPLE, HARMLESS]) == [HARMLESS]


@pytest.mark.slow
def test_every_fault_is_noticed():
    assert mutate.run(MUTANTS) == []
