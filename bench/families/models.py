"""The families: a small model of each with random weights, and a batch for it."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pygpt
from pygpt.integrations.transformers import register

from . import lookalikes


class Size(NamedTuple):
    width: int = 64
    layers: int = 2
    vocabulary: int = 128
    length: int = 16
    batch: int = 2


@dataclass(frozen=True)
class Family:
    """``build(size)`` gives a model; ``inputs`` names what it takes: tokens, pixels, sound or two texts."""

    build: Callable[[Size], nn.Module]
    inputs: str = "tokens"
    generates: bool = True
    loss_head: bool = True  # whether patch(model, loss=True) serves it


def _hf(name: str, size: Size, **options: Any) -> nn.Module:
    """The model class of transformers with this name, in a small configuration without dropout."""
    import transformers

    model = getattr(transformers, name)
    known = {
        "vocab_size": size.vocabulary, "hidden_size": size.width, "intermediate_size": 2 * size.width,
        "num_hidden_layers": size.layers, "num_attention_heads": 4, "max_position_embeddings": 4 * size.length,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    with quiet():
        return model(model.config_class(**{**known, **options}))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks on configurations."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _grouped(name: str, **options: Any) -> Callable[[Size], nn.Module]:
    """A model with two heads of keys and values for four of queries."""
    return lambda size: _hf(name, size, num_key_value_heads=2, head_dim=size.width // 4, **options)


def _gemma(name: str) -> Callable[[Size], nn.Module]:
    """Grouped heads whose layers alternate between a sliding window and all keys."""

    def build(size: Size) -> nn.Module:
        layers = [("sliding_attention", "full_attention")[i % 2] for i in range(size.layers)]
        window = {"sliding_window": size.length // 2, "layer_types": layers}
        return _grouped(name, query_pre_attn_scalar=size.width // 4, **window)(size)

    return build


def _gpt2(size: Size) -> nn.Module:
    sizes = {"n_embd": size.width, "n_layer": size.layers, "n_head": 4, "n_positions": 4 * size.length}
    return _hf("GPT2LMHeadModel", size, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def _opt(size: Size) -> nn.Module:
    return _hf("OPTForCausalLM", size, ffn_dim=2 * size.width, word_embed_proj_dim=size.width, dropout=0.0)


def _bert(size: Size) -> nn.Module:
    return _hf("BertForMaskedLM", size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _vit(size: Size) -> nn.Module:
    return _hf("ViTForImageClassification", size, image_size=32, patch_size=8, num_labels=10)


def _whisper(size: Size) -> nn.Module:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": size.layers, "attention_heads": 4, "ffn_dim": 2 * size.width}.items()
    }
    ends = {"decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None}
    lengths = {"num_mel_bins": 8, "max_source_positions": 2 * size.length, "max_target_positions": 4 * size.length}
    return _hf("WhisperForConditionalGeneration", size, d_model=size.width, dropout=0.0, **sides, **lengths, **ends)


def _t5(size: Size) -> nn.Module:
    sizes = {"d_model": size.width, "d_kv": size.width // 4, "d_ff": 2 * size.width, "num_layers": size.layers}
    return _hf("T5ForConditionalGeneration", size, **sizes, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0)


def _lookalike(block: type) -> Callable[[Size], nn.Module]:
    return lambda size: lookalikes.GPT(block, size.vocabulary, 4 * size.length, size.layers, 4, size.width, 0.0)


FAMILIES = {
    "GPT-2": Family(_gpt2),
    "Llama": Family(_grouped("LlamaForCausalLM")),
    "Qwen3": Family(_grouped("Qwen3ForCausalLM")),
    "Gemma2": Family(_gemma("Gemma2ForCausalLM"), loss_head=False),
    "Gemma3": Family(_gemma("Gemma3ForCausalLM")),
    "Mistral": Family(lambda size: _grouped("MistralForCausalLM", sliding_window=size.length // 2)(size)),
    "Phi3": Family(lambda size: _hf("Phi3ForCausalLM", size, num_key_value_heads=2, resid_pdrop=0.0)),
    "GPT-NeoX": Family(lambda size: _hf("GPTNeoXForCausalLM", size)),
    "OPT": Family(_opt),
    "BERT": Family(_bert, generates=False, loss_head=False),
    "ViT": Family(_vit, "pixels", generates=False, loss_head=False),
    "Whisper": Family(_whisper, "sound", loss_head=False),
    "T5": Family(_t5, "two texts", loss_head=False),
    "nanoGPT": Family(_lookalike(lookalikes.NanoBlock), "idx"),
    "minGPT": Family(_lookalike(lookalikes.MinBlock), "idx"),
}


def drawn(name: str, size: Size, generator: torch.Generator) -> nn.Module:
    """The family's model with weights from ``generator``, none of them a mere zero or one."""
    model = FAMILIES[name].build(size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def batch_of(name: str, size: Size, generator: torch.Generator, padding: str = "") -> dict[str, Tensor]:
    """Inputs and labels. ``padding``, "left" or "right", hides a third of the first sequence."""
    kind = FAMILIES[name].inputs
    ids = torch.randint(3, size.vocabulary, (size.batch, size.length), generator=generator)
    if kind == "pixels":
        pixels = torch.randn(size.batch, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "labels": ids[:, 0] % 10}
    if kind == "idx":
        return {"idx": ids, "targets": ids.roll(-1, 1)}
    if kind == "sound":
        return {"input_features": torch.randn(size.batch, 8, 4 * size.length, generator=generator), "labels": ids}
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padding:
        third = size.length // 3
        hidden = slice(third) if padding == "left" else slice(size.length - third, None)
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, hidden] = 0
        if kind == "tokens":  # the label after a hidden token would be of a row that sees nothing
            batch["labels"][0, hidden] = -100
            batch["labels"][0, third if padding == "left" else 0] = -100
    return batch


def copied(name: str, size: Size, model: nn.Module) -> nn.Module:
    """A model with the same weights. A deep copy of a minGPT would call the MLPs of the original."""
    copy = FAMILIES[name].build(size)
    copy.load_state_dict(model.state_dict())
    return copy


def served(name: str, size: Size, model: nn.Module, loss: bool = False) -> nn.Module:
    """A patched copy, with our attention where the model is of transformers."""
    model = copied(name, size, model)
    pygpt.patch(model, loss=loss)
    if hasattr(model, "set_attn_implementation"):
        register()
        model.set_attn_implementation("pygpt")
    return model
