"""What a family's models are compared by: results and their errors, FLOPs, greedy tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .models import quiet


def logits_and_loss(out: Any) -> tuple[Tensor | None, Tensor]:
    """Of what a model returns: transformers' output, or the pair of nanoGPT and minGPT."""
    return (out.logits, out.loss) if hasattr(out, "logits") else out


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A training step without an optimizer: the loss, the logits where there are any, and the gradients, by name."""
    model.zero_grad()
    logits, loss = logits_and_loss(model(**batch))
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
    with quiet():
        return model.eval().generate(**given, max_new_tokens=tokens, do_sample=False)
