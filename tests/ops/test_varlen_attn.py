"""varlen_attn on every backend, against attention by hand for each of its sequences."""

import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import pygpt
from pygpt.dispatch import named
from pygpt.functional import varlen_attn
from tests.conftest import ON_GPU
from tests.ops.attention_by_hand import by_hand

GPU_SHARE = {"triton": 3, "cuda": 3}  # see conftest
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Packed:
    """The lengths of a call's sequences, and what else describes it. Two rows after the sequences belong to none."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    used: tuple[int, ...] | None = None
    window: tuple[int, int] = (-1, -1)
    Hq: int = 2
    Hkv: int = 2
    E: int = 3
    Ev: int = 2

    def __str__(self):
        used = "" if self.used is None else f" used {self.used}"
        return f"{self.q} x {self.k}{used} window {self.window} heads {self.Hq}/{self.Hkv}".replace(", ", ",")

    @property
    def __name__(self):  # the case's name in pytest
        return str(self).replace(" ", "_")

    @property
    def keys(self):
        return self.k if self.used is None else self.used


CASES = [  # in an order in which every third, as GPU_SHARE takes them, has all that is hard
    Packed((3, 5, 1), (4, 5, 6)),
    Packed((3, 5, 1), (4, 5, 6), window=(-1, 0)),
    Packed((9, 6, 2), (4, 6, 7), window=(-1, 0)),  # rows that see no key
    Packed((), ()),
    Packed((8, 8), (8, 8), window=(0, 0)),  # rows that see one key
    Packed((7, 4), (9, 5), window=(2, -1), Hq=6, Hkv=2, E=5, Ev=7),
    Packed((4, 2), (4, 3), Ev=0),
    Packed((0, 3, 0, 0, 6), (2, 0, 0, 4, 6)),
    Packed((1, 1, 1), (5, 300, 37), used=(2, 257, 37), Hq=4, window=(-1, 0)),  # decoding
    Packed((2, 3), (40, 90), window=(20, 0)),  # a window longer than any sequence of queries
    Packed((1, 70, 4, 5), (290, 70, 9, 130), window=(-1, 0)),
    Packed((130, 20), (140, 250), window=(33, 5), E=24, Ev=40),
    Packed((6,), (6,)),
    Packed((9, 6, 2), (4, 6, 7), window=(1, 2), Hq=4),
    Packed((4,), (4,), Hq=0, Hkv=0),
    Packed((4,), (4,), Hq=0, Hkv=2),
    Packed((300,), (300,), window=(33, 5), E=8, Ev=8),  # blocks that begin within a window
    Packed((4, 2), (4, 3), E=0),
    Packed((7, 4, 5), (9, 5, 8), used=(3, 0, 8), window=(-1, 0)),
]


def starts(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def draw(c: Packed, g, dtype=torch.float64):
    """q, k, v in float64, but rounded to ``dtype``."""
    rows_q, rows_k = sum(c.q) + 2, sum(c.k) + 2
    shapes = (rows_q, c.Hq, c.E), (rows_k, c.Hkv, c.E), (rows_k, c.Hkv, c.Ev)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).double() for shape in shapes]


def packing(c: Packed, device="cpu"):
    """The arguments after the tensors, in the order of the schema, without the scale."""
    used = None if c.used is None else torch.tensor(c.used, dtype=torch.int32, device=device)
    return starts(c.q).to(device), starts(c.k).to(device), used, max(c.q, default=0), max(c.k, default=0)


def public(c: Packed, q, k, v, **options):
    cu_q, cu_k, used, max_q, max_k = packing(c, q.device)
    return varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k, return_aux=Aux, window_size=c.window, enable_gqa=c.Hq != c.Hkv,
        seqused_k=used, **options,
    )  # fmt: skip


class Aux:
    lse = True


def rows_of(c: Packed):
    """The rows of queries and of used keys of each sequence."""
    for n, (first_q, first_k) in enumerate(zip(starts(c.q).tolist(), starts(c.k).tolist(), strict=True)):
        if n < len(c.q):
            yield slice(first_q, first_q + c.q[n]), slice(first_k, first_k + c.keys[n])


def expected(c: Packed, q, k, v):
    """out and lse, sequence by sequence."""
    zero = 0 * (q.sum() + k.sum() + v.sum())  # so that there are gradients without a sequence
    out, lse = zero.expand(len(q), c.Hq, c.Ev), (zero - math.inf).expand(c.Hq, len(q))
    outs, lses = [], []
    left, right = (math.inf if n < 0 else n for n in c.window)
    for of_q, of_k in rows_of(c):
        L, S = of_q.stop - of_q.start, of_k.stop - of_k.start
        own = [i + S - L for i in range(L)]
        mask = torch.tensor([[own[i] - left <= j <= own[i] + right for j in range(S)] for i in range(L)])
        tensors = (t[rows].transpose(0, 1)[None] for t, rows in ((q, of_q), (k, of_k), (v, of_k)))
        if L * c.Hq:
            o, s = by_hand(*tensors, attn_mask=mask.view(L, S).bool(), scale=1 / math.sqrt(c.E or 1))
            outs.append(o[0].transpose(0, 1)), lses.append(s[0])
    covered = sum(c.q)
    return torch.cat([*outs, out[covered if outs else 0 :]]), torch.cat([*lses, lse[:, covered if lses else 0 :]], 1)


RESULTS = "out", "lse", "dq", "dk", "dv"


def with_gradients(function, q, k, v, g):
    """out, lse, and the gradients of a random function of both, in float64 on the CPU."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = function(*inputs)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in (out, lse)]
    total = (out * weights[0]).sum() + (lse * weights[1])[lse.isfinite()].sum()
    gradients = torch.autograd.grad(total, inputs)
    return {name: t.detach().cpu().double() for name, t in zip(RESULTS, (out, lse, *gradients), strict=True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.__name__)
def test_by_hand(c, dtype, backend, device, generator):
    tensors = draw(c, generator, dtype)
    state = generator.get_state()
    want = with_gradients(lambda *t: expected(c, *t), *tensors, generator)
    generator.set_state(state)
    with pygpt.backend(backend):
        found = with_gradients(lambda *t: public(c, *t), *(t.to(device, dtype) for t in tensors), generator)
    for name, t in want.items():
        finite = t[t.isfinite()]
        atol = torch.finfo(dtype).eps ** 0.6 * max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
        torch.testing.assert_close(found[name], t, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    assert not found["out"][sum(c.q) :].any() and not found["dq"][sum(c.q) :].any()
    for name in ("dk", "dv"):
        unused = torch.ones(len(found[name]), dtype=torch.bool)
        for _, of_k in rows_of(c):
            unused[of_k] = False
        assert not found[name][unused].any()


def assert_equal(found, want, name=""):
    """The same bits; NaN is equal to NaN."""
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")


LENGTHS = {"cpp": (1, 4, 5, 100, 900), "torch": (1, 5)}
ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (20, 3)], ids=str)
@pytest.mark.parametrize("Hkv", [1, 2])  # so that on a CPU two tasks share a head of keys, or none do
def test_a_sequence_has_the_same_bits_alone(Hkv, window, dtype, compiled, device, generator):
    """Whatever else is in the batch, and whatever max_q and max_k are."""
    long = LENGTHS.get(compiled, (1, 4, 40, 130))
    keys = *(2 * n + 1 for n in long[1:]), 9
    if compiled == "cpp":  # what decodes splits its keys, each in its own way; the last has all parts of dq
        keys = 3000, 2600, *keys[1:-1]
    c = Packed(long, keys, window=window, Hq=2, Hkv=Hkv, E=16, Ev=8)
    q, k, v = (t.to(device, dtype) for t in draw(c, generator))
    dout, dlse = torch.randn(len(q), c.Hq, c.Ev).to(v), torch.randn(c.Hq, len(q)).to(device)
    kernels = named(compiled).kernels

    def run(c, q, k, v, dout, dlse, more=0):
        *rows, max_q, max_k = packing(c, device)
        args = *rows, max_q + more, max_k + more, 0.25, *c.window
        out, lse = kernels.varlen_attn_fwd(q, k, v, *args)
        return out, lse, *kernels.varlen_attn_bwd(dout, dlse.to(lse), q, k, v, out, lse, (True,) * 3, *args)

    together = run(c, q, k, v, dout, dlse, more=77)
    for n, (of_q, of_k) in enumerate(rows_of(c)):
        alone = replace(c, q=c.q[n : n + 1], k=c.k[n : n + 1])
        inputs = q[of_q], k[of_k], v[of_k], dout[of_q], dlse[:, of_q]
        parts = together[0][of_q], together[1][:, of_q], together[2][of_q], together[3][of_k], together[4][of_k]
        for name, part, want in zip(RESULTS, parts, run(alone, *inputs), strict=True):
            assert_equal(part, want, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_longest_sequence_changes_no_bits(dtype, compiled, device, generator):
    """Rows that fill up a tile of CUDA see no key within this window, but all of them if it were without limit, and
    the tile then has another form of p. The window is wider than a sequence, not wider than the longest."""
    c = Packed((1,) * 16, (28,) * 16, window=(29, 3), Hq=4, Hkv=4, E=16, Ev=8)
    q, k, v = (t.to(device, dtype) for t in draw(c, generator))
    q[..., 0], k[..., 0] = -14, 1  # so that lse is near 0, where every bit of the sum shows
    kernels = named(compiled).kernels

    def run(c, q, k, v, more=0):
        *rows, max_q, max_k = packing(c, device)
        return kernels.varlen_attn_fwd(q, k, v, *rows, max_q + more, max_k + more, 0.25, *c.window)

    out, lse = run(c, q, k, v, more=77)
    for of_q, of_k in rows_of(c):
        alone = run(replace(c, q=(1,), k=(28,)), q[of_q], k[of_k], v[of_k])
        assert_equal(out[of_q], alone[0], "out")
        assert_equal(lse[:, of_q], alone[1], "lse")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_neighbour_spoils_nothing(dtype, bad, backend, device, generator):
    """Nor do the rows that belong to no sequence, or the keys from seqused_k on."""
    c = Packed((5, 20, 7), (6, 20, 9), used=(6, 20, 5), window=(-1, 0), E=16, Ev=16)
    clean = [t.to(device, dtype) for t in draw(c, generator)]
    spoilt = [t.clone() for t in clean]
    first, others = next(rows_of(c)), list(rows_of(c))[1:]
    for t, rows in zip(spoilt, (first[0], first[1], first[1]), strict=True):
        t[rows] = bad
        t[-2:] = bad
    for t in spoilt[1:]:
        t[others[1][1].stop :] = bad
    with pygpt.backend(backend):
        state = generator.get_state()
        want = with_gradients(lambda *t: public(c, *t), *clean, generator)
        generator.set_state(state)
        found = with_gradients(lambda *t: (_finite(o) for o in public(c, *t)), *spoilt, generator)
    for of_q, of_k in others:
        for name, t in want.items():
            rows = (slice(None), of_q) if name == "lse" else of_q if name in ("out", "dq") else of_k
            assert_equal(found[name][rows], t[rows], name)


def _finite(t):
    """t, whose infinities and NaNs are to get no gradient."""
    return torch.where(t.isfinite(), t, t.detach())


def test_one_key_has_exact_gradients(compiled, device, generator):
    """p = 1 whatever the score, so dq and the row's share of dk are 0."""
    c = Packed((1, 6, 3), (1, 6, 3), window=(0, 0), E=16, Ev=8)
    tensors = [(30 * t).to(device, torch.float32).requires_grad_() for t in draw(c, generator)]
    with pygpt.backend(compiled):
        out, _ = public(c, *tensors)
    dq, dk, dv = torch.autograd.grad(out.sin().sum(), tensors)
    assert not dq.any() and not dk.any() and dv[:10].any()


def test_views(backend, device, generator):
    """q, k and v of one projection, numbers of rows with a stride, and a strided gradient of lse."""
    c = Packed((5, 9), (5, 9), window=(-1, 0), E=8, Ev=8)
    qkv = torch.randn(14 + 2, 3, 2, 8, generator=generator).to(device)
    cu = torch.stack([starts(c.q), starts(c.q) + 1], 1).to(device)[:, 0]
    with pygpt.backend(backend):
        wide = torch.randn(16, 8, 2, generator=generator).to(device)
        for views in (qkv.unbind(1), (qkv[:, 0].flip(0), qkv[:, 1, :1].expand(-1, 2, -1), wide.mT)):
            results = []
            for tensors in (views, [t.contiguous() for t in views]):
                inputs = [t.detach().requires_grad_() for t in tensors]
                out, lse = varlen_attn(*inputs, cu, cu, 9, 9, window_size=(-1, 0), return_aux=Aux)
                total = (out.transpose(0, 1).sin() * 2).sum() + lse.mT.contiguous().sin()[:14].sum()
                results.append((out, lse, *torch.autograd.grad(total, inputs)))
            for found, want in zip(*results, strict=True):
                torch.testing.assert_close(found, want)


def test_as_dense(generator):
    """Sequences of one length give the bits of attention in four dimensions."""
    q, k, v = (torch.randn(3 * 40, 2, 16, generator=generator) for _ in range(3))
    cu = starts((40,) * 3)
    with pygpt.backend("cpp"):
        out = varlen_attn(q, k, v, cu, cu, 40, 40, window_size=(-1, 0))
        dense = [t.view(3, 40, 2, 16).transpose(1, 2) for t in (q, k, v)]
        want = pygpt.functional.scaled_dot_product_attention(*dense, is_causal=True)
    assert_equal(out, want.transpose(1, 2).reshape(out.shape))


# ------------------------------------------------------------------------------- arguments
def call_of(**changes):
    q = torch.randn(6, 2, 4)
    cu = starts((2, 4))
    args = {"query": q, "key": q, "value": q, "cu_seq_q": cu, "cu_seq_k": cu, "max_q": 4, "max_k": 4} | changes
    return varlen_attn(**args)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": torch.randn(6, 8)}, ValueError, "query must have shape"),
        ({"key": torch.randn(6, 2, 5)}, ValueError, "key has head dimension 5"),
        ({"value": torch.randn(5, 2, 4)}, ValueError, "value 5 of 2"),
        ({"key": torch.randn(6, 1, 4), "value": torch.randn(6, 1, 4)}, ValueError, "enable_gqa=True"),
        ({"key": torch.randn(6, 3, 4), "value": torch.randn(6, 3, 4), "enable_gqa": True}, ValueError, "3 key heads"),
        ({"query": torch.randn(6, 2, 4).double()}, TypeError, "must be equal"),
        ({"query": torch.ones(6, 2, 4).int()}, TypeError, "floating"),
        ({"query": 3}, TypeError, "query must be a Tensor"),
        ({"scale": "1"}, TypeError, "scale must be a number.*, got '1'"),
        ({"cu_seq_q": starts((2, 4)).long()}, TypeError, "cu_seq_q must be int32, got torch.int64"),
        ({"cu_seq_q": [0, 2, 6]}, TypeError, "cu_seq_q must be a Tensor, got list"),
        ({"cu_seq_k": None}, TypeError, "cu_seq_k must be a Tensor, got NoneType"),
        ({"cu_seq_k": int32(0, 6)}, ValueError, r"cu_seq_k must have shape \(3,\)"),
        ({"cu_seq_q": int32()}, ValueError, r"cu_seq_q must have shape \(N \+ 1,\)"),
        ({"seqused_k": int32(2)}, ValueError, r"seqused_k must have shape \(2,\)"),
        ({"cu_seq_q": starts((2, 4)).to("meta")}, ValueError, "cu_seq_q is on meta"),
        ({"max_q": 2.5}, ValueError, "max_q must be an integer"),
        ({"max_k": -1}, ValueError, "max_k must be an integer"),
        ({"window_size": (1, 2, 3)}, ValueError, "window_size must be"),
        ({"window_size": (-2, 0)}, ValueError, "window_size must be"),
        ({"block_table": int32(0)}, ValueError, "block_table is not served"),
        ({"num_splits": "two"}, TypeError, "num_splits"),
        ({"return_aux": True}, TypeError, "return_aux needs an attribute lse"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        call_of(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cu_seq_q": int32(1, 2, 6)}, "cu_seq_q must start at 0"),
        ({"cu_seq_q": int32(0, 4, 2)}, "cu_seq_q must start at 0, never fall"),
        ({"cu_seq_q": int32(0, 2**31 - 1, -(2**31))}, "cu_seq_q must start at 0, never fall"),
        ({"cu_seq_k": int32(0, 2, 7)}, "cu_seq_k must start at 0, never fall, and end within the 6 rows"),
        ({"max_q": 3}, "max_q is 3, but a sequence has 4 rows"),
        ({"max_k": 1}, "max_k is 1, but a sequence has 4 rows"),
        ({"seqused_k": int32(3, 4)}, "seqused_k must be from 0"),
        ({"seqused_k": int32(-1, 4)}, "seqused_k must be from 0"),
    ],
)
@pytest.mark.parametrize("checked_by", ["cpp", "torch"])
def test_rows_are_checked_on_a_cpu(changes, message, checked_by):
    with pygpt.backend(checked_by), pytest.raises((ValueError, RuntimeError), match=message):
        call_of(**changes)


def test_torchs_arguments():
    """Names and defaults are torch's. return_aux is read by attribute."""
    theirs = inspect.signature(pytest.importorskip("torch.nn.attention.varlen").varlen_attn).parameters
    ours = inspect.signature(varlen_attn).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert call_of(num_splits=1).shape == (6, 2, 4)
    aux = type("AuxRequest", (), {"lse": False})
    assert isinstance(call_of(return_aux=aux), Tensor)
    assert [t.shape for t in call_of(return_aux=Aux)] == [(6, 2, 4), (2, 6)]


# ------------------------------------------------------------------------------- autograd and tracing
def test_derivatives(backend, device):
    if backend in ON_GPU:
        pytest.skip("float64 only")
    c = Packed((3, 2), (4, 3), used=(4, 2), window=(2, 0), Hq=2, Hkv=1)
    tensors = [t.requires_grad_() for t in draw(c, torch.Generator().manual_seed(0))]
    with pygpt.backend(backend):
        finite = lambda *t: [o[:, :5] if o.dim() == 2 else o for o in public(c, *t)]
        assert torch.autograd.gradcheck(finite, tensors)
        assert torch.autograd.gradgradcheck(finite, tensors)


def test_compiled_whole(compiled, device, generator):
    if compiled == "cuda" and device == "cpu":
        pytest.skip("a graph holds the registered ops, which the emulator does not serve")
    c = Packed((5, 9), (6, 9), used=(6, 7), window=(-1, 0), E=8, Ev=8)
    tensors = [t.to(device, torch.float32) for t in draw(c, generator)]
    rows = packing(c, device)[:3]

    def f(q, k, v, cu_q, cu_k, used):
        out, lse = varlen_attn(q, k, v, cu_q, cu_k, 9, 9, window_size=(-1, 0), seqused_k=used, return_aux=Aux)
        return out * 2, lse

    with pygpt.backend(compiled):
        state = generator.get_state()
        want = with_gradients(lambda *t: f(*t, *rows), *tensors, generator)
        generator.set_state(state)
        graph = torch.compile(f, backend="aot_eager", fullgraph=True)
        found = with_gradients(lambda *t: graph(*t, *rows), *tensors, generator)
    for name, t in want.items():
        assert_equal(found[name], t, name)


@pytest.mark.parametrize("chosen", ["cpp", "torch"])
@pytest.mark.parametrize("derivative", [0, 1, 2])
def test_a_graph_does_not_keep_the_lengths(derivative, chosen, generator):
    q, k, v = (t.requires_grad_() for t in draw(Packed((8,), (8,), Hq=1, Hkv=1), generator))

    def f(cu):
        y = varlen_attn(q, k, v, cu, cu, 8, 8).square().sum()
        for _ in range(derivative):
            (g,) = torch.autograd.grad(y, q, create_graph=True)
            y = g.square().sum()
        return y

    with pygpt.backend(chosen):
        graph = make_fx(f)(starts((4, 4)))
        for lengths in ((4, 4), (1, 7)):
            torch.testing.assert_close(graph(starts(lengths)), f(starts(lengths)))


def test_compiled_calls_are_checked_and_keep_sequences_apart(generator):
    """With heads too wide for every kernel, so that PyTorch serves them."""
    q = torch.randn(10, 1, 600, generator=generator)
    q[:4] = math.nan
    graph = torch.compile(varlen_attn, backend="aot_eager", fullgraph=True)
    out = graph(q, q, q, starts((4, 6)), starts((4, 6)), 6, 6)
    assert out[:4].isnan().all() and out[4:].isfinite().all()
    with pytest.raises(ValueError, match="max_q is 2"):
        graph(q, q, q, starts((4, 6)), starts((4, 6)), 2, 6)


def test_lengths_that_are_data(compiled, device, generator):
    """A whole graph takes max_q and max_k from the sequences, as training code does."""
    if compiled == "cuda" and device == "cpu":
        pytest.skip("a graph holds the registered ops, which the emulator does not serve")
    q, cu = torch.randn(16, 1, 8, generator=generator).to(device), starts((5, 9)).to(device)

    def f(q, cu):
        longest = cu.diff().max().item()
        return varlen_attn(q, q, q, cu, cu, longest, longest)

    with pygpt.backend(compiled), torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert_equal(torch.compile(f, backend="aot_eager", fullgraph=True)(q, cu), f(q, cu))


def test_meta_tensors():
    q, cu = torch.empty(6, 2, 4, device="meta", requires_grad=True), torch.empty(3, dtype=torch.int32, device="meta")
    for chosen in ("torch", None):
        with pygpt.backend(chosen) if chosen else nullcontext():
            out, lse = varlen_attn(q, q, q, cu, cu, 4, 4, return_aux=Aux)
            (dq,) = torch.autograd.grad(out.sum(), q)
        assert out.shape == dq.shape == (6, 2, 4) and lse.shape == (2, 6)


def test_autocast(device, generator):
    c = Packed((5, 9), (6, 9), E=8, Ev=8)
    tensors = [t.float() for t in draw(c, generator)]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = public(c, *tensors)
    want, _ = public(c, *(t.bfloat16() for t in tensors))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert_equal(out, want)


def test_transforms_fall_back(generator):
    c = Packed((5, 9), (6, 9), E=8, Ev=8)
    q, k, v = (t.float() for t in draw(c, generator))
    f = lambda q: public(c, q, k, v)[0]
    with torch.no_grad():
        batched = torch.vmap(f)(torch.stack([q, 2 * q]))
        _, tangent = torch.func.jvp(f, (q,), (q,))
    torch.testing.assert_close(batched[1], f(2 * q))
    eps = 1e-3
    torch.testing.assert_close(tangent, (f(q * (1 + eps)) - f(q * (1 - eps))) / (2 * eps), rtol=1e-2, atol=1e-3)
