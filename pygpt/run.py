"""`pygpt run SCRIPT ARGS...`: runs a Python script with torch's functions on pygpt's kernels (`pygpt.enable`).

The script sees what `python SCRIPT ARGS...` shows it: its arguments, its folder first in sys.path, itself as __main__.
Its exit code is the command's. At its end one line on standard error says what the kernels served.
"""

import argparse
import io
import os
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

from .data import UsageError
from .integrations import aten


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    arguments = parser.add_argument(
        "arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="what the script gets as sys.argv[1:]"
    )
    arguments.required = False  # argparse would name it beside a missing SCRIPT


def run(args: argparse.Namespace) -> int:
    try:
        with io.open_code(os.path.abspath(args.script)) as file:
            source = file.read()
    except OSError as e:
        raise UsageError(f"cannot read the script {args.script}: {e.strerror}") from None
    aten.counts = aten.Counts()
    aten.enable()
    try:
        return _run_script(args.script, source, args.arguments)
    finally:
        with suppress(OSError, ValueError):  # the script may have closed standard error
            print(f"pygpt: {aten.counts}", file=sys.stderr, flush=True)


def _run_script(script: str, source: bytes, arguments: list[str]) -> int:
    """Runs the source as __main__ -> the exit code that Python would give. Prints an exception as Python does."""
    main: Any = ModuleType("__main__")
    main.__file__, main.__builtins__ = script, sys.modules["builtins"]
    sys.modules["__main__"] = main
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    try:
        exec(compile(source, script, "exec"), main.__dict__)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except BaseException as e:  # noqa: BLE001 (it is the script's, and printed as Python prints it)
        e = e.with_traceback(e.__traceback__ and e.__traceback__.tb_next)  # without the frame of this function
        sys.excepthook(type(e), e, e.__traceback__)
        return 130 if isinstance(e, KeyboardInterrupt) else 1
    return 0
