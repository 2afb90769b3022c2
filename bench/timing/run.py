"""One run: measures row after row inside pytest, keeps what it has in a file, shows how far it is.

A Run is a pytest plugin. Each row is one item of suite.py; each candidate of a row becomes a benchmark of
pytest-benchmark's, whose statistics and file format these are.
"""

import gc
import time
from collections.abc import Callable

import pytest

from pygpt.progress import Progress

from ..cases.gpu import reason
from ..show import report, results
from . import candidates
from . import clocks as harness
from .candidates import Row


def of(config) -> "Run | None":
    """The Run that takes part in a pytest session."""
    return next((plugin for plugin in config.pluginmanager.get_plugins() if isinstance(plugin, Run)), None)


class Run:
    """``options`` are command.py's, completed; ``save`` gets the document after each row."""

    def __init__(self, options, save: Callable[[dict], None] = lambda document: None):
        self.options, self.save = options, save
        self.start = time.monotonic()
        self.about = {"absent": options.absent, "refused": {}, "failed": [], "left_out": []}
        self.peaks = self.progress = self.document = None
        self.done = 0

    # --------------------------------------------------------------------- pytest's side
    def pytest_sessionstart(self, session):
        self.session = session.config._benchmarksession

    def pytest_collection_finish(self, session):
        self.progress = Progress("measuring", max(len(session.items), 1), steady=True)
        self.about["left_out"] = [str(item.callspec.params["row"]) for item in session.items]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        """Before the first row."""
        if not session.items or session.config.option.collectonly or self.session.disabled:
            return
        hook, config = session.config.hook, session.config
        self.frame = {"config": config, "include_data": False, "machine_info": self.session.get_machine_info()}
        self.frame["commit_info"] = hook.pytest_benchmark_generate_commit_info(config=config)
        self.progress.__enter__()
        self.progress.update(0, "the machine's peaks")
        self.clock = harness.GpuClock() if self.options.device == "cuda" else harness.CpuClock()
        self.peaks = self.clock.peaks(tuple(dict.fromkeys([*self.options.dtypes, "float32"])), self.options.quick)
        self.about["machine"] = report.machine(self.peaks, self.options)
        self.progress.print(report.head(self.about["machine"]) + "\n")
        gc.collect()
        gc.freeze()  # what importing left behind; collections in a timed block then look at little else

    def pytest_sessionfinish(self):
        if self.peaks:
            gc.unfreeze()
            self.progress.__exit__()
            self.keep()

    def pytest_benchmark_update_machine_info(self, machine_info):
        machine_info.pop("node", None)  # a machine's name says nothing about its speed
        machine_info.get("cpu", {}).pop("flags", None)  # those that matter are in ours

    def pytest_benchmark_update_json(self, output_json):
        output_json["pygpt"] = self.about

    # --------------------------------------------------------------------- rows
    def measure(self, row: Row):
        """Measures a row, or notes why not."""
        if self.session.disabled:
            return
        budget = self.options.budget
        if not budget or time.monotonic() - self.start < budget:
            try:
                self.race(row)
            except Exception as e:  # noqa: BLE001 - costs this row alone
                self.fail(row, "", reason(e))
            self.about["left_out"].remove(str(row))
            self.keep()
        self.done += 1
        self.progress.update(self.done, "")

    def race(self, row: Row):
        o = self.options
        say = lambda name: self.progress.update(self.done, f"{row}: {name}")
        found = candidates.prepare(row, o.backends, o.peers, self.peaks, self.clock, say)
        for name, why in found.failed.items():
            self.fail(row, name, why)
        for name, why in found.refused.items():
            self.about["refused"].setdefault(f"{name}: {why}", []).append(str(row))
        if any(found.about[name]["ours"] for name in found.calls):
            times = self.clock.race(found.calls, found.estimates, o.seconds)
            for name in found.about:
                if name in times:
                    results.add(self.session, row, found, name, times[name])
            self.progress.print(report.line(results.rows(self.collect())[-1]))

    def fail(self, row: Row, name: str, why: str):
        self.about["failed"].append({**row.about, "candidate": name, "why": why})
        self.progress.print(f"FAILED: {row} {name}: {why}")

    # --------------------------------------------------------------------- what there is so far
    def collect(self) -> dict:
        hook, benchmarks = self.frame["config"].hook, self.session.benchmarks
        document = hook.pytest_benchmark_generate_json(benchmarks=benchmarks, **self.frame)
        hook.pytest_benchmark_update_json(config=self.frame["config"], benchmarks=benchmarks, output_json=document)
        return document

    def keep(self):
        self.document = self.collect()
        try:
            self.save(self.document)
        except OSError as e:  # a full disk, perhaps: the table is still to come
            self.progress.print(f"not written: {e}")
