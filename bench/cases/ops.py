"""The ops and their shapes. An op has a set-up function: inputs, our call, the same in plain PyTorch, and the work."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as TF

from pygpt import functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = ("forward", "backward")
ACTIVATIONS = {
    "gelu": TF.gelu,
    "gelu_tanh": lambda x: TF.gelu(x, approximate="tanh"),
    "relu": TF.relu,
    "relu2": lambda x: TF.relu(x).square(),
}


@dataclass(frozen=True)
class Work:
    """One op on one set of inputs."""

    ours: Callable  # ours(*tensors) -> a tensor or a tuple of them
    eager: Callable  # the same in plain PyTorch
    tensors: tuple
    amount: tuple[float, float]  # forward, backward: FLOPs, or elements read and written
    bound: str = "compute"  # or "memory"

    def amount_of(self, direction: str) -> float:
        """FLOPs of a call where compute bounds it, else bytes."""
        size = self.tensors[0].element_size() if self.bound == "memory" else 1
        return self.amount[direction == "backward"] * size


@dataclass(frozen=True)
class Case:
    """An op on one shape."""

    setup: Callable  # a function below
    args: tuple  # its arguments after `make`
    shape: str
    standard: tuple = ()  # the dtypes in which it is a standard row, which --check judges

    @property
    def op(self) -> str:
        return self.setup.__name__

    @property
    def dims(self) -> dict:
        return dict(zip(dimensions(self.setup), self.args, strict=True))


def dimensions(setup: Callable) -> tuple[str, ...]:
    """The names of a set-up function's arguments after `make`."""
    return tuple(inspect.signature(setup).parameters)[1:]


def case(setup: Callable, *args, standard: tuple = ()) -> Case:
    """A Case whose shape has its standard name."""
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


# ------------------------------------------------------------------------------- set-up functions, one per op
def attention(make, B, H, L, S, D, causal):
    """4 B H L S D FLOPs (two GEMMs), if causal only those below the diagonal; backward 2.5 times (five GEMMs)."""
    pairs = L * S if not causal else sum(min(i + 1, S) for i in range(L))
    flops = 4 * B * H * pairs * D
    call = lambda f: lambda q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return Work(call(F), call(TF), (make(B, H, L, D), make(B, H, S, D), make(B, H, S, D)), (flops, 2.5 * flops))


def linear(make, M, K, N):
    """2 M N K FLOPs; backward has two such GEMMs."""
    flops = 2 * M * N * K
    return Work(F.linear, TF.linear, (make(M, K), make(N, K) * K**-0.5, make(N)), (flops, 2 * flops))


def mlp(make, B, T, C, activation):
    """C -> 4C -> C: two GEMMs, backward four. The activation is not counted."""
    H, act = 4 * C, ACTIVATIONS[activation]
    flops = 2 * 2 * B * T * C * H
    tensors = make(B, T, C), make(H, C) * C**-0.5, make(H), make(C, H) * H**-0.5, make(C)

    def ours(x, fc_weight, fc_bias, proj_weight, proj_bias):
        return F.mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, activation)

    def eager(x, fc_weight, fc_bias, proj_weight, proj_bias):
        return TF.linear(act(TF.linear(x, fc_weight, fc_bias)), proj_weight, proj_bias)

    return Work(ours, eager, tensors, (flops, 2 * flops))


def layer_norm(make, N, C):
    """Forward moves x and y; backward moves dy, x and dx."""
    call = lambda f: lambda x, weight, bias: f.layer_norm(x, (C,), weight, bias)
    return Work(call(F), call(TF), (make(N, C), make(C), make(C)), (2 * N * C, 3 * N * C), "memory")


def add_layer_norm(make, N, C):
    """Forward moves x, residual, y and sum; backward moves dy, dsum, sum and the one gradient of both."""

    def ours(x, residual, weight, bias):
        return F.add_layer_norm(x, residual, (C,), weight, bias)

    def eager(x, residual, weight, bias):
        s = x + residual
        return TF.layer_norm(s, (C,), weight, bias), s

    return Work(ours, eager, (make(N, C), make(N, C), make(C), make(C)), (4 * N * C, 4 * N * C), "memory")


def rms_norm(make, N, C):
    """Moves what layer_norm does."""
    call = lambda f: lambda x, weight: f.rms_norm(x, (C,), weight)
    return Work(call(F), call(TF), (make(N, C), make(C)), (2 * N * C, 3 * N * C), "memory")


def gelu(make, N, C, approximate):
    """Forward moves x and y; backward moves dy, x and dx."""
    call = lambda f: lambda x: f.gelu(x, approximate=approximate)
    return Work(call(F), call(TF), (make(N, C),), (2 * N * C, 3 * N * C), "memory")


def relu(make, N, C):
    """Forward moves x and y; backward moves dy, y and dx."""
    return Work(F.relu, TF.relu, (make(N, C),), (2 * N * C, 3 * N * C), "memory")


# ------------------------------------------------------------------------------- the shapes to time
ALL, FLOAT32 = tuple(DTYPES), ("float32",)
CPU = [
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
        case(norm, rows, columns, standard=standard)
        for norm in (layer_norm, add_layer_norm, rms_norm)
        for rows, columns, standard in ((8192, 768, ALL), (8, 64, ()), (1023, 771, ()))
    ),
    case(gelu, 4096, 3072, "none", standard=ALL),
    case(gelu, 4096, 3072, "tanh", standard=ALL),
    case(gelu, 8, 64, "none"),
    case(relu, 4096, 3072, standard=ALL),
    case(relu, 1001, 333),
]
OPS = tuple(dict.fromkeys(case.op for case in CPU))

TOKENS, BFLOAT16 = 16384, ("bfloat16",)
GPU = [  # the most important first: a run that has no time left omits the rest
    case(attention, 16, 12, 1024, 1024, 64, True, standard=BFLOAT16),
    case(mlp, 16, 1024, 768, "gelu_tanh", standard=BFLOAT16),
    case(layer_norm, TOKENS, 768, standard=BFLOAT16),
    case(attention, 2, 32, 8192, 8192, 128, True, standard=BFLOAT16),
    case(mlp, 16, 1024, 1600, "gelu_tanh", standard=BFLOAT16),
    case(linear, TOKENS, 768, 3072),
    case(attention, 16, 25, 1024, 1024, 64, True, standard=BFLOAT16),
    case(add_layer_norm, TOKENS, 768),
    case(layer_norm, TOKENS, 4096, standard=BFLOAT16),
    case(mlp, 16, 1024, 4096, "gelu_tanh", standard=BFLOAT16),
    case(rms_norm, TOKENS, 768, standard=BFLOAT16),
    case(gelu, TOKENS, 3072, "tanh"),
    case(attention, 16, 12, 1024, 1024, 64, False),
    case(linear, TOKENS, 1600, 6400),
    case(layer_norm, TOKENS, 1600, standard=BFLOAT16),
    case(attention, 2, 32, 8192, 8192, 128, False),
    case(linear, TOKENS, 4096, 16384),
    case(add_layer_norm, TOKENS, 1600),
    case(add_layer_norm, TOKENS, 4096),
    case(attention, 1, 32, 16384, 16384, 128, True),
    case(rms_norm, TOKENS, 1600, standard=BFLOAT16),
    case(rms_norm, TOKENS, 4096, standard=BFLOAT16),
    case(gelu, TOKENS, 3072, "none"),
    case(relu, TOKENS, 3072),
]
PREDICTED = tuple(GPU[i] for i in (0, 1, 2, 3, 8, 9))  # the shapes that goals.py has expectations of
