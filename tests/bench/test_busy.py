"""`pygpt bench --busy`: what is measured beside busy processes, and that they end however the benchmark ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_small import FEW, bench, document, options, plain, rows, small

from bench import cli as command
from bench.cases import goals
from bench.show import readme, table
from bench.timing import clocks, processes, race, run

__all__ = ["plain", "small"]  # fixtures
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux has /proc")


def state(pid: int) -> tuple[str, int]:
    """A process's state, Z where it has ended, and its CPU time in hundredths of a second."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return fields[0], int(fields[11]) + int(fields[12])


def wait_until(condition, seconds=10.0) -> bool:
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return held


@pytest.fixture
def started(monkeypatch) -> dict:
    """The processes that a run has started, each with its environment."""
    found, popen = {}, subprocess.Popen

    def start(*args, **how):
        process = popen(*args, **how)
        environment = Path(f"/proc/{process.pid}/environ").read_bytes
        assert wait_until(environment)
        found[process] = environment()
        return process

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(PIPE=subprocess.PIPE, Popen=start))
    return found


def test_a_busy_run_and_what_it_leaves(plain, started, monkeypatch, capsys):
    from pytest_benchmark.cli import main

    for name in processes.SPIN:
        monkeypatch.setenv(name, "0")
    assert bench(*FEW, "--ops=relu", "--peers=eager,eager-default", "--busy=2") == 0
    assert "relu 8 x 16, 2 busy float32 forward: torch " in capsys.readouterr().out
    assert bench("--render=out/bench.json", "--out=out") == 0  # the same table and page, of the file's rounded figures
    shown, found, machine = capsys.readouterr().out, rows(), document()["pygpt"]["machine"]
    names = [f"relu 8 x 16{busy} float32 {way}" for way in ("forward", "backward") for busy in ("", ", 2 busy")]
    assert [str(row) for row in found] == names and [row.busy for row in found] == [0, 2, 0, 2]
    assert all(set(row.entries) == {"torch", "eager", "eager-default"} for row in found)
    assert all(entry.rounds == 5 and entry.ms > 0 for row in found for entry in row.entries.values())
    assert len(shown.split("relu  8 x 16, 2 busy  float32")) == 3  # a line of each
    assert all(f"{peer} ms" in shown and f"vs {peer}" in shown for peer in ("eager", "eager-default"))
    page, cells = Path("out/report.html").read_text(), readme.speed_table(found, machine)
    for busy, text in ((entry, text) for row in found for entry in row.peers for text in (shown, page)):
        assert table.number(busy.ms, 4) in text
    assert all("ours (torch), 2 busy: " in text and "of 2 rows)" in text for text in (shown, page))
    assert "| relu, 8 x 16 |" in cells and "| relu, 8 x 16, 2 busy |" in cells
    assert [goals.first_bar(row, machine) is None for row in found] == [False, True, False, True]
    monkeypatch.setattr(sys, "argv", ["pytest-benchmark", "compare", "out/bench.json"])
    main()
    assert f"benchmark '{names[1]}': 3 tests" in capsys.readouterr().out
    assert all(process.poll() is not None for process in started)
    has_spin = [[name.encode() in environment for name in processes.SPIN] for environment in started.values()]
    assert has_spin == [[True, True], [True, True], [False, False]]
    assert machine["spin"] == dict.fromkeys(processes.SPIN, "0")


def test_a_busy_run_adds_the_default_process():
    parsed = vars(options())
    chosen = lambda **given: (
        command.complete(SimpleNamespace(**parsed | {"peers": None, "backends": "torch"} | given)).peers
    )
    assert "eager-default" in chosen(busy=1) and "eager-default" not in chosen()
    assert list(chosen(busy=1, peers=["eager"])) == ["eager"]


def test_busy_processes_wait_outside_with():
    busy = processes.Busy(1)
    try:
        pid = busy.all[0].pid
        for _ in range(2):
            later = state(pid)[1] + 3
            with busy:
                assert wait_until(lambda later=later: state(pid)[1] >= later)
            assert wait_until(lambda: state(pid)[0] == "S")
            paused = state(pid)[1]
            time.sleep(0.05)
            assert state(pid)[1] == paused
        assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)
        assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)
    finally:
        busy.close()
    assert busy.all[0].poll() is not None


@pytest.mark.parametrize("how, code", [("SIGTERM", 130), ("SIGINT", 130), ("error", 1)])
def test_they_end_with_the_benchmark(how, code, plain, started, monkeypatch):
    def act(clock, blocks, seconds, busy):
        with busy:
            assert len(started) == 2 and all(process.poll() is None for process in started)
            if how == "error":
                raise RuntimeError("no such luck")
            os.kill(os.getpid(), getattr(signal, how))
            signal.pause()

    monkeypatch.setattr(run, "race", act)
    assert bench(*FEW, "--busy=2", "--ops=relu") == code
    assert len(started) == 2 and all(process.poll() is not None for process in started)


KILLED = """
import os, signal, sys
from tests import bench_small
from bench.timing import clocks, race
from pygpt import cli

def kill(clock, times):
    rounds.pop()
    if not rounds:
        with open("/proc/thread-self/children") as file:
            print("started:", file.read(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

rounds, race._round = [0] * int(sys.argv[1]), kill
clocks.CpuClock.peaks = lambda self, dtypes, quick: bench_small.PEAKS
cli.main(["bench", *bench_small.FEW, "--busy=2", "--shape=M=8,N=16", "--ops=layer_norm", *sys.argv[2:]])
"""


@pytest.mark.parametrize("rounds, more", [(1, []), (2, ["--peers=eager,eager-default"])], ids=["paused", "busy"])
def test_they_end_with_a_benchmark_that_is_killed(rounds, more, run_python):
    done = run_python(KILLED, str(rounds), *more)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.partition("started:")[2].split()]
    assert len(pids) == 2 + len(more)
    assert wait_until(lambda: all(state(pid)[0] == "Z" for pid in pids)), [state(pid) for pid in pids]


class Clock:
    """Notes which rounds ran inside ``with``, and calls them twice as long."""

    def __init__(self):
        self.busy, self.rounds = False, []

    def __enter__(self):
        self.busy = True

    def __exit__(self, *error):
        self.busy = False

    def time(self, blocks):
        assert [(block.calls, block.least) for block in blocks] == [(2, 0.04) if self.busy else (80, 0.0)] * len(blocks)
        self.rounds.append(self.busy)
        return [(1.0 + self.busy, 0.0) for _ in blocks]


@pytest.mark.parametrize("rounds, busy_rounds, every", [(50, 13, 4), (12, 6, 2), (3, 3, 1)])
def test_busy_rounds_are_among_the_quiet(rounds, busy_rounds, every, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(race, "BUSY_BLOCK", 0.04)
    monkeypatch.setattr(race, "rounds_of", lambda cost, seconds: dict.fromkeys(cost, rounds))
    times = race.race(clock, {name: clocks.Block(name, 80, seconds=0.01) for name in "ab"}, 1.0, clock)
    assert clock.rounds[: every + 3] == [False, True, *[False] * every, True][: every + 3]
    assert clock.rounds.count(False) == rounds and clock.rounds.count(True) == busy_rounds
    for each in times.values():
        assert each.device == [1.0] * rounds and each.busy.device == [2.0] * busy_rounds


def test_a_block_of_a_busy_round_lasts():
    """However slow the calls have become; the time is of one of them."""
    calls, clock = [], clocks.CpuClock()
    ((seconds, _),) = clock.time([clocks.Block(lambda: calls.append(time.sleep(0.002)), 2, least=0.01)])
    assert len(calls) in (2, 4, 6) and 0.002 <= seconds < 0.01
