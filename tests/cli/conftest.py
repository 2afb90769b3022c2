import pytest

from pygpt import cli
from tests.cli.commands import TINY


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A text about nothing, but long enough for a block.\n" * 20)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *TINY, "--data", text, "--out", str(out)]) == 0
    capsys.readouterr()
    return out / "checkpoint.safetensors"
