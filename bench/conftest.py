"""pytest's side of suite.py: the options, the run, its benchmarks among pytest-benchmark's, and the table."""

from types import SimpleNamespace

import pytest

from pygpt.data import UsageError

from .cli import add_row_options, complete
from .show import table
from .timing import results
from .timing.run import Run


class Plugin:
    """One run of the engine, whose rows are pytest's items."""

    def __init__(self, options):
        self.run = Run(options)

    def pytest_collection_finish(self, session):
        self.rows = [item.callspec.params["row"] for item in session.items]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session):
        if session.config.option.collectonly or not self.rows:
            return (yield)
        self.run.begin(self.rows)
        try:
            return (yield)
        finally:
            self.run.end()
            self.add_benchmarks(session.config._benchmarksession)

    def add_benchmarks(self, benchmark_session):
        """Adds the run's benchmarks to pytest-benchmark's own, which it writes at the end."""
        from pytest_benchmark.stats import Metadata

        for benchmark in self.run.benchmarks:
            facts = {key: benchmark[key] for key in ("name", "fullname", "group", "param", "params", "extra_info")}
            fixture = SimpleNamespace(**facts, cprofile_stats=None, has_error=False)
            metadata = Metadata(fixture, iterations=benchmark["stats"]["iterations"], options={})
            metadata.stats.data = self.run.times[benchmark["fullname"]].device
            benchmark_session.benchmarks.append(metadata)

    def pytest_benchmark_update_json(self, output_json):
        output_json["pygpt"] = self.run.about


def plugin(config) -> Plugin | None:
    """The one that takes part in a pytest session."""
    return config.pluginmanager.get_plugin("pygpt-bench")


def pytest_addoption(parser):
    group = parser.getgroup("bench", "pygpt's benchmarks")
    add_row_options(lambda *names, **how: group.addoption(*names, **how))


def pytest_configure(config):
    if not hasattr(config.option, "only_standard"):
        return  # collected in passing, by a pytest that was started for something else
    try:
        options = complete(SimpleNamespace(**vars(config.option)))
    except UsageError as e:
        raise pytest.UsageError(str(e)) from None
    config.option.benchmark_quiet = True  # the table at the end replaces pytest-benchmark's
    config.pluginmanager.register(Plugin(options), "pygpt-bench")


def pytest_terminal_summary(terminalreporter, config):
    mine = plugin(config)
    if mine and mine.run.benchmarks:
        terminalreporter.ensure_newline()
        table.show(results.results(mine.run.document), mine.run.about)
