"""What an op consists of: the files that CONTRIBUTING's recipe names, and one Python file that registers it."""

import inspect
import re
from pathlib import Path

import pytest

from pygpt.dispatch import OPS

ROOT = Path(__file__).parents[2]


def recipe():
    """The files of CONTRIBUTING's "Adding an op", with <family> where the op's family stands."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Adding an op\n")[2].partition("\n## ")[0]
    steps = re.search(r"^1\. .*", section, re.MULTILINE | re.DOTALL)[0]
    return re.findall(r"`([\w/<>]+\.\w+)`", steps)


def test_the_recipe_is_short():
    assert 6 <= len(set(recipe())) <= 9


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_in_the_recipes_files(op):
    """By its own name, or where a kernel serves a whole family by the family's."""
    family = Path(inspect.getsourcefile(OPS[op].fwd)).stem
    served = {"qkv_attention": "attention", "varlen_attn": "attention", "dropout_norm": "norm"}  # by another's kernels
    family = served.get(family, family)
    for name in recipe():
        path = ROOT / name.replace("<family>", family)
        files = [path] if path.is_file() else path.with_suffix("").iterdir()  # a large family has a folder
        text = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
        assert re.search(rf"\b({op}|{family})(?=\b|_)|\b{OPS[op].public.__name__}\b", text), name


TOY = """
import sys
import torch
import pygpt, toy_op
from pygpt import cli, verify
from pygpt.dispatch import OPS, REFERENCE
assert [row.passed for dtype in verify.DTYPES.values() for row in verify.measure("silu", {}, dtype, None)] == [True] * 8
assert cli.main(["verify", "--ops", "silu", "--shape", "M=5x7", "--dtypes", "float32"]) == 0
x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
    assert check(toy_op.silu, x) and check(lambda t: toy_op.SiLU.apply(REFERENCE, t), x)
for op in ("silu", toy_op.silu):
    choice = pygpt.explain(op, x)
    assert choice.backend == "torch" and choice.rejected["cpp"] == ["silu is not among its ops"], choice
with pygpt.backend("torch"):
    assert torch.equal(toy_op.silu(x), torch.nn.functional.silu(x))
try:
    toy_op.silu(x.long())
except TypeError as e:
    assert "pygpt.silu: input must be floating point, got torch.int64" in str(e)
else:
    raise AssertionError("integers")
assert torch.equal(torch.compile(toy_op.silu, fullgraph=True, backend="aot_eager")(x), toy_op.silu(x))
print("covered")
"""


def test_a_toy_op_from_one_file(run_python):
    done = run_python(TOY, PYGPT_BACKEND="")
    assert done.stdout.endswith("covered\n"), done.stdout + done.stderr[-3000:]


WITHOUT_KERNELS = """
import pygpt.ops, sys, toy_op  # as if the op's file stood in pygpt/ops/: registered before the libraries are loaded
import torch, pygpt
from pygpt.dispatch import TABLE
x = torch.randn(3, requires_grad=True)
assert pygpt.explain("silu", x).rejected["cpp"] == ["silu is not among its ops"]
assert all("silu" not in row.ops for row in TABLE.values() if row.ops is not None and not row.missing)
assert torch.equal(torch.ops.pygpt.silu_fwd(x), toy_op.silu_fwd(x)) and "relu" in TABLE["cpp"].ops
print("known")
"""


def test_a_new_op_has_no_kernels_yet(run_python):
    """Neither C++ nor Triton claims an op for which it has none."""
    source = WITHOUT_KERNELS.replace("import pygpt.ops, sys, toy_op", EARLY)
    done = run_python(source, TRITON_INTERPRET="1")
    assert done.stdout == "known\n", done.stdout + done.stderr[-3000:]


EARLY = """
import importlib, sys, types
package = types.ModuleType("pygpt")  # imported without running pygpt/__init__.py
package.__path__ = [next(p + "/pygpt" for p in sys.path if p and __import__("os").path.isdir(p + "/pygpt/ops"))]
sys.modules["pygpt"] = package
import pygpt.ops, toy_op
del sys.modules["pygpt"]
"""


def test_every_package_is_installed():
    """A folder that pyproject.toml leaves out is there in a checkout, and missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1]
    folders = {
        f"pygpt.{'.'.join(f.parent.relative_to(ROOT / 'pygpt').parts)}"
        for f in (ROOT / "pygpt").glob("*/**/__init__.py")
    }
    assert folders and folders <= set(re.findall(r'"([\w.]+)"', listed))
