"""qkv_attention on every backend: the bits of attention on the heads of qkv, and one tensor as gradient."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import pygpt
from pygpt import nn
from pygpt.dispatch import REFERENCE
from pygpt.functional import qkv_attention, scaled_dot_product_attention
from pygpt.ops.attention import Options
from pygpt.ops.qkv_attention import as_heads, split_heads
from tests.cases import embedded, shifted, strided

GPU_SHARE = {"triton": 2, "cuda": 2}  # see conftest
pytestmark = pytest.mark.usefixtures("poisoned_memory")
#         B, Hq, Hkv, T, E, causal, dropout, left, right
CALLS = [
    (2, 2, 2, 35, 24, True, 0.0, -1, -1),
    (2, 6, 2, 70, 16, True, 0.0, 20, -1),
    (1, 2, 1, 40, 8, False, 0.3, 5, 3),
    (2, 3, 1, 1, 16, False, 0.0, -1, -1),
    (1, 4, 2, 3, 64, True, 0.2, -1, -1),  # few rows
]


@pytest.mark.parametrize("layout", [embedded, strided, shifted], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("B, Hq, Hkv, T, E, causal, p, left, right", CALLS)
def test_attention_of_the_heads(B, Hq, Hkv, T, E, causal, p, left, right, dtype, layout, kernels_of, generator):
    qkv = layout(torch.randn(B, T, (Hq + 2 * Hkv) * E, generator=generator).to(dtype))
    dout = layout(torch.randn(B, T, Hq * E, generator=generator).to(dtype))
    seed = torch.tensor([11]) if p else None
    options = Options(seed=seed, dropout_p=p, left=left, right=right)
    q, k, v = split_heads(qkv, Hq, Hkv)
    want, want_lse = kernels_of.attention_fwd(q, k, v, causal, 0.3, *options)
    of_heads = as_heads(dout, Hq), None, q, k, v, want, want_lse, causal, 0.3, [True] * 3
    want_gradients = kernels_of.attention_bwd(*of_heads, *options)[:3]

    args = Hq, Hkv, causal, 0.3, seed, p, left, right
    out, lse = kernels_of.qkv_attention_fwd(qkv, *args)
    dqkv = kernels_of.qkv_attention_bwd(dout, qkv, out, lse, *args)
    assert out.is_contiguous() and torch.equal(as_heads(out, Hq), want) and torch.equal(lse, want_lse)
    assert dqkv.is_contiguous()
    for found, gradient in zip(split_heads(dqkv, Hq, Hkv), want_gradients, strict=True):
        assert torch.equal(found, gradient)


def test_a_module_copies_neither_heads_nor_gradients(generator):
    layer, x = nn.CausalSelfAttention(48, 4, 2), torch.randn(2, 9, 48, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 9, 48, generator=generator)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        layer(x).backward(upstream)
    names = {event.key for event in seen.key_averages()}
    assert "QkvAttentionBackward" in " ".join(names)
    assert not names & {"aten::cat", "aten::copy_", "aten::contiguous", "aten::clone"}


@pytest.mark.parametrize("how", ["cache", "wide"])
def test_a_module_without_the_op_has_the_same_result(how, generator):
    D = 300 if how == "wide" else 8
    layer, x = nn.CausalSelfAttention(2 * D, 2).double(), torch.randn(1, 6, 2 * D, generator=generator).double()
    found = layer(x, nn.KVCache(6)) if how == "cache" else layer(x)
    qkv = torch.nn.functional.linear(x, layer.c_attn.weight, layer.c_attn.bias)
    args = 2, 2, True, 1 / math.sqrt(D), None, 0.0, -1, -1
    want = REFERENCE.qkv_attention_fwd(qkv, *args)[0]
    torch.testing.assert_close(found, layer.c_proj(want))


def test_heads_too_wide_for_the_kernels_go_to_pytorch(generator):
    qkv = torch.randn(1, 5, 3 * 600, generator=generator)
    choice = pygpt.explain("qkv_attention", qkv, 1)
    assert choice.backend == "torch" and "head dimension above" in str(choice)
    want = scaled_dot_product_attention(*split_heads(qkv, 1, 1), is_causal=True)
    torch.testing.assert_close(as_heads(qkv_attention(qkv, 1, is_causal=True), 1), want)


def test_dropout_draws_one_seed(generator):
    qkv = torch.randn(1, 50, 3 * 8, generator=generator)
    torch.manual_seed(3)
    found = qkv_attention(qkv, 1, dropout_p=0.4)
    torch.manual_seed(3)
    want = scaled_dot_product_attention(*split_heads(qkv, 1, 1), dropout_p=0.4)
    assert torch.equal(as_heads(found, 1), want)
    assert not torch.equal(qkv_attention(qkv, 1, dropout_p=0.4), found)


@pytest.mark.parametrize("arguments, error, message", [
    ((torch.zeros(2, 3, 12), 0), ValueError, "num_heads 0 is no multiple of num_kv_heads 0"),
    ((torch.zeros(2, 3, 12), 3, 2), ValueError, "num_heads 3 is no multiple of num_kv_heads 2"),
    ((torch.zeros(2, 3, 12), 2, 2.0), TypeError, "num_kv_heads must be an integer, got 2.0"),
    ((torch.zeros(2, 3, 13), 2), ValueError, r"qkv must have shape \(B, T, 6 E\), got \(2, 3, 13\)"),
    ((torch.zeros(3, 12), 2), ValueError, r"qkv must have shape \(B, T, 6 E\), got \(3, 12\)"),
    ((torch.zeros(2, 3, 12).long(), 2), TypeError, "qkv must be floating point, got torch.int64"),
    (([0.0], 2), TypeError, "qkv must be a Tensor, got list"),
    ((torch.zeros(2, 3, 12), 2, 2, 1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
])  # fmt: skip
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"pygpt.qkv_attention: {message}"):
        qkv_attention(*arguments)
    warm = torch.zeros(1, 3, 12)
    qkv_attention(warm, 2)  # from now on calls like it are fast
    with pytest.raises(error, match=f"pygpt.qkv_attention: {message}"):
        qkv_attention(*arguments)


def test_the_op_checks_what_its_kernel_reads():
    op, args = torch.ops.pygpt, (2, 2, True, 1.0, None, 0.0, -1, -1)
    qkv = torch.zeros(1, 3, 12)
    out, lse = op.qkv_attention_fwd(qkv, *args)
    with pytest.raises(RuntimeError, match=r"qkv must have shape .* with heads 0 and kv_heads 2"):
        op.qkv_attention_fwd(qkv, 0, *args[1:])
    with pytest.raises(RuntimeError, match="3 query heads are no multiple of 2 key heads"):
        op.qkv_attention_fwd(torch.zeros(1, 3, 14), 3, 2, *args[2:])
    with pytest.raises(RuntimeError, match="dout must have shape"):
        op.qkv_attention_bwd(out[:, :2], qkv, out, lse, *args)
