"""GPT.from_hf: transformers' GPT-2 as a model or a folder, its variants, and what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from pygpt import GPT
from tests.model.test_gpt import TINY, pair, tokens


def as_hf(model, prefix="transformer.", **changes):
    """A stand-in for transformers' GPT2LMHeadModel: its names, its Conv1D layout (in, out), its mask buffers."""
    state = {}
    for name, w in model.state_dict().items():
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name.replace("transformer.", prefix)] = w.t().contiguous() if conv1d else w.clone()
    for i in range(TINY.n_layer):
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril().bool()
        state[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    config = {
        "model_type": "gpt2", "vocab_size": 37, "n_positions": 16, "n_layer": 2, "n_head": 3, "n_embd": 24,
        "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    } | changes  # fmt: skip
    return SimpleNamespace(config=SimpleNamespace(**config), state_dict=lambda: state)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_from_hf_model(prefix):
    model, _ = pair()
    copy = GPT.from_hf(as_hf(model, prefix))
    idx = tokens(2, 9)
    assert copy.config == TINY and torch.equal(copy(idx)[0], model(idx)[0])
    assert copy.lm_head.weight is copy.transformer.wte.weight


def test_from_hf_folder(tmp_path):
    from safetensors.torch import save_file

    model, _ = pair(dtype=torch.bfloat16)
    hf = as_hf(model, prefix="")
    state = {name: w for name, w in hf.state_dict().items() if name != "lm_head.weight"}
    names = sorted(state)
    for part, chosen in enumerate((names[:9], names[9:])):
        save_file({n: state[n] for n in chosen}, tmp_path / f"model-{part}-of-2.safetensors")
    with pytest.raises(ValueError, match=r"must be a folder with config.json"):
        GPT.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vars(hf.config)))
    copy = GPT.from_hf(str(tmp_path))
    assert next(copy.parameters()).dtype == torch.bfloat16
    for a, b in zip(copy.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "only GPT-2 is understood; model_type is .llama., wte.weight is there"),
        ({"n_inner": 100}, "do not fit the configuration"),
        ({"activation_function": "silu"}, "activation_function among gelu"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "no scale_attn_by_inverse_layer_idx"),
        ({"n_layer": 1}, "do not fit the configuration"),
        ({"vocab_size": 36}, "do not fit the configuration"),
    ],
)
def test_from_hf_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT.from_hf(as_hf(GPT(TINY), **changes))


@pytest.mark.parametrize(
    "changes, ours",
    [
        ({"layer_norm_epsilon": 1e-3}, {"norm_eps": 1e-3}),
        ({"n_inner": 40}, {"hidden_dim": 40}),
        ({"activation_function": "gelu_python"}, {"activation": "gelu"}),
        ({"activation_function": "gelu_accurate"}, {}),
        ({"activation_function": "relu", "reorder_and_upcast_attn": True}, {"activation": "relu"}),
    ],
)
def test_from_hf_takes_every_variant(changes, ours):
    """Of which this GPT can compute the function, by the weights of such a GPT."""
    model = GPT(dataclasses.replace(TINY, **ours))
    copy, idx = GPT.from_hf(as_hf(model, **changes)), tokens(2, 9)
    assert copy.config == model.config and torch.equal(copy(idx)[0], model(idx)[0])


def test_from_hf_refuses_what_has_no_embedding():
    hf = as_hf(GPT(TINY), model_type="llama")
    del hf.state_dict()["transformer.wte.weight"]
    with pytest.raises(ValueError, match="wte.weight is missing"):
        GPT.from_hf(hf)


def test_from_hf_refuses_an_untied_head():
    hf = as_hf(GPT(TINY))
    hf.state_dict()["lm_head.weight"].add_(1)
    with pytest.raises(ValueError, match="lm_head tied to wte"):
        GPT.from_hf(hf)
