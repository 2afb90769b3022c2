"""The oracle itself: <op>_fwd and <op>_bwd against autograd of the ordinary expression, and as shape functions."""

from itertools import chain

import cases
import pytest
import torch

from pygpt import reference, verify
from pygpt.dispatch import OPS
from pygpt.ops.attention import Options

EVERY = [(op, dims) for op, all_dims in cases.CASES.items() for dims in all_dims]
FLOAT32 = torch.finfo(torch.float32).eps  # what the oracle must not lose: it judges float32


@pytest.mark.parametrize("op, dims", EVERY, ids=cases.ids)
def test_explicit_formulas_equal_autograd(op, dims, generator):
    args, grads = verify.draw(op, dims, torch.float64, generator)
    explicit, terms = verify.in_float64(op, args, grads)
    for key, want in verify.directions(op, verify.eager(op), args, grads).items():
        scale = torch.cat([t.abs().flatten() for t in (want, terms.get(key, want), torch.ones(1))]).max()
        assert explicit[key].shape == want.shape and explicit[key].dtype == want.dtype
        torch.testing.assert_close(explicit[key], want, rtol=0, atol=FLOAT32 * scale.item(), equal_nan=True, msg=key)


NEUTRAL = [  # options that change nothing
    Options(),
    Options(left=70, right=85),
    Options(softcap=1e9),
    Options(attn_mask=torch.ones(1, 1, 1, 85, dtype=torch.bool)),
    Options(alibi_slopes=torch.zeros(1, 2, dtype=torch.float64)),
    Options(sink=torch.full((2,), -1e9, dtype=torch.float64)),
    Options(seed=torch.tensor([5]), dropout_p=1e-12),
]


@pytest.mark.parametrize("options", NEUTRAL, ids=range(len(NEUTRAL)))
@pytest.mark.parametrize("causal", [False, True])
def test_attention_expression_agrees_with_itself(options, causal, generator):
    """The composite with options is the same function where they change nothing."""
    (q, k, v, _, scale), _ = verify.draw("attention", cases.TYPICAL["attention"], torch.float64, generator)
    out, lse = reference.attention(q, k, v, causal, scale, *options, return_lse=True)
    torch.testing.assert_close(out, reference.attention(q, k, v, causal, scale))
    torch.testing.assert_close(lse, reference.attention(q, k, v, causal, scale, return_lse=True)[1])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("layout", [cases.contiguous, cases.transposed, cases.expanded], ids=cases.ids)
@pytest.mark.parametrize("op, dims", EVERY[::7] + list(cases.variants(cases.TYPICAL)), ids=cases.ids)
def test_meta_kernels_tell_the_truth(op, dims, layout, dtype, generator):
    """Shape, dtype and strides on meta tensors equal those of the real result."""
    args, grads = verify.draw(op, dims, dtype, generator, view=layout)
    for name, call in cases.kernel_calls(op, args, grads, reference):
        real, meta = (verify.as_tuple(getattr(reference, name)(*a)) for a in (call, [cases.to_meta(a) for a in call]))
        for r, m in zip(real, meta, strict=True):
            assert (m.shape, m.dtype, m.device.type) == (r.shape, r.dtype, "meta"), name
            assert cases.layout_of(m) == cases.layout_of(r), name


def test_every_function_is_reachable():
    assert set(OPS) == {spec.op for spec in verify.SPECS.values()}
    names = chain.from_iterable((f"{op}_fwd", f"{op}_bwd", op) for op in OPS)
    assert all(callable(getattr(reference, name)) for name in names)
