"""Autocast: a call's tensors in the dtype that torch's op of the same name would give them.

The casts of a leaf are shared by its uses in an autocast region while a graph holds them, as torch's own cache does.
"""

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from .dispatch import Call, Op


def autocasting(device: str) -> bool:
    """Whether autocast is on for this type of device. Some types, such as "meta", have no autocast."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(op: "Op", prepared: "Call") -> "Call":
    """The call with its leading tensors cast as autocast would for torch's op of the same name.

    Options keep their dtype.
    """
    lead = prepared.args[0]
    device = lead.device.type
    if not autocasting(device) or lead.dtype == torch.float64:
        return prepared
    if op.lower_precision:
        dtype = torch.get_autocast_dtype(device)
    elif device == "cuda" and op.float32_on_cuda:
        dtype = torch.float32
    else:
        return prepared
    leading, rest = prepared.args[: len(op.tensors)], prepared.args[len(op.tensors) :]
    return prepared._replace(args=(*(_cast(a, dtype) if isinstance(a, Tensor) else a for a in leading), *rest))


class _Casts(dict):
    """(id of a leaf, dtype) -> (the leaf's state, a weak reference to its cast). A cast keeps its leaf alive."""

    def put(self, key: tuple, state: tuple, cast: Tensor) -> None:
        casts = weakref.ref(self)

        def forget(reference: weakref.ref) -> None:
            kept = casts()
            if kept is not None and kept.get(key, (None, None))[1] is reference:
                del kept[key]

        self[key] = state, weakref.ref(cast, forget)


class _Region(threading.local):
    """The autocast region that this thread is in."""

    def __init__(self) -> None:
        self.casts: Callable[[], _Casts | None] = lambda: None  # a weak reference to the result of `_casts`


_region = _Region()


def _casts(device: torch.device) -> _Casts:
    """The casts of this autocast region.

    A change of a leaf through ``.data`` cannot be noticed, so no cast may outlive its region, as in torch's own cache.
    Only that cache is cleared when a region ends. So it owns this dictionary, through the cast of an empty leaf.
    """
    casts = _region.casts()
    if casts is None:
        casts = _Casts()
        leaf = torch.empty(0, 0, dtype=torch.float32, device=device, requires_grad=True)
        empty = leaf.detach()
        node: Any = torch.addmm(leaf, empty, empty).grad_fn
        node.next_functions[0][0].metadata["pygpt"] = casts  # the node of the cast
        _region.casts = weakref.ref(casts)
    return casts


def _shares_cast(t: Tensor) -> bool:
    """Whether torch's own autocast would cache a cast of ``t``, and nothing records or transforms this call."""
    if is_compiling() or t.dtype != torch.float32 or t.layout != torch.strided:
        return False
    if not (t.is_leaf and t.requires_grad and torch.is_grad_enabled()) or t._is_view() or t.is_inference():
        return False
    if _len_torch_dispatch_stack() or _is_tracing() or _are_functorch_transforms_active():
        return False
    return torch.is_autocast_cache_enabled()


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in another dtype. All uses of a leaf in an autocast region share one cast while a graph holds it."""
    if not t.is_floating_point() or t.dtype in (dtype, torch.float64):  # autocast leaves float64 alone
        return t
    if not _shares_cast(t):
        return t.to(dtype)
    casts, key = _casts(t.device), (id(t), dtype)
    leaf_state = t._version, StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.shape, t.stride()
    cached_state, reference = casts.get(key, (None, None))
    if cached_state == leaf_state and (shared := reference()) is not None:
        shared._fix_weakref()  # a weak reference can outlive the Python object that C++ still shares
        return shared
    cast = t.to(dtype)
    casts.put(key, leaf_state, cast)
    return cast
