"""Modules over `pygpt.functional`: torch's norms and Linear with another forward, and the halves of a GPT block.

State dicts are interchangeable with torch.nn (LayerNorm, RMSNorm, Linear) and nanoGPT (MLP, CausalSelfAttention).
"""

from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from . import functional, reference


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm; called with a residual it also adds, in the same pass over memory."""

    def forward(self, input: Tensor, residual: Tensor | None = None):
        """input (..., *normalized_shape) -> the norm of it; with a residual of that shape -> (norm of the sum, sum)."""
        affine = self.normalized_shape, self.weight, self.bias, self.eps
        if residual is None:
            return functional.layer_norm(input, *affine)
        return functional.add_layer_norm(input, residual, *affine)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm; input (..., *normalized_shape)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.rms_norm(input, self.normalized_shape, self.weight, self.eps)


class Linear(nn.Linear):
    """torch.nn.Linear; input (..., in_features) -> (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class MLP(nn.Module):
    """c_proj(act(c_fc(x))) in one fused op; x (..., embed_dim), hidden_dim defaults to 4 * embed_dim.

    activation: "gelu" (exact), "gelu_tanh", "relu" or "relu2".
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        activation="gelu_tanh",
        bias=True,
        dropout=0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if activation not in reference.ACTIVATIONS:
            known = ", ".join(reference.ACTIVATIONS)
            raise ValueError(f"pygpt.nn.MLP: unknown activation {activation!r}; known: {known}")
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        self.activation = activation
        self.c_fc = Linear(embed_dim, hidden_dim, bias, device, dtype)
        self.c_proj = Linear(hidden_dim, embed_dim, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        fc, proj = self.c_fc, self.c_proj
        y = functional.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, self.activation)
        return self.dropout(y) if self.dropout.training else y

    def extra_repr(self):
        return f"activation={self.activation!r}"


class KVCache:
    """Keys and values of one attention layer's past, preallocated for ``capacity`` positions at the first append."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.heads = None

    def append(self, heads: Tensor) -> Tensor:
        """The key heads and then the value heads of the next T positions, (B, 2 Hkv, T, D) -> all so far."""
        B, H, T, D = heads.shape
        end = self.length + T
        if end > self.capacity:
            raise ValueError(f"pygpt.nn.KVCache: {end} positions, room for {self.capacity}")
        if self.heads is None:
            self.heads = heads.new_empty(B, H, self.capacity, D)
        self.heads.narrow(2, self.length, T).copy_(heads)
        self.length = end
        return self.heads.narrow(2, 0, end)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention; x (B, T, embed_dim) -> (B, T, embed_dim).

    c_attn projects to queries, keys and values side by side; the heads are views of its output, nothing is copied.
    num_kv_heads < num_heads shares each key/value head among num_heads / num_kv_heads queries (GQA).
    dropout acts on the attention weights and on the output.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias=True,
        dropout=0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"pygpt.nn.CausalSelfAttention: embed_dim {embed_dim} does not divide by num_heads {num_heads}"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"pygpt.nn.CausalSelfAttention: num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, embed_dim // num_heads
        self.c_attn = Linear(embed_dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias, device, dtype)
        self.c_proj = Linear(embed_dim, embed_dim, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """With a cache, x holds the positions that follow the cached ones."""
        if x.dim() != 3 or x.shape[2] != self.c_attn.in_features:
            raise ValueError(
                f"pygpt.nn.CausalSelfAttention: x must be (B, T, {self.c_attn.in_features}), got {tuple(x.shape)}"
            )
        (B, T, _), H, Hkv = x.shape, self.num_heads, self.num_kv_heads
        q, kv = self.c_attn(x).view(B, T, H + 2 * Hkv, self.head_dim).transpose(1, 2).split((H, 2 * Hkv), dim=1)
        if cache is not None:
            kv = cache.append(kv)
        k, v = kv.chunk(2, dim=1)
        S = k.shape[2]
        y = functional.scaled_dot_product_attention(
            q, k, v,
            attn_mask=causal_lower_right(T, S) if 1 < T < S else None,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=1 < T == S,
            enable_gqa=H != Hkv,
        )  # fmt: skip
        y = self.c_proj(y.transpose(1, 2).flatten(2))
        return self.dropout(y) if self.dropout.training else y

    def extra_repr(self):
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
