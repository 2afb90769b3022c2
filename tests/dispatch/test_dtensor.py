"""DTensors where a call is more than its op's sharding rule: views, modules, options, losses, compilation, derivatives.

The rules themselves are in test_dtensor_rules.py, the calls that they serve in test_dtensor_calls.py.
"""

import sys

import pytest
import torch

import pygpt
import pygpt.functional as F
from pygpt import dispatch
from tests.dispatch.test_dtensor_rules import F64, rules
from tests.dispatch.test_ecosystem import Count

GPU_SHARE = {"triton": 1}


def on_shards(mesh):
    return pytest.mark.parametrize("mesh", mesh, indirect=True, ids=str)


def placed(word):
    from torch.distributed.tensor import Partial, Replicate, Shard

    return {"R": Replicate(), "P": Partial()}[word] if word in ("R", "P") else Shard(word)


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
