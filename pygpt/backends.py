"""What there is to pick from: the ops are defined, the compiled libraries and Triton loaded, `dispatch.TABLE` filled.

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
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import SimpleNamespace

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
from .dispatch import FLOATS, KERNEL_NAMES, OPS, REFERENCE, TABLE, Backend, Op
from .ops.common import as_tuple


# ------------------------------------------------------------------------------- ops of torch's dispatcher
@cache  # torch forgets what was registered through a Library that nobody holds
def define_ops(namespace: str) -> torch.library.Library:
    """torch.ops.<namespace>.<op>_fwd and _bwd of every op, with the schemas and shapes of the functions in pygpt/ops/."""
    library = torch.library.Library(namespace, "DEF")
    for name in KERNEL_NAMES:
        reference = getattr(REFERENCE, name)
        library.define(name + torch.library.infer_schema(reference, mutates_args=()))
        torch.library.register_fake(f"{namespace}::{name}", reference, lib=library)
    return library


def register_ops(namespace: str, kernels: Mapping[str, Callable]) -> SimpleNamespace:
    """Defines the ops and returns their overloads. Gradients are the autograd Functions', FLOP counts the ops' own.

    ``kernels`` serve every device that no library registers others for; an op may have none.
    """
    library, packets = define_ops(namespace), getattr(torch.ops, namespace)
    for name in KERNEL_NAMES:
        if name in kernels:
            library.impl(name, kernels[name], "CompositeExplicitAutograd")
    registered = SimpleNamespace(**{name: getattr(packets, name).default for name in KERNEL_NAMES})
    for op in OPS.values():
        _register_gradients(library, op, registered)
    when_imported("torch.utils.flop_counter", lambda: _register_flops(packets))
    return registered


def _register_gradients(library, op: Op, kernels):
    """The autograd Function's formulas for <op>_fwd; none for <op>_bwd, whose derivative would be silently zero."""
    fwd, bwd = f"{library.ns}::{op.name}_fwd", f"{library.ns}::{op.name}_bwd"
    arguments = len(inspect.signature(op.fwd).parameters)

    def save(ctx, inputs, output):
        results = as_tuple(output)
        ctx.kernels = kernels
        op.function.save(ctx, inputs, results)
        ctx.mark_non_differentiable(*results[op.results :])

    def gradients(ctx, *grads):
        return op.function.gradients(ctx, ctx.needs_input_grad[:arguments], *grads[: op.results])

    def refuse(ctx, *grads):
        raise RuntimeError(f"{bwd} has no derivative: for a second one, differentiate {fwd} with create_graph=True")

    torch.library.register_autograd(fwd, gradients, setup_context=save, lib=library)
    torch.library.register_autograd(bwd, refuse, lib=library)


def below_autograd(overload) -> Callable:
    """The op for callers that see to the gradients themselves; it leaves out 3 us of the dispatcher's autograd."""
    op, guard = overload._op, torch._C._AutoDispatchBelowAutograd

    def call(*args):
        with guard():
            return op(*args)

    return call


# ------------------------------------------------------------------------------- FLOP counts
def _register_flops(packets):
    from torch.utils.flop_counter import register_flop_formula

    for op in OPS.values():
        for direction, formula in zip(("fwd", "bwd"), op.flops or ()):
            register_flop_formula(getattr(packets, f"{op.name}_{direction}"))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds one module as Python does, and acts once it is loaded, which whoever merely asks for its spec does not do."""

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
        load = spec.loader.exec_module

        def load_and_act(module):
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        spec.loader.exec_module = load_and_act
        return spec


def when_imported(name: str, action: Callable):
    """Acts now if the module is loaded, otherwise when somebody loads it: for modules too dear to load for that alone."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _WhenImported(name, action))


# ------------------------------------------------------------------------------- C++
def _cpp(ops) -> tuple[SimpleNamespace | None, str]:
    """The ops once the C++ kernels are registered, and why they are not. Sets `dispatch.call_key`."""
    try:
        importlib.import_module("pygpt._C")
    except ImportError as e:
        return None, f"the compiled extension is missing ({e}); build it with: pip install --no-build-isolation ."
    below = {name: below_autograd(op) for name, op in vars(ops).items()}
    return SimpleNamespace(**{**below, **_fast(below)}, registered=ops), ""


def _fast(below: dict[str, Callable]) -> dict[str, Callable]:
    """The same ops for plain calls on CPU tensors, without torch's dispatcher (csrc/bind/fastcall.h).

    They hand every other call on to ``below``. Where torch has no DLPack exchange table there are none, and no call has
    a key.
    """
    from . import _C

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
    running = _len_torch_dispatch_stack, _is_tracing, (profiler, "_is_profiler_enabled", False)  # that see each op
    classes, is_neg = (torch._C.TensorBase, torch.Tensor, torch.nn.Parameter), torch.empty(0).is_neg
    functions = _C.connect(table, classes, is_neg, torch.is_grad_enabled, resolving, running, below)
    if functions:
        dispatch.call_key = _C.call_key
    return functions or {}


# ------------------------------------------------------------------------------- CUDA
def _cuda(ops) -> tuple[SimpleNamespace | None, str]:
    """The same ops once the CUDA kernels are registered too. Loads their library only where CUDA works."""
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
    ops = register_ops("pygpt", vars(REFERENCE))
    cpp, why_no_cpp = _cpp(ops)
    cuda, why_no_cuda = _cuda(ops)
    triton, why_no_triton, triton_devices = _triton()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

    def limits(serves: Callable | None, max_head_dim) -> dict:
        """The ops for which there are kernels; all where the backend itself is missing, which is reason enough."""
        names = tuple(op for op in OPS if serves is None or serves(f"{op}_fwd"))
        return {"ops": names, "features": {"attention": ("return_lse",)}, "max_head_dim": max_head_dim}

    head_dim = sys.modules["pygpt._C"].max_head_dim if cpp else None
    of_cpp = limits(cpp and (lambda name: has_kernel(f"pygpt::{name}", "CPU")), head_dim)
    of_cuda = limits(cuda and (lambda name: has_kernel(f"pygpt::{name}", "CUDA")), head_dim)
    of_triton = limits(triton and partial(hasattr, triton), triton and triton.attention.MAX_HEAD_DIM)
    for row in (
        Backend("cpp", cpp, why_no_cpp, ops, ("cpu",), **of_cpp),
        Backend(
            "triton", triton, why_no_triton, getattr(triton, "registered", None), triton_devices, dtypes=FLOATS[1:],
            **of_triton,
        ),
        Backend("cuda", cuda, why_no_cuda, ops, ("cuda",), cuda_objection, FLOATS[1:], **of_cuda),
        Backend("torch", REFERENCE),
    ):  # fmt: skip
        TABLE[row.name] = row
    dispatch.plain_head_dim = min((row.max_head_dim for row in TABLE.values() if row.max_head_dim), default=sys.maxsize)


_fill()
