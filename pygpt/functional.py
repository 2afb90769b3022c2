"""The public ops. Names, argument order, meaning and errors follow torch.nn.functional.

Every function checks its arguments, brings them to the op's canonical shape, and hands them to the
backend that serves the call (see `pygpt.explain`). All accept float64, float32, bfloat16 and
float16, any strides, empty tensors, autocast and torch.compile, and differentiate any number of
times. Accumulation and row statistics are float32 (float64 for float64). Bad arguments raise
ValueError or TypeError before anything is computed.
"""

import math

import torch
from torch import Tensor
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


def _require(condition, error, message):
    """message() is formatted only when needed: it costs time, and torch.compile can't format symbolic sizes."""
    if not condition:
        raise error(f"pygpt.{message()}")


def _check_tensors(op: str, optional=(), **tensors):
    """Floating tensors on one device; those named in ``optional`` may be None."""
    lead = None
    for name, t in tensors.items():
        if t is None and name in optional:
            continue
        _require(isinstance(t, Tensor), TypeError, lambda: f"{op}: {name} must be a Tensor, got {type(t).__name__}")
        _require(t.is_floating_point(), TypeError, lambda: f"{op}: {name} must be floating point, got {t.dtype}")
        lead = t if lead is None else lead
        _require(
            t.device == lead.device,
            ValueError,
            lambda: f"{op}: {name} is on {t.device}, the first argument on {lead.device}",
        )


def _same_dtype(op: str, **tensors):
    (lead_name, lead), *rest = tensors.items()
    for name, t in rest:
        same = t is None or t.dtype == lead.dtype or torch.is_autocast_enabled(lead.device.type)
        _require(
            same,
            TypeError,
            lambda: f"{op}: {name} is {t is not None and t.dtype}, {lead_name} is {lead.dtype}; they must be equal",
        )


def _run(op: str, *args, **features):
    """Serves one canonical call by the picked backend; ``features`` hold only what is in use."""
    device = args[0].device.type
    if torch.is_autocast_enabled(device) and args[0].dtype != torch.float64:
        args = _autocast(op, device, args)
    tensors = [a for a in args if isinstance(a, Tensor)]
    if backend.state.explaining:
        raise _Explained(backend.choose(op, tensors, features))
    k = backend.pick(op, tensors, features)
    if k is reference:
        return getattr(reference, op)(*args, **features)
    return autograd.apply(_FUNCTIONS[op], k, tensors, args)


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
    _require(
        function in public.values(), ValueError, lambda: f"explain: unknown op {op!r}; known: {', '.join(__all__)}"
    )
    backend.state.explaining = True
    try:
        function(*args, **kwargs)
    except _Explained as e:
        return e.args[0]
    finally:
        backend.state.explaining = False
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
    """softmax(scale * query key^T + bias) value, never forming the (L, S) matrix in memory.

    FlashAttention-2 (Dao 2023), with the arguments of torch's function of this name.

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
    op = "scaled_dot_product_attention"
    _check_tensors(op, query=query, key=key, value=value)
    _same_dtype(op, query=query, key=key, value=value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        _require(
            t.dim() >= 2, ValueError, lambda: f"{op}: {name} needs at least 2 dimensions, got shape {tuple(t.shape)}"
        )
    (L, E), (S, Ek), (Sv, Ev) = query.shape[-2:], key.shape[-2:], value.shape[-2:]
    _require(Ek == E, ValueError, lambda: f"{op}: key has head dimension {Ek}, query {E}; they must be equal")
    _require(Sv == S, ValueError, lambda: f"{op}: value has {Sv} positions, key {S}; they must be equal")
    _require(0.0 <= dropout_p <= 1.0, ValueError, lambda: f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    _require(softcap >= 0.0, ValueError, lambda: f"{op}: softcap must not be negative, got {softcap}")
    scale = 1.0 / math.sqrt(max(E, 1)) if scale is None else float(scale)
    lower_right = False
    if isinstance(attn_mask, CausalBias):
        _require(not is_causal, ValueError, lambda: f"{op}: is_causal and a CausalBias attn_mask are both set")
        _require(
            (attn_mask.seq_len_q, attn_mask.seq_len_kv) == (L, S),
            ValueError,
            lambda: (
                f"{op}: the CausalBias is for ({attn_mask.seq_len_q}, {attn_mask.seq_len_kv}), the scores are ({L}, {S})"
            ),
        )
        lower_right = attn_mask.variant == CausalVariant.LOWER_RIGHT
        is_causal, attn_mask = not lower_right, None

    q, k, v, lead = _four_dimensional(op, query, key, value, enable_gqa)
    B, Hq = q.shape[:2]
    features = {
        name: x
        for name, x, used in (
            ("attn_mask", attn_mask, attn_mask is not None),
            ("dropout_p", dropout_p, dropout_p > 0.0),
            ("enable_gqa", enable_gqa, Hq != k.shape[1]),
            ("window", window, window is not None and tuple(window) != (-1, -1)),
            ("alibi_slopes", alibi_slopes, alibi_slopes is not None),
            ("softcap", softcap, softcap > 0.0),
            ("lower_right", True, lower_right),
        )
        if used
    }
    if "attn_mask" in features:
        features["attn_mask"] = _mask(op, attn_mask, lead, (B, Hq, L, S))
    if "alibi_slopes" in features:
        _require(
            tuple(alibi_slopes.shape) in ((Hq,), (B, Hq)),
            ValueError,
            lambda: f"{op}: alibi_slopes must have shape ({Hq},) or ({B}, {Hq}), got {tuple(alibi_slopes.shape)}",
        )
    if "window" in features:
        _require(
            len(window) == 2 and min(window) >= -1,
            ValueError,
            lambda: f"{op}: window must be (left, right) >= -1, got {window}",
        )

    shape = lead + ((Hq,) if query.dim() > 2 or len(lead) else ())
    result = _attention(q, k, v, bool(is_causal), scale, features, return_lse)
    if return_lse:
        return result[0].reshape(*shape, L, Ev), result[1].reshape(*shape, L)
    return result.reshape(*shape, L, Ev)


def _attention(q, k, v, is_causal, scale, features, return_lse):
    result = _run("attention", q, k, v, is_causal, scale, **features, **({"return_lse": True} if return_lse else {}))
    return result[0] if isinstance(result, tuple) and not return_lse else result


def _four_dimensional(op, query, key, value, enable_gqa):
    """Views (B, H, T, E) of the three, their leading dimensions broadcast; and those dimensions."""
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
        q, k, v, lead = query, key, value, query.shape[:1]
    else:
        q, k, v = (t if t.dim() > 2 else t.unsqueeze(0) for t in (query, key, value))
        try:
            lead = torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v)))
        except RuntimeError:
            shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
            raise ValueError(f"pygpt.{op}: the leading dimensions of {shapes} do not broadcast") from None
        q, k, v = (t.expand(*lead, *t.shape[-3:]).reshape(math.prod(lead), *t.shape[-3:]) for t in (q, k, v))
    Hq, Hk, Hv = q.shape[1], k.shape[1], v.shape[1]
    _require(Hk == Hv, ValueError, lambda: f"{op}: key has {Hk} heads, value {Hv}; they must be equal")
    if Hq != Hk:
        _require(
            enable_gqa,
            ValueError,
            lambda: f"{op}: query has {Hq} heads, key {Hk}; pass enable_gqa=True for grouped heads",
        )
        _require(
            Hk > 0 and Hq % Hk == 0, ValueError, lambda: f"{op}: {Hq} query heads are no multiple of {Hk} key heads"
        )
    return q, k, v, lead


def _mask(op, attn_mask, lead, shape):
    """attn_mask broadcast to (B, Hq, L, S), as a view where strides allow."""
    B, Hq, L, S = shape
    _require(
        isinstance(attn_mask, Tensor),
        TypeError,
        lambda: f"{op}: attn_mask must be a Tensor, got {type(attn_mask).__name__}",
    )
    _require(
        attn_mask.dtype == torch.bool or attn_mask.is_floating_point(),
        TypeError,
        lambda: f"{op}: attn_mask must be boolean or floating point, got {attn_mask.dtype}",
    )
    full = (*lead, Hq, L, S)
    try:
        return attn_mask.expand(full).reshape(shape)
    except RuntimeError:
        raise ValueError(f"pygpt.{op}: attn_mask {tuple(attn_mask.shape)} does not broadcast to {full}") from None


# ------------------------------------------------------------------------------- linear, mlp
def _check_linear(op, x, in_name, weight, bias, weight_name="weight", bias_name="bias"):
    _require(
        weight.dim() == 2, ValueError, lambda: f"{op}: {weight_name} must be a matrix, got shape {tuple(weight.shape)}"
    )
    K, N = weight.shape[1], weight.shape[0]
    _require(
        x == K, ValueError, lambda: f"{op}: {in_name} has {x} features, {weight_name} {tuple(weight.shape)} wants {K}"
    )
    if bias is not None:
        _require(
            tuple(bias.shape) == (N,),
            ValueError,
            lambda: f"{op}: {bias_name} must have shape ({N},), got {tuple(bias.shape)}",
        )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input weight^T + bias; input (..., K), weight (N, K), bias (N,) -> (..., N)."""
    _check_tensors("linear", ("bias",), input=input, weight=weight, bias=bias)
    _same_dtype("linear", input=input, weight=weight, bias=bias)
    _require(input.dim() >= 1, ValueError, lambda: "linear: input needs at least 1 dimension, got a scalar")
    _check_linear("linear", input.shape[-1], "input", weight, bias)
    return _run("linear", input, weight, bias)


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
    backward GEMM. Kept for backward: the hidden layer, and for the gelus also what went into it.
    """
    _check_tensors(
        "mlp",
        ("fc_bias", "proj_bias"),
        input=input,
        fc_weight=fc_weight,
        fc_bias=fc_bias,
        proj_weight=proj_weight,
        proj_bias=proj_bias,
    )
    _same_dtype("mlp", input=input, fc_weight=fc_weight, fc_bias=fc_bias, proj_weight=proj_weight, proj_bias=proj_bias)
    known = ", ".join(reference.ACTIVATIONS)
    _require(
        activation in reference.ACTIVATIONS,
        ValueError,
        lambda: f"mlp: unknown activation {activation!r}; known: {known}",
    )
    _require(input.dim() >= 1, ValueError, lambda: "mlp: input needs at least 1 dimension, got a scalar")
    _check_linear("mlp", input.shape[-1], "input", fc_weight, fc_bias, "fc_weight", "fc_bias")
    _check_linear("mlp", fc_weight.shape[0], "the hidden layer", proj_weight, proj_bias, "proj_weight", "proj_bias")
    return _run("mlp", input, fc_weight, fc_bias, proj_weight, proj_bias, activation)


# ------------------------------------------------------------------------------- norms
def _norm_shape(op, input, normalized_shape, **params):
    """The number of normalised dimensions, after checking them against input and parameters."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    n = len(shape)
    _require(n >= 1, ValueError, lambda: f"{op}: normalized_shape must have at least one dimension")
    fits = tuple(input.shape[-n:]) == shape
    _require(
        fits,
        ValueError,
        lambda: f"{op}: normalized_shape {shape} is not the end of the input's shape {tuple(input.shape)}",
    )
    for name, p in params.items():
        ok = p is None or tuple(p.shape) == shape
        _require(ok, ValueError, lambda: f"{op}: {name} must have shape {shape}, got {ok or tuple(p.shape)}")
    return n


def _flat(t, n):
    """The last n dimensions as one; the op's canonical shape."""
    return t if t is None or n == 1 else t.reshape(*t.shape[: t.dim() - n], math.prod(t.shape[t.dim() - n :]))


def layer_norm(
    input: Tensor, normalized_shape, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimensions (Ba et al. 2016).

    input (..., *normalized_shape); weight, bias: normalized_shape or None -> input's shape.
    """
    _check_tensors("layer_norm", ("weight", "bias"), input=input, weight=weight, bias=bias)
    n = _norm_shape("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    if n == 1:
        return _run("layer_norm", input, weight, bias, eps)
    return _run("layer_norm", _flat(input, n), _flat(weight, n), _flat(bias, n), eps).view(input.shape)


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
    _check_tensors("add_layer_norm", ("weight", "bias"), input=input, residual=residual, weight=weight, bias=bias)
    same = input.shape == residual.shape
    _require(
        same,
        ValueError,
        lambda: f"add_layer_norm: residual must have shape {tuple(input.shape)}, got {tuple(residual.shape)}",
    )
    n = _norm_shape("add_layer_norm", input, normalized_shape, weight=weight, bias=bias)
    if input.dtype != residual.dtype:  # as x + residual promotes; autocast mixes them in every block
        common = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(common), residual.to(common)
    y, s = _run("add_layer_norm", _flat(input, n), _flat(residual, n), _flat(weight, n), _flat(bias, n), eps)
    return y.view(input.shape), s.view(input.shape)


def rms_norm(input: Tensor, normalized_shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimensions (Zhang and Sennrich 2019).

    input (..., *normalized_shape), weight normalized_shape or None -> input's shape.
    eps: default as torch's: the machine epsilon of the dtype, of float32 for the 16-bit ones.
    """
    _check_tensors("rms_norm", ("weight",), input=input, weight=weight)
    n = _norm_shape("rms_norm", input, normalized_shape, weight=weight)
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    y = _run("rms_norm", _flat(input, n), _flat(weight, n), eps)
    return y if n == 1 else y.view(input.shape)


# ------------------------------------------------------------------------------- activations
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), Phi the normal distribution (Hendrycks and Gimpel 2016); approximate="tanh" as in GPT-2."""
    _check_tensors("gelu", input=input)
    known = approximate in ("none", "tanh")
    _require(known, ValueError, lambda: f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _run("gelu", input, approximate)


def relu(input: Tensor) -> Tensor:
    """max(x, 0)."""
    _check_tensors("relu", input=input)
    return _run("relu", input)
