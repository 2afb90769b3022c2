"""LayerNorm, RMSNorm and Linear: torch's, with another forward."""

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import functional


@fx.wrap  # symbolic_trace records the call itself: while tracing, an omitted residual is a Proxy and not None
def _layer_norm(input: Tensor, residual: Tensor | None, *affine: Any) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return functional.layer_norm(input, *affine)
    return functional.add_layer_norm(input, residual, *affine)


@fx.wrap
def _rms_norm(input: Tensor, residual: Tensor | None, *affine: Any) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return functional.rms_norm(input, *affine)
    return functional.add_rms_norm(input, residual, *affine)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on `pygpt.functional.layer_norm`.

    Called with a residual, it also adds, in the same pass over memory. A scripted module takes no residual.
    """

    @overload
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, input: Tensor, residual: Tensor | None = None):  # type: ignore[no-untyped-def]
        """Returns the norm of ``input (..., *normalized_shape)``; with a residual of that shape, the sum's norm and the
        sum."""
        if torch.jit.is_scripting():
            assert residual is None, "a scripted pygpt.nn.LayerNorm takes no residual"
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return _layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm on `pygpt.functional.rms_norm`. A residual is added as by `LayerNorm`."""

    @overload
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, input: Tensor, residual: Tensor | None = None):  # type: ignore[no-untyped-def]
        """Returns the norm of ``input (..., *normalized_shape)``; with a residual of that shape, the sum's norm and the
        sum."""
        if torch.jit.is_scripting():
            assert residual is None, "a scripted pygpt.nn.RMSNorm takes no residual"
            return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)
        return _rms_norm(input, residual, self.normalized_shape, self.weight, self.eps)


class Linear(nn.Linear):
    """torch.nn.Linear on `pygpt.functional.linear`; input (..., in_features) -> (..., out_features).

    Tools that look for torch.nn.Linear by its exact type, such as torch.ao.quantization.quantize_dynamic, silently
    ignore this class. Set ``module.__class__ = torch.nn.Linear`` for every such module first.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input (..., in_features)`` -> ``(..., out_features)``."""
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        return functional.linear(input, self.weight, self.bias)
