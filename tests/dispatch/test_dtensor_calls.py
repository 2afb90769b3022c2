"""Calls of the public functions on DTensors run by the sharding rules: no rank sends anything to another.

Placements and collectives are checked on a mesh that only pretends to have other ranks, values and gradients on one of
a single rank and with two gloo processes.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch

import pygpt.functional as F
from tests.dispatch.test_dtensor import F64, on_shards, placed
from tests.dispatch.test_dtensor_rules import rules
from tests.dispatch.test_ecosystem import in_processes  # noqa: F401 (a fixture)


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
