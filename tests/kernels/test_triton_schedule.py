"""Which tiles the Triton kernels take, and in which order: groups of rows and of heads, the keys that queries see."""

import math

import cases
import pytest
import torch
import triton
import triton.language as tl

from pygpt.dispatch import TABLE

if TABLE["triton"].missing:
    pytest.fail(TABLE["triton"].missing, pytrace=False)
from pygpt.triton_kernels import attention, common, mlp
from pygpt.triton_kernels.attention import tiles as attention_tiles

KERNELS = TABLE["triton"].kernels
DEVICE = TABLE["triton"].devices[0]


# ------------------------------------------------------------------------------- groups of rows and of heads
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


# ------------------------------------------------------------------------------- the keys that queries see
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
