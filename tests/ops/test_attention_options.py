"""The options of scaled_dot_product_attention, on every backend that announces them, against attention by hand.

A case is drawn at random: its values, and for the combinations also its sizes and which options it has. Memory that a
kernel is given is poisoned.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import cases
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

import pygpt
from pygpt.dispatch import TABLE, named
from pygpt.functional import scaled_dot_product_attention as sdpa
from pygpt.ops.attention import Attention
from pygpt.ops.common import dropout_factors
from tests.conftest import ON_GPU
from tests.ops.attention_by_hand import by_hand, kept, philox

GPU_SHARE = {"triton": 6, "cuda": 6}  # see conftest
pytestmark = [
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


@pytest.fixture
def kernels_of(compiled):
    return named(compiled).kernels


# ------------------------------------------------------------------------------- dropout's random bits
KNOWN_ANSWERS = [  # of the authors' library: key, counter, words
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("key, counter, words", KNOWN_ANSWERS)
def test_philox_by_hand_gives_the_known_answers(key, counter, words):
    assert philox(key, np.array(counter, dtype=np.uint64)).tolist() == list(words)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 12345678901234])
def test_the_references_random_bits(seed, p):
    B, H, L, S = 2, 3, 5, 11
    rows, heads = torch.arange(L)[:, None], torch.arange(B * H).view(B, H, 1, 1)
    found = dropout_factors(torch.tensor([seed]), p, S, rows, heads)
    want = kept(seed, p, B, H, L, S).double() * (1 / (1 - p) if p < 1 else 0)
    assert torch.equal(found, want)


DROPOUT = BY_NAME["dropout"]


@pytest.mark.parametrize("option", [DROPOUT], ids=cases.ids)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("L", [3, 37])
def test_which_weights_dropout_drops(L, dtype, option, backend, device, seed, kernels):
    """Forward and backward drop the same ones, those of the contract, on every path and backend."""
    B, H, S, p = 2, 3, 61, (0.1, 0.5, 0.9)[seed % 3]
    key = int.from_bytes(seed.to_bytes(4, "little") * 2, "little", signed=True)
    q = torch.zeros(B, H, L, 64, dtype=dtype, device=device)
    k, v = (torch.zeros(B, H, S, 64, dtype=dtype, device=device) for _ in range(2))
    v[..., :S] = torch.eye(S)  # so that channel j of out is the weight of key j
    dout = torch.zeros_like(q)
    dout[..., :L] = torch.eye(L)
    options = None, None, None, torch.tensor([key], device=device), p
    out, lse = kernels.attention_fwd(q, k, v, False, 1.0, *options)
    _, _, dv, *_ = kernels.attention_bwd(dout, None, q, k, v, out, lse, False, 1.0, [False, False, True], *options)
    want = kept(key, p, B, H, L, S)
    assert torch.equal(out[..., :S].cpu() != 0, want) and torch.equal(dv[..., :L].mT.cpu() != 0, want)
    torch.testing.assert_close(out.amax().item() * S, 1 / (1 - p), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("option", [DROPOUT], ids=cases.ids)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_the_share_that_dropout_keeps(p, option, compiled, device):
    """Within five standard deviations, over all weights, and over those of each word of the generator."""
    q = torch.zeros(2, 4, 64, 64, device=device)
    v = torch.eye(64, device=device).expand(2, 4, 64, 64)
    with pygpt.backend(compiled):
        seen = sdpa(q, q, v, dropout_p=p) != 0
    for part in (seen, *(seen[..., word::4] for word in range(4)), seen[:, :, ::2], seen[0], seen[:, 1]):
        deviation = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(part.double().mean().item() - (1 - p)) < 5 * deviation


@pytest.mark.parametrize("option", [DROPOUT], ids=cases.ids)
def test_dropout_follows_manual_seed(option, backend, device):
    q, k, v = (torch.randn(1, 2, 20, 8, device=device) for _ in range(3))
    with pygpt.backend(backend):
        torch.manual_seed(3)
        first = sdpa(q, k, v, dropout_p=0.5)
        state = torch.get_rng_state()
        pygpt.explain(sdpa, q, k, v, dropout_p=0.5)
        sdpa(q, k, v)
        assert torch.equal(torch.get_rng_state(), state)  # what has no dropout draws nothing
        second = sdpa(q, k, v, dropout_p=0.5)
        torch.manual_seed(3)
        assert torch.equal(first, sdpa(q, k, v, dropout_p=0.5)) and torch.equal(second, sdpa(q, k, v, dropout_p=0.5))
        assert not torch.equal(first, second)
        nothing, lse = sdpa(q, k, v, dropout_p=1.0, return_lse=True)
        assert not nothing.any()
        torch.testing.assert_close(lse, sdpa(q, k, v, return_lse=True)[1])


@pytest.mark.parametrize("option", [DROPOUT], ids=cases.ids)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_is_replayed_by_checkpoints(use_reentrant, option, compiled, device):
    q, k, v = inputs = [torch.randn(1, 2, 20, 8, device=device, requires_grad=True) for _ in range(3)]
    context = {} if use_reentrant else {"context_fn": lambda: (pygpt.backend(compiled), pygpt.backend(compiled))}

    def attend(q, k, v):
        return sdpa(q, k, v, dropout_p=0.4, is_causal=True)

    results = []
    with pygpt.backend(compiled):
        for run in (attend, lambda *t: checkpoint(attend, *t, use_reentrant=use_reentrant, **context)):
            torch.manual_seed(5)
            out = run(q, k, v)
            torch.manual_seed(6)
            out.square().sum().backward()
            results.append([out.detach(), *(t.grad.clone() for t in inputs)])
            q.grad = k.grad = v.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------- each option alone
TYPICAL = [Sizes(2, 4, 4, 4, 6), Sizes(2, 4, 2, 6, 4), Sizes(1, 4, 1, 21, 35, 8, 5)]


@pytest.mark.parametrize(
    "sizes, dtype",
    [(TYPICAL[0], torch.float64), (TYPICAL[1], torch.float32), *((TYPICAL[2], dtype) for dtype in DTYPES)],
    ids=lambda x: cases.ids(x) or "x".join(map(str, x)),
)
@pytest.mark.parametrize("option", OPTIONS, ids=cases.ids)
def test_each_option(option, sizes, dtype, backend, device, generator, kernels):
    """By the public function where its arguments can say it, else by the kernels' own."""
    tensors, seed = draw_tensors(sizes, generator, dtype, **option.draw(sizes, generator)), next_seed(device)
    function = public
    if "lower_right" in tensors and "attn_mask" in tensors:

        def function(**kw):
            return canonical(kernels, **kw, seed=seed)

    with pygpt.backend(backend):
        found = check(function, tensors, generator, dtype, device, seed=seed)
    assert not any(t.isnan().any() for t in found.values())


# ------------------------------------------------------------------------------- any of them together
FEATURES = ("attn_mask", "alibi_slopes", "sink", "dropout_p", "softcap", "window", "lower_right", "enable_gqa")


def random_case(generator, served, lengths, keys):
    """Sizes, and options of which each has an even chance."""

    def one_of(values):
        return values[torch.randint(len(values), (), generator=generator)]

    def chance(feature):
        return feature in served and one_of((True, False))

    Hkv, group, E = one_of((1, 2)), one_of((2, 3)) if chance("enable_gqa") else 1, one_of((1, 8, 17, 64))
    d = Sizes(one_of((1, 2)), Hkv * group, Hkv, one_of(lengths), one_of(keys), E, one_of((E, 5, 33)))
    options = {"scale": one_of((None, 0.3, -0.5)), "is_causal": one_of((True, False))}
    if chance("attn_mask"):
        shape = [one_of((1, n)) for n in (d.B, d.Hq, d.L, d.S)]
        options["attn_mask"] = one_of((bool_mask, float_mask))(generator, *shape)
    if chance("window"):
        options["window"] = tuple(one_of((-1, 0, 1, 13, 40, d.S)) for _ in range(2))
    if chance("alibi_slopes"):
        options["alibi_slopes"] = uniform(generator, *one_of(((d.Hq,), (d.B, d.Hq)))) / 8
    if chance("sink"):
        options["sink"] = uniform(generator, d.Hq) * 4 - 1
    if chance("softcap"):
        options["softcap"] = one_of((0.5, 3.0, 30.0))
    if chance("dropout_p"):
        options["dropout_p"] = one_of((0.1, 0.5, 1.0))
    options["lower_right"] = chance("lower_right")
    return d, options


# On both sides of the edges of tiles: 14 and 32 rows, 112 rows, 192 and 224 keys; up to 4 rows are decoding.
LENGTHS, KEYS = (1, 2, 4, 5, 13, 15, 31, 33, 111, 113), (1, 2, 7, 15, 31, 33, 63, 65, 191, 193, 223, 225, 300)
SHORT, FEW_KEYS = (1, 3, 5, 15, 17, 33, 65), (1, 2, 15, 17, 33, 65)  # for kernels that are emulated or interpreted


def check_combination(compiled, device, dtype, generator):
    lengths = (SHORT, FEW_KEYS) if is_emulated(compiled, device) else (LENGTHS, KEYS)
    sizes, options = random_case(generator, TABLE[compiled].features["attention"], *lengths)
    print(sizes, {n: (tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for n, a in options.items()})
    tensors, seed = draw_tensors(sizes, generator, dtype, **options), next_seed(device)
    kernels = named(compiled).kernels
    check(lambda **kw: canonical(kernels, **kw, seed=seed), tensors, generator, dtype, device, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("n", range(16))
def test_combinations(n, dtype, compiled, device, generator):
    check_combination(compiled, device, dtype, generator)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("n", range(200))
def test_many_combinations(n, dtype, compiled, device, generator):
    check_combination(compiled, device, dtype, generator)


EVERYTHING = BY_NAME["everything else"]


@pytest.mark.parametrize("option", [EVERYTHING], ids=cases.ids)
@pytest.mark.parametrize("L, S", [(1, 2239), (3, 2240), (4, 2500)])
def test_decoding_whose_keys_are_split(L, S, option, generator):
    d = Sizes(1, 4, 2, L, S, 8, 8)
    options = {**option.draw(d, generator), "window": (2300, -1), "alibi_slopes": uniform(generator, d.Hq) / 1024}
    tensors, seed = draw_tensors(d, generator, torch.float32, **options), next_seed()
    kernels = named("cpp").kernels
    check(lambda **kw: canonical(kernels, **kw, seed=seed), tensors, generator, torch.float32, "cpu", seed=seed)


# ------------------------------------------------------------------------------- masks, however they lie
MASK = BY_NAME["bool mask"]


@pytest.mark.parametrize("option", [MASK], ids=cases.ids)
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("broadcast", list(product((0, 1), repeat=4)), ids=lambda b: "".join(map(str, b)))
@pytest.mark.parametrize("L, S", [(3, 19), (18, 21)])
def test_masks_that_are_broadcast(L, S, broadcast, floating, option, compiled, device, generator, kernels_of):
    """In any of their dimensions; so is their gradient, which has their shape."""
    d = Sizes(2, 3, 3, L, S)
    shape = [1 if b else n for b, n in zip(broadcast, (d.B, d.Hq, d.L, d.S), strict=True)]
    mask = (float_mask if floating else bool_mask)(generator, *shape)
    tensors = draw_tensors(d, generator, torch.float32, attn_mask=mask)
    check(lambda **kw: canonical(kernels_of, **kw), tensors, generator, torch.float32, device)


@pytest.mark.parametrize("option", [MASK], ids=cases.ids)
@pytest.mark.parametrize("shape", ["HLS", "H1S", "1L1"])
def test_a_mask_of_several_tiles(shape, option, compiled, device, generator, kernels_of):
    L, S = (70, 140) if is_emulated(compiled, device) else (120, 230)
    d = Sizes(1, 2, 2, L, S)
    mask = float_mask(generator, 1, *({"1": 1, "H": 2, "L": L, "S": S}[letter] for letter in shape))
    tensors = draw_tensors(d, generator, torch.float32, attn_mask=mask)
    check(lambda **kw: canonical(kernels_of, **kw), tensors, generator, torch.float32, device)


@pytest.mark.parametrize("option", [option("mask and window", "attn_mask window", None)], ids=cases.ids)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
def test_the_order_in_which_a_masks_gradient_is_added_up(dtype, option, compiled, device, generator, kernels_of):
    """In float32, batch entry by batch entry, and head by head in each; then it is rounded.

    Where each query sees one key, what a head adds is the gradient of lse, exactly.
    """
    q, k, v = cast(draw_tensors(Sizes(3, 4, 4, 18, 18), generator), device, dtype).values()
    mask = torch.zeros(1, 1, 18, 18, device=device, dtype=dtype, requires_grad=True)
    _, lse = canonical(kernels_of, q, k, v, mask, window=(0, 0))
    dlse = torch.randn(lse.shape, generator=generator, dtype=lse.dtype).to(device)
    (found,) = torch.autograd.grad(lse, mask, dlse)
    total = torch.zeros_like(dlse[0, 0])
    for of_head in dlse.flatten(0, 1):
        total += of_head
    assert torch.equal(found[0, 0], torch.diag(total.to(dtype)))


@pytest.mark.parametrize("option", [MASK], ids=cases.ids)
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("layout", [*cases.LAYOUTS[1:], cases.shifted], ids=cases.ids)
@pytest.mark.parametrize("L", [2, 35])
def test_layouts_of_masks(L, layout, floating, option, compiled, device, generator, kernels_of):
    d = Sizes(2, 3, 3, L, 41, 8, 5)
    mask = (float_mask if floating else bool_mask)(generator, d.B, d.Hq, d.L, d.S)
    tensors = draw_tensors(d, generator, torch.float32, attn_mask=mask)

    def function(attn_mask, **kw):
        return canonical(kernels_of, attn_mask=layout(attn_mask), **kw)

    def expected(attn_mask, **kw):
        return by_hand(attn_mask=layout(attn_mask), **kw)

    check(function, tensors, generator, torch.float32, device, expected)


@pytest.mark.parametrize("option", [EVERYTHING], ids=cases.ids)
@pytest.mark.parametrize("layout", [cases.transposed, cases.heads_last, cases.embedded, cases.strided, cases.shifted],
                         ids=cases.ids)  # fmt: skip
@pytest.mark.parametrize("L", [3, 35])
def test_layouts_of_queries_and_keys(L, layout, option, compiled, device, generator, kernels_of):
    d, seed = Sizes(2, 4, 2, L, 41, 8, 5), next_seed(device)
    tensors = draw_tensors(d, generator, torch.float32, **option.draw(d, generator))

    def function(q, k, v, **kw):
        return canonical(kernels_of, layout(q), layout(k), layout(v), **kw, seed=seed)

    check(function, tensors, generator, torch.float32, device, seed=seed)


@pytest.mark.parametrize("option", [MASK], ids=cases.ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.ids)
@pytest.mark.parametrize("L", [2, 35])
def test_masks_in_float32_or_the_querys_dtype(L, dtype, option, compiled, device, generator, kernels_of):
    """Give the same bits; the gradient of one that is shared by heads is added up in float32 and rounded once."""
    d = Sizes(2, 3, 3, L, 41, 8, 5)
    tensors = draw_tensors(d, generator, dtype, attn_mask=float_mask(generator, 1, 1, L, 41))
    q, k, v, mask = (t.to(device, dtype) for t in tensors.values())
    out_grad = torch.randn(2, 3, L, 5, generator=generator).to(device, dtype)
    results = []
    for m in (mask, mask.float()):
        inputs = [t.detach().requires_grad_() for t in (q, k, v, m)]
        out, lse = canonical(kernels_of, *inputs)
        results.append([out, lse, *torch.autograd.grad(out, inputs, out_grad)])
    assert results[0][-1].dtype == dtype and results[1][-1].dtype == torch.float32
    results[1][-1] = results[1][-1].to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------- rows with no key, rows with one
EMPTY = {
    "bool mask": ("attn_mask", lambda L, S: {"attn_mask": torch.arange(L)[:, None].expand(L, S) % 3 != 0}),
    "float mask": (
        "attn_mask",
        lambda L, S: {"attn_mask": torch.zeros(L, 1).masked_fill(torch.arange(L)[:, None] % 3 == 1, -math.inf)},
    ),
    "window": ("window", lambda L, S: {"window": (0, 0)}),
    "lower right": ("lower_right", lambda L, S: {"lower_right": True}),
    "mask and causal": ("attn_mask", lambda L, S: {"attn_mask": torch.arange(S) > L // 2, "is_causal": True}),
}
EMPTY_ROWS = [option(name, features, lambda d, g, f=f: f(d.L, d.S)) for name, (features, f) in EMPTY.items()]


@pytest.mark.parametrize("option", EMPTY_ROWS, ids=cases.ids)
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("L, S", [(4, 2), (40, 23)])
def test_rows_that_see_no_key(L, S, with_sink, option, compiled, device, generator, kernels_of):
    """out is 0, lse -inf or the sink, every gradient 0; what they would have added to other gradients is 0, too."""
    if with_sink and "sink" not in TABLE[compiled].features["attention"]:
        return
    d = Sizes(2, 2, 2, L, S, 8, 5)
    sink = {"sink": uniform(generator, 2).float().double()} if with_sink else {}
    tensors = draw_tensors(d, generator, torch.float32, **option.draw(d, generator), **sink)
    found = check(lambda **kw: canonical(kernels_of, **kw), tensors, generator, torch.float32, device)
    _, lse = by_hand(**{n: t for n, t in tensors.items() if n != "sink"})
    empty = lse == -math.inf
    assert empty.any()
    assert not found["out"][empty].any() and not found["dq"][empty].any()
    want = tensors["sink"][:, None].expand(2, 2, L)[empty] if with_sink else torch.full_like(lse[empty], -math.inf)
    assert torch.equal(found["lse"][empty], want)


ONE_KEY = [
    option("window", "window", lambda d, g: {"window": (0, 0)}),
    option("softcap", "window softcap", lambda d, g: {"window": (0, 0), "softcap": 2.0}),
    option("alibi", "window alibi_slopes", lambda d, g: {"window": (0, 0), "alibi_slopes": uniform(g, d.Hq)}),
    option("float mask", "window attn_mask", lambda d, g: {
        "window": (0, 0), "attn_mask": torch.randn(1, 1, d.L, d.S, generator=g, dtype=torch.float64)}),
    option("dropout", "window dropout_p", lambda d, g: {"window": (0, 0), "dropout_p": 0.5}),
    option("lower right", "window lower_right", lambda d, g: {"window": (0, -1), "lower_right": True}),
    option("all", "window lower_right softcap dropout_p alibi_slopes", lambda d, g: {
        "window": (0, -1), "lower_right": True, "softcap": 2.0, "dropout_p": 0.5, "alibi_slopes": uniform(g, d.Hq)}),
]  # fmt: skip


@pytest.mark.parametrize("option", ONE_KEY, ids=cases.ids)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("L", [4, 50])
def test_rows_that_see_one_key(L, dtype, option, compiled, device, generator, kernels_of):
    """Their gradient is 0, not almost: p is 1 whatever the score. Only lse moves with it."""
    d = Sizes(2, 4, 4, L, L, 16, 24)
    tensors = draw_tensors(d, generator, dtype, **option.draw(d, generator))
    ours = {n: t.to(device, dtype).requires_grad_() if is_floating(t) else t for n, t in tensors.items()}
    out, _ = canonical(kernels_of, **ours, seed=7)
    leaves = [t for t in ours.values() if is_floating(t)]
    dq, dk, _, *others = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in (dq, dk, *others))


@pytest.mark.parametrize("option", ONE_KEY[:1], ids=cases.ids)
@pytest.mark.parametrize("L", [4, 50])
def test_the_gradient_of_lse_where_a_row_sees_one_key(L, option, compiled, device, generator, kernels_of):
    """It is the key's own: dlse times scale k, exactly."""
    tensors = draw_tensors(Sizes(1, 2, 2, L, L, 16, 24), generator, torch.float32)
    q, k, v = (t.to(device, torch.float32).requires_grad_() for t in tensors.values())
    out, lse = canonical(kernels_of, q, k, v, window=(0, 0), scale=0.25)
    dlse = torch.ldexp(torch.ones_like(lse), torch.randint(-3, 3, lse.shape).to(device))
    dq, dk, _ = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), dlse))
    assert torch.equal(dq, dlse[..., None] * k * 0.25) and torch.equal(dk, dlse[..., None] * q * 0.25)


# ------------------------------------------------------------------------------- the same bits
@pytest.mark.parametrize("option", OPTIONS[-2:], ids=cases.ids)
@pytest.mark.parametrize("sizes", [Sizes(2, 4, 2, 130, 260, 16, 24), Sizes(2, 4, 2, 3, 2300, 16, 24)], ids=str)
def test_runs_and_thread_counts(sizes, option, generator):
    kernels = named("cpp").kernels
    tensors = draw_tensors(sizes, generator, torch.float32, **option.draw(sizes, generator))
    tensors = cast(tensors, "cpu", torch.float32)
    state, want = generator.get_state(), None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        generator.set_state(state)
        found = with_gradients(lambda **kw: canonical(kernels, **kw, seed=11), tensors, generator)
        want = want or found
        assert all(torch.equal(found[n], t) for n, t in want.items()), f"with {threads} threads"


@pytest.mark.parametrize("option", OPTIONS[-2:], ids=cases.ids)
def test_runs(option, compiled, device, generator, kernels_of):
    sizes = Sizes(2, 4, 2, 20, 37, 16, 24)
    tensors = draw_tensors(sizes, generator, torch.float32, **option.draw(sizes, generator))
    tensors = cast(tensors, device, torch.float32)
    state, runs = generator.get_state(), []
    for _ in range(2):
        generator.set_state(state)
        runs.append(with_gradients(lambda **kw: canonical(kernels_of, **kw, seed=11), tensors, generator))
    assert all(torch.equal(runs[0][n], t) for n, t in runs[1].items())


BATCHED = [BY_NAME[name] for name in ("mask of keys", "window", "alibi", "softcap", "sink", "lower right")]


@pytest.mark.parametrize("option", BATCHED, ids=cases.ids)
@pytest.mark.parametrize("L", [1, 4])
def test_a_sequence_alone_and_in_a_batch(L, option, compiled, device, generator, kernels_of):
    """Decoding gives a sequence the same bits whatever else is in the batch."""
    S = 70 if is_emulated(compiled, device) else 2300
    d = Sizes(3, 4, 2 if "enable_gqa" in TABLE[compiled].features["attention"] else 4, L, S, 16, 24)
    options = cast(option.draw(d, generator), device, torch.float32)
    q, k, v = cast(draw_tensors(d, generator), device, torch.float32).values()
    together = canonical(kernels_of, q, k, v, **options)
    for b in range(3):
        alone = canonical(kernels_of, q[b : b + 1], k[b : b + 1], v[b : b + 1], **options)
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together, strict=True))


# ------------------------------------------------------------------------------- derivatives, transforms, graphs
TINY = Sizes(1, 2, 1, 3, 4, 3, 2)
DIFFERENTIATED = [BY_NAME[n] for n in (
    "float mask", "window and causal", "alibi per batch", "softcap", "lower right", "sink", "dropout", "everything else"
)]  # fmt: skip


def as_function(option, generator, kernels, sizes=TINY):
    """A function of the floating tensors alone, and these."""
    drawn = draw_tensors(sizes, generator, **option.draw(sizes, generator))
    if is_floating(drawn.get("attn_mask")):
        drawn["attn_mask"] = drawn["attn_mask"].clamp(min=-3.0)  # -inf has no finite difference
    tensors = {n: t for n, t in drawn.items() if is_floating(t)}
    rest = {n: a for n, a in drawn.items() if n not in tensors}

    def function(*given):
        return canonical(kernels, **dict(zip(tensors, given, strict=True)), **rest, seed=3)

    return function, [t.requires_grad_() for t in tensors.values()]


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=cases.ids)
@pytest.mark.parametrize("dtype", [torch.float64], ids=cases.ids)
@pytest.mark.parametrize("option", DIFFERENTIATED, ids=cases.ids)
def test_finite_differences(option, dtype, check, compiled, generator, kernels_of):
    assert check(*as_function(option, generator, kernels_of), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64], ids=cases.ids)
@pytest.mark.parametrize("option", DIFFERENTIATED, ids=cases.ids)
def test_second_order(option, dtype, compiled, generator, kernels_of):
    """A gradient penalty through create_graph has the gradients of by_hand's."""
    sizes = Sizes(1, 2, 1, 7, 9, 3, 2)
    drawn = draw_tensors(sizes, generator, **option.draw(sizes, generator))
    weights = torch.randn(1, 2, 7, 2, generator=generator, dtype=torch.float64)

    def penalty(function):
        tensors = {n: t.detach().requires_grad_() if is_floating(t) else t for n, t in drawn.items()}
        leaves = [t for t in tensors.values() if is_floating(t)]
        out, lse = function(**tensors, seed=3)
        total = (out * weights).sum() + lse[lse.isfinite()].square().sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)

    def of_kernels(**kw):
        return canonical(kernels_of, **kw)

    for ours, theirs in zip(penalty(of_kernels), penalty(by_hand), strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(*(torch.broadcast_tensors(*(zero if g is None else g for g in (ours, theirs)))))


TRANSFORMED = [o for o in DIFFERENTIATED if "dropout_p" not in o.features]


@pytest.mark.parametrize("option", TRANSFORMED, ids=cases.ids)
def test_vmap_and_jvp(option, generator):
    """Both are served by PyTorch, and are right."""
    sizes = Sizes(2, 4, 2, 5, 6)
    drawn = draw_tensors(sizes, generator, **option.draw(sizes, generator))
    q, k, v = (drawn.pop(n) for n in "qkv")

    def attend(q, k, v):
        return public(q, k, v, **drawn)[0]

    several = torch.stack([q, q + 1, q * 2])
    each = torch.stack([attend(x, k, v) for x in several])
    torch.testing.assert_close(torch.func.vmap(attend, in_dims=(0, None, None))(several, k, v), each)
    tangent = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    out, along = torch.func.jvp(lambda x: attend(x, k, v), (q,), (tangent,))
    h = 1e-6
    torch.testing.assert_close(out, attend(q, k, v))
    slope = (attend(q + h * tangent, k, v) - attend(q - h * tangent, k, v)) / (2 * h)
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-6)


def test_vmap_of_dropout(generator):
    """torch's own rule: an error unless the caller says what is random."""
    q, k, v = (torch.randn(5, 1, 2, 6, 8, generator=generator) for _ in range(3))

    def attend(q, k, v):
        return sdpa(q, k, v, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(attend)(q, k, v)
    torch.manual_seed(1)
    out = torch.func.vmap(attend, randomness="different")(q, k, v)
    assert out.shape == q.shape and out.isfinite().all()


@pytest.mark.parametrize("option", DIFFERENTIATED[::2] + DIFFERENTIATED[-1:], ids=cases.ids)
def test_opcheck(option, generator):
    """The registered ops tell the truth about shapes, strides and what they change, and have gradients."""
    kernels = torch.ops.pygpt
    calls = []

    class Recorder:
        def attention_fwd(self, *args):
            calls.append(("attention_fwd", args))
            return kernels.attention_fwd(*args)

        def attention_bwd(self, *args):
            calls.append(("attention_bwd", [list(a) if isinstance(a, tuple) else a for a in args]))
            return kernels.attention_bwd(*args)

    sizes = Sizes(2, 4, 2, 5, 6)
    drawn = draw_tensors(sizes, generator, **option.draw(sizes, generator))
    with_gradients(lambda **kw: canonical(Recorder(), **kw, seed=3), drawn, generator)
    assert [name for name, _ in calls] == ["attention_fwd", "attention_bwd"]
    for name, args in calls:
        args = [a.detach().requires_grad_(name == "attention_fwd" and is_floating(a)) if isinstance(a, Tensor) else a
                for a in args]  # fmt: skip
        torch.library.opcheck(getattr(kernels, name).default, args, test_utils=(
            "test_schema", "test_faketensor", *(("test_autograd_registration",) if name == "attention_fwd" else ()),
        ))  # fmt: skip


COMPILED = [BY_NAME["float mask"], BY_NAME["everything"]]


@pytest.mark.parametrize("option", COMPILED, ids=cases.ids)
def test_compiled_graphs(option, generator):
    """torch.compile gives the same results and gradients; a seed is drawn in the graph, anew in every run."""
    torch._dynamo.reset()
    sizes = Sizes(2, 4, 2, 20, 33, 8, 5)
    drawn = draw_tensors(sizes, generator, torch.float32, **option.draw(sizes, generator))
    drawn = cast(drawn, "cpu", torch.float32)
    graph = torch.compile(public, fullgraph=True, backend="aot_eager")
    results, state = {}, generator.get_state()
    for name, function in (("eager", public), ("compiled", graph), ("again", graph)):
        torch.manual_seed(4 if name != "again" else 5)
        generator.set_state(state)
        results[name] = with_gradients(function, drawn, generator)
    assert_near(results["compiled"], results["eager"], torch.float32)
    same = torch.equal(results["again"]["out"], results["compiled"]["out"])
    assert same == ("dropout_p" not in option.features)


# ------------------------------------------------------------------------------- who serves what
@pytest.mark.parametrize("option", OPTIONS, ids=cases.ids)
def test_an_option_that_a_backend_lacks(option, generator, monkeypatch):
    """An explicit choice raises and names what is missing; the default falls back."""
    d = TYPICAL[0]
    drawn = draw_tensors(d, generator, **option.draw(d, generator))
    in_use = set(option.features)
    if "lower_right" in drawn and drawn.pop("attn_mask", None) is not None:
        in_use.remove("attn_mask")  # the public arguments take one of them
    monkeypatch.setitem(TABLE, "cpp", replace(TABLE["cpp"], features={"attention": ("return_lse",)}))
    with pygpt.backend("cpp"), pytest.raises(RuntimeError) as error:
        public(**drawn)
    assert str(error.value).endswith(f"{', '.join(sorted(in_use))} not served")
    torch.manual_seed(1)
    found = public(**drawn)
    monkeypatch.undo()
    torch.manual_seed(1)
    torch.testing.assert_close(found, public(**drawn))


def test_grouped_heads_that_a_backend_lacks(monkeypatch):
    for name in set(TABLE) - {"torch"}:
        monkeypatch.setitem(TABLE, name, replace(TABLE[name], features={}))
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    with pygpt.backend("cpp"), pytest.raises(RuntimeError, match="enable_gqa not served"):
        sdpa(q, k, k, enable_gqa=True)
    assert pygpt.explain(sdpa, q, k, k, enable_gqa=True).backend == "torch"


def test_the_cpu_serves_every_option():
    assert set(FEATURES) <= set(TABLE["cpp"].features["attention"])


# ------------------------------------------------------------------------------- memory
MEMORY = """
import resource, sys, torch, pygpt
from pygpt.functional import scaled_dot_product_attention as sdpa
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
torch.set_num_threads(1)
def run(n):
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for _ in range(3))
    options = {
        "mask of keys": lambda: {"attn_mask": (torch.arange(n) < n - 9).view(1, 1, 1, n)},
        "everything": lambda: {
            "attn_mask": torch.zeros(1, 1, 1, n, requires_grad=True), "softcap": 5.0, "dropout_p": 0.1,
            "alibi_slopes": torch.full((2,), 0.01, requires_grad=True), "sink": torch.zeros(2, requires_grad=True),
            "window": (n // 2, -1),
        },
    }[sys.argv[2]]()
    sdpa(q, k[:, :1], v[:, :1], **options, enable_gqa=True).sum().backward()
with pygpt.backend(sys.argv[1]):
    run(64)
    before, n = peak(), 4096
    run(n)
    grown, matrix = peak() - before, 4 * n * n
    assert grown < matrix / 4, (grown, matrix)
"""


@pytest.mark.parametrize("kind", ["mask of keys", "everything"])
def test_no_score_matrix_in_memory(kind, run_python):
    done = run_python(MEMORY, "cpp", kind)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- at the edges
def test_no_query_heads():
    q, k, v = (torch.randn(1, n, 5, 8, requires_grad=True) for n in (0, 2, 2))
    out = sdpa(q, k, v, enable_gqa=True)
    assert out.shape == (1, 0, 5, 8)
    for gradient in torch.autograd.grad(out.sum(), (k, v)):
        assert torch.equal(gradient, torch.zeros(1, 2, 5, 8))


@pytest.mark.parametrize("options", [{"window": (0, 0)}, {"softcap": 1.0}, {"return_lse": True}], ids=cases.ids)
def test_no_option_is_forgotten_where_only_pytorch_takes_the_tensors(options):
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged).transpose(
        1, 2
    )
    assert sdpa(nested, nested, nested).is_nested
    with pytest.raises(TypeError, match="nested"):
        sdpa(nested, nested, nested, **options)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_window_may_change(dynamic):
    q = torch.randn(1, 2, 9, 8)
    compiled = torch.compile(lambda q, left: sdpa(q, q, q, window=(left, 0)), backend="aot_eager", dynamic=dynamic)
    for left in (3, 2, 5):
        torch.testing.assert_close(compiled(q, left), sdpa(q, q, q, window=(left, 0)))


def test_booleans_are_refused_alike_after_a_call_of_halves():
    x, b = torch.randn(2, 3, 8).half(), torch.ones(2, 3, 8, dtype=torch.bool)
    errors = set()
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError)) as refused:
            sdpa(b, b, b)
        errors.add((refused.type, str(refused.value)))
        sdpa(x, x, x)
    assert len(errors) == 1


@pytest.mark.parametrize("L", [3, 5, 13, 30])
def test_an_infinite_key_does_not_spoil_the_gradient_of_slopes(L, backend):
    """The rows that fill up the last tile of queries have no share in it."""
    q, k, v = (torch.randn(1, 2, n, 8) for n in (L, 9, 9))
    q, k[0, 0, 3] = -q.abs(), torch.inf
    slopes = torch.rand(2, requires_grad=True)
    with pygpt.backend(backend):
        (gradient,) = torch.autograd.grad(sdpa(q, k, v, alibi_slopes=slopes).sum(), slopes)
    assert gradient.isfinite().all()


def test_what_torch_allows_of_masks():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with torch.inference_mode():
        mask = torch.rand(4, 4) > 0.3
    assert sdpa(q, q, q, mask).requires_grad
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            assert sdpa(q, q, q, torch.zeros(4, 4, dtype=dtype)).dtype == torch.bfloat16


def test_a_refused_call_draws_no_random_number():
    q = torch.randn(1, 1, 3, 513)
    before = torch.get_rng_state()
    with pygpt.backend("cpp"), pytest.raises(RuntimeError, match="head dimension"):
        sdpa(q, q, q, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong, message", [({"dropout_p": 0.5}, "needs a seed"), ({"softcap": -1.0}, "softcap")])
def test_the_op_refuses(wrong, message):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pygpt.attention_fwd(q, q, q, True, 1.0, **wrong)


@pytest.mark.parametrize("window", [(1.5, 0), (2**40, 0), (1,), ("a", 1), 3])
def test_a_window_is_two_integers(window):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="window must be"):
        sdpa(q, q, q, window=window)
