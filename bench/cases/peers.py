"""What pygpt is measured against: for each library, a small adapter per op, or why there is none.

An adapter takes (work, dims) and returns a function of the op's tensors that PyTorch can differentiate.
It raises gpu_rows.Refused where the library cannot serve the shape. Whatever an adapter returns is held
against PyTorch's result before it is timed (candidates.py), so a wrong one cannot look fast.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from pygpt import verify

from ..timing.memory import available
from . import gpu as gpu_rows
from .gpu import Group, Refused


@dataclass(frozen=True)
class Peer:
    """One library. ``ops`` holds an adapter per op, or one under "*" for all."""

    ops: dict[str, Callable]
    module: str = ""  # to be found by import; empty: comes with PyTorch
    package: str = ""  # what to install
    devices: tuple[str, ...] = ("cpu", "cuda")
    directions: tuple[str, ...] = ("forward", "backward")
    slow: bool = False  # compiles for every shape: used only where it is named
    program: str = ""  # that it needs for the CPU
    convert: Callable = field(default=lambda tensors: tensors)  # PyTorch's tensors -> the library's
    export: Callable = field(default=lambda result: result)  # and back

    def absent(self, device: str) -> str:
        """Why it cannot be used here; empty if it can."""
        if self.module and not _importable(self.module):
            return f"{self.package} is not installed"
        if device not in self.devices:
            return f"serves {' and '.join(self.devices)} tensors only"
        if device == "cpu" and self.program and not shutil.which(self.program):
            return f"{self.program}, with which it compiles, is not installed"
        return ""

    def serves(self, op: str) -> bool:
        return op in self.ops or "*" in self.ops

    def function(self, op: str, direction: str, work, dims: dict) -> Callable:
        if direction not in self.directions:
            raise Refused(f"its {direction} cannot be run apart from its forward")
        return (self.ops.get(op) or self.ops["*"])(work, dims)


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is missing, or something else has its name
        return False


# ------------------------------------------------------------------------------- PyTorch
def _sdpa(name):
    def adapt(work, dims):
        B, H, L, S = (dims[key] for key in "BHLS")
        here = available() if work.tensors[0].device.type == "cpu" else None
        if name == "math" and here is not None and (need := 8 * 4 * B * H * L * S) > here:
            raise Refused(f"would need some {need / 1e9:.0f} GB for copies of the scores, of {here / 1e9:.0f} GB")
        return gpu_rows.sdpa(name, Group(gpu_rows.Case(None, tuple(dims.values()), ""), ""))

    return adapt


# ------------------------------------------------------------------------------- other libraries, on PyTorch tensors
def _eps(x):
    return torch.finfo(x.dtype).eps  # what torch.nn.functional.rms_norm takes by default


def _liger_layer_norm(work, dims):
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, weight, bias: liger_layer_norm(x, weight, bias, 1e-5)


def _liger_rms_norm(work, dims):
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda x, weight: liger_rms_norm(x, weight, _eps(x), in_place=False)  # in place, dy could not be used again


def _heads_inside(attention):
    """(B, H, T, D) as the view (B, T, H, D) that ``attention`` wants, and back."""
    return lambda q, k, v: attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _flash_attention(work, dims):
    from flash_attn import flash_attn_func

    if dims["causal"] and dims["L"] != dims["S"]:
        raise Refused("its causal mask is aligned to the bottom right")
    return _heads_inside(lambda q, k, v: flash_attn_func(q, k, v, causal=dims["causal"]))


def _flash_norm(op):
    def adapt(work, dims):
        from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

        return {
            "layer_norm": lambda x, weight, bias: layer_norm_fn(x, weight, bias, eps=1e-5),
            "add_layer_norm": lambda x, r, weight, bias: layer_norm_fn(
                x, weight, bias, residual=r, prenorm=True, eps=1e-5
            ),
            "rms_norm": lambda x, weight: rms_norm_fn(x, weight, None, eps=_eps(x)),
        }[op]

    return adapt


def _xformers_attention(work, dims):
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if dims["causal"] and dims["L"] != dims["S"]:
        raise Refused("its causal mask wants equal lengths")
    bias = LowerTriangularMask() if dims["causal"] else None
    return _heads_inside(lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias))


def _te_module(build, names):
    """A Transformer Engine module, called with our tensors as its parameters ``names``."""

    def adapt(work, dims):
        import transformer_engine.pytorch as te

        x = work.tensors[0]
        module = build(te, dims, x).to(device=x.device, dtype=x.dtype)
        return lambda x, *weights: torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    return adapt


def _te_attention(work, dims):
    import transformer_engine.pytorch as te

    mask = "causal" if dims["causal"] else "no_mask"
    module = te.DotProductAttention(dims["H"], dims["D"], attn_mask_type=mask, qkv_format="bshd", attention_dropout=0.0)
    heads = dims["H"], dims["D"]
    return _heads_inside(lambda q, k, v: module(q, k, v).unflatten(-1, heads))


def _apex_layer_norm(work, dims):
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, (dims["C"],), 1e-5)


def _apex_rms_norm(work, dims):
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return lambda x, weight: fused_rms_norm_affine(x, weight, (dims["C"],), _eps(x))


def _apex_mlp(work, dims):
    from apex.fused_dense.fused_dense import fused_dense_gelu_dense_function

    if dims["activation"] != "gelu_tanh":
        raise Refused("its only activation is gelu_tanh")
    B, T, C = dims["B"], dims["T"], dims["C"]

    def call(x, fc_weight, fc_bias, proj_weight, proj_bias):
        flat = x.view(B * T, C)
        return fused_dense_gelu_dense_function(flat, fc_weight, fc_bias, proj_weight, proj_bias).view(B, T, C)

    return call


# ------------------------------------------------------------------------------- tinygrad
def _tinygrad_tensors(tensors):
    from tinygrad import Device, Tensor

    if tensors[0].dtype == torch.bfloat16:
        raise Refused("NumPy, which carries the tensors over, has no bfloat16")
    return tuple(Tensor(t.cpu().numpy(), device=Device.DEFAULT).realize() for t in tensors)


def _tinygrad_export(result):
    found = [torch.from_numpy(t.numpy()) for t in verify.as_tuple(result)]
    return found[0] if len(found) == 1 else tuple(found)


def _tinygrad(expression):
    """``expression``(dims, *tensors), compiled at its second call and replayed from the third."""

    def adapt(work, dims):
        from tinygrad import Device, TinyJit

        @TinyJit
        def jitted(*tensors):
            result = expression(dims, *tensors)
            return tuple(t.realize() for t in result) if isinstance(result, tuple) else result.realize()

        for _ in range(2):
            jitted(*_tinygrad_tensors(work.tensors))

        def call(*tensors):
            result = jitted(*tensors)
            Device[Device.DEFAULT].synchronize()
            return result

        return call

    return adapt


def _tinygrad_gelu(x, approximate):
    return x.gelu() if approximate == "tanh" else 0.5 * x * (1 + (x / 2**0.5).erf())


def _tinygrad_mlp(dims, x, fc_weight, fc_bias, proj_weight, proj_bias):
    act = {
        "gelu": lambda h: _tinygrad_gelu(h, "none"),
        "gelu_tanh": lambda h: h.gelu(),
        "relu": lambda h: h.relu(),
        "relu2": lambda h: h.relu().square(),
    }[dims["activation"]]
    return act(x.linear(fc_weight.T, fc_bias)).linear(proj_weight.T, proj_bias)


TINYGRAD = {
    "attention": lambda dims, q, k, v: q.scaled_dot_product_attention(k, v, is_causal=dims["causal"]),
    "linear": lambda dims, x, weight, bias: x.linear(weight.T, bias),
    "mlp": _tinygrad_mlp,
    "layer_norm": lambda dims, x, weight, bias: x.layernorm(eps=1e-5) * weight + bias,
    "add_layer_norm": lambda dims, x, r, weight, bias: ((x + r).layernorm(eps=1e-5) * weight + bias, x + r),
    "rms_norm": lambda dims, x, weight: x * (x.square().mean(-1, keepdim=True) + 2**-23).rsqrt() * weight,
    "gelu": lambda dims, x: _tinygrad_gelu(x, dims["approximate"]),
    "relu": lambda dims, x: x.relu(),
}


# ------------------------------------------------------------------------------- the table
GPU = ("cuda",)
PEERS = {
    "eager": Peer({"*": lambda work, dims: work.eager}),
    "compile": Peer({"*": lambda work, dims: gpu_rows.compiled(work)}, program=os.environ.get("CXX", "g++"), slow=True),
    **{f"sdpa-{name}": Peer({"attention": _sdpa(name)}) for name in ("flash", "math")},
    **{f"sdpa-{name}": Peer({"attention": _sdpa(name)}, devices=GPU) for name in ("efficient", "cudnn")},
    "liger": Peer(
        {"layer_norm": _liger_layer_norm, "rms_norm": _liger_rms_norm}, "liger_kernel", "liger-kernel", GPU
    ),
    "flash-attn": Peer(
        {"attention": _flash_attention} | {op: _flash_norm(op) for op in ("layer_norm", "add_layer_norm", "rms_norm")},
        "flash_attn", "flash-attn", GPU,
    ),
    "xformers": Peer({"attention": _xformers_attention}, "xformers", "xformers", GPU),
    "transformer-engine": Peer(
        {
            "attention": _te_attention,
            "linear": _te_module(lambda te, d, x: te.Linear(d["K"], d["N"]), ("weight", "bias")),
            "layer_norm": _te_module(lambda te, d, x: te.LayerNorm(d["C"], eps=1e-5), ("weight", "bias")),
            "rms_norm": _te_module(lambda te, d, x: te.RMSNorm(d["C"], eps=_eps(x)), ("weight",)),
        },
        "transformer_engine.pytorch", "transformer-engine", GPU,
    ),
    "apex": Peer(
        {"layer_norm": _apex_layer_norm, "rms_norm": _apex_rms_norm, "mlp": _apex_mlp},
        "apex.normalization", "NVIDIA's apex", GPU,
    ),
    "tinygrad": Peer(
        {op: _tinygrad(expression) for op, expression in TINYGRAD.items()}, "tinygrad", "tinygrad",
        directions=("forward",), slow=True, program=os.environ.get("CC", "clang"),
        convert=_tinygrad_tensors, export=_tinygrad_export,
    ),
}  # fmt: skip


def chosen(names: list[str] | None, device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers to use, and why each other one is not. ``names``: those asked for; None: all that are quick."""
    used, absent = {}, {}
    for name, peer in PEERS.items():
        if names is not None and name not in names:
            continue
        why = peer.absent(device)
        if not why and names is None and peer.slow:
            why = f"compiles for every shape; ask for it by name (--peers {name},... or --peers all)"
        if why:
            absent[name] = why
        else:
            used[name] = peer
    return used, absent
