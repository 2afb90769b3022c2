"""The reference GPT's parameters: nanoGPT's names and initialisation, the tied head, and loading nanoGPT's weights."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn

from pygpt import GPT
from tests.model.test_gpt import TINY, PlainGPT, pair, tokens

NAMES = [
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "transformer.h.0.ln_1.weight",
    "transformer.h.0.ln_1.bias",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.attn.c_attn.bias",
    "transformer.h.0.attn.c_proj.weight",
    "transformer.h.0.attn.c_proj.bias",
    "transformer.h.0.ln_2.weight",
    "transformer.h.0.ln_2.bias",
    "transformer.h.0.mlp.c_fc.weight",
    "transformer.h.0.mlp.c_fc.bias",
    "transformer.h.0.mlp.c_proj.weight",
    "transformer.h.0.mlp.c_proj.bias",
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
    "lm_head.weight",
]


def test_parameter_names():
    one = dataclasses.replace(TINY, n_layer=1)
    assert list(GPT(one).state_dict()) == NAMES
    without = [n for n in NAMES if not n.endswith(".bias")]
    assert list(GPT(dataclasses.replace(one, bias=False)).state_dict()) == without


def test_initialisation_is_nanogpts(seed):
    torch.manual_seed(seed)
    plain = PlainGPT(TINY)
    torch.manual_seed(seed)
    ours = GPT(TINY)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert ours.lm_head.weight is ours.transformer.wte.weight


def is_tied(model):
    assert len(list(model.parameters())) == len(model.state_dict()) - 1
    return model.lm_head.weight is model.transformer.wte.weight


def same_parameters(a, b):
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(n == m and torch.equal(p, q) and p.requires_grad for (n, p), (m, q) in pairs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emptied_and_reset_is_as_new(bias, dtype, seed):
    config = dataclasses.replace(TINY, bias=bias)
    torch.manual_seed(seed)
    new = GPT(config, dtype=dtype)
    model = GPT(config, device="meta", dtype=dtype)
    assert is_tied(model) and model.to_empty(device="cpu") is model and is_tied(model)
    for p in model.parameters():
        p.data.fill_(math.nan)
    torch.manual_seed(seed)
    model.reset_parameters()
    assert same_parameters(model, new)


MOVES = {
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "to meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
    "double": lambda m: m.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy to meta": lambda m: copy.deepcopy(m).to("meta"),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_moves_keep_the_tie(move, overwrite, nested):
    """Also with torch's switch that makes `to` replace parameters."""
    model = GPT(TINY)
    model(*tokens(2, 2, 5))[1].backward()
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        moved = MOVES[move](nn.Sequential(model) if nested else model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert is_tied(moved[0] if nested else moved)


def test_what_the_user_unties_stays_untied():
    model = GPT(TINY)
    model.lm_head.weight = nn.Parameter(torch.randn(37, 24))
    for moved in (copy.deepcopy(model).double(), copy.deepcopy(model).to("meta").to_empty(device="cpu")):
        assert moved.lm_head.weight is not moved.transformer.wte.weight
    state = {name: torch.randn_like(p) for name, p in model.state_dict().items()}
    for assign in (False, True):
        other = copy.deepcopy(model)
        other.load_state_dict(state, assign=assign)
        assert all(torch.equal(p, state[name]) for name, p in other.named_parameters(remove_duplicate=False))
    del state["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "inner."])
@pytest.mark.parametrize("device, assign", [("cpu", False), ("cpu", True), ("meta", True)])
@pytest.mark.parametrize("missing", [None, "lm_head.weight", "transformer.wte.weight"])
def test_loading_keeps_the_tie(missing, device, assign, prefix):
    """Of the two names a state dict may have either or both."""
    trained, model = GPT(TINY), GPT(TINY, device=device)
    state = {prefix + name: w.clone() for name, w in trained.state_dict().items() if name != missing}
    target = nn.ModuleDict({"inner": model}) if prefix == "inner." else model
    target.load_state_dict(state, strict=True, assign=assign)
    assert is_tied(model) and same_parameters(model, trained)
    model(*tokens(2, 2, 5))[1].backward()


def test_loading_without_both_names_or_with_a_wrong_shape():
    state = GPT(TINY).state_dict()
    wrong = {**state, "lm_head.weight": torch.zeros(3)}
    without = {name: w for name, w in state.items() if name not in ("lm_head.weight", "transformer.wte.weight")}
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"size mismatch for lm_head.weight"):
            GPT(TINY).load_state_dict(wrong, assign=assign)
        with pytest.raises(RuntimeError, match=r"Missing key.*wte.weight.*lm_head.weight"):
            GPT(TINY).load_state_dict(without, assign=assign)


def test_nanogpt_variants_load():
    """Older attention kept its mask as a buffer; torch.compile prefixes the names."""
    model, plain = pair()
    state = {f"_orig_mod.{name}": w for name, w in plain.state_dict().items()}
    for i in range(TINY.n_layer):
        state[f"_orig_mod.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    other = GPT(TINY).double()
    other.load_state_dict(state, strict=True)
    nested = nn.ModuleDict({"inner": GPT(TINY).double()})
    nested.load_state_dict({f"inner.{name}": w for name, w in plain.state_dict().items()}, strict=True)
    idx = tokens(1, 8)
    assert torch.equal(other(idx)[0], model(idx)[0]) and torch.equal(nested["inner"](idx)[0], model(idx)[0])
    del state["_orig_mod.transformer.ln_f.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*transformer.ln_f.weight"):
        other.load_state_dict(state)
