"""scaled_dot_product_attention without options: the meaning of its arguments, and which ones it refuses."""

import math

import cases
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import pygpt
from pygpt.functional import scaled_dot_product_attention as sdpa
from tests.ops.attention_by_hand import by_hand

pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias")  # will produce NaN, says torch; ours does not


def leaves(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def assert_equal_with_gradients(ours, theirs, inputs):
    """(out, lse) pairs and the gradients of a random function of both, rows of -inf lse left out."""
    grads = []
    for out, lse in (ours, theirs):
        torch.manual_seed(0)
        finite = theirs[1].isfinite()
        total = (out * torch.randn(out.shape).double()).sum() + (lse * torch.randn(lse.shape).double())[finite].sum()
        grads.append(torch.autograd.grad(total, inputs))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("L", [2, 40])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_a_nan_gradient_of_lse_stays_one(L, dtype, backend, device):
    q, k, v = inputs = [torch.randn(1, 1, n, 16, dtype=dtype, device=device, requires_grad=True) for n in (L, 50, 50)]
    with pygpt.backend(backend):
        out, lse = sdpa(q, k, v, return_lse=True)
        grad_lse = torch.zeros_like(lse)
        grad_lse[..., 1] = cases.fullest_nan(lse.dtype)
        dq, dk, dv = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), grad_lse))
    assert dq[0, 0, 1].isnan().all() and dk.isnan().all()
    assert dq[0, 0, 0].isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 4, 6, 3, 2), (1, 1, 6, 4, 2, 5), (1, 2, 1, 5, 4, 4)], ids=str)
def test_plain(shape, is_causal, backend):
    B, H, L, S, E, Ev = shape
    q, k, v = inputs = leaves((B, H, L, E), (B, H, S, E), (B, H, S, Ev))
    with pygpt.backend(backend):
        for scale in (None, 0.3, 0.0, -1.0):
            ours = sdpa(q, k, v, is_causal=is_causal, scale=scale, return_lse=True)
            assert_equal_with_gradients(ours, by_hand(q, k, v, is_causal=is_causal, scale=scale), inputs)
            assert (
                torch.equal(sdpa(q, k, v, is_causal=is_causal, scale=scale).detach(), ours[0].detach())
                or backend == "torch"
            )


def test_causal_bias_is_aligned_as_in_torch(backend):
    q, k, v = leaves((1, 2, 4, 8), (1, 2, 6, 8), (1, 2, 6, 8))
    upper = sdpa(q, k, v, attn_mask=causal_upper_left(4, 6))
    with pygpt.backend(backend):
        torch.testing.assert_close(upper, sdpa(q, k, v, is_causal=True))
    torch.testing.assert_close(
        sdpa(q, k, v, causal_lower_right(4, 6)), F.scaled_dot_product_attention(q, k, v, causal_lower_right(4, 6))
    )


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 4), (6, 4), (6, 3)),
        ((2, 5, 4), (2, 6, 4), (2, 6, 3)),
        ((3, 1, 2, 5, 4), (1, 4, 2, 6, 4), (3, 4, 2, 6, 3)),
        ((2, 5, 4), (3, 2, 6, 4), (3, 2, 6, 3)),
        ((0, 2, 5, 4), (0, 2, 6, 4), (0, 2, 6, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_leading_dimensions_as_in_torch(shapes, is_causal, backend):
    inputs = leaves(*shapes)
    with pygpt.backend(backend):
        out, lse = sdpa(*inputs, is_causal=is_causal, return_lse=True)
    want = F.scaled_dot_product_attention(*inputs, is_causal=is_causal)
    torch.testing.assert_close(out, want)
    assert lse.shape == want.shape[:-1]
    g = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, g), torch.autograd.grad(want, inputs, g))


@pytest.mark.parametrize("create_graph", [False, True])
def test_lse_gives_value_no_gradient(create_graph, backend):
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    with pygpt.backend(backend):
        _, lse = sdpa(q, k, v, return_lse=True)
    grads = torch.autograd.grad(lse.sum(), (q, k, v), create_graph=create_graph, allow_unused=True)
    assert [g is None for g in grads] == [False, False, True]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_lse_keeps_float32(dtype, backend, generator):
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator).to(dtype) for n in (20, 30, 30))
    with pygpt.backend(backend):
        out, lse = sdpa(q, k, v, return_lse=True)
    want = torch.logsumexp(q.double() @ k.double().mT / 4.0, -1)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        lse.double(), want, rtol=4 * torch.finfo(lse.dtype).eps, atol=4 * torch.finfo(lse.dtype).eps
    )


MEMORY = """
import resource, sys, torch, pygpt
from pygpt.functional import scaled_dot_product_attention as sdpa
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
torch.set_num_threads(1)
def run(n):
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
    sdpa(q, k, v, is_causal=sys.argv[2] == "causal").sum().backward()
with pygpt.backend(sys.argv[1]):
    run(64)
    before, n = peak(), 8192
    run(n)
    grown, matrix = peak() - before, 4 * n * n
    assert grown < matrix / 8, (grown, matrix)
"""


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_no_score_matrix_in_memory(kind, compiled, run_python):
    done = run_python(MEMORY, compiled, kind)
    assert done.returncode == 0, done.stderr


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


Q = tensor(1, 2, 3, 4)
BAD = [
    ((None, Q, Q), {}, TypeError, "query must be a Tensor.*NoneType"),
    ((Q, [1.0], Q), {}, TypeError, "key must be a Tensor.*list"),
    ((Q, Q, Q.long()), {}, TypeError, "value must be floating point.*int64"),
    ((Q, Q.double(), Q), {}, TypeError, "key is torch.float64.*query is torch.float32"),
    ((Q, tensor(4), Q), {}, ValueError, r"key needs at least 2 dimensions.*\(4,\)"),
    ((Q, tensor(1, 2, 3, 5), Q), {}, ValueError, "key has head dimension 5, query 4"),
    ((Q, Q, tensor(1, 2, 4, 4)), {}, ValueError, "value has 4 positions, key 3"),
    ((tensor(1, 4, 3, 4), Q, Q), {}, ValueError, "query has 4 heads, key 2.*enable_gqa"),
    ((tensor(1, 3, 3, 4), Q, Q), {}, ValueError, "query has 3 heads, key 2, value 2; they do not broadcast$"),
    ((Q, tensor(1, 3, 3, 4), tensor(1, 3, 3, 4)), {"enable_gqa": True}, ValueError, "2 query heads.*3 key heads"),
    ((Q, Q, tensor(1, 3, 3, 4)), {}, ValueError, "query has 2 heads, key 2, value 3; they do not broadcast$"),
    ((Q, Q, tensor(1, 3, 3, 4)), {"enable_gqa": True}, ValueError, "key has 2 heads, value 3"),
    ((Q, Q, tensor(1, 1, 3, 4)), {"enable_gqa": True, "softcap": 1.0}, ValueError, "key has 2 heads, value 1"),
    (
        (tensor(2, 2, 3, 4), tensor(3, 2, 3, 4), tensor(3, 2, 3, 4)),
        {},
        ValueError,
        "leading dimensions.*do not broadcast",
    ),
    ((Q, Q, Q, tensor(5, 3)), {}, ValueError, r"attn_mask \(5, 3\) does not broadcast"),
    ((Q, Q, Q, tensor(3, 3, dtype=torch.int32)), {}, TypeError, "attn_mask must be boolean or floating point.*int32"),
    ((Q, Q, Q, "causal"), {}, TypeError, "attn_mask must be a Tensor.*str"),
    ((Q, Q, Q), {"scale": "0.5"}, TypeError, "scale must be a number.*, got '0.5'"),
    ((Q, Q, Q), {"scale": [0.5]}, TypeError, r"scale must be a number.*, got \[0.5\]"),
    ((Q, Q, Q, causal_lower_right(4, 3)), {}, ValueError, r"CausalBias is for \(4, 3\).*\(3, 3\)"),
    ((Q, Q, Q, causal_lower_right(3, 3)), {"is_causal": True}, ValueError, "is_causal and a CausalBias"),
    ((Q, Q, Q), {"dropout_p": 1.5}, ValueError, "dropout_p must be in.*1.5"),
    ((Q, Q, Q), {"softcap": -1.0}, ValueError, "softcap must be finite and not negative.*-1.0"),
    ((Q, Q, Q), {"window": (-2, 1)}, ValueError, r"window must be.*\(-2, 1\)"),
    ((Q, Q, Q), {"window": (1,)}, ValueError, r"window must be.*\(1,\)"),
    ((Q, Q, Q), {"window": 5}, ValueError, "window must be.*5"),
    ((Q, Q, Q), {"alibi_slopes": tensor(3)}, ValueError, r"alibi_slopes must have shape \(2,\).*\(3,\)"),
    ((Q, Q, Q), {"alibi_slopes": tensor(2).int()}, TypeError, "alibi_slopes must be floating point.*int32"),
    ((Q, Q, Q), {"alibi_slopes": tensor(2).to("meta")}, ValueError, "alibi_slopes is on meta, query on cpu"),
    ((Q, Q, Q, tensor(3, 3).to("meta")), {}, ValueError, "attn_mask is on meta, query on cpu"),
    ((Q, Q.to("meta"), Q), {}, ValueError, "key is on meta"),
]


@pytest.mark.parametrize("args, kwargs, error, message", BAD, ids=[message for *_, message in BAD])
def test_bad_arguments(args, kwargs, error, message, backend):
    with pygpt.backend(backend), pytest.raises(error, match=f"scaled_dot_product_attention: .*{message}"):
        sdpa(*args, **kwargs)


def test_head_dimensions_above_the_limit_fall_back(compiled):
    q = torch.randn(1, 1, 3, 513)
    torch.testing.assert_close(sdpa(q, q, q), F.scaled_dot_product_attention(q, q, q))
    with pygpt.backend(compiled), pytest.raises(RuntimeError, match="head dimension above (256|512)"):
        sdpa(q, q, q[..., :8])
    with pygpt.backend(compiled), pytest.raises(RuntimeError, match="head dimension above (256|512)"):
        sdpa(q[..., :8], q[..., :8], q)


def test_fully_masked_rows_of_the_kernels(kernels):
    """S = 0 is the only such row without a mask: output 0, lse -inf."""
    out, lse = kernels.attention_fwd(tensor(1, 2, 3, 4), tensor(1, 2, 0, 4), tensor(1, 2, 0, 5), True, 1.0)
    assert torch.equal(out, tensor(1, 2, 3, 5)) and torch.equal(lse, torch.full((1, 2, 3), -math.inf))


@pytest.mark.parametrize("L", [1, 4, 5, 70])
def test_rows_whose_scores_are_all_minus_infinity(L, kernels):
    """They are as rows that see nothing, and their gradients 0."""
    q, k, v, dout = (tensor(1, 2, n, 64) + x for n, x in ((L, 1e20), (9, -1e20), (9, 1.0), (L, 1.0)))
    out, lse = kernels.attention_fwd(q, k, v, False, 1.0)
    assert not out.any() and torch.equal(lse, torch.full((1, 2, L), -math.inf))
    for gradient in kernels.attention_bwd(dout, None, q, k, v, out, lse, False, 1.0, [True] * 3)[:3]:
        assert torch.equal(gradient, torch.zeros_like(gradient))
