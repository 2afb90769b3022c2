"""Checks the CPU kernels on another architecture: cross-compiles them without torch and runs them under QEMU.

    python -m tests.cross [aarch64-linux-gnu]

The rule is that of `pygpt verify`, with the portable kernels of this machine, which the tests compare with PyTorch, in
PyTorch's place: each result's error against double precision is at most 2x the error here plus the usual allowance.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.instructions.count import build_program
from pygpt.verify import DTYPES, allowance

DRIVER = Path(__file__).with_name("driver.cpp")


def build(compiler: str, folder: Path) -> Path:
    """The driver with the portable kernels, statically linked."""
    folder.mkdir()
    return build_program(folder, DRIVER, "baseline", compiler=[compiler], link=["-static"])


def errors(*command: str | Path) -> dict[tuple[str, str], float]:
    """(result, dtype) -> error."""
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return {(name, dtype): float(error) for name, dtype, error in (line.split("\t") for line in lines)}


def main(target: str = "aarch64-linux-gnu") -> int:
    emulator = f"qemu-{target.partition('-')[0]}-static"
    for tool in (f"{target}-g++", emulator):
        if not shutil.which(tool):
            sys.exit(f"{tool} is not installed; on Debian or Ubuntu, apt install g++-{target} qemu-user-static")
    with tempfile.TemporaryDirectory() as folder:
        native = errors(build(os.environ.get("CXX", "g++"), Path(folder, "native")))
        foreign = errors(emulator, build(f"{target}-g++", Path(folder, "foreign")))
    assert native.keys() == foreign.keys()
    failed = [
        f"{name} {dtype}: error {foreign[name, dtype]:.2e}, here {error:.2e}"
        for (name, dtype), error in native.items()
        if not foreign[name, dtype] <= 2 * error + allowance(DTYPES[dtype])  # a NaN fails
    ]
    print("\n".join([*failed, f"{target}: {len(native) - len(failed)} of {len(native)} results pass"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
