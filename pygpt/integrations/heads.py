"""The loss heads that `pygpt.patch(model, loss=True)` serves by linear_cross_entropy, which never holds all logits.

They are the causal language models of transformers whose logits are ``lm_head(hidden states)`` and nothing more, and
the GPT of nanoGPT and minGPT. A head is recognised by running the model on three tokens.
"""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import linear_cross_entropy
from ..model import _float32_losses
from .kinds import FAILURES, LINEARS, Facts, Kind, evaluating, is_plain_linear

SERVES = "linear_cross_entropy"


class CausalHead(Kind):
    """A causal language model of transformers. With labels, logits are None.

    Calls that linear_cross_entropy cannot serve get the forward that the model had: those with ``logits_to_keep``, with
    ``return_dict=False``, with more positional arguments than input_ids, or after the head or loss_function was
    replaced.
    """

    serves = SERVES
    _output: ClassVar[type]
    _fields: ClassVar[tuple[str, ...]]

    @staticmethod
    def recognise(module: Any) -> Facts:
        transformers = sys.modules.get("transformers")
        if transformers is None or not isinstance(module, transformers.PreTrainedModel) or module.base_model is module:
            return None
        head, output = module.get_output_embeddings(), _output_class(module)
        standard = sys.modules["transformers.loss.loss_utils"].ForCausalLMLoss
        if type(head) not in LINEARS or output is None or module.loss_function is not standard:
            return None
        ids, names = _ids(head), tuple(field.name for field in dataclasses.fields(output))
        ours = partial(causal_output, module, output, names, ids, labels=ids)
        same = _same_loss(module, head, ours, {"input_ids": ids, "labels": ids})
        return {"_output": output, "_fields": names} if same else None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = not isinstance(keep := kwargs.get("logits_to_keep", 0), Tensor) and keep == 0
        as_dict = kwargs.get("return_dict")
        as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
        served = kwargs.get("labels") is not None and len(args) < 2 and whole and as_dict
        replaced = getattr(self, "_loss_function", None) is not None
        if not served or replaced or not is_plain_linear(self.get_output_embeddings()):
            return super().forward(*args, **kwargs)
        return causal_output(self, self._output, self._fields, *args, **kwargs)


def causal_output(
    module: Any, output: type, names: tuple[str, ...], *args: Any, labels: Tensor, **kwargs: Any
) -> Any:  # fmt: skip
    """The model's result, of the class ``output`` with fields of these names, with the loss and without logits."""
    kwargs = {name: value for name, value in kwargs.items() if name not in ("logits_to_keep", "return_dict")}
    of_trunk = module.base_model(*args, **kwargs)
    options = {name: kwargs[name] for name in ("num_items_in_batch", "ignore_index", "shift_labels") if name in kwargs}
    loss = causal_loss(of_trunk.last_hidden_state, module.get_output_embeddings(), labels, **options)
    return output(**{**{name: getattr(of_trunk, name, None) for name in names}, "loss": loss, "logits": None})


def causal_loss(
    hidden: Tensor, head: Any, labels: Tensor, num_items_in_batch: Any = None, ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of the next tokens of ``labels (B, T)`` after ``hidden (B, T, C)``, as transformers defines it.

    It is the mean of the labels that are not ignored, or their sum over ``num_items_in_batch``. ``shift_labels (B, T)``
    takes the place of the next labels.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    with _float32_losses(hidden):
        loss = linear_cross_entropy(
            hidden.flatten(0, -2), head.weight, shift_labels.to(hidden.device).reshape(-1), linear_bias=head.bias,
            ignore_index=ignore_index, reduction="mean" if num_items_in_batch is None else "sum",
        )  # fmt: skip
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def _output_class(module: nn.Module) -> Any:
    """The class of the forward's result, from its annotation."""
    annotation = inspect.signature(type(module).forward).return_annotation
    for candidate in (annotation, *typing.get_args(annotation)):
        if dataclasses.is_dataclass(candidate) and {"loss", "logits"} <= {
            f.name for f in dataclasses.fields(candidate)
        }:
            return candidate
    return None


class NanoHead(Kind):
    """The GPT of nanoGPT or minGPT: (idx, targets) -> logits, loss. With targets, logits are None."""

    serves = SERVES

    @staticmethod
    def recognise(module: Any) -> Facts:
        children: dict[str, Any] = dict(module.named_children())
        trunk, head = children.get("transformer"), children.get("lm_head")
        named = isinstance(trunk, nn.ModuleDict) and set(trunk) == {"wte", "wpe", "drop", "h", "ln_f"}
        if not named or type(head) not in LINEARS:
            return None
        ids = _ids(head)
        targets = torch.where(ids == ids[0, 1], -1, ids)  # which are ignored
        same = _same_loss(module, head, partial(nano_output, module, ids, targets), {"idx": ids, "targets": targets})
        return {} if same else None

    def forward(self: Any, idx: Tensor, targets: Tensor | None = None) -> Any:
        if targets is None or not is_plain_linear(self.lm_head):
            return super().forward(idx, targets)
        return nano_output(self, idx, targets)


def nano_output(module: Any, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
    """idx and targets (B, T) -> None and the loss."""
    t, head = module.transformer, module.lm_head
    x = t.drop(t.wte(idx) + t.wpe(torch.arange(idx.shape[1], device=idx.device)))
    for block in t.h:
        x = block(x)
    x = t.ln_f(x)
    with _float32_losses(x):
        return None, linear_cross_entropy(
            x.flatten(0, 1), head.weight, targets.reshape(-1), linear_bias=head.bias, ignore_index=-1
        )


# ------------------------------------------------------------------------------- recognising
def recognised(model: nn.Module) -> tuple[str, nn.Module, Any, tuple[tuple[str, Any], ...]]:
    """The language model in ``model``, which may be wrapped: its name, itself, its kind and facts. ValueError if there
    is none."""
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("pygpt.patch: loss=True runs the model on three tokens, and its parameters are on meta")
    for name, module in model.named_modules():
        for kind in (CausalHead, NanoHead):
            if (facts := kind.recognise(module)) is not None:
                return name, module, kind, tuple(facts.items())
    raise ValueError(
        f"pygpt.patch: the loss of this {type(model).__name__} is not the cross-entropy of plain logits from its last "
        "hidden states; leave out loss=True"
    )


def _ids(head: Any) -> Tensor:
    """Three token ids (1, 3)."""
    return (torch.arange(3, device=head.weight.device) % head.weight.shape[0])[None]


def _same_loss(module: nn.Module, head: Any, ours: Callable, inputs: dict[str, Tensor]) -> bool:
    """Whether the model's logits are the head's output, and its loss is what ``ours()`` gives as one."""
    outputs: list[Any] = []
    handle = head.register_forward_hook(lambda _, args, output: outputs.append(output))
    try:
        with evaluating(module):
            theirs = type(module).forward(module, **inputs)
            handle.remove()
            logits, loss = (theirs.logits, theirs.loss) if hasattr(theirs, "logits") else theirs
            if len(outputs) != 1 or logits is not outputs[0]:
                return False
            served = ours()
            our_loss = served.loss if hasattr(served, "loss") else served[1]
            torch.testing.assert_close(*(t.to(logits.dtype) for t in (our_loss, loss)))
            return True
    except (AssertionError, *FAILURES):
        return False
    finally:
        handle.remove()
