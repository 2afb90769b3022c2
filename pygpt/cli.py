"""The command line: `pygpt COMMAND` or `python -m pygpt COMMAND`.

A command is a module with add_arguments(parser) and run(args) -> exit code or None, imported only when asked for.
Bad input is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path

from .data import UsageError
from .dispatch import Unavailable, chosen

COMMANDS = {
    "info": "versions, what was built, which backend serves which op",
    "verify": "every op's error against float64, beside PyTorch's own",
    "train": "train the reference GPT on text",
    "generate": "continue a prompt from a checkpoint",
    "demo": "train on backends torch and cpp side by side and compare",
    "bench": "every op's speed and memory beside PyTorch and other libraries",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def main(argv: list[str] | None = None) -> int:
    """Runs one command -> exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv) or 0
    except (UsageError, Unavailable, OSError) as e:
        if isinstance(e, BrokenPipeError):  # the reader of our output left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"pygpt: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pygpt: interrupted", file=sys.stderr)
        return 130
    except SystemExit as e:  # argparse's --help and --version
        return e.code or 0


def _run(argv: list[str]):
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
        raise UsageError(f"PYGPT_BACKEND: {e}") from None
    args.given = argv[argv.index(args.command) + 1 :]
    return _module(args.command).run(args)


def _module(command: str):
    if command != "bench":
        return importlib.import_module(f".{command}", __package__)
    checkout = Path(__file__).resolve().parents[1]  # where bench/ stands beside the package
    if (checkout / "bench" / "command.py").is_file():
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        return importlib.import_module("bench.command")
    if importlib.util.find_spec("pygpt.bench") is None:
        raise UsageError("the benchmarks are not installed; a checkout of pygpt has them in bench/")
    return importlib.import_module("pygpt.bench.command")
