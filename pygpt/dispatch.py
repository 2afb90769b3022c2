"""The only way from a public function to a kernel.

Each file in pygpt/ops/ registers an `Op`, and backends.py registers each `Backend`. Every call takes these steps in
`call`:

    prepare    the op checks the public arguments and brings them to the canonical arguments of its kernels (a `Call`)
    autocast   casts the tensors as torch casts those of its own function (autocast.py)
    pick       takes the first backend of TABLE that has no objection; an explicitly chosen one must have none
    _run       runs the backend's kernels under the op's autograd Function, or PyTorch's own function

The result of `pick` depends only on the dtype, the device and whether gradients are needed when a call is fast: its
tensors are strided and of torch's own classes, and no mode is active. `call` stores the bound kernel of a fast call in
the dispatch cache, and the public functions of `pygpt.functional` ask `lookup` for it first. `explain` stops after
`pick` and reports every objection.
"""

import inspect
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _is_torch_function_mode_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.overrides import handle_torch_function

from .autocast import autocast

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Unavailable(RuntimeError):
    """An explicitly chosen backend is not available, or cannot serve a call."""


# ------------------------------------------------------------------------------- ops
class Call(NamedTuple):
    """A call of an op in the canonical form that its kernels take."""

    args: tuple  # of <op>_fwd
    features: Collection[str] = ()  # the optional features in use, which not every backend serves
    finish: Callable = lambda results: results  # the op's results -> the result of the public function
    torch: Callable | None = None  # runs PyTorch's own function on the public arguments, where there is one
    error: Exception | None = None  # why no kernel takes the call; raised if PyTorch rejects it, too
    fast: tuple | None = None  # the tensors of a call that the dispatch cache may serve
    options: Mapping = {}  # keyword arguments of the composite
    seed: int | None = None  # the place in args of the seed for dropout, which is drawn when the call runs

    def seeded(self) -> "Call":
        """The call with a new seed, where it needs one."""
        if self.seed is None:
            return self
        seed = new_seed(self.args[0])
        return self._replace(args=(*self.args[: self.seed], seed, *self.args[self.seed + 1 :]))


def new_seed(like: Tensor) -> Tensor:
    """A seed for dropout from torch's generator, on the device of ``like``."""
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, (1,), dtype=torch.int64, device=like.device)


@dataclass(frozen=True)
class Op:
    """Everything about one op. Functions named <op> take the canonical arguments."""

    name: str
    public: Callable  # in `pygpt.functional`; its annotations say which arguments are tensors, and which may be None
    prepare: Callable  # public arguments -> Call
    composite: Callable  # <op>: PyTorch's ordinary expression, differentiable any number of times
    fwd: Callable  # <op>_fwd, the explicit forward -> the results and what backward reads
    bwd: Callable  # <op>_bwd, the explicit backward
    function: Any  # the torch.autograd.Function over kernels <op>_fwd and <op>_bwd
    specs: Mapping  # name -> `pygpt.verify.Spec`: how verify draws and judges it
    results: int = 1  # how many results of <op>_fwd the caller gets; the others are for backward
    flops: tuple | None = None  # formulas for <op>_fwd and <op>_bwd of their arguments, and of out_val
    lower_precision: bool = False  # whether autocast runs it in its lower dtype
    float32_on_cuda: bool = False  # whether autocast runs it in float32 on a GPU
    statistics: tuple[str, ...] = ()  # leading tensor arguments in the dtype of statistics; prepare checks all dtypes
    integers: tuple[str, ...] = ()  # leading tensor arguments that are integers; prepare checks their dtypes
    takes_dtypes: Callable = lambda dtypes: False  # whether kernels take leading tensors of these unequal dtypes
    opaque: bool = False  # whether the composite depends on values, which a graph cannot, and meta tensors do not have

    tensors: tuple = field(init=False)  # (public name, whether it may be None) of <op>_fwd's leading tensor arguments

    def __post_init__(self) -> None:
        of_public, of_fwd = (inspect.signature(f).parameters.values() for f in (self.public, self.fwd))
        leading = list(takewhile(_is_tensor, of_fwd))
        tensors = tuple((p.name, p.annotation is not Tensor) for p in filter(_is_tensor, of_public))[: len(leading)]
        object.__setattr__(self, "tensors", tensors)


def _is_tensor(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (Tensor, Tensor | None)


OPS: dict[str, Op] = {}
SPECS: dict = {}  # name -> `pygpt.verify.Spec`, of all ops
REFERENCE = SimpleNamespace()  # the kernels of backend "torch": <op>, <op>_fwd and <op>_bwd in ordinary PyTorch
KERNEL_NAMES: list[str] = []  # <op>_fwd and <op>_bwd of every op
_ALLOWED: dict[str, int] = {}  # op -> what `call_key` allows each tensor to be


def register(op: Op) -> Op:
    OPS[op.name] = op
    SPECS.update(op.specs)
    KERNEL_NAMES.extend((f"{op.name}_fwd", f"{op.name}_bwd"))
    vars(REFERENCE).update({op.name: op.composite, f"{op.name}_fwd": op.fwd, f"{op.name}_bwd": op.bwd})
    _ALLOWED[op.name] = sum(
        optional << i | (name in op.integers) << 16 + i | (name in op.statistics) << 32 + i
        for i, (name, optional) in enumerate(op.tensors)
    )
    return op


# ------------------------------------------------------------------------------- backends
@dataclass(frozen=True)
class Backend:
    name: str
    kernels: Any  # the namespace of <op>_fwd and <op>_bwd, or None where the backend is missing
    missing: str = ""  # why the backend is missing
    registered: Any = None  # the kernels as ops of torch's dispatcher with their own autograd, for tracing
    devices: tuple = ()  # the device types served; empty means any
    device_objection: Callable = lambda device: ""  # why the backend cannot run on this device
    dtypes: tuple = FLOATS
    ops: tuple | None = None  # None means all
    features: Mapping = field(default_factory=dict)  # op -> the optional features that are served
    max_head_dim: int | None = None

    def objections(self, op: str, arguments: Sequence[Tensor | None], features: Collection[str]) -> list[str]:
        """Why this backend cannot serve the call. Empty if it can. ``arguments``: those of `tensors_of`."""
        if self.missing:
            return [self.missing]
        if self.kernels is REFERENCE:
            return []
        reasons = []
        if self.ops is not None and op not in self.ops:
            reasons.append(f"{op} is not among its ops")
        tensors = [t for t in arguments if t is not None]
        lead = tensors[0]
        if self.devices and lead.device.type not in self.devices:
            reasons.append(f"{lead.device.type} tensors (it serves {', '.join(self.devices)})")
        if lead.dtype not in self.dtypes:
            reasons.append(f"{lead.dtype} (it serves {', '.join(str(d) for d in self.dtypes)})")
        leading = () if OPS[op].statistics else arguments[: len(OPS[op].tensors)]  # prepare has checked other dtypes
        dtypes = [t.dtype for t in leading if t is not None and t.is_floating_point()]
        if any(dtype != lead.dtype for dtype in dtypes) and not OPS[op].takes_dtypes(dtypes):
            reasons.append("tensors of different dtypes")
        if any(t.layout != torch.strided or t.is_nested for t in tensors):
            reasons.append("tensors that are not strided")
        if own := next((type(t).__name__ for t in tensors if dispatches_for_itself(type(t))), ""):
            reasons.append(f"a tensor subclass, {own}")
        if "dropout_p" in features and type(lead) in SHARDED:
            reasons.append("dropout of a DTensor, whose ranks would draw different bits")
        if features and (extra := sorted(set(features) - set(self.features.get(op, ())))):
            reasons.append(f"{', '.join(extra)} not served")
        has_heads = op in ("attention", "varlen_attn")
        if has_heads and self.max_head_dim and max(lead.shape[-1], tensors[2].shape[-1]) > self.max_head_dim:
            reasons.append(f"head dimension above {self.max_head_dim}")
        if _are_functorch_transforms_active():
            reasons.append("a torch.func transform (vmap, grad, jvp) is active")
        elif not is_compiling() and forward_ad._current_level >= 0:
            reasons.append("forward-mode differentiation is active")
        if not is_compiling() and not reasons and (objection := self.device_objection(lead.device)):
            reasons.append(objection)
        return reasons


_TORCHS_OWN_FUNCTIONS = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    torch._C._disabled_torch_function_impl,
)


def dispatches_for_itself(tensor_class: type) -> bool:
    """Whether a class of tensors has a __torch_dispatch__ or __torch_function__ of its own.

    The classes of torch's own tracing (FakeTensor, FunctionalTensor) don't count, because they stand for torch.Tensor.
    """
    if tensor_class in (Tensor, torch.nn.Parameter) or not issubclass(tensor_class, Tensor):
        return False
    if tensor_class.__module__.startswith("torch._subclasses"):
        return False
    if tensor_class.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        if tensor_class.__module__ == "torch.distributed.tensor":
            from .integrations import dtensor  # noqa: F401 (registers the rules, and DTensor in SHARDED)
        return tensor_class not in SHARDED
    own = getattr(tensor_class.__torch_function__, "__func__", tensor_class.__torch_function__)
    return own not in _TORCHS_OWN_FUNCTIONS


SHARDED: set[type] = set()  # subclasses with rules for our ops: DTensor, once `integrations.dtensor` is loaded


class _Table(dict[str, Backend]):
    """name -> Backend, in order of preference. A new row empties the dispatch cache, which may hold old kernels."""

    def __setitem__(self, name: str, row: Backend) -> None:
        super().__setitem__(name, row)
        for cache in DISPATCH_CACHES.values():
            cache.clear()


DISPATCH_CACHES: dict = {}  # explicitly chosen backend or None -> {(op, call_key): the bound kernel of fast calls}
TABLE: dict[str, Backend] = _Table()  # backends.py fills it


@dataclass(frozen=True)
class Choice:
    """The answer of `explain`: the backend that serves the call, or None, and the reasons of each that does not.

    Where no kernel takes the call, ``backend`` is "torch", and the call raises ``error`` unless PyTorch takes it.
    """

    op: str
    backend: str | None
    rejected: dict[str, list[str]]
    error: Exception | None = None

    def __str__(self) -> str:
        refused = " (no kernel takes this call; PyTorch may refuse it, too)" if self.error and self.backend else ""
        lines = [f"{self.op}: {self.backend or 'no backend'}{refused}"]
        return "\n".join(lines + [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.rejected.items()])


# ------------------------------------------------------------------------------- an explicit choice
class _PerThread(threading.local):
    """The attributes are set on the instance in each thread, because torch.compile does not guard those of a class."""

    def __init__(self) -> None:
        self.chosen: str | None = None  # by `backend(name)`
        self.cache = DISPATCH_CACHES.setdefault(None, {})


state = _PerThread()


def named(name: str) -> Backend:
    """The row of TABLE. ValueError if the name is unknown, RuntimeError if the backend is not available here."""
    row = TABLE.get(name)
    if row is None:
        raise ValueError(f"pygpt: unknown backend {name!r}; known: {', '.join(TABLE)}")
    if row.missing:
        raise Unavailable(f"pygpt: backend {name!r} is not available: {row.missing}")
    return row


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``with pygpt.backend("torch"): ...`` serves every op inside with that backend.

    ``name`` is "cpp", "cuda", "triton" or "torch". An unknown name raises ValueError, a backend that is not available
    here RuntimeError, and so does a call inside that the backend cannot serve. The choice holds for the current thread,
    and a backward pass uses the backend of its forward. The environment variable PYGPT_BACKEND does the same for a
    whole process.

    torch.utils.checkpoint computes a forward again when backward runs, outside this context. Give it
    ``context_fn=lambda: (pygpt.backend(name), pygpt.backend(name))`` and ``use_reentrant=False``.
    """
    named(name)
    previous = state.chosen, state.cache
    state.chosen, state.cache = name, DISPATCH_CACHES.setdefault(name, {})
    try:
        yield
    finally:
        state.chosen, state.cache = previous


FROM_ENVIRONMENT = os.environ.get("PYGPT_BACKEND") or None


def chosen() -> str | None:
    """The explicitly chosen backend, or None where the table decides. Raises as `backend` does."""
    if state.chosen is not None or FROM_ENVIRONMENT is None:
        return state.chosen  # `backend` has checked the name
    try:
        return named(FROM_ENVIRONMENT).name
    except (ValueError, Unavailable) as e:
        raise type(e)(f"PYGPT_BACKEND: {e}") from None


# ------------------------------------------------------------------------------- resolving a call
def choose(
    op: str, tensors: Sequence[Tensor | None], features: Collection[str] = (), error: Exception | None = None
) -> Choice:
    """What `explain` returns. ``tensors``: those of `tensors_of`, ``features``: the optional features in use."""
    name, rejected = chosen(), {}
    for row in TABLE.values():
        if name not in (None, row.name):
            rejected[row.name] = [f"backend {name!r} was asked for"]
        elif reasons := _objections(row, op, tensors, features, error):
            rejected[row.name] = reasons
        else:
            return Choice(op, row.name, rejected, error)
    return Choice(op, None, rejected, error)


def pick(
    op: str, tensors: Sequence[Tensor | None], features: Collection[str] = (), error: Exception | None = None
) -> Backend:
    """The backend that serves the call. RuntimeError if an explicitly chosen one cannot."""
    name = chosen()
    for row in TABLE.values() if name is None else (TABLE[name],):
        if not (reasons := _objections(row, op, tensors, features, error)):
            return row
    raise error or Unavailable(f"pygpt.{op}: backend {name!r} cannot serve this call: {'; '.join(reasons)}")


def _objections(
    row: Backend, op: str, tensors: Sequence[Tensor | None], features: Collection[str], error: Exception | None
) -> list[str]:
    if error is not None and not row.missing and row.kernels is not REFERENCE:
        return [str(error)]
    return row.objections(op, tensors, features)


def ops_by_name() -> dict[str, Op]:
    """Every op by its public function's name and by its own."""
    return {**{op.public.__name__: op for op in OPS.values()}, **OPS}


def explain(op: Callable | str, *args: Any, **kwargs: Any) -> Choice:
    """Tells which backend would serve ``op(*args, **kwargs)``, and why each one before it would not.

    ``op`` is a function of `pygpt.functional`, its name, or the op's name in ``pygpt info``; another one raises
    ValueError. The result is a `pygpt.Choice`. Nothing is computed. ``print(pygpt.explain("layer_norm", x, (768,)))``
    shows the choice in lines. Bad arguments raise what the call itself would raise.
    """
    known = ops_by_name()
    known_op = known.get(op) if isinstance(op, str) else next((o for o in OPS.values() if o.public is op), None)
    if known_op is None:
        raise ValueError(f"pygpt.explain: unknown op {op!r}; known: {', '.join(known)}")
    try:
        inspect.signature(known_op.public).bind(*args, **kwargs)
    except TypeError as e:
        raise TypeError(f"pygpt.{known_op.public.__name__}: {e}") from None
    prepared = autocast(known_op, known_op.prepare(*args, **kwargs))
    return choose(known_op.name, tensors_of(known_op, prepared.args), prepared.features, prepared.error)


# ------------------------------------------------------------------------------- serving a call
def no_key(*_: Any) -> None:
    """`call_key` where the compiled library is missing: no call is fast."""


call_key: Callable[..., Any] = no_key  # backends.py replaces it by csrc/bind/fastcall.h's
fast_head_dim = sys.maxsize  # the least max_head_dim in TABLE, which backends.py reads from the kernels


def lookup(op: str, *tensors: Tensor | None) -> Any:
    """The bound kernel of fast calls like this one, a function of the canonical arguments.

    None if this call is not fast (`call_key` is None) or if no call like it has been resolved before. No traced call is
    fast; Dynamo's are asked for here because Dynamo cannot trace `call_key`.
    """
    if is_dynamo_compiling():
        return None
    return state.cache.get((op, call_key(_ALLOWED[op], *tensors)))


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Serves any call of an op from its public arguments, and stores the bound kernel of a fast one."""
    op = OPS[name]
    if not is_compiling() and (_is_torch_function_mode_enabled() or any(map(_is_proxy, args))):
        return handle_torch_function(op.public, [a for a in args if _is_proxy(a)], *args, **kwargs)
    prepared = autocast(op, op.prepare(*args, **kwargs))
    row = pick(name, tensors_of(op, prepared.args), prepared.features, prepared.error)
    if row.kernels is REFERENCE:
        log_fallback(op, prepared)
    return serve(op, row, prepared)


def serve(op: Op, row: Backend, prepared: Call) -> Any:
    """Runs a call on the backend that `pick` has chosen, and stores the bound kernel of a fast one."""
    prepared = prepared.seeded()
    tensors = [a for a in prepared.args if isinstance(a, Tensor)]
    if prepared.fast and not is_compiling() and (key := call_key(_ALLOWED[op.name], *prepared.fast)) is not None:
        state.cache[op.name, key] = bind(op, row, _needs_gradient(tensors))
    return _run(op, row, prepared, tensors)


def _run(op: Op, row: Backend, prepared: Call, tensors: list[Tensor]) -> Any:
    if row.kernels is not REFERENCE or (op.opaque and without_values(tensors) and not _transformed()):
        return prepared.finish(_run_kernels(op, row, prepared.args, tensors))
    try:
        if prepared.torch is not None:
            return prepared.torch()
        return prepared.finish(op.composite(*prepared.args, **prepared.options))
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        if prepared.error is None:
            raise
        raise prepared.error from e


def _run_kernels(op: Op, row: Backend, args: tuple, tensors: list[Tensor]) -> Any:
    """The op's results by kernels. A traced call runs the registered ops, which have gradients of their own."""
    if row.kernels is REFERENCE or _traced(tensors):
        results = getattr(row.registered, f"{op.name}_fwd")(*args)
    elif _needs_gradient(tensors):
        return op.function.apply(row.kernels, *args)
    else:
        results = getattr(row.kernels, f"{op.name}_fwd")(*args)
    return results if isinstance(results, Tensor) or len(results) == op.results else _first(results, op.results)


def _traced(tensors: Sequence[Tensor]) -> bool:
    """Whether the call is to become part of a graph."""
    return is_compiling() or _is_tracing() or any(type(t) in SHARDED for t in tensors)


def without_values(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing may depend on the tensors' values, because a graph, a mode or a shape stands for them.

    `is_compiling` is true in every thread while one compiles. Here that would change the bits of the others.
    """
    traced = is_dynamo_compiling() or _is_tracing() or _len_torch_dispatch_stack() > 0
    return traced or tensors[0].is_meta or any(type(t) in SHARDED for t in tensors)


def _transformed() -> bool:
    """Whether the call is differentiated in forward mode or under torch.func, which only composites can be."""
    return _are_functorch_transforms_active() or (not is_compiling() and forward_ad._current_level >= 0)


def _first(results: tuple, n: int) -> Any:
    return results[0] if n == 1 else results[:n]


def bind(op: Op, row: Backend, needs_gradient: bool) -> Callable:
    """The bound kernel of fast calls: a function of the canonical arguments.

    With gradients, it calls the C++ apply directly. Function.apply inspects the arguments for torch.func first
    (docs/measured.md P2).
    """
    if row.kernels is REFERENCE:
        return op.composite
    if needs_gradient:
        return partial(super(torch.autograd.Function, op.function).apply, row.kernels)
    without_saved = getattr(row.kernels, f"{op.name}_fwd_results", None)
    if without_saved is not None:
        return without_saved
    fwd = getattr(row.kernels, f"{op.name}_fwd")
    return lambda *args: results if isinstance(results := fwd(*args), Tensor) else _first(results, op.results)


def tensors_of(op: Op, args: Sequence) -> list[Tensor | None]:
    """The tensors among canonical arguments. A leading one may be None, so that all of them keep their places."""
    leading = len(op.tensors)
    return [*args[:leading], *(a for a in args[leading:] if isinstance(a, Tensor))]


def _needs_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _is_proxy(a: object) -> bool:
    """Whether ``a`` is no tensor but stands for one in torch functions, as torch.fx's Proxy does."""
    return not isinstance(a, Tensor) and hasattr(type(a), "__torch_function__")


# ------------------------------------------------------------------------------- PYGPT_LOG=fallback
LOG_FALLBACK = "fallback" in os.environ.get("PYGPT_LOG", "").split(",")
_LOGGED: dict[str, object] = {}  # line -> the call that printed it


def log_fallback(op: Op, prepared: Call) -> None:
    """With PYGPT_LOG=fallback, prints once why the default goes to PyTorch for a call."""
    if not LOG_FALLBACK or is_compiling() or chosen() is not None:
        return
    choice = choose(op.name, tensors_of(op, prepared.args), prepared.features, prepared.error)
    line = f"pygpt: PyTorch serves {choice.op}; " + "; ".join(
        f"{name}: {', '.join(reasons)}" for name, reasons in choice.rejected.items()
    )
    this_call = object()
    if _LOGGED.setdefault(line, this_call) is this_call:  # setdefault is atomic: one of several threads prints
        print(line, file=sys.stderr, flush=True)
