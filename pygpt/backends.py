"""Defines the ops in torch's dispatcher, loads the compiled libraries and Triton, and fills `dispatch.TABLE`.

Each backend has its kernels in two namespaces of <op>_fwd and <op>_bwd. Eager calls run ``kernels``. ``registered``
holds the same kernels as ops of torch's dispatcher, which torch.compile, torch.export and torch.jit.trace record in
their graphs. The registered ops have gradients of their own, by the same formulas as the eager autograd Functions.
"""

import importlib
import importlib.abc
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad, profiler

from . import dispatch
from .dispatch import FLOATS, OPS, REFERENCE, TABLE, Backend, Op
from .ops.common import as_tuple


# ------------------------------------------------------------------------------- ops of torch's dispatcher
@cache  # torch drops the registrations of a Library when the Library is freed
def define_ops(namespace: str, ops: tuple[str, ...] | None = None) -> torch.library.Library:
    """Defines torch.ops.<namespace>.<op>_fwd and _bwd of the ops, by default of all.

    pygpt/ops/ gives their schemas and fake kernels.
    """
    library = torch.library.Library(namespace, "DEF")
    for name in _kernel_names(ops):
        reference = getattr(REFERENCE, name)
        library.define(name + torch.library.infer_schema(reference, mutates_args=()))
        torch.library.register_fake(f"{namespace}::{name}", reference, lib=library)
    return library


def _kernel_names(ops: tuple[str, ...] | None) -> list[str]:
    return [f"{op}_{direction}" for op in (OPS if ops is None else ops) for direction in ("fwd", "bwd")]


def register_ops(
    namespace: str, kernels: Mapping[str, Callable], ops: tuple[str, ...] | None = None
) -> SimpleNamespace:
    """Defines the ops, by default all, with their gradients and FLOP counts, and returns their overloads.

    ``kernels``: for every device for which no library registers other ones. An op may be missing there.
    """
    library, packets = define_ops(namespace, ops), getattr(torch.ops, namespace)
    for name in _kernel_names(ops):
        if name in kernels:
            library.impl(name, kernels[name], "CompositeExplicitAutograd")
    registered = SimpleNamespace(**{name: getattr(packets, name).default for name in _kernel_names(ops)})
    for op in OPS if ops is None else ops:
        _register_gradients(library, OPS[op], registered)
    when_imported("torch.utils.flop_counter", lambda: _register_flops(packets, ops))
    return registered


def _register_gradients(library, op: Op, kernels):
    """<op>_fwd gets the autograd Function's gradients. <op>_bwd raises, as its derivative would silently be zero."""
    fwd, bwd = f"{library.ns}::{op.name}_fwd", f"{library.ns}::{op.name}_bwd"
    arguments = len(inspect.signature(op.fwd).parameters)

    def save(ctx, inputs, output):
        computed = SimpleNamespace(**{f"{op.name}_fwd": lambda *args: output})
        op.function.forward(ctx, computed, *inputs)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(*as_tuple(output)[op.results :])

    def gradients(ctx, *grads):
        # The first argument of the Function is the kernels. torch puts the attribute back after this call.
        ctx.needs_input_grad = False, *ctx.needs_input_grad[:arguments]
        return op.function.backward(ctx, *grads[: op.results])[1:]

    def refuse(ctx, *grads):
        raise RuntimeError(f"{bwd} has no derivative: for a second one, differentiate {fwd} with create_graph=True")

    torch.library.register_autograd(fwd, gradients, setup_context=save, lib=library)
    torch.library.register_autograd(bwd, refuse, lib=library)


def below_autograd(overload) -> Callable:
    """The op for callers that compute gradients themselves. It skips one dispatch key (docs/measured.md P1)."""
    op, guard = overload._op, torch._C._AutoDispatchBelowAutograd

    def call(*args):
        with guard():
            return op(*args)

    return call


# ------------------------------------------------------------------------------- FLOP counts
def _register_flops(packets, ops):
    from torch.utils.flop_counter import register_flop_formula

    for op in map(OPS.__getitem__, OPS if ops is None else ops):
        for direction, formula in zip(("fwd", "bwd"), op.flops, strict=True) if op.flops else ():
            register_flop_formula(getattr(packets, f"{op.name}_{direction}"), get_raw=True)(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds one module as Python does, and acts once it is loaded. Asking for its spec does not load it."""

    def __init__(self, name: str, action: Callable):
        self.name, self.action = name, action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None:
            return None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_and_act(module):
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        loader.exec_module = load_and_act
        return spec


def when_imported(name: str, action: Callable):
    """Acts now if the module is loaded, otherwise once it is: for modules that take too long to load for that alone."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _WhenImported(name, action))


# ------------------------------------------------------------------------------- C++
def _cpp(ops) -> tuple[SimpleNamespace | None, str]:
    """The C++ kernels, or None and why they are missing. Sets `dispatch.call_key`."""
    try:
        importlib.import_module("pygpt._C")
    except ImportError as e:
        return None, f"the compiled extension is missing ({e}); build it with: pip install --no-build-isolation ."
    below = {name: below_autograd(op) for name, op in vars(ops).items()}
    return SimpleNamespace(**{**below, **_fast(below)}, registered=ops), ""


def _fast(below: dict[str, Callable]) -> dict[str, Callable]:
    """The same ops for fast calls on CPU tensors, without torch's dispatcher (csrc/bind/fastcall.h).

    They pass every other call on to ``below``. Without torch's DLPack exchange table there are none, and no call is
    fast.
    """
    from . import _C  # type: ignore[attr-defined]

    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if table is None:
        return {}
    resolving = (  # modes that change how a call is served or differentiated
        _is_any_autocast_enabled,
        _are_functorch_transforms_active,
        _len_torch_function_stack,
        _is_tracing,
        (forward_ad, "_current_level", -1),
    )
    running = (
        _len_torch_dispatch_stack,
        _is_tracing,
        (profiler, "_is_profiler_enabled", False),
    )  # modes that see each op
    classes, is_neg = (torch._C.TensorBase, torch.Tensor, torch.nn.Parameter), torch.empty(0).is_neg
    functions = _C.connect(table, classes, is_neg, torch.is_grad_enabled, resolving, running, below)
    if functions:
        dispatch.call_key = _C.call_key
    return functions or {}


# ------------------------------------------------------------------------------- CUDA
def _cuda(ops) -> tuple[SimpleNamespace | None, str]:
    """The CUDA kernels, or None and why they are missing. Loads their library only where CUDA works."""
    if not torch.cuda.is_available():
        built = importlib.util.find_spec("pygpt._cuda") is not None
        return None, "torch finds no GPU here" + ("" if built else "; nor were the CUDA kernels built")
    try:
        importlib.import_module("pygpt._cuda")
    except ImportError as e:
        return None, f"the CUDA kernels are missing ({e}); with nvcc: pip install --no-build-isolation ."
    return SimpleNamespace(**{name: below_autograd(op) for name, op in vars(ops).items()}, registered=ops), ""


@cache
def cuda_objection(device: torch.device) -> str:
    """Why the CUDA kernels can't run on this GPU. Initialises CUDA, so it is called only when a call uses the GPU."""
    if device.type != "cuda":
        return ""
    from . import _cuda  # type: ignore[attr-defined]

    driver, runtime = (version // 1000 for version in _cuda.versions())
    if driver < runtime:  # any driver of the same major version will do
        return f"the CUDA kernels were built with CUDA {runtime}, this machine's driver is of CUDA {driver}"
    return _code_objection(_cuda.code(), *torch.cuda.get_device_capability(device))


def _code_objection(built: str, major: int, minor: int) -> str:
    """Why none of the code in the library, such as "sm_80 sm_90a compute_80", runs on a GPU of this capability."""
    capability = 10 * major + minor
    for code, number, letter in re.findall(r"(sm|compute)_(\d+)([af]?)", built):
        arch = int(number)
        same_family = arch // 10 == major or code == "compute"  # every later GPU can compile PTX
        if arch == capability or (letter != "a" and same_family and arch < capability):
            return ""
    hint = "; set PYGPT_CUDA_ARCHS" if capability >= 80 else ""
    return f"the CUDA kernels were built for {built.replace(' ', ', ')}, this GPU is sm_{capability}{hint}"


# ------------------------------------------------------------------------------- Triton
def _triton() -> tuple[Any, str, tuple]:
    """The Triton kernels, why they are missing, and the devices they serve. Imports Triton only where it can run."""
    devices = ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed; pip install 'triton>=3.6'", devices
    if devices == ("cuda",) and not torch.cuda.is_available():
        reason = "torch finds no GPU here; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly"
        return None, reason, devices
    try:
        return importlib.import_module("pygpt.triton_kernels"), "", devices
    except ImportError as e:
        return None, f"Triton cannot be used ({e})", devices


# ------------------------------------------------------------------------------- the table
ATTENTION_FEATURES = (
    "attn_mask", "alibi_slopes", "sink", "dropout_p", "softcap", "window", "lower_right", "enable_gqa", "return_lse",
)  # fmt: skip


def _head_dim(library: str) -> int | None:
    """The widest heads that a compiled library takes, if it is loaded."""
    return getattr(sys.modules.get(library), "max_head_dim", None)


def _fill():
    ops, opaque = register_ops("pygpt", vars(REFERENCE)), tuple(op for op in OPS if OPS[op].opaque)
    cpp, no_cpp = _cpp(ops)
    cuda, no_cuda = _cuda(ops)
    triton, no_triton, triton_devices = _triton()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

    def limits(serves: Any, max_head_dim: int | None) -> dict:
        """A backend's limits. Its ops are those with a kernel, or all where the backend itself is missing."""
        names = tuple(op for op in OPS if serves is None or serves(f"{op}_fwd"))
        features: dict[str, tuple[str, ...]] = dict.fromkeys(("attention", "qkv_attention"), ATTENTION_FEATURES)
        features |= dict.fromkeys(("dropout_add_layer_norm", "dropout_add_rms_norm"), ("dropout_p",))
        return {"ops": names, "features": features, "max_head_dim": max_head_dim}

    of_cpp = limits(cpp and (lambda name: has_kernel(f"pygpt::{name}", "CPU")), _head_dim("pygpt._C"))
    of_cuda = limits(cuda and (lambda name: has_kernel(f"pygpt::{name}", "CUDA")), _head_dim("pygpt._cuda"))
    of_triton = limits(triton and partial(hasattr, triton), triton and triton.attention.MAX_HEAD_DIM)
    for row in (
        Backend("cpp", cpp, no_cpp, ops, ("cpu",), **of_cpp),
        Backend(
            "triton", triton, no_triton, getattr(triton, "registered", None), triton_devices, dtypes=FLOATS[1:],
            **of_triton,
        ),
        Backend("cuda", cuda, no_cuda, ops, ("cuda",), cuda_objection, FLOATS[1:], **of_cuda),
        Backend("torch", REFERENCE, registered=register_ops("pygpt_torch", vars(REFERENCE), opaque)),
    ):  # fmt: skip
        TABLE[row.name] = row
    dispatch.fast_head_dim = min((row.max_head_dim for row in TABLE.values() if row.max_head_dim), default=sys.maxsize)


_fill()
