"""Which shapes, layouts and dtypes each op is tested at, as data. See `pygpt.verify.SPECS` for the keys."""

import itertools
import mmap
from itertools import product

import torch

from pygpt import reference, verify
from pygpt.ops.attention_specs import in_kernels_dtypes
from pygpt.ops.common import acc

DTYPES = list(verify.DTYPES.values())
OPS = list(verify.SPECS)
LENGTHS = (1, 7, 17, 33, 65, 127, 257)
WIDTHS = (1, 3, 64, 768, 1000, 4099)
HEAD_DIMS = (1, 8, 24, 64, 80, 128, 256)


def fullest_nan(dtype):
    """The NaN that rounding to fewer bits carries furthest: every bit set."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.tensor(-1, dtype=bits).view(dtype)


def _attention(B, H, L, S, E, Ev=None):
    dims = {"B": B, "H": H, "L": L, "S": S, "E": E, "Ev": Ev or E}
    return [{**dims, "causal": causal} for causal in (0, 1)]


ATTENTION = [
    case
    for shape in (
        *((1, 1, L, S, 24) for L, S in zip(LENGTHS, LENGTHS, strict=True)),  # B*H = 1
        *((2, 3, L, S, 8) for L, S in ((17, 33), (33, 17), (64, 65))),
        *((1, 2, L, S, 8) for L, S in ((1, 257), (257, 1), (127, 257), (257, 127))),
        *((1, 1 if E > 80 else 2, 65, 70, E) for E in HEAD_DIMS),
        *((2, 1, 33, 40, E, Ev) for E, Ev in ((64, 24), (8, 80), (1, 256), (256, 3))),
        (1, 1, 300, 300, 64),
        *((1, 2, L, S, E, Ev) for L, S, E, Ev in ((1, 300, 64, 64), (2, 257, 80, 33), (4, 500, 7, 24))),  # decode
    )
    for case in _attention(*shape)
] + [
    {"B": 2, "H": 3, "L": 5, "S": 4, "E": 8, "Ev": 6, "causal": 1, key: 0} for key in ("B", "H", "L", "S", "E", "Ev")
]  # fmt: skip

LINEAR = [
    {"M": M, "K": K, "N": N, "bias": bias}
    for (M, K, N), bias in product(
        (
            *((1, K, N) for K, N in ((64, 64), (768, 1000), (1, 1), (257, 17))),  # decode
            *((7, 1, 3), (3, 3, 1), (33, 17, 65), (65, 33, 7), (127, 257, 129), (65, 1000, 33), (16, 4099, 5)),
            *((257, 64, 257), (300, 96, 100), ((2, 3), 64, 7), ((), 5, 6), ((2, 0), 5, 6), (5000, 8, 9)),
            *((5, 0, 3), (0, 8, 4), (4, 8, 0)),  # K = 0 leaves the bias
        ),
        (0, 1),
    )
]

MLP = [
    {"M": M, "C": C, "H": H, "O": O, "bias": bias, "activation": activation}
    for (M, C, H, O), bias, activation in product(
        (
            *((1, 64, 256, 64), (7, 1, 3, 2), (33, 17, 65, 7), (127, 48, 192, 48), (65, 100, 257, 33)),
            *(((2, 3), 24, 96, 24), (0, 8, 16, 8), (4, 8, 0, 3), (4, 0, 8, 3), (4, 8, 3, 0)),
        ),
        (0, 1),
        reference.ACTIVATIONS,
    )
]

# Rows that are neither few nor many for the C++ kernels, which leave a W as large as these unpacked; or just not.
SOME_ROWS = [
    *(
        ("linear", {"M": M, "K": K, "N": N})
        for M, K, N in (
            *((17, 257, 257), (37, 401, 259), (64, 768, 768), (130, 257, 95)),
            *((250, 331, 225), (256, 1000, 70), (257, 301, 233)),
            *((257, 1601, 67), (1601, 45, 70)),  # sums of several blocks, or of several chains in a block
        )
    ),
    *(("mlp", {"M": 50, "C": 301, "H": 331, "O": 259, "activation": activation}) for activation in ("gelu", "swiglu")),
]

NORM = [
    {"M": M, "N": N, "affine": affine}
    for (M, N), affine in product(
        (
            *((M, N) for M, N in zip((33, 257, 17, 7, 65, 7), WIDTHS, strict=True)),
            *((1, 768), (1, 1), ((2, 3), 65), ((), 7), (0, 64), (5, 0), (5000, 16)),
        ),
        (0, 1),
    )
] + [{"M": 33, "N": N, "mean": mean} for N in (64, 1000) for mean in (10.0, 300.0)]  # variance must be centred
OFFSET = [{"M": M, "N": N, "offset": 1.0} for M, N in ((33, 64), (7, 771), (3, 4099))]  # of a weight
DROPOUT_NORM = [
    *({"M": M, "N": N} for M, N in zip((33, 257, 17, 7, 65, 7), WIDTHS, strict=True)),
    *({"M": M, "N": N, "affine": 0, "dropout": p} for M, N, p in (((2, 3), 65, 0.5), (5, 16, 1.0), (9, 72, 0.0))),
    *({"M": M, "N": N} for M, N in (((), 7), (0, 64), (5, 0), (5000, 16))),
    {"M": 33, "N": 1000, "mean": 300.0, "dropout": 0.0},
]

# Row lengths around vectors and blocks; every reduction, with and without each option.
_LOSS_OPTIONS = (
    {},
    {"ignored": 2, "weight": 1, "smoothing": 0.1, "z": 0.01},
    {"reduction": "sum", "ignored": 3, "z": 0.01},
    {"reduction": "none", "smoothing": 0.2},
    {"reduction": "none", "weight": 1, "z": 0.01},
    {"reduction": "sum", "weight": 1, "smoothing": 1.0},
)
_EMPTY_LOSS = [{"N": 0, **options} for options in _LOSS_OPTIONS if "reduction" in options]  # a mean of none is NaN
CROSS_ENTROPY = [
    *(
        {"N": N, "V": V, **options}
        for (N, V), options in product(
            (*((5, V) for V in (1, 2, 7, 33, 65, 1000, 4099)), (130, 97), (1, 50257)), _LOSS_OPTIONS
        )
    ),
    *({"N": 17, "V": V, "mean": 300.0, "gain": 4.0} for V in (5, 257)),
    *({"V": 9, **empty} for empty in _EMPTY_LOSS),
]
LINEAR_CROSS_ENTROPY = [
    *(
        {"N": N, "K": K, "V": V, "bias": i % 2, **options}
        for (N, K, V), (i, options) in product(
            ((5, 3, 7), (33, 17, 65), (130, 48, 257), (1, 1, 1), (4, 0, 5)), enumerate(_LOSS_OPTIONS)
        )
    ),
    *({"N": N, "K": 24, "V": 40, **_LOSS_OPTIONS[i]} for N, i in ((1100, 1), (513, 4))),
    *({"K": 8, "V": 9, **empty} for empty in _EMPTY_LOSS),
]

# Every tail of a vector, many blocks; values are swept by test_activation.
ELEMENTS = [{"M": n} for n in (0, 1, 7, 33, 65, 4099, (3, 5, 7), 100_003)]

# Channels of one vector or less, of whole vectors and not; all rotated, some, or none; one head of queries or of keys.
ROPE = [
    {"B": 1, "H": H, "group": group, "T": T, "D": D, "R": R, "norm": norm, "interleaved": interleaved}
    for (H, group, T, D, R), norm, interleaved in product(
        ((1, 1, 1, 2, 2), (2, 1, 7, 8, 8), (1, 3, 33, 24, 16), (2, 2, 65, 64, 64), (1, 2, 5, 80, 40), (1, 1, 9, 7, 6)),
        (0, 1),
        (0, 1),
    )
] + [
    *({"B": 3, "T": 40, "D": D, "norm": norm, "positions": 1} for D in (16, 128) for norm in (0, 1)),
    *({"H": 1, "group": 1, "T": 3, "D": 256, "R": R, "norm": norm} for R in (0, 256) for norm in (0, 1)),
    {"H": 40, "group": 1, "T": 70, "D": 24, "norm": 1},  # many rows in a sum of weights
    *({"B": 2, "H": 2, "group": 1, "T": 4, "D": 8, "norm": 1, key: 0} for key in ("B", "H", "T")),
    {"B": 2, "H": 2, "T": 4, "D": 0, "norm": 0},
]

OPTIONS = [op for op, spec in verify.SPECS.items() if spec.features]  # of attention
CASES = {
    **{op: [{"B": 1, "L": 33, "S": 35, "E": 16, "Ev": 24}] for op in OPTIONS},  # few keys in the last tile
    "attention_mask": [{"B": 1, "L": 33, "S": 35, "E": 16, "mask": mask} for mask in ("bool", "float")],
    "attention": ATTENTION[::7],  # the same kernels as attention_lse's, which have one gradient less to read
    "attention_lse": ATTENTION,
    "qkv_attention": [
        {"B": 1, "H": 1, "L": 1, "E": 24, "causal": 0},
        {"B": 2, "H": 3, "L": 65, "E": 8, "causal": 0},
        {"B": 1, "H": 2, "group": 3, "L": 70, "E": 40, "left": 20},
        {"B": 2, "H": 1, "group": 2, "L": 33, "E": 64, "dropout": 0.2},
        *({"B": 2, "H": 2, "group": 2, "L": 5, "E": 8, key: 0} for key in ("B", "L", "E")),
    ],
    "varlen_attn": [
        {"N": 3, "L": 33, "E": 16, "Ev": 24, "right": 0},
        {"N": 3, "L": 20, "S": 65, "E": 24, "left": 30, "used": 1},
        *({"N": 2, "group": 1, "L": 5, "S": 4, "E": 8, "Ev": 6, key: 0} for key in ("N", "H", "L", "S", "E", "Ev")),
    ],
    "linear": LINEAR,
    "mlp": MLP,
    "layer_norm": NORM,
    "add_layer_norm": NORM,
    "rms_norm": NORM + OFFSET,
    "add_rms_norm": NORM[::2] + OFFSET[:2],  # the other norms' kernels, here with a residual and without a mean
    "dropout_add_layer_norm": DROPOUT_NORM,
    "dropout_add_rms_norm": DROPOUT_NORM[1::2] + OFFSET[1:],
    "gelu": [
        {**case, "approximate": approximate}
        for case in (*ELEMENTS, {"M": 4099, "gain": 6.0})
        for approximate in ("none", "tanh")
    ],
    "relu": ELEMENTS,
    "rope": ROPE,
    "cross_entropy": CROSS_ENTROPY,
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
}

NORMS = "layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "dropout_add_layer_norm", "dropout_add_rms_norm"
SLOW = {
    "attention": [case for L, S, E in product(LENGTHS, LENGTHS, HEAD_DIMS) for case in _attention(1, 2, L, S, E)],
    "linear": [{"M": M, "K": K, "N": N} for M, K, N in product((1, 5, 31, 130), (2, 63, 257, 770), (1, 15, 66, 513))]
    + [{"M": 512, "K": 768, "N": 3072}],
    "mlp": [{"M": 256, "C": 768, "H": 3072, "activation": activation} for activation in reference.ACTIVATIONS],
    **{op: [{"M": M, "N": N} for M, N in product(LENGTHS, WIDTHS)] for op in NORMS},
    "cross_entropy": [{"N": N, "V": V, **options} for N, V, options in product(LENGTHS, WIDTHS, _LOSS_OPTIONS[:3])],
    "linear_cross_entropy": [
        {"N": 1500, "K": 130, "V": 1000, **_LOSS_OPTIONS[1]},
        {"N": 600, "K": 768, "V": 5000},
    ],
}

# One shape per op for the tests that vary something else: odd sizes, more than one tile each way. (CASES has B != H.)
TYPICAL = {
    "attention": {"B": 2, "H": 2, "L": 70, "S": 85, "E": 24, "Ev": 40, "causal": 1},
    "attention_lse": {"B": 2, "H": 2, "L": 85, "S": 70, "E": 40, "Ev": 24, "causal": 0},
    "qkv_attention": {"B": 2, "H": 1, "group": 2, "L": 85, "E": 40, "causal": 1},
    "varlen_attn": {"N": 3, "H": 1, "group": 2, "L": 70, "S": 85, "E": 24, "Ev": 40, "right": 0},
    "linear": {"M": (5, 13), "K": 33, "N": 47},
    "mlp": {"M": (5, 13), "C": 33, "H": 70, "O": 19},
    "layer_norm": {"M": (5, 13), "N": 70},
    "add_layer_norm": {"M": (5, 13), "N": 70},
    "rms_norm": {"M": (5, 13), "N": 70},
    "add_rms_norm": {"M": (5, 13), "N": 70},
    "dropout_add_layer_norm": {"M": (5, 13), "N": 70},
    "dropout_add_rms_norm": {"M": (5, 13), "N": 70, "offset": 1.0},
    "gelu": {"M": (5, 13, 7)},
    "relu": {"M": (5, 13, 7)},
    "rope": {"B": 2, "H": 2, "group": 2, "T": 70, "D": 40, "R": 24, "norm": 1, "positions": 1},
    "cross_entropy": {"N": 65, "V": 70},
    "linear_cross_entropy": {"N": 65, "K": 33, "V": 47, "bias": 1},
}
# The same with few rows, as in decoding, which have kernels of their own.
FEW = {
    "attention": {"B": 2, "H": 2, "L": 3, "S": 300, "E": 24, "Ev": 40, "causal": 0},
    "linear": {"M": 3, "K": 33, "N": 47},
    "mlp": {"M": (2, 3), "C": 33, "H": 70, "O": 19, "activation": "relu2"},
}
# The same with rows of whole 16-byte vectors in every dtype.
EVEN = {
    "attention": {"B": 2, "H": 2, "L": 24, "S": 40, "E": 16, "Ev": 24, "causal": 1},
    "attention_lse": {"B": 1, "H": 3, "L": 40, "S": 24, "E": 24, "Ev": 16, "causal": 0},
    "qkv_attention": {"B": 2, "H": 1, "group": 2, "L": 40, "E": 24},
    "linear": {"M": (2, 20), "K": 32, "N": 24},
    "mlp": {"M": (2, 20), "C": 24, "H": 48, "O": 16},
    "layer_norm": {"M": (5, 3), "N": 64},
    "add_layer_norm": {"M": (5, 3), "N": 64},
    "rms_norm": {"M": (5, 3), "N": 64},
    "add_rms_norm": {"M": (5, 3), "N": 64},
    "dropout_add_layer_norm": {"M": (5, 3), "N": 64},
    "dropout_add_rms_norm": {"M": (5, 3), "N": 64, "offset": 1.0},
    "gelu": {"M": (8, 9, 64)},  # more than a block of the CUDA kernels
    "relu": {"M": (8, 9, 64)},
    "rope": {"B": 2, "H": 2, "group": 2, "T": 24, "D": 64, "R": 64, "norm": 1},
    "cross_entropy": {"N": 15, "V": 64},
    "linear_cross_entropy": {"N": 40, "K": 32, "V": 24, "bias": 1},
}
EVEN_FEW = {
    "attention": {"B": 2, "H": 2, "L": 3, "S": 144, "E": 16, "Ev": 24, "causal": 0},
    "linear": {"M": 3, "K": 32, "N": 24},
    "mlp": {"M": (1, 3), "C": 24, "H": 48, "O": 16, "activation": "relu2"},
}
# A handful of elements, for finite differences and exhaustive sweeps.
TINY = {
    "attention": {"B": 1, "H": 2, "L": 3, "S": 4, "E": 3, "Ev": 2, "causal": 1},
    "attention_lse": {"B": 1, "H": 2, "L": 4, "S": 3, "E": 2, "Ev": 3, "causal": 0},
    "qkv_attention": {"B": 1, "H": 1, "group": 2, "L": 4, "E": 3},
    "varlen_attn": {"N": 2, "H": 1, "group": 2, "L": 3, "S": 4, "E": 3, "Ev": 2, "right": 0},
    "linear": {"M": (2, 2), "K": 3, "N": 2},
    "mlp": {"M": (2, 2), "C": 3, "H": 4, "O": 2},
    "layer_norm": {"M": (2, 2), "N": 5},
    "add_layer_norm": {"M": (2, 2), "N": 5},
    "rms_norm": {"M": (2, 2), "N": 5},
    "add_rms_norm": {"M": (2, 2), "N": 5},
    "dropout_add_layer_norm": {"M": (2, 2), "N": 5},
    "dropout_add_rms_norm": {"M": (2, 2), "N": 5, "offset": 1.0},
    "gelu": {"M": (2, 3)},
    "relu": {"M": (2, 3)},
    "rope": {"B": 1, "H": 1, "group": 2, "T": 3, "D": 5, "R": 4, "norm": 1},
    "cross_entropy": {"N": 3, "V": 4},
    "linear_cross_entropy": {"N": 3, "K": 2, "V": 4, "bias": 1},
}


def variants(dims_of):
    """(op, dims) for each op of ``dims_of``, and for each of its activations, approximations, kinds of pairs and
    reductions."""
    names = {
        "activation": reference.ACTIVATIONS, "approximate": ("none", "tanh"), "interleaved": (0, 1),
        "reduction": ("none", "mean", "sum"),
    }  # fmt: skip
    for op, dims in dims_of.items():
        if op == "mlp":
            yield op, {**dims, "activation": "swiglu", "save": "input"}
        for key, values in names.items():
            if key in verify.SPECS[op].dims:
                yield from ((op, {**dims, key: value}) for value in values)
                break
        else:
            yield op, dims


def ids(value):
    """Readable test names for dims, dtypes and functions."""
    if isinstance(value, dict):
        return (
            ",".join(f"{k}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in value.items())
            or "default"
        )
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", None)


# ------------------------------------------------------------------------------- layouts of one tensor
def contiguous(t):
    return t


def transposed(t):
    return t.mT.contiguous().mT if t.dim() >= 2 else t


def heads_last(t):
    return t.transpose(-3, -2).contiguous().transpose(-3, -2) if t.dim() >= 3 else t


def embedded(t):
    """In the middle of a buffer of NaN: a read outside shows, and rows are not adjacent."""
    buffer = t.new_full([n + 3 for n in t.shape] or [3], torch.nan)
    for d, n in enumerate(t.shape):
        buffer = buffer.narrow(d, 1, n)
    return buffer.copy_(t) if t.dim() else t


def strided(t):
    """Non-unit last stride, NaN between the elements."""
    return t.new_full((*t.shape, 2), torch.nan)[..., 1].copy_(t)


def expanded(t):
    """Stride 0 along the first dimension."""
    return t[:1].expand_as(t) if t.dim() else t


def constant_rows(t):
    """Stride 0 along the last dimension."""
    return t[..., :1].expand_as(t) if t.dim() >= 2 else t


def shifted(t):
    """Contiguous, one element off an aligned address."""
    return t.new_full((t.numel() + 1,), torch.nan)[1:].view(t.shape).copy_(t)


def pitched(t):
    """At an aligned address, rows one element farther apart than they are long."""
    return t.new_full((*t.shape[:-1], t.shape[-1] + 1), torch.nan)[..., :-1].copy_(t) if t.dim() else t


def only(n, tensors, layout):
    """A view that lays out the n-th of every so many tensors, and leaves the others as they are."""
    count = itertools.count()
    return lambda t: layout(t) if next(count) % tensors == n else t


LAYOUTS = [contiguous, transposed, heads_last, embedded, strided, expanded, constant_rows]


# ------------------------------------------------------------------------------- the kernels' own signatures
def kernel_calls(op, args, grads, k):
    """[(name, arguments)] of ``<op>_fwd`` and ``<op>_bwd`` as the autograd Function would call them on ``k``."""
    args, op = verify.SPECS[op].canonical(*args), verify.SPECS[op].op
    if op == "attention" and len(args) > 5:
        args = (*args[:5], *in_kernels_dtypes(args[0], args[5:]))
    saves = ("all" if isinstance(a, str) and a == "input" else a for a in args)  # which mlp_bwd needs
    saved = verify.as_tuple(getattr(k, f"{op}_fwd")(*saves))
    dy = grads[0]
    backward = {
        "attention": lambda q, kk, v, *rest: (dy, grads[1] if len(grads) > 1 else None, q, kk, v, *saved, *rest),
        "varlen_attn": lambda q, kk, v, *packing: (*grads, q, kk, v, *saved, *packing),
        "qkv_attention": lambda qkv, *rest: (dy, qkv, *saved, *rest),
        "linear": lambda x, w, b: (dy, x, w),
        "mlp": lambda x, fc, fb, proj, pb, activation, save: (dy, x, fc, proj, *saved[1:], activation),
        "layer_norm": lambda x, w, b, eps: (dy, x, w, *saved[1:]),
        "add_layer_norm": lambda x, r, w, b, eps: (dy, grads[1], saved[1], w, *saved[2:]),
        "rms_norm": lambda x, w, eps, *offset: (dy, x, w, *saved[1:], *offset),
        "add_rms_norm": lambda x, r, w, eps, *offset: (dy, grads[1], saved[1], w, *saved[2:], *offset),
        "dropout_add_layer_norm": lambda x, r, w, b, eps, *rest: (dy, grads[1], saved[1], w, *saved[2:], *rest),
        "dropout_add_rms_norm": lambda x, r, w, eps, *rest: (dy, grads[1], saved[1], w, *saved[2:], *rest),
        "gelu": lambda x, approximate: (dy, x, approximate),
        "relu": lambda x: (dy, *saved),
        "rope": lambda q, kk, cos, sin, qw, kw, ids, eps, interleaved: (
            *grads, *(t if qw is not None else None for t in (q, kk)), cos, sin, qw, kw,
            *(t if qw is not None else None for t in saved[2:]), ids, interleaved,
        ),
        "cross_entropy": lambda x, target, *options: (acc(dy), x, target, *saved[1:], *options),
        "linear_cross_entropy": lambda x, w, target, b, _, *options: (acc(dy), x, w, target, b, *saved[4:], *options),
    }[op](*args)  # fmt: skip
    of_op = {"mlp": 5, "gelu": 0, "relu": 0, "qkv_attention": 0, "rms_norm": 2, "add_rms_norm": 2, "rope": 4,
             "cross_entropy": 0, "dropout_add_layer_norm": 4}  # fmt: skip
    needs = [True] * of_op.get(op, 3)
    if op == "rope" and args[4] is None:
        needs = [True, True, False, False]
    before_needs = {"attention": 5, "varlen_attn": 3, "linear_cross_entropy": 5, "rms_norm": 3, "add_rms_norm": 4}
    before_needs |= {"dropout_add_layer_norm": 5, "dropout_add_rms_norm": 4}
    after_needs = args[before_needs.get(op, len(args)) :]
    if op == "attention" and after_needs:
        needs += [isinstance(o, torch.Tensor) and o.is_floating_point() for o in after_needs[:3]]
    backward = (*backward[: -len(after_needs) or None], *([needs] if needs else []), *after_needs)
    return [(f"{op}_fwd", args), (f"{op}_bwd", backward)]


def assert_exact(*args, **how):
    """`verify.measure` passes every direction."""
    failed = [row for row in verify.measure(*args, **how) if not row.passed]
    assert not failed, "\n".join(map(str, failed))


def layout_of(t):
    """The strides that matter: of dimensions with more than one element."""
    return [stride for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1] if t.numel() else []


def to_meta(a):
    """A meta tensor of the same shape, strides and dtype; other values as they are."""
    return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") if isinstance(a, torch.Tensor) else a


# ------------------------------------------------------------------------------- large tensors
def sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in CPU memory of which only the pages that are touched exist (Linux)."""
    no_reserve = 0x4000  # MAP_NORESERVE, which mmap does not name in every Python
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
