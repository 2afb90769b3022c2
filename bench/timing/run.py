"""The engine: measures row after row on a CPU or a GPU, and keeps what it has measured."""

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace

import torch

from pygpt.progress import Progress

from ..cases.refusal import reason
from ..cases.rows import Row
from ..show import table
from . import candidates, machine, results
from .clocks import CpuClock, CudaClock, Times
from .processes import Busy, Default
from .race import race

COMPILE_SHARE = 0.35  # of the budget, for preparing torch.compile


class Broken(BaseException):
    """The device no longer works in this process."""


class Run:
    """``options`` are complete (see cli.py); ``save`` gets the document after each row."""

    def __init__(self, options, save: Callable[[dict], None] = lambda document: None, now=time.monotonic):
        self.options, self.save, self.now, self.start = options, save, now, now()
        self.clock = CudaClock() if options.device == "cuda" else CpuClock()
        self.about = {"absent": options.absent, "refused": {}, "failed": [], "left_out": []}
        self.benchmarks: list[dict] = []
        self.times: dict[str, Times] = {}  # by the full name of a benchmark
        self.compile_left = COMPILE_SHARE * (options.budget or float("inf"))
        self.done, self.stopped = 0, ""
        self.busy = self.default = None
        self.processes = ExitStack()

    @property
    def document(self) -> dict | None:
        """What there is so far; None before anything is known about the machine."""
        return results.document(self.benchmarks, self.about) if "machine" in self.about else None

    def measure(self, rows: list[Row]):
        """Everything, until the budget is spent or somebody asks to stop."""
        try:
            self.begin(rows)
            for row in rows:
                self.row(row)
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        except Broken as e:
            self.stopped = "broken"
            self.fail(row, "", f"the device is unusable after an error: {e}")
        finally:
            self.end()

    def begin(self, rows: list[Row]):
        self.about["left_out"] = [str(row) for row in rows]
        self.progress = Progress("measuring", max(len(rows), 1), steady=True)
        self.progress.__enter__()
        self.progress.update(0, "the machine's peaks")
        dtypes = tuple(dict.fromkeys([*self.options.dtypes, "float32"]))
        self.peaks = self.clock.peaks(dtypes, self.options.quick)
        self.about["machine"] = machine.describe(self.peaks, self.clock, self.options)
        self.progress.print(table.head(self.about["machine"]) + "\n")
        if self.options.busy:
            self.busy = self.processes.enter_context(closing(Busy(self.options.busy)))
        if "eager-default" in self.options.peers:
            self.default = self.processes.enter_context(closing(Default()))
        gc.collect()
        gc.freeze()  # later collections, which may fall into a timed block, ignore what importing left behind

    def end(self):
        """The peaks again, which shows how far the machine has drifted."""
        self.processes.close()
        gc.unfreeze()
        if "machine" in self.about:
            if self.in_time() and not self.stopped:
                again = self.clock.peaks(tuple(self.peaks.flops), quick=True)
                self.about["machine"]["peaks_after"] = again.flops | {"copy": again.copy}
            self.about["machine"]["used_s"] = self.now() - self.start
            self.keep()
        self.progress.__exit__()

    def in_time(self) -> bool:
        return not self.options.budget or self.now() - self.start < self.options.budget

    # --------------------------------------------------------------------- rows
    def row(self, row: Row):
        """Measures a row, or notes why not. An error costs this row alone, unless it broke the device."""
        if not self.in_time():
            return
        try:
            self.race(row)
        except torch.OutOfMemoryError as e:
            self.about["refused"].setdefault(reason(e), []).append(str(row))
        except Exception as e:  # noqa: BLE001 - it is reported
            self.fail(row, "", reason(e))
        self.about["left_out"].remove(str(row))
        try:
            self.clock.release()
        except Exception as e:
            raise Broken(reason(e)) from e
        self.keep()
        self.done += 1
        self.progress.update(self.done, "")

    def race(self, row: Row):
        o, began = self.options, {}

        def log(name: str):
            began[name] = self.now()
            self.progress.update(self.done, f"{row}: {name}")

        peers = {name: peer for name, peer in o.peers.items() if name != "compile" or self.compile_left > 0}
        run = candidates.prepare(row, o.backends, peers, self.peaks, self.clock, log)
        if "compile" in began:  # until the next candidate's turn
            later = [t for t in began.values() if t > began["compile"]]
            self.compile_left -= min(later, default=self.now()) - began["compile"]
        if self.default:
            log("eager-default")
            self.default.add_to(run, "eager-default", self.peaks)
        for name, why in run.failed.items():
            self.fail(row, name, why)
        if len(peers) < len(o.peers):
            run.refused["compile"] = "it has used its share of the budget"
        for name, why in run.refused.items():
            self.about["refused"].setdefault(f"{name}: {why}", []).append(str(row))
        if o.prepare or not any(run.facts[name]["ours"] for name in run.blocks):
            return
        times = race(self.clock, run.blocks, o.seconds, self.busy)
        self.add(run, times)
        if self.busy:
            self.add(replace(run, row=replace(row, busy=o.busy)), {name: each.busy for name, each in times.items()})

    def add(self, run: candidates.RowRun, times: dict[str, Times]):
        for name in (name for name in run.facts if name in times):
            self.benchmarks.append(results.benchmark(run, name, times[name]))
            self.times[self.benchmarks[-1]["fullname"]] = times[name]
        self.progress.print(table.line(results.results(self.document)[-1]))

    def fail(self, row: Row, name: str, why: str):
        self.about["failed"].append({**row.facts, "candidate": name, "why": why})
        self.progress.print(f"FAILED: {row} {name}: {why}")

    def keep(self):
        try:
            self.save(self.document)
        except OSError as e:  # perhaps a full disk; the table is still printed
            self.progress.print(f"not written: {e}")
