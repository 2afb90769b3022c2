"""Sharding rules: how the ops run on the local shards of DTensors (torch.distributed.tensor).

For one dimension of a device mesh, a rule gives placements of the arguments with which the call on each rank computes
that rank's part of the results, and the placements of those results. DTensor combines the rules over the mesh's
dimensions, takes the combination that moves the least data, and redistributes arguments that are placed otherwise. Full
replication is always a rule.

`dispatch` imports this module when the first DTensor arrives, which registers the rules for the ops of every backend.
The functions that register them are private to torch. In a torch without them nothing is registered, and PyTorch's own
functions serve DTensors.
"""

import math
from functools import partial

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..dispatch import SHARDED, TABLE
from ..ops.activation import GATED, SAVES_INPUT

# R: replicated. P: a partial sum. A digit: sharded in this dimension. last: sharded in the last dimension of the first
# argument. rows: sharded in one of its other dimensions. any: in any of its dimensions. Each dimension is its own rule.
# batch3, batch2: sharded in the first of so many dimensions, or replicated if it has fewer, or one entry for all.
# -: an argument that is no tensor.
RULES = {
    "gelu_fwd": ["any -> any"],  # x -> y
    "gelu_bwd": ["any any -> any"],  # dy, x -> dx
    "relu_fwd": ["any -> any"],  # x -> y
    "relu_bwd": ["any any -> any"],  # dy, y -> dx
    "layer_norm_fwd": ["rows R R -> rows rows rows"],  # x, weight, bias -> y, mean, rstd
    "layer_norm_bwd": ["rows rows R rows rows -> rows P P"],  # dy, x, weight, mean, rstd -> dx, dw, db
    "add_layer_norm_fwd": ["rows rows R R -> rows rows rows rows"],  # x, residual, weight, bias -> y, s, mean, rstd
    "add_layer_norm_bwd": ["rows rows rows R rows rows -> rows P P"],  # dy, ds, s, weight, mean, rstd -> dx, dw, db
    "rms_norm_fwd": ["rows R -> rows rows"],  # x, weight -> y, rstd
    "rms_norm_bwd": ["rows rows R rows -> rows P"],  # dy, x, weight, rstd -> dx, dw
    "add_rms_norm_fwd": ["rows rows R -> rows rows rows"],  # x, residual, weight -> y, s, rstd
    "add_rms_norm_bwd": ["rows rows rows R rows -> rows P"],  # dy, ds, s, weight, rstd -> dx, dw
    "dropout_add_layer_norm_fwd": ["rows rows R R -> rows rows rows rows"],  # without dropout
    "dropout_add_layer_norm_bwd": ["rows rows rows R rows rows -> rows rows P P"],  # -> dx, dresidual, dw, db
    "dropout_add_rms_norm_fwd": ["rows rows R -> rows rows rows"],
    "dropout_add_rms_norm_bwd": ["rows rows rows R rows -> rows rows P"],
    # Losses of rows; their sum and their mean, which needs the totals of all ranks, are formed of the whole.
    "cross_entropy_fwd": ["0 0 - R -> 0 1 P"],  # x, target, ignore_index, weight -> loss, stats, totals
    "cross_entropy_bwd": ["0 0 0 1 P - R -> 0"],  # dloss, x, target, stats, totals, ignore_index, weight -> dx
    "linear_fwd": [  # x, weight, bias -> y
        "rows R R -> rows",
        "R 0 0 -> last",
        "last 1 P -> P",  # each rank adds its partial bias, and the partial biases sum to the whole one
    ],
    "linear_bwd": [  # dy, x, weight -> dx, dw, db
        "rows rows R -> rows P P",
        "last R 0 -> P 0 0",
        "R last 1 -> last 1 R",
    ],
    "mlp_fwd": [  # x, fc_weight, fc_bias, proj_weight, proj_bias -> y, hidden, pre; gated, only by rows
        "rows R R R R -> rows rows rows",
        "R 0 0 1 P -> P last last",
    ],
    "mlp_bwd": [  # dy, x, fc_weight, proj_weight, hidden, pre -> dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias
        "rows rows R R rows rows -> rows P P P P",
        "R R 0 1 last last -> P 0 0 1 R",
    ],
    "attention_fwd": [  # q, k, v -> out, lse; with a tensor among the options, only the whole is computed
        "0 0 0 -> 0 0",  # by batch
        "1 1 1 -> 1 1",  # by heads
    ],
    "attention_bwd": [  # dout, dlse, q, k, v, out, lse -> dq, dk, dv, and the options' gradients, which are empty
        "0 0 0 0 0 0 0 -> 0 0 0 R R R",
        "1 1 1 1 1 1 1 -> 1 1 1 R R R",
    ],
    "qkv_attention_fwd": ["0 -> 0 0"],  # qkv -> out, lse; by batch
    "qkv_attention_bwd": ["0 0 0 0 -> 0"],  # dout, qkv, out, lse -> dqkv
    "varlen_attn_fwd": ["1 1 1 R R R -> 1 0"],  # q, k, v, cu_seq_q, cu_seq_k, seqused_k -> out, lse; by heads
    # dout, dlse, q, k, v, out, lse, needs, cu_seq_q, cu_seq_k, seqused_k -> dq, dk, dv
    "varlen_attn_bwd": ["1 0 1 1 1 1 0 - R R R -> 1 1 1"],
    "rope_fwd": [  # q, k, cos, sin, q_weight, k_weight, position_ids -> q, k, q_rstd, k_rstd
        "0 0 batch3 batch3 R R batch2 -> 0 0 0 0",
        "1 1 R R R R R -> 1 1 1 1",
    ],
    # dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, q_rstd, k_rstd, position_ids -> dq, dk, dq_weight, dk_weight
    "rope_bwd": [
        "0 0 0 0 batch3 batch3 R R 0 0 batch2 -> 0 0 P P",
        "1 1 1 1 R R R R 1 1 R -> 1 1 P P",
    ],
}


def placements(name: str, args, results: int, ranks=()) -> list[tuple[list, list]]:
    """The rules for a call of torch.ops.pygpt.<name>: (placements of its results, of the tensors among ``args``).

    args: the call's arguments. Anything with a shape stands for a tensor. ranks: the sizes of the mesh.
    """
    tensors = [a for a in args if hasattr(a, "shape")]
    ndim = len(tensors[0].shape)
    strided = [
        p for p in getattr(tensors[0], "placements", ()) if hasattr(p, "split_factor")
    ]  # which views of sharded tensors have
    every = [*map(Shard, range(ndim)), *strided]
    choices = {"any": every, "rows": [p for p in every if p.dim < ndim - 1]}
    fixed = {"R": Replicate(), "P": Partial(), "0": Shard(0), "1": Shard(1), "last": Shard(ndim - 1)}
    rules: list[tuple[list, list]] = [([Replicate()] * results, [Replicate()] * len(tensors))]
    for rule in RULES.get(name, ()):
        of_args, of_results = (side.split() for side in rule.split("->"))
        words = [word for word, a in zip(of_args, args, strict=False) if hasattr(a, "shape")]
        by_heads = name.split("_")[0] in ("attention", "varlen") and of_args[0] == "1"
        if name.startswith("cross_entropy") and "none" not in [a for a in args if isinstance(a, str)]:
            continue
        if len(words) != len(tensors) or (by_heads and _splits_groups(tensors, ranks)):
            continue
        if of_args[0] == "R" and any(a in GATED for a in args if isinstance(a, str)):
            continue  # a rank would have gates without their values
        words = ["R" if t.shape == (0,) else _by_batch(word, t) for word, t in zip(words, tensors, strict=True)]
        of_results = [word if made else "R" for word, made in zip(of_results, _made(name, args, results), strict=True)]
        for choice in choices.get(of_args[0], [None]):
            meaning = {**fixed, of_args[0]: choice} if choice else fixed
            rules.append(([meaning[word] for word in of_results], [meaning[word] for word in words]))
    return rules


def _by_batch(word: str, t) -> str:
    """What a word batch3 or batch2 means for this tensor; other words as they are."""
    if not word.startswith("batch"):
        return word
    return "0" if len(t.shape) == int(word[-1]) and t.shape[0] != 1 else "R"


def _splits_groups(tensors, ranks) -> bool:
    """Whether query heads and key heads that belong together would come to different ranks."""
    heads = {t.shape[1] for t in tensors if len(t.shape) == len(tensors[0].shape)}
    return len(heads) > 1 and min(heads) % math.prod(ranks) != 0


def _made(name: str, args, results: int) -> list[bool]:
    """Which results are computed. The others have shape (0,)."""
    needs = next((a for a in args if isinstance(a, list)), None)
    if needs is not None and name.endswith("_bwd"):
        return [*needs, *[False] * (results - len(needs))]
    if name == "rope_fwd":
        return [True, *(args[i] is not None for i in (1, 4, 5))]
    if name == "mlp_fwd":
        saves = list(args[6:]) != ["input"]
        return [True, saves, saves and args[5] in SAVES_INPUT]
    return [True] * results


try:
    from torch.distributed.tensor._op_schema import OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy, register_op_strategy
except ImportError:
    pass
else:

    def _strategy(name, schema):
        args = [a.strategies[0].output_spec if isinstance(a, OpStrategy) else a for a in schema.args_schema]
        results, mesh = len(schema.op._schema.returns), schema.get_mesh_from_args()
        rules = [[*of_results, *of_args] for of_results, of_args in placements(name, args, results, mesh.shape)]
        return expand_to_full_mesh_op_strategy(mesh, schema, rules, input_index=results)

    # The public function register_sharding caches a rule by the tensors alone, whatever the other arguments are.
    _by_all_arguments = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
    for _row in TABLE.values():
        for _name, _overload in vars(_row.registered).items() if _row.registered else ():
            register_op_strategy(_overload, _by_all_arguments)(partial(_strategy, _name))
    SHARDED.add(DTensor)
