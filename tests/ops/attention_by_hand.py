"""Attention a row at a time, in float64, from the words of its contract. And dropout's random bits, in NumPy."""

import math

import numpy as np
import torch


def philox(key: int, counter: np.ndarray) -> np.ndarray:
    """The words (..., 4) that Philox4x32-10 makes of counters (..., 4), with a key of 64 bits."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = key % 2**32, key >> 32 & 0xFFFFFFFF
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = b >> high ^ c1 ^ np.uint64(k0), b & low, a >> high ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], -1)


def kept(seed: int, p: float, B: int, H: int, L: int, S: int) -> torch.Tensor:
    """(B, H, L, S): whether dropout keeps the weight of key j in row i of head b H + h."""
    groups = -(-S // 4)
    head, i, group = np.meshgrid(np.arange(B * H), np.arange(L), np.arange(groups), indexing="ij")
    words = philox(seed, np.stack([group, i, head, np.zeros_like(head)], -1)).reshape(B, H, L, 4 * groups)[..., :S]
    return torch.from_numpy(words >= np.uint64(math.floor(p * 2**32)))


def by_hand(
    q, k, v, attn_mask=None, is_causal=False, scale=None, window=None, alibi_slopes=None, softcap=0.0, sink=None,
    lower_right=False, dropout_p=0.0, seed=0,
):  # fmt: skip
    """(out, lse) in float64; q (B, Hq, L, E), k and v (B, Hkv, S, .)."""
    (B, H, L, E), S, group = q.shape, k.shape[2], q.shape[1] // max(k.shape[1], 1)
    scale = E**-0.5 if scale is None else scale
    factors = kept(seed, dropout_p, B, H, L, S).double() / (1 - dropout_p) if 0 < dropout_p < 1 else None
    outs, lses, j = [], [], torch.arange(S)
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(L)):
        row = i + (S - L if lower_right else 0)  # the key position of this query's diagonal
        keys, values = k[b, h // group], v[b, h // group]
        s = scale * (keys @ q[b, h, i])
        s = softcap * torch.tanh(s / softcap) if softcap else s
        if alibi_slopes is not None:
            s = s - alibi_slopes.expand(B, H)[b, h] * abs(row - j)
        allowed = (j <= row) if is_causal or lower_right else torch.ones(S, dtype=torch.bool)
        if window is not None:
            left, right = window
            allowed = allowed & ((left < 0) | (row - j <= left)) & ((right < 0) | (j - row <= right))
        if attn_mask is not None:
            m = attn_mask.expand(B, H, L, S)[b, h, i]
            allowed, s = (allowed & m, s) if m.dtype == torch.bool else (allowed & (m != -math.inf), s + m)
        logits = s[allowed] if sink is None else torch.cat([s[allowed], sink[h, None]])  # the sink has no value
        p = torch.softmax(logits, 0)[: allowed.sum()]
        p = p if factors is None else p * factors[b, h, i][allowed]
        outs.append((p if dropout_p < 1 else 0 * p) @ values[allowed])  # 0 where no key is allowed
        lses.append(torch.logsumexp(logits, 0) if len(logits) else torch.tensor(-math.inf, dtype=q.dtype))
    return torch.stack(outs).view(B, H, L, -1), torch.stack(lses).view(B, H, L)
