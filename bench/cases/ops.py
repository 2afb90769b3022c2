"""What is measured of every op: the shapes, our call, the same in plain PyTorch, and the work in it.

One set-up function per op gives its inputs, both calls, and the FLOPs or the elements moved. CASES are
the shapes; those marked standard are held to the first bar (see README.md).
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as TF

from pygpt import functional as F

from ..timing.clocks import Work

ACTIVATIONS = {
    "gelu": TF.gelu,
    "gelu_tanh": lambda x: TF.gelu(x, approximate="tanh"),
    "relu": TF.relu,
    "relu2": lambda x: TF.relu(x).square(),
}


# ------------------------------------------------------------------------------- set-up, one per op
def attention(make, B, H, L, S, D, causal):
    """4 B H L S D FLOPs (two GEMMs), only what lies below the diagonal if causal; backward 2.5 times (five)."""
    pairs = L * S if not causal else sum(min(i + 1, S) for i in range(L))
    flops = 4 * B * H * pairs * D

    def ours(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def eager(q, k, v):
        return TF.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Work(ours, eager, (make(B, H, L, D), make(B, H, S, D), make(B, H, S, D)), (flops, 2.5 * flops))


def linear(make, M, K, N):
    """2 M N K; backward two such GEMMs."""
    flops = 2 * M * N * K
    return Work(F.linear, TF.linear, (make(M, K), make(N, K) * K**-0.5, make(N)), (flops, 2 * flops))


def mlp(make, B, T, C, activation):
    """C -> 4C -> C: two GEMMs; backward four. The activation counts nothing."""
    H, act = 4 * C, ACTIVATIONS[activation]
    flops = 2 * 2 * B * T * C * H
    tensors = make(B, T, C), make(H, C) * C**-0.5, make(H), make(C, H) * H**-0.5, make(C)

    def ours(x, fc_weight, fc_bias, proj_weight, proj_bias):
        return F.mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, activation)

    def eager(x, fc_weight, fc_bias, proj_weight, proj_bias):
        return TF.linear(act(TF.linear(x, fc_weight, fc_bias)), proj_weight, proj_bias)

    return Work(ours, eager, tensors, (flops, 2 * flops))


def layer_norm(make, N, C):
    """x, y; backward dy, x, dx."""

    def ours(x, weight, bias):
        return F.layer_norm(x, (C,), weight, bias)

    def eager(x, weight, bias):
        return TF.layer_norm(x, (C,), weight, bias)

    return Work(ours, eager, (make(N, C), make(C), make(C)), (2 * N * C, 3 * N * C), "memory")


def add_layer_norm(make, N, C):
    """x, residual, y, sum; backward dy, dsum, sum and the one gradient of both."""

    def ours(x, residual, weight, bias):
        return F.add_layer_norm(x, residual, (C,), weight, bias)

    def eager(x, residual, weight, bias):
        s = x + residual
        return TF.layer_norm(s, (C,), weight, bias), s

    return Work(ours, eager, (make(N, C), make(N, C), make(C), make(C)), (4 * N * C, 4 * N * C), "memory")


def rms_norm(make, N, C):
    """As layer_norm."""

    def ours(x, weight):
        return F.rms_norm(x, (C,), weight)

    def eager(x, weight):
        return TF.rms_norm(x, (C,), weight)

    return Work(ours, eager, (make(N, C), make(C)), (2 * N * C, 3 * N * C), "memory")


def gelu(make, N, C, approximate):
    """x, y; backward dy, x, dx."""

    def ours(x):
        return F.gelu(x, approximate)

    def eager(x):
        return TF.gelu(x, approximate=approximate)

    return Work(ours, eager, (make(N, C),), (2 * N * C, 3 * N * C), "memory")


def relu(make, N, C):
    """x, y; backward dy, y, dx."""
    return Work(F.relu, TF.relu, (make(N, C),), (2 * N * C, 3 * N * C), "memory")


# ------------------------------------------------------------------------------- the shapes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    setup: object  # a function above
    args: tuple  # after ``make``
    shape: str
    standard: tuple = ()  # the dtypes in which it is a standard row

    @property
    def op(self):
        return self.setup.__name__

    @property
    def dims(self) -> dict:
        return dict(zip(dimensions(self.setup), self.args, strict=True))


def dimensions(setup) -> tuple[str, ...]:
    """The names of a set-up function's arguments after ``make``."""
    return tuple(inspect.signature(setup).parameters)[1:]


def case(setup, *args, standard: tuple = ()) -> Case:
    """A Case under the name its shape has everywhere."""
    d = dict(zip(dimensions(setup), args, strict=True))
    match setup.__name__:
        case "attention":
            length = f"T{d['L']}" if d["L"] == d["S"] else f"L{d['L']} S{d['S']}"
            shape = f"B{d['B']} H{d['H']} {length} D{d['D']} {'causal' if d['causal'] else 'full'}"
        case "linear":
            shape = f"{d['M']} x {d['K']} -> {d['N']}"
        case "mlp":
            shape = f"B{d['B']} T{d['T']} C{d['C']} {d['activation']}"
        case _:
            shape = f"{d['N']} x {d['C']}" + {"none": " erf", "tanh": " tanh"}.get(d.get("approximate"), "")
    return Case(setup, args, shape, standard)


ALL, FLOAT32 = tuple(DTYPES), ("float32",)
CASES = [
    case(attention, 1, 12, 1024, 1024, 64, True, standard=ALL),
    case(attention, 1, 12, 1024, 1024, 64, False, standard=ALL),
    case(attention, 1, 12, 4096, 4096, 64, True, standard=FLOAT32),
    case(attention, 1, 12, 2048, 2048, 128, False, standard=FLOAT32),
    case(attention, 1, 12, 64, 64, 64, True),
    case(attention, 1, 12, 1, 1024, 64, False),
    case(attention, 2, 3, 77, 133, 40, False),
    case(linear, 4096, 768, 3072, standard=ALL),
    case(linear, 4096, 3072, 768, standard=ALL),
    case(linear, 8, 768, 3072),
    case(linear, 1001, 333, 517),
    case(mlp, 8, 512, 768, "gelu_tanh", standard=ALL),
    case(mlp, 8, 512, 768, "gelu", standard=FLOAT32),
    case(mlp, 8, 512, 768, "relu", standard=FLOAT32),
    case(mlp, 8, 512, 768, "relu2"),
    case(mlp, 1, 8, 384, "gelu_tanh"),
    *(
        case(norm, rows, cols, standard=standard)
        for norm in (layer_norm, add_layer_norm, rms_norm)
        for rows, cols, standard in ((8192, 768, ALL), (8, 64, ()), (1023, 771, ()))
    ),
    case(gelu, 4096, 3072, "none", standard=ALL),
    case(gelu, 4096, 3072, "tanh", standard=ALL),
    case(gelu, 8, 64, "none"),
    case(relu, 4096, 3072, standard=ALL),
    case(relu, 1001, 333),
]
OPS = tuple(dict.fromkeys(case.op for case in CASES))
SWEEP = [256 << i for i in range(7)]  # sequence lengths


def sweep(longest: int) -> list[Case]:
    """Causal attention at growing length: how time and memory grow."""
    return [case(attention, 1, 12, T, T, 64, True) for T in SWEEP if T <= longest]


def custom(text: str, ops) -> list[Case]:
    """``B=1,H=12,T=512,D=64`` for every op in ``ops`` that has these dimensions; the others come from its first case.

    T is L and S of attention. ValueError says what is wrong.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if bad := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise ValueError(f"wants KEY=VALUE,..., got {bad[0] or text!r}")
    given = {key: value for key, _, value in pairs}
    found = []
    for first in {case.op: case for case in reversed(CASES) if case.op in ops}.values():
        wanted = dict(given)
        if first.op == "attention" and "T" in wanted:
            length = wanted.pop("T")
            wanted = {"L": length, "S": length} | wanted
        if set(wanted) <= set(first.dims):
            dims = first.dims | {key: _value(key, value, first.dims[key]) for key, value in wanted.items()}
            found.append(case(first.setup, *dims.values()))
    if not found:
        known = "; ".join(f"{s.__name__}: {', '.join(dimensions(s))}" for s in SETUPS if s.__name__ in ops)
        raise ValueError(f"no op has the dimensions {', '.join(given)}; they are {known}")
    return found[::-1]


SETUPS = tuple(dict.fromkeys(case.setup for case in CASES))
WORDS = {"activation": tuple(ACTIVATIONS), "approximate": ("none", "tanh"), "causal": ("0", "1")}


def _value(key: str, text: str, default):
    """One value of a custom shape, read as what ``default`` is."""
    if key in WORDS:
        if text not in WORDS[key]:
            raise ValueError(f"{key} must be one of {', '.join(WORDS[key])}; got {text!r}")
        return text == "1" if isinstance(default, bool) else text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{key} must be a positive integer, got {text!r}")
    return int(text)
