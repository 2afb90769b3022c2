"""Every op, forward and backward, beside PyTorch eager: `python -m bench`, or `pytest bench/ops.py`.

One set-up function per op gives its inputs, our call, the same in plain PyTorch, and the FLOPs or the
elements moved. CASES are the rows; those marked standard are held to the first bar (see README.md).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as TF

from pygpt import functional as F

from . import harness
from .harness import Work

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


# ------------------------------------------------------------------------------- the rows
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


ALL, FLOAT32 = tuple(DTYPES), ("float32",)
CASES = [
    Case(attention, (1, 12, 1024, 1024, 64, True), "B1 H12 T1024 D64 causal", ALL),
    Case(attention, (1, 12, 1024, 1024, 64, False), "B1 H12 T1024 D64 full", ALL),
    Case(attention, (1, 12, 4096, 4096, 64, True), "B1 H12 T4096 D64 causal", FLOAT32),
    Case(attention, (1, 12, 2048, 2048, 128, False), "B1 H12 T2048 D128 full", FLOAT32),
    Case(attention, (1, 12, 64, 64, 64, True), "B1 H12 T64 D64 causal"),
    Case(attention, (1, 12, 1, 1024, 64, False), "B1 H12 L1 S1024 D64 full"),
    Case(attention, (2, 3, 77, 133, 40, False), "B2 H3 L77 S133 D40 full"),
    Case(linear, (4096, 768, 3072), "4096 x 768 -> 3072", ALL),
    Case(linear, (4096, 3072, 768), "4096 x 3072 -> 768", ALL),
    Case(linear, (8, 768, 3072), "8 x 768 -> 3072"),
    Case(linear, (1001, 333, 517), "1001 x 333 -> 517"),
    Case(mlp, (8, 512, 768, "gelu_tanh"), "B8 T512 C768 gelu_tanh", ALL),
    Case(mlp, (8, 512, 768, "gelu"), "B8 T512 C768 gelu", FLOAT32),
    Case(mlp, (8, 512, 768, "relu"), "B8 T512 C768 relu", FLOAT32),
    Case(mlp, (8, 512, 768, "relu2"), "B8 T512 C768 relu2"),
    Case(mlp, (1, 8, 384, "gelu_tanh"), "B1 T8 C384 gelu_tanh"),
    *(
        Case(norm, (rows, cols), f"{rows} x {cols}", standard)
        for norm in (layer_norm, add_layer_norm, rms_norm)
        for rows, cols, standard in ((8192, 768, ALL), (8, 64, ()), (1023, 771, ()))
    ),
    Case(gelu, (4096, 3072, "none"), "4096 x 3072 erf", ALL),
    Case(gelu, (4096, 3072, "tanh"), "4096 x 3072 tanh", ALL),
    Case(gelu, (8, 64, "none"), "8 x 64 erf"),
    Case(relu, (4096, 3072), "4096 x 3072", ALL),
    Case(relu, (1001, 333), "1001 x 333"),
]
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def rows(options):
    """(case, dtype, direction) of every row asked for."""
    for case in CASES:
        for dtype in options.dtypes:
            if case.op in options.ops and (dtype in case.standard or not options.only_standard):
                yield from ((case, dtype, direction) for direction in options.directions)


def pytest_generate_tests(metafunc):
    found = list(rows(metafunc.config.option))
    ids = ["-".join((case.op, case.shape.replace(" ", "_"), dtype, direction)) for case, dtype, direction in found]
    metafunc.parametrize("case, dtype, direction", found, ids=ids)


def test_op(case, dtype, direction, benchmark, peaks, keep, pytestconfig):
    def setup():
        return case.setup(lambda *shape: torch.randn(shape).to(DTYPES[dtype]), *case.args)

    row = harness.measure(benchmark, case.op, setup, direction, pytestconfig.option.seconds, peaks)
    keep(row, op=case.op, shape=case.shape, dtype=dtype, direction=direction, standard=dtype in case.standard)
