"""What pygpt is measured against: for each library, a small adapter per op, or the reason why there is none.

An adapter takes (work, dims) and returns a function of the op's tensors that PyTorch can differentiate. It raises
Refused where the library cannot serve the shape. What the function returns is held against PyTorch's result before it
is timed (timing/check.py).
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as TF
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..timing.memory import available
from . import compilers
from .refusal import Refused


@dataclass(frozen=True)
class Peer:
    """A library. ``ops`` has an adapter per op, or one under "*" for all."""

    ops: dict[str, Callable]
    module: str = ""  # what to import; empty: it comes with PyTorch
    package: str = ""  # what to install
    devices: tuple[str, ...] = ("cpu", "cuda")
    directions: tuple[str, ...] = ("forward", "backward")
    slow: bool = False  # takes long for every shape or doubles the memory, so that it is used only where it is named
    program: str = ""  # a compiler that it needs for the CPU
    convert: Callable = field(default=lambda tensors: tensors)  # from PyTorch's tensors to the library's
    export: Callable = field(default=lambda result: result)  # and back

    def absent(self, device: str) -> str:
        """Says why it cannot be used here; empty if it can."""
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


# ------------------------------------------------------------------------------- attention
def _sdpa(name):
    """PyTorch's attention with one of its backends forced."""

    def adapt(work, dims):
        B, H, L, S = (dims[key] for key in "BHLS")
        memory, needed = available(work.tensors[0].device.type), 8 * 4 * B * H * L * S
        if name == "MATH" and memory is not None and needed > memory:
            raise Refused(f"would need some {needed / 1e9:.0f} GB for copies of the scores, of {memory / 1e9:.0f} GB")

        def call(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, name)):
                return TF.scaled_dot_product_attention(q, k, v, is_causal=dims["causal"])

        return call

    return adapt


def _heads_inside(make):
    """The adapter of a library whose attention takes and returns (B, T, H, D); ``make``(dims) returns its function."""

    def adapt(work, dims):
        attention = make(dims)
        return lambda q, k, v: attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    return adapt


def _flash_attention(module):
    def make(dims):
        if dims["causal"] and dims["L"] != dims["S"]:
            raise Refused("its causal mask is aligned to the bottom right")
        function = import_module(module).flash_attn_func

        def attention(q, k, v):
            result = function(q, k, v, causal=dims["causal"])
            return result[0] if isinstance(result, tuple) else result  # some versions return lse too

        return attention

    return _heads_inside(make)


def _xformers_attention(dims):
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if dims["causal"] and dims["L"] != dims["S"]:
        raise Refused("its causal mask wants equal lengths")
    return partial(memory_efficient_attention, attn_bias=LowerTriangularMask() if dims["causal"] else None)


def _te_attention(dims):
    import transformer_engine.pytorch as te

    mask, heads = "causal" if dims["causal"] else "no_mask", (dims["H"], dims["E"])
    module = te.DotProductAttention(*heads, attn_mask_type=mask, qkv_format="bshd", attention_dropout=0.0)
    return lambda q, k, v: module(q, k, v).unflatten(-1, heads)


# ------------------------------------------------------------------------------- other ops, on PyTorch tensors
def _function(module, name, call):
    """The adapter of a library's function: ``call``(function, *tensors)."""
    return lambda work, dims: partial(call, getattr(import_module(module), name))


def _te_module(build, names):
    """A Transformer Engine module, called with our tensors as its parameters ``names``."""

    def adapt(work, dims):
        import transformer_engine.pytorch as te

        x = work.tensors[0]
        module = build(te, dims, x).to(device=x.device, dtype=x.dtype)
        return lambda x, *weights: torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    return adapt


def _quack_layer_norm(work, dims):
    from quack.rmsnorm import layernorm_fwd

    weight, bias = (t.float() for t in work.tensors[1:])  # it takes them in float32 only
    return lambda x, *_: layernorm_fwd(x, weight, bias, eps=1e-5)


def _apex_mlp(work, dims):
    from apex.fused_dense.fused_dense import fused_dense_gelu_dense_function

    if dims["activation"] != "gelu_tanh":
        raise Refused("its only activation is gelu_tanh")
    return lambda x, *weights: fused_dense_gelu_dense_function(x.flatten(0, -2), *weights).view_as(x)


def _eps(x):
    return torch.finfo(x.dtype).eps  # what torch.nn.functional.rms_norm takes by default


LIGER, APEX = "liger_kernel.transformers.functional", "apex.normalization.fused_layer_norm"
FLASH_NORM = "flash_attn.ops.triton.layer_norm"


# ------------------------------------------------------------------------------- the table
CPU, GPU, FORWARD = ("cpu",), ("cuda",), ("forward",)
PEERS = {
    "eager": Peer({"*": lambda work, dims: work.eager}),
    "compile": Peer({"*": compilers.with_inductor}, program=os.environ.get("CXX", "g++"), slow=True),
    "eager-default": Peer({}, devices=CPU, slow=True),  # eager in a process of its own (timing/processes.py)
    "sdpa-flash": Peer({"attention": _sdpa("FLASH_ATTENTION")}),
    "sdpa-math": Peer({"attention": _sdpa("MATH")}),
    "sdpa-efficient": Peer({"attention": _sdpa("EFFICIENT_ATTENTION")}, devices=GPU),
    "sdpa-cudnn": Peer({"attention": _sdpa("CUDNN_ATTENTION")}, devices=GPU),
    "liger": Peer(
        {
            "layer_norm": _function(LIGER, "liger_layer_norm", lambda f, x, w, b: f(x, w, b, 1e-5)),
            # in place, dy could not be used again
            "rms_norm": _function(LIGER, "liger_rms_norm", lambda f, x, w: f(x, w, _eps(x), in_place=False)),
            "add_rms_norm": _function(
                LIGER, "liger_fused_add_rms_norm", lambda f, x, r, w: f(x, r, w, _eps(x), in_place=False)
            ),
        },
        "liger_kernel", "liger-kernel", GPU,
    ),
    "flash-attn": Peer(
        {
            "attention": _flash_attention("flash_attn"),
            "layer_norm": _function(FLASH_NORM, "layer_norm_fn", lambda f, x, w, b: f(x, w, b, eps=1e-5)),
            "add_layer_norm": _function(
                FLASH_NORM, "layer_norm_fn", lambda f, x, r, w, b: f(x, w, b, residual=r, prenorm=True, eps=1e-5)
            ),
            "rms_norm": _function(FLASH_NORM, "rms_norm_fn", lambda f, x, w: f(x, w, None, eps=_eps(x))),
            "add_rms_norm": _function(
                FLASH_NORM, "rms_norm_fn", lambda f, x, r, w: f(x, w, None, residual=r, prenorm=True, eps=_eps(x))
            ),
        },
        "flash_attn", "flash-attn", GPU,
    ),
    "flash-attn-4": Peer({"attention": _flash_attention("flash_attn.cute")}, "flash_attn.cute", "flash-attn-4", GPU),
    "quack": Peer(
        {
            "layer_norm": _quack_layer_norm,
            "rms_norm": _function("quack.rmsnorm", "rmsnorm", lambda f, x, w: f(x, w, eps=_eps(x))),
            "add_rms_norm": _function(
                "quack.rmsnorm", "rmsnorm", lambda f, x, r, w: f(x, w, residual=r, prenorm=True, eps=_eps(x))
            ),
        },
        "quack", "quack-kernels", GPU,
    ),
    "xformers": Peer({"attention": _heads_inside(_xformers_attention)}, "xformers", "xformers", GPU),
    "transformer-engine": Peer(
        {
            "attention": _heads_inside(_te_attention),
            "linear": _te_module(lambda te, d, x: te.Linear(d["K"], d["N"]), ("weight", "bias")),
            "layer_norm": _te_module(lambda te, d, x: te.LayerNorm(d["N"], eps=1e-5), ("weight", "bias")),
            "rms_norm": _te_module(lambda te, d, x: te.RMSNorm(d["N"], eps=_eps(x)), ("weight",)),
        },
        "transformer_engine.pytorch", "transformer-engine", GPU,
    ),
    "apex": Peer(
        {
            "layer_norm": _function(
                APEX, "fused_layer_norm_affine", lambda f, x, w, b: f(x, w, b, tuple(w.shape), 1e-5)
            ),
            "rms_norm": _function(APEX, "fused_rms_norm_affine", lambda f, x, w: f(x, w, tuple(w.shape), _eps(x))),
            "mlp": _apex_mlp,
        },
        "apex.normalization", "NVIDIA's apex", GPU,
    ),
    "zentorch": Peer(
        {"*": compilers.with_zentorch}, "zentorch", "zentorch", CPU, FORWARD, slow=True,
        program=os.environ.get("CXX", "g++"),
        convert=lambda tensors: tuple(t.clone() for t in tensors),  # it packs weights in place (docs/measured.md B9)
    ),
    "openvino": Peer(
        {"*": compilers.with_openvino}, "openvino", "openvino", CPU, FORWARD,
        convert=compilers.to_numpy, export=compilers.from_numpy,
    ),
    "onnxruntime": Peer(
        dict.fromkeys(compilers.ONNX, compilers.with_onnxruntime), "onnxruntime", "onnxruntime", CPU, FORWARD,
        convert=compilers.to_numpy, export=compilers.from_numpy,
    ),
    "jax": Peer(
        {op: partial(compilers.with_jax, op) for op in compilers.EXPRESSIONS},
        "jax", "jax", CPU, FORWARD,
        convert=compilers.to_jax, export=compilers.from_jax,
    ),
    "tinygrad": Peer(
        {op: partial(compilers.with_tinygrad, op) for op in compilers.EXPRESSIONS},
        "tinygrad", "tinygrad", directions=FORWARD, slow=True, program=os.environ.get("CC", "clang"),
        convert=compilers.to_tinygrad, export=compilers.from_tinygrad,
    ),
}  # fmt: skip


def chosen(names: list[str] | None, device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers to use, and why each other one is not used.

    ``names``: those requested. None, or "default" among them: all that compile quickly.
    """
    used, absent = {}, {}
    for name, peer in PEERS.items():
        named = name in (names or ())
        if not named and names is not None and "default" not in names:
            continue
        why = peer.absent(device)
        if not why and peer.slow and not named:
            why = f"is used only where it is named (--peers {name},... or --peers all)"
        if why:
            absent[name] = why
        else:
            used[name] = peer
    return used, absent
