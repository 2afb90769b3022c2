"""attn_implementation="pygpt" for transformers: attention on `pygpt.functional.scaled_dot_product_attention`.

A model asks its mask function once for each kind of layer, and passes the result to attention in every layer. The
result here is None or a tensor with the meaning that they have for "sdpa", or a `Causal`, which says in a few numbers
what a mask of shape (B, 1, L, S) would say: causal, windowed, with padding. No such mask is built then.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import without_values
from ..functional import scaled_dot_product_attention
from ..nn.attention import causal_masking

NAME = "pygpt"


@dataclass(frozen=True)
class Causal:
    """The mask of L queries at the last L of S positions. Each sees itself and the positions before it.

    With ``window`` it sees no more than that many positions before its own. ``keys`` (B, S), boolean, hides padding.
    """

    window: int | None = None
    keys: Tensor | None = None
    ndim: ClassVar[int] = 4  # of the mask that this stands for; transformers asks


def register() -> None:
    """Adds attn_implementation="pygpt" to transformers, for `from_pretrained` and for `model.set_attn_implementation`.

    Grouped heads, softcap, sinks, sliding windows, position biases and dropout run in the kernels. Attention weights
    are not returned, as with "sdpa". ImportError without transformers. A second call changes nothing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    *, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0, attention_mask: Any = None,
    allow_is_causal_skip: bool = True, local_size: int | None = None, **rest: Any,
) -> "Tensor | Causal | None":  # fmt: skip
    """What a layer's attention is to get as its mask. The arguments are those of transformers' `sdpa_mask`.

    ``attention_mask`` (B, S), boolean, hides padding. allow_is_causal_skip is False where the pattern is not plainly
    causal, for example for packed sequences, and for a static cache while it decodes.
    """
    from transformers.masking_utils import sdpa_mask

    if isinstance(attention_mask, Causal):  # `generate` has asked already
        return attention_mask
    keys = attention_mask
    if keys is not None:
        keys = F.pad(keys, (0, max(0, kv_offset + kv_length - keys.shape[-1])))[:, kv_offset : kv_offset + kv_length]
        if not without_values((keys,)) and keys.all():
            keys = attention_mask = None
    # Only a window's mask has this size, while a mask of chunks has another one.
    windowed = local_size is not None and local_size == getattr(rest.get("config"), "sliding_window", None)
    chunked = getattr(rest.get("config"), "attention_chunk_size", None) is not None
    plain = allow_is_causal_skip and (local_size is None or (windowed and not chunked))
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if plain and at_the_end and (keys is None or q_length in (1, kv_length)):
        window = None if local_size is None or local_size >= kv_length else local_size - 1
        return None if window is None and keys is None and q_length in (1, kv_length) else Causal(window, keys)
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip, local_size=local_size, **rest,
    )  # fmt: skip


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: "Tensor | Causal | None",
    dropout: float = 0.0, scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """``query (B, Hq, L, E)``, ``key (B, Hkv, S, E)``, ``value (B, Hkv, S, Ev)`` -> ``(B, L, Hq, Ev)`` and None.

    Of the options, ``is_causal``, ``softcap``, ``position_bias`` (1 or B, Hq, L, S) and ``s_aux`` (Hq,), the sinks, are
    read. ``sliding_window`` is in the mask already.
    """
    L = query.shape[2]
    is_causal = options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and is_causal and 1 < L < key.shape[2]:
        key, value = key[:, :, :L], value[:, :, :L]  # a static cache, of which the first L positions are filled
    S, bias = key.shape[2], options.get("position_bias")
    masking = _arguments(attention_mask, L, S, is_causal, query.device, dense=bias is not None and L != S)
    if bias is not None:
        masking["attn_mask"] = _biased(bias[..., :S], masking.get("attn_mask"))
    out = scaled_dot_product_attention(
        query, key, value,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        softcap=options.get("softcap") or 0.0,
        sink=options.get("s_aux"),
        **masking,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _arguments(
    of_layer: "Tensor | Causal | None", L: int, S: int, is_causal: bool, device: torch.device, dense: bool
) -> dict[str, Any]:
    """The mask as arguments of scaled_dot_product_attention, with ``dense`` as a tensor alone."""
    if of_layer is None:
        return {"is_causal": is_causal and L > 1}
    if isinstance(of_layer, Tensor):
        return {"attn_mask": of_layer}
    window, keys = of_layer.window, of_layer.keys
    if L == S and not dense:
        return {**({} if keys is None else {"attn_mask": keys[:, None, None]}), **causal_masking(L, S, window, device)}
    if keys is None and not dense:
        return causal_masking(L, S, window, device)
    own, key = torch.arange(S - L, S, device=device)[:, None], torch.arange(S, device=device)
    seen = (key <= own) & (key >= own - (S if window is None else window))
    return {"attn_mask": seen if keys is None else seen & keys[:, None, None]}


def _biased(bias: Tensor, attn_mask: Tensor | None) -> Tensor:
    """A floating mask that adds the bias, and hides what the other mask hides."""
    if attn_mask is None:
        return bias
    return bias.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else bias + attn_mask
