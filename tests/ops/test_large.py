"""CPU results too large for the caches, which are written past them: the same bits as in calls that are not."""

import pytest
import torch

from bench.timing.clocks import last_level_cache
from pygpt.dispatch import TABLE

cpp = TABLE["cpp"].kernels
SEED = torch.tensor([5])  # with a probability of 0: the bits of a part are those of other rows
CALLS = {  # from rows of x, dy and z and from a row w to results made row by row
    "layer_norm": lambda x, dy, z, w: cpp.layer_norm_fwd(x, w, w, 1e-5),
    "add_layer_norm": lambda x, dy, z, w: cpp.add_layer_norm_fwd(x, z, w, None, 1e-5),
    "rms_norm": lambda x, dy, z, w: cpp.rms_norm_fwd(x, w, 1e-5),
    "add_rms_norm": lambda x, dy, z, w: cpp.add_rms_norm_fwd(x, z, w, 1e-5),
    "layer_norm_bwd": lambda x, dy, z, w: cpp.layer_norm_bwd(dy, x, w, *statistics(x), [True] * 3)[:1],
    "add_layer_norm_bwd": lambda x, dy, z, w: cpp.add_layer_norm_bwd(dy, z, x, w, *statistics(x), [True] * 3)[:1],
    "rms_norm_bwd": lambda x, dy, z, w: cpp.rms_norm_bwd(dy, x, w, statistics(x)[1], [True] * 2)[:1],
    "add_rms_norm_bwd": lambda x, dy, z, w: cpp.add_rms_norm_bwd(dy, z, x, w, statistics(x)[1], [True] * 2)[:1],
    "rope": lambda x, dy, z, w: (rope(x, z), rope(x, z, interleaved=True), rope(x, z, w)),
    "rope_bwd": lambda x, dy, z, w: (rope_bwd(dy, x, z), rope_bwd(dy, x, z, w)),
    "dropout_add_layer_norm": lambda x, dy, z, w: cpp.dropout_add_layer_norm_fwd(x, z, w, None, 1e-5, SEED, 0.0),
    "dropout_add_rms_norm_bwd": lambda x, dy, z, w: cpp.dropout_add_rms_norm_bwd(
        dy, z, x, w, statistics(x)[1], [True] * 3, SEED, 0.0, 1.0
    )[:2],
    "gelu": lambda x, dy, z, w: (cpp.gelu_fwd(x, "none"), cpp.gelu_bwd(dy, x, "tanh")),
    "relu": lambda x, dy, z, w: (cpp.relu_fwd(x), cpp.relu_bwd(dy, x)),
    "cross_entropy": lambda x, dy, z, w: of_logits(x, 0.0, None),
    "cross_entropy, smoothed": lambda x, dy, z, w: of_logits(x, 0.1, w.float().abs()),
}


def of_logits(x, smoothing, weight):
    """Losses, and gradients whose upstream gradient they are."""
    options = -100, weight, "none", smoothing, 0.1
    target = (x[:, 0].float().abs() * x.shape[1]).long() % x.shape[1]
    loss, *saved = cpp.cross_entropy_fwd(x, target, *options)
    return loss, cpp.cross_entropy_bwd(loss, x, target, *saved, *options)


def statistics(x):
    return x[:, 0].float(), x[:, 1].float().abs()


def tables(z):
    """cos and sin of as many positions as z has rows."""
    return z[:, :96].float(), z[:, -96:].float()


def rope(x, z, w=None, interleaved=False):
    w = None if w is None else w.float()
    return cpp.rope_fwd(x[None, None], None, *tables(z), w, None, None, 1e-6, interleaved)[0][0, 0]


def rope_bwd(dy, x, z, w=None):
    of_norm = (None,) * 3 if w is None else (x[None, None], w.float(), statistics(x)[1][None, None])
    saved = of_norm[0], None, *tables(z), of_norm[1], None, of_norm[2], None, None, False
    return cpp.rope_bwd(dy[None, None], None, *saved, [True, False, False, False])[0][0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [256, 1003])  # rows aligned to any vector, and to none
@pytest.mark.parametrize("op", CALLS)
def test_results_past_the_caches(op, width, dtype, generator):
    if (cache := last_level_cache()) > 128 << 20:
        pytest.skip(f"would need more than the {cache >> 20} MB of this machine's last-level cache")
    torch.set_num_threads(2)
    rows = cache // (width * dtype.itemsize) + 3  # two such tensors are twice what the cache holds
    x, dy, z = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(3))
    w = torch.randn(width, generator=generator).to(dtype)
    found = CALLS[op](x, dy, z, w)
    part = rows // 8 + 1
    for at in range(0, rows, part):
        want = CALLS[op](*(t[at : at + part] for t in (x, dy, z)), w)
        for ours, theirs in zip(found, want, strict=True):
            assert torch.equal(ours[at : at + part], theirs)


def test_rows_at_any_address_past_the_caches(generator):
    """On every machine: the inputs are one row, expanded, and only the result is large."""
    width = 1003
    rows = last_level_cache() // (4 * width * torch.float32.itemsize) + 3  # the kernel counts three inputs too
    dy, ds, x = (torch.randn(1, width, generator=generator).expand(rows, width) for _ in range(3))
    mean, rstd = torch.rand(2, 1, generator=generator).expand(2, rows).contiguous()
    (dx, *_), (want, *_) = (
        cpp.add_layer_norm_bwd(dy[:n], ds[:n], x[:n], None, mean[:n], rstd[:n], [True, False, False]) for n in (rows, 1)
    )
    assert torch.equal(dx, want.expand_as(dx))
