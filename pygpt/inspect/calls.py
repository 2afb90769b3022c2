"""`pygpt.report`: which calls of a training step were served by which kernel, and why the others were not.

A mode of torch's dispatcher sees every op of the step, forward and backward. FLOPs are those of torch's own formulas
(torch.utils.flop_counter), which count a product's multiplications and additions, and attention without regard to its
mask. Ops of pygpt have formulas of their own that agree with them. Torch counts nothing for its CPU attention; here it
is counted as its attention on GPUs is.
"""

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import functional
from ..dispatch import OPS, REFERENCE, TABLE, Choice, explain
from ..progress import table
from .step import (
    check_call,
    clear_gradients,
    differentiable,
    random_numbers_kept,
    tensors_in,
    train_step,
    unchanged,
    without_compilation,
)

SHOWN = 20  # rows of the table on a screen
OTHER = "other ops"  # those that no op of pygpt computes and that torch counts no FLOPs for


# ------------------------------------------------------------------------------- the result
@dataclass
class Row:
    """The calls of one op by one backend in forward or backward."""

    phase: str  # "forward" or "backward"
    op: str  # "attention", or "aten.addmm" of PyTorch
    backend: str  # "cpp", "cuda", "triton"; "torch" for PyTorch
    calls: int = 0
    flops: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)  # why no kernel served them -> how many calls

    @property
    def served(self) -> bool:
        """Whether one of pygpt's kernels computed the calls."""
        return self.backend != "torch"


@dataclass(frozen=True)
class Report:
    """The answer of `report`. ``print(report)`` shows it on one screen."""

    model: str  # the name of its class
    rows: list[Row]  # the largest FLOPs first, then the longest time
    seconds: float  # of a whole step without the recording

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def served(self) -> float:
        """The share of the FLOPs in pygpt's kernels, from 0 to 1. NaN where there are none."""
        return sum(row.flops for row in self.rows if row.served) / self.flops if self.flops else float("nan")

    def reasons(self) -> dict[str, Row]:
        """Every reason why no kernel served calls of forward -> those calls as one Row, the largest FLOPs first."""
        merged: dict[str, Row] = {}
        for row in self.rows:
            for reason, calls in row.reasons.items():
                one = merged.setdefault(reason, Row(row.phase, "", row.backend))
                one.op = ", ".join(filter(None, (one.op, row.op)))
                one.calls += calls
                one.flops += row.flops * calls // row.calls
        return dict(sorted(merged.items(), key=lambda item: -item[1].flops))

    def __str__(self) -> str:
        unit, scale = next(((u, s) for u, s in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if self.flops >= s), ("k", 1e3))
        share = (
            f"{self.served:.1%} of {self.flops / scale:.3g} {unit}FLOP on pygpt's kernels" if self.flops else "no FLOPs"
        )
        columns = dict.fromkeys(("phase", "op", "kernel"), "<")
        columns |= dict.fromkeys(("calls", f"{unit}FLOP", "FLOPs", "ms"), ">")
        lines = [self._line(row, scale) for row in self.rows[:SHOWN]]
        if hidden := self.rows[SHOWN:]:
            calls, flops, seconds = (
                sum(getattr(row, name) for row in hidden) for name in ("calls", "flops", "seconds")
            )
            lines.append(self._line(Row("", f"{len(hidden)} more rows", "", calls, flops, seconds), scale))
        text = [f"{self.model}: a training step of {self.seconds * 1e3:.4g} ms, {share}", "", table(columns, lines)]
        if any(row.phase == "forward" and row.op == "linear_bwd" for row in self.rows):
            text += ["", "linear_bwd in forward multiplies by a transposed weight, such as that of GPT-2's Conv1D."]
        if reasons := self.reasons():
            text += ["", "Left to PyTorch:"]
            for reason, row in list(reasons.items())[: SHOWN // 2]:
                line = f"- {_short(row.op)}, {row.calls} call{'s' * (row.calls > 1)}: {reason}"
                text += textwrap.wrap(line, 110, subsequent_indent="  ")
            if any(reason.startswith(PYTORCHS) for reason in reasons):
                text += ["", "pygpt.enable() and pygpt.patch(model) bring a model's calls to the kernels."]
        return "\n".join(text)

    def _line(self, row: Row, scale: float) -> tuple:
        share = f"{row.flops / self.flops:.1%}" if row.flops else "-"
        kernel = (row.backend, "green" if row.served else "")
        flops = f"{row.flops / scale:.4g}" if row.flops else "-"
        return (
            row.phase,
            _short(row.op),
            kernel,
            str(row.calls),
            flops,
            share,
            f"{row.seconds * 1e3:.2f}",
        )


def _short(ops: str) -> str:
    return ops.replace("_scaled_dot_product", "_sdpa")


# ------------------------------------------------------------------------------- the recording
def _of_linear(x: Tensor, w: Tensor, *_: Any, **__: Any) -> tuple:
    return "linear", (x, w.t()), {}


def _of_attention(bias: int | None, dropout: int, causal: int) -> Callable:
    """The call of scaled_dot_product_attention that became an op of torch with arguments in these places."""

    def public_call(*args: Any, attn_mask: Tensor | None = None, scale: float | None = None, **_: Any) -> tuple:
        mask = attn_mask if bias is None else args[bias]
        p, is_causal = (args[i] if len(args) > i else 0 for i in (dropout, causal))
        options = {"attn_mask": mask, "dropout_p": float(p), "is_causal": bool(is_causal), "scale": scale}
        return "scaled_dot_product_attention", args[:3], options

    return public_call


def _same(name: str) -> Callable:
    return lambda *args, **kwargs: (name, args, kwargs)


# Ops of torch that pygpt could serve -> the arguments to the public call. None: a part of such a call's backward.
COUNTERPARTS: dict[str, Callable | None] = {
    "aten::mm": _of_linear,
    "aten::addmm": lambda bias, *args, **kwargs: _of_linear(*args),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _of_attention(None, 3, 4),
    "aten::_scaled_dot_product_flash_attention": _of_attention(None, 3, 4),
    "aten::_scaled_dot_product_efficient_attention": _of_attention(3, 5, 6),
    "aten::_scaled_dot_product_cudnn_attention": _of_attention(3, 5, 6),
    "aten::native_layer_norm": _same("layer_norm"),
    "aten::_fused_rms_norm": _same("rms_norm"),
    "aten::gelu": _same("gelu"),
    "aten::relu": _same("relu"),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": None,
    "aten::native_layer_norm_backward": None,
    "aten::_fused_rms_norm_backward": None,
    "aten::gelu_backward": None,
    "aten::threshold_backward": None,
}
NO_OP = (
    "pygpt has no op for it; a batched product is often attention, written out by a model, or by torch itself where "
    "there is dropout, which pygpt.enable() serves"
)
PYTORCHS = "the model calls PyTorch's own function"
# The functions of torch.nn.functional that pygpt has too, and pygpt's own -> pygpt's.
FUNCTIONS = {op.public: op.public for op in OPS.values()}
FUNCTIONS |= {getattr(F, f.__name__): f for f in FUNCTIONS if hasattr(F, f.__name__)}


def _why(public: Callable, args: tuple, kwargs: dict) -> str:
    """Why no kernel served a call: the objections of the backends that are here, or PyTorch was called directly.

    Arguments that torch's function alone has do not count while they are None, as the deprecated ``size_average``.
    """
    known = signature(public).parameters
    kwargs = {name: value for name, value in kwargs.items() if name in known or value is not None}
    try:
        choice = explain(public, *args, **kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        return str(e)
    if choice.backend not in (None, "torch"):
        name = f"pygpt.functional.{public.__name__}"
        how = " (in a language model, pygpt.patch with loss=True)" if public is functional.cross_entropy else ""
        return f"{PYTORCHS}; {choice.backend} serves {name}{how}"
    return objections(choice)


def objections(choice: Choice) -> str:
    """Why each backend that is here rejects a call; where none is here, why they are missing."""
    here = {name: reasons for name, reasons in choice.rejected.items() if not TABLE[name].missing}
    return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in (here or choice.rejected).items())


@dataclass
class _PublicCall:
    """A running call of a function in FUNCTIONS."""

    reason: str  # why no kernel serves it, if none does
    listed: bool = False  # whether an op with a row of its own has computed a part of it
    times: list[float] = field(default_factory=list)  # of its other ops


class _Recorder(TorchDispatchMode):
    """Adds each op of torch's dispatcher to the rows."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

        super().__init__()
        aten = torch.ops.aten
        self.formulas = {
            aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
            **flop_registry,
        }
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.synchronize = synchronize
        self.call: _PublicCall | None = None
        self.explaining = False
        # The backend whose kernel has run inside the current op, as in one that `pygpt.enable` replaces.
        self.kernel = ""

    @contextmanager
    def kernels_noted(self) -> Iterator[None]:
        """Sets ``kernel`` whenever a backend's kernel runs."""
        rows = [row for row in TABLE.values() if row.kernels not in (None, REFERENCE)]
        try:
            for row in rows:
                TABLE[row.name] = replace(row, kernels=_Noting(row.kernels, partial(setattr, self, "kernel", row.name)))
            yield
        finally:
            for row in rows:
                TABLE[row.name] = row

    def add(self, op: str, backend: str, calls: int, flops: int, seconds: float, reason: str = "") -> None:
        phase = "forward" if _current_graph_task_id() == -1 else "backward"
        row = self.rows.setdefault((phase, op, backend), Row(phase, op, backend))
        row.calls, row.flops, row.seconds = row.calls + calls, row.flops + flops, row.seconds + seconds
        if reason:
            row.reasons[reason] = row.reasons.get(reason, 0) + calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.explaining:
            return func(*args, **kwargs)
        self.kernel = ""
        self.synchronize()
        start = time.perf_counter()
        out = func(*args, **kwargs)
        self.synchronize()
        seconds = time.perf_counter() - start
        name = func.name().partition(".")[0]
        formula = self.formulas.get(getattr(func, "_overloadpacket", func))
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        listed = flops or name.startswith("pygpt") or name in COUNTERPARTS
        if self.call:
            self.call.listed |= bool(listed)
        if name.startswith("pygpt"):
            self.add(_op_name(name), _backend_of(func, args), 1, flops, seconds)
        elif listed:
            reason = "" if self.kernel else self.reason(name, args, kwargs)
            self.add(name.replace("::", "."), self.kernel or "torch", 1, flops, seconds, reason)
        elif self.call:
            self.call.times.append(seconds)
        else:
            self.add(OTHER, "torch", 1, 0, seconds)
        return out

    def reason(self, name: str, args: tuple, kwargs: dict) -> str:
        """Why PyTorch computed an op; empty in backward, where it differentiates what it has computed itself."""
        if _current_graph_task_id() != -1:
            return ""
        if self.call:
            return self.call.reason
        counterpart = COUNTERPARTS.get(name)
        if counterpart is None:
            return NO_OP
        public, *arguments = counterpart(*args, **kwargs)
        return _why(getattr(functional, public), *arguments)

    @contextmanager
    def public_call(self, public: Callable, args: tuple, kwargs: dict) -> Iterator[None]:
        """While a function in FUNCTIONS runs, its reason is that of the ops that it calls."""
        self.explaining = True
        try:
            call = _PublicCall(_why(public, args, kwargs))
        finally:
            self.explaining = False
        outer, self.call = self.call, call
        try:
            yield
        finally:
            self.call = outer
        if call.listed or not call.times:
            self.add(OTHER, "torch", len(call.times), 0, sum(call.times))
        else:
            self.add(public.__name__, "torch", 1, 0, sum(call.times), call.reason)


class _Noting:
    """The kernels of a backend, each of which calls ``note`` first."""

    def __init__(self, kernels: Any, note: Callable[[], None]) -> None:
        self._kernels, self._note = kernels, note

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._kernels, name)
        if not callable(kernel):
            return kernel

        def call(*args: Any) -> Any:
            self._note()
            return kernel(*args)

        return call


class _PublicCalls(TorchFunctionMode):
    """Tells a recorder of the calls of functions in FUNCTIONS, except of those inside functions of torch."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONS:
            return func(*args, **kwargs)
        with self.recorder.public_call(FUNCTIONS[func], args, kwargs):
            return func(*args, **kwargs)


def _op_name(name: str) -> str:
    """The op that a registered kernel belongs to. A forward that checkpointing computes again keeps its suffix."""
    again = _current_graph_task_id() != -1
    return name.partition("::")[2].removesuffix("_bwd" if again else "_fwd")


def _backend_of(func: Any, args: tuple) -> str:
    """The backend whose kernel an op of pygpt has run."""
    device = next(t.device.type for _, t in tensors_in(args))
    name = func.name().partition("::")[2]
    for row in TABLE.values():
        registered = row.kernels not in (None, REFERENCE) and getattr(row.registered, name, None) == func
        if registered and device in row.devices and (row.ops is None or name[:-4] in row.ops):
            return row.name
    return "torch"


def report(model: nn.Module, *inputs: Any, **kwargs: Any) -> Report:
    """Runs a training step ``model(*inputs, **kwargs)`` and tells which calls were served by which kernel.

    The step is forward in training mode and backward from the model's own loss: an output called ``loss``, or one that
    is a number. A model without a loss gets random gradients for its outputs. It runs three times: to warm up, for the
    time of the whole step, and recorded. A compiled model runs eagerly.

    The result is a `Report` with FLOPs, times and reasons as data; printing it shows one screen. The parameters,
    buffers, gradients, training modes and random generators are what they were before. No optimizer runs. A model that
    is no module raises TypeError; ValueError is raised where no output needs a gradient.
    """
    check_call("report", model, (inputs, kwargs))
    everything = [t for _, t in tensors_in((inputs, kwargs, list(model.parameters()), list(model.buffers())))]
    synchronize = torch.cuda.synchronize if any(t.is_cuda for t in everything) else lambda: None

    def step() -> float:
        clear_gradients(everything)
        synchronize()
        start = time.perf_counter()
        with random_numbers_kept(everything):
            if not differentiable(train_step(model, inputs, kwargs)):
                raise ValueError("pygpt.report: no output of the model needs a gradient, so there is no backward pass")
        synchronize()
        return time.perf_counter() - start

    with unchanged([model], (inputs, kwargs)), torch.enable_grad(), without_compilation():
        model.train()
        step()
        seconds = step()
        recorder = _Recorder(synchronize)
        with recorder.kernels_noted(), recorder, _PublicCalls(recorder):
            step()
    rows = sorted(recorder.rows.values(), key=lambda row: (-row.flops, -row.seconds))
    return Report(type(model).__name__, [row for row in rows if row.calls], seconds)
