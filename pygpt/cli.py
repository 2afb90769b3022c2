"""The command line: `pygpt COMMAND` or `python -m pygpt COMMAND`.

A command is a module with add_arguments(parser) and run(args) -> exit code or None, imported only when it is used.
Bad input prints one line on stderr and exits with code 2. Ctrl-C exits with 130, and in a training run SIGTERM exits
with 143 and SIGHUP with 129.
"""

import argparse
import errno
import importlib
import importlib.util
import io
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from . import threads
from .data import UsageError, check_number
from .dispatch import Unavailable, chosen

COMMANDS = {
    "info": "versions, what was built, which backend serves which op",
    "doctor": "what works on this machine, and the commands that mend what does not",
    "verify": "every op's error against float64, beside PyTorch's own",
    "train": "train the reference GPT on text",
    "generate": "continue a prompt from a checkpoint",
    "demo": "train on backends torch and cpp side by side and compare",
    "run": "run a Python script with torch's functions on these kernels",
    "bench": "every op's speed and memory beside PyTorch and other libraries",
}

MODULES = {"doctor": "inspect.machine"}  # the commands that are not modules of their own name

# Errors of writing to standard output. The same errors about a file have a file name.
OUTPUT_FAILS = errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: list[str] | None = None) -> int:
    """Runs one command -> exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:  # the parent process closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # prints "?" for characters outside the encoding
    try:
        try:
            code: Any = _run_command(argv) or 0
        except SystemExit as e:  # argparse's --help and --version
            code = e.code or 0
        sys.stdout.flush()  # raises here, inside the try, when the disk is full
        return code
    except OSError as e:
        if e.filename is not None or e.errno not in OUTPUT_FAILS:
            return _end(f"error: {e}", 2)
        with suppress(OSError):  # drops what the interpreter still flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if e.errno == errno.EPIPE:  # the reader of our output has closed the pipe
            return 1
        return _end(f"error: cannot write to standard output: {e.strerror}", 2)
    except (UsageError, Unavailable) as e:
        return _end(f"error: {e}", 2)
    except ModuleNotFoundError as e:
        package = (e.name or __package__).partition(".")[0]
        if package == __package__:
            raise
        return _end(f"error: this command needs {package}, which is not installed", 2)
    except (MemoryError, RuntimeError) as e:
        if not _is_out_of_memory(e):
            raise
        amount = re.search(r"tried to allocate [\d.]+ \w+", str(e), re.IGNORECASE)
        return _end(f"error: out of memory{f': {amount[0]}' if amount else ''}", 2)
    except KeyboardInterrupt as e:
        number = getattr(e, "signum", signal.SIGINT)
        name = signal.Signals(number).name
        return _end("interrupted" if number == signal.SIGINT else f"stopped by {name}", 128 + number)


def _end(message: str, code: int) -> int:
    with suppress(OSError):  # standard error may be closed, too
        print(f"pygpt: {' '.join(message.split())}", file=sys.stderr)
    return code


def _is_out_of_memory(e: Exception) -> bool:
    known = "can't allocate memory", "not enough memory", "Storage size calculation overflowed", "bad_alloc"
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or any(words in str(e) for words in known)


def _run_command(argv: list[str]) -> int | None:
    from . import __version__

    name = next((a for a in argv if not a.startswith("-")), None)
    parser = _Parser(prog="pygpt", description="Fused GPT kernels for PyTorch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pygpt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, help in COMMANDS.items():
        sub = commands.add_parser(command, help=help, description=help, allow_abbrev=False)
        if command == name:
            _module(command).add_arguments(sub)
    args = parser.parse_args(argv)
    try:
        chosen()
    except ValueError as e:
        raise UsageError(e) from None
    args.given = argv[argv.index(args.command) + 1 :]
    number = getattr(args, "threads", None)
    if number is not None:
        check_number("--threads", number, 1, 2**31)
    if args.command != "run" and (number := number or threads.default()[0]):  # a script has threads as Python gives it
        torch.set_num_threads(number)
    return _module(args.command).run(args)


def _module(command: str) -> ModuleType:
    if command != "bench":
        return importlib.import_module(f".{MODULES.get(command, command)}", __package__)
    checkout = Path(__file__).resolve().parents[1]  # in a checkout, bench/ is beside the package
    if (checkout / "bench" / "cli.py").is_file():
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        return importlib.import_module("bench.cli")
    if importlib.util.find_spec("pygpt.bench") is None:
        raise UsageError("the benchmarks are not installed; a checkout of pygpt has them in bench/")
    return importlib.import_module("pygpt.bench.cli")
