"""What is Triton's own: both ways of reading tiles, launching, and the registered ops.

Parity with float64 is in test_parity.py, torch.compile in test_compile.py. Without a GPU all of it runs
in Triton's interpreter, whose errors are in test_triton_interpreter.py. test_triton_compiled.py compiles the kernels.
"""

import itertools
import math
from pathlib import Path

import cases
import pytest
import torch
import triton
import triton.language as tl

import pygpt
from pygpt import verify
from pygpt.dispatch import OPS, TABLE

if TABLE["triton"].missing:
    pytest.fail(TABLE["triton"].missing, pytrace=False)
from pygpt.triton_kernels import attention, common, mlp, norm
from pygpt.triton_kernels.attention import scores
from pygpt.triton_kernels.attention import tiles as attention_tiles

from pygpt.ops import attention as oracle
from pygpt.ops.common import _philox

KERNELS = TABLE["triton"].kernels
DEVICE = TABLE["triton"].devices[0]
NAMES = [f"{op}_{way}" for op in OPS for way in ("fwd", "bwd")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOT = Path(__file__).parents[2]


def registered(name):
    return getattr(torch.ops.pygpt_triton, name).default


def draw(op, dims, dtype, generator, **how):
    return verify.draw(op, dims, dtype, generator, device=DEVICE, **how)


def directions(op, args, grads):
    with pygpt.backend("triton"):
        return verify.directions(op, verify.SPECS[op].call, args, grads)


# ------------------------------------------------------------------------------- the ops
@pytest.mark.parametrize("name", NAMES)
def test_schema_is_that_of_the_compiled_op(name):
    """But for the names of what is returned."""

    def plain(schema):
        arguments = [(a.name, str(a.type)) for a in schema.arguments]
        return arguments, [str(r.type) for r in schema.returns]

    assert plain(registered(name)._schema) == plain(getattr(torch.ops.pygpt, name).default._schema)


@pytest.mark.parametrize("op, dims", list(cases.variants(cases.TINY)), ids=cases.ids)
def test_opcheck(op, dims, generator):
    args, grads = draw(op, dims, torch.float32, generator)
    for name, call in cases.kernel_calls(op, args, grads, KERNELS):
        torch.library.opcheck(registered(name), call)


# ------------------------------------------------------------------------------- every path
def targets_and_dtypes():
    """Targets and dtypes that have configurations of their own are for `make test`, the others for `make test-all`.

    float16 has bfloat16's. float32 has sm90's, which test_parity.py runs too, or sm80's (the GEMM on gfx942).
    """
    for target, dtype in itertools.product(common.TARGETS, DTYPES):
        quick = dtype == torch.bfloat16 or target == "sm80"
        yield pytest.param(target, dtype, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize("target, dtype", list(targets_and_dtypes()), ids=cases.ids)
@pytest.mark.parametrize("op", ["attention_lse", "linear", "mlp"])
@pytest.mark.share(2)
def test_every_targets_configurations(op, target, dtype, generator):
    """And both ways of reading tiles: through descriptors (sm90, sm100) and through pointers."""
    L, S = (70, 70) if dtype == torch.float32 else (150, 140)  # two tiles or more each way
    dims = {"attention_lse": {"B": 1, "H": 2, "L": L, "S": S, "E": 64, "causal": 1}, "linear": {"M": 130, "K": 96}}
    with common.compiling_for(target):
        assert common.tileable(torch.zeros(16, 64, dtype=dtype)) == (target in ("sm90", "sm100"))
        dims = dims.get(op, {"M": 130, "C": 48, "H": 136})
        cases.assert_exact(op, dims, dtype, generator, "triton", device=DEVICE)


# ------------------------------------------------------------------------------- attention's two forms of p
def one_key_rows(smallest, largest, dtype, generator):
    """q, k and scale of rows whose own key has all their weight. Scores times log2 e have either sign and such sizes.

    All products are small integers times a power of two, so that their sums are exact in any order.
    """
    L, E, scale = 70 if dtype == torch.float32 else 150, 64, 30.3
    k = torch.randint(2, (L, E), generator=generator).double() * 2 - 1
    k[:, -1] = 1
    size = smallest * (largest / smallest) ** torch.rand(L, 1, generator=generator).double()
    size[:2] = torch.tensor([[smallest], [largest]])
    unit = (size / (63 * scale * math.log2(math.e))).to(torch.bfloat16).double()
    q = unit * k
    q[:, -1] = torch.where(torch.rand(L, generator=generator) < 0.5, 0, -128 * unit[:, 0])
    return *(t.to(dtype)[None, None].to(DEVICE) for t in (q, k)), scale


@pytest.mark.parametrize(
    "smallest, largest, causal, dtype",
    [
        (0.1, 0.95, False, torch.bfloat16),  # no row of a tile is beyond the limit of the fused form,
        (0.2, 0.95, False, torch.float16),
        (0.5, 1.05, False, torch.bfloat16),  # a few hardly,
        (0.2, 200.0, False, torch.bfloat16),  # many by far
        (0.2, 200.0, True, torch.float16),
        (0.1, 0.95, False, torch.float32),  # which has no fused form
    ],
    ids=cases.ids,
)
def test_the_only_key_of_a_row_weighs_exactly_one(smallest, largest, causal, dtype, generator):
    limit = 2**21 * torch.finfo(torch.bfloat16 if dtype == torch.float32 else dtype).eps
    q, k, scale = one_key_rows(smallest * limit, largest * limit, dtype, generator)
    v, dout = (torch.randn(q.shape, generator=generator).to(q) for _ in range(2))
    scale_f = torch.tensor(scale, dtype=torch.float32, device=DEVICE)
    out, lse = KERNELS.attention_fwd(q, k, v, causal, scale)
    assert torch.equal(out, v)
    assert torch.equal(lse, (q.float() * k.float()).sum(-1) * scale_f)
    grads = KERNELS.attention_bwd(dout, torch.ones_like(lse), q, k, v, out, lse, causal, scale, [True] * 3)
    dq, dk, dv = grads[:3]
    assert torch.equal(dv, dout)
    how = {"rtol": 1e-5 if dtype == torch.float32 else 0, "atol": 0}  # of ds, which is that of lse
    torch.testing.assert_close(dq, (scale_f * k.float()).to(dtype), **how)
    torch.testing.assert_close(dk, (scale_f * q.float()).to(dtype), **how)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-60, -1e-60])
def test_a_scale_that_vanishes_in_float32_is_zero(scale, generator):
    q = torch.randn(1, 1, 70, 16, generator=generator).to(DEVICE)
    mean = q.cumsum(2) / torch.arange(1, 71, device=DEVICE)[:, None]
    torch.testing.assert_close(KERNELS.attention_fwd(q, q, q, True, scale)[0], mean)


# ------------------------------------------------------------------------------- the tile schedulers
@pytest.mark.parametrize("L", [2**17, 2**28])
def test_groups_of_heads_are_no_larger_than_the_heads(L):
    """GROUP times the tiles of a head is computed in 32 bits. One key is shared by any number of heads."""
    launched = []

    def observe(kernel, grid, args, *_):
        launched.append(dict(zip(kernel.arg_names, args, strict=False)))

    with common.compiling_for("sm90", observe):
        q, k = (torch.empty(1, 3, n, 16, dtype=torch.bfloat16, device="meta") for n in (L, 1))
        out, lse = KERNELS.attention_fwd(q, k, k, False, 1.0)
        KERNELS.attention_bwd(out, None, q, k, k, out, lse, False, 1.0, [True] * 3)
    assert [call["GROUP"] for call in launched if "GROUP" in call] == [3, 3, 3]


@triton.jit
def _gemm_tile_coord(result, tiles_m, tiles_n, GROUP: tl.constexpr):
    tile_m, tile_n = mlp._tile_coord(tl.program_id(0), tiles_m, tiles_n, GROUP)
    tl.store(result + tl.program_id(0) * 2, tile_m)
    tl.store(result + tl.program_id(0) * 2 + 1, tile_n)


@pytest.mark.parametrize("tiles_m, tiles_n, group", [(6, 3, 4), (1, 5, 8), (4, 2, 2), (3, 1, 1)])
def test_a_products_tiles_are_scheduled_in_groups_of_rows(tiles_m, tiles_n, group):
    """Each tile once: a group's rows of tiles share their first column, then their second one."""
    result = torch.zeros(tiles_m * tiles_n, 2, dtype=torch.int32, device=DEVICE)
    _gemm_tile_coord[(tiles_m * tiles_n,)](result, tiles_m, tiles_n, group)
    groups = [range(first, min(first + group, tiles_m)) for first in range(0, tiles_m, group)]
    assert result.tolist() == [[m, n] for some in groups for n in range(tiles_n) for m in some]


@triton.jit
def _tile_coord(result, tiles, heads, H, GROUP):
    at = attention_tiles.tile_coord(tiles, heads, H, GROUP)
    result += tl.program_id(0) * 4
    tl.store(result, at.tile)
    tl.store(result + 1, at.head)
    tl.store(result + 2, at.b)
    tl.store(result + 3, at.h)


@pytest.mark.parametrize("tiles, B, H, group", [(3, 2, 3, 4), (1, 1, 5, 2), (4, 1, 1, 1), (2, 7, 1, 3), (5, 2, 2, 4)])
def test_tiles_are_scheduled_in_groups_of_heads(tiles, B, H, group):
    """Each tile of each head once: a group's heads share their first tiles, then their second ones."""
    heads = B * H
    result = torch.zeros(tiles * heads, 4, dtype=torch.int32, device=DEVICE)
    _tile_coord[(tiles * heads,)](result, tiles, heads, H, group)
    groups = [range(first, min(first + group, heads)) for first in range(0, heads, group)]
    assert result.tolist() == [
        [tile, head, head // H, head % H] for some in groups for tile in range(tiles) for head in some
    ]


@pytest.mark.parametrize("causal", [0, 1])
def test_a_partial_group_of_heads(causal, generator, monkeypatch):
    """Six heads in groups of four, of two tiles each."""
    dims = {"B": 2, "H": 3, "L": 150, "S": 140, "E": 16, "causal": causal}
    groups = set()

    def launch(kernel, grid, *args, **how):
        groups.add(dict(zip(kernel.arg_names, args, strict=False)).get("GROUP"))
        common.launch(kernel, grid, *args, **how)

    monkeypatch.setattr(attention, "launch", launch)
    monkeypatch.setattr(attention, "L2_BYTES", 4 * 140 * (16 + 16) * 2)
    cases.assert_exact("attention", dims, torch.bfloat16, generator, "triton", device=DEVICE)
    assert groups == {4, None}  # the kernel of delta has none


# ------------------------------------------------------------------------------- attention's options
@triton.jit
def _intervals(
    walks, sees, transposed, one, L, S, diagonal, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What attention_tiles says of the queries ROWS * program_id and after them, for COLS * 4 keys."""
    row = tl.program_id(0) * ROWS
    begin, unmasked, masked, end = attention_tiles.walk(
        attention_tiles.Visible(L, S, diagonal, left, right, LEFT, RIGHT), row, ROWS, COLS
    )
    tl.store(walks + tl.program_id(0) * 4, begin)
    tl.store(walks + tl.program_id(0) * 4 + 1, unmasked)
    tl.store(walks + tl.program_id(0) * 4 + 2, masked)
    tl.store(walks + tl.program_id(0) * 4 + 3, end)
    i = row + tl.arange(0, ROWS)
    for tile in tl.static_range(4):
        at = i[:, None] * (4 * COLS) + tile * COLS + tl.arange(0, COLS)[None, :]
        of_keys = attention_tiles.mask_of(
            attention_tiles.Visible(L, S, diagonal, left, right, LEFT, RIGHT), row, tile * COLS, ROWS, COLS
        )
        tl.store(sees + at, (of_keys & (i < L)[:, None]).to(tl.int8))
        of_queries = attention_tiles.queries_of(
            attention_tiles.Visible(L, S, diagonal, left, right, LEFT, RIGHT), row, tile * COLS, ROWS, COLS
        )
        keys = tile * COLS + tl.arange(0, COLS)
        tl.store(transposed + at.T, (of_queries & (keys < S)[:, None]).to(tl.int8))
    tl.store(one + i, attention_tiles.sees_one_key(
        attention_tiles.Visible(L, S, diagonal, left, right, LEFT, RIGHT), i
    ).to(tl.int8))  # fmt: skip


def random_interval(generator):
    """L, S, diagonal, left and right, -1 for no limit."""
    L, S = (int(torch.randint(1, 65, (), generator=generator)) for _ in range(2))
    left, right = (int(torch.randint(-1, 24, (), generator=generator)) for _ in range(2))
    return L, S, (S - L) * int(torch.randint(2, (), generator=generator)), left, right


def test_tiles_walk_over_the_keys_that_queries_see(generator):
    """And the masks of tiles, and which rows see one key."""
    ROWS, COLS = 16, 16
    for _ in range(20):
        L, S, diagonal, left, right = random_interval(generator)
        walks = torch.zeros(4, 4, dtype=torch.int32, device=DEVICE)
        sees, transposed = (torch.zeros(4 * ROWS, 4 * COLS, dtype=torch.int8, device=DEVICE) for _ in range(2))
        one = torch.zeros(4 * ROWS, dtype=torch.int8, device=DEVICE)
        _intervals[(4,)](
            walks, sees, transposed, one, L, S, diagonal, max(left, 0), max(right, 0), left >= 0,
            right >= 0, ROWS, COLS,
        )  # fmt: skip
        d = torch.arange(4 * COLS) - torch.arange(4 * ROWS)[:, None] - diagonal
        inside = (torch.arange(4 * ROWS) < L)[:, None] & (torch.arange(4 * COLS) < S)
        want = inside & (d >= (-left if left >= 0 else -1000)) & (d <= (right if right >= 0 else 1000))
        assert torch.equal(sees.cpu().bool(), want) and torch.equal(transposed.cpu().bool(), want)
        sees_one = want.sum(1) == 1
        assert torch.equal(one[:L].cpu().bool(), sees_one[:L])
        for tile, (begin, unmasked, masked, end) in enumerate(walks.tolist()):
            rows = slice(tile * ROWS, min(tile * ROWS + ROWS, L))
            seen = want[rows]
            keys = torch.arange(4 * COLS)
            assert not seen[:, (keys < begin) | (keys >= max(end, begin))].any()
            assert seen[:, (keys >= unmasked) & (keys < masked)].all()
            assert begin % COLS == unmasked % COLS == masked % COLS == 0 and begin <= unmasked <= max(masked, unmasked)


@triton.jit
def _kept(result, seed, threshold, head, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    none = attention_tiles.Scores(
        None, None, None, None, None, None, None, None, seed, threshold, None, False, True
    )  # fmt: skip
    params = attention_tiles.Params(
        attention_tiles.Visible(0, 0, 0, 0, 0, False, False), none, 0, 0, 0, 0.0, 1, False, 0, 0
    )
    keep = scores.kept(head, row, col, params, ROWS, COLS)
    tl.store(result + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize("head, row, col", [(0, 0, 0), (7, 35, 48), (2**20 + 1, 2**21 + 5, 2**22 + 64)])
def test_dropouts_bits(p, head, row, col, generator):
    """Bit for bit those of the formulas."""
    ROWS, COLS = 16, 32
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator)
    keep = torch.zeros(ROWS, COLS, dtype=torch.int8, device=DEVICE)
    threshold = attention._scores(oracle.Options(seed=seed, dropout_p=p))[0][-2]
    _kept[(1,)](keep, seed.to(DEVICE), threshold, head, row, col, ROWS, COLS)
    group, rows = col // 4 + torch.arange(COLS // 4), torch.arange(row, row + ROWS)[:, None]
    words = torch.stack(_philox(seed, (group, rows, head, 0)), -1).flatten(-2)
    assert torch.equal(keep.cpu().bool(), words >= min(math.floor(p * 2**32), 2**32 - 1))


@triton.jit
def _tanh(y, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, scores.tanh(tl.load(x + i)))


def test_tanh_of_small_and_large_numbers():
    x = torch.cat([torch.logspace(-30, 2, 2047, dtype=torch.float64), torch.tensor([math.inf])]).float()
    x = torch.cat([x, -x]).to(DEVICE)
    y = torch.empty_like(x)
    _tanh[(1,)](y, x, len(x))
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=3 * 2**-24, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize(
    "left, causal, S", [(0, False, 257), (3, False, 257), (-1, False, 1), (-1, True, 1), (0, True, 40)]
)
def test_a_row_that_sees_one_key_has_the_gradient_of_lse_alone(left, causal, S, dtype, generator):
    """Also in a tile that has one key (S = 257, and S = 1), in which no other query needs a mask."""
    L = 300 if S > 1 else 70
    q, k, v, dout = (torch.randn(1, 1, n, 16, generator=generator).to(dtype).to(DEVICE) for n in (L, S, S, L))
    options = None, None, None, None, 0.0, 0.0, left, -1 if causal or left < 0 else 20, False
    out, lse = KERNELS.attention_fwd(q, k, v, causal, 0.3, *options)
    begin, end = oracle.interval(L, S, DEVICE, causal, oracle.Options(*options))
    one = (end - begin == 1)[:, 0]
    assert one.any()
    for dlse in (None, torch.randn(lse.shape, generator=generator).to(DEVICE)):
        got = KERNELS.attention_bwd(dout, dlse, q, k, v, out, lse, causal, 0.3, [True] * 3, *options)
        want = oracle.attention_bwd(dout, dlse, q, k, v, out, lse, causal, 0.3, [True] * 3, *options)
        for a, b in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=5e-2 * b.std().item())
        if dlse is None:
            assert not got[0][:, :, one].any()
            if S == 1:
                assert not got[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.ids)
def test_grouped_heads_of_which_one_is_beyond_the_fused_form(dtype, generator):
    """Its keys start over with all heads of the group."""
    q, k, v, dout = (torch.randn(1, heads, 140, 64, generator=generator).to(dtype).to(DEVICE) for heads in (4, 2, 2, 4))
    q[:, 1] *= 2000
    args = q, k, v, False, 1.0
    out, lse = KERNELS.attention_fwd(*args)
    got = KERNELS.attention_bwd(dout, None, q, k, v, out, lse, False, 1.0, [True] * 3)
    repeated = (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), False, 1.0)
    all_out, all_lse = KERNELS.attention_fwd(*repeated)
    assert torch.equal(out, all_out) and torch.equal(lse, all_lse)
    dq, dk, dv = KERNELS.attention_bwd(dout, None, *repeated[:3], out, lse, False, 1.0, [True] * 3)[:3]
    assert torch.equal(got[0], dq)
    for a, b in zip(got[1:3], (dk, dv), strict=True):
        want = b.double().unflatten(1, (2, 2)).sum(2)
        error = (a.double() - want).norm() / want.norm()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("direction", ["keys", "queries"])
def test_tiles_without_a_visible_key_are_not_read(direction, generator):
    """By a boolean mask: what is not a number there does not matter."""
    q, k, v = (torch.randn(1, 1, 256, 16, generator=generator).bfloat16().to(DEVICE) for _ in range(3))
    mask = torch.ones(1, 1, 256, 256, dtype=torch.bool, device=DEVICE)
    hidden = (slice(None), slice(None), slice(128, 256))
    if direction == "keys":
        mask[..., 128:] = False
        k[hidden], v[hidden] = math.nan, math.nan
    else:
        mask[..., 128:, :] = False
        q[hidden] = math.nan
    out, lse = KERNELS.attention_fwd(q, k, v, False, 0.3, mask)
    grads = KERNELS.attention_bwd(out, None, q, k, v, out, lse, False, 0.3, [True] * 3, mask)
    assert all(t.isfinite().all() for t in (out, *grads[:3]))


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 40), (1, 70))), ids=str)
@pytest.mark.share(3)
def test_the_gradient_of_a_mask_that_is_broadcast(shape, generator):
    q, k, v, dout = (
        torch.randn(2, heads, n, 16, generator=generator).to(DEVICE)
        for heads, n in ((4, 40), (2, 70), (2, 70), (4, 40))
    )
    mask = torch.randn(shape, generator=generator).to(DEVICE)
    sink = torch.randn(4, generator=generator).to(DEVICE)  # without it, the gradients of a row sum to 0
    options = mask, None, sink, None, 0.0, 0.0, 20, -1, True
    needs = [False, False, False, True, False, False]
    out, lse = KERNELS.attention_fwd(q, k, v, False, 0.3, *options)
    got = KERNELS.attention_bwd(dout, None, q, k, v, out, lse, False, 0.3, needs, *options)[3]
    want = oracle.attention_bwd(dout, None, q, k, v, out, lse, False, 0.3, needs, *options)[3]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- offsets beyond 32 bits
EVEN, HALF, ODD = 2**31 + 16, 2**30 + 16, 2**31 + 11  # strides in elements; EVEN and HALF keep rows aligned to 16 bytes
FAR = [(EVEN, torch.bfloat16), (HALF, torch.bfloat16), (HALF, torch.float32), (ODD, torch.bfloat16)]
POINTERS, DESCRIPTORS = [(*far, "sm80") for far in FAR], [(*far, "sm90") for far in FAR[:2]]


def sparse(elements, dtype):
    """A large zero tensor. On a CPU only the pages that are touched exist."""
    size = elements * dtype.itemsize
    if DEVICE == "cpu":
        return cases.sparse(elements, dtype)
    if torch.cuda.mem_get_info()[0] < size + 2**30:
        pytest.skip(f"needs {size >> 30} GB of GPU memory")
    return torch.zeros(elements, dtype=dtype, device=DEVICE)


class FarApart:
    """Draws tensors that have a large stride along one dimension and are dense along the others, all in one memory."""

    def __init__(self, stride, length, dtype, generator):
        self.stride, self.length, self.generator, self.used = stride, length, generator, 0
        self.memory = sparse((length - 1) * stride + 2**17, dtype)

    def __call__(self, *shape, far=0):
        dense = [n for d, n in enumerate(shape) if d != far]
        strides = list(torch.empty(dense, device="meta").stride())
        t = self.memory.as_strided(shape, [*strides[:far], self.stride, *strides[far:]], self.used)
        self.used += -(-math.prod(dense) // 16) * 16
        assert shape[far] <= self.length and self.used <= 2**17
        return t.copy_(torch.randn(shape, generator=self.generator))


def near(t):
    """A copy with a small stride instead of the large one, and rows that are aligned alike."""
    if not isinstance(t, torch.Tensor) or max(t.stride()) < 2**30:
        return t
    small = -(-t.numel() // 16) * 16 + max(t.stride()) % 16
    return t.new_empty_strided(t.shape, [min(stride, small) for stride in t.stride()]).copy_(t)


def assert_same_when_near(name, *args):
    ours, want = (verify.as_tuple(getattr(KERNELS, name)(*each)) for each in (args, map(near, args)))
    for a, b in zip(ours, want, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("in_registers", [True, False])
@pytest.mark.parametrize("stride, dtype", FAR, ids=cases.ids)
def test_norms_of_rows_that_are_far_apart(stride, dtype, in_registers, generator, monkeypatch):
    if not in_registers:  # then rows are read again for each pass
        monkeypatch.setattr(norm, "FWD_WIDTH", 0)
        monkeypatch.setattr(norm, "BWD_WIDTH", 0)
    draw_far = FarApart(stride, 5, dtype, generator)
    x, residual, dy, ds = (draw_far(5, 64) for _ in range(4))
    w, mean, rstd = (torch.rand(n, generator=generator).to(DEVICE) for n in (64, 5, 5))
    assert_same_when_near("add_layer_norm_fwd", x, residual, w.to(dtype), w.to(dtype), 1e-5)
    assert_same_when_near("add_layer_norm_bwd", dy, ds, x, w.to(dtype), mean, rstd, [True] * 3)
    assert_same_when_near("add_rms_norm_fwd", x, residual, w.to(dtype), 1e-5)
    assert_same_when_near("add_rms_norm_bwd", dy, ds, x, w.to(dtype), rstd, [True] * 2)
    dropout = torch.tensor([5], device=DEVICE), 0.3
    assert_same_when_near("dropout_add_layer_norm_fwd", x, residual, w, w, 1e-5, *dropout)
    assert_same_when_near("dropout_add_layer_norm_bwd", dy, ds, x, w, mean, rstd, [True] * 4, *dropout)


@pytest.mark.parametrize("stride, dtype, target", POINTERS + DESCRIPTORS, ids=cases.ids)
def test_products_of_rows_that_are_far_apart(stride, dtype, target, generator):
    draw_far = FarApart(stride, 17, dtype, generator)
    x, dy, w, hidden, proj = (draw_far(*shape) for shape in ((17, 32), (17, 16), (16, 32), (17, 16), (16, 16)))
    with common.compiling_for(target):
        assert_same_when_near("linear_fwd", x, w, None)
        assert_same_when_near("linear_bwd", dy, x, w, [True] * 3)
        assert_same_when_near("mlp_fwd", x, w, None, proj, None, "gelu")
        assert_same_when_near("mlp_bwd", dy, x, w, proj, hidden, hidden, "gelu", [True] * 5)
        half = proj[:, :8]
        assert_same_when_near("mlp_fwd", x, w, None, half, None, "swiglu")
        assert_same_when_near("mlp_bwd", dy, x, w, half, hidden[:, :8], hidden, "swiglu", [True] * 5)


@pytest.mark.parametrize("far", [0, 1, 2])  # sequences, heads or positions
@pytest.mark.parametrize("stride, dtype, target", POINTERS + DESCRIPTORS, ids=cases.ids)
def test_attention_of_what_is_far_apart(stride, dtype, target, far, generator):
    draw_far, draw_statistics = (FarApart(stride, 5, each, generator) for each in (dtype, torch.float32))
    shape = [5 if d == far else n for d, n in enumerate((1, 2, 5, 16))]
    q, k, v, out, dout = (draw_far(*shape, far=far) for _ in range(5))
    lse, dlse = torch.rand(shape[:3], generator=generator).to(DEVICE), draw_statistics(*shape[:3], far=far)
    with common.compiling_for(target):
        assert_same_when_near("attention_fwd", q, k, v, True, 0.3)
        assert_same_when_near("attention_bwd", dout, dlse, q, k, v, out, lse, True, 0.3, [True] * 3)


@pytest.mark.parametrize("far", [0, 1, 2])
def test_an_output_of_attention_that_is_far_apart(far, generator, monkeypatch):
    """Outputs are dense, but those of a large call are as large."""
    shape = [5 if d == far else n for d, n in enumerate((1, 2, 5, 16))]
    q = torch.randn(shape, generator=generator).bfloat16().to(DEVICE)
    want = KERNELS.attention_fwd(q, q, q, False, 0.3)
    draw_far = FarApart(HALF, 5, torch.bfloat16, generator)
    monkeypatch.setattr(attention, "empty_strided", lambda *_: draw_far(*shape, far=far))
    assert all(map(torch.equal, KERNELS.attention_fwd(q, q, q, False, 0.3), want))


@triton.jit
def _store_one_row(grad, stats, length, head, row, H, L, WIDTH: tl.constexpr):
    ones = tl.full([1, WIDTH], 1.0, tl.float32)
    attention_tiles.store_gradient(
        grad,
        attention_tiles.Tile(
            attention_tiles.Operand(grad, 0, length, 0, 0, 0, WIDTH, 1, WIDTH),
            attention_tiles.TileCoord(0, head, head // H, head % H),
            row,
            ones,
        ),
        H,
        H,
    )
    tl.store(attention_tiles.rows_of_head(stats, head, L, 0), 1.0)


@pytest.mark.parametrize("head, row", [(3, 0), (0, 2**17 - 1), (3, 2**17 - 1)])
def test_gradients_and_statistics_of_attention_past_32_bits(head, row):
    """The addresses in (B, T, H, WIDTH) gradients and in (B H, L) statistics that are large themselves."""
    B, T, H, width, L = 2, 2**17, 2, 2**14, 2**30
    grad, stats = sparse(B * T * H * width, torch.bfloat16), sparse(B * H * L, torch.float32)
    _store_one_row[(1,)](grad, stats, T, head, row, H, L, width)
    assert grad.view(B, T, H, width)[head // H, row, head % H].eq(1).all()
    assert stats[head * L] == 1


# ------------------------------------------------------------------------------- launching
class Recorded:
    """Stands for a kernel; refuses the configurations it is told to."""

    __name__ = "recorded"

    def __init__(self, *refused):
        self.refused, self.calls = refused, []

    def __getitem__(self, grid):
        def run(*args, BLOCK, num_warps, num_stages, **constants):
            self.calls.append((grid, BLOCK))
            if BLOCK in self.refused:
                raise triton.runtime.errors.OutOfResources(BLOCK, 0, "shared memory")

        return run


def configurations():
    return common.Configs("test", tuple(common.Config({"BLOCK": block}) for block in (64, 32, 16)))


def start(kernel, configs, n=100):
    common.launch(kernel, lambda blocks: n // blocks["BLOCK"], torch.zeros(3, device=DEVICE), configs=configs)


def test_what_does_not_fit_gives_way_to_the_next(monkeypatch):
    kernel, configs = Recorded(64), configurations()
    start(kernel, configs)
    start(kernel, configs)
    assert kernel.calls == [((1,), 64), ((3,), 32), ((3,), 32)]  # the refused one is not tried again


def test_nothing_fits():
    with pytest.raises(RuntimeError, match="no configuration of recorded fits .*shared memory"):
        start(Recorded(64, 32, 16), configurations())


def test_an_empty_grid_starts_nothing():
    kernel = Recorded()
    start(kernel, configurations(), n=0)
    assert not kernel.calls


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"x": "y"}', "\0\xff", '{"KEY": 99}', '{"KEY": -1}'])
def test_autotuning_survives_any_cache(content, monkeypatch, tmp_path):
    """The fastest candidate is found and kept; what the file held before does not matter."""
    monkeypatch.setenv("PYGPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    times, measured = {64: 3.0, 32: 1.0, 16: 2.0}, []

    def do_bench(run):
        run()
        measured.append(kernel.calls[-1][1])
        return times[measured[-1]]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    kernel, configs = Recorded(), configurations()

    def tuned():
        arguments = (torch.zeros(3, device=DEVICE),)
        return common._tuned(kernel, lambda blocks: 1, arguments, {}, configs).blocks["BLOCK"]

    if content is not None:
        tuned()
        (key,) = common.read_cache()
        common.cache_file().write_text(content.replace("KEY", key), encoding="latin-1")
        measured.clear()
    assert tuned() == 32 and measured == [64, 32, 16]
    assert tuned() == 32 and measured == [64, 32, 16]  # from the file
    assert [f.name for f in common.cache_file().parent.iterdir()] == ["triton.json"]


def test_measuring_restores_what_a_kernel_overwrites(monkeypatch, tmp_path, generator):
    """A candidate runs more than once, but a gate that is not kept lies where the hidden layer is written."""
    shapes = (mlp.FEW_ROWS + 1, 24), (64, 24), (64,), (8, 32)
    x, fc, fc_bias, proj = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    want = mlp.mlp_fwd(x, fc, fc_bias, proj, None, "swiglu", "input")[0]
    measured = []

    def do_bench(run):
        run(), run()
        measured.append(run)
        return len(measured)

    monkeypatch.setenv("PYGPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(common, "AUTOTUNE", True)
    for configs in mlp.GEMM.values():
        monkeypatch.setattr(configs, "chosen", {})
    assert torch.equal(mlp.mlp_fwd(x, fc, fc_bias, proj, None, "swiglu", "input")[0], want) and measured


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYGPT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    common._write_cache("key", 1)
    assert common.read_cache() == {}
