"""The causal self-attention of a GPT block, and its cache of keys and values."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch, functional
from ..ops.common import checked_integer
from ..ops.qkv_attention import as_heads
from .fusing import apply_dropout, is_norm_of_rope
from .layers import Linear, RMSNorm
from .rotary import RotaryEmbedding


class KVCache:
    """Keys and values of one attention layer's past, preallocated for ``capacity`` positions at the first append.

    ``cache = KVCache(capacity)``, then ``attention(x, cache)`` for the positions as they come. Each layer needs a cache
    of its own. For inference: an append writes to memory that an earlier call's backward pass would need. With a
    window, too, it keeps all positions. A capacity that is no integer raises TypeError, a negative one ValueError.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = checked_integer("pygpt.nn.KVCache", "capacity", capacity), 0
        if self.capacity < 0:
            raise ValueError(f"pygpt.nn.KVCache: capacity must not be negative, got {capacity}")
        self.keys: Any = None
        self.values: Any = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the next T positions, ``(B, Hkv, T, D)`` each; returns all keys and values so far.

        ValueError if they exceed the capacity, or differ in batch, heads or dtype from those so far.
        """
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or values.dim() != 4:
            raise ValueError(
                "pygpt.nn.KVCache: keys and values must be (B, Hkv, T, D), "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        B, H, T, _ = keys.shape
        end = self.length + T
        if self.keys is not None and (
            keys.dtype != self.keys.dtype or keys[:, :, :0].shape != self.keys[:, :, :0].shape
        ):
            kept_B, kept_H, _, kept_D = self.keys.shape
            raise ValueError(
                f"pygpt.nn.KVCache: holds {self.keys.dtype} of shape ({kept_B}, {kept_H}, T, {kept_D}), "
                f"got {keys.dtype} {tuple(keys.shape)}"
            )
        if end > self.capacity:
            raise ValueError(f"pygpt.nn.KVCache: {end} positions, room for {self.capacity}")
        if self.keys is None:
            self.keys, self.values = (t.new_empty(B, H, self.capacity, t.shape[3]) for t in (keys, values))
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.narrow(2, self.length, T).copy_(new)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


def _lower_right(T: int, S: int, device: torch.device) -> Tensor:
    """The causal mask of queries at the last T of S positions."""
    if torch.compiler.is_compiling():  # torch.compile cannot create a CausalBias
        return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    from torch.nn.attention.bias import causal_lower_right  # imported here, because it imports torch._dynamo

    return causal_lower_right(T, S)


def causal_masking(T: int, S: int, window: int | None, device: torch.device) -> dict:
    """How queries at the last T of S positions are masked, as arguments of attention."""
    if window is not None and T < S:  # the diagonal of `window` is the mask's only where that is a CausalBias
        if not torch.compiler.is_compiling():
            return {"attn_mask": _lower_right(T, S, device), "window": (window, -1)}
        return {"attn_mask": _lower_right(T, S, device).triu(S - T - window)}
    if 1 < T < S:
        return {"attn_mask": _lower_right(T, S, device)}
    of_window = {} if window is None else {"window": (window, -1)}
    return {"is_causal": True, **of_window} if T > 1 else {}


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention; x (B, T, embed_dim) -> (B, T, embed_dim).

    c_attn projects to queries, keys and values side by side. Attention reads the heads there, and writes their gradient
    there unless they are rotated, so nothing is copied.

    ``num_kv_heads`` below num_heads shares each key and value head among num_heads / num_kv_heads queries (GQA; Ainslie
    et al. 2023). ``dropout`` acts on the attention weights and on the output. With ``window``, a position attends to
    itself and that many positions before it (Beltagy et al. 2020); Mistral's sliding_window counts itself, too.
    ``rotary`` rotates queries and keys; layers may share it. With ``qk_norm_eps``, RMSNorms of this eps over each head
    of queries and of keys, q_norm and k_norm, come before that (Henry et al. 2020). Head counts that do not divide
    raise ValueError, and so does a negative window.
    """

    window: int | None = None  # also of modules that were pickled before there was one

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
        rotary: RotaryEmbedding | None = None,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        owner = "pygpt.nn.CausalSelfAttention"
        embed_dim, num_heads = (
            checked_integer(owner, "embed_dim", embed_dim),
            checked_integer(owner, "num_heads", num_heads),
        )
        num_kv_heads = num_heads if num_kv_heads is None else checked_integer(owner, "num_kv_heads", num_kv_heads)
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"pygpt.nn.CausalSelfAttention: embed_dim {embed_dim} does not divide by num_heads {num_heads}"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"pygpt.nn.CausalSelfAttention: num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}"
            )
        if window is not None and not 0 <= (window := checked_integer(owner, "window", window)) < 2**31:
            raise ValueError(f"{owner}: window must be an integer from 0 on, got {window!r}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, embed_dim // num_heads
        self.window = window
        self.c_attn = Linear(embed_dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias, device, dtype)
        self.c_proj = Linear(embed_dim, embed_dim, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.rotary = rotary
        if qk_norm_eps is not None:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, qk_norm_eps, True, device, dtype) for _ in "qk")

    def reset_parameters(self) -> None:
        """Draws c_attn and c_proj anew, as torch.nn.Linear does, and sets the norms' weights to 1."""
        for layer in self.children():
            if layer._parameters:
                layer.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """``x (B, T, embed_dim)`` -> ``(B, T, embed_dim)``; with a cache, x holds the positions that follow its own.

        Another shape of x raises ValueError.
        """
        C = self.num_heads * self.head_dim
        if x.dim() != 3 or x.shape[2] != C:
            raise ValueError(f"pygpt.nn.CausalSelfAttention: x must be (B, T, {C}), got {tuple(x.shape)}")
        T, dropout_p = x.shape[1], self.dropout.p if self.training else 0.0
        qkv = self.c_attn(x)
        if cache is None and not self._changes_heads() and self._is_packed(qkv):
            masking = causal_masking(T, T, self.window, x.device)
            y = functional.qkv_attention(qkv, self.num_heads, self.num_kv_heads, dropout_p, **masking)
        else:
            q, k, v = (
                as_heads(t, t.shape[2] // self.head_dim)
                for t in qkv.split((C, *[self.num_kv_heads * self.head_dim] * 2), dim=2)
            )
            if self._changes_heads():
                q, k = self._normed_and_rotated(q, k, 0 if cache is None else cache.length)
            if cache is not None:
                k, v = cache.append(k, v)
            heads = functional.scaled_dot_product_attention(
                q, k, v,
                dropout_p=dropout_p,
                enable_gqa=self.num_heads != self.num_kv_heads,
                **causal_masking(T, k.shape[2], self.window, x.device),
            )  # fmt: skip
            y = heads.transpose(1, 2).flatten(2)
        return apply_dropout(self.dropout, self.c_proj(y))

    def _is_packed(self, qkv: Tensor) -> bool:
        """Whether qkv_attention's kernels serve these heads. DTensors are split first, so that heads can be sharded."""
        return self.head_dim <= dispatch.fast_head_dim and type(qkv) not in dispatch.SHARDED

    def _changes_heads(self) -> bool:
        return "q_norm" in self._modules or self._modules.get("rotary") is not None

    def _normed_and_rotated(self, q: Tensor, k: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """q and k (B, H, T, D), whose first position is ``position``, after q_norm, k_norm and rotary."""
        rotary, fused = self._modules.get("rotary"), {}
        if "q_norm" in self._modules:
            norms: tuple[Any, Any] = self.q_norm, self.k_norm
            if rotary is not None and all(map(is_norm_of_rope, norms)) and norms[0].eps == norms[1].eps:
                fused = {"q_weight": norms[0].weight, "k_weight": norms[1].weight, "eps": norms[0].eps}
            else:
                q, k = norms[0](q), norms[1](k)
        return (q, k) if rotary is None else rotary(q, k, position, **fused)

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}{window}"
