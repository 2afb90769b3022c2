"""rope: each head of q and k at each position, a row of D channels, after an optional RMSNorm (Su et al. 2021).

    x^ = x rstd w, rstd = 1 / sqrt(sum(x^2) / D + eps), or x^ = x
    y_a = x^_a cos - x^_b sin, y_b = x^_b cos + x^_a sin for each pair (a, b); y = x^ in the channels that remain
    g = dy rotated by -angle;  dw = sum over rows of g xhat, xhat = x rstd
    dx = rstd (g w - xhat sum(g w xhat) / D), or dx = g

A program keeps the cosines and sines of a tile of positions in registers and loops over heads of q and then of k. For
dw it sums in registers, too, and `column_sums` adds the programs' sums in a fixed order. The programs depend on the
shape alone. A position whose row of cos and sin does not exist gives NaN.

Shapes of kernel arguments: q, k and their like are (B, H, T, D) with adjacent channels, cos and sin (B or 1, rows, R/2)
and positions (B or 1, T) contiguous, weights (D,), rstd (B, H, T).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pygpt.ops.attention import strides_like_query

from .common import Config, Configs, contiguous, empty, empty_strided, launch, loop_bound, to_storage
from .norm import column_sums

PROGRAMS = 1024  # where positions alone are fewer programs, heads are divided among more


# ------------------------------------------------------------------------------- what both kernels share
class Rows(NamedTuple):
    """A tile of positions of one batch entry, and where the channels are in their rows."""

    batch: tl.tensor  # int64
    position: tl.tensor  # (ROWS,), int64
    part: tl.tensor  # which part of the heads
    T: tl.tensor
    D: tl.tensor
    half: tl.tensor
    INTERLEAVED: tl.constexpr
    PAIRS: tl.constexpr  # half, padded to a power of two
    REST: tl.constexpr  # likewise the number of channels that are not rotated, or 0


class Heads(NamedTuple):
    """A (B, H, T, D) tensor."""

    source: tl.tensor
    stride_b: tl.tensor
    stride_h: tl.tensor
    stride_t: tl.tensor


class Side(NamedTuple):
    """What all tensors of one side, of q or of k, have in common."""

    weight: tl.tensor  # None without a norm
    rstd: tl.tensor
    heads: tl.tensor
    per_part: tl.tensor  # heads of a part


class Angles(NamedTuple):
    """(ROWS, PAIRS) each; sin is that of the negative angle in backward."""

    cos: tl.tensor
    sin: tl.tensor


@triton.jit
def _columns(at):
    """The columns of each pair's first and second member, and those of the channels that are not rotated."""
    pair = tl.arange(0, at.PAIRS)
    first = 2 * pair if at.INTERLEAVED else pair
    second = 2 * pair + 1 if at.INTERLEAVED else at.half + pair
    return first, second, 2 * at.half + tl.arange(0, at.REST if at.REST else 1)


@triton.jit
def _load_row(source, at, in_range, column, valid):
    """Columns of the rows at `source`, (ROWS, 1) pointers, in float32."""
    return tl.load(source + column[None, :], in_range[:, None] & valid[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_weight(weight, column, valid):
    return tl.load(weight + column, valid, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_row(out, value, in_range, column, valid):
    tl.store(out + column[None, :], to_storage(value, out.dtype.element_ty), in_range[:, None] & valid[None, :])


@triton.jit
def _load_angles(at, cos, sin, positions, table_rows, table_stride, positions_stride, SIGN: tl.constexpr):
    in_range = at.position < at.T
    row = at.position
    if positions is not None:
        row = tl.load(positions + at.batch * positions_stride + at.position, in_range, other=0).to(tl.int64)
    exists = (row >= 0) & (row < table_rows)
    pair = tl.arange(0, at.PAIRS)
    offset = (at.batch * table_stride + row * at.half)[:, None] + pair[None, :]
    mask = (in_range & exists)[:, None] & (pair < at.half)[None, :]
    missing = (in_range & ((row < 0) | (row >= table_rows)))[:, None]
    c = tl.where(missing, float("nan"), tl.load(cos + offset, mask, other=0.0))
    s = tl.where(missing, float("nan"), tl.load(sin + offset, mask, other=0.0))
    return Angles(c, s * SIGN)


@triton.jit
def _tile(tiles, parts, ROWS: tl.constexpr):
    """-> batch, positions and part of the heads of this program."""
    program = tl.program_id(0)
    tile, batch = (program // parts) % tiles, program // parts // tiles
    position = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return batch.to(tl.int64), position, program % parts


# ------------------------------------------------------------------------------- rotation, with or without a norm
@triton.jit
def _rotate_heads(x, out, side, angles, eps, at):
    """out = x rotated, for this part of the heads of one tensor; with a weight, after the norm."""
    first, second, rest = _columns(at)
    in_range, paired, remaining = at.position < at.T, tl.arange(0, at.PAIRS) < at.half, rest < at.D
    begin = at.part * side.per_part
    end = tl.minimum(begin + side.per_part, side.heads)
    for h in tl.range(loop_bound(begin), loop_bound(end)):
        head = tl.zeros([1], tl.int64) + h
        row = x.source + (at.batch * x.stride_b + head * x.stride_h + at.position * x.stride_t)[:, None]
        to = out.source + (at.batch * out.stride_b + head * out.stride_h + at.position * out.stride_t)[:, None]
        a = _load_row(row, at, in_range, first, paired)
        b = _load_row(row, at, in_range, second, paired)
        if at.REST:
            r = _load_row(row, at, in_range, rest, remaining)
        if side.weight is not None:
            squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
            if at.REST:
                squares += tl.sum(r * r, 1)
            scale = tl.rsqrt(squares / tl.cast(at.D, tl.float32) + eps)
            tl.store(side.rstd + (at.batch * side.heads + head) * at.T + at.position, scale, in_range)
            a *= scale[:, None] * _load_weight(side.weight, first, paired)
            b *= scale[:, None] * _load_weight(side.weight, second, paired)
            if at.REST:
                r *= scale[:, None] * _load_weight(side.weight, rest, remaining)
        _store_row(to, a * angles.cos - b * angles.sin, in_range, first, paired)
        _store_row(to, b * angles.cos + a * angles.sin, in_range, second, paired)
        if at.REST:
            _store_row(to, r, in_range, rest, remaining)


@triton.jit
def rope_rotate_kernel(
    q, q_out, q_weight, q_rstd, k, k_out, k_weight, k_rstd, cos, sin, positions,
    q_heads, k_heads, q_part, k_part, T, D, half, tiles, parts, table_rows, table_stride, positions_stride, eps,
    q_stride_b, q_stride_h, q_stride_t, q_out_stride_b, q_out_stride_h, q_out_stride_t,
    k_stride_b, k_stride_h, k_stride_t, k_out_stride_b, k_out_stride_h, k_out_stride_t,
    INTERLEAVED: tl.constexpr, SIGN: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program rotates one part of the heads at ROWS positions, by the angle or with SIGN -1 by its negative."""
    batch, position, part = _tile(tiles, parts, ROWS)
    angles = _load_angles(
        Rows(batch, position, part, T, D, half, INTERLEAVED, PAIRS, REST),
        cos, sin, positions, table_rows, table_stride, positions_stride, SIGN,
    )  # fmt: skip
    if q is not None:
        _rotate_heads(
            Heads(q, q_stride_b, q_stride_h, q_stride_t), Heads(q_out, q_out_stride_b, q_out_stride_h, q_out_stride_t),
            Side(q_weight, q_rstd, q_heads, q_part), angles, eps,
            Rows(batch, position, part, T, D, half, INTERLEAVED, PAIRS, REST),
        )  # fmt: skip
    if k is not None:
        _rotate_heads(
            Heads(k, k_stride_b, k_stride_h, k_stride_t), Heads(k_out, k_out_stride_b, k_out_stride_h, k_out_stride_t),
            Side(k_weight, k_rstd, k_heads, k_part), angles, eps,
            Rows(batch, position, part, T, D, half, INTERLEAVED, PAIRS, REST),
        )  # fmt: skip


# ------------------------------------------------------------------------------- backward of the norm
@triton.jit
def _differentiate_heads(dy, x, dx, dw, side, angles, at):
    """dx, unless it is None, and this program's line of partial sums of dw (programs, D), unless that is None."""
    first, second, rest = _columns(at)
    in_range, paired, remaining = at.position < at.T, tl.arange(0, at.PAIRS) < at.half, rest < at.D
    wa, wb = _load_weight(side.weight, first, paired), _load_weight(side.weight, second, paired)
    sum_a = tl.zeros([at.position.shape[0], at.PAIRS], tl.float32)
    sum_b = tl.zeros([at.position.shape[0], at.PAIRS], tl.float32)
    if at.REST:
        wr = _load_weight(side.weight, rest, remaining)
        sum_r = tl.zeros([at.position.shape[0], at.REST], tl.float32)
    begin = at.part * side.per_part
    end = tl.minimum(begin + side.per_part, side.heads)
    for h in tl.range(loop_bound(begin), loop_bound(end)):
        head = tl.zeros([1], tl.int64) + h
        source = x.source + (at.batch * x.stride_b + head * x.stride_h + at.position * x.stride_t)[:, None]
        row = dy.source + (at.batch * dy.stride_b + head * dy.stride_h + at.position * dy.stride_t)[:, None]
        scale = tl.load(side.rstd + (at.batch * side.heads + head) * at.T + at.position, in_range, other=0.0)[:, None]
        a = _load_row(row, at, in_range, first, paired)
        b = _load_row(row, at, in_range, second, paired)
        ga = a * angles.cos - b * angles.sin
        gb = b * angles.cos + a * angles.sin
        xa = _load_row(source, at, in_range, first, paired) * scale
        xb = _load_row(source, at, in_range, second, paired) * scale
        sum_a += ga * xa
        sum_b += gb * xb
        ga *= wa
        gb *= wb
        mean = tl.sum(ga * xa, 1) + tl.sum(gb * xb, 1)
        if at.REST:
            gr = _load_row(row, at, in_range, rest, remaining)
            xr = _load_row(source, at, in_range, rest, remaining) * scale
            sum_r += gr * xr
            gr *= wr
            mean += tl.sum(gr * xr, 1)
        if dx.source is not None:
            mean = (mean / tl.cast(at.D, tl.float32))[:, None]
            to = dx.source + (at.batch * dx.stride_b + head * dx.stride_h + at.position * dx.stride_t)[:, None]
            _store_row(to, (ga - xa * mean) * scale, in_range, first, paired)
            _store_row(to, (gb - xb * mean) * scale, in_range, second, paired)
            if at.REST:
                _store_row(to, (gr - xr * mean) * scale, in_range, rest, remaining)
    if dw is not None:
        line = dw + tl.program_id(0).to(tl.int64) * at.D
        tl.store(line + first, tl.sum(sum_a, 0), paired)
        tl.store(line + second, tl.sum(sum_b, 0), paired)
        if at.REST:
            tl.store(line + rest, tl.sum(sum_r, 0), remaining)


@triton.jit
def rope_bwd_kernel(
    dq_out, q, dq, q_weight, q_rstd, dq_weight, dk_out, k, dk, k_weight, k_rstd, dk_weight, cos, sin, positions,
    q_heads, k_heads, q_part, k_part, T, D, half, tiles, parts, table_rows, table_stride, positions_stride,
    dq_out_stride_b, dq_out_stride_h, dq_out_stride_t, q_stride_b, q_stride_h, q_stride_t,
    dq_stride_b, dq_stride_h, dq_stride_t, dk_out_stride_b, dk_out_stride_h, dk_out_stride_t,
    k_stride_b, k_stride_h, k_stride_t, dk_stride_b, dk_stride_h, dk_stride_t,
    INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The backward of one part of the heads at ROWS positions. A tensor without a weight is only rotated back."""
    batch, position, part = _tile(tiles, parts, ROWS)
    angles = _load_angles(
        Rows(batch, position, part, T, D, half, INTERLEAVED, PAIRS, REST),
        cos, sin, positions, table_rows, table_stride, positions_stride, -1,
    )  # fmt: skip
    if dq_out is not None:
        if q_weight is not None:
            _differentiate_heads(
                Heads(dq_out, dq_out_stride_b, dq_out_stride_h, dq_out_stride_t),
                Heads(q, q_stride_b, q_stride_h, q_stride_t), Heads(dq, dq_stride_b, dq_stride_h, dq_stride_t),
                dq_weight, Side(q_weight, q_rstd, q_heads, q_part), angles,
                Rows(batch, position, part, T, D, half, INTERLEAVED, PAIRS, REST),
            )  # fmt: skip
        else:
            _rotate_heads(
                Heads(dq_out, dq_out_stride_b, dq_out_stride_h, dq_out_stride_t),
                Heads(dq, dq_stride_b, dq_stride_h, dq_stride_t), Side(None, None, q_heads, q_part), angles, 0.0,
                Rows(batch, position, part, T, D, half, INTERLEAVED, PAIRS, REST),
            )  # fmt: skip
    if dk_out is not None:
        if k_weight is not None:
            _differentiate_heads(
                Heads(dk_out, dk_out_stride_b, dk_out_stride_h, dk_out_stride_t),
                Heads(k, k_stride_b, k_stride_h, k_stride_t), Heads(dk, dk_stride_b, dk_stride_h, dk_stride_t),
                dk_weight, Side(k_weight, k_rstd, k_heads, k_part), angles,
                Rows(batch, position, part, T, D, half, INTERLEAVED, PAIRS, REST),
            )  # fmt: skip
        else:
            _rotate_heads(
                Heads(dk_out, dk_out_stride_b, dk_out_stride_h, dk_out_stride_t),
                Heads(dk, dk_stride_b, dk_stride_h, dk_stride_t), Side(None, None, k_heads, k_part), angles, 0.0,
                Rows(batch, position, part, T, D, half, INTERLEAVED, PAIRS, REST),
            )  # fmt: skip


# ------------------------------------------------------------------------------- launchers
def _configs(width: int) -> Configs:
    """A thread holds 16 elements of a head."""
    return Configs(f"width {width}", (Config({"ROWS": max(2048 // width, 1)}, 4),))


WIDTHS = [2**n for n in range(4, 15)]
FWD, BWD = ({width: _configs(width) for width in WIDTHS} for _ in range(2))


class Problem(NamedTuple):
    """The sizes of a call, as its kernel takes them."""

    sizes: tuple  # from q_heads to positions_stride
    tables: tuple
    constants: dict
    configs: Configs
    programs: int


def _problem(configs, q_heads: int, k_heads: int, shape, cos, sin, position_ids, interleaved: bool) -> Problem:
    """shape: (B, H, T, D) of one of the tensors."""
    B, _, T, D = shape
    rows, half = cos.shape[-2:]
    chosen = configs[min(max(triton.next_power_of_2(D), WIDTHS[0]), WIDTHS[-1])]
    tiles = triton.cdiv(T, chosen.candidates[0].blocks["ROWS"])
    heads = max(q_heads, k_heads)
    parts = min(max(PROGRAMS // max(B * tiles, 1), 1), max(heads, 1))
    per_part = triton.cdiv(q_heads, parts), triton.cdiv(k_heads, parts)
    stride = rows * half if cos.dim() == 3 and cos.shape[0] > 1 else 0
    ids_stride = T if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[0] > 1 else 0
    rest = D - 2 * half
    return Problem(
        (q_heads, k_heads, *per_part, T, D, half, tiles, parts, rows, stride, ids_stride),
        (contiguous(cos), contiguous(sin), contiguous(position_ids)),
        {
            "INTERLEAVED": interleaved, "PAIRS": triton.next_power_of_2(max(half, 1)),
            "REST": triton.next_power_of_2(rest) if rest else 0,
        },
        chosen,
        B * tiles * parts,
    )  # fmt: skip


def _strides(*tensors) -> list[int]:
    return [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]


def _with_channels(t):
    """t, or a copy of it, with adjacent channels."""
    return t if t is None or t.shape[3] <= 1 or t.stride(3) == 1 else t.contiguous()


def _like(x):
    """A result for x (B, H, T, D), laid out as x is."""
    return None if x is None else empty_strided(x, x.shape, strides_like_query(x, x.shape[3]))


def _heads(t) -> int:
    return 0 if t is None else t.shape[1]


def rope_fwd(q, k, cos, sin, q_weight, k_weight, position_ids, eps, interleaved):
    """-> q, k, q_rstd, k_rstd; without elements where there is none."""
    p = _problem(FWD, _heads(q), _heads(k), q.shape, cos, sin, position_ids, interleaved)
    sides = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        rstd = None if weight is None else empty(x, *x.shape[:3], dtype=torch.float32)
        sides.append((_with_channels(x), _like(x), contiguous(weight), rstd))
    (q_in, q_out, _, q_rstd), (k_in, k_out, _, k_rstd) = sides
    launch(
        rope_rotate_kernel, lambda c: p.programs, *sides[0], *sides[1], *p.tables, *p.sizes, eps,
        *_strides(q_in, q_out, k_in, k_out), configs=p.configs, SIGN=1, **p.constants,
    )  # fmt: skip
    none = (q.new_empty(0), q.new_empty(0), *(q.new_empty(0, dtype=torch.float32) for _ in range(2)))
    return tuple(n if t is None else t for t, n in zip((q_out, k_out, q_rstd, k_rstd), none, strict=True))


def rope_bwd(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, q_rstd, k_rstd, position_ids, interleaved, needs):
    """-> dq, dk, dq_weight, dk_weight; without elements where they are not wanted."""
    lead = dq_out if dq_out is not None else dk_out
    dys = [dy if needs[i] or needs[i + 2] else None for i, dy in enumerate((dq_out, dk_out))]
    p = _problem(BWD, _heads(dys[0]), _heads(dys[1]), lead.shape, cos, sin, position_ids, interleaved)
    dys, xs = [_with_channels(t) for t in dys], [_with_channels(t) for t in (q, k)]
    weights, rstds = [contiguous(t) for t in (q_weight, k_weight)], [contiguous(t) for t in (q_rstd, k_rstd)]
    dxs = [_like(dy) if need else None for dy, need in zip(dys, needs[:2], strict=True)]
    lines = [empty(lead, p.programs, lead.shape[3], dtype=torch.float32) if need else None for need in needs[2:]]
    if any(w is not None for w in weights):
        sides = zip(dys, xs, dxs, weights, rstds, lines, strict=True)
        launch(
            rope_bwd_kernel, lambda c: p.programs, *next(sides), *next(sides), *p.tables, *p.sizes,
            *_strides(dys[0], xs[0], dxs[0], dys[1], xs[1], dxs[1]), configs=p.configs, **p.constants,
        )  # fmt: skip
    else:
        launch(
            rope_rotate_kernel, lambda c: p.programs, dys[0], dxs[0], None, None, dys[1], dxs[1], None, None,
            *p.tables, *p.sizes, 0.0, *_strides(dys[0], dxs[0], dys[1], dxs[1]), configs=p.configs, SIGN=-1,
            **p.constants,
        )  # fmt: skip
    wanted = [line for line in lines if line is not None]
    sums = iter(column_sums(*wanted, dtype=torch.float32) if wanted else ())
    dws = [lead.new_empty(0, dtype=torch.float32) if line is None else next(sums) for line in lines]
    return *(lead.new_empty(0) if dx is None else dx for dx in dxs), *dws
