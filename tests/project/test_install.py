"""How pip builds and installs a checkout: with the torch that is installed, and never with one that it fetches."""

import os
import resource
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

import pygpt

ROOT = Path(pygpt.__file__).parents[1]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
SOURCES = "setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"
FOLDERS = "pygpt", "triton_kernels", "bench", "csrc"


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a build reads."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.fixture
def environment(tmp_path):
    """Makes a virtual environment with links to the packages named -> its Python."""

    def make(packages=()):
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = folder / "bin" / "python"
        command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        purelib = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        for package in packages:
            (purelib / package.name).symlink_to(package)
        return python

    return make


def pip(python, *arguments, **variables):
    """pip, acting on the environment of ``python`` without a network -> its result and the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": ""} | variables
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_without_torch_pip_says_at_once_what_to_type(checkout, environment):
    python = environment()
    _, of_pip = pip(python, "list")
    done, seconds = pip(python, "install", checkout)
    assert done.returncode != 0 and "Installing build dependencies" not in done.stdout
    assert (
        "pygpt: the build needs torch >= 2.10 and cannot see any. It does not fetch torch (gigabytes)." in done.stderr
    )
    assert "pip install --no-build-isolation ." in done.stderr
    assert seconds < of_pip + 1.0, "it takes a second more than pip itself"


@pytest.mark.parametrize("how", [[], ["--no-build-isolation", "--editable"]], ids=["isolated", "editable"])
def test_with_torch_pip_builds_with_it(how, checkout, environment):
    """The compiler is one that fails. Only a build that has found torch calls it."""
    python = environment(p for p in SITE_PACKAGES.iterdir() if "pygpt" not in p.name and p.name != "__pycache__")
    variables = {"CC": "false", "CXX": "false", "PYGPT_BUILD_CUDA": "0"}
    done, _ = pip(python, "install", *how, checkout, **variables)
    assert done.returncode != 0 and "pygpt: building pygpt._C failed: Command" in done.stderr, done.stderr
    assert "Installing build dependencies" not in done.stdout and "Collecting torch" not in done.stdout


HEADER = "o'brien's #1 $.h"  # compilers list it in make's syntax


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """setup.py as a module, in a folder with two sources and a header."""
    spec = spec_from_file_location("pygpt_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("setup.py", "a.cpp", "b.cpp", HEADER):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9, 1e9))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "OBJECTS", tmp_path / "objects")
    return module


def test_only_what_changed_is_compiled(recipe):
    compiled = []

    def compiler(source, folder, flags):
        compiled.append(source)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "partial.o").write_text(f"{source} {flags}")
        included = source == "a.cpp" and Path(HEADER).exists()
        as_in_make = HEADER.replace(" ", "\\ ").replace("#", "\\#").replace("$", "$$") if included else ""
        (folder / "partial.d").write_text(f"partial.o: {source} \\\n  {as_in_make}\n")
        return folder / "partial.o"

    def build(flags=("-O3",), force=False, tools="g++ 12"):
        compiled.clear()
        command = SimpleNamespace(tools=tools, include=[], compiler=SimpleNamespace(include_dirs=[]), force=force)
        command.pool = SimpleNamespace(map=lambda f, jobs: list(map(f, jobs)))
        command.object_file = lambda *job: recipe.BuildKernels.object_file(command, *job)
        jobs = [(source, "folder", compiler, flags) for source in ("a.cpp", "b.cpp")]
        files = recipe.BuildKernels.objects(command, jobs)
        assert [Path(file).read_text() for file in files] == [f"{source} {flags}" for source, *_ in jobs]
        return compiled

    def touch(name):
        os.utime(name, (2e9, 2e9))
        touched = list(build())
        os.utime(name, (1e9, 1e9))
        return touched

    assert build() == ["a.cpp", "b.cpp"] and build() == []
    assert touch("a.cpp") == ["a.cpp"] and touch("b.cpp") == ["b.cpp"] and build() == []
    assert touch(HEADER) == ["a.cpp"] and touch("setup.py") == ["a.cpp", "b.cpp"] and build() == []
    Path(HEADER).unlink()
    assert build() == ["a.cpp"] and build() == []
    assert build(("-O2",)) == ["a.cpp", "b.cpp"] and build(("-O2",)) == [] and build() == []
    assert build(tools="g++ 13") == ["a.cpp", "b.cpp"] and build(tools="g++ 13") == [] and build() == []
    assert build(force=True) == ["a.cpp", "b.cpp"]


def test_an_older_object_file_is_linked(recipe, monkeypatch):
    """That of flags that return. setuptools links nothing that is newer than its objects, were it not forced."""
    forced = []
    monkeypatch.setattr(recipe.build_ext, "build_extension", lambda self, ext: forced.append(self.force))
    command = recipe.BuildKernels(Distribution())
    command.objects, command.library, command.force = lambda jobs: ["a.o"], [], False
    command.build_cpu(SimpleNamespace(library_dirs=[]))
    assert forced == [True] and not command.force
