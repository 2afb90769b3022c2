"""pygpt/threads.py: the number of threads, and OpenMP's waiting, which the command line sets and an import does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pygpt
from pygpt import cli, threads
from tests.cli.commands import TINY, refused


# ------------------------------------------------------------------------------- waiting
@pytest.mark.parametrize(
    "expected, argv, orig_argv",
    [
        (True, ["/bin/pygpt", "info"], ["python", "/bin/pygpt", "info"]),
        (True, ["pygpt.exe", "info"], ["pygpt.exe", "info"]),
        (True, ["-m", "info"], ["python", "-X", "dev", "-m", "pygpt", "info"]),
        (True, ["-m", "info"], ["python", "-mpygpt", "info"]),
        (True, ["-m", "info"], ["python", "-Im", "pygpt", "info"]),
        (True, ["-m"], ["python", "-m", "pygpt.bench"]),
        (False, ["-m"], ["python", "-m"]),
        (False, ["-m", "pygpt"], ["python", "-m", "other", "pygpt"]),
        (False, ["script.py", "-m", "pygpt"], ["python", "script.py", "-m", "pygpt"]),
        (False, ["-c"], ["python", "-c", "import pygpt"]),
        (False, [""], ["python"]),
        (False, [], []),
    ],
)
def test_what_is_the_command_line(expected, argv, orig_argv):
    assert threads.is_command_line(argv, orig_argv) == expected


@pytest.mark.parametrize("name", [*threads.WAITING, *threads.OTHER_SETTINGS])
def test_the_users_settings_win(name):
    environment = {name: "7"}
    threads.bound_spinning(environment)
    assert environment == {name: "7"}


def process(*command, cpus=None, **settings):
    """What the command prints, and the settings that OpenMP's library had when it was loaded."""
    names = (*threads.WAITING, *threads.OTHER_SETTINGS, *threads.NUMBER)
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"PYTHONPATH": str(Path(pygpt.__file__).parents[1]), "OMP_DISPLAY_ENV": "verbose"} | settings
    limit = (lambda: os.sched_setaffinity(0, cpus)) if cpus else None
    done = subprocess.run(
        [sys.executable, *command], env=env, preexec_fn=limit, capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads what GNU's OpenMP prints, and limits the CPUs")
def test_the_command_line_sets_it_before_openmp_is_loaded():
    cpu = min(os.sched_getaffinity(0))
    out, loaded = process("-m", "pygpt", "info", "--json", cpus={cpu})
    found = json.loads(out)
    assert found["threads"] == 1 and found["openmp"].endswith("waiting: GOMP_SPINCOUNT=3000, KMP_BLOCKTIME=1")
    assert "GOMP_SPINCOUNT = '3000'" in loaded
    out, loaded = process("-m", "pygpt", "info", "--json", OMP_WAIT_POLICY="passive", OMP_NUM_THREADS="1")
    found = json.loads(out)
    assert found["threads_because"] == "OMP_NUM_THREADS=1" and "OMP_WAIT_POLICY=passive" in found["openmp"]
    assert "GOMP_SPINCOUNT = '0'" in loaded
    out, _ = process("-m", "pygpt", "info", "--json", OMP_PROC_BIND="true")
    assert json.loads(out)["threads"] == threads.physical_cores(threads.CPUS)
    out, loaded = process("-c", "import os, pygpt; print('GOMP_SPINCOUNT' in os.environ)")
    assert out == "False\n" and "GOMP_SPINCOUNT = '3000'" not in loaded


# ------------------------------------------------------------------------------- how many
def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


NESTED = {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "150000 100000\n", "cpu.max": "max 100000\n"}


@pytest.mark.parametrize(
    "expected, groups, files",
    [
        (1.5, "0::/a/b\n", NESTED),  # the group above grants less
        (3.0, "0::/a/b\n", NESTED | {"a/cpu.max": "max 100000\n"}),
        (None, "0::/\n", NESTED),
        (0.5, "0::/../of/the/host\n", {"cpu.max": "50000 100000\n"}),  # in a container
        (2.0, "4:memory:/m\n3:cpu,cpuacct:/a\n0::/\n",
         {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}),
        (None, "1:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}),
        (None, "2:cpuset:/a\n", {"cpuset/a/cpu.cfs_quota_us": "1\n", "cpuset/a/cpu.cfs_period_us": "100000\n"}),
        (None, "0::/a\n", {}),
        (None, "", {}),
    ],
)  # fmt: skip
def test_quota(expected, groups, files, tmp_path):
    (tmp_path / "groups").write_text(groups)
    assert threads.cpu_quota(tmp_path / "groups", write(tmp_path / "root", files)) == expected
    assert threads.cpu_quota(tmp_path / "missing") is None


def test_hyperthreads_are_one_core(tmp_path):
    siblings = {f"cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}\n" for i in range(8)}
    root = write(tmp_path, siblings)
    assert threads.physical_cores(list(range(8)), root) == 4
    assert threads.physical_cores([0, 1, 4], root) == 2
    assert threads.physical_cores([0, 1, 9], tmp_path / "missing") == 3


@pytest.mark.parametrize(
    "quota, number, reason",
    [
        (None, 3, "a physical core each"),
        (3.0, 3, "a physical core each"),
        (2.5, 2, "the control group's quota of 2.5 CPUs"),
        (0.3, 1, "the control group's quota of 0.3 CPUs"),
    ],
)
def test_the_default(quota, number, reason, monkeypatch, capsys):
    for name in threads.NUMBER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "physical_cores", lambda cpus: 3)
    monkeypatch.setattr(threads, "CPUS", list(range(6)))
    assert threads.default() == (number, reason)
    assert cli.main(["info"]) == 0 and f"{number} ({reason})" in capsys.readouterr().out
    assert torch.get_num_threads() == number
    monkeypatch.setattr(threads, "CPUS", None)
    assert threads.default() == (None, "torch's default")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads.default() == (None, "OMP_NUM_THREADS=5")


@pytest.mark.parametrize("command", ["generate none", "verify", "demo", "train"])
def test_threads_are_checked(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--threads must be at least 1, got 0" in refused(capsys, *command.split(), "--threads=0")


def test_the_number_that_is_given_wins(text, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "default", lambda: (1, "a test"))
    assert cli.main(["train", *TINY, "--data", text, "--threads=2", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == 2
