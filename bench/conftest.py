"""pytest's side of the suite: options, the fixtures of a row, and the table at the end of the run."""

import gc

import pytest
import torch

from . import harness, report
from .options import add_options, complete

ROWS, PEAKS = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    add_options(parser.getgroup("bench", "pygpt's benchmarks").addoption)


def pytest_configure(config):
    if not hasattr(config.option, "only_standard"):
        return  # collected in passing, by a pytest that was asked for something else
    complete(config.option)
    config.stash[ROWS] = {}  # node id -> row
    config.option.benchmark_quiet = True  # the table below says it better
    if config.option.threads:
        torch.set_num_threads(config.option.threads)


@pytest.fixture(scope="session")
def peaks(request):
    gc.freeze()  # what importing left behind; collections in a timed block then look at little else
    request.config.stash[PEAKS] = found = harness.measure_peaks(request.config.option.quick)
    return found


@pytest.fixture
def keep(request, benchmark):
    """keep(row, **more): the row goes into pytest-benchmark's JSON and into the table."""

    def keep(row, **more):
        if row is not None:  # None: run with --benchmark-disable
            benchmark.extra_info |= more | row
            request.node.user_properties.append(("row", benchmark.extra_info))
            request.config.stash[ROWS][request.node.nodeid] = benchmark.extra_info

    return keep


def pytest_report_teststatus(report, config):
    """With -v, each row says its ratio as soon as it is known."""
    rows = dict(report.user_properties)
    if report.when == "call" and report.passed and "row" in rows:
        return "passed", ".", f"{rows['row']['ratio']:.2f}x"


def pytest_benchmark_update_machine_info(config, machine_info):
    if PEAKS in config.stash:
        machine_info["pygpt"] = report.machine(config.stash[PEAKS])


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(ROWS, None):
        terminalreporter.ensure_newline()
        report.show(config.stash[ROWS].values(), report.machine(config.stash[PEAKS]))
