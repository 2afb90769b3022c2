"""The rows as pytest's items: `pytest bench/suite.py` with the options of `pygpt bench` that choose rows."""

from . import conftest
from .cases import rows


def pytest_generate_tests(metafunc):
    wanted = rows.rows(conftest.plugin(metafunc.config).run.options)
    metafunc.parametrize("row", wanted, ids=lambda row: str(row).replace(" ", "_"))


def test_row(row, pytestconfig):
    conftest.plugin(pytestconfig).run.row(row)
