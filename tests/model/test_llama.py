"""The reference GPT in Llama's configuration, against the same formulas in plain PyTorch."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pygpt
from pygpt import GPT, GPTConfig
from pygpt.train import PRESETS, Settings

F64 = torch.float64
LLAMA = GPTConfig(
    vocab_size=37, block_size=16, n_layer=2, n_head=4, n_embd=24, bias=False, norm="rms_norm", norm_eps=1e-6,
    position="rotary", rope_theta=500.0, n_kv_head=2, hidden_dim=40, activation="swiglu",
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "qwen": dataclasses.replace(LLAMA, qk_norm=True, bias=True),
    "learned": dataclasses.replace(LLAMA, position="learned", qk_norm=True),
    "gpt2 with rotary": GPTConfig(37, 16, 2, 4, 24, position="rotary"),
}


def rotated(x, c):
    """x (B, H, T, D): pair (i, i + D/2) at position t turned by t theta^(-2 i / D)."""
    T, D = x.shape[-2:]
    angles = torch.arange(T, dtype=F64)[:, None] * c.rope_theta ** (-torch.arange(0, D, 2, dtype=F64) / D)
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous()) * torch.polar(angles * 0 + 1, angles)
    return torch.cat((turned.real, turned.imag), -1)


def norm(x, weights, name, c):
    if c.norm == "rms_norm" or name.endswith(("q_norm", "k_norm")):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weights[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), c.norm_eps)


def plain(weights, idx, c):
    """The logits (B, T, V), from the formulas."""
    (B, T), H, D = idx.shape, c.n_head, c.n_embd // c.n_head
    kv_heads = c.n_kv_head or H
    linear = lambda name, x: F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    x = weights["transformer.wte.weight"][idx]
    if c.position == "learned":
        x = x + weights["transformer.wpe.weight"][:T]
    for n in range(c.n_layer):
        at = f"transformer.h.{n}"
        heads = linear(f"{at}.attn.c_attn", norm(x, weights, f"{at}.ln_1", c)).view(B, T, -1, D).transpose(1, 2)
        q, k, v = heads.split((H, kv_heads, kv_heads), 1)
        if c.qk_norm:
            q, k = norm(q, weights, f"{at}.attn.q_norm", c), norm(k, weights, f"{at}.attn.k_norm", c)
        if c.position == "rotary":
            q, k = rotated(q, c), rotated(k, c)
        k, v = (t.repeat_interleave(H // kv_heads, 1) for t in (k, v))
        s = (q @ k.mT / math.sqrt(D)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + linear(f"{at}.attn.c_proj", (s.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))
        h = linear(f"{at}.mlp.c_fc", norm(x, weights, f"{at}.ln_2", c))
        if c.activation == "swiglu":
            gate, value = h.chunk(2, -1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h, approximate="tanh")
        x = x + linear(f"{at}.mlp.c_proj", h)
    return norm(x, weights, "transformer.ln_f", c) @ weights["lm_head.weight"].mT


def drawn(c, **how):
    model = GPT(c, dtype=F64, **how)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("c", CONFIGS.values(), ids=CONFIGS)
def test_the_formulas(c, backend):
    model, idx = drawn(c), torch.randint(37, (3, 12))
    weights = dict(model.named_parameters(remove_duplicate=False))
    with pygpt.backend(backend):
        logits, loss = model(idx, idx)
        found = torch.autograd.grad(loss, list(model.parameters()))
    want = plain(weights, idx, c)
    torch.testing.assert_close(logits, want, rtol=1e-7, atol=1e-6)  # the tables of angles are float32
    gradients = torch.autograd.grad(F.cross_entropy(want.flatten(0, 1), idx.flatten()), list(model.parameters()))
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("c", CONFIGS.values(), ids=CONFIGS)
def test_cached_positions_continue(c):
    model, idx = drawn(c).eval(), torch.randint(37, (2, 16))
    caches = model.new_caches()
    with torch.no_grad():
        model(idx[:, :5], caches=caches)
        for t in range(5, 16):
            found = model(idx[:, t : t + 1], caches=caches)[0]
        torch.testing.assert_close(found, model(idx)[0])
        assert model.generate(idx, 8, temperature=0).shape == (2, 24)


def test_tables_survive_every_way_of_moving():
    model, idx = drawn(LLAMA), torch.randint(37, (2, 9))
    want = model(idx)[0]
    empty = GPT(LLAMA, device="meta", dtype=F64).to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    for other in (empty, copy.deepcopy(model), copy.deepcopy(model).bfloat16().double().share_memory()):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(idx)[0], want)
    assert not [name for name in model.state_dict() if "rotary" in name or "wpe" in name]
    rotary = {id(block.attn.rotary) for block in model.transformer.h}
    assert len(rotary) == 1


@pytest.mark.parametrize("replace", [
    lambda m: m.k_norm.__setattr__("eps", 0.5),
    lambda m: m.__setattr__("q_norm", nn.RMSNorm(6, 1e-6, elementwise_affine=False)),
    lambda m: m.__setattr__("k_norm", nn.RMSNorm(6, dtype=F64)),
    lambda m: m.__setattr__("k_norm", nn.LayerNorm(6, dtype=F64)),
], ids=["another eps", "no weight", "no eps", "another norm"])  # fmt: skip
def test_norms_of_heads_that_rope_cannot_compute(replace):
    rotary = pygpt.nn.RotaryEmbedding(6)
    m = pygpt.nn.CausalSelfAttention(24, 4, dtype=F64, rotary=rotary, qk_norm_eps=1e-6)
    replace(m)
    x = torch.randn(2, 9, 24, dtype=F64)
    q, k, v = m.c_attn(x).unflatten(2, (12, 6)).transpose(1, 2).chunk(3, 1)
    q, k = rotary(m.q_norm(q), m.k_norm(k))
    want = m.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x), want)


def test_a_hook_on_a_norm_of_heads_is_called():
    model, idx, seen = drawn(CONFIGS["qwen"]), torch.randint(37, (2, 9)), []
    want = model(idx)[0]
    model.transformer.h[0].attn.q_norm.register_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(model(idx)[0], want)
    assert len(seen) == 1


@pytest.mark.parametrize("field, value, message", [
    ("norm", "batch", "norm must be one of layer_norm, rms_norm, got 'batch'"),
    ("position", None, "position must be one of learned, rotary, got None"),
    ("norm_eps", 0, "norm_eps must be a positive number, got 0"),
    ("rope_theta", math.inf, "rope_theta must be a positive number, got inf"),
    ("n_kv_head", 3, "n_head 4 does not divide by n_kv_head 3"),
    ("n_kv_head", 0, "n_kv_head must be a positive integer or None, got 0"),
    ("qk_norm", "yes", "qk_norm must be True or False, got 'yes'"),
    ("hidden_dim", 2.5, "hidden_dim must be a positive integer or None, got 2.5"),
])  # fmt: skip
def test_what_a_configuration_does_not_allow(field, value, message):
    with pytest.raises(ValueError, match=f"pygpt.GPTConfig: {message}"):
        dataclasses.replace(LLAMA, **{field: value})


def test_the_preset_is_a_llama():
    s = Settings(**PRESETS["llama-demo"])
    assert (s.norm, s.position, s.activation, s.bias) == ("rms_norm", "rotary", "swiglu", False)
    assert s.n_kv_head is not None and s.n_kv_head < s.n_head
