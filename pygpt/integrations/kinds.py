"""The kinds of modules that `pygpt.patch` serves: how each is recognised, and the forward that it gets.

A kind is the first base of the class that a module is given; the module's own class is the second. So everything but
`forward` stays the module's own, and ``super().forward`` is the forward that it had. What a recogniser finds out about
a module, its facts, become attributes of that class, so that the module itself holds nothing new.

A recogniser returns the facts, or None. Where a structure alone could lie, the module's own forward is run on a small
float32 problem with weights of its own, or on meta tensors, and must agree with the formula of our op. Neither reads
the module's parameters nor draws from torch's generator.
"""

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, update_wrapper
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .. import dispatch, functional
from ..nn import Linear
from ..nn.fusing import FORWARDS, has_plain_parameters, is_unmodified
from ..ops.activation import ACTIVATIONS, GATED
from .transposed import FEW_ROWS, transposed_linear

Facts = dict[str, Any] | None
_Base: Any = object  # a kind always stands before a module's class


class Kind(_Base):
    """A base of the classes that `patched_class` makes."""

    _original: ClassVar[Any]
    serves: ClassVar[str]  # by which op, for the report

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle holds the original class, so that it can be read without pygpt."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *state = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined] # which wants the object's own class
            function, args = copyreg._reconstructor, (*args, object, None)  # type: ignore[attr-defined]
        return function, tuple(map(_originals, args)), *state

    def __copy__(self) -> Any:
        return self._copied(lambda state: dict(state))

    def __deepcopy__(self, memo: dict) -> Any:
        return self._copied(lambda state: copy.deepcopy(state, memo), memo)

    def _copied(self, copied: Callable, memo: dict | None = None) -> Any:
        state: Any = super().__reduce_ex__(4)[2]
        new = type(self).__new__(type(self))
        if memo is not None:
            memo[id(self)] = new
        state = copied(state)
        setstate = getattr(new, "__setstate__", None)
        if setstate is None:
            new.__dict__.update(state)
        else:
            setstate(state)
        return new


def is_patched(module: nn.Module) -> bool:
    """Whether the module's class is one of ours, and not derived from one, as a parametrization's is."""
    return "_original" in vars(type(module))


def original_class(module: nn.Module) -> Any:
    return _originals(type(module))


def _originals(made: Any) -> Any:
    return vars(made).get("_original", made) if isinstance(made, type) else made


@cache
def patched_class(kind: Any, original: Any, facts: tuple[tuple[str, Any], ...]) -> type:
    """The class, of the original's name, for modules of the original class with these facts."""
    own: Any = kind.forward
    forward = FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    names["forward"] = update_wrapper(forward, original.forward)  # inspect.signature gives the original's
    made = type(original)(original.__name__, (kind, original), {**names, **dict(facts), "_original": original})
    FORWARDS[made] = made.forward
    return made


# ------------------------------------------------------------------------------- probing a module
FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, in which dropout draws nothing; the modes come back as they were."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """The hooks of a module and of its children are put aside, so that a probe calls none of them."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    kept = [(m, name, getattr(m, name)) for m in module.modules() for name in names]
    try:
        for m, name, _ in kept:
            setattr(m, name, OrderedDict())
        yield
    finally:
        for m, name, hooks in kept:
            setattr(m, name, hooks)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def result_of(module: nn.Module, tensors: dict[str, Tensor], *inputs: Tensor) -> Any:
    """What the module gives with these parameters and buffers, or None where it fails."""
    try:
        with evaluating(module):
            return functional_call(module, tensors, inputs)
    except FAILURES:
        return None


def agrees(result: Any, formula: Callable[[], Tensor]) -> bool:
    """Whether the result is the formula's, within the tolerance of torch.testing for its dtype."""
    if not isinstance(result, Tensor):
        return False
    try:
        torch.testing.assert_close(result, formula())
    except AssertionError:
        return False
    return True


def _is_leaf(module: nn.Module) -> bool:
    return not (module._modules or module._buffers)


def _parameters(module: nn.Module) -> dict[str, Any]:
    return {name: p for name, p in module._parameters.items() if p is not None}


# ------------------------------------------------------------------------------- torch's own classes
class Plain(Kind):
    """A module of exactly one class of torch.nn."""

    _torchs: ClassVar[type]

    @classmethod
    def recognise(cls, module: Any) -> Facts:
        return {} if type(module) is cls._torchs else None


class PlainLinear(Plain):
    serves = "linear"
    _torchs = nn.Linear

    def forward(self: Any, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class PlainLayerNorm(Plain):
    serves = "layer_norm"
    _torchs = nn.LayerNorm

    def forward(self: Any, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class PlainRMSNorm(Plain):
    serves = "rms_norm"
    _torchs = nn.RMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


LINEARS = (nn.Linear, Linear, patched_class(PlainLinear, nn.Linear, ()))


def is_plain_linear(module: Any) -> bool:
    return is_unmodified(module, *LINEARS) and has_plain_parameters(module)


# ------------------------------------------------------------------------------- norms written by hand
class HandNorm(Kind):
    """A norm over the last dimension. An input of another dtype than the weight's gets the module's own forward, whose
    result has the dtype to which its expression promotes."""

    _eps: ClassVar[Any]  # the name of the module's attribute, or a number

    def _served(self: Any, args: tuple, kwargs: dict) -> bool:
        return len(args) == 1 and not kwargs and args[0].dtype == self.weight.dtype

    def _epsilon(self) -> float:
        return getattr(self, self._eps) if isinstance(self._eps, str) else self._eps


class HandRMSNorm(HandNorm):
    serves = "rms_norm"
    _offset: ClassVar[float]

    @staticmethod
    def recognise(module: Any) -> Facts:
        if not _is_leaf(module) or _parameters(module).keys() != {"weight"} or module.weight.dim() != 1:
            return None
        for name, eps in _epsilons(module):
            x, weight = _rows(len(module.weight), eps), draw(len(module.weight))
            result = result_of(module, {"weight": weight}, x)
            for offset in (0.0, 1.0):
                if agrees(result, partial(dispatch.REFERENCE.rms_norm, x, weight, eps, offset)):
                    return {"_eps": name, "_offset": offset}
        return None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self._served(args, kwargs):
            return super().forward(*args, **kwargs)
        weight = self.weight
        return functional.rms_norm(args[0], weight.shape, weight, self._epsilon(), weight_offset=self._offset)


class HandLayerNorm(HandNorm):
    serves = "layer_norm"

    @staticmethod
    def recognise(module: Any) -> Facts:
        parameters = _parameters(module)
        known = parameters.keys() in ({"weight"}, {"weight", "bias"}) and hasattr(module, "bias")
        if not _is_leaf(module) or not known or any(p.dim() != 1 for p in parameters.values()):
            return None
        tensors = {name: draw(*p.shape) for name, p in parameters.items()}
        for name, eps in (*_epsilons(module), (1e-5, 1e-5)):
            x = _rows(len(module.weight), eps)
            result = result_of(module, tensors, x)
            formula = partial(dispatch.REFERENCE.layer_norm, x, tensors["weight"], tensors.get("bias"), eps)
            if agrees(result, formula):
                return {"_eps": name}
        return None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self._served(args, kwargs):
            return super().forward(*args, **kwargs)
        return functional.layer_norm(args[0], self.weight.shape, self.weight, self.bias, self._epsilon())


EPSILONS = "variance_epsilon", "eps", "epsilon", "norm_eps"  # what modules call it


def _epsilons(module: nn.Module) -> list[tuple[str, float]]:
    return [(name, eps) for name in EPSILONS if isinstance(eps := getattr(module, name, None), float)]


def _rows(n: int, eps: float) -> Tensor:
    """Rows of which some are so small that eps decides, and some have a mean."""
    scale = torch.tensor([1.0, eps**0.5, 1.0, 30.0])
    return draw(4, n) * scale[:, None] + torch.tensor([0.0, 0.0, 2.0, 0.0])[:, None]


# ------------------------------------------------------------------------------- activations
_EXPRESSIONS = {**{name: of[0] for name, of in ACTIVATIONS.items() if name not in GATED}, "silu": F.silu}


def activation_of(module: nn.Module) -> str | None:
    """Which activation the module computes: one of mlp's that is not gated, or "silu"; None if it is another one."""
    if not _is_leaf(module) or _parameters(module):
        return None
    inputs = torch.linspace(-20.0, 20.0, 801), torch.tensor([-1e4, -1e2, 1e2, 1e4])  # far ones, too: it may clip
    results = [result_of(module, {}, x.clone()) for x in inputs]  # clones, because the module may work in place
    for name, of in _EXPRESSIONS.items():
        if all(agrees(result, partial(of, x)) for x, result in zip(inputs, results, strict=True)):
            return name
    return None


class HandGELU(Kind):
    serves = "gelu"
    _approximate: ClassVar[str]

    @staticmethod
    def recognise(module: Any) -> Facts:
        name = activation_of(module) if "gelu" in type(module).__name__.lower() else None
        return {"_approximate": {"gelu": "none", "gelu_tanh": "tanh"}[name]} if name in ("gelu", "gelu_tanh") else None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        return functional.gelu(args[0], self._approximate)


# ------------------------------------------------------------------------------- MLPs
class HandMLP(Kind):
    """Two layers around an activation, as one op while both are plain and no dropout before the second is active."""

    serves = "mlp"
    _names: ClassVar[tuple[str, str, str]]  # of the first layer, the activation and the second layer
    _activation: ClassVar[str]
    _activation_class: ClassVar[type]
    _before: ClassVar[tuple[str, ...]] = ()  # dropouts that come before the second layer
    _after: ClassVar[tuple[str, ...]] = ()  # and those that come after it

    @staticmethod
    def recognise(module: Any) -> Facts:
        children: dict[str, Any] = dict(module.named_children())
        layers = [name for name, child in children.items() if type(child) in LINEARS]
        dropouts = {name for name, child in children.items() if type(child) is nn.Dropout}
        others = [name for name in children if name not in layers and name not in dropouts]
        if len(layers) != 2 or len(others) != 1 or module._parameters or module._buffers:
            return None
        activation = activation_of(children[others[0]])
        order = _order(module) or []
        names = tuple(name for name in order if name not in dropouts)
        if activation in ACTIVATIONS and activation not in GATED and names[1:2] == (*others,) and len(names) == 3:
            at = order.index(names[2])
            placed = {"_before": tuple(dropouts.intersection(order[:at])), "_after": tuple(order[at + 1 :])}
        elif _is_gated(module, layers, gated := {"silu": "swiglu", "gelu": "geglu"}.get(activation or "")):
            names, activation, placed = (layers[0], others[0], layers[1]), gated, {}
        else:
            return None
        act_class = original_class(children[others[0]])
        FORWARDS.setdefault(act_class, act_class.forward)  # which is_unmodified knows
        return {"_names": names, "_activation": activation, "_activation_class": act_class, **placed}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        fc, act, proj = (getattr(self, name) for name in self._names)
        fused = len(args) == 1 and not kwargs and is_plain_linear(fc) and is_plain_linear(proj)
        fused = fused and fc.weight.dtype == proj.weight.dtype and all(map(self._is_off, self._before))
        if not (fused and original_class(act) is self._activation_class and is_unmodified(act, type(act))):
            return super().forward(*args, **kwargs)
        y = functional.mlp(args[0], fc.weight, fc.bias, proj.weight, proj.bias, self._activation)
        for name in self._after:
            y = getattr(self, name)(y)
        return y

    def _is_off(self, name: str) -> bool:
        dropout: Any = getattr(self, name)
        return is_unmodified(dropout, nn.Dropout) and (not dropout.training or dropout.p == 0)


def _order(module: nn.Module) -> list[str] | None:
    """The children in the order of their calls, if each gets the result of the one before it and nothing else.

    Found on meta tensors, which cost nothing.
    """
    calls: list[tuple[str, tuple, Any]] = []

    def noted(name: str) -> Callable:
        return lambda child, args, result: calls.append((name, args, result))

    meta = {name: torch.empty_like(p, device="meta") for name, p in module.named_parameters()}
    x = torch.empty(2, next(iter(meta.values())).shape[-1], device="meta", dtype=next(iter(meta.values())).dtype)
    handles = [child.register_forward_hook(noted(name)) for name, child in module.named_children()]
    try:
        result = result_of(module, meta, x)
    finally:
        for handle in handles:
            handle.remove()
    passed = (x, *(out for _, _, out in calls))
    straight = all(len(args) == 1 and args[0] is given for (_, args, _), given in zip(calls, passed, strict=False))
    return [name for name, _, _ in calls] if calls and straight and result is passed[-1] else None


def _is_gated(module: nn.Module, layers: list[str], activation: str | None) -> bool:
    """Whether the module is mlp with this gated activation, the gate's rows before the value's."""
    tensors: dict[str, Any] = {}
    for name, shape in zip(layers, ((12, 5), (5, 6)), strict=True):
        tensors[f"{name}.weight"] = draw(*shape)
        tensors[f"{name}.bias"] = draw(shape[0]) if getattr(module, name).bias is not None else None
    given = {name: t for name, t in tensors.items() if t is not None}
    x = draw(3, 5)
    result = result_of(module, given, x) if activation else None
    return agrees(result, lambda: dispatch.REFERENCE.mlp(x, *tensors.values(), activation))


# ------------------------------------------------------------------------------- GPT-2's Conv1D
class Conv1D(Kind):
    """A linear layer whose weight (in, out) lies transposed."""

    serves = "linear"

    @staticmethod
    def recognise(module: Any) -> Facts:
        parameters = _parameters(module)
        if not _is_leaf(module) or parameters.keys() != {"weight", "bias"} or module.weight.dim() != 2:
            return None
        outputs = module.weight.shape[1]
        inputs = 3 if outputs != 3 else 5
        x, weight, bias = draw(2, 4, inputs), draw(inputs, outputs), draw(outputs)
        result = result_of(module, {"weight": weight, "bias": bias}, x)
        return {} if agrees(result, lambda: F.linear(x, weight.t(), bias)) else None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or args[0].numel() < FEW_ROWS * args[0].shape[-1]:
            return super().forward(*args, **kwargs)
        return transposed_linear(args[0], self.weight, self.bias)


# ------------------------------------------------------------------------------- the attention of nanoGPT and minGPT
class NanoAttention(Kind):
    """Causal self-attention with queries, keys and values from one c_attn, and c_proj behind it."""

    serves = "qkv_attention"

    @staticmethod
    def recognise(module: Any) -> Facts:
        children: dict[str, Any] = dict(module.named_children())
        if children.keys() != {"c_attn", "c_proj", "attn_dropout", "resid_dropout"} or module._parameters:
            return None
        heads, C = getattr(module, "n_head", None), children["c_proj"].weight.shape[0]
        layers = children["c_attn"], children["c_proj"]
        known = all(type(layer) in LINEARS for layer in layers) and type(children["attn_dropout"]) is nn.Dropout
        if not known or not isinstance(heads, int) or C // heads > dispatch.fast_head_dim:
            return None
        sizes = {name: p.shape for name, p in module.named_parameters()}
        drawn = {name: draw(*shape) / shape[-1] ** 0.5 for name, shape in sizes.items()}
        x, buffers = draw(2, 5, C), {name: b.cpu() for name, b in module.named_buffers()}

        def formula() -> Tensor:
            qkv = F.linear(x, drawn["c_attn.weight"], drawn.get("c_attn.bias"))
            y = dispatch.REFERENCE.qkv_attention(qkv, heads, heads, True, (C // heads) ** -0.5, None, 0.0, -1, -1)
            return F.linear(y, drawn["c_proj.weight"], drawn.get("c_proj.bias"))

        return {} if agrees(result_of(module, {**drawn, **buffers}, x), formula) else None

    def forward(self: Any, x: Tensor) -> Tensor:
        dropout = self.attn_dropout
        if not is_unmodified(dropout, nn.Dropout):
            return super().forward(x)
        dropout_p = dropout.p if dropout.training else 0.0
        y = functional.qkv_attention(self.c_attn(x), self.n_head, dropout_p=dropout_p, is_causal=True)
        return self.resid_dropout(self.c_proj(y))


KINDS: tuple[Any, ...] = (
    PlainLinear, PlainLayerNorm, PlainRMSNorm, HandRMSNorm, HandLayerNorm, HandGELU, HandMLP, Conv1D, NanoAttention,
)  # fmt: skip
