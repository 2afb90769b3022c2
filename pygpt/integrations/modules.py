"""`pygpt.patch` serves a model's modules by our kernels: norms, linear layers, GELU, MLPs, attention and the loss.

A module that is recognised (kinds.py, heads.py) gets a subclass of its class, of the same name, with another forward.
Its parameters, buffers, hooks and attributes stay as they are, and so do state dicts and everything that asks
isinstance. `unpatch` puts the class back.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..ops.common import check_module
from . import heads, kinds, rotary
from .kinds import is_patched, patched_class


@dataclass
class Report:
    """What `patch` did: ``served`` maps a module's name to the op that serves it, ``left`` to why it was left alone."""

    served: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def loss(self) -> bool:
        """Whether the loss is computed without all logits, which are None while labels are given."""
        return heads.SERVES in self.served.values()

    def __str__(self) -> str:
        served, left = len(self.served), len(self.left)
        lines = [f"pygpt serves {served} module{'s' * (served != 1)}, {left} {'is' if left == 1 else 'are'} left alone"]
        lines += [f"  {op}: {names}" for op, names in _grouped(self.served)]
        lines += [f"  not {names}: {reason}" for reason, names in _grouped(self.left)]
        if self.loss:
            lines.append("  the output's logits are None while labels are given")
        return "\n".join(_wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _grouped(of_names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Each value with its names, in which the numbers of layers are counted as one name."""
    groups: dict[str, dict[str, int]] = {}
    for name, value in of_names.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split(".")) or "the model"
        names = groups.setdefault(value, {})
        names[pattern] = names.get(pattern, 0) + 1
    for value, names in groups.items():
        yield value, ", ".join(f"{name} ({count})" if count > 1 else name for name, count in names.items())


def patch(model: nn.Module, loss: bool = False) -> Report:
    """Serves the modules of ``model`` by pygpt's kernels, in place, and returns a `Report` of what is served.

    Recognised are torch.nn's LayerNorm, RMSNorm and Linear; norms, GELUs, MLPs and GPT-2's Conv1D written by hand, as
    in transformers; rotary positions in the attention of transformers; and the attention of nanoGPT and minGPT.
    Subclasses of these, such as quantised layers, are left alone, and adapters keep working. The attention of
    transformers itself is served by attn_implementation="pygpt" (`pygpt.integrations.transformers.register`).

    With ``loss=True``, the loss of a causal language model is computed from the last hidden states without all logits
    in memory. The output's logits are then None while labels (nanoGPT: targets) are given.

    A second call changes nothing, and `unpatch` takes all of it back. Pickles hold the original classes. TypeError for
    what is no module. ValueError if nothing is recognised, or if the loss of this model cannot be served; then the
    model is untouched.
    """
    check_module("patch", model)
    report = Report()
    changes: list[Any] = []
    in_use = (*kinds.KINDS, rotary.RotaryAttention) if rotary.has_plain_tables(model) else kinds.KINDS
    for name, module in model.named_modules():
        if is_patched(module):
            report.served[name] = _kind_of(module).serves
        elif (found := _recognised(module, in_use)) is not None:
            kind, facts = found
            report.served[name] = kind.serves
            changes.append((module, kind, facts))
        elif reason := _why_left(module):
            report.left[name] = reason
    if loss and not report.loss:
        name, module, kind, facts = heads.recognised(model)
        report.served[name] = kind.serves
        report.left.pop(name, None)
        changes.append((module, kind, facts))
    if not report.served:
        raise ValueError(
            f"pygpt.patch: nothing in this {type(model).__name__} is recognised; "
            "pygpt.enable() serves torch's own functions in any model"
        )
    for name, implementation in _attention_of_transformers(model).items():
        report.left[name] = (
            f'attention runs on "{implementation}"; after pygpt.integrations.transformers.register(), '
            'model.set_attn_implementation("pygpt") serves it'
        )
    made: list[Any] = [patched_class(kind, module.__class__, facts) for module, kind, facts in changes]
    for (module, _, _), its_class in zip(changes, made, strict=True):
        module.__class__ = its_class
    return report


def _attention_of_transformers(model: nn.Module) -> dict[str, str]:
    """The names of models of transformers whose attention is not ours, with its implementation."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        inside = any(name.startswith(f"{outer}.".lstrip(".")) for outer in found)
        if hasattr(module, "set_attn_implementation") and implementation not in (None, "pygpt") and not inside:
            found[name] = implementation
    return found


def unpatch(model: nn.Module) -> None:
    """Gives every module of ``model`` the class back that it had before `patch`.

    A model without such modules stays as it is. A module whose class was derived since, as `fully_shard` and
    parametrizations do, keeps that class.
    """
    check_module("unpatch", model)
    for module in model.modules():
        if is_patched(module):
            module.__class__ = kinds.original_class(module)


def _kind_of(module: nn.Module) -> Any:
    return type(module).__bases__[0]


def _recognised(module: nn.Module, in_use: tuple) -> tuple[Any, tuple[tuple[str, Any], ...]] | None:
    if "forward" in vars(module):  # which a class would not replace
        return None
    with kinds.without_hooks(module):
        found = ((kind, kind.recognise(module)) for kind in in_use)
        return next(((kind, tuple(facts.items())) for kind, facts in found if facts is not None), None)


def _why_left(module: nn.Module) -> str:
    """Empty for a module that has no weights of its own, or looks them up only."""
    if isinstance(module, nn.Embedding) or not any(p is not None for p in module._parameters.values()):
        return ""
    if "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(module, nn.MultiheadAttention | nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"in training, pygpt.enable() serves what {type(module).__name__} calls"
    return f"{type(module).__name__} is not recognised"
