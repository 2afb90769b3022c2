"""pygpt.enable under torch.compile: compiled graphs hold our ops while on, torch's while off, and caches do not mix."""

import functools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import pygpt
from pygpt.integrations import aten

OURS = ["attention", "layer_norm", "linear", "linear", "rms_norm"]  # of a Block, by name


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.second_norm = nn.RMSNorm(8)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, 2, 4).transpose(1, 2) for t in self.proj(self.norm(x)).split(C, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        return x + self.out(F.gelu(self.second_norm(y)))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    assert not aten._overrides


@pytest.fixture
def graphs():
    """The ops of ours in each graph of AOTAutograd, forward and backward, in order."""
    return []


@pytest.fixture
def compile(graphs):
    def keep(module, inputs):
        names = (str(node.target) for node in module.graph.nodes if node.op == "call_function")
        graphs.append(sorted(name.split(".")[1] for name in names if name.startswith("pygpt")))
        return make_boxed_func(module.forward)

    return functools.partial(torch.compile, fullgraph=True, backend=aot_autograd(fw_compiler=keep))


def gradients(function, model, x):
    model.zero_grad()
    function(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def equal(ours, theirs) -> bool:
    return all(map(torch.equal, ours, theirs))


EXPECTED = [[f"{name}_{direction}" for name in OURS] for direction in ("fwd", "bwd")]


def test_graphs_hold_our_ops_while_on(compile, graphs):
    """One function, compiled off, called on, and off again. A compiled graph gives the bits of eager calls."""
    model, x = Block(), torch.randn(2, 5, 8)
    compiled, off = compile(model), gradients(model, model, x)
    torch.testing.assert_close(gradients(compiled, model, x), off)
    assert graphs == [[], []]
    with pygpt.enable():
        on = gradients(model, model, x)
        assert equal(gradients(compiled, model, x), on) and graphs[2:] == EXPECTED
    torch.testing.assert_close(gradients(compiled, model, x), off)
    assert graphs[4:] == [[], []] and not equal(on, off)


def test_a_graph_of_while_on_stays_right(compile):
    model, x = Block(), torch.randn(2, 5, 8)
    want = gradients(model, model, x)
    with pygpt.enable():
        loss = compile(model)(x).square().sum()
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], want)


def test_dynamic_shapes_compile_once(compile, graphs):
    model = Block()
    with pygpt.enable():
        compiled = compile(model, dynamic=True)
        for T in (5, 9):
            x = torch.randn(2, T, 8)
            assert equal(gradients(compiled, model, x), gradients(model, model, x))
    assert graphs == EXPECTED


def test_as_many_graphs_as_torchs_own():
    def frames():
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        norm, linear = nn.LayerNorm(8), nn.Linear(8, 8)
        compiled = torch.compile(lambda x: F.gelu(linear(norm(x))), fullgraph=True, backend=counter)
        for rows in (5, 6, 7, 1):
            compiled(torch.randn(rows, 8))
        return counter.frame_count

    want = frames()
    with pygpt.enable():
        assert frames() == want


def test_autocast(compile, graphs):
    model, x = Block(), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16), pygpt.enable():
        want, got = model(x), compile(model)(x)
    served = [name for name in EXPECTED[0] if name != "rms_norm_fwd"]  # its weight is float32, its input bfloat16
    assert got.dtype == want.dtype and torch.equal(got, want) and graphs[0] == served


def test_the_door_under_compile(compile):
    """The op is torch's, with the strides of torch's meta function, and our kernel stands behind it."""
    door, model, x = torch.nn.attention, Block(), torch.randn(2, 5, 8)
    want, compiled = gradients(model, model, x), compile(model)
    gradients(compiled, model, x)
    door.activate_flash_attention_impl("pygpt")
    try:
        aten.counts = aten.Counts()
        got, served = gradients(compiled, model, x), dict(aten.counts.served)
    finally:
        aten.counts = None
        door.restore_flash_attention_impl()
    torch.testing.assert_close(got, want)
    assert served == {"flash attention": 1, "flash attention backward": 1}


def test_export_holds_torchs_ops():
    """An exported program is torch's, wherever it was made; the kernels serve it where they are on."""
    model, x = Block(), torch.randn(2, 5, 8)
    with pygpt.enable():
        program, want = torch.export.export(model, (x,)), model(x)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in names and not any("pygpt" in name for name in names)
    with pygpt.enable():
        assert torch.equal(program.module()(x), want)
    torch.testing.assert_close(program.module()(x), want)


def test_enable_within_a_compiled_function():
    """No graph can hold the switch: it breaks the graph, and acts."""

    def function(x):
        with pygpt.enable("linear"):
            return F.linear(x, x)

    x = torch.randn(3, 8)
    want = function(x)
    assert torch.equal(torch.compile(function, backend="eager")(x), want)
    with pytest.raises(Exception, match=r"call it outside of the compiled function|[Uu]nsupported"):
        torch.compile(function, backend="eager", fullgraph=True)(x)


CACHED = """
import sys
import torch, pygpt
from torch._dynamo.utils import counters
if sys.argv[1] == "on":
    pygpt.enable()
weight, x = torch.ones(5, 8), torch.randn(3, 8)
compiled = torch.compile(lambda x: torch.nn.functional.linear(x, weight), fullgraph=True)
compiled(x)
with torch.profiler.profile() as profile:
    compiled(x)
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(hits, *sorted({e.name for e in profile.events() if e.name in ("aten::mm", "pygpt::linear_fwd")}))
"""


def test_the_key_of_caches_on_disk():
    """It tells what is on apart, and keeps the user's own tag."""
    config = torch.compiler.config
    with config.patch(cache_key_tag="mine"):  # monkeypatch would leave torch's configuration without the entry
        with pygpt.enable("linear"):
            one = config.cache_key_tag
            with pygpt.enable("gelu"):
                two = config.cache_key_tag
            assert config.cache_key_tag == one
        assert config.cache_key_tag == "mine" and len({"mine", one, two}) == 3
        assert one.startswith("mine") and two.startswith("mine")
    assert config.cache_key_tag == ""


@pytest.mark.slow
def test_caches_on_disk_do_not_mix(run_python, tmp_path):
    """Off fills the cache, and off finds it. On in between does not."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYGPT_BACKEND": ""}
    printed = [run_python(CACHED, state, TRITON_INTERPRET="", **environment) for state in ("off", "on", "off")]
    want = ["0 aten::mm", "0 pygpt::linear_fwd", "1 aten::mm"]
    assert [done.stdout.strip() for done in printed] == want, printed[-1].stderr[-3000:]
