"""What happens to a score between q k^T and the softmax, and to its weight after it (csrc/attention/scores.h).

    s = scale q_i . k_j
    s = softcap tanh(s / softcap)
    s = s - slope |j - i - diagonal|          ALiBi (Press et al. 2021)
    s = s + mask_ij, or -inf where a boolean mask is false
    p = exp(s - lse), then 0 where dropout drops it, else p / (1 - dropout_p)

The functions take the indices i of queries and j of keys as (ROWS, 1) and (1, COLS), or the other way round for a
transposed tile. Forward and backward compute equal scores from equal products, bit for bit.
"""

import triton
import triton.language as tl

from ..common import LOG2E


@triton.jit
def tanh(x):
    """Accurate to a few units in the last place for small x too, where 1 - 2 / (exp(2x) + 1) is not."""
    z = x * x
    small = -0.006276387721300125 * z + 0.021116213873028755
    small = small * z - 0.053875137120485306
    small = small * z + 0.13332924246788025
    small = small * z - 0.3333333134651184
    large = 1 - 2 / (tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1)
    return tl.where(tl.abs(x) < 0.6, x + x * (z * small), tl.where(x < 0, -large, large))


@triton.jit
def load_mask(at, i, j, params):
    """The mask's tile: booleans, or float32 values, of which those outside (L, S) are not read. 0 without a mask."""
    if params.scores.mask is None:
        return 0
    else:
        address = params.scores.mask + at.b.to(tl.int64) * params.scores.mask_stride_b
        address += at.h.to(tl.int64) * params.scores.mask_stride_h
        address += i.to(tl.int64) * params.scores.mask_stride_l + j.to(tl.int64) * params.scores.mask_stride_s
        inside = (i < params.visible.q_len) & (j < params.visible.k_len)
        if params.scores.BOOLEAN:
            return tl.load(address, inside, other=0) != 0
        else:
            return tl.load(address, inside, other=0.0).to(tl.float32)


@triton.jit
def any_visible(mask):
    """Whether a tile of a boolean mask has a visible key."""
    return tl.max(tl.max(mask.to(tl.int32), 1), 0) > 0


@triton.jit
def distance(i, j, params):
    """How far key j is from query i's own key, in float32."""
    return tl.abs(j - i - params.visible.diagonal).to(tl.float32)


@triton.jit
def change_scores(s, mask, at, i, j, params):
    """The products q k^T -> the scores, and tanh(s / softcap), which is what `uncap` takes."""
    s = s * params.scale
    capped = s
    if params.scores.softcap is not None:
        capped = tanh(s * (1 / params.scores.softcap))
        s = params.scores.softcap * capped
    if params.scores.slopes is not None:
        slope = tl.load(params.scores.slopes + at.b.to(tl.int64) * params.scores.slope_stride + at.h)
        s = s - slope * distance(i, j, params)
    if params.scores.mask is not None:
        if params.scores.BOOLEAN:
            s = tl.where(mask, s, float("-inf"))
        else:
            s = s + mask
    return s, capped


@triton.jit
def uncap(ds, capped, params):
    """The gradient of a score -> that of the product, without the factor scale."""
    if params.scores.softcap is not None:
        return ds * (1 - capped * capped)
    else:
        return ds


# ------------------------------------------------------------------------------- dropout
@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """The four random words of Philox4x32-10 (Salmon et al. 2011). All are uint32."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def kept(head, row, col, params, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS): which weights dropout keeps in the tile of queries from row on, keys from col on; 4 divides col."""
    seed = tl.load(params.scores.seed)
    key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros([ROWS, COLS // 4], tl.uint32)
    group = zero + (col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
    i = zero + (row + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = philox(group, i, zero + head.to(tl.uint32), zero, key0, key1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([ROWS, COLS])
    return words >= params.scores.threshold.to(tl.uint32, bitcast=True)
