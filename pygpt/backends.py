"""What there is to pick from: the compiled libraries and Triton are loaded here, and fill `dispatch.TABLE`.

Each backend's kernels come as two namespaces of <op>_fwd and <op>_bwd. ``kernels`` are what eager calls run; ``registered``
are the same as ops of torch's dispatcher, which torch.compile, torch.export and torch.jit.trace put into their graphs. Those
have gradients of their own, by the same formulas as the eager autograd Functions.
"""

import importlib
import importlib.abc
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad, profiler

from . import dispatch
from .dispatch import FLOATS, OPS, REFERENCE, TABLE, Backend, Op
from .ops.attention import MAX_HEAD_DIM
from .ops.common import as_tuple


# ------------------------------------------------------------------------------- ops of torch's dispatcher
def registered(namespace: str, library=None) -> SimpleNamespace:
    """The overloads torch.ops.<namespace>.<op>_fwd and _bwd of every op, given shapes, gradients and FLOP counts."""
    packets = getattr(torch.ops, namespace)
    found = SimpleNamespace(
        **{name: getattr(packets, name).default for op in OPS for name in (f"{op}_fwd", f"{op}_bwd")}
    )
    for op in OPS.values():
        for name, shapes in ((f"{op.name}_fwd", op.fwd), (f"{op.name}_bwd", op.bwd)):
            torch.library.register_fake(f"{namespace}::{name}", shapes, lib=library)
        _register_gradients(namespace, op, found, library)
    when_imported("torch.utils.flop_counter", lambda: _register_flops(packets))
    return found


def _register_flops(packets):
    from torch.utils.flop_counter import register_flop_formula

    for op in OPS.values():
        for direction, formula in zip(("fwd", "bwd"), op.flops or ()):
            register_flop_formula(getattr(packets, f"{op.name}_{direction}"))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds one module as Python does, once, and acts as soon as it is loaded."""

    def __init__(self, name: str, action: Callable):
        self.name, self.action = name, action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        load = spec.loader.exec_module

        def load_and_act(module):
            load(module)
            self.action()

        spec.loader.exec_module = load_and_act
        return spec


def when_imported(name: str, action: Callable):
    """Acts now if the module is loaded, otherwise when somebody loads it: for modules too dear to load for that alone."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _WhenImported(name, action))


def _register_gradients(namespace: str, op: Op, kernels, library):
    """The autograd Function's formulas for <op>_fwd; none for <op>_bwd, whose derivative would be silently zero."""
    arguments = len(inspect.signature(op.fwd).parameters)

    def save(ctx, inputs, output):
        results = as_tuple(output)
        ctx.kernels = kernels
        op.function.save(ctx, inputs, results)
        ctx.mark_non_differentiable(*results[op.results :])

    def gradients(ctx, *grads):
        return op.function.gradients(ctx, ctx.needs_input_grad[:arguments], *grads[: op.results])

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{namespace}::{op.name}_bwd has no derivative: for a second one, take the first of {op.name}_fwd with "
            "create_graph=True"
        )

    torch.library.register_autograd(f"{namespace}::{op.name}_fwd", gradients, setup_context=save, lib=library)
    torch.library.register_autograd(f"{namespace}::{op.name}_bwd", refuse, lib=library)


def below_autograd(overload) -> Callable:
    """The op for callers that see to the gradients themselves; it leaves out 3 us of the dispatcher's autograd."""
    op, guard = overload._op, torch._C._AutoDispatchBelowAutograd

    def call(*args):
        with guard():
            return op(*args)

    return call


# ------------------------------------------------------------------------------- C++
def _compiled() -> tuple[SimpleNamespace | None, str]:
    """The ops registered by the C++ library."""
    try:
        importlib.import_module("pygpt._C")  # registers torch.ops.pygpt
    except ImportError as e:
        return None, f"the compiled extension is missing ({e}); build it with: pip install --no-build-isolation ."
    return registered("pygpt"), ""


def _fast(ops) -> tuple[SimpleNamespace | None, Callable]:
    """The same ops for plain calls on CPU tensors, without torch's dispatcher (csrc/direct.h); and `dispatch.call_key`.

    They hand every other call on to the dispatcher. Where torch has no DLPack exchange table they always do, and no call
    has a key.
    """
    if ops is None:
        return None, dispatch.no_key
    handed_on = {name: below_autograd(op) for name, op in vars(ops).items()}
    functions, table = None, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if table is not None:
        from . import _C

        modes = (
            _is_any_autocast_enabled,
            _are_functorch_transforms_active,
            _get_tracing_state,
            _len_torch_function_stack,
        )
        deciding = modes, ((forward_ad, "_current_level", -1),)
        watching = (_len_torch_dispatch_stack, _get_tracing_state), ((profiler, "_is_profiler_enabled", False),)
        classes = torch.Tensor, torch.nn.Parameter
        functions = _C.connect(
            table, *classes, torch.Tensor.is_neg, torch.is_grad_enabled, *deciding, *watching, handed_on
        )
    if functions is None:
        return SimpleNamespace(**handed_on, registered=ops), dispatch.no_key
    return SimpleNamespace(**functions, registered=ops), _C.kind


# ------------------------------------------------------------------------------- CUDA
def _cuda(ops) -> tuple[SimpleNamespace | None, str]:
    """The same ops once the CUDA kernels are registered too. Loads their library only where CUDA works."""
    if ops is None:
        return None, "the compiled extension, which declares the ops, is missing"
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


# ------------------------------------------------------------------------------- Triton
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


# ------------------------------------------------------------------------------- the table
def _fill():
    ops, why = _compiled()
    fast, dispatch.call_key = _fast(ops)
    cuda, why_no_cuda = _cuda(ops)
    triton, why_no_triton, triton_devices = _triton()
    ours = {"ops": tuple(OPS), "features": {"attention": ("return_lse",)}, "max_head_dim": MAX_HEAD_DIM}
    for row in (
        Backend("cpp", fast, why, ops, ("cpu",), **ours),
        Backend(
            "triton",
            triton,
            why_no_triton,
            getattr(triton, "registered", None),
            triton_devices,
            dtypes=FLOATS[1:],
            **ours,
        ),
        Backend("cuda", cuda, why_no_cuda, ops, ("cuda",), cuda_objection, FLOATS[1:], **ours),
        Backend("torch", REFERENCE),
    ):
        TABLE[row.name] = row


_fill()
