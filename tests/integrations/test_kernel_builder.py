"""What kernel-builder of Hugging Face builds from: complete, of setup.py's flags, and importable once it is built."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pygpt.integrations import kernel_builder, kernels

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kernel_builder.write(tmp_path_factory.mktemp("kernel") / "sources").parent


@pytest.fixture(scope="module")
def build(folder):
    return tomllib.loads((folder / "build.toml").read_text())


@pytest.fixture(scope="module")
def setup():
    return kernel_builder._setup()


def of_backend(build, backend):
    return {name: kernel for name, kernel in build["kernel"].items() if kernel["backend"] == backend}


def test_every_source_is_compiled_once(folder, build):
    """Nix sees the sources that build.toml names and no others, and CMake has one set of flags for a source."""
    for backend, suffixes in (("cpu", {".cpp", ".h", ".cuh"}), ("cuda", {".cpp", ".h", ".cuh", ".cu"})):
        named = [source for kernel in of_backend(build, backend).values() for source in kernel["src"]]
        written = [str(f.relative_to(folder)) for f in folder.glob("csrc/**/*") if f.suffix in suffixes]
        if backend == "cpu":
            written.remove("csrc/bind/bind_cuda.cpp")
        assert sorted(named) == sorted(written)
        assert all((folder / source).is_file() for source in build["torch"]["src"])


def test_every_include_is_there(folder):
    for source in [f for f in folder.glob("csrc/**/*") if f.is_file()]:
        for header in re.findall(r'^#\s*include "(.*)"', source.read_text(), re.MULTILINE):
            of_the_tests = header == "emulator.h"
            assert of_the_tests or (source.parent / header).is_file(), f"{source} includes {header}"


def test_the_flags_are_those_of_setup(folder, build, setup):
    for backend in ("cpu", "cuda"):
        for isa, flags in setup.ISAS.items():
            kernel = build["kernel"][f"{backend}_{isa}"]
            assert kernel["cxx-flags"] == [*setup.FLAGS, f"-DPYGPT_ISA={isa}", *flags]
            sources = {re.sub(rf"csrc/cpu/(.*)\.{isa}\.cpp", r"\1", source) for source in kernel["src"]}
            assert sources == set(setup.CPU)
            for source in kernel["src"]:
                original = ROOT / source.replace(f".{isa}.cpp", ".cpp")
                assert (folder / source).read_text() == original.read_text()
    assert build["kernel"]["cuda"]["cuda-flags"] == setup.CUDA_FLAGS
    for kernel in of_backend(build, "cuda").values():  # the metadata lists those of all sections
        assert kernel["cuda-capabilities"] == ["8.0", "9.0+PTX"]
    assert '"sm_80 sm_90 compute_90"' in (folder / "csrc/bind/bind_cuda.cpp").read_text().splitlines()[0]
    assert f"-DTORCH_TARGET_VERSION={stable_version(build)}" == setup.STABLE


def stable_version(build):
    major, minor = map(int, build["torch"]["stable-abi"]["cpu"].split("."))
    return f"0x{major:02x}{minor:02x}" + 12 * "0"


def test_the_layout_is_the_one_it_asks_for(folder, build):
    """The module has its name, and nothing in it has that name, too."""
    name = build["general"]["name"].replace("-", "_")
    module = folder / "torch-ext" / name
    assert (module / "__init__.py").is_file() and not (module / name).exists()
    assert (module / "pygpt" / "__init__.py").is_file()
    assert f"_{name}_" in (module / "__init__.py").read_text()  # of the library's name


LOAD = """
import importlib.util, json, sys, torch
spec = importlib.util.spec_from_file_location("pygpt_abc123", sys.argv[1] + "/__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = kernel
spec.loader.exec_module(kernel)
x = torch.ones(2, 8, requires_grad=True)
kernel.rms_norm(x, (8,)).sum().backward()
print(json.dumps([kernel.pygpt.__file__, str(kernel.pygpt.explain("rms_norm", x, (8,)))]))
"""


@pytest.mark.skipif(importlib.util.find_spec("pygpt._C") is None, reason="the CPU kernels are not built")
def test_what_it_builds_loads_and_serves(folder, tmp_path, run_new_python):
    """The one library has another name than ours, and lies beside the package, not in it."""
    variant = tmp_path / "variant"
    shutil.copytree(folder / "torch-ext" / "pygpt_kernels", variant)
    assert not list(variant.rglob("*.so"))
    shutil.copy(importlib.util.find_spec("pygpt._C").origin, variant / "_pygpt_kernels_cpu_abc123.abi3.so")
    done = run_new_python(LOAD, str(variant), PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    file, chosen = json.loads(done.stdout)
    assert Path(file).is_relative_to(variant)
    assert chosen == "rms_norm: cpp"


NEWER = {  # what the stable ABI has had since Python 3.10; kernel-builder asks for that of 3.9
    "PyCodec_Unregister", "PyModule_AddObjectRef", "PyModule_AddType", "PyObject_CallNoArgs",
    "PyType_FromModuleAndSpec", "PyType_GetModule", "PyType_GetModuleState", "PyUnicode_AsUTF8AndSize", "Py_Is",
    "Py_IsNone", "Py_NewRef", "Py_XNewRef",
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("pygpt._C") is None, reason="the CPU kernels are not built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize("library", ["pygpt._C", "pygpt._cuda"])
def test_the_python_abi_is_that_of_3_9(library):
    if (spec := importlib.util.find_spec(library)) is None:
        pytest.skip("the CUDA kernels are not built")
    listed = subprocess.run(["nm", "-D", "--undefined-only", spec.origin], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert "PyModule_Create2" in symbols and not symbols & NEWER


def test_what_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").touch()
    monkeypatch.setattr(sys, "argv", ["kernels", str(tmp_path), "--sources"])
    assert kernels.main() == 2
    assert "is not empty" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert kernel_builder.write(Path(".")) == Path("build.toml") and not list(empty.glob(".*"))
    shutil.rmtree(empty)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernel_builder, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="the sources are in a checkout of pygpt"):
        kernel_builder.write(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
