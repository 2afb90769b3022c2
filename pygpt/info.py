"""`pygpt info`: versions, what was built, and which backend serves which op."""

import argparse
import importlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from . import __version__, threads
from .dispatch import OPS, TABLE, Backend, chosen


def gather() -> dict[str, Any]:
    extension, cuda = find_spec("pygpt._C"), find_spec("pygpt._cuda")
    _C = None if TABLE["cpp"].missing else importlib.import_module("pygpt._C")
    return {
        "pygpt": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "threads_because": threads.default()[1],
        "openmp": threads.waiting(),
        "extension": extension.origin if extension else None,
        "cuda_extension": cuda.origin if cuda else None,
        "cpu_capability": _C.cpu_capability() if _C else None,
        "cpu_capabilities": list(_C.cpu_capabilities()) if _C else [],
        "chosen_backend": chosen(),
        "ops": {op: {name: _objection(row, op) for name, row in TABLE.items()} for op in OPS},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _objection(row: Backend, op: str) -> str | None:
    """Why the backend does not serve the op on its devices, or None where it does."""
    if row.missing:
        return row.missing
    return None if row.ops is None or op in row.ops else f"{op} is not among its ops"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run(args: argparse.Namespace) -> None:
    facts = gather()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    ops = facts.pop("ops")
    facts["threads"] = f"{facts['threads']} ({facts.pop('threads_because')})"
    capabilities = ", ".join(facts.pop("cpu_capabilities")) or "none"
    for name in ("extension", "cuda_extension"):
        facts[name] = facts[name] or "not built"
    facts["triton"] = facts["triton"] or "not installed"
    facts["cpu_capability"] = f"{facts['cpu_capability'] or '-'} (available: {capabilities})"
    facts["chosen_backend"] = facts["chosen_backend"] or "none: each call goes to the first that serves it"
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):16}{value}")
    width = max(map(len, ops)) + 2
    print("\n" + "op".ljust(width) + "".join(name.ljust(8) for name in TABLE))
    for op, answers in ops.items():
        print(op.ljust(width) + "".join(("-" if reason else "yes").ljust(8) for reason in answers.values()))
    reasons = {f"{name}: {reason}" for answers in ops.values() for name, reason in answers.items() if reason}
    for reason in sorted(reasons):
        print(f"- {reason}")
    print("pygpt.explain(op, *args) says it for one call.")
