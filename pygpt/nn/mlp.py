"""The MLP of a GPT block, and the layout of a gated one's weights."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, reference
from .fusing import apply_dropout, is_unmodified_linear
from .layers import Linear


def fuse_gate(gate: Tensor, up: Tensor) -> Tensor:
    """The weight of a gated MLP's c_fc, from Llama's gate_proj and up_proj: gate's rows, then up's.

    ``gate (H, C)`` and ``up (H, C)`` give ``(2 H, C)``, and biases (H,) alike. down_proj is c_proj. Unequal shapes
    raise ValueError.
    """
    if gate.shape != up.shape:
        raise ValueError(f"pygpt.nn.fuse_gate: gate is {tuple(gate.shape)}, up {tuple(up.shape)}; they must be equal")
    return torch.cat((gate, up))


def split_gate(fused: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of fuse_gate: the halves of ``fused (2 H, C)`` or ``(2 H,)`` as views. An odd height raises
    ValueError."""
    if fused.dim() == 0 or len(fused) % 2:
        raise ValueError(f"pygpt.nn.split_gate: fused must have an even number of rows, got {tuple(fused.shape)}")
    gate, up = fused.chunk(2)
    return gate, up


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def product(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, -1)
        return activation(gate) * value

    return product


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "swiglu": _gated(F.silu),
    "geglu": _gated(functional.gelu),
}


class MLP(nn.Module):
    """c_proj(act(c_fc(x))) and dropout; x (..., embed_dim) -> (..., embed_dim).

    ``hidden_dim`` defaults to 4 * embed_dim. ``activation`` is "gelu" (exact), "gelu_tanh", "relu" or "relu2", or it is
    gated: for "swiglu" and "geglu" c_fc has 2 * hidden_dim outputs, the gates before the values (see `fuse_gate`).
    Others raise ValueError. One fused op computes both layers while c_fc and c_proj are exactly torch.nn.Linear or
    pygpt.nn.Linear with ordinary parameters and no hook. Otherwise (adapters, pruning, parametrizations, tensor
    parallelism, ...) each layer is called.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        activation: str = "gelu_tanh",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in reference.ACTIVATIONS:
            known = ", ".join(reference.ACTIVATIONS)
            raise ValueError(f"pygpt.nn.MLP: unknown activation {activation!r}; known: {known}")
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        self.activation = activation
        outputs = 2 * hidden_dim if activation in reference.GATED else hidden_dim
        self.c_fc = Linear(embed_dim, outputs, bias, device, dtype)
        self.c_proj = Linear(hidden_dim, embed_dim, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draws c_fc and c_proj anew, as torch.nn.Linear does."""
        self.c_fc.reset_parameters()
        self.c_proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., embed_dim)`` -> ``(..., embed_dim)``."""
        fc, proj = self.c_fc, self.c_proj
        if is_unmodified_linear(fc) and is_unmodified_linear(proj):
            y = functional.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, self.activation)
        else:
            y = proj(_ACTIVATIONS[self.activation](fc(x)))
        return apply_dropout(self.dropout, y)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
