"""One training step of any model, after which the model is what it was: what `report` and `audit` share."""

import dataclasses
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.common import check_module


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists, mappings and dataclasses, each with its path, such as "[0].logits"."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), f"{path}.{field.name}")


def check_call(caller: str, model: Any, inputs: tuple[tuple, dict], name: str = "model") -> None:
    """TypeError or ValueError for what is no module, or cannot be run: a model on the meta device, or a lazy one.

    A batch of transformers is a mapping, which such a model takes as keywords alone.
    """
    check_module(caller, model, name)
    args, kwargs = inputs
    if hasattr(model, "config") and len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
        raise TypeError(f"pygpt.{caller}: this model takes its batch as keywords: pygpt.{caller}(model, **batch)")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(t) or t.is_meta:
            raise ValueError(f"pygpt.{caller}: {name} has no values yet; give the model some first")
    for path, t in tensors_in(inputs):
        if t.is_meta:
            raise ValueError(f"pygpt.{caller}: the input {path} is on the meta device and has no values")


# ------------------------------------------------------------------------------- the step
def differentiable(output: Any) -> list[Tensor]:
    return [t for _, t in tensors_in(output) if t.requires_grad and t.dtype.is_floating_point]


def loss_of(output: Any) -> Tensor | None:
    """The model's own loss: what its output calls ``loss``, or a number that needs a gradient. None if it has none."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    numbers = [t for t in differentiable(output if named is None else named) if t.dim() == 0]
    return numbers[0] if numbers else None


def train_step(call: Callable, inputs: tuple, kwargs: dict) -> Any:
    """Forward and backward -> the model's output. Backward starts at the model's loss.

    A model without a loss gets random gradients for its outputs, the same in every step: multiples of 1/8 up to 2,
    which every floating dtype holds exactly. (The gradient of a mean would cancel in a norm.)
    """
    output = call(*inputs, **kwargs)
    loss = loss_of(output)
    tensors = differentiable(output) if loss is None else [loss]
    generator = torch.Generator().manual_seed(0)
    grads = [None] if loss is not None else [
        (torch.randint(-16, 17, t.shape, generator=generator) / 8).to(t.device, t.dtype) for t in tensors
    ]  # fmt: skip
    if tensors:
        torch.autograd.backward(tensors, grads)
    return output


# ------------------------------------------------------------------------------- putting things back
@contextmanager
def random_numbers_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts back the random generators of Python and torch, on the CPU and on the GPUs that hold the tensors."""
    gpus = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    of_python = random.getstate()
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(of_python)


@contextmanager
def unchanged(models: Iterable[nn.Module], inputs: Any) -> Iterator[None]:
    """Puts back what steps inside change: parameters, buffers, gradients, training modes and random generators.

    The gradients are None at the start. Parameters and buffers are copied, and copied back if they were written to.
    """
    modules = list({m: None for model in models for m in model.modules()})
    held: list[tuple[dict, dict]] = [
        (holder, dict(holder)) for m in modules for holder in (m._parameters, m._buffers) if holder
    ]
    tensors = list({id(t): t for _, named in held for t in named.values() if t is not None}.values())
    copies = [(t, t._version, t.detach().clone()) for t in tensors]
    everything = [*tensors, *(t for _, t in tensors_in(inputs))]
    grads = [(t, t.grad) for t in everything if t.is_leaf and t.requires_grad]
    training = [(m, m.training) for m in modules]
    with random_numbers_kept(everything):
        try:
            clear_gradients(everything)
            yield
        finally:
            for m, mode in training:
                m.training = mode
            for t, grad in grads:
                t.grad = grad
            for holder, named in held:
                holder.clear()
                holder.update(named)
            with torch.no_grad():
                for t, version, copy in copies:
                    if t._version != version or not torch.equal(t, copy):  # BatchNorm's statistics keep their version
                        t.copy_(copy)


def clear_gradients(tensors: Iterable[Tensor]) -> None:
    for t in tensors:
        if t.is_leaf:
            t.grad = None


def without_compilation() -> Any:
    """A context in which torch.compile's modules run eagerly, because modes see nothing of a compiled graph."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def outputs_seen(see: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Shows the output of every call of a module in this thread. Hooks would keep modules from being fused."""
    original, thread = nn.Module.__call__, threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original(module, *args, **kwargs)
        if threading.get_ident() == thread:
            see(module, output)
        return output

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
