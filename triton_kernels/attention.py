"""softmax(scale q k^T) v without the (L, S) matrix in memory: FlashAttention-2 (Dao 2023).

q (B, H, L, E), k (B, H, S, E), v (B, H, S, Ev), out (B, H, L, Ev); s = scale q k^T, causal: only j <= i.

    forward    p_ij = exp(s_ij - m_i), m_i the largest s_ij so far; l_i = sum_j p_ij
               out_i = sum_j p_ij v_j / l_i,   lse_i = m_i + log l_i        (l, out rescaled as m grows)
    backward   p = exp(s - lse),   delta_i = sum out_i dout_i - dlse_i
               ds = p (dout v^T - delta),   dv = p^T dout,   dk = scale ds^T q,   dq = scale ds k

Saved: out and lse, one number a row. exp is exp2 with log2(e) folded into the scale. Tiles that causal
masking leaves empty are not visited, and only those on the diagonal or across the end pay for a mask.
A row without keys gives out = 0 and lse = -inf.

Backward is deterministic without float atomics: one kernel keeps a tile of k and v and walks the
queries for dk and dv, another keeps a tile of q and walks the keys for dq. That costs seven products
where five would do with atomics.

The largest p of a row must be exactly 1 after rounding to 16 bits: any other rounding would be an error of
the whole row. There are two ways to compute p from the products s = q k^T, with c = scale log2(e) and m now
the largest s of the row:

    exact    forward exp2((s - m) c)                                   backward exp2((s scale - lse) log2(e))
    fused    forward exp2(fma(s, c, -base)), base = round(m c)         backward exp2(fma(s, c, -lse log2(e)))

The exact form gives 1 for scores of any size: backward rounds s scale as forward did when it formed lse. The
kernels are compiled without fusing products into sums, which would undo that. The fused form takes one
instruction an element where the exact one takes two or three. It shifts the exponents of a row by the error of
base, in backward by those of lse, c and lse log2(e): for |base| < 2^n at most 2^(n-25) and, in a row whose
weight is all on one key, 4.5 2^(n-25). Below LIMIT = 2^21 eps, where eps is that of the storage type, the p of
that key thus misses 1 by at most eps / 23 and eps / 5, and everything between 1 - eps / 4 and 1 + eps / 2 is
rounded to 1. out sums the rounded p and l the others; so l is put right by the error of the last base.

float32 always takes the exact form. 16-bit tiles take the fused form where nothing is masked. If some row then
turns out to be beyond LIMIT, the tile starts over, and the loop of the masked tiles, which always takes the
exact form, serves it all. Forward looks at the last base of each row alone. An earlier base of larger size was
below it: either far below, and the p computed from it have shrunk to nothing, or hardly beyond LIMIT, where the
error is not twice as large.

16-bit tiles come through tensor descriptors (TMA) where the device and their alignment allow, else
through pointers; head dimensions are padded to a power of two inside the tile. float32 products run on
the ordinary cores, which hold operands in registers: there a product over the head dimension is summed
in chunks, read again from cache.
"""

import torch
import triton
import triton.language as tl

from pygpt.ops.attention import strides_like_query

from .common import (
    LN2,
    LOG2E,
    TARGETS,
    Config,
    Configs,
    Tiled,
    bound,
    dot,
    empty,
    empty_strided,
    fma,
    launch,
    target,
    tileable,
    to_storage,
)

L2_BYTES = 16 << 20  # of keys and values that programs running at one time should share


# ------------------------------------------------------------------------------- device functions
@triton.jit
def _load_rows(src, b, h, row, rows, b_stride, h_stride, row_stride,
               WIDTH, ROWS: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """ROWS rows of head (b, h) from row on, at most WIDTH elements of each, padded to BLOCK, or WHOLE blocks; zero outside."""
    if TMA:
        return src.load([b, h, row, 0]).reshape([ROWS, BLOCK])
    else:
        r, c = row + tl.arange(0, ROWS).to(tl.int64), tl.arange(0, BLOCK)
        at = src + b.to(tl.int64) * b_stride + h.to(tl.int64) * h_stride + r[:, None] * row_stride + c[None, :]
        if WHOLE:
            return tl.load(at, (r < rows)[:, None], other=0.0)
        else:
            return tl.load(at, (r < rows)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def _product(x, y, x_tile, y_tile, b, h, x_row, y_row, x_rows, y_rows, x_b, x_h, x_s, y_b, y_h, y_s,
             WIDTH: tl.constexpr, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """x_tile y_tile^T, (X_ROWS, Y_ROWS); with CHUNK, from x and y, so many elements of their rows at a time."""
    acc = tl.zeros([X_ROWS, Y_ROWS], tl.float32)
    if CHUNK:
        for e in range(0, WIDTH, CHUNK):
            xe = _load_rows(
                x + e, b, h, x_row, x_rows, x_b, x_h, x_s, WIDTH - e, X_ROWS, CHUNK, False, WIDTH % CHUNK == 0
            )
            ye = _load_rows(
                y + e, b, h, y_row, y_rows, y_b, y_h, y_s, WIDTH - e, Y_ROWS, CHUNK, False, WIDTH % CHUNK == 0
            )
            acc = dot(xe, ye.T, acc)
    else:
        acc = dot(x_tile, y_tile.T, acc)
    return acc


@triton.jit
def _store_rows(dst, x, row, rows, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Into rows of WIDTH elements; dst points to the first row of a head."""
    r, c = row + tl.arange(0, ROWS).to(tl.int64), tl.arange(0, BLOCK)
    at = dst + r[:, None] * stride + c[None, :]
    tl.store(at, to_storage(x, dst.dtype.element_ty), (r < rows)[:, None] & (c < WIDTH)[None, :])


@triton.jit
def _store_gradient(dst, x, head, row, rows, heads, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Into rows of a (B, T, H, WIDTH) tensor, seen as (B, H, T, WIDTH)."""
    first = ((head // heads).to(tl.int64) * rows * heads + head % heads) * WIDTH
    _store_rows(dst + first, x, row, rows, heads * WIDTH, WIDTH, ROWS, BLOCK)


@triton.jit
def _visible(row, col, S, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys of a tile its rows may attend to: (1, BLOCK_N), if causal (BLOCK_M, BLOCK_N)."""
    last = S - 1
    if CAUSAL:
        last = tl.minimum(last, row + tl.arange(0, BLOCK_M))[:, None]
    return tl.arange(0, BLOCK_N)[None, :] <= last - col


@triton.jit
def _any(x):
    """Whether any of x is true. The second maximum, of equal numbers, is one that a whole warp takes together: so the
    compiler knows that its threads agree, and loops whose bounds depend on the answer keep them in uniform registers."""
    return tl.max(tl.full([256], 0, tl.int32) + tl.max(x.to(tl.int32), 0), 0) > 0


@triton.jit
def _tile_and_head(tiles, heads, GROUP):
    """Which tile of which head this program serves: GROUP heads at a time, to share their keys and values
    in the L2 cache; within a group all heads' first tiles, then their second ones."""
    first = tl.program_id(0) // (GROUP * tiles) * GROUP
    within = tl.program_id(0) % (GROUP * tiles)
    size = tl.minimum(heads - first, GROUP)
    return within // size, first + within % size


# ------------------------------------------------------------------------------- forward
@triton.jit
def _attend(
    acc, m, l, qt, q, k, v, b, h, row, begin, end, L, S, c, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    FUSED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, SIGN: tl.constexpr, E: tl.constexpr,
    EV: tl.constexpr, TMA: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Adds the keys begin .. end to a tile of rows. m is the largest s so far."""
    for start in tl.range(bound(begin), bound(end), BLOCK_N):
        kt = _load_rows(k, b, h, start, S, k_b, k_h, k_s, E, BLOCK_N, BLOCK_E, TMA, E == BLOCK_E)
        s = _product(
            q, k, qt, kt, b, h, row, start, L, S, q_b, q_h, q_s, k_b, k_h, k_s, E, BLOCK_M, BLOCK_N, CHUNK
        )  # fmt: skip
        if SIGN < 1:
            s = s * SIGN
        if MASKED:
            s = tl.where(_visible(row, start, S, CAUSAL, BLOCK_M, BLOCK_N), s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        if FUSED:
            p = tl.exp2(fma(s, c, -(base * c)[:, None]))
            grown = m * c - base * c
        else:
            p = tl.exp2((s - base[:, None]) * c)
            grown = (m - base) * c
        shrink = tl.where(m == float("-inf"), 0.0, tl.exp2(grown))
        l = l * shrink + tl.sum(p, 1)
        vt = _load_rows(v, b, h, start, S, v_b, v_h, v_s, EV, BLOCK_N, BLOCK_EV, TMA, EV == BLOCK_EV)
        acc = dot(to_storage(p, vt.dtype), vt, acc * shrink[:, None])
        m = top
    return acc, m, l


@triton.jit(do_not_specialize=["GROUP"])
def attention_fwd_kernel(
    out, lse, q, k, v, heads, H, L, S, scale, GROUP, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    CAUSAL: tl.constexpr, SIGN: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, EV: tl.constexpr,
    TMA: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program serves BLOCK_M rows of one head, the longest first. heads = B H; scores are SIGN scale q k^T, scale > 0."""
    tiles = tl.cdiv(L, BLOCK_M)
    tile, head = _tile_and_head(tiles, heads, GROUP)
    row, b, h = (tiles - 1 - tile) * BLOCK_M, head // H, head % H
    qt = _load_rows(q, b, h, row, L, q_b, q_h, q_s, E, BLOCK_M, BLOCK_E, TMA, E == BLOCK_E)
    whole, end = S, S
    if CAUSAL:
        whole, end = tl.minimum(row + 1, S), tl.minimum(row + BLOCK_M, S)
    whole = whole // BLOCK_N * BLOCK_N  # keys that all rows see
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_EV], tl.float32)
    c = scale * LOG2E
    for masked in tl.static_range(2):
        if masked and LIMIT:
            base = tl.where(m == float("-inf"), 0.0, m * c)
            l *= tl.exp2(tl.where(m == float("-inf"), 0.0, -fma(m, c, -base)))  # now relative to m
            if _any(tl.abs(base) >= LIMIT):
                whole = 0
                m = tl.full([BLOCK_M], float("-inf"), tl.float32)
                l = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, BLOCK_EV], tl.float32)
        acc, m, l = _attend(
            acc, m, l, qt, q, k, v, b, h, row, whole if masked else 0, end if masked else whole, L, S, c,
            q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, LIMIT > 0 and not masked, masked,
            CAUSAL, SIGN, E, EV, TMA, CHUNK, BLOCK_M, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip
    i = row + tl.arange(0, BLOCK_M)
    natural = m * scale + tl.log2(l) * LN2
    tl.store(lse + head.to(tl.int64) * L + i, tl.where(l == 0, float("-inf"), natural), i < L)
    acc = acc / tl.where(l == 0, 1.0, l)[:, None]
    out += b.to(tl.int64) * o_b + h.to(tl.int64) * o_h
    _store_rows(out, acc, row, L, o_s, EV, BLOCK_M, BLOCK_EV)


# ------------------------------------------------------------------------------- backward
@triton.jit
def attention_delta_kernel(delta, lse2, out, dout, lse, dlse, H, L, o_b, o_h, o_s, d_b, d_h, d_s, l_b, l_h, l_s,
                           LIMIT: tl.constexpr, EV: tl.constexpr, BLOCK_EV: tl.constexpr,
                           BLOCK_M: tl.constexpr):  # fmt: skip
    """delta (B H, L) = rowsum(out dout) - dlse. lse2 (B H, L), for the fused form: lse log2(e), -inf where LIMIT
    forbids that form, inf for a row without keys."""
    tiles = tl.cdiv(L, BLOCK_M)
    head, row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    b, h = head // H, head % H
    o = _load_rows(out, b, h, row, L, o_b, o_h, o_s, EV, BLOCK_M, BLOCK_EV, False, EV == BLOCK_EV)
    d = _load_rows(dout, b, h, row, L, d_b, d_h, d_s, EV, BLOCK_M, BLOCK_EV, False, EV == BLOCK_EV)
    sums = tl.sum(o.to(tl.float32) * d.to(tl.float32), 1)
    i = row + tl.arange(0, BLOCK_M)
    if dlse is not None:
        sums -= tl.load(dlse + b.to(tl.int64) * l_b + h.to(tl.int64) * l_h + i.to(tl.int64) * l_s, i < L, other=0.0)
    tl.store(delta + head.to(tl.int64) * L + i, sums, i < L)
    if LIMIT:
        x = _load_lse(lse + head.to(tl.int64) * L, i, L)
        x = tl.where((tl.abs(x * LOG2E) < LIMIT) | (x == float("inf")), x * LOG2E, float("-inf"))
        tl.store(lse2 + head.to(tl.int64) * L + i, x, i < L)


@triton.jit
def _load_lse(lse, i, L):
    """inf, so that p becomes 0, for a row without keys and past the end."""
    x = tl.load(lse + i, i < L, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x)


@triton.jit
def _gather_rows(
    dk, dv, least, kt, vt, q, k, v, dout, lse, lse2, delta, b, h, col, begin, tiles, turn, last, L, S, scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, d_b, d_h, d_s,
    FUSED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    E: tl.constexpr, EV: tl.constexpr, TMA: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Adds to dk (but for the scale) and dv of a tile of keys: `tiles` tiles of rows from `begin` on, where MASKED
    `turn` of them and then the one at `last`. FUSED: `least` becomes the smallest lse2 of these rows."""
    for tile in tl.range(0, bound(tiles)):
        start = begin + tile * BLOCK_M
        if MASKED:
            start = tl.where(tile < turn, start, last)
        i = start + tl.arange(0, BLOCK_M)
        qt = _load_rows(q, b, h, start, L, q_b, q_h, q_s, E, BLOCK_M, BLOCK_E, TMA, E == BLOCK_E)
        st = _product(
            k, q, kt, qt, b, h, col, start, S, L, k_b, k_h, k_s, q_b, q_h, q_s, E, BLOCK_N, BLOCK_M, CHUNK
        )  # fmt: skip
        if FUSED:
            row_lse2 = tl.load(lse2 + i)
            least = tl.minimum(least, row_lse2)
            pt = tl.exp2(fma(st, scale * LOG2E, -row_lse2[None, :]))
        else:
            pt = tl.exp2((st * scale - _load_lse(lse, i, L)[None, :]) * LOG2E)
        if MASKED:  # what fills up the last tile must not reach a key that is infinite: 0 * inf
            seen = (i < L)[None, :]
            if CAUSAL:
                seen &= (col + tl.arange(0, BLOCK_N))[:, None] <= i[None, :]
            pt = tl.where(seen, pt, 0.0)
        do = _load_rows(dout, b, h, start, L, d_b, d_h, d_s, EV, BLOCK_M, BLOCK_EV, TMA, EV == BLOCK_EV)
        if NEED_V:
            dv = dot(to_storage(pt, do.dtype), do, dv)
        if NEED_K:
            dpt = _product(
                v, dout, vt, do, b, h, col, start, S, L, v_b, v_h, v_s, d_b, d_h, d_s, EV, BLOCK_N, BLOCK_M, CHUNK
            )  # fmt: skip
            dst = pt * (dpt - tl.load(delta + i, i < L, other=0.0)[None, :])
            dk = dot(to_storage(dst, qt.dtype), qt, dk)
    return dk, dv, least


@triton.jit(do_not_specialize=["GROUP"])
def attention_dkdv_kernel(
    dk, dv, q, k, v, dout, lse, lse2, delta, heads, H, L, S, scale, GROUP,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, d_b, d_h, d_s,
    CAUSAL: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, TMA: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program serves BLOCK_N keys of one head, the longest walk first."""
    tile, head = _tile_and_head(tl.cdiv(S, BLOCK_N), heads, GROUP)
    col, b, h = tile * BLOCK_N, head // H, head % H
    kt = _load_rows(k, b, h, col, S, k_b, k_h, k_s, E, BLOCK_N, BLOCK_E, TMA, E == BLOCK_E)
    vt = _load_rows(v, b, h, col, S, v_b, v_h, v_s, EV, BLOCK_N, BLOCK_EV, TMA, EV == BLOCK_EV)
    lse += head.to(tl.int64) * L
    delta += head.to(tl.int64) * L
    if LIMIT:
        lse2 += head.to(tl.int64) * L
    begin, whole, end = 0, 0, L // BLOCK_M * BLOCK_M  # all of these keys are seen by rows from whole to end
    if CAUSAL:
        begin = col // BLOCK_M * BLOCK_M  # the first row that sees one of them
        whole = tl.cdiv(col + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    diagonal = tl.maximum(tl.minimum(whole, end) - begin, 0) // BLOCK_M
    partial = ((end < L) & (begin < L)).to(tl.int32)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_EV], tl.float32)
    least = tl.zeros([BLOCK_M], tl.float32)
    for masked in tl.static_range(2):
        if masked and LIMIT:  # noqa: SIM102 - a constant, and what depends on data
            if _any(least == float("-inf")):
                diagonal = tl.maximum(end - begin, 0) // BLOCK_M
                dk_acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
                dv_acc = tl.zeros([BLOCK_N, BLOCK_EV], tl.float32)
        dk_acc, dv_acc, least = _gather_rows(
            dk_acc, dv_acc, least, kt, vt, q, k, v, dout, lse, lse2, delta, b, h, col,
            begin if masked else whole, diagonal + partial if masked else tl.maximum(end - whole, 0) // BLOCK_M,
            diagonal, end, L, S, scale, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, d_b, d_h, d_s,
            LIMIT > 0 and not masked, masked, CAUSAL, dk is not None, dv is not None,
            E, EV, TMA, CHUNK, BLOCK_M, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip
    if dk is not None:
        _store_gradient(dk, dk_acc * scale, head, col, S, H, E, BLOCK_N, BLOCK_E)
    if dv is not None:
        _store_gradient(dv, dv_acc, head, col, S, H, EV, BLOCK_N, BLOCK_EV)


@triton.jit
def _gather_keys(
    dq, qt, do, q, k, v, dout, lse, delta, b, h, row, begin, end, L, S, scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, d_b, d_h, d_s,
    FUSED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, E: tl.constexpr, EV: tl.constexpr,
    TMA: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Adds the keys begin .. end to dq (but for the scale) of a tile of rows. FUSED: lse is their lse2."""
    for start in tl.range(bound(begin), bound(end), BLOCK_N):
        kt = _load_rows(k, b, h, start, S, k_b, k_h, k_s, E, BLOCK_N, BLOCK_E, TMA, E == BLOCK_E)
        s = _product(
            q, k, qt, kt, b, h, row, start, L, S, q_b, q_h, q_s, k_b, k_h, k_s, E, BLOCK_M, BLOCK_N, CHUNK
        )  # fmt: skip
        if FUSED:
            p = tl.exp2(fma(s, scale * LOG2E, -lse[:, None]))
        else:
            p = tl.exp2((s * scale - lse[:, None]) * LOG2E)
        if MASKED:
            p = tl.where(_visible(row, start, S, CAUSAL, BLOCK_M, BLOCK_N), p, 0.0)
        vt = _load_rows(v, b, h, start, S, v_b, v_h, v_s, EV, BLOCK_N, BLOCK_EV, TMA, EV == BLOCK_EV)
        dp = _product(
            dout, v, do, vt, b, h, row, start, L, S, d_b, d_h, d_s, v_b, v_h, v_s, EV, BLOCK_M, BLOCK_N, CHUNK
        )  # fmt: skip
        dq = dot(to_storage(p * (dp - delta[:, None]), kt.dtype), kt, dq)
    return dq


@triton.jit(do_not_specialize=["GROUP"])
def attention_dq_kernel(
    dq, q, k, v, dout, lse, lse2, delta, heads, H, L, S, scale, GROUP,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, d_b, d_h, d_s,
    CAUSAL: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, TMA: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """A program serves BLOCK_M rows of one head, the longest first."""
    tiles = tl.cdiv(L, BLOCK_M)
    tile, head = _tile_and_head(tiles, heads, GROUP)
    row, b, h = (tiles - 1 - tile) * BLOCK_M, head // H, head % H
    i = row + tl.arange(0, BLOCK_M)
    qt = _load_rows(q, b, h, row, L, q_b, q_h, q_s, E, BLOCK_M, BLOCK_E, TMA, E == BLOCK_E)
    do = _load_rows(dout, b, h, row, L, d_b, d_h, d_s, EV, BLOCK_M, BLOCK_EV, TMA, EV == BLOCK_EV)
    row_lse = _load_lse(lse + head.to(tl.int64) * L, i, L)
    row_lse2 = tl.load(lse2 + head.to(tl.int64) * L + i, i < L, other=float("inf")) if LIMIT else row_lse
    row_delta = tl.load(delta + head.to(tl.int64) * L + i, i < L, other=0.0)
    whole, end = S, S
    if CAUSAL:
        whole, end = tl.minimum(row + 1, S), tl.minimum(row + BLOCK_M, S)
    whole = whole // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for masked in tl.static_range(2):
        if masked and LIMIT:  # noqa: SIM102 - a constant, and what depends on data
            if _any(row_lse2 == float("-inf")):
                whole = 0
                acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        acc = _gather_keys(
            acc, qt, do, q, k, v, dout, row_lse if masked else row_lse2, row_delta, b, h, row,
            whole if masked else 0, end if masked else whole, L, S, scale,
            q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, d_b, d_h, d_s,
            LIMIT > 0 and not masked, masked, CAUSAL, E, EV, TMA, CHUNK, BLOCK_M, BLOCK_N, BLOCK_E, BLOCK_EV,
        )  # fmt: skip
    _store_gradient(dq, acc * scale, head, row, L, H, E, BLOCK_M, BLOCK_E)


# ------------------------------------------------------------------------------- configurations
# (BLOCK_M, BLOCK_N, warps, stages), the best first, by (largest padded head dimension, itemsize), or where a
# target has its own, (..., target). None spills a register: bench/static.py shows it.
FWD_SHAPES = {
    (64, 2): ((128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 2)),
    (64, 2, "sm80"): ((128, 64, 8, 3), (64, 64, 4, 3)),
    (128, 2): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2)),
    (128, 2, "sm80"): ((128, 32, 8, 3), (64, 32, 4, 2)),
    (128, 2, "sm100"): ((128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2)),
    (128, 2, "gfx942"): ((128, 64, 8, 2), (64, 32, 4, 2)),
    (256, 2): ((128, 32, 8, 2), (64, 32, 8, 1)),
    (256, 2, "sm80"): ((64, 64, 8, 1),),
    (256, 2, "gfx942"): ((64, 32, 8, 2), (32, 32, 8, 2)),
    (64, 4): ((64, 16, 8, 1), (32, 16, 4, 1)),
    (128, 4): ((64, 16, 8, 1), (32, 16, 8, 1)),
    (256, 4): ((32, 16, 8, 1), (16, 16, 8, 1)),
}
DKDV_SHAPES = {
    (64, 2): ((64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 1)),
    (64, 2, "sm80"): ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)),
    (64, 2, "gfx942"): ((32, 128, 8, 1), (32, 64, 4, 2)),
    (128, 2): ((64, 64, 8, 2), (32, 64, 8, 1)),
    (128, 2, "sm100"): ((64, 64, 8, 1), (32, 64, 8, 1)),
    (128, 2, "gfx942"): ((32, 64, 8, 1), (32, 32, 8, 1)),
    (256, 2): ((32, 128, 8, 2), (32, 64, 8, 2)),
    (256, 2, "sm80"): ((32, 64, 8, 1), (16, 64, 8, 1)),
    (256, 2, "gfx942"): ((16, 64, 8, 1), (16, 32, 8, 1)),
    (64, 4): ((16, 64, 8, 1), (16, 32, 4, 1)),
    (128, 4): ((16, 32, 8, 1), (16, 16, 8, 1)),
    (256, 4): ((16, 16, 8, 1),),
}
DQ_SHAPES = {
    (64, 2): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)),
    (64, 2, "sm80"): ((128, 64, 8, 2), (64, 32, 4, 2)),
    (128, 2): ((128, 64, 8, 2), (64, 32, 8, 1)),
    (128, 2, "sm80"): ((128, 32, 8, 2), (64, 64, 8, 2)),
    (128, 2, "gfx942"): ((128, 32, 8, 2), (64, 32, 8, 1)),
    (256, 2): ((128, 32, 8, 2), (64, 32, 8, 2)),
    (256, 2, "sm80"): ((64, 32, 8, 1),),
    (256, 2, "gfx942"): ((64, 16, 8, 1), (32, 16, 8, 1)),
    (64, 4): ((64, 16, 8, 1), (32, 16, 4, 1)),
    (64, 4, "sm80"): ((32, 16, 8, 1), (32, 16, 4, 1)),
    (128, 4): ((32, 16, 8, 1), (16, 16, 8, 1)),
    (256, 4): ((16, 16, 8, 1),),
}


def _table(shapes: dict) -> dict:
    def configs(name, bucket, itemsize):
        candidates = shapes.get((bucket, itemsize, name)) or shapes[bucket, itemsize]
        blocks = [({"BLOCK_M": m, "BLOCK_N": n}, warps, stages) for m, n, warps, stages in candidates]
        return Configs(f"{name}, head dimension {bucket}, {itemsize} bytes", tuple(Config(*each) for each in blocks))

    return {(n, *key[:2]): configs(n, *key[:2]) for n in TARGETS for key in shapes if len(key) == 2}


FWD, DKDV, DQ = _table(FWD_SHAPES), _table(DKDV_SHAPES), _table(DQ_SHAPES)
DELTA = Configs("any", (Config({"BLOCK_M": 32}, 4), Config({"BLOCK_M": 16}, 4)))
MAX_HEAD_DIM = 256
WIDE = 256  # the bucket in which registers hold the sums of dk or of dv, but not of both


# ------------------------------------------------------------------------------- launchers
def _padded(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


class _Call:
    """What the kernels of one call have in common."""

    def __init__(self, q, k, v, is_causal, *others):
        """others: tensors that are read in tiles too."""
        (B, H, L, E), (S, EV) = q.shape, v.shape[2:]
        self.H, self.L, self.S, self.heads = H, L, S, B * H
        self.bucket = target(q), max(64, _padded(E), _padded(EV)), q.itemsize
        q, k, v, *others = (t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in (q, k, v, *others))
        self.q, self.k, self.v, self.others = q, k, v, others
        self.tma = q.itemsize == 2 and tileable(q, k, v, *others)
        self.sizes = self.heads, H, L, S
        self.group = max(1, min(self.heads, L2_BYTES // max(1, S * (E + EV) * q.itemsize)))
        self.limit = int(2**21 * torch.finfo(q.dtype).eps) if q.itemsize == 2 else 0  # 0: no fused form
        self.constants = {
            "CAUSAL": is_causal, "LIMIT": self.limit, "E": E, "EV": EV, "TMA": self.tma, "CHUNK": 0 if q.itemsize == 2 else 16,
            "BLOCK_E": _padded(E), "BLOCK_EV": _padded(EV),
        }  # fmt: skip

    def __call__(self, kernel, table, outputs, inputs, scale: float, per: str, rows: int, strides=(), **constants):
        """inputs: (tensor, its tile's rows, its tile's width); per: the constant that divides rows among programs.
        strides: of outputs, where the kernel takes them."""
        tensors = [
            Tiled(t, (1, 1, tile, self.constants[f"BLOCK_{width}"])) if self.tma and tile else t
            for t, tile, width in inputs
        ]
        strides = [*(s for t, tile, _ in inputs if tile for s in t.stride()[:3]), *strides]
        launch(
            kernel, lambda c: self.heads * triton.cdiv(rows, c[per]), *outputs, *tensors, *self.sizes, scale,
            self.group, *strides, configs=table[self.bucket], fuse=False, **self.constants, **constants,
        )  # fmt: skip


def _heads_last(like, B, H, T, width):
    return empty(like, B, T, H, width).transpose(1, 2)


def attention_fwd(q, k, v, is_causal, scale):
    """q (B, H, L, E), k (B, H, S, E), v (B, H, S, Ev) -> out (B, H, L, Ev) laid out as q is, lse (B, H, L)."""
    call = _Call(q, k, v, is_causal)
    B, L, EV = q.shape[0], call.L, v.shape[3]
    out = empty_strided(q, (B, call.H, L, EV), strides_like_query(q, EV))
    lse = empty(q, B, call.H, L, dtype=torch.float32)
    inputs = (call.q, "BLOCK_M", "E"), (call.k, "BLOCK_N", "E"), (call.v, "BLOCK_N", "EV")
    zero = abs(scale) < 2.0**-126  # no normal float32
    sign = 0 if zero else -1 if scale < 0 else 1
    scale = 1.0 if zero else abs(scale)
    call(attention_fwd_kernel, FWD, (out, lse), inputs, scale, "BLOCK_M", L, out.stride()[:3], SIGN=sign)
    return out, lse


def attention_bwd(dout, dlse, q, k, v, out, lse, is_causal, scale, needs):
    """-> dq, dk, dv, laid out (B, T, H, E). dlse (B, H, L) may be None."""
    call = _Call(q, k, v, is_causal, dout)
    (dout,) = call.others
    B, H, L, S, EV = q.shape[0], call.H, call.L, call.S, v.shape[3]
    delta, lse2 = empty(lse, *lse.shape), empty(lse, *lse.shape) if call.limit else None
    launch(
        attention_delta_kernel, lambda c: B * H * triton.cdiv(L, c["BLOCK_M"]),
        delta, lse2, out, dout, lse, dlse, H, L, *out.stride()[:3], *dout.stride()[:3], *(dlse.stride() if dlse is not None else (0,) * 3),
        configs=DELTA, LIMIT=call.limit, EV=EV, BLOCK_EV=_padded(EV),
    )  # fmt: skip
    dq, dk, dv = (
        _heads_last(q, B, H, t.shape[2], t.shape[3]) if need else None for need, t in zip(needs, (q, k, v), strict=True)
    )

    rows, keys = "BLOCK_M", "BLOCK_N"
    inputs = (call.q, rows, "E"), (call.k, keys, "E"), (call.v, keys, "EV"), (dout, rows, "EV")
    inputs += (lse, None, None), (lse2, None, None), (delta, None, None)
    for some in ((dk, None), (None, dv)) if call.bucket[1] == WIDE else ((dk, dv),):
        if any(g is not None for g in some):
            call(attention_dkdv_kernel, DKDV, some, inputs, scale, keys, S)
    if dq is not None:
        call(attention_dq_kernel, DQ, (dq,), inputs, scale, rows, L)
    return tuple(q.new_empty(0) if g is None else g for g in (dq, dk, dv))
