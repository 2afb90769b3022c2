"""Registers attention: with its FLOPs, and its specs for `pygpt verify`, one for each option and all of them together.

A spec says how calls are drawn, made and judged. attention.py has the op itself, which the specs call.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Op, pick, register
from .attention import (
    Attention,
    Options,
    attention_bwd,
    attention_composite,
    attention_fwd,
    scaled_dot_product_attention,
    scores,
    visible,
)
from .attention_arguments import prepare, torchs
from .common import Spec, acc_dtype


# ------------------------------------------------------------------------------- FLOPs
def flops_fwd(q, k, v, *_, out_val=None):
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(q.shape, *_shapes_by_query_head(q, k, v))


def flops_bwd(dout, dlse, q, k, v, *_, out_val=None):
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(dout.shape, q.shape, *_shapes_by_query_head(q, k, v))


def _shapes_by_query_head(q, k, v):
    """The shapes of k and v as if no query heads shared them."""
    return ((*t.shape[:1], q.shape[1], *t.shape[2:]) for t in (k, v))


# ------------------------------------------------------------------------------- the arguments of calls
def _draw(random, d):
    """The canonical arguments of a plain call, and of one with options where ``d`` has one of their keys."""
    B, H, L, S, group = d["B"], d["H"], d["L"], d["S"], d.get("group", 1)
    q, k, v = random(B, H * group, L, d["E"]), random(B, H, S, d["E"]), random(B, H, S, d["Ev"])
    plain = q, k, v, bool(d["causal"]), 1.0 / math.sqrt(max(d["E"], 1))
    if not d.keys() & {"mask", "left", "alibi", "softcap", "sink", "dropout", "lower_right"}:
        return plain
    mask = {
        "none": lambda: None,
        "bool": lambda: _bool_mask(random(B, 1, L, S), d.get("padding", 0)),
        "float": lambda: random(1, 1, L, S),
    }
    return *plain, *Options(
        attn_mask=mask[d.get("mask", "none")](),
        alibi_slopes=random(H * group).abs()[None] if d.get("alibi") else None,
        sink=random(H * group) if d.get("sink") else None,
        seed=(random(1) * 2**60).long() if d.get("dropout") else None,
        dropout_p=d.get("dropout", 0.0),
        softcap=d.get("softcap", 0.0),
        left=d.get("left", -1),
        right=d.get("right", -1),
        lower_right=bool(d.get("lower_right")),
    )


def _bool_mask(noise: Tensor, padding: int) -> Tensor:
    """About two thirds visible, but the last ``padding`` percent of the keys hidden, and the first one visible, so that
    every query sees one."""
    S = noise.shape[-1]
    key = torch.arange(S, device=noise.device)
    return (noise > -0.5) & (key < S - S * padding // 100) | (key == 0)


# ------------------------------------------------------------------------------- the results, ours and PyTorch's
def _cancelled(args, grads):
    """The gradients without rowsum(dout out), the softmax's correction, which cancels most of them."""
    q, k, v, is_causal, scale, *options = args
    out, lse = attention_fwd(*args)
    mask, slopes = (*options, None, None)[:2]
    needs = [True, True, False, mask is not None and mask.is_floating_point(), slopes is not None, False]
    terms = attention_bwd(grads[0], None, q, k, v, out * 0, lse, is_causal, scale, needs, *options)
    named = {"dq": terms[0], "dk": terms[1], "dattn_mask": terms[3], "dalibi_slopes": terms[4]}
    return {name: t for name, t in named.items() if t.numel()}


def _call(q, k, v, is_causal, scale):
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)


def _call_with_lse(q, k, v, is_causal, scale):
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, return_lse=True)


def _call_with_options(q, k, v, is_causal, scale, *options):
    """(out, lse) as the public function computes them, but the seed is given, not drawn."""
    o = in_kernels_dtypes(q, options)
    in_use = {
        "attn_mask": o.attn_mask is not None, "alibi_slopes": o.alibi_slopes is not None, "sink": o.sink is not None,
        "dropout_p": o.seed is not None, "softcap": o.softcap > 0, "window": o.left >= 0 or o.right >= 0,
        "lower_right": o.lower_right, "enable_gqa": q.shape[1] != k.shape[1],
    }  # fmt: skip
    row = pick("attention", [q, k, v], [name for name, used in in_use.items() if used])
    return Attention.apply(row.kernels, q, k, v, is_causal, scale, *o)


def in_kernels_dtypes(q, options) -> Options:
    """The options with the slopes and the sink in the dtype of lse."""
    o = Options(*options)
    slopes, sink = (None if t is None else t.to(acc_dtype(q)) for t in (o.alibi_slopes, o.sink))
    return o._replace(alibi_slopes=slopes, sink=sink)


def _torchs_with_lse(q, k, v, is_causal, scale):
    lse = torch.logsumexp(scores(q, k, is_causal, scale), -1)  # in float32, as ours is
    return attention_composite(q, k, v, is_causal, scale), lse


def _torchs_with_options(q, k, v, is_causal, scale, *options):
    """PyTorch's own function where a mask can say it, else the ordinary expression, whose sums are in float32."""
    o = in_kernels_dtypes(q, options)
    if o.alibi_slopes is not None or o.sink is not None or o.seed is not None or o.softcap:
        return attention_composite(q, k, v, is_causal, scale, *o, return_lse=True)
    mask = visible(q.shape[2], k.shape[2], q.device, is_causal, o)
    if o.attn_mask is not None and o.attn_mask.is_floating_point():
        mask = o.attn_mask if mask is None else o.attn_mask.masked_fill(~mask, -math.inf)
    out = torchs(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out, attention_composite(q, k, v, is_causal, scale, *o, return_lse=True)[1]


# ------------------------------------------------------------------------------- the specs
_HOW: dict[str, Any] = {
    "inputs": ("q", "k", "v"),
    "dims": {"B": 2, "H": 4, "L": 128, "S": lambda d: d["L"], "E": 64, "Ev": lambda d: d["E"], "causal": 0},
    "draw": _draw,
    "cancelled": _cancelled,
}


def _spec_of_option(features: str, dims: dict, *shapes: dict, choices: dict | None = None) -> Spec:
    """Of calls with an option. ``dims``: its own keys of --shape."""
    how = _HOW | {"inputs": (*_HOW["inputs"], "is_causal", "scale", *Options._fields[:3])}
    how["dims"] = _HOW["dims"] | dims
    with_lse = "sink" in features  # which changes lse
    return Spec(
        "attention",
        call=_call_with_options if with_lse else lambda *args: _call_with_options(*args)[0],
        yardstick=_torchs_with_options if with_lse else lambda *args: _torchs_with_options(*args)[0],
        outputs=("fwd", "lse") if with_lse else ("fwd",),
        shapes=shapes,
        features=tuple(features.split()),
        choices=choices,
        **how,
    )


_FEW: dict = {"B": 1, "L": 3, "S": 300}
_UNEVEN: dict = {"B": 1, "L": 77, "S": 100, "E": 40, "Ev": 24}
_SMALL: dict = {"B": 1, "L": 50, "E": 24}  # the few gradients of slopes and sinks are drawn often
_MASKS = ("none", "bool", "float")
_EVERY_OPTION = "attn_mask alibi_slopes sink dropout_p softcap window lower_right enable_gqa"
_SPECS_OF_OPTIONS = {
    "attention_mask": _spec_of_option(
        "attn_mask",
        {"mask": "bool", "padding": 0},
        {},
        {"mask": "float"},
        {"mask": "float", **_FEW},
        choices={"mask": _MASKS},
    ),
    "attention_window": _spec_of_option("window", {"left": 20, "right": 10}, {}),
    "attention_lower_right": _spec_of_option("lower_right", {"causal": 1, "lower_right": 1}, _UNEVEN, _FEW),
    "attention_gqa": _spec_of_option("enable_gqa", {"H": 2, "group": 4}, {"causal": 1}, _FEW),
    "attention_alibi": _spec_of_option("alibi_slopes", {"alibi": 1}, {"causal": 1, **_SMALL}),
    "attention_softcap": _spec_of_option("softcap", {"softcap": 2.0}, {}, _FEW),
    "attention_sink": _spec_of_option("sink", {"sink": 1}, _SMALL, {**_FEW, "E": 24}),
    "attention_dropout": _spec_of_option("dropout_p", {"dropout": 0.2}, {}, _FEW),
    "attention_options": _spec_of_option(
        _EVERY_OPTION,
        {
            "H": 2, "group": 2, "causal": 1, "mask": "bool", "left": 60, "right": 10, "lower_right": 1, "alibi": 1,
            "softcap": 2.0, "sink": 1, "dropout": 0.2,
        },
        _UNEVEN,
        {"mask": "float", **_FEW, "E": 24},
        choices={"mask": _MASKS},
    ),
}  # fmt: skip
register(
    Op(
        "attention",
        public=scaled_dot_product_attention,
        prepare=prepare,
        composite=attention_composite,
        fwd=attention_fwd,
        bwd=attention_bwd,
        function=Attention,
        results=2,
        flops=(flops_fwd, flops_bwd),
        lower_precision=True,
        specs={
            "attention": Spec(
                "attention",
                call=_call,
                shapes=({}, {"causal": 1}, {"L": 100, "S": 77, "E": 80, "Ev": 48, "causal": 1}),
                **_HOW,
            ),
            "attention_lse": Spec(
                "attention",
                call=_call_with_lse,
                shapes=({}, {"causal": 1}),
                outputs=("fwd", "lse"),
                yardstick=_torchs_with_lse,
                **_HOW,
            ),
            **_SPECS_OF_OPTIONS,
        },
    )
)
