"""Which kernel serves a call: a table of backends, and the reasons against each.

A backend is a namespace holding ``<op>_fwd``/``<op>_bwd`` (see `pygpt.reference`) plus its limits as
data. `pick` walks the table in order and takes the first row without an objection; `explain` shows
the objections. An explicit choice (`backend(name)` or PYGPT_BACKEND) that cannot serve a call raises
with the reasons; only the default falls back.
"""

import importlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad, profiler
from torch.compiler import is_compiling

from . import reference

OPS = ("attention", "linear", "mlp", "layer_norm", "add_layer_norm", "rms_norm", "gelu", "relu")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Unavailable(RuntimeError):
    """An explicitly chosen backend is not there, or cannot serve a call."""


@dataclass(frozen=True)
class Backend:
    name: str
    kernels: object  # the namespace, or None where it is missing
    missing: str = ""  # why it is missing
    plain: object = None  # a namespace for plain calls, where it has one of their own
    devices: tuple = ()  # device types served; empty means any
    device_objection: Callable = lambda device: ""  # why not this one
    dtypes: tuple = FLOATS
    ops: tuple = OPS
    features: Mapping = field(default_factory=dict)  # op -> the optional features served
    max_head_dim: int | None = None

    def objections(self, op: str, tensors, features) -> list[str]:
        """Why this backend cannot serve the call; empty if it can."""
        if self.missing:
            return [self.missing]
        if self.kernels is reference:
            return []
        why = []
        if op not in self.ops:
            why.append(f"{op} is not among its ops")
        lead = tensors[0]
        if self.devices and lead.device.type not in self.devices:
            why.append(f"{lead.device.type} tensors; it serves {', '.join(self.devices)}")
        if lead.dtype not in self.dtypes:
            why.append(f"{lead.dtype}; it serves {', '.join(str(d) for d in self.dtypes)}")
        if any(t.dtype != lead.dtype for t in tensors):
            why.append("tensors of different dtypes")
        if any(t.layout != torch.strided for t in tensors):
            why.append("tensors that are not strided")
        if features and (extra := sorted(set(features) - set(self.features.get(op, ())))):
            why.append(f"{', '.join(extra)} not served")
        if op == "attention" and self.max_head_dim and max(lead.shape[-1], tensors[2].shape[-1]) > self.max_head_dim:
            why.append(f"head dimension above {self.max_head_dim}")
        if _are_functorch_transforms_active():
            why.append("a torch.func transform (vmap, grad, jvp) is active")
        elif not is_compiling() and forward_ad._current_level >= 0:
            why.append("forward-mode differentiation is active")
        if not is_compiling() and not why and (objection := self.device_objection(lead.device)):
            why.append(objection)
        return why


@dataclass(frozen=True)
class Choice:
    """The answer of `explain`: the backend that serves the call and why each earlier one does not."""

    op: str
    backend: str | None
    rejected: dict[str, list[str]]

    def __str__(self):
        lines = [f"{self.op}: {self.backend or 'no backend'}"]
        return "\n".join(lines + [f"  not {name}: {'; '.join(why)}" for name, why in self.rejected.items()])


def _compiled() -> tuple[SimpleNamespace | None, str]:
    """The ops registered by the C++ library, resolved to their overloads (which saves 2 us a call)."""
    try:
        importlib.import_module("pygpt._C")  # registers torch.ops.pygpt
    except ImportError as e:
        return None, f"the compiled extension is missing ({e}); build it with: pip install --no-build-isolation ."
    names = [f"{op}_{way}" for op in OPS for way in ("fwd", "bwd")]
    for name in names:
        torch.library.register_fake(f"pygpt::{name}", getattr(reference, name))
    return SimpleNamespace(**{name: getattr(torch.ops.pygpt, name).default for name in names}), ""


def _plain(compiled) -> tuple[SimpleNamespace | None, Callable]:
    """The same ops for plain calls on CPU tensors, without torch's dispatcher (csrc/direct.h); and `kind`, which tells
    a plain call by its tensors. Where torch has no DLPack exchange table there is none, and no call is plain."""
    functions, table = None, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if compiled is not None and table is not None:
        from . import _C

        deciding = (_is_any_autocast_enabled, _are_functorch_transforms_active), ((forward_ad, "_current_level", -1),)
        watching = (_len_torch_dispatch_stack, _get_tracing_state), ((profiler, "_is_profiler_enabled", False),)
        classes = torch.Tensor, torch.nn.Parameter
        ops = {name: op._op for name, op in vars(compiled).items()}
        functions = _C.connect(table, *classes, torch.Tensor.is_neg, torch.is_grad_enabled, *deciding, *watching, ops)
    return (SimpleNamespace(**functions, dispatched=compiled), _C.kind) if functions else (None, lambda *_: None)


def _cuda(compiled) -> tuple[SimpleNamespace | None, str]:
    """The same ops once the CUDA kernels are registered too. Loads their library only where CUDA works."""
    if compiled is None:
        return None, "the compiled extension, which declares the ops, is missing"
    if not torch.cuda.is_available():
        built = importlib.util.find_spec("pygpt._cuda") is not None
        return None, "torch finds no GPU here" + ("" if built else "; nor were the CUDA kernels built")
    try:
        importlib.import_module("pygpt._cuda")
    except ImportError as e:
        return None, f"the CUDA kernels are missing ({e}); with nvcc: pip install --no-build-isolation ."
    return compiled, ""


@cache
def _cuda_objection(device: torch.device) -> str:
    """Why the CUDA kernels can't run on this GPU. Asked at the first call there: it initialises CUDA."""
    if device.type != "cuda":
        return ""
    from . import _cuda

    driver, runtime = (version // 1000 for version in _cuda.versions())
    if driver < runtime:  # within a major version any driver will do
        return f"the CUDA kernels were built with CUDA {runtime}, this machine's driver is of CUDA {driver}"
    return _code_objection(_cuda.code(), *torch.cuda.get_device_capability(device))


def _code_objection(built: str, major: int, minor: int) -> str:
    """Why none of the code that was built, such as "sm_80 sm_90a compute_80", runs on a GPU of this capability."""
    here = 10 * major + minor
    for kind, number, letter in re.findall(r"(sm|compute)_(\d+)([af]?)", built):
        arch = int(number)
        same_family = arch // 10 == major or kind == "compute"  # PTX is for all that come later
        if arch == here or (letter != "a" and same_family and arch < here):
            return ""
    hint = "; set PYGPT_CUDA_ARCHS" if here >= 80 else ""
    return f"the CUDA kernels were built for {built.replace(' ', ', ')}, this GPU is sm_{here}{hint}"


def _triton() -> tuple[object, str, tuple]:
    """The Triton kernels, why they are missing, and the devices they serve. Imports Triton only where it can run."""
    devices = ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed; pip install 'triton>=3.6'", devices
    if devices == ("cuda",) and not torch.cuda.is_available():
        why = "torch finds no GPU here; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly"
        return None, why, devices
    try:
        return importlib.import_module("pygpt.triton_kernels"), "", devices
    except ImportError as e:
        return None, f"Triton cannot be used ({e})", devices


_kernels, _why = _compiled()
_plain_kernels, kind = _plain(_kernels)
_cuda_kernels, _why_no_cuda = _cuda(_kernels)
_triton_kernels, _why_no_triton, _triton_devices = _triton()

MAX_HEAD_DIM = 256
_ATTENTION = {"features": {"attention": ("return_lse",)}, "max_head_dim": MAX_HEAD_DIM}  # of all our kernels

TABLE: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cpp", _kernels, _why, _plain_kernels, ("cpu",), **_ATTENTION),
        Backend("triton", _triton_kernels, _why_no_triton, None, _triton_devices, dtypes=FLOATS[1:], **_ATTENTION),
        Backend("cuda", _cuda_kernels, _why_no_cuda, None, ("cuda",), _cuda_objection, FLOATS[1:], **_ATTENTION),
        Backend("torch", reference),
    )
}


_SERVED: dict = {}  # by the chosen backend: how plain calls are served, by op and kind; see `functional._ready`


class _PerThread(threading.local):  # torch.compile traces and guards it; a ContextVar it cannot
    chosen: str | None = None  # by `backend(name)`
    served: dict = _SERVED.setdefault(None, {})
    explaining: bool = False  # inside `explain`


state = _PerThread()


def _named(name: str) -> Backend:
    row = TABLE.get(name)
    if row is None:
        raise ValueError(f"pygpt: unknown backend {name!r}; known: {', '.join(TABLE)}")
    if row.missing:
        raise Unavailable(f"pygpt: backend {name!r} is not available: {row.missing}")
    return row


@contextmanager
def backend(name: str):
    """``with pygpt.backend("torch"): ...`` serves every op inside by that backend.

    name: "cpp", "cuda", "triton" or "torch". ValueError if unknown, RuntimeError if it is not
    available here. Holds for the current thread; a backward pass uses the backend of its
    forward. The environment variable PYGPT_BACKEND does the same for a whole process.
    What torch.utils.checkpoint computes again, it computes when and where backward runs: give it
    ``context_fn=lambda: (pygpt.backend(name), pygpt.backend(name))`` and use_reentrant=False.
    """
    _named(name)
    previous = state.chosen, state.served
    state.chosen, state.served = name, _SERVED.setdefault(name, {})
    try:
        yield
    finally:
        state.chosen, state.served = previous


def chosen() -> str | None:
    """The explicitly chosen backend, or None where the table decides. Raises as `backend` does."""
    name = state.chosen or _FROM_ENVIRONMENT
    return None if name is None else _named(name).name


_FROM_ENVIRONMENT = os.environ.get("PYGPT_BACKEND") or None


def choose(op: str, tensors, features=()) -> Choice:
    """Walks the table; ``tensors`` are the call's tensor arguments, ``features`` the optional ones in use."""
    name, rejected = chosen(), {}
    for row in TABLE.values():
        if name not in (None, row.name):
            rejected[row.name] = [f"backend {name!r} was asked for"]
        elif why := row.objections(op, tensors, features):
            rejected[row.name] = why
        else:
            return Choice(op, row.name, rejected)
    return Choice(op, None, rejected)


def pick(op: str, tensors, features=()) -> Backend:
    """What serves the call. RuntimeError if an explicitly chosen backend cannot."""
    name = chosen()
    for row in TABLE.values() if name is None else (TABLE[name],):
        if not (why := row.objections(op, tensors, features)):
            return row
    raise Unavailable(f"pygpt.{op}: backend {name!r} cannot serve this call: {'; '.join(why)}")
