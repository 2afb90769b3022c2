"""The reference GPT against nanoGPT's formulas in plain PyTorch, and backends against each other.

Its parameters' names, their initialisation and loading are in test_gpt_weights.py, transformers' weights in
test_gpt_from_hf.py.
"""

import copy
import dataclasses
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pygpt
from pygpt import GPT, GPTConfig

TINY = GPTConfig(vocab_size=37, block_size=16, n_layer=2, n_head=3, n_embd=24)
SERVED = [name for name, row in importlib.import_module("pygpt.dispatch").TABLE.items() if not row.missing]


class PlainGPT(nn.Module):
    """nanoGPT's modules and initialisation; `forward` from its formulas, in plain PyTorch."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        C, bias = c.n_embd, c.bias

        def block():
            attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias), "c_proj": nn.Linear(C, C, bias)})
            mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias), "c_proj": nn.Linear(4 * C, C, bias)})
            norms = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
            return nn.ModuleDict({"ln_1": norms[0], "attn": attn, "ln_2": norms[1], "mlp": mlp})

        self.transformer = nn.ModuleDict({"wte": nn.Embedding(c.vocab_size, C), "wpe": nn.Embedding(c.block_size, C)})
        self.transformer["h"] = nn.ModuleList(block() for _ in range(c.n_layer))
        self.transformer["ln_f"] = nn.LayerNorm(C, bias=bias)
        self.lm_head = nn.Linear(C, c.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        self.config = c
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer))

    @staticmethod
    def _init(m):
        if isinstance(m, nn.Linear | nn.Embedding):
            nn.init.normal_(m.weight, std=0.02)
        if isinstance(m, nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)

    def forward(self, idx, targets):
        t, H = self.transformer, self.config.n_head
        (B, T), C = idx.shape, self.config.n_embd
        x = t["wte"](idx) + t["wpe"](torch.arange(T))
        for block in t["h"]:
            q, k, v = (
                p.view(B, T, H, C // H).transpose(1, 2) for p in block["attn"]["c_attn"](block["ln_1"](x)).split(C, 2)
            )
            s = (q @ k.mT / math.sqrt(C // H)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            x = x + block["attn"]["c_proj"]((s.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
            h = block["mlp"]["c_fc"](block["ln_2"](x))
            x = x + block["mlp"]["c_proj"](0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))
        logits = self.lm_head(t["ln_f"](x))
        return logits, F.cross_entropy(logits.view(B * T, -1), targets.flatten())


def tokens(*shape):
    return torch.randint(TINY.vocab_size, shape)


def pair(bias=True, dtype=torch.float64):
    """Our model and the plain one with the same random weights."""
    config = dataclasses.replace(TINY, bias=bias)
    plain, ours = PlainGPT(config).to(dtype), GPT(config, dtype=dtype)
    for p in plain.parameters():
        nn.init.normal_(p, std=0.2)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def test_layers_of_the_model_are_called():
    """The head and the norms too: what hooks of theirs return counts."""
    model, idx = pair()[0], tokens(2, 9)
    logits, _ = model(idx)
    for layer, scale in ((model.lm_head, 3), (model.transformer.h[1].mlp.c_proj, 0), (model.transformer.ln_f, 2)):
        copied = copy.deepcopy(model)
        layer = copied.get_submodule(next(name for name, m in model.named_modules() if m is layer))
        seen = []
        layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        assert torch.equal(copied(idx)[0], logits) and len(seen) == 1
        layer.register_forward_hook(
            lambda m, args, out, by=scale: tuple(by * t for t in out) if isinstance(out, tuple) else by * out
        )
        changed = copied(idx)[0]
        assert not torch.allclose(changed, logits)
        if layer is not copied.transformer.h[1].mlp.c_proj:
            torch.testing.assert_close(changed, scale * logits)


def test_compiles_whole():
    """Without a graph break, forward and backward, to the same bits."""
    model, batch = GPT(TINY), tokens(2, 2, 9)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    for call in (model, torch.compile(compiled, fullgraph=True, backend="aot_eager")):
        call(*batch)[1].backward()
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(bias, backend):
    ours, plain = pair(bias)
    idx, targets = tokens(2, 2, 13)
    with pygpt.backend(backend):
        logits, loss = ours(idx, targets)
        loss.backward()
        last, nothing = ours(idx)
    expected, expected_loss = plain(idx, targets)
    expected_loss.backward()
    torch.testing.assert_close((logits, loss), (expected, expected_loss))
    torch.testing.assert_close(last, expected[:, -1:])
    assert nothing is None
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_negative_targets_are_ignored():
    model, _ = pair()
    idx, targets = tokens(2, 3, 16)
    targets[0, :5], targets[1, 3], targets[2, 2:9] = -1, -100, -7
    logits, loss = model(idx, targets)
    kept = targets >= 0
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_alone(dtype, backend):
    """The same as with logits, and so are its gradients; it is float32."""
    model, (idx, targets) = pair(dtype=dtype)[0], tokens(2, 3, 16)
    targets[0, :5] = -1
    with pygpt.backend(backend):
        results = [model(idx, targets, return_logits=flag) for flag in (True, False)]
    losses = [loss for _, loss in results]
    assert results[0][0].shape == (3, 16, TINY.vocab_size) and results[1][0] is None
    assert all(loss.dtype == torch.float32 for loss in losses)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    with_logits, alone = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for a, b in zip(alone, with_logits, strict=True):
        assert (a - b).norm() <= 4 * tolerance * b.norm()


def test_the_loss_of_a_head_that_is_no_plain_linear_layer():
    """A hook of the head is called, whether logits are returned or not."""
    model, _ = pair()
    idx, targets = tokens(2, 3, 16)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 0)
    for flag in (True, False):
        torch.testing.assert_close(model(idx, targets, return_logits=flag)[1].exp().item(), float(TINY.vocab_size))


# ------------------------------------------------------------------------------- generation
def test_cached_logits_equal_uncached(backend):
    model = pair()[0].eval()
    idx = tokens(2, 16)
    caches = model.new_caches()
    with pygpt.backend(backend), torch.no_grad():
        for part in idx.split([5, *[1] * 11], 1):
            start = caches[0].length + part.shape[1]
            torch.testing.assert_close(model(part, caches=caches)[0], model(idx[:, :start])[0])


def uncached(model, idx, n):
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), 1)
    return idx


@pytest.mark.parametrize("prompt", [1, 5, 16, 20])
def test_greedy_generation_equals_uncached(prompt, backend):
    """Also past block_size, where nanoGPT crops."""
    model, idx = pair()[0].eval(), tokens(2, prompt)
    with pygpt.backend(backend):
        assert torch.equal(model.generate(idx, 30, temperature=0), uncached(model, idx, 30))


def test_sampling():
    model, idx = pair()[0].eval(), tokens(64, 3)

    def draw(seed, **options):
        return model.generate(idx, 4, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), draw(2, temperature=0))
    assert torch.equal(draw(1, top_k=1000), draw(1))
    best = model(idx)[0][:, -1].topk(3).indices
    assert (draw(3, top_k=3)[:, 3:4] == best).any(1).all()
    assert torch.equal(model.generate(idx, 0), idx)
    assert not draw(1).requires_grad


# ------------------------------------------------------------------------------- backends
def flat_gradient(model, batch):
    model(*batch)[1].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def test_one_steps_gradients_are_equal_across_backends():
    """Each is as near to the float64 gradient as PyTorch's own in float32, within the factor 2."""
    model, batch = pair(dtype=torch.float32)[0], tokens(2, 4, 16)
    double = GPT(TINY, dtype=torch.float64)
    double.load_state_dict(model.state_dict())
    with pygpt.backend("torch"):
        exact = flat_gradient(double, batch)
    error = {}
    for name in SERVED:
        model.zero_grad()
        with pygpt.backend(name):
            error[name] = float((flat_gradient(model, batch) - exact).norm() / exact.norm())
    assert max(error.values()) <= 2 * error["torch"] + 2 * torch.finfo(torch.float32).eps, error


def losses_of_training(backend, steps, dtype=torch.float32):
    torch.manual_seed(0)
    model = GPT(TINY).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with pygpt.backend(backend):
        for _ in range(steps):
            idx = tokens(4, 17)
            loss = model(idx[:, :-1], idx[:, 1:])[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def backends_and_steps():
    """Fifty steps; in `make test` twelve where an interpreter runs them."""
    for name in SERVED:
        slow = name == "triton" and not torch.cuda.is_available()
        yield pytest.param(name, 50, marks=[pytest.mark.slow] if slow else [])
        if slow:
            yield name, 5


@pytest.mark.parametrize("name, steps", list(backends_and_steps()))
def test_training_losses_are_pytorchs(name, steps):
    """Against the same run in float64, a backend strays no further than PyTorch's own float32, within the factor 2
    and 32 units in the last place of the loss (two runs that round differently part ways slowly)."""
    exact = losses_of_training("torch", steps, torch.float64)
    error, of_torch = ((losses_of_training(each, steps) - exact).abs().max() for each in (name, "torch"))
    assert error <= 2 * of_torch + 32 * torch.finfo(torch.float32).eps * exact.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    """The explicit backend serves every op of a forward and backward pass; the result is PyTorch's to 16 bits."""
    model, batch = pair(dtype=torch.float32)[0], tokens(2, 4, 16)
    exact = flat_gradient(model, batch)
    model.zero_grad()
    with pygpt.backend(backend), torch.autocast("cpu", dtype):
        logits, loss = model(*batch)
    loss.backward()
    assert logits.dtype == dtype and loss.dtype == torch.float32
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    assert (gradient - exact).norm() / exact.norm() < 16 * torch.finfo(dtype).eps


# ------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(tokens(1, 17)), r"1 <= T <= 16, got shape \(1, 17\)"),
        (lambda m: m(tokens(5)), r"got shape \(5,\)"),
        (lambda m: m(tokens(1, 0)), r"got shape \(1, 0\)"),
        (lambda m: m(tokens(1, 4), tokens(1, 3)), r"targets must have idx's shape \(1, 4\), got \(1, 3\)"),
        (lambda m: m.generate(tokens(1, 0), 3), r"got shape \(1, 0\)"),
        (lambda m: m.generate(tokens(1, 2), 3, temperature=-1), "temperature must be >= 0"),
        (lambda m: m.generate(tokens(1, 2), 3, top_k=0), "top_k >= 1"),
        (lambda m: GPTConfig(n_embd=10, n_head=3), "n_embd 10 does not divide by n_head 3"),
        (lambda m: GPTConfig(n_layer=0), "n_layer must be a positive integer, got 0"),
        (lambda m: GPTConfig(n_embd=24.0), "n_embd must be a positive integer, got 24.0"),
        (lambda m: GPTConfig(dropout=3), r"dropout must be a probability, got 3"),
        (lambda m: GPTConfig(dropout="0.1"), "dropout must be a probability, got '0.1'"),
        (lambda m: GPTConfig(bias=None), "bias must be True or False, got None"),
        (lambda m: GPTConfig(activation="foo"), "activation must be one of gelu, .*geglu, got 'foo'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(GPT(TINY))


@pytest.mark.parametrize("ids", [[0, 37], [-1, 5]])
def test_ids_outside_the_vocabulary(ids):
    with pytest.raises(IndexError, match=f"idx has ids from {min(ids)} to {max(ids)}, vocab_size is 37"):
        GPT(TINY)(torch.tensor([ids]))
