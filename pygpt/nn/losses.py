"""The cross-entropy, of logits or together with the Linear layer that makes them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .layers import Linear


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on `pygpt.functional.cross_entropy`, with its ``z_loss``.

    ``device`` and ``dtype`` are those of ``weight``, which otherwise keeps its own.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        weight = None if weight is None else weight.to(device, dtype)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (N, V, ...) and classes (N, ...) -> the loss. See `pygpt.functional.cross_entropy`."""
        return functional.cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss,
        )  # fmt: skip


class LinearCrossEntropyLoss(nn.Module):
    """A Linear layer and the cross-entropy of its outputs, by `pygpt.functional.linear_cross_entropy`.

    The arguments and parameter names are those of torch.nn.LinearCrossEntropyLoss, which torch has since 2.13, and
    ``z_loss``. ``out_features`` (d1, ...) gives every input d1 x ... losses, as PyTorch computes them. A weight of
    another shape than (num_classes,) raises ValueError.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            got = tuple(weight.shape)
            raise ValueError(f"pygpt.nn.LinearCrossEntropyLoss: weight must have shape ({num_classes},), got {got}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(
                f"pygpt.nn.LinearCrossEntropyLoss: label_smoothing must be from 0 to 1, got {label_smoothing}"
            )
        self.num_classes, self.out_features, self.reduction = num_classes, out_features, reduction
        self.ignore_index, self.label_smoothing, self.options, self.z_loss = (
            ignore_index, label_smoothing, options, z_loss,
        )  # fmt: skip
        self.register_buffer("weight", weight)
        self.linear = Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """``input (N, in_features)`` and classes (N,) -> the loss."""
        linear_weight: Tensor = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        if self.out_features:
            shape = self.num_classes, *self.out_features
            linear_weight = linear_weight.view(*shape, self.linear.in_features)
            linear_bias = None if linear_bias is None else linear_bias.view(shape)
        return functional.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, reduction=self.reduction,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, options=self.options,
            z_loss=self.z_loss,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, z_loss={self.z_loss}"
        )
