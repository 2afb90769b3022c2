"""PYGPT_POISON=1: what a kernel is given to write, and its temporary memory, is NaN before it runs.

It lies between guard bands, which are NaN before and after the kernel.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

NOTHING_RUNS = """
import sys; sys.path.insert(0, "tests")
import cases, torch
from pygpt import verify
{prepare}
generator, elements, nans = torch.Generator().manual_seed(0), 0, 0
for op, dims in cases.TINY.items():
    if op == "varlen_attn":  # its results are filled before, because its kernels leave rows of no sequence out
        continue
    args, grads = verify.draw(op, dims, torch.{dtype}, generator)
    for name, call in cases.kernel_calls(op, args, grads, kernels):
        for result in verify.as_tuple(getattr(kernels, name)(*call)):
            elements += result.numel()
            nans += result.isnan().sum().item()
assert elements > 100
print(nans == elements)
"""
PREPARE = {
    "cuda": "from tests.emulator import build; build.load().record(True); kernels = torch.ops.pygpt_emulator",
    "triton": "from pygpt import triton_kernels as kernels\n"
    "for name, module in list(sys.modules.items()):\n"
    "    if name.startswith(kernels.__name__) and hasattr(module, 'launch'): module.launch = lambda *a, **k: None",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator and the interpreter take CPU tensors")
@pytest.mark.parametrize("name, dtype, poison", [
    *product(PREPARE, ["bfloat16", "float16", "float32"], ["1"]), *product(PREPARE, ["float32"], ["", "0"])
])  # fmt: skip
def test_what_no_kernel_writes_is_nan(name, dtype, poison, run_python):
    """Launches that do nothing leave NaN behind: so would an element that a kernel leaves out. Off by default."""
    source = NOTHING_RUNS.format(prepare=PREPARE[name], dtype=dtype)
    done = run_python(source, PYGPT_POISON=poison, PYTHONPATH=str(ROOT))
    assert done.stdout.split() == [str(poison == "1")], done.stdout + done.stderr


RUNS = """
import sys; sys.path.insert(0, "tests")
import cases, torch
from pygpt import verify
{prepare}
generator, elements, nans = torch.Generator().manual_seed(0), 0, 0
larger = {{
    "attention": {{"B": 1, "H": 2, "L": 40, "S": 70, "E": 33, "Ev": 20}}, "linear": {{"M": (40,), "K": 70, "N": 90}},
    "attention_lse": {{"B": 1, "H": 1, "L": 41, "S": 257, "E": 8, "causal": 1}},  # keys that no query sees
    "layer_norm": {{"M": (3,), "N": 300}}, "linear_cross_entropy": {{"N": 33, "K": 40, "V": 90}},
}}
for op, dims in (*cases.variants(cases.TINY), *(larger.items() if {larger} else ())):
    args, grads = verify.draw(op, dims, torch.{dtype}, generator)
    for name, call in cases.kernel_calls(op, args, grads, kernels):
        for result in verify.as_tuple(getattr(kernels, name)(*call)):
            elements += result.numel()
            nans += result.isnan().sum().item()
print("nans", nans, "of many" if elements > 1000 else "of", elements)
"""
FRONTS = {
    "fastcall": "from pygpt.dispatch import named; kernels = named('cpp').kernels",
    "dispatcher": "import pygpt; kernels = torch.ops.pygpt",
    "cuda": "from tests.emulator import build; build.load(); kernels = torch.ops.pygpt_emulator",
    "triton": "from pygpt import triton_kernels as kernels",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("front", FRONTS)
def test_kernels_write_all_results_and_no_guard_band(front, dtype, run_python):
    """Nor do they read what nothing has written: no result has a NaN. The faults to be noticed are in tests/mutants."""
    if front in PREPARE and torch.cuda.is_available():
        pytest.skip("the emulator and the interpreter take CPU tensors")
    interpret = {"TRITON_INTERPRET": "1"} if front == "triton" else {}
    source = RUNS.format(prepare=FRONTS[front], dtype=dtype, larger=front not in PREPARE)
    done = run_python(source, PYGPT_POISON="1", PYTHONPATH=str(ROOT), **interpret)
    assert done.stdout.startswith("nans 0 of many"), done.stdout + done.stderr


PAST_THE_END = """
import sys
import torch, triton, triton.language as tl
from pygpt.triton_kernels import common

@triton.jit
def store(out, first, BLOCK: tl.constexpr):
    tl.store(out + first + tl.arange(0, BLOCK), 1.0)

configs = common.Configs("test", (common.Config({"BLOCK": 8}, 1),))
for first in (0, int(sys.argv[1])):
    result = common.empty(torch.ones(1), 8)
    argument = result.view(2, 4)[:1] if len(sys.argv) > 2 else result  # a view of the same memory
    common.launch(store, lambda c: 1, argument, first, configs=configs)
    print("launched")
"""


@pytest.mark.parametrize("view", [[], ["view"]], ids=["whole", "view"])
@pytest.mark.parametrize("first", [-1, 1])
def test_a_triton_kernel_past_an_end(first, view, tmp_path):
    script = tmp_path / "store.py"
    script.write_text(PAST_THE_END)
    environment = {**os.environ, "PYGPT_POISON": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(first), *view]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["launched"]
    assert "RuntimeError: pygpt: PYGPT_POISON: store wrote outside of a result" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", [None, "baseline"])
def test_cpu_kernels_write_everything_and_read_nothing_before(capability):
    """They are as exact as ever where results, packed operands, partial sums and scores start as NaN."""
    environment = {**os.environ, "PYGPT_POISON": "1"} | ({"PYGPT_CPU_CAPABILITY": capability} if capability else {})
    command = [sys.executable, "-m", "pygpt", "verify", "--backend", "cpp"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


@pytest.mark.slow  # the same kernels get NaN from torch.empty in test_parity
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU every test runs poisoned: see bench/first_light")
@pytest.mark.parametrize("name", PREPARE)
def test_gpu_kernels_write_everything_and_read_nothing_before(name, tmp_path):
    environment = {**os.environ, "PYGPT_POISON": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.first_light.checks", "verify", "--device=cpu", f"--backend={name}",
               f"--out={tmp_path / 'rows.json'}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
