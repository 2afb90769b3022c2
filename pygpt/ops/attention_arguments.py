"""The public arguments of scaled_dot_product_attention, checked and made canonical: those of attention_fwd."""

import math
import sys
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..autocast import autocasting
from ..dispatch import Call
from .common import acc_dtype, check_tensors, checked_integer

torchs = F.scaled_dot_product_attention  # bound now, because a user may replace it by ours later


def is_fast(query, key, value) -> bool:
    """Whether the shapes are (B, H, L, E), (B, H, S, E), (B, H, S, Ev), and every kernel has these head dimensions."""
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    return (
        len(of_query) == len(of_key) == len(of_value) == 4
        and of_query[:2] == of_key[:2] == of_value[:2]
        and of_query[3] == of_key[3] <= dispatch.fast_head_dim >= of_value[3]
        and of_key[2] == of_value[2]
    )


_OP = "pygpt.scaled_dot_product_attention"
SEED = 8  # the place of dropout's seed among the canonical arguments


def prepare(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False,
    window=None, alibi_slopes=None, softcap=0.0, sink=None, return_lse=False,
) -> Call:  # fmt: skip
    mask = attn_mask.unsqueeze(0) if isinstance(attn_mask, Tensor) and attn_mask.dim() == 1 else attn_mask
    torch_call: Callable | None = partial(
        torchs, query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if _is_causal_bias(attn_mask) or (attn_mask is not None and is_causal) or window is not None:
        torch_call = None  # PyTorch's function does not take these
    if alibi_slopes is not None or softcap or sink is not None or return_lse:
        torch_call = None

    def served_by_torch(error):
        """The call that no kernel takes. Raises the error where PyTorch's function lacks an option, too."""
        if torch_call is None:
            raise error
        return Call((query, key, value, is_causal, scale), torch=torch_call, error=error)

    if error := check_tensors("attention", (query, key, value), one_dtype=True):
        return served_by_torch(error)
    check_flags(_OP, is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)
    _check_shapes(query, key, value)
    L, E, S, Ev = query.shape[-2], query.shape[-1], key.shape[-2], value.shape[-1]
    scale = checked_scale(_OP, scale, E)
    Hk, Hv = (t.shape[-3] if t.dim() > 2 else 1 for t in (key, value))
    if enable_gqa and Hk != Hv:
        return served_by_torch(ValueError(f"{_OP}: key has {Hk} heads, value {Hv}; they must be equal"))

    q, k, v, leading = _four_dimensional(query, key, value, enable_gqa)
    B, Hq = q.shape[:2]
    attn_mask, is_causal, lower_right = _without_causal_bias(attn_mask, is_causal, L, S)
    left, right = (-1, -1) if window is None else checked_window(_OP, "window", window)
    if not _is_number(softcap):
        raise TypeError(f"{_OP}: softcap must be a number, got {softcap!r}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{_OP}: softcap must be finite and not negative, got {softcap}")
    dropout_p = checked_dropout(_OP, dropout_p)
    if dropout_p and type(query) not in dispatch.SHARDED:
        torch_call = None  # whose random bits are others
    mask = None if attn_mask is None else _canonical_mask(attn_mask, q, leading, (B, Hq, L, S))
    slopes = None if alibi_slopes is None else _canonical_slopes(alibi_slopes, q)
    sink = None if sink is None else _canonical_sink(sink, q)

    in_use = {
        "attn_mask": mask is not None, "alibi_slopes": slopes is not None, "sink": sink is not None,
        "dropout_p": dropout_p > 0.0, "softcap": softcap > 0.0, "window": (left, right) != (-1, -1),
        "lower_right": lower_right,
    }  # fmt: skip
    features = {name for name, used in in_use.items() if used}
    args: tuple = (q, k, v, bool(is_causal), scale)
    if features:
        args += (mask, slopes, sink, None, dropout_p, float(softcap), left, right, lower_right)
    features |= {"enable_gqa"} if Hq != k.shape[1] else set()
    features |= {"return_lse"} if return_lse else set()
    heads = leading if query.dim() == key.dim() == value.dim() == 2 else (*leading, Hq)

    def finish(results):
        out, lse = results if isinstance(results, tuple) else (results, None)
        out = out if out.dim() == len(heads) + 2 else out.reshape(*heads, L, Ev)
        return (out, lse.reshape(*heads, L)) if return_lse else out

    fast = (query, key, value) if not features and is_fast(query, key, value) else None
    options = {"return_lse": True} if return_lse else {}
    seed = SEED if dropout_p else None
    return Call(args, frozenset(features), finish, torch_call, fast=fast, options=options, seed=seed)


def _check_shapes(query, key, value):
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise ValueError(f"{_OP}: {name} needs at least 2 dimensions, got shape {tuple(t.shape)}")
    E, S = query.shape[-1], key.shape[-2]
    if key.shape[-1] != E:
        raise ValueError(f"{_OP}: key has head dimension {key.shape[-1]}, query {E}; they must be equal")
    if value.shape[-2] != S:
        raise ValueError(f"{_OP}: value has {value.shape[-2]} positions, key {S}; they must be equal")


def _without_causal_bias(attn_mask, is_causal, L, S) -> tuple:
    """-> attn_mask, is_causal, lower_right, where a CausalBias has become one of the flags."""
    if not _is_causal_bias(attn_mask):
        return attn_mask, is_causal, False
    if is_causal:
        raise ValueError(f"{_OP}: is_causal and a CausalBias attn_mask are both set")
    if (size := (attn_mask.seq_len_q, attn_mask.seq_len_kv)) != (L, S):
        raise ValueError(f"{_OP}: the CausalBias is for {size}, the scores are ({L}, {S})")
    lower_right = attn_mask.variant.name == "LOWER_RIGHT"
    return None, True, lower_right


def _is_causal_bias(attn_mask) -> bool:
    """Whether it is a torch.nn.attention.bias.CausalBias. Importing that module takes a second, so this does not."""
    bias = sys.modules.get("torch.nn.attention.bias")
    return bias is not None and isinstance(attn_mask, bias.CausalBias)


def _four_dimensional(query, key, value, enable_gqa):
    """Views (B, H, T, E) of the three with broadcast leading dimensions, and those dimensions without the heads."""
    q, k, v = (t if t.dim() > 2 else t.unsqueeze(0) for t in (query, key, value))
    Hq, Hk, Hv = q.shape[-3], k.shape[-3], v.shape[-3]
    if enable_gqa:
        if Hq == 0:
            k, v = k[..., :0, :, :], v[..., :0, :, :]
        elif Hq != Hk and not (Hk > 0 and Hq % Hk == 0):
            raise ValueError(f"{_OP}: {Hq} query heads are no multiple of {Hk} key heads")
    elif not Hq == Hk == Hv:
        heads = {n for n in (Hq, Hk, Hv) if n != 1}
        if len(heads) > 1:
            grouped = "; pass enable_gqa=True for grouped heads" if Hk == Hv and Hk and Hq % Hk == 0 else ""
            raise ValueError(f"{_OP}: query has {Hq} heads, key {Hk}, value {Hv}; they do not broadcast{grouped}")
        (heads,) = heads
        q, k, v = (t.expand(*t.shape[:-3], heads, *t.shape[-2:]) for t in (q, k, v))
    shapes = [t.shape[:-3] for t in (q, k, v)]
    if len(shapes[0]) == 1 and shapes[0] == shapes[1] == shapes[2]:
        return q, k, v, shapes[0]
    try:
        leading = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        got = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(f"{_OP}: the leading dimensions of {got} do not broadcast") from None
    q, k, v = (t.expand(*leading, *t.shape[-3:]).reshape(math.prod(leading), *t.shape[-3:]) for t in (q, k, v))
    return q, k, v, leading


def _check_optional(name, t, query, or_boolean=False):
    """Raises unless ``t`` is a floating tensor on the query's device, or with or_boolean a boolean one."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(t).__name__}")
    if not t.is_floating_point() and not (or_boolean and t.dtype == torch.bool):
        raise TypeError(f"{_OP}: {name} must be {'boolean or ' * or_boolean}floating point, got {t.dtype}")
    if t.device != query.device:
        raise ValueError(f"{_OP}: {name} is on {t.device}, query on {query.device}")


def _canonical_mask(attn_mask: Tensor, q: Tensor, leading, shape) -> Tensor:
    """attn_mask in 4 dimensions, with 1 where it is broadcast to (B, Hq, L, S)."""
    _check_optional("attn_mask", attn_mask, q, or_boolean=True)
    autocasts = autocasting(q.device.type)  # which casts the query later
    allowed = (torch.bool, torch.float32, q.dtype, *((torch.bfloat16, torch.float16) if autocasts else ()))
    if attn_mask.dtype not in allowed:
        raise TypeError(f"{_OP}: attn_mask must be bool, float32 or the query's {q.dtype}, got {attn_mask.dtype}")
    if attn_mask.is_floating_point() and (autocasts or q.dtype == torch.float64):
        attn_mask = attn_mask.to(acc_dtype(q))
    full = (*leading, *shape[1:])
    mask = attn_mask[(None,) * (len(full) - attn_mask.dim())]
    if mask.dim() != len(full) or any(size not in (1, want) for size, want in zip(mask.shape, full, strict=True)):
        raise ValueError(f"{_OP}: attn_mask {tuple(attn_mask.shape)} does not broadcast to {full}")
    of_leading = mask.shape[:-3]
    if any(size != 1 for size in of_leading):
        return mask.expand(*leading, *mask.shape[-3:]).reshape(shape[0], *mask.shape[-3:])
    return mask.reshape(1, *mask.shape[-3:])


def _canonical_slopes(alibi_slopes: Tensor, q: Tensor) -> Tensor:
    """(B or 1, Hq) in the dtype of lse."""
    B, Hq = q.shape[:2]
    _check_optional("alibi_slopes", alibi_slopes, q)
    if tuple(alibi_slopes.shape) not in ((Hq,), (1, Hq), (B, Hq)):
        shape = tuple(alibi_slopes.shape)
        raise ValueError(f"{_OP}: alibi_slopes must have shape ({Hq},) or ({B}, {Hq}), got {shape}")
    return alibi_slopes.to(acc_dtype(q)).reshape(-1, Hq)


def _canonical_sink(sink: Tensor, q: Tensor) -> Tensor:
    """(Hq,) in the dtype of lse."""
    _check_optional("sink", sink, q)
    if tuple(sink.shape) != (q.shape[1],):
        raise ValueError(f"{_OP}: sink must have shape ({q.shape[1]},), got {tuple(sink.shape)}")
    return sink.to(acc_dtype(q))


def checked_scale(op: str, scale, E: int) -> float:
    """The scale as a number, by default 1 / sqrt(E)."""
    if scale is None:
        return 1.0 / math.sqrt(E or 1)
    try:
        if not isinstance(scale, (str, bytes, bytearray)):  # which float() would parse
            return float(scale)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise TypeError(f"{op}: scale must be a number that a float holds, got {scale!r}")


def checked_dropout(op: str, p: Any) -> float:
    if not _is_number(p):
        raise TypeError(f"{op}: dropout_p must be a number, got {p!r}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {p}")
    return float(p)


def _is_number(x: object) -> bool:
    return isinstance(x, (Real, torch.SymFloat))


def check_flags(op: str, **flags) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, (bool, torch.SymBool)):
            raise TypeError(f"{op}: {name} must be a bool, got {flag!r}")


def checked_window(op: str, name: str, window) -> tuple[int, int]:
    try:
        left, right = (checked_integer(op, name, n) for n in window)
        valid = all(-1 <= n < 2**31 for n in (left, right))
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{op}: {name} must be (left, right), integers from -1 to 2^31 - 1, got {window!r}")
    return left, right
