"""pytest's side of suite.py, for `pytest bench/suite.py`: the options and the table at the end."""

from types import SimpleNamespace

import pytest

from pygpt.data import UsageError

from .options import add_row_options, complete
from .show import report, results
from .timing import run


def pytest_addoption(parser):
    group = parser.getgroup("bench", "pygpt's benchmarks")
    add_row_options(lambda *names, **how: group.addoption(*names, **how))


def pytest_configure(config):
    if run.of(config) or not hasattr(config.option, "only_standard"):
        return  # `pygpt bench` brings its own; or collected in passing, by a pytest asked for something else
    try:
        options = complete(SimpleNamespace(**vars(config.option)))
    except UsageError as e:
        raise pytest.UsageError(str(e)) from None
    config.option.benchmark_quiet = True  # the table below says it better
    config.pluginmanager.register(run.Run(options))


def pytest_terminal_summary(terminalreporter, config):
    mine = run.of(config)
    if mine and mine.document:
        terminalreporter.ensure_newline()
        report.show(results.rows(mine.document), mine.about)
