"""The memory order of results is that of torch's functions, and what lies densely in another order isn't copied."""

from itertools import permutations

import cases
import pytest
import torch
import torch.nn.functional as F

GPU_SHARE = {"triton": 8, "cuda": 2}  # see conftest
SHAPE = (2, 3, 5, 4)


def permuted(order, shape=SHAPE):
    """A tensor whose dimensions lie in memory in this order, the innermost last."""
    return torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


DENSE = {"".join(map(str, order)): permuted(order) for order in permutations(range(4))}
OTHER = {
    "one channel": permuted((0, 2, 3, 1), (2, 1, 5, 4)),
    "one each": permuted((3, 1, 0, 2), (1, 1, 5, 1)),
    "sliced": torch.randn(2, 3, 5, 8)[..., ::2],
    "sliced and permuted": torch.randn(4, 5, 3, 9)[::2, ..., :4].transpose(1, 2),
    "expanded outside": torch.randn(1, 3, 5, 4).expand(SHAPE),
    "expanded inside": torch.randn(2, 5, 4, 1).permute(0, 3, 1, 2).expand(SHAPE),
    "one value": torch.randn(1).expand(SHAPE),
    "vector": torch.randn(9)[::2],
    "scalar": torch.randn(()),
    "empty": torch.randn(3, 0, 2).mT,
}
LAYOUTS = {**DENSE, **OTHER}


def same(result, want, values):
    assert cases.layout_of(result) == cases.layout_of(want)
    torch.testing.assert_close(result, values, equal_nan=True)


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
def test_activations_keep_the_order_of_their_input(x, kernels, device):
    there = x.to(device) if device != "cpu" else x
    dense = there.contiguous()
    same(kernels.gelu_fwd(there, "none"), F.gelu(x), kernels.gelu_fwd(dense, "none"))
    same(kernels.relu_fwd(there), F.relu(x), kernels.relu_fwd(dense))


@pytest.mark.parametrize("first", LAYOUTS)
def test_gradients_of_activations_lie_as_torchs(first, kernels, device, backend):
    """gelu's in the order of dy and then x, relu's in the order of y, which is never expanded, and then dy."""
    a = LAYOUTS[first]
    for name, b in LAYOUTS.items():
        if a.shape != b.shape or (backend in ("triton", "cuda") and name in DENSE and name != first[::-1]):
            continue
        x, dy = a.to(device), b.to(device)
        dense = x.contiguous(), dy.contiguous()
        same(
            kernels.gelu_bwd(dy, x, "tanh"), torch.ops.aten.gelu_backward(b, a), kernels.gelu_bwd(*dense[::-1], "tanh")
        )
        y = F.relu(a)
        want = torch.ops.aten.threshold_backward(b, y, 0)
        same(kernels.relu_bwd(dy, y.to(device)), want, kernels.relu_bwd(dense[1], y.contiguous().to(device)))


def packed():
    """q, k and v as slices of one projection (B, L, 3, H, E)."""
    return torch.randn(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)[1]


QUERIES = {
    **{name: permuted(order, (2, 3, 5, 8)) for name, order in zip(DENSE, permutations(range(4)), strict=True)},
    "packed": packed(),
    "one head": permuted((0, 2, 1, 3), (2, 1, 5, 8)),
    "one position": permuted((2, 0, 1, 3), (2, 3, 1, 8)),
    "sliced": torch.randn(2, 3, 5, 16)[..., 4:12],
    "expanded": torch.randn(1, 5, 3, 8).transpose(1, 2).expand(2, 3, 5, 8),
    "one channel": permuted((0, 2, 1, 3), (2, 3, 5, 1)),
    "no channel": torch.randn(2, 5, 3, 0).transpose(1, 2),
    "no query": torch.randn(2, 0, 3, 8).transpose(1, 2),
}


@pytest.mark.parametrize("q", QUERIES.values(), ids=QUERIES)
def test_attention_keeps_the_order_of_its_query(q, kernels, device):
    (B, H, _, E), there = q.shape, q.to(device)
    for width in {E, 6}:
        k, v = torch.randn(B, H, 7, E), torch.randn(B, H, 7, width)
        keys = k.to(device), v.to(device)
        out, lse = kernels.attention_fwd(there, *keys, True, 0.3)
        want = F.scaled_dot_product_attention(q, k, v)
        same(out, want, kernels.attention_fwd(there.contiguous(), *keys, True, 0.3)[0])
        assert lse.is_contiguous() and out.stride(3) == 1
        dout = torch.randn_like(out)
        ours, others = (
            kernels.attention_bwd(dout, None, there, *keys, o, lse, True, 0.3, [True] * 3)[:3]
            for o in (out, out.contiguous())
        )
        for g, same_g in zip(ours, others, strict=True):
            assert g.transpose(1, 2).is_contiguous()
            torch.testing.assert_close(g, same_g)


@pytest.mark.parametrize("name", LAYOUTS)
def test_dense_memory_is_not_copied(name):
    x, ops = LAYOUTS[name], torch.ops.pygpt
    with torch.profiler.profile() as profile:
        y = ops.relu_fwd(x)
        ops.relu_bwd(y, y)
        ops.gelu_bwd(torch.empty_like(x), ops.gelu_fwd(x, "none"), "none")
    copied = [event.name for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]
    assert bool(copied) == (cases.layout_of(torch.empty_like(x)) != cases.layout_of(x))
