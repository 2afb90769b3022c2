"""Rotary positions in the attention of transformers, by `pygpt.functional.rope`.

Those attention modules call a function of their file, apply_rotary_pos_emb. A served module runs the same code over a
copy of the file's globals in which that name is ours, so that models that were not patched keep theirs.
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import dispatch
from ..functional import rope
from ..ops.common import acc_dtype
from .kinds import FAILURES, Facts, Kind, agrees, draw, evaluating

NAME = "apply_rotary_pos_emb"


class RotaryAttention(Kind):
    serves = "rope"
    _rebound: ClassVar[Callable]

    @staticmethod
    def recognise(module: Any) -> Facts:
        rebound = _rebound(type(module).forward)
        return None if rebound is None else {"_rebound": rebound}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:  # an old name, which transformers translates around the code that is run here
            return super().forward(*args, **kwargs)
        return self._rebound(*args, **kwargs)


def has_plain_tables(model: nn.Module) -> bool:
    """Whether the model has rotary tables, and the two halves of all of them are equal, as rope has it."""
    modules: list[Any] = [m for m in model.modules() if "RotaryEmbedding" in type(m).__name__]
    return bool(modules) and all(map(_has_equal_halves, modules))


def _has_equal_halves(module: Any) -> bool:
    device = next((b.device for b in module.buffers()), torch.device("cpu"))
    x, ids = torch.zeros(1, 3, 4, device=device), torch.arange(3, device=device)[None]
    kinds_of_layers = getattr(module, "layer_types", None)
    try:
        with evaluating(module):
            for of_layers in [()] if kinds_of_layers is None else [(name,) for name in kinds_of_layers]:
                for table in module.forward(x, ids, *of_layers):
                    first, second = table.chunk(2, -1)
                    if table.dim() != 3 or not torch.equal(first, second):
                        return False
    except FAILURES:
        return False
    return True


@cache
def _rebound(forward: Any) -> Callable | None:
    """The code of an attention's forward over globals whose apply_rotary_pos_emb is ours, where it has one."""
    code = inspect.unwrap(forward)
    theirs = getattr(code, "__globals__", {}).get(NAME)
    if not isinstance(code, FunctionType) or NAME not in code.__code__.co_names or not callable(theirs):
        return None
    whole, part = (_rotates(theirs, width) for width in (8, 4))
    if not whole:
        return None
    names = {**code.__globals__, NAME: _ours(theirs, part)}
    del names["__name__"]  # or torch.compile would look the names up in the file itself
    rebound = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    rebound.__kwdefaults__ = code.__kwdefaults__
    return rebound


def _rotates(theirs: Callable, width: int) -> bool:
    """Whether the function is rope of the first ``width`` of 8 channels."""
    q, k, angles = draw(2, 2, 3, 8), draw(2, 1, 3, 8), draw(2, 3, width // 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        results = theirs(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    except FAILURES:
        return False
    if not isinstance(results, tuple) or len(results) != 2:
        return False
    ours = dispatch.REFERENCE.rope(q, k, cos, sin, None, None, None, 0.0, False)
    return all(agrees(theirs_of, ours[i].clone) for i, theirs_of in enumerate(results))


def _ours(theirs: Callable, part: bool) -> Callable:
    """apply_rotary_pos_emb by rope. ``part``: whether theirs rotates a part of the channels, too.

    What rope does not do, or does in another dtype than theirs, is left to theirs.
    """

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        R = cos.shape[-1]
        fits = not args and not kwargs and q.dim() == 4 and cos.dim() == 3 and (R == q.shape[-1] or part)
        if not (fits and q.dtype == k.dtype == cos.dtype):
            return theirs(q, k, cos, sin, *args, **kwargs)
        cos, sin = (table[..., : R // 2].to(acc_dtype(q)) for table in (cos, sin))
        return rope(q, k, cos, sin)

    return apply_rotary_pos_emb
