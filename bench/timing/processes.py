"""The processes that a run starts: busy ones, and one in which PyTorch has its default environment.

Each ends when its standard input is closed, which also happens when the benchmark is killed. Each has a session of its
own, so that Ctrl-C reaches the benchmark alone.
"""

import os
import pickle
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

import pygpt
from pygpt import threads

from ..cases.peers import PEERS
from ..cases.refusal import Refused, reason
from .candidates import RowRun, prepare
from .clocks import Block, CpuClock, Peaks

SPIN = tuple(threads.WAITING)
BUSY = """
import os, select
while os.read(0, 1):
    os.write(1, b".")
    while not select.select([0], [], [], 0)[0]:
        for _ in range(10_000):
            pass
    os.read(0, 1) and os.write(1, b".")
"""


class Processes:
    def __init__(self, count: int, *arguments: str, environment: dict | None = None):
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True, "env": environment}
        self.all = [subprocess.Popen([sys.executable, *arguments], **how) for _ in range(count)]

    def close(self):
        for each in self.all:
            each.kill()
            each.communicate()


class Busy(Processes):
    """Processes that compute endlessly inside ``with``, each on one core, and wait outside it."""

    def __init__(self, count: int):
        super().__init__(count, "-I", "-S", "-c", BUSY)

    def __enter__(self):
        self._switch()
        time.sleep(0.005)  # the scheduler moves them to other cores than ours

    def __exit__(self, *error):
        self._switch()

    def _switch(self):
        """Returns once all have begun, or have paused."""
        for each in self.all:
            os.write(each.stdin.fileno(), b".")
        for each in self.all:
            if os.read(each.stdout.fileno(), 1) != b".":
                raise RuntimeError("a busy process has ended")


class Default(Processes):
    """Prepares PyTorch eager's side of a row, and times its blocks."""

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": search_path()}
        super().__init__(1, "-m", __name__, environment={k: v for k, v in environment.items() if k not in SPIN})

    def ask(self, question: tuple):
        settle()
        pickle.dump(question, self.all[0].stdin)
        self.all[0].stdin.flush()
        answer = pickle.load(self.all[0].stdout)
        if isinstance(answer, Refused):
            raise answer
        return answer

    def add_to(self, run: RowRun, name: str, peaks: Peaks):
        """Adds the row's candidate ``name``, or says why not."""
        run.facts[name] = {"ours": False}
        try:
            run.facts[name], calls, seconds = self.ask((run.row, peaks, torch.get_num_threads()))
            run.blocks[name] = Block(self.ask, calls, seconds=seconds, elsewhere=True)
        except (Refused, EOFError, OSError) as e:  # the last two: it has died
            run.refuse(name, reason(e))


def search_path() -> str:
    """The PYTHONPATH with which another process imports this pygpt."""
    return os.pathsep.join(filter(None, (str(Path(pygpt.__file__).parents[1]), os.environ.get("PYTHONPATH"))))


def settle():
    """Waits until this process's idle threads no longer spin, for at most half a second."""
    end, before = time.perf_counter() + 0.5, -1.0
    while time.process_time() - before > 2e-4 and time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.002)


def main():
    """The default process: a row is answered as `Default.add_to` wants, (calls, least) with the seconds of a call."""
    clock, block = CpuClock(), None
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_float32_matmul_precision("highest")
    while True:
        question = pickle.load(sys.stdin.buffer)
        try:
            if len(question) == 3:
                run = block = None  # frees the row before
                row, peaks, threads = question
                torch.set_num_threads(threads)
                run = prepare(row, [], {"eager": PEERS["eager"]}, peaks, clock)
                if "eager" in run.refused:
                    raise Refused(run.refused["eager"])
                block = run.blocks["eager"]
                answer = run.facts["eager"], block.calls, block.seconds
            else:
                answer = clock.once(block.call, *question)
        except Exception as e:  # noqa: BLE001 - the benchmark reports it
            answer = Refused(reason(e))
        settle()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    with suppress(EOFError, OSError):  # the benchmark has ended
        main()
