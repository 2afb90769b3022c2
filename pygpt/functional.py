"""The public ops. Names, argument order, meaning and errors follow torch.nn.functional.

Every function checks its arguments, brings them to the op's canonical shape, and hands them to the
backend that serves the call (see `pygpt.explain`). All accept float64, float32, bfloat16 and
float16, any strides, empty tensors, autocast and torch.compile, and differentiate any number of
times. Accumulation and row statistics are float32 (float64 for float64). Bad arguments raise
ValueError or TypeError before anything is computed.
"""

import inspect
import math
from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.attention.bias import CausalBias, CausalVariant

from . import autograd, backend, reference

__all__ = [
    "add_layer_norm", "gelu", "layer_norm", "linear", "mlp", "relu", "rms_norm", "scaled_dot_product_attention"
]  # fmt: skip

_FUNCTIONS = {
    "attention": autograd.Attention,
    "linear": autograd.Linear,
    "mlp": autograd.MLP,
    "layer_norm": autograd.LayerNorm,
    "add_layer_norm": autograd.AddLayerNorm,
    "rms_norm": autograd.RMSNorm,
    "gelu": autograd.GELU,
    "relu": autograd.ReLU,
}
_LOW_PRECISION = ("attention", "linear", "mlp")  # what autocast runs in its lower dtype


class _Explained(Exception):
    pass


def _ready(op: str, lead, *others):
    """Checks the tensors of a call; what is returned takes the op's canonical arguments and serves it.

    A plain call, of strided tensors of one dtype and device outside any mode, is looked up; others take `_run`.
    """
    kind = None if is_compiling() else backend.kind(_OPTIONAL[op], lead, *others)
    if kind is not None:
        run = backend.state.served.get((op, kind))
        if run is not None:
            return run
    _check(op, (lead, *others))
    return partial(_run, op) if kind is None or backend.state.explaining else partial(_run_first, op, kind)


def _check(op: str, tensors):
    """Floating tensors on one device, None only where optional; outside autocast some ops want one dtype as well."""
    public = f"pygpt.{_PUBLIC[op].__name__}"
    given = [(p.name, t) for p, t in zip(_PARAMETERS[op], tensors) if t is not None or p.annotation is Tensor]
    for name, t in given:
        if not isinstance(t, Tensor):
            raise TypeError(f"{public}: {name} must be a Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{public}: {name} must be floating point, got {t.dtype}")
        if t.device != tensors[0].device:
            raise ValueError(f"{public}: {name} is on {t.device}, the first argument on {tensors[0].device}")
    if op in _LOW_PRECISION and not reference.autocasting(tensors[0].device.type):
        first, lead = given[0]
        for name, t in given:
            if t.dtype != lead.dtype:
                raise TypeError(f"{public}: {name} is {t.dtype}, {first} is {lead.dtype}; they must be equal")


def _run_first(op: str, kind: int, *args):
    """Serves the first plain call of its kind, and remembers how."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    row = backend.pick(op, tensors)
    if row.kernels is reference:
        run = getattr(reference, op)
    else:
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        run = autograd.bound(op, _FUNCTIONS[op], row.plain or row.kernels, needs_gradient)
    backend.state.served[op, kind] = run
    return run(*args)


def _run(op: str, *args, **features):
    """Serves any canonical call by the picked backend; ``features`` hold only what is in use."""
    device = args[0].device.type
    if reference.autocasting(device) and args[0].dtype != torch.float64:
        args = _autocast(op, device, args)
    tensors = [a for a in args if isinstance(a, Tensor)]
    if backend.state.explaining:
        raise _Explained(backend.choose(op, tensors, features))
    k = backend.pick(op, tensors, features).kernels
    if k is reference:
        return getattr(reference, op)(*args, **features)
    return autograd.apply(op, _FUNCTIONS[op], k, tensors, args)


def _autocast(op: str, device: str, args):
    """Casts as autocast would for torch's op of the same name."""
    if op in _LOW_PRECISION:
        dtype = torch.get_autocast_dtype(device)
    elif device == "cuda" and op in ("layer_norm", "add_layer_norm", "rms_norm"):
        dtype = torch.float32
    else:
        return args
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def explain(op, *args, **kwargs) -> backend.Choice:
    """Which backend would serve ``op(*args, **kwargs)``, and why each one before it would not.

    op: a function of this module, or its name. Returns a `backend.Choice` with ``op``, ``backend``
    and ``rejected`` (backend name -> list of reasons); nothing is computed.

    >>> print(pygpt.explain("layer_norm", x, (768,)))
    """
    public = {name: globals()[name] for name in __all__}
    function = public.get(op) if isinstance(op, str) else op
    if function not in public.values():
        raise ValueError(f"pygpt.explain: unknown op {op!r}; known: {', '.join(__all__)}")
    backend.state.explaining, served, backend.state.served = True, backend.state.served, {}
    try:
        function(*args, **kwargs)
    except _Explained as e:
        return e.args[0]
    finally:
        backend.state.explaining, backend.state.served = False, served
    raise AssertionError("an op returned without asking for a backend")


# ------------------------------------------------------------------------------- attention
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
):
    """softmax(scale * query key^T + bias) value, with the arguments of torch's function of this name.

    FlashAttention-2 (Dao 2023): the (L, S) matrix is never in memory. (Calls with attn_mask, dropout_p, enable_gqa,
    window, alibi_slopes or softcap have no kernel yet: PyTorch computes them, some by way of that matrix.)

    query (..., Hq, L, E), key (..., Hkv, S, E), value (..., Hkv, S, Ev) -> (..., Hq, L, Ev).
    attn_mask: boolean (True = may attend) or floating, broadcastable to (..., Hq, L, S); or
        torch.nn.attention.bias.causal_lower_right(L, S).
    is_causal: query i attends to keys j <= i (aligned top-left, as in torch)::

            S = 5       L = 3
            i=0  1 . . . .
            i=1  1 1 . . .
            i=2  1 1 1 . .

    scale: default 1/sqrt(E). enable_gqa: Hq may be a multiple of Hkv.
    window=(left, right): inclusive distances along the causal diagonal, -1 = unlimited.
    alibi_slopes (Hq,) or (B, Hq): bias -slope * distance to that diagonal (Press et al. 2021).
    softcap c > 0: scores become c * tanh(score / c), before masks.
    return_lse: also returns lse (..., Hq, L), the natural log of each row's sum of exponentials
        (float32; float64 for float64), differentiable.
    A fully masked row gives output 0, lse -inf and zero gradients.
    """
    op = "pygpt.scaled_dot_product_attention"
    run = _ready("attention", query, key, value)
    shapes = of_query, of_key, of_value = query.shape, key.shape, value.shape
    if min(map(len, shapes)) < 2:
        name, shape = next(pair for pair in zip(("query", "key", "value"), shapes, strict=True) if len(pair[1]) < 2)
        raise ValueError(f"{op}: {name} needs at least 2 dimensions, got shape {tuple(shape)}")
    L, E, S, Ev = of_query[-2], of_query[-1], of_key[-2], of_value[-1]
    if of_key[-1] != E:
        raise ValueError(f"{op}: key has head dimension {of_key[-1]}, query {E}; they must be equal")
    if of_value[-2] != S:
        raise ValueError(f"{op}: value has {of_value[-2]} positions, key {S}; they must be equal")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    if not softcap >= 0.0:
        raise ValueError(f"{op}: softcap must not be negative, got {softcap}")
    scale = 1.0 / math.sqrt(max(E, 1)) if scale is None else float(scale)
    features = {}  # those in use
    if attn_mask is not None and isinstance(attn_mask, CausalBias):
        if is_causal:
            raise ValueError(f"{op}: is_causal and a CausalBias attn_mask are both set")
        if (size := (attn_mask.seq_len_q, attn_mask.seq_len_kv)) != (L, S):
            raise ValueError(f"{op}: the CausalBias is for {size}, the scores are ({L}, {S})")
        is_causal = attn_mask.variant != CausalVariant.LOWER_RIGHT
        attn_mask = None
        if not is_causal:
            features["lower_right"] = True

    q, k, v, lead, (Hq, Hkv) = _four_dimensional(op, query, key, value, shapes, enable_gqa)
    if attn_mask is not None:
        _check_optional(op, "attn_mask", attn_mask, query, or_boolean=True)
        features["attn_mask"] = _mask(op, attn_mask, lead, (q.size(0), Hq, L, S))
    if dropout_p > 0.0:
        features["dropout_p"] = dropout_p
    if Hq != Hkv:
        features["enable_gqa"] = enable_gqa
    if window is not None:
        try:
            left, right = window
            valid = min(left, right) >= -1
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(f"{op}: window must be (left, right) >= -1, got {window!r}")
        if (left, right) != (-1, -1):
            features["window"] = window
    if alibi_slopes is not None:
        _check_optional(op, "alibi_slopes", alibi_slopes, query)
        B = q.size(0)
        if tuple(alibi_slopes.shape) not in ((Hq,), (B, Hq)):
            shape = tuple(alibi_slopes.shape)
            raise ValueError(f"{op}: alibi_slopes must have shape ({Hq},) or ({B}, {Hq}), got {shape}")
        features["alibi_slopes"] = alibi_slopes
    if softcap > 0.0:
        features["softcap"] = softcap
    if return_lse:
        features["return_lse"] = True
    if features or E > backend.MAX_HEAD_DIM or Ev > backend.MAX_HEAD_DIM:
        run = partial(_run, "attention", **features)
    result = run(q, k, v, bool(is_causal), scale)
    out, lse = result if isinstance(result, tuple) else (result, None)
    if q is not query:
        rows = (*lead, *q.shape[1:3]) if max(map(len, shapes)) > 2 else (L,)
        out, lse = out.reshape(*rows, Ev), lse.reshape(rows) if return_lse else None
    return (out, lse) if return_lse else out


def _four_dimensional(op, query, key, value, shapes, enable_gqa):
    """Views (B, H, T, E) of the three, their leading dimensions broadcast; those dimensions; heads of query and key."""
    of_query, of_key, of_value = shapes
    if len(of_query) == len(of_key) == len(of_value) == 4 and of_query[0] == of_key[0] == of_value[0]:
        q, k, v, lead = query, key, value, of_query[:1]
    else:
        q, k, v = (t if t.dim() > 2 else t.unsqueeze(0) for t in (query, key, value))
        try:
            lead = torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v)))
        except RuntimeError:
            shapes = ", ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"{op}: the leading dimensions of {shapes} do not broadcast") from None
        q, k, v = (t.expand(*lead, *t.shape[-3:]).reshape(math.prod(lead), *t.shape[-3:]) for t in (q, k, v))
        of_query, of_key, of_value = q.shape, k.shape, v.shape
    Hq, Hk, Hv = of_query[1], of_key[1], of_value[1]
    if Hk != Hv:
        raise ValueError(f"{op}: key has {Hk} heads, value {Hv}; they must be equal")
    if Hq != Hk and not enable_gqa:
        raise ValueError(f"{op}: query has {Hq} heads, key {Hk}; pass enable_gqa=True for grouped heads")
    if Hq != Hk and not (Hk > 0 and Hq % Hk == 0):
        raise ValueError(f"{op}: {Hq} query heads are no multiple of {Hk} key heads")
    return q, k, v, lead, (Hq, Hk)


def _check_optional(op, name, t, query, or_boolean=False):
    """A floating tensor, or a boolean one where that may be, on the query's device."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if not t.is_floating_point() and not (or_boolean and t.dtype == torch.bool):
        raise TypeError(f"{op}: {name} must be {'boolean or ' * or_boolean}floating point, got {t.dtype}")
    if t.device != query.device:
        raise ValueError(f"{op}: {name} is on {t.device}, query on {query.device}")


def _mask(op, attn_mask, lead, shape):
    """attn_mask broadcast to (B, Hq, L, S), as a view where strides allow."""
    full = (*lead, *shape[1:])
    try:
        return attn_mask.expand(full).reshape(shape)
    except RuntimeError:
        raise ValueError(f"{op}: attn_mask {tuple(attn_mask.shape)} does not broadcast to {full}") from None


# ------------------------------------------------------------------------------- linear, mlp
def _check_linear(op, features, of, weight, bias, weight_name="weight", bias_name="bias"):
    """`features` of what `of` names go into weight; returns how many come out."""
    shape = weight.shape
    if len(shape) != 2:
        raise ValueError(f"pygpt.{op}: {weight_name} must be a matrix, got shape {tuple(shape)}")
    N, K = shape
    if features != K:
        raise ValueError(f"pygpt.{op}: {of} has {features} features, {weight_name} {tuple(shape)} wants {K}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"pygpt.{op}: {bias_name} must have shape ({N},), got {tuple(bias.shape)}")
    return N


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input weight^T + bias; input (..., K), weight (N, K), bias (N,) -> (..., N)."""
    run, shape = _ready("linear", input, weight, bias), input.shape
    if not shape:
        raise ValueError("pygpt.linear: input needs at least 1 dimension, got a scalar")
    _check_linear("linear", shape[-1], "input", weight, bias)
    return run(input, weight, bias)


def mlp(
    input: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """linear(act(linear(input, fc_weight, fc_bias)), proj_weight, proj_bias), fused.

    input (..., C), fc_weight (H, C), fc_bias (H,), proj_weight (O, H), proj_bias (O,) -> (..., O).
    activation: "gelu" (exact), "gelu_tanh", "relu", or "relu2" (relu squared; So et al. 2021).
    Bias and activation run in the first GEMM's epilogue, the activation's gradient in that of the
    backward GEMM. Kept for backward: the hidden layer, and, but for relu, also what went into it.
    """
    run = _ready("mlp", input, fc_weight, fc_bias, proj_weight, proj_bias)
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"pygpt.mlp: unknown activation {activation!r}; known: {known}")
    shape = input.shape
    if not shape:
        raise ValueError("pygpt.mlp: input needs at least 1 dimension, got a scalar")
    H = _check_linear("mlp", shape[-1], "input", fc_weight, fc_bias, "fc_weight", "fc_bias")
    _check_linear("mlp", H, "the hidden layer", proj_weight, proj_bias, "proj_weight", "proj_bias")
    return run(input, fc_weight, fc_bias, proj_weight, proj_bias, activation)


# ------------------------------------------------------------------------------- norms
def _norm_dims(op, input, normalized_shape, weight, bias=None):
    """The number of normalised dimensions, after checking them against input and parameters."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    n = len(shape)
    if n < 1:
        raise ValueError(f"pygpt.{op}: normalized_shape must have at least one dimension")
    if input.shape[-n:] != shape:
        got = tuple(input.shape)
        raise ValueError(f"pygpt.{op}: normalized_shape {shape} is not the end of the input's shape {got}")
    if weight is not None and weight.shape != shape:
        raise ValueError(f"pygpt.{op}: weight must have shape {shape}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != shape:
        raise ValueError(f"pygpt.{op}: bias must have shape {shape}, got {tuple(bias.shape)}")
    return n


def _flat(t, n):
    """The last n dimensions as one; the op's canonical shape."""
    return t if t is None else t.reshape(*t.shape[: t.dim() - n], math.prod(t.shape[t.dim() - n :]))


def layer_norm(
    input: Tensor, normalized_shape, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimensions (Ba et al. 2016).

    input (..., *normalized_shape); weight, bias: normalized_shape or None -> input's shape.
    """
    run = _ready("layer_norm", input, weight, bias)
    n = _norm_dims("layer_norm", input, normalized_shape, weight, bias)
    if n == 1:
        return run(input, weight, bias, eps)
    return run(_flat(input, n), _flat(weight, n), _flat(bias, n), eps).view(input.shape)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """-> (layer_norm(input + residual), input + residual) in one pass over memory.

    input, residual (..., *normalized_shape), of equal shape, their dtypes promoted as by addition;
    the rest as in `layer_norm`.
    """
    run = _ready("add_layer_norm", input, residual, weight, bias)
    if input.shape != residual.shape:
        want, got = tuple(input.shape), tuple(residual.shape)
        raise ValueError(f"pygpt.add_layer_norm: residual must have shape {want}, got {got}")
    n = _norm_dims("add_layer_norm", input, normalized_shape, weight, bias)
    if input.dtype != residual.dtype:  # as x + residual promotes; autocast mixes them in every block
        common = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(common), residual.to(common)
    if n == 1:
        return run(input, residual, weight, bias, eps)
    y, s = run(_flat(input, n), _flat(residual, n), _flat(weight, n), _flat(bias, n), eps)
    return y.view(input.shape), s.view(input.shape)


_EPS32, _EPS64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


def rms_norm(input: Tensor, normalized_shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimensions (Zhang and Sennrich 2019).

    input (..., *normalized_shape), weight normalized_shape or None -> input's shape.
    eps: default as torch's: the machine epsilon of the dtype, of float32 for the 16-bit ones.
    """
    run = _ready("rms_norm", input, weight)
    n = _norm_dims("rms_norm", input, normalized_shape, weight)
    if eps is None:
        eps = _EPS64 if input.dtype == torch.float64 else _EPS32
    if n == 1:
        return run(input, weight, eps)
    return run(_flat(input, n), _flat(weight, n), eps).view(input.shape)


# ------------------------------------------------------------------------------- activations
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), Phi the normal distribution (Hendrycks and Gimpel 2016); approximate="tanh" as in GPT-2."""
    run = _ready("gelu", input)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"pygpt.gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return run(input, approximate)


def relu(input: Tensor) -> Tensor:
    """max(x, 0)."""
    return _ready("relu", input)(input)


_PUBLIC = {op: globals().get(op, scaled_dot_product_attention) for op in _FUNCTIONS}
_PARAMETERS = {  # the tensors among each op's
    op: [p for p in inspect.signature(function).parameters.values() if p.annotation in (Tensor, Tensor | None)]
    for op, function in _PUBLIC.items()
}
_OPTIONAL = {  # bit i: the i-th of them may be None
    op: sum((p.annotation is not Tensor) << i for i, p in enumerate(found)) for op, found in _PARAMETERS.items()
}
