"""Models of other people on pygpt's kernels: `python -m bench.families` prints the table of docs/models.md.

Every family is a small model with random weights, once as it is and once after `pygpt.patch(model)` with
attn_implementation="pygpt". The columns: the share of a training step's matmul and attention FLOPs that our kernels
serve; how much faster a forward pass and a training step are (the medians of runs in turn); the largest error of a
logit, loss or gradient against float64 over PyTorch's own; and whether greedy decoding gives the same tokens.

FLOPs are counted by torch's formulas in a step of the unpatched model under the math backend, because torch counts its
fused attention on CPUs as nothing. What the patched model still runs of torch's matmuls is not served.
"""

import argparse
import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import pygpt
from pygpt.integrations.transformers import register

from . import lookalikes

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


class Size(NamedTuple):
    width: int = 64
    layers: int = 2
    vocabulary: int = 128
    length: int = 16
    batch: int = 2


# ------------------------------------------------------------------------------- the families
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
    with _quiet():
        return model(model.config_class(**{**known, **options}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


_LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "GPT-2": Family(_gpt2),
    "Llama": Family(_grouped("LlamaForCausalLM")),
    "Qwen3": Family(_grouped("Qwen3ForCausalLM")),
    "Gemma2": Family(
        _grouped("Gemma2ForCausalLM", sliding_window=8, query_pre_attn_scalar=16, layer_types=_LAYERS), loss_head=False
    ),
    "Gemma3": Family(_grouped("Gemma3ForCausalLM", sliding_window=8, query_pre_attn_scalar=16, layer_types=_LAYERS)),
    "Mistral": Family(_grouped("MistralForCausalLM", sliding_window=8)),
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


# ------------------------------------------------------------------------------- what is measured
def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A training step without an optimizer: the loss, the logits where there are any, and the gradients, by name."""
    model.zero_grad()
    out = model(**batch)
    logits, loss = (out.logits, out.loss) if hasattr(out, "logits") else out
    loss.backward()
    results = {"loss": loss.detach(), **{f"d{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}}
    if logits is not None:
        kept = batch.get("attention_mask")
        logits = logits.detach()
        results["logits"] = logits if kept is None or kept.shape != logits.shape[:2] else logits[kept.bool()]
    return results


class InFloat64(TorchFunctionMode):
    """Models that ask for float32, for example in a norm, get float64."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        wide = lambda value: torch.float64 if value is torch.float32 else value
        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def in_float64(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`step` of the model, which becomes float64."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
    with InFloat64():
        return step(model.double(), wide)


DRAWS = 8  # models whose largest errors are compared, so that no lucky element decides


class Errors(NamedTuple):
    """Of one result, relative to its largest value."""

    ours: float
    torchs: float


def errors(exact: dict[str, Tensor], theirs: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, Errors]:
    """Our error and PyTorch's against float64, of every result of ``got``."""
    found = {}
    for name in got:
        scale = exact[name].abs().max().item() or 1.0
        found[name] = Errors(*((t[name].double() - exact[name]).abs().max().item() / scale for t in (got, theirs)))
    return found


class TorchsFlops(TorchDispatchMode):
    """Counts the FLOPs of torch's own matmuls and attention by torch's formulas.

    torch's FlopCounterMode has a hook on every module, and with hooks no module is fused over its children.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, packet = func(*args, **kwargs), func._overloadpacket
        if func.namespace == "aten" and packet in flop_registry and "convolution" not in func.name():
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def _torchs_flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    with TorchsFlops() as counter, sdpa_kernel(SDPBackend.MATH):
        step(model, batch)
    return counter.total


def share(model: nn.Module, ours: nn.Module, batch: dict[str, Tensor]) -> float:
    """The share of the matmul and attention FLOPs of a training step that our kernels serve."""
    return 1.0 - _torchs_flops(ours, batch) / _torchs_flops(model, batch)


def greedy(model: Any, batch: dict[str, Tensor], tokens: int) -> Tensor:
    """The tokens that greedy decoding gives."""
    if "idx" in batch:
        return model.eval().generate(batch["idx"], tokens)
    given = {name: t for name, t in batch.items() if name != "labels"}
    with _quiet():
        return model.eval().generate(**given, max_new_tokens=tokens, do_sample=False)


def _ratio(theirs: Callable[[], Any], ours: Callable[[], Any], seconds: float) -> float:
    """The median time of ``theirs`` over that of ``ours``, run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    theirs(), ours()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[0]) < 5:
        for run, kept in zip((theirs, ours), times, strict=True):
            before = time.perf_counter()
            run()
            kept.append(time.perf_counter() - before)
    return statistics.median(times[0]) / statistics.median(times[1])


def row(name: str, small: Size, size: Size, seconds: float) -> str:
    """The family's line of the table. ``seconds`` 0 leaves the speed out."""
    torch.manual_seed(0)  # for the configurations' own initialisation
    generator = torch.Generator().manual_seed(0)
    model = drawn(name, small, generator)
    ours = served(name, small, model)
    batch = batch_of(name, small, generator, "left" if FAMILIES[name].inputs in ("tokens", "two texts") else "")
    cells = [name, f"{share(model, ours, batch):.1%}"]
    if seconds:
        large = drawn(name, size, generator)
        of_large, large_batch = served(name, size, large), batch_of(name, size, generator)
        for run in (lambda m: _forward(m, large_batch), lambda m: step(m, large_batch)):
            cells.append(f"{_ratio(lambda: run(large), lambda: run(of_large), seconds):.2f}")  # noqa: B023
    else:
        cells += ["", ""]
    same = greedy(model, batch, 8).equal(greedy(ours, batch, 8)) if FAMILIES[name].generates else None
    found: list[Errors] = []
    for _ in range(DRAWS):
        model = drawn(name, small, generator)
        results = step(model, batch), step(served(name, small, model), batch)
        found += errors(in_float64(model, batch), *results).values()
    worst = max(e.ours for e in found) / max(e.torchs for e in found)
    cells += [f"{worst:.2f}", {True: "yes", False: "no", None: ""}[same]]
    return f"| {' | '.join(cells)} |"


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**batch)


HEAD = (
    "| family | served share | forward | training step | error over PyTorch's | same tokens |\n"
    "|---|---|---|---|---|---|"
)


def with_table(page: str, table: str) -> str:
    """The page with this table in the place of the old one."""
    begin, end = "<!-- table: written by python -m bench.families --write -->\n", "\n<!-- end of table -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if not rest or not after:
        raise ValueError(f"{PAGE} has no place for a table")
    return before + begin + table + end + after


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.families", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--families", help=f"comma-separated, of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each ratio of times; 0 measures no speed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, default=512, help="of the models that are timed")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = Size(args.width, args.layers, 8192, args.length)
    names = args.families.split(",") if args.families else list(FAMILIES)
    lines = [HEAD]
    print(HEAD)
    for name in names:
        lines.append(row(name, Size(), size, args.seconds))
        print(lines[-1], flush=True)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_table(page, "\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
