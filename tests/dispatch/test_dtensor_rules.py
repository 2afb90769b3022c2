"""Every sharding rule of DTensors, one by one and without processes, gives what the whole op gives."""

import importlib
import inspect
from itertools import product

import pytest
import torch

from pygpt.dispatch import OPS

F64 = torch.float64


def rules():
    """The module; importing it imports torch.distributed.tensor."""
    return importlib.import_module("pygpt.integrations.dtensor")


DIMS = {
    "linear": {"M": (3, 5), "K": 7, "N": 9, "bias": 1},
    "mlp": {"M": (3, 5), "C": 7, "H": 11, "O": 4, "bias": 1, "activation": "gelu", "save": "all"},
    "attention": {"B": 3, "H": 5, "L": 6, "S": 7, "E": 8, "Ev": 4, "causal": 1},
    "qkv_attention": {"B": 3, "H": 5, "group": 1, "L": 6, "E": 8, "causal": 1, "left": 3, "dropout": 0.0},
    "varlen_attn": {"N": 3, "H": 5, "group": 1, "L": 6, "S": 7, "E": 8, "Ev": 4, "left": -1, "right": 0, "used": 1},
    "layer_norm": {"M": (3, 5), "N": 7, "affine": 1, "mean": 0.0},
    "gelu": {"M": (3, 5, 4), "gain": 1.0, "approximate": "tanh"},
    "rope": {"B": 3, "H": 5, "group": 1, "T": 4, "D": 8, "R": 6, "norm": 1, "interleaved": 0, "positions": 1},
}
DIMS |= {
    "cross_entropy": {
        "N": 5,
        "V": 7,
        "mean": 0.0,
        "gain": 1.0,
        "ignored": 3,
        "weight": 1,
        "reduction": "none",
        "smoothing": 0.1,
        "z": 0.1,
    }
}
UNREAD = {"cross_entropy_bwd": "P"}  # the word of an argument, here totals, that these dims do not read
DIMS |= dict.fromkeys(("rms_norm", "add_layer_norm", "add_rms_norm"), DIMS["layer_norm"]) | {"relu": DIMS["gelu"]}
DIMS |= {"dropout_add_layer_norm": DIMS["layer_norm"] | {"dropout": 0.0}}
DIMS |= {"dropout_add_rms_norm": DIMS["layer_norm"] | {"dropout": 0.0, "offset": 1.0}}
NAMES = [f"{op}_{direction}" for op in DIMS for direction in ("fwd", "bwd")]  # an op without rules is replicated


def test_every_rule_is_tested():
    assert set(rules().RULES) == set(NAMES)


def draw(*shape):
    return torch.randn(shape, dtype=F64)


def call(name, args):
    results = getattr(torch.ops.pygpt, name)(*args)
    return results if isinstance(results, tuple) else (results,)


SAVED = {  # the results of <op>_fwd, by the names that <op>_bwd has for them
    "attention": ("out", "lse"),
    "qkv_attention": ("out", "lse"),
    "varlen_attn": ("out", "lse"),
    "mlp": ("y", "hidden", "pre"),
    "layer_norm": ("y", "mean", "rstd"),
    "add_layer_norm": ("y", "s", "mean", "rstd"),
    "rms_norm": ("y", "rstd"),
    "add_rms_norm": ("y", "s", "rstd"),
    "rope": ("q_out", "k_out", "q_rstd", "k_rstd"),
    "cross_entropy": ("loss", "stats", "totals"),
    "dropout_add_layer_norm": ("y", "s", "mean", "rstd"),
    "dropout_add_rms_norm": ("y", "s", "rstd"),
}


def results_of(name):
    return getattr(torch.ops.pygpt, name).default._schema.returns


def arguments(name):
    """Arguments of torch.ops.pygpt.<name>; those of a backward op come from a forward one, by their names."""
    op, direction = OPS[name[:-4]], name[-3:]
    spec = op.specs[op.name]
    args = spec.canonical(*spec.draw(draw, DIMS[op.name]))
    if direction == "fwd":
        return args
    values = {n: p.default for n, p in inspect.signature(op.fwd).parameters.items()}
    values |= zip(values, args, strict=False)
    values |= zip(SAVED.get(op.name, ("y",)), call(f"{op.name}_fwd", args), strict=True)
    values["needs"] = [True] * (3 if op.name == "attention" else len(results_of(f"{op.name}_bwd")))
    return [
        values[p] if p in values else torch.randn_like(values[p.removeprefix("d")])
        for p in inspect.signature(op.bwd).parameters
    ]


def split(t, placement, ranks):
    """What each rank has of it. The parts of a partial sum are as different as can be."""
    if placement.is_shard():
        return t.tensor_split(ranks, placement.dim)
    if placement.is_replicate():
        return [t] * ranks
    weights = draw(ranks)
    return [t * w for w in weights / weights.sum()]


def merged(parts, placement):
    if placement.is_shard():
        return torch.cat(parts, placement.dim)
    if placement.is_replicate():
        for part in parts:
            torch.testing.assert_close(part, parts[0])
        return parts[0]
    return sum(parts)


def check_rule(name, args, of_results, of_args, ranks):
    """AssertionError or an op's refusal unless the ranks' own calls make up the whole one."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    local = [split(t, p, ranks) for t, p in zip(tensors, of_args, strict=True)]
    results = []
    for on_rank in map(iter, zip(*local, strict=True)):
        results.append(call(name, [next(on_rank) if isinstance(a, torch.Tensor) else a for a in args]))
    for whole, placement, *parts in zip(call(name, args), of_results, *results, strict=True):
        torch.testing.assert_close(merged(parts, placement), whole)


def placements(name, args):
    return rules().placements(name, args, len(results_of(name)))


@pytest.mark.parametrize("name", NAMES)
def test_each_rule_gives_the_whole(name):
    args = arguments(name)
    found = placements(name, args)
    sharded = {"gelu": {0, 1, 2}, "relu": {0, 1, 2}, "varlen_attn": {1}, "qkv_attention": {0}, "cross_entropy": {0}}
    dims = sharded.get(name[:-4], {0, 1})  # at least these can be sharded in the first
    assert dims <= {of_args[0].dim for _, of_args in found if of_args[0].is_shard()}
    for (of_results, of_args), ranks in product(found, (2, 3)):
        check_rule(name, args, of_results, of_args, ranks)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_rule_is_noticed(name, monkeypatch):
    """Every rule, with any one of its placements replaced by any other, fails the check above."""
    args, tried = arguments(name), 0
    for rule in rules().RULES[name]:
        monkeypatch.setitem(rules().RULES, name, [rule])
        right, (first, *words) = placements(name, args), rule.split()
        for i, other in product(range(len(words)), ("R", "P", "0", "1", "last")):
            if words[i] in ("->", "-", UNREAD.get(name)):
                continue
            monkeypatch.setitem(rules().RULES, name, [" ".join([first, *words[:i], other, *words[i + 1 :]])])
            if (wrong := placements(name, args)) == right:
                continue
            tried += 1
            with pytest.raises((AssertionError, RuntimeError, IndexError)):
                for of_results, of_args in wrong:
                    check_rule(name, args, of_results, of_args, 2)
    assert tried >= 3 * len(rules().RULES[name])


@pytest.mark.parametrize(
    "kv_heads, ranks, found",
    [(2, (2,), True), (2, (4,), False), (4, (4,), True), (6, (2, 2), False), (12, (2, 2), True)],
)
def test_groups_of_heads_are_not_split(kv_heads, ranks, found):
    q, k = torch.empty(1, 12, 3, 8), torch.empty(1, kv_heads, 3, 8)
    rules_of = rules().placements("attention_fwd", [q, k, k, True, 1.0], 2, ranks)
    assert any(of_args[0].is_shard(1) for _, of_args in rules_of) == found
