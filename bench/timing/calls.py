"""The calls that are timed, and whose memory is measured, made of a function and its inputs."""

import itertools
from collections.abc import Callable
from functools import partial

import torch

from pygpt import verify


def caller(function: Callable, tensors: list[tuple], direction: str, skip: int = 0) -> Callable:
    """Runs ``function`` on the next set of ``tensors``, the first time on number ``skip``; backward: its gradients."""
    calls = [prepared(function, each, direction) for each in tensors]
    ring = itertools.cycle(calls[skip:] + calls[:skip])

    def call():
        next(ring)()  # dropping the result is part of everybody's time (docs/measured.md B3)

    return call


def prepared(function: Callable, tensors: tuple, direction: str, grads: tuple | None = None) -> Callable:
    """A call without arguments -> its results: the outputs, or the gradients of all ``tensors``.

    Backward's forward pass has run when this returns. ``grads``: the upstream gradients; drawn unless given.
    """
    if direction == "forward":
        return partial(function, *tensors)
    outputs, leaves = _forward(function, tensors)
    grads = grads or drawn(outputs)
    return partial(torch.autograd.grad, outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)],
                   retain_graph=True)  # fmt: skip


def drawn(outputs: tuple) -> tuple:
    """Upstream gradients, laid out as the outputs."""
    return tuple(torch.empty_like(o).copy_(torch.randn(o.shape, device=o.device)) for o in outputs)


def once(function: Callable, tensors: tuple, direction: str) -> Callable:
    """A call without arguments that keeps nothing: forward, or forward and backward."""
    if direction == "forward":
        return partial(function, *tensors)

    def both():
        outputs, leaves = _forward(function, tensors)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

    return both


def _forward(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return verify.as_tuple(function(*leaves)), leaves
