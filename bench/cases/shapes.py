"""Other shapes than ops.py lists: a sweep of attention, the user's own, and tiny ones for a rehearsal."""

from . import ops
from .ops import ACTIVATIONS, Case, case, dimensions

SWEEP = [256 << i for i in range(7)]  # sequence lengths


def sweep(longest: int) -> list[Case]:
    """Causal attention at growing length, which shows how time and memory grow."""
    return [case(ops.attention, 1, 12, T, T, 64, True) for T in SWEEP if T <= longest]


def first_of_each_op(cases: list[Case]) -> list[Case]:
    return list({case.op: case for case in reversed(cases)}.values())[::-1]


def tiny(cases: list[Case]) -> list[Case]:
    """Returns the same ops on sizes that the emulator and Triton's interpreter can run."""
    attention = {"B": 1, "H": 2, "L": 40, "S": 40, "E": 16}
    small = {"attention": attention, "attention_mask": attention, "attention_gqa": attention | {"H": 1, "group": 2}}
    small |= {"attention_window": attention | {"left": 9}, "varlen_attn": {"N": 3, "H": 2, "L": 20, "S": 20, "E": 16}}
    small |= {"qkv_attention": {"B": 1, "H": 1, "group": 2, "L": 24, "E": 16}}
    small |= {"rope": {"B": 1, "H": 1, "group": 2, "T": 16, "D": 16}}
    small |= {"linear": {"M": 32, "K": 24, "N": 96}}
    small |= {"mlp": {"M": (1, 24), "C": 32}, "gelu": {"M": (48, 24)}, "relu": {"M": (48, 24)}}
    small |= {"cross_entropy": {"N": 48, "V": 24}, "linear_cross_entropy": {"N": 48, "K": 24, "V": 40}}
    return list(dict.fromkeys(case(c.setup, *(c.dims | small.get(c.op, {"M": 48, "N": 24})).values()) for c in cases))


def custom(text: str, wanted_ops) -> list[Case]:
    """``B=1,H=12,L=512,E=64`` for every op that has these dimensions; its first case has the others.

    The names are those of `pygpt verify --shape`, and S is L there, too. ValueError says what is wrong.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if bad := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise ValueError(f"wants KEY=VALUE,..., got {bad[0] or text!r}")
    given = {key: value for key, _, value in pairs}
    served, known = [], []
    for first in first_of_each_op([c for c in ops.CPU if c.op in wanted_ops]):
        requested = dict(given)
        if {"L", "S"} <= set(first.dims) and "L" in requested:
            requested.setdefault("S", requested["L"])
        known.append(f"{first.op}: {', '.join(dimensions(first.setup))}")
        if set(requested) <= set(first.dims):
            dims = first.dims | {key: _value(key, value, first.dims[key]) for key, value in requested.items()}
            served.append(case(first.setup, *dims.values()))
    if not served:
        raise ValueError(f"no op has the dimensions {', '.join(given)}; they are {'; '.join(known)}")
    return served


WORDS = {"activation": tuple(ACTIVATIONS), "approximate": ("none", "tanh"), "causal": ("0", "1")}


def _value(key: str, text: str, default):
    """Converts one value of a custom shape to the type of ``default``."""
    if key in WORDS:
        if text not in WORDS[key]:
            raise ValueError(f"{key} must be one of {', '.join(WORDS[key])}; got {text!r}")
        return text == "1" if isinstance(default, bool) else text
    sizes = text.split("x") if key == "M" else [text]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        several = " or several, such as 8x128" if key == "M" else ""
        raise ValueError(f"{key} must be a positive integer{several}, got {text!r}")
    return int(text) if len(sizes) == 1 else tuple(map(int, sizes))
