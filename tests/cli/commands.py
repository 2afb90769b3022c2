"""A training run in seconds, and commands that must be refused."""

from pygpt import cli

TINY = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16"]
TINY += ["--batch-size=2", "--eval-iters=1", "--steps=2", "--warmup=1"]


def refused(capsys, *argv) -> str:
    """Runs a command that must fail as bad input -> its one line."""
    assert cli.main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("pygpt: error: ")
    return captured.err
