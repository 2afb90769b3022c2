"""Every op in plain PyTorch: the mathematics the kernels must reproduce.

Each op appears three ways, all with the same argument order:

``<op>(...)``      the ordinary PyTorch expression, differentiable. It is what the "torch" backend
                   runs, what double backward differentiates, and the accuracy yardstick.
``<op>_fwd(...)``  the explicit forward, returning the output and what backward needs.
``<op>_bwd(...)``  the explicit backward, written out as mathematics.

The last two define the signature of every backend. In float64 they are the oracle of the tests; on
meta tensors they are the shape functions of the registered ops. Statistics and accumulation are
float32 (float64 for float64), as in the kernels. ``needs`` says which gradients are wanted, in the
order they are returned; an unwanted one comes back with no elements.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def autocasting(device: str) -> bool:
    """Whether autocast is on for this type of device; some, as "meta", know none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def as_tuple(result) -> tuple:
    """What an op returns, one tensor or several, as several."""
    return result if isinstance(result, tuple) else (result,)


def _acc_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _acc(t):
    return None if t is None else t.to(_acc_dtype(t))


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _wanted(needs, grads, like: Tensor):
    """Casts the wanted gradients to ``like.dtype``; an unwanted one is returned empty."""
    return tuple(
        g.to(like.dtype).contiguous() if need else like.new_empty(0) for need, g in zip(needs, grads, strict=True)
    )


# ------------------------------------------------------------------------------- attention
def _distance(L: int, S: int, device, lower_right: bool) -> Tensor:
    """(L, S): how far key j lies to the right of query i's own position on the key axis."""
    shift = S - L if lower_right else 0
    return torch.arange(S, device=device) - (torch.arange(L, device=device)[:, None] + shift)


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor):
    if q.shape[1] == k.shape[1]:
        return k, v
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def attention(
    q, k, v, is_causal, scale, *, attn_mask=None, dropout_p=0.0, enable_gqa=False, window=None,
    alibi_slopes=None, softcap=0.0, lower_right=False, return_lse=False,
):  # fmt: skip
    """softmax(scale * q k^T + bias) v over (B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev)."""
    plain = window is None and alibi_slopes is None and softcap == 0.0 and not lower_right
    if plain and not return_lse and not (is_causal and attn_mask is not None):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    features = attn_mask, dropout_p, window, alibi_slopes, softcap, lower_right
    with torch.autocast(q.device.type, enabled=False) if autocasting(q.device.type) else nullcontext():
        out, lse = _composite_attention(q, *_repeat_heads(q, k, v), is_causal, scale, *features)
    return (out, lse) if return_lse else out


def _composite_attention(q, k, v, is_causal, scale, attn_mask, dropout_p, window, alibi_slopes, softcap, lower_right):
    L, S = q.shape[-2], k.shape[-2]
    dist = _distance(L, S, q.device, lower_right)
    s = (_acc(q) * scale) @ _acc(k).mT
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype).reshape(-1, q.shape[1], 1, 1) * dist.abs()
    keep = torch.ones_like(dist, dtype=torch.bool)
    if is_causal or lower_right:
        keep = keep & (dist <= 0)
    if window is not None:
        left, right = window
        keep = keep & (dist >= -left if left >= 0 else keep) & (dist <= right if right >= 0 else keep)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    elif attn_mask is not None:
        s = s + attn_mask.to(s.dtype)
    p, lse = _softmax(s.masked_fill(~keep, -math.inf))
    p = F.dropout(p, dropout_p) if dropout_p else p
    return (p @ _acc(v)).to(q.dtype), lse


def _softmax(s: Tensor):
    """Row softmax and log-sum-exp; a fully masked row gives zeros and -inf, never NaN."""
    m = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    m = m.masked_fill(m == -math.inf, 0.0)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (m + total.log()).masked_fill(empty, -math.inf)
    return e / total, lse.squeeze(-1)


def _scores(q, k, is_causal, scale):
    s = (_acc(q) * scale) @ _acc(k).mT
    if is_causal:
        s = s.masked_fill(_distance(q.shape[-2], k.shape[-2], q.device, False) > 0, -math.inf)
    return s


def _heads_last(t: Tensor) -> Tensor:
    """The same values laid out (B, L, H, E) in memory, so that merging heads costs nothing."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, H, L, Ev) laid out as (B, L, H, Ev), lse (B, H, L) = log sum_j exp(s_ij)."""
    p, lse = _softmax(_scores(q, k, is_causal, scale))
    return _heads_last((p @ _acc(v)).to(q.dtype)), lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    is_causal: bool, scale: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """p = exp(s - lse); dv = p^T dout; ds = p (dout v^T - rowsum(dout out) + dlse);
    dq = scale ds k; dk = scale ds^T q. Nothing but lse is kept of the L x S matrices."""
    s = _scores(q, k, is_causal, scale)
    p = torch.exp(s - lse[..., None].masked_fill(lse[..., None] == -math.inf, 0.0))
    do = _acc(dout)
    delta = (do * _acc(out)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    ds = p * (do @ _acc(v).mT - delta) * scale
    grads = _wanted(needs, (ds @ _acc(k), ds.mT @ _acc(q), p.mT @ do), q)
    return tuple(_heads_last(g) if need else g for need, g in zip(needs, grads, strict=True))


# ------------------------------------------------------------------------------- linear, mlp
def linear(x, weight, bias):
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""
    return F.linear(x, weight, bias)


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _acc(x) @ _acc(weight).mT
    return (y if bias is None else y + _acc(bias)).to(x.dtype)


def linear_bwd(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    dy2, x2 = _acc(_rows(dy)), _acc(_rows(x))
    return _wanted(needs, ((dy2 @ _acc(weight)).view(x.shape), dy2.mT @ x2, dy2.sum(0)), x)


_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def _cdf(x):  # of the standard normal distribution
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _tanh_cdf(x):
    return torch.sigmoid(2.0 * _SQRT_2_OVER_PI * (x + 0.044715 * x**3))


ACTIVATIONS = {
    # name: PyTorch's expression, value(x), gradient(dy, saved): saved is x, or relu's own value
    "gelu": (
        F.gelu,
        lambda x: x * _cdf(x),
        lambda dy, x: dy * (_cdf(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)),
    ),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x * _tanh_cdf(x),
        lambda dy, x: (
            dy
            * (_tanh_cdf(x) + x * _tanh_cdf(x) * _tanh_cdf(-x) * 2.0 * _SQRT_2_OVER_PI * (1.0 + 3 * 0.044715 * x * x))
        ),
    ),
    "relu": (F.relu, F.relu, lambda dy, y: torch.where(y <= 0, 0.0, dy)),
    "relu2": (
        lambda x: F.relu(x).square(),
        lambda x: F.relu(x).square(),
        lambda dy, x: torch.where(x <= 0, 0.0, 2.0 * x * dy),
    ),
}
SAVES_INPUT = ("gelu", "gelu_tanh", "relu2")  # relu finds its derivative from its output


def mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, activation):
    """act(x fc_weight^T + fc_bias) proj_weight^T + proj_bias; x (..., C), weights (H, C), (O, H)."""
    return F.linear(ACTIVATIONS[activation][0](F.linear(x, fc_weight, fc_bias)), proj_weight, proj_bias)


def mlp_fwd(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y (..., O), hidden (..., H) after the activation, pre (..., H) before it (SAVES_INPUT only)."""
    pre = _acc(x) @ _acc(fc_weight).mT
    pre = pre if fc_bias is None else pre + _acc(fc_bias)
    hidden = ACTIVATIONS[activation][1](pre).to(x.dtype)
    saved = pre.to(x.dtype) if activation in SAVES_INPUT else x.new_empty(0)
    return linear_fwd(hidden, proj_weight, proj_bias), hidden, saved


def mlp_bwd(
    dy: Tensor, x: Tensor, fc_weight: Tensor, proj_weight: Tensor, hidden: Tensor, pre: Tensor,
    activation: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias."""
    dy2, x2, h2 = (_acc(_rows(t)) for t in (dy, x, hidden))
    saved = _acc(_rows(pre)) if activation in SAVES_INPUT else h2
    dpre = ACTIVATIONS[activation][2](dy2 @ _acc(proj_weight), saved)
    grads = ((dpre @ _acc(fc_weight)).view(x.shape), dpre.mT @ x2, dpre.sum(0), dy2.mT @ h2, dy2.sum(0))
    return _wanted(needs, grads, x)


# ------------------------------------------------------------------------------- norms
def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; Ba et al. 2016."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _affine(xhat, weight, bias):
    y = xhat if weight is None else xhat * _acc(weight)
    return y if bias is None else y + _acc(bias)


def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> y like x, mean and rstd with x's leading shape."""
    xa = _acc(x)
    mean = xa.mean(-1)
    centred = xa - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    return _affine(centred * rstd[..., None], weight, bias).to(x.dtype).contiguous(), mean, rstd


def _norm_bwd(dy, xhat, weight, rstd, centre):
    """dx of a norm, given xhat: rstd (g - mean(g) - xhat mean(g xhat)), g = dy weight."""
    g = _acc(dy) if weight is None else _acc(dy) * _acc(weight)
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    return (dx - g.mean(-1, keepdim=True) if centre else dx) * rstd[..., None]


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    xhat = (_acc(x) - mean[..., None]) * rstd[..., None]
    dya = _acc(dy)
    grads = _norm_bwd(dy, xhat, weight, rstd, True), _rows(dya * xhat).sum(0), _rows(dya).sum(0)
    return _wanted(needs, grads, x)


def add_layer_norm(x, residual, weight, bias, eps):
    """-> layer_norm(x + residual), x + residual."""
    s = x + residual
    return layer_norm(s, weight, bias, eps), s


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, s = x + residual rounded to the input's dtype, mean and rstd of s."""
    s = (x + residual).contiguous()
    y, mean, rstd = layer_norm_fwd(s, weight, bias, eps)
    return y, s, mean, rstd


def add_layer_norm_bwd(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the gradient of x and of residual (they are equal), dweight, dbias. ds may be None."""
    xhat = (_acc(s) - mean[..., None]) * rstd[..., None]
    dya = _acc(dy)
    dx = _norm_bwd(dy, xhat, weight, rstd, True)
    grads = dx if ds is None else dx + _acc(ds), _rows(dya * xhat).sum(0), _rows(dya).sum(0)
    return _wanted(needs, grads, s)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; Zhang and Sennrich 2019."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """-> y like x, rstd with x's leading shape."""
    xa = _acc(x)
    rstd = torch.rsqrt(xa.square().mean(-1) + eps)
    return _affine(xa * rstd[..., None], weight, None).to(x.dtype).contiguous(), rstd


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    xhat = _acc(x) * rstd[..., None]
    return _wanted(needs, (_norm_bwd(dy, xhat, weight, rstd, False), _rows(_acc(dy) * xhat).sum(0)), x)


# ------------------------------------------------------------------------------- activations
def gelu(x, approximate):
    """x Phi(x), or with approximate="tanh" x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)); Hendrycks and Gimpel 2016."""
    return F.gelu(x, approximate=approximate)


def gelu_name(approximate):
    return "gelu" if approximate == "none" else "gelu_tanh"


def gelu_fwd(x: Tensor, approximate: str) -> Tensor:
    return ACTIVATIONS[gelu_name(approximate)][1](_acc(x)).to(x.dtype).contiguous()


def gelu_bwd(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    return ACTIVATIONS[gelu_name(approximate)][2](_acc(dy), _acc(x)).to(x.dtype).contiguous()


def relu(x):
    return F.relu(x)


def relu_fwd(x: Tensor) -> Tensor:
    return F.relu(x).contiguous()


def relu_bwd(dy: Tensor, y: Tensor) -> Tensor:
    """dy, but 0 where y <= 0. (PyTorch's own op, because it is differentiable in y as well.)"""
    return torch.ops.aten.threshold_backward(dy, y, 0).contiguous()
