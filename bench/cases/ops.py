"""The ops and their shapes. An op has a set-up function: inputs, our call, the same in plain PyTorch, and the work."""

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as TF

from pygpt import functional as F
from pygpt.dispatch import new_seed
from pygpt.ops.common import lead
from pygpt.ops.dropout_norm import dropout_add_layer_norm_composite, dropout_add_rms_norm_composite
from pygpt.ops.qkv_attention import split_heads
from pygpt.ops.varlen_attn import unequal_lengths, varlen_attn_composite

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = ("forward", "backward")
ACTIVATIONS = {
    "gelu": TF.gelu,
    "gelu_tanh": lambda x: TF.gelu(x, approximate="tanh"),
    "relu": TF.relu,
    "relu2": lambda x: TF.relu(x).square(),
    "swiglu": lambda x: _swiglu(*x.chunk(2, -1)),
}


def _swiglu(gate, value):
    return TF.silu(gate) * value


@dataclass(frozen=True)
class Work:
    """One op on one set of inputs."""

    ours: Callable  # ours(*tensors) -> a tensor or a tuple of them
    eager: Callable  # the same in plain PyTorch
    tensors: tuple
    amount: tuple[float, float]  # forward, backward: FLOPs, or elements read and written
    bound: str = "compute"  # or "memory"
    same_bits: Callable | None = None  # where eager draws other random bits than ours: eager with ours', for the check

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
    """The names of a set-up function's arguments after `make`, which are those of `pygpt verify --shape`."""
    return tuple(inspect.signature(setup).parameters)[1:]


def case(setup: Callable, *args, standard: tuple = ()) -> Case:
    """A Case whose shape has its standard name."""
    d = dict(zip(dimensions(setup), args, strict=True))
    match setup.__name__:
        case "attention":
            length = f"T{d['L']}" if d["L"] == d["S"] else f"L{d['L']} S{d['S']}"
            shape = f"B{d['B']} H{d['H']} {length} D{d['E']} {'causal' if d['causal'] else 'full'}"
        case "attention_window" | "attention_mask":
            what = f"window {d['left']}" if "left" in d else f"{d['padding']}% padding"
            shape = f"B{d['B']} H{d['H']} T{d['L']} D{d['E']} {what}"
        case "attention_gqa":
            kind = "causal" if d["causal"] else "full"
            shape = f"B{d['B']} H{d['H'] * d['group']}/{d['H']} L{d['L']} S{d['S']} D{d['E']} {kind}"
        case "qkv_attention":
            kind = "causal" if d["causal"] else "full"
            shape = f"B{d['B']} H{d['H'] * d['group']}/{d['H']} T{d['L']} D{d['E']} {kind}"
        case "varlen_attn":
            heads = f"H{d['H'] * d['group']}/{d['H']}"
            shape = f"N{d['N']} {heads} T{d['L']} D{d['E']} causal"
        case "linear":
            shape = f"{_sizes(d['M'], d['K'])} -> {d['N']}"
        case "mlp":
            batch = f"B{d['M'][0]} T{d['M'][1]}" if len(lead(d["M"])) == 2 else f"M{_sizes(d['M'])}"
            shape = f"{batch} C{d['C']} {d['activation']}"
        case "rope":
            heads, kind = f"H{d['H'] * d['group']}/{d['H']}", " norm" if d["norm"] else ""
            shape = f"B{d['B']} {heads} T{d['T']} D{d['D']}{kind}"
        case "dropout_add_layer_norm" | "dropout_add_rms_norm":
            shape = f"{_sizes(d['M'], d['N'])} p{d['dropout']}"
        case "gelu":
            shape = f"{_sizes(d['M'])} {'erf' if d['approximate'] == 'none' else 'tanh'}"
        case _:
            shape = _sizes(*d.values())
    return Case(setup, args, shape, standard)


def _sizes(*sizes) -> str:
    return " x ".join(str(n) for size in sizes for n in lead(size))


# ------------------------------------------------------------------------------- set-up functions, one per op
def _elements(*sizes) -> int:
    return math.prod(n for size in sizes for n in lead(size))


def attention(make, B, H, L, S, E, causal):
    """4 B H L S E FLOPs (two GEMMs), if causal only those below the diagonal; backward 2.5 times (five GEMMs)."""
    pairs = L * S if not causal else sum(min(i + 1, S) for i in range(L))
    flops = 4 * B * H * pairs * E
    call = lambda f: lambda q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return Work(call(F), call(TF), (make(B, H, L, E), make(B, H, S, E), make(B, H, S, E)), (flops, 2.5 * flops))


def attention_window(make, B, H, L, S, E, left):
    """Causal attention to the ``left`` keys before a query's own. PyTorch takes this as a mask."""
    q, k, v = make(B, H, L, E), make(B, H, S, E), make(B, H, S, E)
    mask = torch.ones(L, S, dtype=torch.bool, device=q.device).tril().triu(-left)
    flops = 4 * B * H * E * sum(max(0, min(i, S - 1) - max(0, i - left) + 1) for i in range(L))
    ours = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, window=(left, -1))
    eager = lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return Work(ours, eager, (q, k, v), (flops, 2.5 * flops))


def attention_mask(make, B, H, L, S, E, padding):
    """A boolean mask that hides the last ``padding`` percent of the keys, whose FLOPs do not count."""
    q, k, v = make(B, H, L, E), make(B, H, S, E), make(B, H, S, E)
    keys = S - S * padding // 100
    mask = (torch.arange(S, device=q.device) < keys).expand(B, 1, 1, S)
    call = lambda f: lambda q, k, v: f.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    flops = 4 * B * H * L * keys * E
    return Work(call(F), call(TF), (q, k, v), (flops, 2.5 * flops))


def attention_gqa(make, B, H, group, L, S, E, causal):
    """Grouped heads: ``group`` query heads share each of the H key heads."""
    tensors = make(B, H * group, L, E), make(B, H, S, E), make(B, H, S, E)
    flops = attention(make, B, H * group, L, S, E, causal).amount
    call = lambda f: lambda q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return Work(call(F), call(TF), tensors, flops)


def qkv_attention(make, B, H, group, L, E, causal):
    """Attention of one tensor of queries, keys and values. PyTorch splits it, and its gradient is copied together."""
    heads = H * group
    flops = attention(make, B, heads, L, L, E, causal).amount

    def eager(qkv):
        q, k, v = split_heads(qkv, heads, H)
        out = TF.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=group > 1)
        return out.transpose(1, 2).reshape(B, L, heads * E)

    ours = lambda qkv: F.qkv_attention(qkv, heads, H, is_causal=causal)
    return Work(ours, eager, (make(B, L, (heads + 2 * H) * E),), flops)


def varlen_attn(make, N, H, group, L, S, E):
    """N packed causal sequences of L / N, 2 L / N, ... L queries and of keys. On a CPU PyTorch takes one by one."""
    cu_q, cu_k, rows_q, rows_k = unequal_lengths(N, L, S)
    tensors = make(rows_q, H * group, E), make(rows_k, H, E), make(rows_k, H, E)
    packing = cu_q.to(tensors[0].device), cu_k.to(tensors[0].device), None, L, S, E**-0.5, -1, 0
    lengths = zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)
    flops = 4 * H * group * E * sum(max(0, s - i) for l, s in lengths for i in range(l))
    call = lambda f: lambda q, k, v: f(q, k, v, *packing[:2], L, S, window_size=(-1, 0), enable_gqa=group > 1)
    eager = lambda q, k, v: varlen_attn_composite(q, k, v, *packing)
    if tensors[0].is_cuda:  # PyTorch has the function for GPUs
        eager = call(importlib.import_module("torch.nn.attention.varlen").varlen_attn)
    return Work(call(F.varlen_attn), eager, tensors, (flops, 2.5 * flops))


def linear(make, M, K, N):
    """2 M N K FLOPs; backward has two such GEMMs."""
    flops = 2 * _elements(M, N) * K
    return Work(F.linear, TF.linear, (make(*lead(M), K), make(N, K) * K**-0.5, make(N)), (flops, 2 * flops))


def mlp(make, M, C, activation):
    """C -> 4C -> C: two GEMMs, backward four. The activation is not counted.

    swiglu has Llama's width: H is the next multiple of 256 from 8 C / 3 on, and there are three GEMMs of that width.
    """
    gated, act = activation == "swiglu", ACTIVATIONS[activation]
    H = -(-8 * C // (3 * 256)) * 256 if gated else 4 * C
    width = 2 * H if gated else H
    flops = 2 * _elements(M) * C * (width + H)
    tensors = make(*lead(M), C), make(width, C) * C**-0.5, make(width), make(C, H) * H**-0.5, make(C)

    def ours(x, fc_weight, fc_bias, proj_weight, proj_bias):
        return F.mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, activation)

    def eager(x, fc_weight, fc_bias, proj_weight, proj_bias):
        return TF.linear(act(TF.linear(x, fc_weight, fc_bias)), proj_weight, proj_bias)

    return Work(ours, eager, tensors, (flops, 2 * flops))


def layer_norm(make, M, N):
    """Forward moves x and y; backward moves dy, x and dx."""
    call = lambda f: lambda x, weight, bias: f.layer_norm(x, (N,), weight, bias)
    tensors, size = (make(*lead(M), N), make(N), make(N)), _elements(M, N)
    return Work(call(F), call(TF), tensors, (2 * size, 3 * size), "memory")


def add_layer_norm(make, M, N):
    """Forward moves x, residual, y and sum; backward moves dy, dsum, sum and the one gradient of both."""

    def ours(x, residual, weight, bias):
        return F.add_layer_norm(x, residual, (N,), weight, bias)

    def eager(x, residual, weight, bias):
        s = x + residual
        return TF.layer_norm(s, (N,), weight, bias), s

    tensors, size = (make(*lead(M), N), make(*lead(M), N), make(N), make(N)), _elements(M, N)
    return Work(ours, eager, tensors, (4 * size, 4 * size), "memory")


def rms_norm(make, M, N):
    """Moves what layer_norm does."""
    call = lambda f: lambda x, weight: f.rms_norm(x, (N,), weight)
    tensors, size = (make(*lead(M), N), make(N)), _elements(M, N)
    return Work(call(F), call(TF), tensors, (2 * size, 3 * size), "memory")


def add_rms_norm(make, M, N):
    """Moves what add_layer_norm does."""

    def ours(x, residual, weight):
        return F.add_rms_norm(x, residual, (N,), weight)

    def eager(x, residual, weight):
        s = x + residual
        return TF.rms_norm(s, (N,), weight), s

    tensors, size = (make(*lead(M), N), make(*lead(M), N), make(N)), _elements(M, N)
    return Work(ours, eager, tensors, (4 * size, 4 * size), "memory")


def rope(make, B, H, group, T, D, norm):
    """Moves every head in and out, and backward of a norm also reads the heads. Heads of a position lie together."""
    q, k = (make(B, T, heads, D).transpose(1, 2) for heads in (H * group, H))
    weights = (make(D), make(D)) if norm else ()
    angles = torch.arange(T, device=q.device)[:, None] * 10000.0 ** -torch.linspace(0, 1, D // 2, device=q.device)
    cos, sin = angles.cos(), angles.sin()
    wide_cos, wide_sin = (torch.cat((t, t), -1).to(q.dtype) for t in (cos, sin))

    def rotate_half(x):
        return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)

    def ours(q, k, q_weight=None, k_weight=None):
        return F.rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight)

    def eager(*tensors):
        heads, weights = tensors[:2], tensors[2:]
        if weights:
            heads = [TF.rms_norm(x, (D,), w, 1e-6) for x, w in zip(heads, weights, strict=True)]
        return tuple(x * wide_cos + rotate_half(x) * wide_sin for x in heads)

    size = _elements(B, H * (group + 1), T, D)
    return Work(ours, eager, (q, k, *weights), (2 * size, (2 + norm) * size), "memory")


def _dropout_add_norm(function, composite, norm, make, M, N, dropout, params, options=()):
    """Forward moves x, residual, y and sum; backward moves dy, dsum, sum and the two gradients."""

    def ours(x, residual, *weights):
        return function(x, residual, (N,), *weights, p=dropout)

    def eager(x, residual, *weights):
        s = TF.dropout(x, dropout) + residual
        return norm(s, (N,), *weights), s

    def same_bits(x, residual, *weights):
        eps = 1e-5 if params == 2 else torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        return composite(x, residual, *weights, eps, new_seed(x), dropout, *options)

    xs, size = (make(*lead(M), N), make(*lead(M), N)), _elements(M, N)
    weights = tuple(make(N) for _ in range(params))
    return Work(ours, eager, (*xs, *weights), (4 * size, 5 * size), "memory", same_bits)


def dropout_add_layer_norm(make, M, N, dropout):
    functions = F.dropout_add_layer_norm, dropout_add_layer_norm_composite, TF.layer_norm
    return _dropout_add_norm(*functions, make, M, N, dropout, 2)


def dropout_add_rms_norm(make, M, N, dropout):
    functions = F.dropout_add_rms_norm, dropout_add_rms_norm_composite, TF.rms_norm
    return _dropout_add_norm(*functions, make, M, N, dropout, 1, (0.0,))


def gelu(make, M, approximate):
    """Forward moves x and y; backward moves dy, x and dx."""
    call = lambda f: lambda x: f.gelu(x, approximate=approximate)
    return Work(call(F), call(TF), (make(*lead(M)),), (2 * _elements(M), 3 * _elements(M)), "memory")


def relu(make, M):
    """Forward moves x and y; backward moves dy, y and dx."""
    return Work(F.relu, TF.relu, (make(*lead(M)),), (2 * _elements(M), 3 * _elements(M)), "memory")


def _classes(N, V, device):
    """Targets that are spread over the classes."""
    return torch.arange(N, device=device) * 7919 % V


def cross_entropy(make, N, V):
    """Forward reads the logits; backward reads them and writes their gradient."""
    x = make(N, V)
    call = lambda f: lambda x: f.cross_entropy(x, _classes(N, V, x.device))
    return Work(call(F), call(TF), (x,), (N * V, 2 * N * V), "memory")


def linear_cross_entropy(make, N, K, V):
    """2 N K V FLOPs (one GEMM), backward twice that, of losses that are not reduced.

    Of a mean, forward would form the gradients, and backward would only scale them.
    """
    ours = lambda x, w: F.linear_cross_entropy(x, w, _classes(N, V, x.device), reduction="none")
    eager = lambda x, w: TF.cross_entropy(TF.linear(x, w), _classes(N, V, x.device), reduction="none")
    weight = make(V, K) / K**0.5  # logits of size 1, as of a model; larger ones magnify rounding in the softmax
    return Work(ours, eager, (make(N, K), weight), (2 * N * K * V, 4 * N * K * V))


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
    *(case(attention_window, 1, 12, 4096, 4096, 64, left) for left in (255, 1023)),
    *(case(attention_mask, 4, 12, 512, 512, 64, padding) for padding in (0, 50)),
    case(attention_gqa, 1, 4, 4, 1024, 1024, 64, True),
    case(attention_gqa, 1, 4, 4, 1, 4096, 64, False),
    case(qkv_attention, 1, 12, 1, 1024, 64, True),
    case(varlen_attn, 8, 12, 1, 512, 512, 64),
    case(linear, 4096, 768, 3072, standard=ALL),
    case(linear, 4096, 3072, 768, standard=ALL),
    case(linear, 8, 768, 3072),
    case(linear, 1001, 333, 517),
    case(mlp, (8, 512), 768, "gelu_tanh", standard=ALL),
    case(mlp, (8, 512), 768, "gelu", standard=FLOAT32),
    case(mlp, (8, 512), 768, "relu", standard=FLOAT32),
    case(mlp, (8, 512), 768, "relu2"),
    case(mlp, (4, 512), 1024, "swiglu"),
    case(mlp, (1, 8), 384, "gelu_tanh"),
    *(
        case(norm, rows, columns, standard=standard)
        for norm in (layer_norm, add_layer_norm, rms_norm, add_rms_norm)
        for rows, columns, standard in ((8192, 768, ALL), (8, 64, ()), (1023, 771, ()))
    ),
    *(case(rope, 8, 12, 1, 1024, 64, norm, standard=ALL) for norm in (0, 1)),
    case(rope, 1, 8, 4, 1, 128, 1),
    case(rope, 2, 2, 2, 77, 40, 0),
    *(case(dropout_add_layer_norm, *shape, 0.1) for shape in ((8192, 768), (8, 64), (1023, 771))),
    case(dropout_add_rms_norm, 8192, 768, 0.1),
    case(gelu, (4096, 3072), "none", standard=ALL),
    case(gelu, (4096, 3072), "tanh", standard=ALL),
    case(gelu, (8, 64), "none"),
    case(relu, (4096, 3072), standard=ALL),
    case(relu, (1001, 333)),
    case(cross_entropy, 2048, 50304, standard=FLOAT32),
    case(cross_entropy, 1023, 771),
    case(linear_cross_entropy, 1024, 768, 50304),
]
OPS = tuple(dict.fromkeys(case.op for case in CPU))

TOKENS, BFLOAT16 = 16384, ("bfloat16",)
GPU = [  # the most important first: a run that has no time left omits the rest
    case(attention, 16, 12, 1024, 1024, 64, True, standard=BFLOAT16),
    case(mlp, (16, 1024), 768, "gelu_tanh", standard=BFLOAT16),
    case(layer_norm, TOKENS, 768, standard=BFLOAT16),
    case(attention, 2, 32, 8192, 8192, 128, True, standard=BFLOAT16),
    case(mlp, (16, 1024), 1600, "gelu_tanh", standard=BFLOAT16),
    case(linear, TOKENS, 768, 3072),
    case(attention, 16, 25, 1024, 1024, 64, True, standard=BFLOAT16),
    case(add_layer_norm, TOKENS, 768),
    case(layer_norm, TOKENS, 4096, standard=BFLOAT16),
    case(mlp, (16, 1024), 4096, "gelu_tanh", standard=BFLOAT16),
    case(mlp, (16, 1024), 4096, "swiglu"),
    case(qkv_attention, 16, 12, 1, 1024, 64, True),
    case(varlen_attn, 8, 32, 1, 4096, 4096, 128),
    case(attention_window, 2, 32, 8192, 8192, 128, 1023),
    case(attention_gqa, 2, 8, 4, 8192, 8192, 128, True),
    case(attention_mask, 16, 12, 1024, 1024, 64, 50),
    case(rms_norm, TOKENS, 768, standard=BFLOAT16),
    case(gelu, (TOKENS, 3072), "tanh"),
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
    case(add_rms_norm, TOKENS, 4096),
    *(case(rope, 4, 8, 4, 4096, 128, norm) for norm in (0, 1)),
    case(dropout_add_layer_norm, TOKENS, 1600, 0.1),
    case(dropout_add_rms_norm, TOKENS, 4096, 0.1),
    case(gelu, (TOKENS, 3072), "none"),
    case(relu, (TOKENS, 3072)),
    case(cross_entropy, TOKENS, 50304),
    case(linear_cross_entropy, TOKENS, 768, 50304),
]
PREDICTED = tuple(GPU[i] for i in (0, 1, 2, 3, 8, 9))  # the shapes that goals.py has expectations of
