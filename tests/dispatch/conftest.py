import pytest

from pygpt.integrations import aten


@pytest.fixture
def counts(monkeypatch):
    """What `pygpt.enable` counts from now on: the calls by the names of torch's functions."""
    monkeypatch.setattr(aten, "counts", aten.Counts())
    return aten.counts


@pytest.fixture(autouse=True)
def off_at_the_end():
    yield
    assert not aten._overrides, "a test has left functions on"
