"""Runs commands under time limits and keeps what each of them said, in one folder.

A step is a process of its own. It can fail, hang, crash or run out of time: the others run all the same. After every
step the folder's summary.json is replaced as a whole, and log.txt has every line as it was printed, so that a run
which is killed leaves what it had found. A step's children end with it, also where this process is killed.

A step ends by printing one line that says what it found. Exit codes: 0 for success, REFUSED where the machine cannot
do what is asked (reported, no failure), anything else for failure.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pygpt.files import atomic

ROOT = Path(__file__).resolve().parents[1]
REFUSED = 75  # EX_TEMPFAIL of sysexits.h
GRACE = 8.0  # seconds between asking a step to stop and killing it
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take. ``stop``: the signal that asks it to finish with what it has."""

    name: str
    seconds: float
    command: tuple[str, ...]
    environment: tuple[tuple[str, str | None], ...] = ()  # what differs from this process's; None removes a variable
    stop: int = signal.SIGTERM
    says: str = ""  # a part of the line that says what it found; the last one that has it counts
    optional: bool = False  # whatever becomes of it, the run is a success


@dataclass
class Outcome:
    step: str
    verdict: str  # ok, refused, failed (exit code), out of time, skipped
    said: str
    seconds: float = 0.0
    exit_code: int | None = None
    optional: bool = False

    @property
    def failed(self) -> bool:
        return not self.optional and self.verdict not in ("ok", "refused")

    def __str__(self):
        return f"{self.step:<14} {self.verdict:<12} {self.seconds:5.0f} s  {self.said}"


def python(module: str, *arguments) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *map(str, arguments))


class Runner:
    """Runs steps, one group after the other, within ``seconds`` in all. ``about``: facts for summary.json."""

    def __init__(self, folder: Path, seconds: float, about: dict | None = None):
        self.folder, self.end = folder, time.monotonic() + seconds
        self.about, self.outcomes = about or {}, []
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.log = open(folder / "log.txt", "w", buffering=1)  # noqa: SIM115 - open as long as this process
        self.save()

    def left(self) -> float:
        return self.end - GRACE - time.monotonic()

    def say(self, line: str):
        with self.lock:
            self.log.write(line + "\n")
            print(line, flush=True)

    def save(self, **more):
        self.about |= more
        with atomic(self.folder / "summary.json") as temporary:
            temporary.write_text(json.dumps(self.about | {"steps": [asdict(o) for o in self.outcomes]}, indent=1))

    def run(self, *lanes: Step | Sequence[Step]):
        """Runs the lanes side by side, the steps of a lane one after the other, and waits for all."""

        def run_lane(lane: Sequence[Step]):
            for step in lane:
                outcome = self._run(step)
                with self.lock:
                    self.outcomes.append(outcome)
                    self.save()

        lanes = [lane if isinstance(lane, Sequence) else (lane,) for lane in lanes]
        threads = [threading.Thread(target=run_lane, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run(self, step: Step) -> Outcome:
        seconds = min(step.seconds, self.left())
        if seconds < 1:
            return Outcome(step.name, "skipped", "no time left", optional=step.optional)
        self.say(f"=== {step.name} (at most {seconds:.0f} s): {' '.join(step.command)}")
        began = time.monotonic()
        code, lines, late = self._process(step, seconds)
        took = time.monotonic() - began
        verdict = "out of time" if late else {0: "ok", REFUSED: "refused"}.get(code, f"failed ({code})")
        outcome = Outcome(step.name, verdict, last(lines, step.says), took, code, step.optional)
        self.say(f"--- {outcome}")
        return outcome

    def _process(self, step: Step, seconds: float) -> tuple[int, list[str], bool]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        for name, value in step.environment:
            environment.pop(name, None) if value is None else environment.update({name: value})
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_in_child,  # noqa: PLW1509 - it only asks the system
            )  # fmt: skip
        except OSError as e:
            return 127, [str(e)], False
        late, timers = threading.Event(), []

        def after(delay: float, action: Callable):
            timers.append(threading.Timer(delay, action))
            timers[-1].daemon = True
            timers[-1].start()

        def ask_to_stop():
            late.set()
            _signal_group(process, step.stop)
            after(GRACE, lambda: _signal_group(process, signal.SIGKILL))

        after(seconds, ask_to_stop)
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                self.say(f"[{step.name}] {lines[-1]}")
            return process.wait(), lines, late.is_set()
        finally:
            for timer in timers:
                timer.cancel()
            _signal_group(process, signal.SIGKILL)  # what it has started itself


def last(lines: list[str], part: str = "") -> str:
    """The last line that says something, and has ``part``."""
    return next((line for line in reversed(lines) if line.strip() and part in line), "no result")


def die_with_parent():
    """Called by a new process: the system kills it when its parent (the thread that started it) ends. Linux only."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _in_child():
    """Before the command starts: it hears Ctrl-C even where a background job ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()


def _signal_group(process: subprocess.Popen, number: int):
    """To a process and its children, if they still run. It leads a group of its own."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
