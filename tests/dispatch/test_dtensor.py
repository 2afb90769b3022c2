"""DTensors: every sharding rule gives what the whole op gives, and is what runs: no rank sends anything to another.

Rules are checked one by one without processes; calls of the public functions on a mesh that only pretends to have other
ranks (placements and collectives), on one of a single rank, and with two gloo processes (values and gradients).
"""

import importlib
import inspect
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist

import pygpt
import pygpt.functional as F
from pygpt import dispatch
from pygpt.dispatch import OPS
from tests.dispatch.test_ecosystem import Count, in_processes  # noqa: F401 (a fixture)

GPU_SHARE = {"triton": 1}
F64 = torch.float64


def rules():
    """The module; importing it imports torch.distributed.tensor."""
    return importlib.import_module("pygpt.integrations.dtensor")


# ------------------------------------------------------------------------------- the rules, one by one
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


# ------------------------------------------------------------------------------- what calls do with them
def placed(word):
    from torch.distributed.tensor import Partial, Replicate, Shard

    return {"R": Replicate(), "P": Partial()}[word] if word in ("R", "P") else Shard(word)


def replicated(t, like):
    """t on the mesh of ``like``, if that has one."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(like, DTensor):
        return t
    return DTensor.from_local(t, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


@dataclass(frozen=True)
class Case:
    """A public function's call, and how its tensors, its results and its gradients are placed."""

    function: object
    shapes: tuple
    tensors: tuple
    results: tuple
    grads: tuple


def groups():
    """Cases of one call each; the first is by batch."""
    x, of_x = (4, 5, 8), (8,)

    def group(function, shapes, *of_cases):
        return [Case(function, shapes, *of_case) for of_case in of_cases]

    yield group(
        F.linear,
        (x, (10, 8), (10,)),
        ((0, "R", "R"), (0,), (0, "P", "P")),
        ((1, "R", "R"), (1,), (1, "P", "P")),
        (("R", 0, 0), (2,), ("P", 0, 0)),
        ((2, 1, "R"), ("P",), (2, 1, "R")),
        (("R", "R", "R"), ("R",), ("R", "R", "R")),
    )
    without_bias = ((0, "R"), (0,), (0, "P")), (("R", 0), (2,), ("P", 0)), ((2, 1), ("P",), (2, 1))
    yield group(F.linear, (x, (10, 8)), *without_bias)
    for activation, save in product(("gelu", "gelu_tanh", "relu", "relu2"), ("all", "input")):
        yield group(
            partial(F.mlp, activation=activation, save=save),
            (x, (12, 8), (12,), (6, 12), (6,)),
            ((0, *"RRRR"), (0,), (0, *"PPPP")),
            ((1, *"RRRR"), (1,), (1, *"PPPP")),
            (("R", 0, 0, 1, "R"), ("P",), ("P", 0, 0, 1, "R")),
        )
    for activation, save in product(("swiglu", "geglu"), ("all", "input")):  # whose columns no rule splits
        yield group(
            partial(F.mlp, activation=activation, save=save),
            (x, (24, 8), (24,), (6, 12), (6,)),
            ((0, *"RRRR"), (0,), (0, *"PPPP")),
            ((1, *"RRRR"), (1,), (1, *"PPPP")),
        )

    def layer_norm(x, *parameters):
        return F.layer_norm(x, (8,), *parameters)

    def layer_norm_of_two(x, *parameters):
        return F.layer_norm(x, (4, 2), *parameters)

    def rms_norm(x, *parameters):
        return F.rms_norm(x, (8,), *parameters)

    def add_layer_norm(x, residual, *parameters):
        return F.add_layer_norm(x, residual, (8,), *parameters)

    def add_rms_norm(x, residual, *parameters):
        return F.add_rms_norm(x, residual, (8,), *parameters)

    def dropout_add_layer_norm(x, residual, *parameters):
        return F.dropout_add_layer_norm(x, residual, (8,), *parameters)

    def dropout_add_rms_norm(x, residual, *parameters):
        return F.dropout_add_rms_norm(x, residual, (8,), *parameters)

    for function, shapes, n in (
        (layer_norm, (x, of_x, of_x), 1),
        (layer_norm, (x,), 1),
        (layer_norm_of_two, ((4, 5, 4, 2), (4, 2)), 1),
        (rms_norm, (x, of_x), 1),
        (rms_norm, (x,), 1),
        (add_layer_norm, (x, x, of_x, of_x), 2),
        (add_layer_norm, (x, x), 2),
        (add_rms_norm, (x, x, of_x), 2),
        (add_rms_norm, (x, x), 2),
        (dropout_add_layer_norm, (x, x, of_x, of_x), 2),
        (dropout_add_rms_norm, (x, x, of_x), 2),
    ):
        p = len(shapes) - n  # parameters
        yield group(function, shapes, *(((d,) * n + ("R",) * p, (d,) * n, (d,) * n + ("P",) * p) for d in (0, 1)))
    for function in (F.gelu, partial(F.gelu, approximate="tanh"), F.relu):
        yield group(function, (x,), *(((d,),) * 3 for d in (0, 1, 2)))
    for causal, lse in product((False, True), repeat=2):
        attention = partial(F.scaled_dot_product_attention, is_causal=causal, return_lse=lse)
        shapes = (4, 3, 5, 8), (4, 3, 6, 8), (4, 3, 6, 4)
        yield group(attention, shapes, *(((d,) * 3, (d,) * (1 + lse), (d,) * 3) for d in (0, 1)))

    def rope(q, k, *weights):
        angles = torch.arange(15, dtype=F64).view(5, 3)
        cos, sin = (replicated(t, q) for t in (angles.cos(), angles.sin()))
        return F.rope(q, k, cos, sin, **dict(zip(("q_weight", "k_weight"), weights, strict=False)))

    for p in (0, 1, 2):  # weights
        shapes = (4, 4, 5, 8), (4, 6, 5, 8), *[of_x] * p
        yield group(rope, shapes, *(((d, d, *["R"] * p), (d, d), (d, d, *["P"] * p)) for d in (0, 1)))


CASES = [(group[0], case) for group in groups() for case in group]


def check_call(mesh, by_batch, case, values):
    """Placements of a call and of its gradients, for which no rank sends anything: by batch on all dimensions of the
    mesh but the last, and there the case's own.

    values: whether to ask all ranks for the whole tensors, and compare those with the same call without a mesh.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    sides = [by_batch] * (mesh.ndim - 1) + [case]
    tensors, results, grads = (
        [list(map(placed, words)) for words in zip(*(getattr(side, of) for side in sides), strict=True)]
        for of in ("tensors", "results", "grads")
    )
    random = torch.Generator().manual_seed(0)  # the same on every rank
    whole = [torch.randn(shape, dtype=F64, generator=random).requires_grad_() for shape in case.shapes]
    want = several(case.function(*whole))
    upstream = [torch.randn(y.shape, dtype=F64, generator=random) for y in want]
    sharded = [distribute_tensor(t.detach(), mesh, p).requires_grad_() for t, p in zip(whole, tensors, strict=True)]
    of_upstream = [[Replicate() if p.is_partial() else p for p in of_result] for of_result in results]
    upstream_sharded = [distribute_tensor(g, mesh, p) for g, p in zip(upstream, of_upstream, strict=True)]
    with CommDebugMode() as sent:
        got = several(case.function(*sharded))
        torch.autograd.backward(got, upstream_sharded)
    assert sent.get_total_counts() == 0, sent.get_comm_counts()
    assert [list(y.placements) for y in got] == results
    assert [list(t.grad.placements) for t in sharded] == grads
    assert [y.shape for y in got] == [y.shape for y in want]
    assert [t.grad.shape for t in sharded] == [t.shape for t in whole]
    if values:
        torch.autograd.backward(want, upstream)
        torch.testing.assert_close([y.full_tensor() for y in got], want)
        torch.testing.assert_close([t.grad.full_tensor() for t in sharded], [t.grad for t in whole])


def several(results):
    return list(results) if isinstance(results, tuple) else [results]


@pytest.fixture
def mesh(request):
    """A mesh on which this process is rank 0, and the others only pretend."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shape = getattr(request, "param", (1,))
    dist.init_process_group("fake", rank=0, world_size=torch.Size(shape).numel(), store=FakeStore())
    yield init_device_mesh("cpu", shape)
    dist.destroy_process_group()


def on_shards(mesh):
    return pytest.mark.parametrize("mesh", mesh, indirect=True, ids=str)


@on_shards([(1,), (3,), (2, 2)])
def test_calls_run_on_shards(mesh):
    for by_batch, case in CASES:
        check_call(mesh, by_batch, case, values=mesh.size() == 1)


def _calls(rank, world):
    """Odd sizes too: the ranks' shards differ, and one may be empty."""
    from torch.distributed.device_mesh import init_device_mesh

    for shape in ((world,), (world, 1)):
        mesh = init_device_mesh("cpu", shape)
        for by_batch, case in CASES:
            check_call(mesh, by_batch, case, values=True)


def _a_wrong_rule(rank, world):
    """A bias that every rank adds, and a weight whose gradient is not summed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    mesh = init_device_mesh("cpu", (world,))
    by_batch, *_, row, _ = [case for _, case in CASES if case.function is F.linear and len(case.shapes) == 3]
    check_call(mesh, row, row, values=True)
    for name, right, wrong, case in (
        ("linear_fwd", "last 1 P -> P", "last 1 R -> P", row),
        ("linear_bwd", "rows rows R -> rows P P", "rows rows R -> rows R R", replace(by_batch, grads=(0, "R", "R"))),
    ):
        i = rules().RULES[name].index(right)
        rules().RULES[name][i] = wrong
        _clear_sharding_prop_cache()
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            check_call(mesh, case, case, values=True)


@pytest.mark.slow
@pytest.mark.parametrize("function", [_calls, _a_wrong_rule])
def test_values_on_two_ranks(function, in_processes):  # noqa: F811
    in_processes(2, function)


# ------------------------------------------------------------------------------- around the rules
def shards(mesh, *shapes_and_words, dtype=F64):
    from torch.distributed.tensor import distribute_tensor

    return [
        distribute_tensor(torch.randn(shape, dtype=dtype), mesh, [placed(w) for w in words]).requires_grad_()
        for shape, *words in shapes_and_words
    ]


def tensor_parallel_mlp(mesh, dtype=F64):
    return shards(mesh, ((4, 6, 8), "R"), ((12, 8), 0), ((12,), 0), ((8, 12), 1), ((8,), "R"), dtype=dtype)


@on_shards([(2,)])
def test_a_call_keeps_no_rule_of_another(mesh):
    """Which gradients are wanted, and whether the hidden layer is kept twice, changes from call to call."""
    from torch.distributed.tensor.debug import CommDebugMode

    want = [[placed(w)] for w in ("P", 0, 0, 1, "R")]
    for needs in ([1, 0, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]):
        for activation in ("relu", "gelu"):
            tensors = [t.requires_grad_(bool(need)) for t, need in zip(tensor_parallel_mlp(mesh), needs, strict=True)]
            with CommDebugMode() as sent:
                y = F.mlp(*tensors, activation)
                y.backward(torch.ones_like(y))
            assert sent.get_total_counts() == 0
            for t, need, p in zip(tensors, needs, want, strict=True):
                assert (t.grad.shape == t.shape and list(t.grad.placements) == p) if need else t.grad is None


@on_shards([(2, 2)])
def test_shards_of_a_view(mesh):
    """Rows that are sharded in two dimensions, then flattened, stay where they are."""
    from torch.distributed.tensor.debug import CommDebugMode

    x, weight = shards(mesh, ((4, 6, 8), 0, 1), ((10, 8), "R", "R"))
    flat = x.reshape(24, 8)
    assert hasattr(flat.placements[1], "split_factor")
    with CommDebugMode() as sent:
        y = F.gelu(F.linear(F.rms_norm(flat, (8,)), weight))
        y.backward(torch.ones_like(y))
    assert sent.get_total_counts() == 0
    assert y.placements == flat.placements and x.grad.placements == x.placements


@on_shards([(2,)])
def test_what_is_placed_otherwise_is_redistributed(mesh):
    """As by torch's own functions. Here the last dimension is sharded, of which a norm needs all."""
    from torch.distributed.tensor.debug import CommDebugMode

    x, weight = shards(mesh, ((4, 6, 8), 2), ((8,), 0))
    with CommDebugMode() as sent:
        y = F.layer_norm(x, (8,), weight)
    assert sent.get_total_counts() > 0
    assert y.shape == x.shape and not y.placements[0].is_shard(2)


@on_shards([(1,), (2,), (2, 2)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_losses_of_shards(reduction, mesh):
    """Nothing is sent for those of rows. The others are of the whole."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    placements, classes = [Shard(0)] * mesh.ndim, torch.randint(9, (8,))
    (x,) = shards(mesh, ((8, 9), *[0] * mesh.ndim))
    target = distribute_tensor(classes, mesh, placements)
    with CommDebugMode() as sent:
        loss = F.cross_entropy(x, target, reduction=reduction)
        loss.sum().backward()
    if reduction == "none":
        assert sent.get_total_counts() == 0 and list(loss.placements) == placements
    assert x.grad.shape == x.shape and loss.shape == classes.shape[: reduction == "none"]
    if mesh.size() == 1:
        whole = x.full_tensor().detach().requires_grad_()
        want = torch.nn.functional.cross_entropy(whole, classes, reduction=reduction)
        want.sum().backward()
        torch.testing.assert_close([loss.full_tensor(), x.grad.full_tensor()], [want, whole.grad])


@on_shards([(2,)])
def test_a_module_of_shards(mesh):
    """Parameters placed by hand, without hooks: the layers are still one op, and by its rule."""
    module = pygpt.nn.MLP(8, 12, dtype=F64)
    x, *parameters = tensor_parallel_mlp(mesh)
    for (name, _), p in zip(list(module.named_parameters()), parameters, strict=True):
        layer, name = name.split(".")
        module.get_submodule(layer).register_parameter(name, torch.nn.Parameter(p.detach()))
    with Count(torch.ops.pygpt.mlp_fwd.default) as count:
        y = module(x)
    assert count.calls == 1
    assert list(y.placements) == [placed("P")]


def test_what_has_no_kernel_is_pytorchs(mesh):
    q, x = shards(mesh, ((1, 1, 5, 513), "R"), ((2, 8), "R"))
    choice = pygpt.explain("scaled_dot_product_attention", q, q, q)
    assert choice.backend == "torch" and choice.rejected["cpp"] == ["head dimension above 512"]
    assert pygpt.explain("gelu", x).backend == "cpp"


@pytest.mark.parametrize("placement", ["R", 0, 1])
def test_attention_with_options(placement, mesh):
    """A tensor among them makes every rank compute the whole; grouped heads stay together."""
    q, k, mask = shards(mesh, ((2, 4, 5, 8), placement), ((2, 2, 6, 8), placement), ((5, 6), "R"))
    for options in ({"window": (1, 2)}, {"attn_mask": mask, "softcap": 2.0}):
        ours = F.scaled_dot_product_attention(q, k, k, enable_gqa=True, **options)
        whole = {name: o.full_tensor() if hasattr(o, "full_tensor") else o for name, o in options.items()}
        want = F.scaled_dot_product_attention(*(t.full_tensor() for t in (q, k, k)), enable_gqa=True, **whole)
        torch.testing.assert_close(ours.full_tensor(), want)


@pytest.mark.parametrize(
    "kv_heads, ranks, found",
    [(2, (2,), True), (2, (4,), False), (4, (4,), True), (6, (2, 2), False), (12, (2, 2), True)],
)
def test_groups_of_heads_are_not_split(kv_heads, ranks, found):
    q, k = torch.empty(1, 12, 3, 8), torch.empty(1, kv_heads, 3, 8)
    rules_of = rules().placements("attention_fwd", [q, k, k, True, 1.0], 2, ranks)
    assert any(of_args[0].is_shard(1) for _, of_args in rules_of) == found


def test_where_torch_has_moved(mesh, monkeypatch):
    """Without the modules that registering takes, PyTorch's functions serve DTensors."""
    from torch.distributed.tensor._ops import utils

    (x,) = shards(mesh, ((2, 8), "R"))
    module = rules()
    monkeypatch.delattr(sys.modules[module.__package__], "dtensor")  # as if it had not been imported
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setattr(dispatch, "SHARDED", set())
    monkeypatch.delattr(utils, "register_op_strategy")
    choice = pygpt.explain("gelu", x)
    assert choice.backend == "torch" and choice.rejected["cpp"] == ["a tensor subclass, DTensor"]
    assert torch.equal(F.gelu(x).full_tensor(), torch.nn.functional.gelu(x.full_tensor()))


def test_each_backend(mesh, compiled):
    """The rules hold for the ops of every backend; here they run alone."""
    sharded = tensor_parallel_mlp(mesh, torch.float32)
    whole = [t.full_tensor().detach().requires_grad_() for t in sharded]
    with pygpt.backend(compiled):
        got, want = F.mlp(*sharded, "gelu"), F.mlp(*whole, "gelu")
        got.sum().backward()
        want.sum().backward()
    assert torch.equal(got.full_tensor(), want)
    for t, w in zip(sharded, whole, strict=True):
        assert torch.equal(t.grad.full_tensor(), w.grad)


COMPILED = """
import torch, torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import pygpt.functional as F
from tests.dispatch.test_dtensor import tensor_parallel_mlp

def record(graph, _):
    print(*(n.target for n in graph.graph.nodes if "pygpt" in str(n.target) or "c10d" in str(n.target)))
    return make_boxed_func(graph.forward)

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
tensors = tensor_parallel_mlp(init_device_mesh("cpu", (2,)))
backend = aot_autograd(fw_compiler=record)
y = torch.compile(lambda *args: F.mlp(*args, "gelu"), fullgraph=True, backend=backend)(*tensors)
y.sum().backward()
print(*("R" if p.is_replicate() else p.dim if p.is_shard() else "P" for t in tensors for p in t.grad.placements))
"""


def test_compiled(run_python):
    """The first DTensors arrive while torch.compile traces. The rules are part of the graphs; nothing is sent.

    In a process of its own: torch's own functions on DTensors, too, don't compile after other uses of DTensors.
    """
    run = run_python(COMPILED)
    assert run.stdout.splitlines() == ["pygpt.mlp_fwd.default", "pygpt.mlp_bwd.default", "P 0 0 1 R"], run.stderr


def test_second_derivatives(mesh):
    def penalty(x, weight, bias):
        (gradient,) = torch.autograd.grad(F.gelu(F.linear(x, weight, bias)).sum(), x, create_graph=True)
        return gradient.square().sum()

    sharded = shards(mesh, ((4, 8), 0), ((10, 8), "R"), ((10,), "R"))
    whole = [t.full_tensor().detach().requires_grad_() for t in sharded]
    got, want = penalty(*sharded), penalty(*whole)
    got.backward()
    want.backward()
    torch.testing.assert_close([t.grad.full_tensor() for t in sharded], [t.grad for t in whole])


def test_autocast(mesh):
    sharded = tensor_parallel_mlp(mesh, torch.float32)
    whole = [t.full_tensor().detach().requires_grad_() for t in sharded]
    with torch.autocast("cpu", torch.bfloat16):
        got, want = F.mlp(*sharded, "gelu"), F.mlp(*whole, "gelu")
    assert got.dtype == torch.bfloat16 and torch.equal(got.full_tensor(), want)


def test_importing_pygpt_imports_no_dtensor(run_python):
    modules = ("torch.distributed.tensor", "pygpt.integrations.dtensor")
    source = f"import sys, pygpt; print(*(name in sys.modules for name in {modules}))"
    assert run_python(source).stdout.split() == ["False", "False"]
