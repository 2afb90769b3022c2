"""The reference GPT: GPT-2 (Radford et al. 2019) with the parameter names of github.com/karpathy/nanoGPT.

Other configurations make it a Llama (Touvron et al. 2023): RMSNorm, rotary positions, grouped heads, a gated MLP. Every
layer runs on `pygpt.functional`. B sequences of T tokens pass as (B, T, C), C = n_embd.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .functional import cross_entropy, linear_cross_entropy
from .nn import MLP, CausalSelfAttention, KVCache, LayerNorm, Linear, RMSNorm, RotaryEmbedding
from .nn.fusing import is_unmodified_linear
from .reference import ACTIVATIONS


@dataclass
class GPTConfig:
    """The shape of a `GPT`. The defaults are GPT-2 124M, its vocabulary padded to a multiple of 64.

    ``bias`` is for every Linear and LayerNorm, and ``activation`` is one of `pygpt.nn.MLP`'s. ``position`` "rotary"
    rotates queries and keys instead of adding wpe. A value that is not allowed raises ValueError.
    """

    vocab_size: int = 50304
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in every Linear and LayerNorm
    activation: str = "gelu_tanh"
    norm: str = "layer_norm"  # or "rms_norm"
    norm_eps: float = 1e-5
    position: str = "learned"  # or "rotary"
    rope_theta: float = 10000.0  # the base of rotary positions
    n_kv_head: int | None = None  # heads of keys and values; None: n_head
    qk_norm: bool = False  # an RMSNorm over each head of queries and keys
    hidden_dim: int | None = None  # of the MLP; None: 4 n_embd

    def __post_init__(self) -> None:
        def one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
            return lambda name: name in names, f"one of {', '.join(names)}"

        size = lambda n: isinstance(n, Integral) and int(n) >= 1, "a positive integer"
        size_or_none = lambda n: n is None or size[0](n), "a positive integer or None"
        flag = lambda value: value in (True, False), "True or False"
        positive = lambda x: isinstance(x, Real) and 0 < float(x) < math.inf, "a positive number"
        fields: dict[str, tuple[Callable[[Any], bool], str]] = {
            **dict.fromkeys(("vocab_size", "block_size", "n_layer", "n_head", "n_embd"), size),
            **dict.fromkeys(("n_kv_head", "hidden_dim"), size_or_none),
            **dict.fromkeys(("bias", "qk_norm"), flag),
            **dict.fromkeys(("norm_eps", "rope_theta"), positive),
            "dropout": (lambda p: isinstance(p, Real) and 0 <= float(p) <= 1, "a probability"),
            "activation": one_of(*ACTIVATIONS),
            "norm": one_of("layer_norm", "rms_norm"),
            "position": one_of("learned", "rotary"),
        }
        for name, (is_allowed, allowed) in fields.items():
            if not is_allowed(value := getattr(self, name)):
                raise ValueError(f"pygpt.GPTConfig: {name} must be {allowed}, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"pygpt.GPTConfig: n_embd {self.n_embd} does not divide by n_head {self.n_head}")
        if self.n_head % (self.n_kv_head or 1):
            raise ValueError(f"pygpt.GPTConfig: n_head {self.n_head} does not divide by n_kv_head {self.n_kv_head}")

    def new_norm(self, **factory: Any) -> nn.Module:
        """A norm over n_embd."""
        if self.norm == "rms_norm":
            return RMSNorm(self.n_embd, self.norm_eps, **factory)
        return LayerNorm(self.n_embd, self.norm_eps, bias=self.bias, **factory)


class Block(nn.Module):
    """x + attn(ln_1(x)), then the same with ln_2 and mlp.

    The residual stream is passed as the pair (x, delta), and its value is x + delta. Each addition happens inside the
    norm that follows it.
    """

    def __init__(self, config: GPTConfig, rotary: RotaryEmbedding | None, **factory: Any) -> None:
        super().__init__()
        C, both = config.n_embd, {"bias": config.bias, "dropout": config.dropout, **factory}
        qk_norm_eps = config.norm_eps if config.qk_norm else None
        self.ln_1 = config.new_norm(**factory)
        self.attn = CausalSelfAttention(
            C, config.n_head, config.n_kv_head, rotary=rotary, qk_norm_eps=qk_norm_eps, **both
        )
        self.ln_2 = config.new_norm(**factory)
        self.mlp = MLP(C, config.hidden_dim, config.activation, **both)

    def forward(self, x: Tensor, delta: Tensor | None, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """x, delta (B, T, C) -> the pair after the block. delta is None before the first block."""
        h, x = (self.ln_1(x), x) if delta is None else self.ln_1(x, delta)
        h, x = self.ln_2(x, self.attn(h, cache))
        return x, self.mlp(h)


class GPT(nn.Module):
    """GPT-2's architecture (Radford et al. 2019) with nanoGPT's parameter names: idx (B, T) -> logits, loss.

    The token embedding is the weight of lm_head, one parameter under two names. It stays one parameter when the model
    is moved, copied, pickled, emptied (`to_empty`) or loaded, also with assign=True and from a state dict with only one
    of the names.
    """

    def __init__(
        self, config: GPTConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        rotary, wpe = None, {}
        if config.position == "rotary":
            rotary = RotaryEmbedding(
                config.n_embd // config.n_head, base=config.rope_theta, max_positions=config.block_size, device=device
            )
        else:
            wpe = {"wpe": nn.Embedding(config.block_size, config.n_embd, **factory)}
        self.transformer: Any = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd, **factory),
                **wpe,
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, rotary, **factory) for _ in range(config.n_layer)),
                "ln_f": config.new_norm(**factory),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False, **factory)
        self.transformer.wte.weight = self.lm_head.weight  # type: ignore[union-attr]
        self.register_load_state_dict_pre_hook(_accept_nanogpt_variants)
        self.register_load_state_dict_pre_hook(_load_shared_once)
        self._draw()

    def reset_parameters(self) -> None:
        """Draws every parameter anew, for example after `to_empty` of a model built on the meta device.

        Weights are Normal(0, 0.02), and those that feed the residual stream are divided by sqrt(2 n_layer), the number
        of its additions. Biases are zero, norms one. The same seed gives the bits of a new GPT on that device.
        """
        for module in self.modules():
            if module._parameters:  # modules made of layers would draw the parameters of their layers twice
                module.reset_parameters()  # type: ignore[operator]
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """The weights and biases in which GPT-2 differs from torch.nn's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))

    def _apply(self, fn: Callable, recurse: bool = True) -> "GPT":
        """`to`, `to_empty` and similar methods call this. A parameter with several names stays one."""
        before = [(module, name, p) for module in self.modules() for name, p in module._parameters.items()]
        super()._apply(fn, recurse)
        after: dict[nn.Parameter | None, nn.Parameter | None] = {}
        for module, name, p in before:
            module._parameters[name] = after.setdefault(p, module._parameters[name])
        return self

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        caches: list[KVCache] | None = None,
        *,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns logits and loss for token ids idx (B, T), T <= block_size.

        With targets (B, T) these are logits (B, T, V) and their mean cross-entropy; negative targets are ignored.
        ``return_logits=False`` gives (None, loss), and the logits of a few rows exist at a time. Without targets they
        are the last position's logits (B, 1, V) and None. With caches (`new_caches`), idx holds the positions that
        follow the cached ones. Shapes that do not fit the configuration raise ValueError, and ids
        that do not fit the vocabulary raise IndexError on a CPU.
        """
        start = caches[0].length if caches else 0
        if idx.dim() != 2 or not 1 <= idx.shape[1] <= self.config.block_size - start:
            room = self.config.block_size - start
            raise ValueError(f"pygpt.GPT: idx must be (B, T) with 1 <= T <= {room}, got shape {tuple(idx.shape)}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"pygpt.GPT: targets must have idx's shape {tuple(idx.shape)}, got {tuple(targets.shape)}")
        t = self.transformer
        try:
            embedded = t.wte(idx)
        except IndexError:  # on a GPU, PyTorch asserts on the device
            ids, size = f"from {idx.min()} to {idx.max()}", self.config.vocab_size
            raise IndexError(f"pygpt.GPT: idx has ids {ids}, vocab_size is {size}") from None
        if self.config.position == "learned":
            embedded = embedded + t.wpe(torch.arange(start, start + idx.shape[1], device=idx.device))
        x, delta = t.drop(embedded), None
        for i, block in enumerate(t.h):
            x, delta = block(x, delta, caches[i] if caches else None)
        if targets is None:
            x, delta = x[:, -1:], delta[:, -1:]  # type: ignore[index]
        x, _ = t.ln_f(x, delta)
        if targets is None:
            return self.lm_head(x), None
        head, classes = self.lm_head, targets.flatten().clamp(min=-1)
        if not return_logits and is_unmodified_linear(head):
            with _float32_losses(x):
                return None, linear_cross_entropy(
                    x.flatten(0, 1), head.weight, classes, linear_bias=head.bias, ignore_index=-1
                )
        logits = head(x)
        with _float32_losses(logits):
            loss = cross_entropy(logits.flatten(0, 1), classes, ignore_index=-1)
        return logits if return_logits else None, loss

    def new_caches(self) -> list[KVCache]:
        """Empty caches of all layers, for `forward`."""
        return [KVCache(self.config.block_size) for _ in self.transformer.h]

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """`generate`, yielding each new token (B, 1) as it is drawn."""
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"pygpt.GPT: temperature must be >= 0 and top_k >= 1, got {temperature} and {top_k}")
        caches = None
        for _ in range(max_new_tokens):
            if caches and caches[0].length < self.config.block_size:
                logits, _ = self(idx[:, -1:], caches=caches)
            else:  # at the start, or past block_size, where every position moves and the last block is encoded again
                caches = self.new_caches()
                logits, _ = self(idx[:, -self.config.block_size :], caches=caches)
            token = _sample(logits[:, -1], temperature, top_k, generator)
            idx = torch.cat((idx, token), dim=1)
            yield token

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues idx (B, T >= 1) by max_new_tokens -> (B, T + max_new_tokens). Call ``eval`` first.

        ``temperature`` 0 takes the likeliest token. ``top_k`` draws among the k likeliest. Attention sees the last
        block_size tokens. ``generator`` is a torch.Generator on the model's device, by default torch's own. A negative
        temperature or a top_k below 1 raises ValueError.
        """
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator)), dim=1)

    @classmethod
    def from_hf(cls, model_or_folder: Any, dropout: float = 0.0) -> "GPT":
        """Returns a GPT with a copy of GPT-2 weights from transformers, which itself is not needed.

        ``model_or_folder`` is a live GPT2LMHeadModel or GPT2Model, or a folder with config.json and ``*.safetensors``.
        Nothing is downloaded. A model whose function this GPT could not compute raises ValueError.
        """
        folder = isinstance(model_or_folder, str | Path)
        source = _read_hf_folder(Path(model_or_folder)) if folder else model_or_folder
        weights = {name.removeprefix("transformer."): w for name, w in source.state_dict().items()}
        if (model_type := getattr(source.config, "model_type", "gpt2")) != "gpt2" or "wte.weight" not in weights:
            raise ValueError(
                f"pygpt.GPT.from_hf: only GPT-2 is understood; model_type is {model_type!r}, "
                f"wte.weight is {'there' if 'wte.weight' in weights else 'missing'}"
            )
        wte = weights["wte.weight"]
        model = cls(_config_from_hf(source.config, weights, dropout), device=wte.device, dtype=wte.dtype)
        named = {"lm_head.weight": weights.pop("lm_head.weight", wte)}
        for name, w in weights.items():
            transposed = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))  # Conv1D stores (in, out)
            named[f"transformer.{name}"] = w.t() if transposed else w
        try:
            model.load_state_dict(named)
        except RuntimeError as e:
            raise ValueError(f"pygpt.GPT.from_hf: the weights do not fit the configuration: {e}") from None
        return model


def _float32_losses(x: Tensor) -> AbstractContextManager:
    """A context in which the loss of x is float32: autocast, if x is of a 16-bit dtype."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(x.device.type, x.dtype) if half else nullcontext()


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> one token each, (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    least = torch.finfo(logits.dtype).tiny  # a GPU multiplies by 1 / temperature, which must not overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, least)  # at most 0: no overflow to +inf
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _accept_nanogpt_variants(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Removes torch.compile's prefix from names, and the causal masks that nanoGPT without SDPA keeps as buffers."""
    for key in list(state_dict):
        name = key.removeprefix(prefix).removeprefix("_orig_mod.")
        value = state_dict.pop(key)
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            state_dict[prefix + name] = value


def _load_shared_once(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Gives every name of a shared parameter the same value: the last one, as if all were copied in turn.

    The value becomes a Parameter, which `assign` uses itself.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in module.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        names.setdefault(p, []).append(name)
    for shared in names.values():
        values = [state_dict[name] for name in shared if name in state_dict]
        if len(shared) > 1 and values:
            last = values[-1]
            if isinstance(last, Tensor) and not isinstance(last, nn.Parameter):
                last = nn.Parameter(last, requires_grad=False)
            state_dict.update(dict.fromkeys(shared, last))


# ------------------------------------------------------------------------------- transformers' GPT-2
_HF_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    "relu": "relu",
    "relu2": "relu2",
}


def _read_hf_folder(folder: Path) -> SimpleNamespace:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(f"pygpt.GPT.from_hf: {folder} must be a folder with config.json and *.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {name: w for file in files for name, w in load_file(file).items()}
    return SimpleNamespace(config=SimpleNamespace(**config), state_dict=lambda: weights)


def _config_from_hf(hf: Any, weights: dict[str, Tensor], dropout: float) -> GPTConfig:
    head, activation = weights.get("lm_head.weight"), getattr(hf, "activation_function", "gelu_new")
    wanted = {
        f"an activation_function among {', '.join(_HF_ACTIVATIONS)}": activation in _HF_ACTIVATIONS,
        "scale_attn_weights": getattr(hf, "scale_attn_weights", True),
        "no scale_attn_by_inverse_layer_idx": not getattr(hf, "scale_attn_by_inverse_layer_idx", False),
        "no cross-attention": not getattr(hf, "add_cross_attention", False),
        "lm_head tied to wte": head is None or torch.equal(head, weights["wte.weight"]),
    }
    if missing := [what for what, holds in wanted.items() if not holds]:
        raise ValueError(f"pygpt.GPT.from_hf: this GPT needs {', '.join(missing)}")
    return GPTConfig(
        hf.vocab_size, hf.n_positions, hf.n_layer, hf.n_head, hf.n_embd, dropout,
        activation=_HF_ACTIVATIONS[activation],
        norm_eps=getattr(hf, "layer_norm_epsilon", 1e-5), hidden_dim=getattr(hf, "n_inner", None),
    )  # fmt: skip
