"""pygpt.enable: torch's own functions run on our kernels, so that a model needs no change.

torch.nn.functional's functions call ops of ATen, and here a kernel of ours is put in the place of ATen's:

    linear, layer_norm, rms_norm, scaled_dot_product_attention    at the CompositeImplicitAutograd key, above autograd
    gelu, gelu_backward                                            at the CPU and CUDA keys, below autograd

An override takes the arguments of ATen's op and asks `dispatch` as the public function of `pygpt.functional` does. What
no kernel serves, and what is wrong, goes to the kernel that was there before, which gives torch's own result or error.

`composite_gradients` (ops/common.py) differentiates torch's own functions, and chooses the backend "torch" for it. That
choice, as any choice of that backend, sends an override to the kernel that was there.

`register_flash_attention` offers attention to torch.nn.attention.activate_flash_attention_impl as "pygpt".
"""

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _dispatch_has_kernel_for_dispatch_key,
    _dispatch_keys,
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _get_flash_sdp_enabled,
)
from torch.compiler import is_dynamo_compiling

from .. import dispatch
from ..autocast import autocast
from ..dispatch import REFERENCE, Backend, Call, Op, log_fallback, lookup, pick, serve, state, tensors_of
from ..ops.attention import attention_composite
from ..ops.attention_arguments import checked_scale, is_fast
from ..ops.mlp import linear_composite, shape_error
from ..ops.norm import layer_norm_composite, rms_norm_composite
from ..ops.norm_arguments import fitting_dims, machine_eps

BAD_ARGUMENTS = IndexError, RuntimeError, TypeError, ValueError  # what an op's `prepare` raises


# ------------------------------------------------------------------------------- what served a call
class Counts:
    """Calls by the op's name, those that torch's kernel served also by the reason; and the ops in compiled graphs."""

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()
        self.torchs: Counter[tuple[str, str]] = Counter()
        self.traced: set[str] = set()
        self.lock = threading.Lock()

    def add(self, name: str, lead: Tensor) -> None:
        with self.lock:
            if type(lead).__module__.startswith("torch._subclasses"):  # which stands for a tensor while a graph is made
                self.traced.add(name)
            else:
                self.served[name] += 1

    def __str__(self) -> str:
        parts = ["served " + (", ".join(f"{name} {n}" for name, n in sorted(self.served.items())) or "no call")]
        if self.traced:
            parts.append(f"in compiled graphs {', '.join(sorted(self.traced))}")
        left = [f"{name} {n} ({reason})" for (name, reason), n in sorted(self.torchs.items())]
        return "; ".join([*parts, *(["left to PyTorch " + ", ".join(left)] if left else [])])


counts: Counts | None = None  # where calls are counted, for `pygpt run`


# ------------------------------------------------------------------------------- one call
class Original:
    """The kernel of an ATen op that is there when this is made."""

    def __init__(self, name: str, key: str) -> None:
        self.kernel = torch.library.get_kernel(f"aten::{name}", key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        keys = (_dispatch_keys(args[0]) | _dispatch_tls_local_include_set()) - _dispatch_tls_local_exclude_set()
        return self.kernel.call_boxed(keys, *args, **kwargs)


def _prepared(op: Op, args: tuple, kwargs: dict, objection: str) -> Call:
    """The call in canonical form. Bad arguments are a reason to ask torch's kernel, which raises torch's error."""
    if objection:
        return Call(args[:1], error=RuntimeError(f"pygpt.{op.public.__name__}: {objection}"))
    try:
        return autocast(op, op.prepare(*args, **kwargs))
    except BAD_ARGUMENTS as e:
        return Call(args[:1], error=e)


def _left(op: Op, prepared: Call, name: str) -> None:
    """Notes that torch's kernel gets a call."""
    if counts is not None:
        choice = dispatch.choose(op.name, tensors_of(op, prepared.args), prepared.features, prepared.error)
        device = prepared.args[0].device.type
        rows = [row for row in dispatch.TABLE.values() if row.name in choice.rejected and device in row.devices]
        rows = [row for row in rows if not row.missing] or rows
        reasons = {reason: None for row in rows for reason in choice.rejected[row.name]}
        with counts.lock:
            counts.torchs[name, "; ".join(reasons) or f"no kernels for {device} tensors"] += 1
    log_fallback(op, prepared)


def _composite(op: str, torchs: Callable[[], Any], *args: Any, objection: str = "", **kwargs: Any) -> Any:
    """Serves a call above autograd from the arguments of the public function.

    torchs: runs torch's kernel. objection: why no kernel of ours shall serve the call.
    """
    known = dispatch.OPS[op]
    prepared = _prepared(known, args, kwargs, objection)
    row = pick(op, tensors_of(known, prepared.args), prepared.features, prepared.error)
    if row.kernels is REFERENCE:
        _left(known, prepared, known.public.__name__)
        return torchs()
    if counts is not None:
        counts.add(known.public.__name__, args[0])
    return serve(known, row, prepared)


def _explicit(op: str, name: str, torchs: Callable[[], Any], tensors: tuple, args: tuple) -> Any:
    """Serves a call below autograd by the kernel ``name`` of an op, and stores the kernel of a fast one.

    tensors: those that decide which backend serves the call. args: the kernel's.
    """
    key = name, dispatch.call_key(0, *tensors)
    kernel = state.cache.get(key)
    if kernel is None:
        known, wrong = dispatch.OPS[op], [t.dtype for t in tensors if t.dtype not in dispatch.FLOATS]
        error = TypeError(f"pygpt.{op}: input must be floating point, got {wrong[0]}") if wrong else None
        row = pick(op, tensors, error=error)
        if row.kernels is REFERENCE:
            _left(known, Call(tensors, error=error), _aten_name(name))
            return torchs()
        kernel = getattr(row.kernels, name)
        if key[1] is not None:
            state.cache[key] = kernel
    if counts is not None:
        counts.add(_aten_name(name), tensors[0])
    return kernel(*args)


def _aten_name(kernel: str) -> str:
    return kernel.removesuffix("_fwd").replace("_bwd", "_backward")


# ------------------------------------------------------------------------------- the overrides
# Each is made from the kernel that was there. `lookup` may give PyTorch's own expression, which would come back here.
def _linear(original: Original) -> Callable:
    def linear(input, weight, bias=None):
        kernel = lookup("linear", input, weight, bias)
        if kernel in (None, linear_composite) or shape_error("linear", input.shape, weight.shape, bias):
            return _composite("linear", lambda: original(input, weight, bias), input, weight, bias)
        if counts is not None:
            counts.add("linear", input)
        return kernel(input, weight, bias)

    return linear


def _layer_norm(original: Original) -> Callable:
    def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
        kernel, args = lookup("layer_norm", input, weight, bias), (input, normalized_shape, weight, bias, eps)
        if kernel in (None, layer_norm_composite) or fitting_dims(*args[:2], eps, weight, bias) != 1:
            return _composite("layer_norm", lambda: original(*args, cudnn_enable), *args)
        if counts is not None:
            counts.add("layer_norm", input)
        return kernel(input, weight, bias, eps)

    return layer_norm


def _rms_norm(original: Original) -> Callable:
    def rms_norm(input, normalized_shape, weight=None, eps=None):
        kernel, epsilon = lookup("rms_norm", input, weight), machine_eps(input) if eps is None else eps
        if (
            kernel in (None, rms_norm_composite)
            or fitting_dims(input, normalized_shape, epsilon, weight) != 1
            or (input.dim() > 3 and not input.is_contiguous())  # it may be channels_last, and so is the result
        ):
            args = input, normalized_shape, weight, eps
            return _composite("rms_norm", lambda: original(*args), *args)
        if counts is not None:
            counts.add("rms_norm", input)
        return kernel(input, weight, epsilon, 0.0)

    return rms_norm


def _attention(original: Original) -> Callable:
    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
    ):
        kernel = lookup("attention", query, key, value)
        options = attn_mask is not None or dropout_p or enable_gqa or not _get_flash_sdp_enabled()
        if options or kernel in (None, attention_composite) or not is_fast(query, key, value):
            args = query, key, value, attn_mask, dropout_p, is_causal
            more, objection = {"scale": scale, "enable_gqa": enable_gqa}, ""
            if not _get_flash_sdp_enabled():
                objection = "torch.nn.attention.sdpa_kernel allows no flash attention"
            elif attn_mask is not None and is_causal:
                objection = "attn_mask and is_causal are both set"
            return _composite("attention", lambda: original(*args, **more), *args, objection=objection, **more)
        if counts is not None:
            counts.add("scaled_dot_product_attention", query)
        results = kernel(query, key, value, is_causal, checked_scale("", scale, query.shape[-1]))
        return results[0] if isinstance(results, tuple) else results

    return scaled_dot_product_attention


def _gelu(original: Original) -> Callable:
    def gelu(self, *, approximate="none"):
        torchs = partial(original, self, approximate=approximate)
        if approximate not in ("none", "tanh"):
            return torchs()
        return _explicit("gelu", "gelu_fwd", torchs, (self,), (self, approximate))

    return gelu


def _gelu_backward(original: Original) -> Callable:
    def gelu_backward(grad_output, self, *, approximate="none"):
        torchs = partial(original, grad_output, self, approximate=approximate)
        if grad_output.shape != self.shape or grad_output.dtype != self.dtype:
            return torchs()
        return _explicit("gelu", "gelu_bwd", torchs, (grad_output, self), (grad_output, self, approximate))

    return gelu_backward


# ------------------------------------------------------------------------------- torch's door for attention
def _flash_attention(original: Original) -> Callable:
    def flash_attention(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        """-> out laid out as query is, logsumexp (B, H, L) laid out (B, L, H), as torch's own."""
        call, row = _flash_call(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if row.kernels is REFERENCE:
            _left(dispatch.OPS["attention"], call, "flash attention")
            return original(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        if counts is not None:
            counts.add("flash attention", query)
        out, lse = row.kernels.attention_fwd(*call.args)
        return _strided_like(torch.empty_like(query), out), _heads_inside(lse)

    return flash_attention


def _flash_attention_backward(original: Original) -> Callable:
    def flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
    ):
        """-> the gradients of query, key and value, laid out (B, T, H, E), as torch's own."""
        call, row = _flash_call(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if row.kernels is REFERENCE:
            _left(dispatch.OPS["attention"], call, "flash attention backward")
            args = grad_out, query, key, value, out, logsumexp, dropout_p, is_causal
            return original(*args, attn_mask=attn_mask, scale=scale)
        if counts is not None:
            counts.add("flash attention backward", query)
        q, k, v, causal, scale, *options = call.args
        lse = logsumexp.contiguous()
        grads = row.kernels.attention_bwd(grad_out, None, q, k, v, out, lse, causal, scale, (True,) * 3, *options)
        return tuple(map(_heads_inside, grads[:3]))

    return flash_attention_backward


def _flash_call(query, key, value, attn_mask, dropout_p, is_causal, scale) -> tuple[Call, Backend]:
    """The call in canonical form, and the backend that serves it. torch hands over grouped heads as they are."""
    op = dispatch.OPS["attention"]
    more = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1], "return_lse": True}
    objection = "dropout, whose random bits are not kept for backward" if dropout_p else ""
    call = _prepared(op, (query, key, value, attn_mask, 0.0, is_causal), more, objection)
    return call, pick(op.name, tensors_of(op, call.args), call.features, call.error)


def _strided_like(like: Tensor, t: Tensor) -> Tensor:
    return t if t.stride() == like.stride() else like.copy_(t)


def _heads_inside(t: Tensor) -> Tensor:
    """(B, H, T, ...), in memory (B, T, H, ...)."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def register_flash_attention() -> None:
    """Offers "pygpt" to torch.nn.attention.activate_flash_attention_impl, which overrides torch's fused CPU kernel."""
    if offer := getattr(torch.nn.attention, "register_flash_attention_impl", None):
        offer("pygpt", register_fn=lambda: Overrides("flash_attention"))


# ------------------------------------------------------------------------------- on and off
ABOVE_AUTOGRAD = {"CompositeImplicitAutograd": "AutogradCPU"}  # key: the key at which torch's kernel is found
BELOW_AUTOGRAD = {"CPU": "CPU", "CUDA": "CUDA"}
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
FUNCTIONS: dict[str, dict[str, tuple[dict[str, str], Callable[[Original], Callable]]]] = {
    # name: {op of ATen: (its keys, the override)}
    "linear": {"linear": (ABOVE_AUTOGRAD, _linear)},
    "layer_norm": {"layer_norm": (ABOVE_AUTOGRAD, _layer_norm)},
    "rms_norm": {"rms_norm": (ABOVE_AUTOGRAD, _rms_norm)},
    "scaled_dot_product_attention": {"scaled_dot_product_attention": (ABOVE_AUTOGRAD, _attention)},
    "gelu": {"gelu": (BELOW_AUTOGRAD, _gelu), "gelu_backward": (BELOW_AUTOGRAD, _gelu_backward)},
    "flash_attention": {
        FLASH: ({"CPU": "CPU"}, _flash_attention),
        f"{FLASH}_backward": ({"CPU": "CPU"}, _flash_attention_backward),
    },
}
NAMES = tuple(name for name in FUNCTIONS if name != "flash_attention")  # which `enable` takes


class Overrides:
    """The overrides of one entry of FUNCTIONS, in force from here until `remove`."""

    def __init__(self, name: str) -> None:
        if not hasattr(torch.library, "get_kernel"):
            raise RuntimeError(f"pygpt.enable: torch {torch.__version__} has no torch.library.get_kernel; 2.10 has it")
        self.library = torch.library.Library("aten", "IMPL")
        try:
            for aten, (keys, override) in FUNCTIONS[name].items():
                for key, of_original in keys.items():
                    if _dispatch_has_kernel_for_dispatch_key(f"aten::{aten}", key):
                        with warnings.catch_warnings():  # torch warns of the first override in a process
                            warnings.simplefilter("ignore")
                            self.library.impl(aten, override(Original(aten, of_original)), key)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        self.library._destroy()


class Enabled:
    """What `enable` returns. As a context manager it ends what its call of `enable` has begun."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with _lock:
            _switch({name: [e for e in calls if e is not self] for name, calls in _enabled.items()})

    def __repr__(self) -> str:
        return f"<pygpt.enable: {', '.join(self.names)}>"


_lock = threading.RLock()
_enabled: dict[str, list[Enabled]] = {name: [] for name in NAMES}  # the calls of `enable` that keep a function on
_overrides: dict[str, Overrides] = {}


def enable(*ops: str) -> Enabled:
    """Lets torch's own functions run on pygpt's kernels, in this whole process, so that no model needs a change.

    ``ops`` are names among "linear", "layer_norm", "rms_norm", "scaled_dot_product_attention" and "gelu", functions of
    torch.nn.functional; without any, all of them. What no kernel serves goes to torch's kernel, as `pygpt.explain`
    tells for the function of that name. `pygpt.backend` and PYGPT_BACKEND choose as they do for pygpt's functions.

    Calls nest: each `disable` ends the latest one. ``with pygpt.enable("linear", "gelu"): ...`` is on inside, and
    restores what was on before. A graph recorded while on stays right. Switching resets torch.compile.

    An unknown name raises ValueError, what is no name TypeError, a torch without the needed functions RuntimeError, and
    none of them changes anything.
    """
    names = _known("enable", ops)
    call = Enabled(names)
    with _lock:
        _switch({name: [*calls, call] if name in names else calls for name, calls in _enabled.items()})
    return call


def disable(*ops: str) -> None:
    """Ends the latest `enable` of each of these functions, by default of all. One that is off stays off."""
    names = _known("disable", ops)
    with _lock:
        _switch({name: calls[:-1] if name in names else calls for name, calls in _enabled.items()})


def _known(function: str, ops: tuple[str, ...]) -> tuple[str, ...]:
    if others := [op for op in ops if not isinstance(op, str)]:
        got, example = type(others[0]).__name__, f'pygpt.{function}("linear", "gelu")'
        raise TypeError(f"pygpt.{function}: takes names, as in {example}, got {got}; no model is passed")
    if unknown := [op for op in ops if op not in NAMES]:
        raise ValueError(f"pygpt.{function}: unknown op {unknown[0]!r}; known: {', '.join(NAMES)}")
    if is_dynamo_compiling():
        raise RuntimeError(f"pygpt.{function}: call it outside of the compiled function")
    return ops or NAMES


def _switch(enabled: dict[str, list[Enabled]]) -> None:
    """Makes these calls of `enable` the ones in force."""
    made: dict[str, Overrides] = {}
    try:
        for name in NAMES:
            if enabled[name] and name not in _overrides:
                made[name] = Overrides(name)
    except BaseException:
        for overrides in made.values():
            overrides.remove()
        raise
    ended = [name for name in _overrides if not enabled[name]]
    for name in ended:
        _overrides.pop(name).remove()
    _overrides.update(made)
    _enabled.update(enabled)
    if made or ended:
        _separate_compiled()


_tag = ""


def _separate_compiled() -> None:
    """Keeps what torch.compile made with other functions on from being used, in this process and in caches on disk.

    The graphs of torch.compile name torch's functions, whatever kernels stand behind them.
    """
    global _tag
    from .. import __version__

    config, before = torch.compiler.config, _tag
    available = ",".join(name for name, row in dispatch.TABLE.items() if not row.missing)
    on = ",".join(name for name in NAMES if name in _overrides)
    _tag = f" pygpt {__version__}: {on} by {dispatch.FROM_ENVIRONMENT or available}" if on else ""
    config.cache_key_tag = config.cache_key_tag.replace(before, "") + _tag
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
