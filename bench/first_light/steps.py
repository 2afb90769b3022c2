"""Runs commands under time limits and keeps what each of them printed, in one folder.

A step is a process of its own. It can fail, hang, crash or run out of time: the others run all the same. After every
step the folder's summary.json is replaced as a whole, and log.txt has every line as it was printed, so that a run
which is killed leaves what it had. A step's children end with it, also where this process is killed.

The last line that a step prints is its result. Exit codes: 0 for success, REFUSED where the machine cannot do what is
asked (reported, no failure), anything else for failure. Nothing here imports torch or pygpt: a library that crashes
when it is loaded takes one step with it, and not the run.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFUSED = 75  # EX_TEMPFAIL of sysexits.h
NO_GPU = 2
CHANGES_WHAT_IS_CHECKED = ("TRITON_INTERPRET", "PYGPT_BACKEND", "PYGPT_POISON", "PYGPT_AUTOTUNE")  # variables
GRACE = 8.0  # seconds between asking a step to stop and killing it
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take. ``stop``: the signal that asks it to finish with what it has."""

    name: str
    seconds: float
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()  # variables that differ from this process's
    stop: int = signal.SIGTERM
    result: str = ""  # the step's result is the last line that contains this
    optional: bool = False  # its failure is none of the run


@dataclass
class Outcome:
    step: str
    verdict: str  # ok, refused, failed (exit code), out of time, skipped
    result: str
    seconds: float = 0.0
    exit_code: int | None = None
    optional: bool = False

    @property
    def failed(self) -> bool:
        return not self.optional and self.verdict not in ("ok", "refused")

    def __str__(self):
        return f"{self.step:<14} {self.verdict:<12} {self.seconds:5.0f} s  {self.result}"


def python(module: str, *arguments) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *map(str, arguments))


class Runner:
    """Runs steps, one group after the other, within ``seconds`` in all. ``about``: facts for the summary.

    A folder holds one run of each ``name``: FileExistsError where that one is already there, so that nothing of an
    earlier run is lost, or taken for new.
    """

    def __init__(self, folder: Path, seconds: float, about: dict | None = None, name: str = ""):
        self.summary, self.end = folder / f"summary{name}.json", time.monotonic() + seconds
        self.about, self.outcomes = about or {}, []
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.log = open(folder / f"log{name}.txt", "x", buffering=1)  # noqa: SIM115 - open as long as this process
        self.save()

    def left(self) -> float:
        return self.end - GRACE - time.monotonic()

    def print(self, line: str):
        with self.lock:
            self.log.write(line + "\n")
            print(line, flush=True)

    def save(self, **more):
        self.about |= more
        summary = self.about | {"steps": [asdict(outcome) for outcome in self.outcomes]}
        with tempfile.TemporaryDirectory(prefix=".steps-", dir=self.summary.parent) as folder:  # unique to this write
            temporary = Path(folder, self.summary.name)
            temporary.write_text(json.dumps(summary, indent=1))
            temporary.replace(self.summary)

    def run(self, *lanes: Step | Sequence[Step]):
        """Runs the lanes side by side, the steps of a lane one after the other, and waits for all."""

        def run_lane(lane: Step | Sequence[Step]):
            for step in [lane] if isinstance(lane, Step) else lane:
                outcome = self._run(step)
                with self.lock:
                    self.outcomes.append(outcome)
                    self.save()

        threads = [threading.Thread(target=run_lane, args=(lane,), daemon=True) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run(self, step: Step) -> Outcome:
        seconds = min(step.seconds, self.left())
        if seconds < 1:
            return Outcome(step.name, "skipped", "no time left", optional=step.optional)
        self.print(f"=== {step.name} (at most {seconds:.0f} s): {' '.join(step.command)}")
        began = time.monotonic()
        code, lines, late = self._process(step, seconds)
        took = time.monotonic() - began
        verdict = "out of time" if late else {0: "ok", REFUSED: "refused"}.get(code, f"failed ({code})")
        outcome = Outcome(step.name, verdict, last(lines, step.result), took, code, step.optional)
        self.print(f"--- {outcome}")
        return outcome

    def _process(self, step: Step, seconds: float) -> tuple[int, list[str], bool]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        kept = {name: value for name, value in os.environ.items() if name not in CHANGES_WHAT_IS_CHECKED}
        environment = kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(step.environment)
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_in_child,  # noqa: PLW1509 - it only asks the system
            )  # fmt: skip
        except OSError as e:
            return 127, [str(e)], False
        lines: list[str] = []
        reader = threading.Thread(target=self._read, args=(step.name, process, lines), daemon=True)
        reader.start()
        late = not _ends_within(process, seconds)
        if late:
            _signal_group(process, step.stop)
            _ends_within(process, GRACE)
        _signal_group(process, signal.SIGKILL)  # and its children; not reaped yet, its number is not reused
        code = process.wait()
        reader.join(1.0)  # a process that left the group may hold the pipe open for ever
        return code, lines, late

    def _read(self, name: str, process: subprocess.Popen, lines: list[str]):
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            self.print(f"[{name}] {lines[-1]}")


def _ends_within(process: subprocess.Popen, seconds: float) -> bool:
    """Waits for a process to end, and leaves it to be reaped."""
    end = time.monotonic() + seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True


def last(lines: list[str], part: str = "") -> str:
    """The last line that is not blank and contains ``part``."""
    return next((line for line in reversed(lines) if line.strip() and part in line), "no result")


class TimeUp(BaseException):
    """SIGTERM: a step finishes with what it has."""


def stop(*_):
    """A step's handler of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise TimeUp


def die_with_parent():
    """Called by a new process: the system kills it when its parent (the thread that started it) ends. Linux only."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _in_child():
    """Runs in the child before the command: Ctrl-C reaches it even where a background job ignores that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()


def _signal_group(process: subprocess.Popen, number: int):
    """Signals a process and its children, if they still run; the process leads a group of its own."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass
