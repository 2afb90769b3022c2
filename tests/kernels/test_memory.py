"""Which memory kernels touch, and how much: nothing past a tensor's end, no vector where there is no room for one."""

import ctypes
import signal
import sys
from functools import partial

import cases
import pytest
import torch

from pygpt import verify
from tests import guarded

GPU_SHARE = {"cuda": 1, "triton": 12}  # see conftest
DTYPES = [torch.float32, torch.bfloat16]
ODD = [*cases.TYPICAL.items(), *cases.FEW.items()]
EVEN = [*cases.EVEN.items(), *cases.EVEN_FEW.items()]
LINES = [*(("relu", {"M": n}) for n in (1, 7, 33)), *(("gelu", {"M": n}) for n in (1, 7, 33, 1031))]
HEADS = [("attention_lse", {"B": 1, "H": 2, "L": L, "S": 40, "E": 13, "Ev": 21}) for L in (3, 30)]
MASKED = [
    ("attention_mask", {"B": 1, "H": 2, "L": 30, "S": 41, "E": 13, "Ev": 21}),
    *(("attention_options", {"B": 1, "L": L, "S": 41, "E": 13, "Ev": 21, "mask": "float"}) for L in (3, 30)),
]
GATED = [("mlp", {**dims["mlp"], "activation": "swiglu"}) for dims in (cases.TYPICAL, cases.FEW)]
GATED_EVEN = [("mlp", {**dims["mlp"], "activation": "swiglu"}) for dims in (cases.EVEN, cases.EVEN_FEW)]
WIDE = [*((op, {"M": 2, "N": 4099}) for op in cases.NORMS), ("cross_entropy", {"N": 2, "V": 4099, "smoothing": 0.1})]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("layout", [cases.shifted, cases.pitched], ids=cases.ids)
@pytest.mark.parametrize("op, dims", [*EVEN, *GATED_EVEN], ids=cases.ids)
def test_one_tensor_without_vectors(op, dims, layout, dtype, compiled, device, generator):
    """Rows of whole vectors, but for one tensor, whose start or rows are not aligned: each of them in turn."""
    args, grads = verify.draw(op, dims, dtype, generator)
    tensors = sum(isinstance(a, torch.Tensor) for a in (*args, *grads))
    for n in range(tensors):
        cases.assert_exact(op, dims, dtype, generator, compiled, view=cases.only(n, tensors, layout), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPU tensors")
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=cases.ids)
@pytest.mark.parametrize("aligned", [False, True], ids=["exact end", "aligned start"])
@pytest.mark.parametrize("op, dims", [*ODD, *EVEN, *GATED, *GATED_EVEN, *LINES, *HEADS, *MASKED, *WIDE], ids=cases.ids)
def test_nothing_past_the_end_of_a_tensor(op, dims, aligned, dtype, compiled, generator):
    """Every tensor, results and temporary ones too, ends at a protected page. A failure may be a crash."""
    with guarded.tensors(aligned):
        cases.assert_exact(op, dims, dtype, generator, compiled)


@pytest.mark.parametrize("op, dims", cases.SOME_ROWS, ids=cases.ids)
def test_nothing_past_the_end_of_an_unpacked_weight(op, dims, generator):
    with guarded.tensors(aligned=False):
        cases.assert_exact(op, dims, torch.float32, generator, "cpp")


# ------------------------------------------------------------------------------- offsets beyond 32 bits
def apart(stride, dim, t):
    """``t`` with so many elements from one index of ``dim`` to the next; the memory in between is never touched."""
    if t.dim() < -dim:
        return t
    strides = list(t.contiguous().stride())
    for d in range(t.dim() + dim, -1, -1):
        strides[d] = stride
        stride *= t.shape[d]
    return cases.sparse(stride, t.dtype).as_strided(t.shape, strides).copy_(t)


FAR = [  # rows, heads or batches far apart; rows of whole vectors
    ("attention_lse", {"B": 1, "H": 1, "L": 17, "S": 40, "E": 16, "Ev": 24, "causal": 1}, -2),
    ("attention_lse", {"B": 1, "H": 5, "L": 17, "S": 24, "E": 16}, -3),
    ("attention_lse", {"B": 5, "H": 1, "L": 17, "S": 24, "E": 16}, -4),
    ("attention", {"B": 1, "H": 1, "L": 3, "S": 304, "E": 16}, -2),
    ("linear", {"M": 17, "K": 32, "N": 24}, -2),
    ("linear", {"M": 3, "K": 32, "N": 24}, -2),
    ("linear", {"M": 5, "K": 264, "N": 256}, -2),
    ("mlp", {"M": 17, "C": 32, "H": 24, "O": 40}, -2),
    ("cross_entropy", {"N": 17, "V": 64}, -2),
    ("cross_entropy", {"N": 5, "V": 8200, "smoothing": 0.1, "reduction": "none"}, -2),
    ("linear_cross_entropy", {"N": 17, "K": 32, "V": 24}, -2),
    ("mlp", {"M": 17, "C": 32, "H": 24, "O": 40, "activation": "swiglu"}, -2),
    *((op, {"M": (17, 64)}, -2) for op in ("gelu", "relu")),
    ("rope", {"B": 1, "H": 2, "group": 1, "T": 5, "D": 64, "norm": 1}, -2),
    ("rope", {"B": 1, "H": 5, "group": 1, "T": 3, "D": 64, "norm": 0}, -3),
    ("rope", {"B": 5, "H": 1, "group": 1, "T": 3, "D": 64, "norm": 1}, -4),
    *((op, {"M": 17, "N": 64}, -2) for op in cases.NORMS),
    *((op, {"M": 5, "N": 8200}, -2) for op in cases.NORMS),
]


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="maps CPU memory, most of it never used"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("stride", [2**30 + 16, 2**31 + 16])
@pytest.mark.parametrize("op, dims, dim", FAR, ids=cases.ids)
def test_offsets_beyond_32_bits(op, dims, dim, stride, dtype, compiled, generator):
    """In elements and in bytes, where rows may be read as vectors."""
    cases.assert_exact(op, dims, dtype, generator, compiled, view=partial(apart, stride, dim))


# ------------------------------------------------------------------------------- how much memory
LOSS = """
import resource, sys, torch
import torch.nn.functional as F
from pygpt.functional import linear_cross_entropy
N, K, V = 4096, 768, 50257
ours = sys.argv[1] == "ours"
torch.set_num_threads(1)
x, w = torch.randn(N, K, requires_grad=True), (torch.randn(V, K) / K**0.5).requires_grad_()
target = torch.randint(V, (N,))
F.linear(x[:2], w).sum().backward()  # what the first products allocate, and gradients
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = linear_cross_entropy(x, w, target) if ours else F.cross_entropy(F.linear(x, w), target)
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_linear_cross_entropy_needs_a_quarter_of_pytorchs_memory(run_new_python):
    extra = [int(run_new_python(LOSS, which).stdout) for which in ("ours", "theirs")]
    assert extra[0] <= extra[1] / 4, extra


# ------------------------------------------------------------------------------- the guard itself
@pytest.mark.parametrize("place", [-1, 12])
def test_the_guard_sees_a_write_beside_an_aligned_tensor(place):
    with pytest.raises(AssertionError, match="1 tensors were overrun"), guarded.tensors(aligned=True):
        t = torch.zeros(3)
        ctypes.memset(t.data_ptr() + place, 0, 1)
        del t


PAST_THE_END = """
import ctypes, torch
from tests import guarded
with guarded.tensors(aligned=False):
    t = torch.zeros(3)
    ctypes.string_at(t.data_ptr(), 12 + {more})
"""


@pytest.mark.parametrize("more, code", [(0, 0), (1, -signal.SIGSEGV)])
def test_the_guard_ends_a_process_that_reads_past_the_end(more, code, run_python):
    assert run_python(PAST_THE_END.format(more=more)).returncode == code
