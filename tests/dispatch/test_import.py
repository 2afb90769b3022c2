"""What `import pygpt` brings along, and what its names are."""

import json
import sys

import pytest

IMPORTS = """
import json, sys, time
start = time.process_time()
import torch
between, torchs = time.process_time(), set(sys.modules)
import pygpt
costs = between - start, time.process_time() - between
print(json.dumps([costs, sorted(set(sys.modules) - torchs)]))
"""
DEAR = {
    "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.nn.attention.bias",
    "torch.utils.flop_counter", "triton", "matplotlib", "rich", "numpy",
}  # fmt: skip


@pytest.fixture
def imported(run_new_python):
    """Runs IMPORTS without a GPU or Triton's interpreter: (CPU seconds for torch, for pygpt), new modules."""

    def run(**environment):
        done = run_new_python(IMPORTS, **{"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": "", **environment})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("chosen", ["", "cpp"])
def test_import_brings_nothing_but_pygpt(chosen, imported):
    """Beside what `import torch` has loaded: our own modules, and some of the standard library."""
    _, modules = imported(PYGPT_BACKEND=chosen)
    foreign = {m for m in modules if m.split(".")[0] not in {"pygpt", *sys.stdlib_module_names}}
    assert foreign == set() and not DEAR & set(modules) and "pygpt.nn" in modules


def test_import_is_cheap_beside_torchs(imported):
    """It takes a twentieth of torch's CPU time; torch._dynamo alone would take as much as torch."""
    (of_torch, of_pygpt), _ = imported()
    assert of_pygpt < of_torch / 2


COUNTED = """
from torch.utils.flop_counter import FlopCounterMode
def counted():
    w = torch.nn.Parameter(torch.randn(5, 4))
    with FlopCounterMode(display=False) as counter:
        pygpt.functional.linear(torch.randn(3, 4), w).sum().backward()
    return counter.get_total_flops()
assert counted() == 2 * (2 * 3 * 4 * 5), counted()
"""
ORDERS = {
    "after": "import torch, pygpt\n" + COUNTED,
    "before": "import torch, torch.utils.flop_counter, pygpt\n" + COUNTED,
    "asked for, then after": "import torch, pygpt, importlib.util\n"
    "assert importlib.util.find_spec('torch.utils.flop_counter')\n" + COUNTED,
    "with torch.compile": "import torch, pygpt\nimport torch._dynamo\n" + COUNTED,
}


@pytest.mark.parametrize("order", ORDERS)
def test_flop_counter_has_our_formulas(order, run_python):
    done = run_python(ORDERS[order])
    assert done.returncode == 0, done.stderr


NAMES = """
import importlib, os, pkgutil, types
import pygpt
public = {name: getattr(pygpt, name) for name in pygpt.__all__}
for package in ("pygpt", "pygpt.inspect", "pygpt.ops", "pygpt.triton_kernels"):
    try:
        package = importlib.import_module(package)
    except ImportError:
        assert package == "pygpt.triton_kernels"  # without Triton
        continue
    folder = os.path.dirname(package.__file__)  # alone: in a checkout, __path__ holds the one around it too
    names = [m.name for m in pkgutil.iter_modules([folder]) if m.name != "__main__"]
    assert names, package
    for name in names:
        attribute = getattr(package, name, None)
        assert attribute is None or isinstance(attribute, types.ModuleType), f"{package.__name__}.{name} hides a module"
    for name in names:
        try:
            module = importlib.import_module(f"{package.__name__}.{name}")
        except ImportError:
            continue
        assert getattr(package, name) is module, f"{package.__name__}.{name}"
for name, value in public.items():
    found = {}
    exec(f"from pygpt import {name}", found)
    assert found[name] is value, f"{name} is not what it was"
    assert not isinstance(value, types.ModuleType) or value.__name__ == f"pygpt.{name}"
"""


def test_no_public_name_hides_a_module(run_python):
    done = run_python(NAMES)
    assert done.returncode == 0, done.stderr
