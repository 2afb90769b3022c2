"""Runs Python source in processes that share one import of torch, which takes longer than most of what they test."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Forks a process for every request, with the request's environment, arguments and files, and reports how it ended. The
# code that the process runs comes after the loop, so that it ends as any Python process does: by traceback, exit code
# and flush.
SERVER = """
import json, os, sys
import torch
for _request in sys.stdin:
    _request = json.loads(_request)
    _child = os.fork()
    if not _child:
        break
    print(_child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(_child, 0)[1]), flush=True)
else:
    sys.exit()
for _number, _file in enumerate((os.devnull, _request["out"], _request["err"])):
    _file = os.open(_file, os.O_WRONLY if _number else os.O_RDONLY)
    os.dup2(_file, _number)
    os.close(_file)
os.chdir(_request["cwd"])
os.environ.clear()
os.environ.update(_request["environment"])
sys.path[1:1] = _request["environment"].get("PYTHONPATH", "").split(os.pathsep)
sys.argv[1:] = _request["arguments"]
exec(compile(_request["source"], "<string>", "exec"))
"""
OF_MODULE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
OF_SCRIPT = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def source_of(command) -> list[str]:
    """Python source, and its arguments, for what stands on a command line after "python"."""
    first, *rest = map(str, command)
    return rest if first == "-c" else [OF_MODULE, *rest] if first == "-m" else [OF_SCRIPT, first, *rest]


class Forks:
    """A process that has imported torch, and its forks."""

    def __init__(self):
        command, environment = [sys.executable, "-c", SERVER], os.environ | {"PYTHONPATH": search_path()}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)

    def run(self, source, arguments, environment, cwd=".", timeout=600) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            out.touch(), err.touch()
            request = {"source": source, "arguments": list(arguments), "environment": environment}
            request |= {"cwd": os.path.abspath(cwd), "out": str(out), "err": str(err)}
            print(json.dumps(request), file=self.server.stdin, flush=True)
            child = int(self.server.stdout.readline())
            if not select.select([self.server.stdout], [], [], timeout)[0]:
                os.kill(child, signal.SIGKILL)
                self.server.stdout.readline()
                raise subprocess.TimeoutExpired(source, timeout, out.read_text(), err.read_text())
            code = int(self.server.stdout.readline())
            return subprocess.CompletedProcess([source, *arguments], code, out.read_text(), err.read_text())

    def close(self):
        self.server.stdin.close()
        self.server.wait()


def search_path() -> str:
    return os.pathsep.join(filter(None, sys.path))


def run_new(source, arguments, environment, timeout=600) -> subprocess.CompletedProcess:
    """The same in a new process, for what depends on how torch is imported or on the dynamic linker."""
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=timeout)
