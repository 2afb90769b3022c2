"""Packages and features that users combine with ours, run for real.

Adapters, pruning, checkpointing, averaging, data and tensor parallelism, quantisation. Each is compared with the same
model without it, or with the same feature on torch.nn. A package that is not installed fails its tests.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import parametrize, prune
from torch.utils import checkpoint as ckpt
from torch.utils._python_dispatch import TorchDispatchMode

import pygpt
from pygpt import GPT, GPTConfig

TINY = GPTConfig(vocab_size=40, block_size=16, n_layer=2, n_head=4, n_embd=32)
F64 = torch.float64


def new_gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(TINY, dtype=F64)


def batch(n=4, seed=1):
    ids = torch.randint(TINY.vocab_size, (n, 11), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


# ------------------------------------------------------------------------------- adapters, parametrizations, pruning
def test_lora():
    """Every adapter trains, alone; merged into the weights they give what they gave beside them."""
    from peft import LoraConfig, get_peft_model

    model, (idx, targets) = new_gpt(), batch()
    plain = copy.deepcopy(model)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"]))
    adapters = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 4 * TINY.n_layer  # two factors for each of a block's four layers
    torch.testing.assert_close(lora(idx, targets)[0], plain(idx, targets)[0])  # an adapter is born as zero
    for p in adapters.values():
        torch.nn.init.normal_(p, std=0.1)
    optimizer = torch.optim.SGD(adapters.values(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = lora(idx, targets)[1]
        loss.backward()
        assert all(p.grad is not None and p.grad.count_nonzero() for p in adapters.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    beside = lora(idx, targets)[0]
    lora.merge_adapter()
    torch.testing.assert_close(lora(idx, targets)[0], beside)
    lora.unmerge_adapter()
    merged = lora.merge_and_unload()
    assert {type(m) for m in linears(merged).values()} == {pygpt.nn.Linear}
    torch.testing.assert_close(merged(idx, targets)[0], beside)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=F64))

    def forward(self, weight):
        return self.scale * weight


def test_parametrize():
    """The model computes with the parametrized weights, and what parametrizes them gets gradients."""
    model, (idx, targets) = new_gpt(), batch()
    before = model(idx, targets)[0]
    for name, layer in linears(model).items():
        if name != "lm_head":
            parametrize.register_parametrization(layer, "weight", Scaled())
    logits, loss = model(idx, targets)
    loss.backward()
    assert not torch.allclose(logits, before)
    assert all(p.grad is not None and p.grad.count_nonzero() for p in model.parameters())
    for name, layer in linears(model).items():
        if name != "lm_head":
            parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model(idx, targets)[0], logits)


def test_prune():
    """Half of all weights, over all layers; they stay zero through training."""
    model, (idx, targets) = new_gpt(), batch()
    before = model(idx, targets)[0]
    layers = [layer for name, layer in linears(model).items() if name != "lm_head"]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(idx, targets)[1].backward()
    optimizer.step()
    logits = model(idx, targets)[0]
    assert not torch.allclose(logits, before)
    for layer in layers:
        prune.remove(layer, "weight")
    torch.testing.assert_close(model(idx, targets)[0], logits)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    assert zeros == sum(layer.weight.numel() for layer in layers) // 2


# ------------------------------------------------------------------------------- checkpointing
class Count(TorchDispatchMode):
    """Counts the calls of one op that reach it."""

    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


def keep_attention(ctx, op, *args, **kwargs):
    kept = op is torch.ops.pygpt.qkv_attention_fwd.default
    return ckpt.CheckpointPolicy.MUST_SAVE if kept else ckpt.CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {  # form: arguments, how often attention runs again in backward
    "reentrant": ({"use_reentrant": True}, TINY.n_layer),
    "non-reentrant": ({"use_reentrant": False}, TINY.n_layer),
    "selective": (
        {
            "use_reentrant": False,
            "context_fn": lambda: ckpt.create_selective_checkpoint_contexts(keep_attention),
        },
        0,
    ),
}


@pytest.mark.parametrize("form", CHECKPOINTS)
def test_checkpoint(form):
    """Every block is computed again in backward; with the policy, all of it but attention."""
    options, again = CHECKPOINTS[form]
    model, (idx, targets) = new_gpt(), batch()
    loss = model(idx, targets)[1]
    loss.backward()
    want = gradients(model)
    model.zero_grad()
    for block in model.transformer.h:
        forward = block.forward
        block.forward = lambda *args, forward=forward: ckpt.checkpoint(forward, *args, **options)
    recomputed = model(idx, targets)[1]
    with Count(torch.ops.pygpt.qkv_attention_fwd.default) as count:
        recomputed.backward()
    assert torch.equal(recomputed, loss) and count.calls == again
    torch.testing.assert_close(gradients(model), want, rtol=0, atol=0)


# ------------------------------------------------------------------------------- copies and averages
def train(model, steps=3, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for step in range(steps):
        optimizer.zero_grad()
        model(*batch(seed=step))[1].backward()
        optimizer.step()
        yield


def test_averaged_model():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = new_gpt()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    assert averaged.module.lm_head.weight is averaged.module.transformer.wte.weight
    averaged.update_parameters(model)  # the first takes the parameters as they are
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in train(model):
        averaged.update_parameters(model)
        for name, p in model.named_parameters():
            want[name] = 0.9 * want[name] + 0.1 * p.detach()
    torch.testing.assert_close({name: p.detach() for name, p in averaged.module.named_parameters()}, want)
    plain = new_gpt()
    plain.load_state_dict(want, strict=True)
    idx, _ = batch()
    torch.testing.assert_close(averaged(idx)[0], plain(idx)[0])


def test_a_deepcopy_trains_alone_and_alike():
    model = new_gpt()
    list(train(model))
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    list(train(other))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    list(train(model))
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


# ------------------------------------------------------------------------------- quantisation
def quantized(model):
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def test_quantize_dynamic():
    """It goes by exact types and so leaves pygpt.nn.Linear alone; pygpt.nn.Linear says what to do."""
    model, (idx, targets) = GPT(TINY), batch()
    exact = model(idx, targets)[0]
    untouched = quantized(model)
    assert {type(m) for m in linears(untouched).values()} == {pygpt.nn.Linear}
    assert torch.equal(untouched(idx, targets)[0], exact)
    for m in model.modules():
        if type(m) is pygpt.nn.Linear:
            m.__class__ = torch.nn.Linear
    assert torch.equal(model(idx, targets)[0].argmax(-1), exact.argmax(-1))
    converted = quantized(model)
    kinds = [type(m) for m in converted.modules() if hasattr(m, "in_features")]
    assert kinds == [torch.ao.nn.quantized.dynamic.Linear] * (4 * TINY.n_layer + 1)
    # Each weight and each activation is off by half a step of 1/127 or 1/255 of the largest at most.
    error = (converted(idx, targets)[0] - exact).norm() / exact.norm()
    assert 0 < error < 0.1, error


# ------------------------------------------------------------------------------- processes
def _process(rank, world, store, function):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        function(rank, world)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def in_processes(tmp_path):
    def run(world, function):
        if world == 1:
            return _process(0, 1, tmp_path / "store", function)
        return torch.multiprocessing.spawn(_process, (world, tmp_path / "store", function), nprocs=world)

    return run


def whole_batch():
    """The loss's gradients over the whole batch, and the parameters after one step along them."""
    model = new_gpt()
    model(*batch())[1].backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    return gradients(model), model.state_dict()


def part(rank, world):
    return [t.chunk(world)[rank] for t in batch()]


def _ddp(rank, world):
    want, after = whole_batch()
    model = torch.nn.parallel.DistributedDataParallel(new_gpt())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*part(rank, world))[1].backward()
    torch.testing.assert_close(gradients(model.module), want)
    optimizer.step()
    torch.testing.assert_close(dict(model.module.state_dict()), dict(after))


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp2(rank, world):
    """Built on the meta device, sharded, emptied there, and loaded, as big models are."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    want, after = whole_batch()
    options = StateDictOptions(full_state_dict=True)
    model = sharded(GPT(TINY, device="meta", dtype=F64))
    model.to_empty(device="cpu")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.reset_parameters()
    for name, p in model.named_parameters():
        p = p.full_tensor()
        if ".ln_" in name:
            assert (p == name.endswith("weight")).all(), name
        else:
            assert p.abs().max() < 0.2 and (p.count_nonzero() == 0) == name.endswith("bias"), name
    set_model_state_dict(model, new_gpt().state_dict(), options=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*part(rank, world))[1].backward()
    torch.testing.assert_close({name: g.full_tensor() for name, g in gradients(model).items()}, want)
    optimizer.step()
    torch.testing.assert_close(get_model_state_dict(model, options=options), dict(after))


@pytest.mark.slow
@pytest.mark.parametrize("function", [_ddp, _fsdp2])
def test_data_parallel(function, in_processes):
    in_processes(2, function)


def _tensor_parallel(module, plan, rank, world):
    """Values and gradients of the module in shards are those of the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module

    torch.manual_seed(2)
    x, dy = torch.randn(2, 2, 6, 32, dtype=F64)

    def run(m):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.backward(dy)
        return {"y": y.detach(), "dx": leaf.grad, **gradients(m)}

    want = run(module)
    module.zero_grad()
    parallel = parallelize_module(module, init_device_mesh("cpu", (world,)), plan)
    assert all(isinstance(p, DTensor) for p in parallel.parameters())
    got = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in run(parallel).items()}
    torch.testing.assert_close(got, want)


def _mlp_in_shards(rank, world):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    torch.manual_seed(1)
    plan = {"c_fc": ColwiseParallel(), "c_proj": RowwiseParallel()}
    _tensor_parallel(pygpt.nn.MLP(32, dtype=F64), plan, rank, world)


def _attention_in_shards(rank, world):
    """c_attn holds queries, keys and values one after the other: a shard of its columns is no set of whole heads."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    torch.manual_seed(1)
    c_attn, c_proj = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    _tensor_parallel(pygpt.nn.CausalSelfAttention(32, 4, dtype=F64), {"c_attn": c_attn, "c_proj": c_proj}, rank, world)


def _attention_on_dtensors(rank, world):
    """The heads themselves are DTensors."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    torch.manual_seed(1)
    plan = {"c_attn": ColwiseParallel(use_local_output=False), "c_proj": RowwiseParallel()}
    _tensor_parallel(pygpt.nn.CausalSelfAttention(32, 4, dtype=F64), plan, rank, world)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("function", [_mlp_in_shards, _attention_in_shards, _attention_on_dtensors])
def test_tensor_parallel(function, world, in_processes):
    in_processes(world, function)
