"""Annotations: all public names have them, and mypy tells a user's wrong calls from the right ones."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pygpt
from pygpt import data, dispatch, files, functional, generate, model, nn, progress, signals, train, train_log, verify
from pygpt.inspect import calls, layers, machine, plot, step
from pygpt.nn import attention, fusing, losses, mlp, rotary

ROOT = Path(pygpt.__file__).parents[1]

# A user's program. mypy must find an error in the lines that end in "# wrong", and in no other.
PROGRAM = """
import torch
from torch import Tensor

import pygpt
import pygpt.autograd
import pygpt.functional as P
from pygpt import nn

x, w = torch.randn(2, 3, 4, 8), torch.randn(8)


def tensor(result: Tensor) -> None: ...


tensor(P.layer_norm(x, 8, w, eps=1e-6))
tensor(P.layer_norm(x, 8, w, epsilon=1e-6))  # wrong
tensor(P.rms_norm(x, (4, 8), None))
tensor(P.rms_norm(x, "8"))  # wrong
normed, summed = P.add_layer_norm(x, x, [8])
tensor(P.add_layer_norm(x, x, [8]))  # wrong
normed, summed = P.add_rms_norm(x, x, 8, w, 1e-6)
P.add_rms_norm(x, x, 8, w, w)  # wrong
q, k = P.rope(x, None, w, w, q_weight=w, position_ids=None)
tensor(q)
tensor(k)  # wrong
P.rope(x, x, w, w, w)  # wrong
tensor(P.cross_entropy(w, torch.tensor(3), reduction="sum", z_loss=1e-4))
P.cross_entropy(w, 3)  # wrong
tensor(P.linear_cross_entropy(x[0, 0], w[None], torch.zeros(4, dtype=torch.long), ignore_index=-1))
P.linear_cross_entropy(x, w, x, w)  # wrong
normed, summed = P.dropout_add_rms_norm(x, x, 8, w, p=0.1, training=False, weight_offset=1.0)
P.dropout_add_layer_norm(x, x, 8, w, w, 1e-5, 0.1)  # wrong
tensor(P.scaled_dot_product_attention(x, x, x, is_causal=True, window=(3, -1)))
tensor(P.scaled_dot_product_attention(x, x, x, window=3))  # wrong
out, lse = P.scaled_dot_product_attention(x, x, x, return_lse=True)
tensor(lse)
tensor(P.scaled_dot_product_attention(x, x, x, return_lse=True))  # wrong
tensor(P.mlp(x, w, None, w, None, activation="gelu"))
tensor(P.mlp(x, w, None, w, None, "gelu", "all"))  # wrong
tensor(P.mlp(x, nn.fuse_gate(w, w), None, w, None, "swiglu", save="input"))
tensor(nn.split_gate(w))  # wrong
tensor(P.linear(P.gelu(P.relu(x), approximate="tanh"), w))
P.gelu(x).nonsense()  # wrong
tensor(nn.LayerNorm(8)(x))
normed, summed = nn.LayerNorm(8).forward(x, x)
nn.MLP(8, dropout="none")  # wrong
nn.CausalSelfAttention(8, 2, num_kv_heads=1, dtype=torch.float64)
with pygpt.backend("torch"):
    tensor(P.relu(x))
with pygpt.backend(1):  # wrong
    pass
with pygpt.enable("linear", "gelu"):
    pygpt.disable("gelu")
pygpt.enable(["linear"])  # wrong
choice: str | None = pygpt.explain(P.relu, x).backend
pygpt.explain("relu", x).reasons  # wrong
gpt = pygpt.GPT(pygpt.GPTConfig(vocab_size=65, n_layer=1), device="cpu")
tensor(gpt.generate(torch.zeros(1, 1, dtype=torch.long), 3, top_k=5))
gpt.generate("ROMEO:", 3)  # wrong
share: float = pygpt.report(gpt, torch.zeros(1, 1, dtype=torch.long)).served
pygpt.report(gpt).kernels  # wrong
pygpt.audit(gpt, x, reference=gpt, targets=x).plot("audit.svg")
pygpt.audit(gpt, x, reference="gpt")  # wrong
gpt(torch.zeros(1, 1, dtype=torch.long), return_logits=False)
nn.CrossEntropyLoss(z_loss=1e-4)(w, w)
nn.LinearCrossEntropyLoss(8, num_classes="65")  # wrong
pygpt.GPTConfig(n_heads=3)  # wrong
pygpt.autograd.LayerNorm.apply(x)
"""


def test_mypy_on_the_package_and_on_a_program(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "pygpt", str(program)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    errors = re.findall(r"^(.+?):(\d+): error: ", done.stdout, re.MULTILINE)
    in_package = [file for file, _ in errors if Path(file).name != program.name]
    assert not in_package and not done.stderr, done.stdout + done.stderr
    wrong = {number for number, line in enumerate(PROGRAM.split("\n"), 1) if line.endswith("# wrong")}
    assert {int(line) for _, line in errors} == wrong, done.stdout


PUBLIC = {name: getattr(functional, name) for name in functional.__all__}
PUBLIC |= {"backend": pygpt.backend, "explain": pygpt.explain}
INSPECT = calls, layers, machine, plot, step
NN = attention, fusing, nn.layers, losses, mlp, rotary
MODULES = data, dispatch, files, generate, *INSPECT, model, *NN, progress, signals, train, train_log, verify
for module in MODULES:
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__ or name.startswith("_"):
            continue
        if inspect.isfunction(value):
            PUBLIC[f"{module.__name__}.{name}"] = value
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            public = inspect.isfunction(function) and function.__name__ != "<lambda>" and not method.startswith("_")
            if public or method == "__init__":
                PUBLIC[f"{module.__name__}.{name}.{method}"] = function


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_and_methods_are_annotated(name):
    signature = inspect.signature(PUBLIC[name])
    overloaded = "pygpt.nn.layers.LayerNorm.forward", "pygpt.nn.layers.RMSNorm.forward"
    inferred = name.endswith(".__init__") or name in overloaded
    assert signature.return_annotation is not inspect.Signature.empty or inferred
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty or parameter.name == "self", parameter


def test_the_marker_is_installed():
    assert (ROOT / "pygpt" / "py.typed").read_bytes() == b""
    assert '"pygpt" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
