"""When a module may fuse its layers: where their parameters say all that calling them would do."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..dispatch import dispatches_for_itself
from .layers import Linear, RMSNorm

FORWARDS: dict[type, Callable] = {
    module_class: module_class.forward for module_class in (Linear, nn.Linear, nn.Dropout, RMSNorm, nn.RMSNorm)
}


def is_unmodified(module: nn.Module, *classes: type) -> bool:
    """Whether calling the module runs the forward of one of these classes, and nothing else.

    False for subclasses, for a module with a hook (global hooks count), with a `forward` of its own or with a compiled
    call, and for a class whose `forward` was replaced.
    """
    return (
        type(module) in classes
        and type(module).forward is FORWARDS[type(module)]
        and module._compiled_call_impl is None
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks or _has_any_global_hook())
        and module.forward is not None  # always true, but torch.compile guards what this reads, and not the next line
        and "forward" not in module.__dict__
    )


def is_unmodified_linear(module: nn.Module) -> bool:
    """Whether calling the module is `functional.linear` with its weight and bias, and nothing else.

    Only then may a module that fuses its layers read their parameters instead of calling them. False for adapters,
    parametrized, pruned, weight-normed and quantised layers, and for weights of a tensor subclass that dispatches
    for itself. DTensor does not count, because it has rules for the fused op.
    """
    return is_unmodified(module, Linear, nn.Linear) and has_plain_parameters(module)


def has_plain_parameters(linear: Any) -> bool:
    """Whether weight and bias are parameters, and no tensors of a class that dispatches for itself."""
    if not linear._parameters.keys() >= {"weight", "bias"}:
        return False
    weight, bias = linear.weight, linear.bias
    return not dispatches_for_itself(type(weight)) and (bias is None or not dispatches_for_itself(type(bias)))


def is_norm_of_rope(norm: nn.Module) -> bool:
    """Whether calling the module is the norm that rope computes with its weight and eps, and nothing else."""
    weight: Tensor | None = norm._parameters.get("weight")
    has_both = weight is not None and weight.dim() == 1 and isinstance(norm.eps, float)
    return has_both and is_unmodified(norm, RMSNorm, nn.RMSNorm)


def apply_dropout(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), without the call where it is an unmodified nn.Dropout in evaluation."""
    return x if not module.training and is_unmodified(module, nn.Dropout) else module(x)
