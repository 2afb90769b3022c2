"""The rotary position embedding of queries and keys."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys (Su et al. 2021) on `pygpt.functional.rope`.

    The first ``rotary_dim`` of ``head_dim`` channels, by default all, are rotated: pair i at position t by the angle
    t base^(-2 i / rotary_dim). Pair i is (i, i + rotary_dim / 2), or (2 i, 2 i + 1) with ``interleaved``. The cosines
    and sines of ``max_positions`` positions are computed in float64 and kept in float32, whatever the module is
    converted to; they are not part of the state dict. ``dtype`` is accepted as by every module and changes nothing.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        rotary_dim: int | None = None,
        base: float = 10000.0,
        interleaved: bool = False,
        max_positions: int = 4096,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim // 2 * 2 if rotary_dim is None else rotary_dim
        if not 0 <= rotary_dim <= head_dim or rotary_dim % 2:
            raise ValueError(
                f"pygpt.nn.RotaryEmbedding: rotary_dim must be even and from 0 to head_dim {head_dim}, got {rotary_dim}"
            )
        if max_positions < 0:
            raise ValueError(f"pygpt.nn.RotaryEmbedding: max_positions must not be negative, got {max_positions}")
        if not 0 < base < math.inf:
            raise ValueError(f"pygpt.nn.RotaryEmbedding: base must be a positive number, got {base}")
        self.head_dim, self.rotary_dim, self.base = head_dim, rotary_dim, float(base)
        self.interleaved, self.max_positions = interleaved, max_positions
        for name, table in self._tables(device).items():
            self.register_buffer(name, table, persistent=False)

    def _tables(self, device: torch.device | str | None) -> dict[str, Tensor]:
        pairs = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64)
        frequencies = self.base ** (-pairs / max(self.rotary_dim, 1))
        angles = torch.arange(self.max_positions, dtype=torch.float64)[:, None] * frequencies
        return {name: t.to(device, torch.float32) for name, t in (("cos", angles.cos()), ("sin", angles.sin()))}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        if self.cos is not before["cos"]:  # converted, moved or emptied, each of which leaves other values
            tables = self._tables("cpu") if before["cos"].is_meta else before
            for name in before:
                setattr(self, name, tables[name].to(self.cos.device))
        return self

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        position_ids: Tensor | int | None = None,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor | None]:
        """``q (B, Hq, T, head_dim)``, ``k (B, Hkv, T, head_dim)`` or None -> both, rotated.

        ``position_ids``: the position of each row, integers ``(T,)`` or ``(B, T)``, or the position of the first row,
        such as the length of a KV cache; 0 by default. ``q_weight``, ``k_weight`` and ``eps`` are those of
        `pygpt.functional.rope`. Positions from max_positions on raise ValueError (a tensor's on a GPU give NaN).
        """
        cos, sin, ids = self.cos, self.sin, position_ids
        if not isinstance(ids, Tensor):
            first = 0 if ids is None else ids
            end = first + q.shape[-2]
            if first < 0 or end > self.max_positions:
                raise ValueError(
                    f"pygpt.nn.RotaryEmbedding: positions {first} to {end - 1}, tables for {self.max_positions}"
                )
            cos, sin, ids = cos[first:end], sin[first:end], None
        if q.dtype == torch.float64:
            cos, sin = cos.double(), sin.double()
        return functional.rope(
            q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, interleaved=self.interleaved,
            position_ids=ids,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, rotary_dim={self.rotary_dim}, base={self.base}, "
            f"interleaved={self.interleaved}, max_positions={self.max_positions}"
        )
