"""Cases of attention with options, drawn at random, and what they should give."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from pygpt.functional import scaled_dot_product_attention as sdpa
from pygpt.ops.attention import Attention
from tests.conftest import ON_GPU
from tests.ops.attention_by_hand import by_hand

MARKS = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:Lower right causal bias"),  # will produce NaN, says torch; ours does not
]
DTYPES = [torch.float64, torch.float32]


class Sizes(NamedTuple):
    B: int
    Hq: int
    Hkv: int
    L: int
    S: int
    E: int = 3
    Ev: int = 2

    @property
    def features(self):
        return ("enable_gqa",) * (self.Hq != self.Hkv)


@dataclass(frozen=True)
class Option:
    """features: what a backend must announce. draw: sizes, generator -> keyword arguments of by_hand."""

    name: str
    features: tuple[str, ...]
    draw: Callable

    @property
    def __name__(self):  # the case's name in pytest
        return self.name.replace(" ", "_")


def uniform(g, *shape):
    return torch.rand(shape, generator=g, dtype=torch.float64)


def bool_mask(g, *shape):
    """About half of it visible; with several rows, one is fully masked."""
    mask = uniform(g, *shape) > 0.4
    if shape[-2] > 1:
        mask[..., torch.randint(shape[-2], (), generator=g), :] = False
    return mask


def float_mask(g, *shape):
    values = torch.randn(shape, generator=g, dtype=torch.float64)
    return values.masked_fill(~bool_mask(g, *shape), -math.inf)


def option(name, features, draw):
    return Option(name, tuple(features.split()), draw)


OPTIONS = [
    option("bool mask", "attn_mask", lambda d, g: {"attn_mask": bool_mask(g, d.B, 1, d.L, d.S)}),
    option("float mask", "attn_mask", lambda d, g: {"attn_mask": float_mask(g, 1, d.Hq, d.L, d.S)}),
    option("mask of keys", "attn_mask", lambda d, g: {"attn_mask": torch.arange(d.S) < d.S - 1}),
    option("mask and causal", "attn_mask", lambda d, g: {
        "attn_mask": bool_mask(g, d.B, 1, d.L, d.S), "is_causal": True}),
    option("float mask and causal", "attn_mask", lambda d, g: {
        "attn_mask": float_mask(g, d.L, d.S), "is_causal": True}),
    option("window", "window", lambda d, g: {"window": (1, 2)}),
    option("window left", "window", lambda d, g: {"window": (1, -1)}),
    option("window right", "window", lambda d, g: {"window": (-1, 0)}),
    option("window and causal", "window", lambda d, g: {"window": (2, 3), "is_causal": True}),
    option("window of one key", "window", lambda d, g: {"window": (0, 0)}),
    option("alibi", "alibi_slopes", lambda d, g: {"alibi_slopes": uniform(g, d.Hq)}),
    option("alibi per batch", "alibi_slopes", lambda d, g: {"alibi_slopes": uniform(g, d.B, d.Hq), "is_causal": True}),
    option("softcap", "softcap", lambda d, g: {"softcap": 0.7}),
    option("softcap and mask", "softcap attn_mask", lambda d, g: {
        "softcap": 0.7, "attn_mask": float_mask(g, 1, d.Hq, d.L, d.S)}),
    option("lower right", "lower_right", lambda d, g: {"lower_right": True}),
    option("lower right, window, alibi", "lower_right window alibi_slopes", lambda d, g: {
        "lower_right": True, "window": (2, -1), "alibi_slopes": uniform(g, d.Hq)}),
    option("sink", "sink", lambda d, g: {"sink": uniform(g, d.Hq) * 4 - 2}),
    option("sink and causal window", "sink window", lambda d, g: {
        "sink": uniform(g, d.Hq), "window": (1, 1), "is_causal": True}),
    option("dropout", "dropout_p", lambda d, g: {"dropout_p": 0.4}),
    option("dropout and causal", "dropout_p", lambda d, g: {"dropout_p": 0.2, "is_causal": True}),
    option("everything", "attn_mask window softcap alibi_slopes sink dropout_p", lambda d, g: {
        "attn_mask": bool_mask(g, d.B, 1, d.L, d.S), "is_causal": True, "window": (3, 1), "softcap": 1.5,
        "alibi_slopes": uniform(g, d.Hq), "sink": uniform(g, d.Hq), "dropout_p": 0.3}),
    option("everything else", "attn_mask window softcap alibi_slopes sink dropout_p lower_right", lambda d, g: {
        "attn_mask": float_mask(g, d.B, 1, 1, d.S), "lower_right": True, "window": (3, -1), "softcap": 1.5,
        "alibi_slopes": uniform(g, d.B, d.Hq), "sink": uniform(g, d.Hq), "dropout_p": 0.3}),
]  # fmt: skip
BY_NAME = {o.name: o for o in OPTIONS}


# ------------------------------------------------------------------------------- a call, and what it should give
def draw_tensors(d: Sizes, g, dtype=torch.float64, **options):
    """q, k, v and the floating options in float64, but rounded to ``dtype``."""
    shapes = {"q": (d.B, d.Hq, d.L, d.E), "k": (d.B, d.Hkv, d.S, d.E), "v": (d.B, d.Hkv, d.S, d.Ev)}
    tensors = {n: torch.randn(shape, generator=g, dtype=torch.float64) for n, shape in shapes.items()} | options
    return {n: t.to(dtype).double() if is_floating(t) else t for n, t in tensors.items()}


def is_floating(a) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def next_seed(device="cpu") -> int:
    """The seed that the next call with dropout draws."""
    limits = torch.iinfo(torch.int64)
    with torch.random.fork_rng(enabled=True):
        return torch.randint(limits.min, limits.max, (1,), dtype=torch.int64, device=device).item()


def public(q, k, v, lower_right=False, **options):
    """The public function, with by_hand's arguments."""
    if lower_right:
        bias = causal_lower_right(q.shape[2], k.shape[2])
        if "attn_mask" in options:  # not together in torch's arguments
            raise ValueError("two masks")
        options["attn_mask"] = bias
    return sdpa(q, k, v, **options, enable_gqa=q.shape[1] != k.shape[1], return_lse=True)


def canonical(kernels, q, k, v, attn_mask=None, is_causal=False, scale=None, window=(-1, -1), alibi_slopes=None,
              softcap=0.0, sink=None, lower_right=False, dropout_p=0.0, seed=None):  # fmt: skip
    """The autograd Function on kernels, with by_hand's arguments, and every one of them at the same time."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    slopes = None if alibi_slopes is None else alibi_slopes.to(wide).reshape(-1, q.shape[1])
    key = torch.tensor([seed], device=q.device) if dropout_p else None
    left, right = window
    scale = q.shape[3] ** -0.5 if scale is None else scale
    options = mask, slopes, None if sink is None else sink.to(wide), key, dropout_p, softcap, left, right, lower_right
    causal = is_causal or lower_right
    return Attention.apply(kernels, q, k, v, causal, scale, *options)


def with_gradients(function, tensors, g):
    """out, lse and every gradient of a random function of them, by name, in float64 on the CPU."""
    tensors = {n: t.detach().requires_grad_() if is_floating(t) else t for n, t in tensors.items()}
    differentiated = {f"d{n}": t for n, t in tensors.items() if is_floating(t)}
    out, lse = function(**tensors)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in (out, lse)]
    total = (out * weights[0]).sum() + (lse * weights[1])[lse.isfinite()].sum()
    gradients = torch.autograd.grad(total, list(differentiated.values()))
    results = {"out": out, "lse": lse, **dict(zip(differentiated, gradients, strict=True))}
    return {name: t.detach().cpu().double() for name, t in results.items()}


def assert_near(found, want, dtype):
    """Equal in three fifths of the digits, relative to the largest value."""
    assert found.keys() == want.keys()
    for name, t in want.items():
        finite = t[t.isfinite()]
        size = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
        atol = torch.finfo(dtype).eps ** 0.6 * size
        torch.testing.assert_close(found[name], t, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def cast(tensors, device, dtype):
    """The tensors on a device, those that are floating in a dtype. Other values as they are."""
    return {n: t.to(device, dtype if is_floating(t) else t.dtype) if isinstance(t, Tensor) else t
            for n, t in tensors.items()}  # fmt: skip


def check(function, tensors, g, dtype, device, expected=by_hand, **of_expected):
    """function gives what is expected, and the same gradients."""
    state = g.get_state()
    want = with_gradients(lambda **kw: expected(**kw, **of_expected), tensors, g)
    g.set_state(state)
    found = with_gradients(function, cast(tensors, device, dtype), g)
    assert_near(found, want, dtype)
    return found


def is_emulated(compiled, device) -> bool:
    """Whether the kernels of a GPU run on the CPU, where large tensors take long."""
    return compiled in ON_GPU and device == "cpu"


TYPICAL = [Sizes(2, 4, 4, 4, 6), Sizes(2, 4, 2, 6, 4), Sizes(1, 4, 1, 21, 35, 8, 5)]
FEATURES = ("attn_mask", "alibi_slopes", "sink", "dropout_p", "softcap", "window", "lower_right", "enable_gqa")
