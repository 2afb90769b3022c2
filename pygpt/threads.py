"""How many CPU threads the command line uses, and how they wait for each other.

torch's parallel loops run on OpenMP's threads. At the end of a loop a thread spins until the others are done too. It
then goes on spinning for some milliseconds in case another loop follows. On a machine that is not idle, a spinning
thread takes the core from the thread that it waits for. The command line therefore bounds the spinning
(docs/measured.md C16). OpenMP reads its settings when its library is loaded, so they are made before torch is imported.
A program that imports pygpt keeps its own environment.
"""

import argparse
import os
import re
from collections.abc import MutableMapping
from itertools import pairwise
from pathlib import Path

# How OpenMP's idle threads wait. GNU's runtime counts iterations; Intel's and LLVM's count milliseconds.
WAITING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
OTHER_SETTINGS = ("OMP_WAIT_POLICY", "KMP_LIBRARY")  # with which a user may say the same
NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with which a user sets the number of threads
HELP = "CPU threads (default: OMP_NUM_THREADS, or what the CPUs and control groups allow; see pygpt info)"
# The CPUs that this process may use, or None where the system does not say. They are read here, before torch is
# imported, because OpenMP may bind this thread to one of them when it is loaded.
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def is_command_line(argv: list[str], orig_argv: list[str]) -> bool:
    """Whether this process runs `pygpt`, `python -m pygpt` or `python -m bench`. Ask while pygpt is imported."""
    if argv[:1] != ["-m"]:  # which it is until Python has imported the package of the module that it runs
        return Path(*argv[:1]).stem == "pygpt"
    pairs = (pair for pair in pairwise((*orig_argv, "")) if re.match("-[^-WXcm]*m", pair[0]))
    option, following = next(pairs, ("", ""))
    return (option.partition("m")[2] or following).partition(".")[0] == "pygpt"


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bounds how long OpenMP's threads spin, unless the environment says how they are to wait."""
    if not any(name in environment for name in (*WAITING, *OTHER_SETTINGS)):
        environment.update(WAITING)


def waiting() -> str:
    """The OpenMP runtime in this process, and what the environment says about its waiting."""
    names = [name for name in (*WAITING, *OTHER_SETTINGS) if name in os.environ]
    settings = ", ".join(f"{name}={os.environ[name]}" for name in names) or "its default"
    return f"{_runtime()}; waiting: {settings}"


def _runtime() -> str:
    """The name of the OpenMP library in this process. Only Linux lists what a process has loaded."""
    paths = {line.split()[-1] for line in _text(Path("/proc/self/maps")).splitlines()}
    names = sorted({Path(path).name for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))})
    return ", ".join(names) or "OpenMP"


# ------------------------------------------------------------------------------- how many threads
def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help=HELP)


def default() -> tuple[int | None, str]:
    """The number of threads that this process can really run at once, and why. None where the user has set it."""
    for name in NUMBER:
        if setting := os.environ.get(name):
            return None, f"{name}={setting}"
    if CPUS is None:
        return None, "torch's default"
    cores, quota = physical_cores(CPUS), cpu_quota()
    if quota is not None and quota < cores:
        return max(1, int(quota)), f"the control group's quota of {quota:g} CPUs"
    return cores, "a physical core each" if cores < len(CPUS) else "a CPU each"


def physical_cores(cpus: list[int], root: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many cores these CPUs are. Linux says which of them are hyperthreads of one core."""
    return len({_text(root / f"cpu{cpu}" / "topology" / "thread_siblings_list") or cpu for cpu in cpus})


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The CPU time per second that this process's control groups (Linux) grant, in CPUs. None if they set no limit.

    Inside a container the name of a group may be the host's. The container's own group is then the root.
    """
    quotas = []
    for line in _text(groups).splitlines():
        _, controllers, name = line.split(":", 2)  # version 2 is one line without controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / ("cpu" if controllers else "")  # also where it is mounted together with others
        group = mount / name.lstrip("/")
        quotas += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Path) -> float | None:
    names = ("cpu.max",) if (group / "cpu.max").exists() else ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # version 2, 1
    found = " ".join(_text(group / name) for name in names).split()
    return int(found[0]) / int(found[1]) if len(found) == 2 and found[0].isdigit() else None  # else "max" or -1


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
