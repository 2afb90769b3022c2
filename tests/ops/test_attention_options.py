"""The options of scaled_dot_product_attention, on every backend that announces them, against attention by hand.

A case is drawn at random: its values, and for the combinations also its sizes and which options it has. Memory that a
kernel is given is poisoned.
"""

import math
from itertools import product

import cases
import pytest
import torch
from torch import Tensor

import pygpt
from pygpt.dispatch import TABLE, named
from tests.ops.attention_by_hand import by_hand
from tests.ops.attention_cases import (
    BY_NAME,
    DTYPES,
    MARKS,
    OPTIONS,
    TYPICAL,
    Sizes,
    bool_mask,
    canonical,
    cast,
    check,
    draw_tensors,
    float_mask,
    is_emulated,
    is_floating,
    next_seed,
    option,
    public,
    uniform,
    with_gradients,
)

GPU_SHARE = {"triton": 6, "cuda": 6}  # see conftest
pytestmark = MARKS


# ------------------------------------------------------------------------------- each option alone


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
@pytest.mark.parametrize("shape", ["HLS", "1LS", "H1S", "1L1"])
def test_a_mask_of_several_tiles(shape, option, compiled, device, generator, kernels_of):
    L, S = (70, 140) if is_emulated(compiled, device) else (120, 230)
    d = Sizes(1, 2, 2, L, S)
    mask = float_mask(generator, 1, *({"1": 1, "H": 2, "L": L, "S": S}[letter] for letter in shape))
    tensors = draw_tensors(d, generator, torch.float32, attn_mask=mask)
    check(lambda **kw: canonical(kernels_of, **kw), tensors, generator, torch.float32, device)


@pytest.mark.parametrize("option", [BY_NAME[name] for name in ("window", "lower right")], ids=cases.ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
def test_few_heads_whose_keys_several_tasks_share(option, dtype, generator):
    sizes = Sizes(2, 4, 2, 130, 620, 16, 24)
    tensors = draw_tensors(sizes, generator, dtype, **option.draw(sizes, generator))
    check(lambda **kw: canonical(named("cpp").kernels, **kw), tensors, generator, dtype, "cpu")


@pytest.mark.parametrize("option", [MASK], ids=cases.ids)
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("rows", ["one row", "rows"])
@pytest.mark.parametrize("step", [16, 100, 224])
def test_masks_that_hide_or_show_whole_tiles(step, rows, floating, option, compiled, device, generator, kernels_of):
    """Squares of a mask hide everything, or nothing, or are drawn at random: kernels skip the first kind and do not
    apply the second."""
    L, S = (40, 130) if is_emulated(compiled, device) else (130, 500)
    d = Sizes(1, 2, 2, L, S, 8, 5)
    rows = L if rows == "rows" else 1
    kind = torch.randint(3, (-(-rows // step), -(-S // step)), generator=generator)
    kind = kind.repeat_interleave(step, 0).repeat_interleave(step, 1)[:rows, :S]
    shown = (kind == 1) | (kind == 2) & bool_mask(generator, rows, S)
    if rows > 1:  # the last row differs from those that are looked at first
        shown[-1] = uniform(generator, S) > 0.5
    mask = torch.zeros(rows, S).masked_fill(~shown, -math.inf) if floating else shown
    tensors = draw_tensors(d, generator, torch.float32, attn_mask=mask)
    for causal in ({}, {"is_causal": True}):
        check(lambda **kw: canonical(kernels_of, **kw), tensors | causal, generator, torch.float32, device)


@pytest.mark.parametrize("option", [option("mask and window", "attn_mask window", None)], ids=cases.ids)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("alone", [False, True])
def test_the_order_in_which_a_masks_gradient_is_added_up(
    alone, heads, dtype, option, compiled, device, generator, kernels_of
):
    """In float32, batch entry by batch entry, and head by head in each; then it is rounded.

    Where each query sees one key and its score is 0, what a head adds is the gradient of lse, exactly: p = exp(0 - 0).
    (Other scores round, and p can be one unit in the last place away from 1.) The mask has one head or all four. It
    alone needs a gradient, or q does, too.
    """
    q, k, v = cast(draw_tensors(Sizes(3, 4, 4, 18, 18), generator), device, dtype).values()
    q = torch.zeros_like(q)
    mask = torch.zeros(1, heads, 18, 18, device=device, dtype=dtype, requires_grad=True)
    _, lse = canonical(kernels_of, q.requires_grad_(not alone), k, v, mask, window=(0, 0))
    dlse = torch.randn(lse.shape, generator=generator, dtype=lse.dtype).to(device)
    (found,) = torch.autograd.grad(lse, mask, dlse)
    total = torch.zeros_like(dlse[0, :heads])
    for of_entry in dlse:
        for of_heads in of_entry.split(heads):
            total += of_heads
    assert torch.equal(found[0], torch.diag_embed(total.to(dtype)))


@pytest.mark.parametrize("option", [MASK], ids=cases.ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_a_masks_gradient_is_the_same_alone(
    batch, heads, causal, dtype, option, compiled, device, generator, kernels_of
):
    """Bit by bit that which comes with those of q, k and v. The mask is of the dtype of statistics."""
    d = Sizes(3, 4, 2, *((35, 41) if is_emulated(compiled, device) else (110, 230)))
    mask = float_mask(generator, batch, heads, d.L, d.S)
    tensors = cast(draw_tensors(d, generator, attn_mask=mask), device, dtype)
    mask = tensors["attn_mask"] = mask.to(device, torch.float32).requires_grad_()
    dout = torch.randn(d.B, d.Hq, d.L, d.Ev, generator=generator).to(device, dtype)

    def gradient(with_others):
        inputs = {n: t if t is mask else t.requires_grad_(with_others) for n, t in tensors.items()}
        out, _ = canonical(kernels_of, **inputs, is_causal=causal)
        return torch.autograd.grad(out, mask, dout)[0]

    alone = gradient(False)
    assert alone.dtype == torch.float32 and alone.any() and torch.equal(alone, gradient(True))


def apart_and_expanded(t):
    """Keys that lie apart in rows that all heads share."""
    return torch.stack([t[:, :1], t[:, :1]], -1)[..., 0].expand(t.shape)


@pytest.mark.parametrize("option", [MASK], ids=cases.ids)
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("layout", [*cases.LAYOUTS[1:], cases.shifted, apart_and_expanded], ids=cases.ids)
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


@pytest.mark.parametrize("option", [MASK], ids=cases.ids)
@pytest.mark.parametrize("of", ["k", "v"])
def test_a_nan_behind_a_floating_mask_shows_as_in_torch(of, option, compiled, device, generator, kernels_of):
    """NaN - inf and 0 NaN are NaN: a block that such a mask hides is no more skipped than one key."""
    L, S, past = (20, 130, 70) if is_emulated(compiled, device) else (40, 700, 300)
    q, k, v = cast(draw_tensors(Sizes(1, 2, 2, L, S, 8, 5), generator), device, torch.float32).values()
    mask = torch.zeros(1, 1, L, S, device=device).masked_fill(torch.arange(S, device=device) >= past, -math.inf)
    (k if of == "k" else v)[:, :, S - 20] = math.nan
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    out, _ = canonical(kernels_of, q, k, v, mask)
    assert want.isnan().all() and torch.equal(out.isnan(), want.isnan())


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
    sizes = Sizes(2, 2, 1, 20, 37, 16, 24)
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
