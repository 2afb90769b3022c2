"""Signals that end a run: they are noted, so that it ends where it can be continued."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal ended the run, after it was saved."""

    def __init__(self, signum: int):
        self.signum = signum


@contextmanager
def until_a_signal() -> Iterator[list[int]]:
    """Yields a list to which Ctrl-C, SIGTERM and SIGHUP are added. A second signal acts at once.

    A signal that is ignored, such as SIGHUP under nohup, stays ignored.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def note(signum: int, _: object) -> None:
        received.append(signum)
        for number, handler in previous.items():
            signal.signal(number, handler)
        if signum == getattr(signal, "SIGHUP", None):  # the terminal is gone, and prints to it would fail
            for fd in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
