"""The ways in which people train, for every family: each cell is our largest error over PyTorch's in the same way.

Both models are changed alike, and the truth is the float64 model. For torch.compile the cell also says how many graphs
TorchDynamo records of our model and of the unpatched one, in steps of three batch sizes and lengths.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .models import FAMILIES, Size, batch_of, copied, drawn, served
from .results import Errors, errors, in_float64, step

DRAWS = 3


class Way(NamedTuple):
    change: Callable[[nn.Module], None] = lambda model: None  # before the first step, of both models
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext  # each of their steps
    padding: str = ""
    same_function: bool = True  # whether the changed model computes what the unchanged one does
    of_torchs: Callable[[nn.Module], None] | None = None  # what is done to the unpatched model, if not the same
    compiles: bool = False  # of one model of one layer, because it takes long; the graphs are counted


def _compile(model: nn.Module) -> None:
    torch._dynamo.reset()
    model.compile()


def _trace(model: nn.Module) -> None:
    """For the graphs alone, which Inductor would take minutes to compile."""
    torch._dynamo.reset()
    model.compile(backend="aot_eager")


def _checkpoint(model: nn.Module) -> None:
    model.gradient_checkpointing_enable()  # type: ignore[operator]


def add_adapters(model: nn.Module) -> None:
    """LoRA on every linear layer but the last, with weights drawn from a fixed seed."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    head = {"lm_head", "embed_out", "proj_out", "decoder", "classifier"}
    targets = sorted({name for name in linear if name.rpartition(".")[2] not in head})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), model)


def _autocast() -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)


WAYS = {
    "padding": Way(padding="right"),
    "torch.compile": Way(_compile, of_torchs=_trace, compiles=True),
    "bfloat16 autocast": Way(around=_autocast),
    "checkpointing": Way(_checkpoint),
    "LoRA": Way(add_adapters, same_function=False),
}


@contextlib.contextmanager
def _graphs_counted() -> Iterator[Callable[[], int]]:
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    yield lambda: counters["unique_graphs"] - before


def _other_shapes(name: str, size: Size) -> list[Size]:
    """Larger batches, of other lengths where the model takes any."""
    any_length = FAMILIES[name].inputs not in ("pixels", "sound")
    return [size._replace(batch=n, length=size.length - n if any_length else size.length) for n in (3, 5)]


def _serves(way: Way, name: str) -> bool:
    if way.padding:
        return FAMILIES[name].inputs in ("tokens", "two texts")
    return way.change is not _checkpoint or FAMILIES[name].inputs != "idx"


def cell(way: Way, name: str, size: Size, generator: torch.Generator) -> str:
    """The ratio of the largest errors over a few models; empty where the family's inputs or class know no such way."""
    if not _serves(way, name):
        return ""
    if way.compiles:
        size = size._replace(layers=1)
    found: list[Errors] = []
    graphs: list[int] = []
    for _ in range(1 if way.compiles else DRAWS):
        model, batch = drawn(name, size, generator), batch_of(name, size, generator, way.padding)
        results: list[dict[str, Tensor]] = []
        graphs = []
        changes = way.of_torchs or way.change, way.change
        for change, side in zip(changes, (copied(name, size, model), served(name, size, model)), strict=True):
            change(side)
            with _graphs_counted() as count, way.around():
                results.append({key: t.clone() for key, t in step(side, batch).items()})
                for other in _other_shapes(name, size) if way.compiles else ():
                    step(side, batch_of(name, other, generator))
                graphs.append(count())
        if not way.same_function:
            way.change(model)
        found += errors(in_float64(model, batch), *results).values()
    ratio = max(e.ours for e in found) / max(e.torchs for e in found)
    return f"{ratio:.2f}" + (f", graphs {graphs[1]} / {graphs[0]}" if way.compiles else "")


def lines(names: list[str], size: Size) -> Iterator[str]:
    yield f"| family | {' | '.join(WAYS)} |\n|{'---|' * (1 + len(WAYS))}"
    for name in names:
        generator = torch.Generator().manual_seed(0)
        yield f"| {name} | {' | '.join(cell(way, name, size, generator) for way in WAYS.values())} |"
