"""The shapes: those of a CPU, those of a GPU, a sweep of attention, the user's own, and tiny ones for a rehearsal."""

from . import ops
from .ops import ACTIVATIONS, DTYPES, Case, case, dimensions

ALL, FLOAT32 = tuple(DTYPES), ("float32",)
CPU = [
    case(ops.attention, 1, 12, 1024, 1024, 64, True, standard=ALL),
    case(ops.attention, 1, 12, 1024, 1024, 64, False, standard=ALL),
    case(ops.attention, 1, 12, 4096, 4096, 64, True, standard=FLOAT32),
    case(ops.attention, 1, 12, 2048, 2048, 128, False, standard=FLOAT32),
    case(ops.attention, 1, 12, 64, 64, 64, True),
    case(ops.attention, 1, 12, 1, 1024, 64, False),
    case(ops.attention, 2, 3, 77, 133, 40, False),
    case(ops.linear, 4096, 768, 3072, standard=ALL),
    case(ops.linear, 4096, 3072, 768, standard=ALL),
    case(ops.linear, 8, 768, 3072),
    case(ops.linear, 1001, 333, 517),
    case(ops.mlp, 8, 512, 768, "gelu_tanh", standard=ALL),
    case(ops.mlp, 8, 512, 768, "gelu", standard=FLOAT32),
    case(ops.mlp, 8, 512, 768, "relu", standard=FLOAT32),
    case(ops.mlp, 8, 512, 768, "relu2"),
    case(ops.mlp, 1, 8, 384, "gelu_tanh"),
    *(
        case(norm, rows, columns, standard=standard)
        for norm in (ops.layer_norm, ops.add_layer_norm, ops.rms_norm)
        for rows, columns, standard in ((8192, 768, ALL), (8, 64, ()), (1023, 771, ()))
    ),
    case(ops.gelu, 4096, 3072, "none", standard=ALL),
    case(ops.gelu, 4096, 3072, "tanh", standard=ALL),
    case(ops.gelu, 8, 64, "none"),
    case(ops.relu, 4096, 3072, standard=ALL),
    case(ops.relu, 1001, 333),
]
OPS = tuple(dict.fromkeys(case.op for case in CPU))

TOKENS, BFLOAT16 = 16384, ("bfloat16",)
GPU = [  # the most important first: a run that has no time left omits the rest
    case(ops.attention, 16, 12, 1024, 1024, 64, True, standard=BFLOAT16),
    case(ops.mlp, 16, 1024, 768, "gelu_tanh", standard=BFLOAT16),
    case(ops.layer_norm, TOKENS, 768, standard=BFLOAT16),
    case(ops.attention, 2, 32, 8192, 8192, 128, True, standard=BFLOAT16),
    case(ops.mlp, 16, 1024, 1600, "gelu_tanh", standard=BFLOAT16),
    case(ops.linear, TOKENS, 768, 3072),
    case(ops.attention, 16, 25, 1024, 1024, 64, True, standard=BFLOAT16),
    case(ops.add_layer_norm, TOKENS, 768),
    case(ops.layer_norm, TOKENS, 4096, standard=BFLOAT16),
    case(ops.mlp, 16, 1024, 4096, "gelu_tanh", standard=BFLOAT16),
    case(ops.rms_norm, TOKENS, 768, standard=BFLOAT16),
    case(ops.gelu, TOKENS, 3072, "tanh"),
    case(ops.attention, 16, 12, 1024, 1024, 64, False),
    case(ops.linear, TOKENS, 1600, 6400),
    case(ops.layer_norm, TOKENS, 1600, standard=BFLOAT16),
    case(ops.attention, 2, 32, 8192, 8192, 128, False),
    case(ops.linear, TOKENS, 4096, 16384),
    case(ops.add_layer_norm, TOKENS, 1600),
    case(ops.add_layer_norm, TOKENS, 4096),
    case(ops.attention, 1, 32, 16384, 16384, 128, True),
    case(ops.rms_norm, TOKENS, 1600, standard=BFLOAT16),
    case(ops.rms_norm, TOKENS, 4096, standard=BFLOAT16),
    case(ops.gelu, TOKENS, 3072, "none"),
    case(ops.relu, TOKENS, 3072),
]
PREDICTED = tuple(GPU[i] for i in (0, 1, 2, 3, 8, 9))  # the shapes that goals.py has expectations of


# ------------------------------------------------------------------------------- other shapes
SWEEP = [256 << i for i in range(7)]  # sequence lengths


def sweep(longest: int) -> list[Case]:
    """Causal attention at growing length, which shows how time and memory grow."""
    return [case(ops.attention, 1, 12, T, T, 64, True) for T in SWEEP if T <= longest]


def first_of_each_op(cases: list[Case]) -> list[Case]:
    return list({case.op: case for case in reversed(cases)}.values())[::-1]


def tiny(cases: list[Case]) -> list[Case]:
    """The same ops on sizes that the emulator and Triton's interpreter can run."""
    small = {"attention": {"B": 1, "H": 2, "L": 40, "S": 40, "D": 16}, "linear": {"M": 32, "K": 24, "N": 96}}
    small["mlp"] = {"B": 1, "T": 24, "C": 32}
    found = [case(c.setup, *(c.dims | small.get(c.op, {"N": 48, "C": 24})).values()) for c in cases]
    return list(dict.fromkeys(found))


def custom(text: str, wanted_ops) -> list[Case]:
    """``B=1,H=12,T=512,D=64`` for every op that has these dimensions; its first case has the others.

    T is L and S of attention. ValueError says what is wrong.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if bad := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise ValueError(f"wants KEY=VALUE,..., got {bad[0] or text!r}")
    given = {key: value for key, _, value in pairs}
    found, known = [], []
    for first in first_of_each_op([c for c in CPU if c.op in wanted_ops]):
        requested = dict(given)
        if first.op == "attention" and "T" in requested:
            length = requested.pop("T")
            requested = {"L": length, "S": length} | requested
        known.append(f"{first.op}: {', '.join(dimensions(first.setup))}")
        if set(requested) <= set(first.dims):
            dims = first.dims | {key: _value(key, value, first.dims[key]) for key, value in requested.items()}
            found.append(case(first.setup, *dims.values()))
    if not found:
        raise ValueError(f"no op has the dimensions {', '.join(given)}; they are {'; '.join(known)}")
    return found


WORDS = {"activation": tuple(ACTIVATIONS), "approximate": ("none", "tanh"), "causal": ("0", "1")}


def _value(key: str, text: str, default):
    """One value of a custom shape, of the type of ``default``."""
    if key in WORDS:
        if text not in WORDS[key]:
            raise ValueError(f"{key} must be one of {', '.join(WORDS[key])}; got {text!r}")
        return text == "1" if isinstance(default, bool) else text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{key} must be a positive integer, got {text!r}")
    return int(text)
