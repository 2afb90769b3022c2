"""The layers of pygpt's kernel for Hugging Face's `kernels`: each is a forward for the layer whose place it takes.

`kernelize` puts the forward of a layer here in the place of a module's own, which keeps its weights and attributes. So
a layer has no state, and its forward has the parameters of the one that it replaces.
"""

from typing import Any

from torch import Tensor, nn

from .. import functional
from .kinds import EPSILONS, PlainLayerNorm, PlainLinear


class Linear(nn.Module):
    """Takes the place of torch.nn.Linear and of what has its attributes."""

    can_torch_compile = True
    forward = PlainLinear.forward


class LayerNorm(nn.Module):
    """Takes the place of torch.nn.LayerNorm and of what has its attributes."""

    can_torch_compile = True
    forward = PlainLayerNorm.forward


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in x's dtype, times the weight, as in Llama. The attribute with eps is called
    variance_epsilon, eps, epsilon or norm_eps."""

    can_torch_compile = True

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        x, weight, eps = hidden_states, self.weight, _epsilon(self)
        if weight is None or x.dtype == weight.dtype:
            return functional.rms_norm(x, x.shape[-1:], weight, eps)
        return weight * functional.rms_norm(x, weight.shape, None, eps)  # torch's promotion decides the result's dtype


class RMSNormZeroCentered(nn.Module):
    """The same, times 1 + weight and in float32, rounded to x's dtype once, as in Gemma and Qwen3-Next."""

    can_torch_compile = True

    def forward(self: Any, x: Tensor) -> Tensor:
        wide, weight = x, self.weight
        if x.dtype != weight.dtype:
            wide, weight = x.float(), weight.float()
        return functional.rms_norm(wide, weight.shape, weight, _epsilon(self), weight_offset=1.0).to(x.dtype)


class GELU(nn.Module):
    """The exact GELU, with the error function."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input)


class GELUTanh(nn.Module):
    """The tanh approximation of GELU, gelu_new in transformers."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, "tanh")


def _epsilon(module: Any) -> float | None:
    for name in EPSILONS:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"pygpt: {type(module).__name__} has none of {', '.join(EPSILONS)}")
