"""Modules on `pygpt.functional`: torch's norms and Linear with another forward, and the two halves of a GPT block.

State dicts are interchangeable with torch.nn (LayerNorm, RMSNorm, Linear, the losses) and nanoGPT (MLP,
CausalSelfAttention). Under torch.jit.script the norms and Linear compute with PyTorch's kernels.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from . import dispatch, functional, reference
from .dispatch import dispatches_for_itself
from .ops.common import checked_integer
from .ops.qkv_attention import as_heads


@fx.wrap  # symbolic_trace records the call itself: while tracing, an omitted residual is a Proxy and not None
def _layer_norm(input: Tensor, residual: Tensor | None, *affine: Any) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return functional.layer_norm(input, *affine)
    return functional.add_layer_norm(input, residual, *affine)


@fx.wrap
def _rms_norm(input: Tensor, residual: Tensor | None, *affine: Any) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return functional.rms_norm(input, *affine)
    return functional.add_rms_norm(input, residual, *affine)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on `pygpt.functional.layer_norm`.

    Called with a residual, it also adds, in the same pass over memory. A scripted module takes no residual.
    """

    @overload
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, input: Tensor, residual: Tensor | None = None):  # type: ignore[no-untyped-def]
        """Returns the norm of ``input (..., *normalized_shape)``; with a residual of that shape, the sum's norm and the
        sum."""
        if torch.jit.is_scripting():
            assert residual is None, "a scripted pygpt.nn.LayerNorm takes no residual"
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return _layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm on `pygpt.functional.rms_norm`. A residual is added as by `LayerNorm`."""

    @overload
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, input: Tensor, residual: Tensor | None = None):  # type: ignore[no-untyped-def]
        """Returns the norm of ``input (..., *normalized_shape)``; with a residual of that shape, the sum's norm and the
        sum."""
        if torch.jit.is_scripting():
            assert residual is None, "a scripted pygpt.nn.RMSNorm takes no residual"
            return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)
        return _rms_norm(input, residual, self.normalized_shape, self.weight, self.eps)


class Linear(nn.Linear):
    """torch.nn.Linear on `pygpt.functional.linear`; input (..., in_features) -> (..., out_features).

    Tools that look for torch.nn.Linear by its exact type, such as torch.ao.quantization.quantize_dynamic, silently
    ignore this class. Set ``module.__class__ = torch.nn.Linear`` for every such module first.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input (..., in_features)`` -> ``(..., out_features)``."""
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        return functional.linear(input, self.weight, self.bias)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on `pygpt.functional.cross_entropy`, with its ``z_loss``.

    ``device`` and ``dtype`` are those of ``weight``, which otherwise keeps its own.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        weight = None if weight is None else weight.to(device, dtype)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (N, V, ...) and classes (N, ...) -> the loss. See `pygpt.functional.cross_entropy`."""
        return functional.cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss,
        )  # fmt: skip


class LinearCrossEntropyLoss(nn.Module):
    """A Linear layer and the cross-entropy of its outputs, by `pygpt.functional.linear_cross_entropy`.

    The arguments and parameter names are those of torch.nn.LinearCrossEntropyLoss, which torch has since 2.13, and
    ``z_loss``. ``out_features`` (d1, ...) gives every input d1 x ... losses, as PyTorch computes them. A weight of
    another shape than (num_classes,) raises ValueError.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            got = tuple(weight.shape)
            raise ValueError(f"pygpt.nn.LinearCrossEntropyLoss: weight must have shape ({num_classes},), got {got}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(
                f"pygpt.nn.LinearCrossEntropyLoss: label_smoothing must be from 0 to 1, got {label_smoothing}"
            )
        self.num_classes, self.out_features, self.reduction = num_classes, out_features, reduction
        self.ignore_index, self.label_smoothing, self.options, self.z_loss = (
            ignore_index, label_smoothing, options, z_loss,
        )  # fmt: skip
        self.register_buffer("weight", weight)
        self.linear = Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """``input (N, in_features)`` and classes (N,) -> the loss."""
        linear_weight: Tensor = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        if self.out_features:
            shape = self.num_classes, *self.out_features
            linear_weight = linear_weight.view(*shape, self.linear.in_features)
            linear_bias = None if linear_bias is None else linear_bias.view(shape)
        return functional.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, reduction=self.reduction,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, options=self.options,
            z_loss=self.z_loss,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, z_loss={self.z_loss}"
        )


_FORWARDS: dict[type, Callable] = {
    module_class: module_class.forward for module_class in (Linear, nn.Linear, nn.Dropout, RMSNorm, nn.RMSNorm)
}


def _is_unmodified(module: nn.Module, *classes: type) -> bool:
    """Whether calling the module runs the forward of one of these classes, and nothing else.

    False for subclasses, for a module with a hook (global hooks count), with a `forward` of its own or with a compiled
    call, and for a class whose `forward` was replaced.
    """
    return (
        type(module) in classes
        and type(module).forward is _FORWARDS[type(module)]
        and module._compiled_call_impl is None
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks or _has_any_global_hook())
        and module.forward is not None  # always true, but torch.compile guards what this reads, and not the next line
        and "forward" not in module.__dict__
    )


def _is_unmodified_linear(module: nn.Module) -> bool:
    """Whether calling the module is `functional.linear` with its weight and bias, and nothing else.

    Only then may a module that fuses its layers read their parameters instead of calling them. False for adapters,
    parametrized, pruned, weight-normed and quantised layers, and for weights of a tensor subclass that dispatches
    for itself. DTensor does not count, because it has rules for the fused op.
    """
    return _is_unmodified(module, Linear, nn.Linear) and _has_plain_parameters(module)


def _has_plain_parameters(linear: Any) -> bool:
    """Whether weight and bias are parameters, and no tensors of a class that dispatches for itself."""
    if not linear._parameters.keys() >= {"weight", "bias"}:
        return False
    weight, bias = linear.weight, linear.bias
    return not dispatches_for_itself(type(weight)) and (bias is None or not dispatches_for_itself(type(bias)))


def _dropout(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), without the call where it is an unmodified nn.Dropout in evaluation."""
    return x if not module.training and _is_unmodified(module, nn.Dropout) else module(x)


def fuse_gate(gate: Tensor, up: Tensor) -> Tensor:
    """The weight of a gated MLP's c_fc, from Llama's gate_proj and up_proj: gate's rows, then up's.

    ``gate (H, C)`` and ``up (H, C)`` give ``(2 H, C)``, and biases (H,) alike. down_proj is c_proj. Unequal shapes
    raise ValueError.
    """
    if gate.shape != up.shape:
        raise ValueError(f"pygpt.nn.fuse_gate: gate is {tuple(gate.shape)}, up {tuple(up.shape)}; they must be equal")
    return torch.cat((gate, up))


def split_gate(fused: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of fuse_gate: the halves of ``fused (2 H, C)`` or ``(2 H,)`` as views. An odd height raises
    ValueError."""
    if fused.dim() == 0 or len(fused) % 2:
        raise ValueError(f"pygpt.nn.split_gate: fused must have an even number of rows, got {tuple(fused.shape)}")
    gate, up = fused.chunk(2)
    return gate, up


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def product(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, -1)
        return activation(gate) * value

    return product


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "swiglu": _gated(F.silu),
    "geglu": _gated(functional.gelu),
}


class MLP(nn.Module):
    """c_proj(act(c_fc(x))) and dropout; x (..., embed_dim) -> (..., embed_dim).

    ``hidden_dim`` defaults to 4 * embed_dim. ``activation`` is "gelu" (exact), "gelu_tanh", "relu" or "relu2", or it is
    gated: for "swiglu" and "geglu" c_fc has 2 * hidden_dim outputs, the gates before the values (see `fuse_gate`).
    Others raise ValueError. One fused op computes both layers while c_fc and c_proj are exactly torch.nn.Linear or
    pygpt.nn.Linear with ordinary parameters and no hook. Otherwise (adapters, pruning, parametrizations, tensor
    parallelism, ...) each layer is called.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        activation: str = "gelu_tanh",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in reference.ACTIVATIONS:
            known = ", ".join(reference.ACTIVATIONS)
            raise ValueError(f"pygpt.nn.MLP: unknown activation {activation!r}; known: {known}")
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        self.activation = activation
        outputs = 2 * hidden_dim if activation in reference.GATED else hidden_dim
        self.c_fc = Linear(embed_dim, outputs, bias, device, dtype)
        self.c_proj = Linear(hidden_dim, embed_dim, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draws c_fc and c_proj anew, as torch.nn.Linear does."""
        self.c_fc.reset_parameters()
        self.c_proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., embed_dim)`` -> ``(..., embed_dim)``."""
        fc, proj = self.c_fc, self.c_proj
        if _is_unmodified_linear(fc) and _is_unmodified_linear(proj):
            y = functional.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, self.activation)
        else:
            y = proj(_ACTIVATIONS[self.activation](fc(x)))
        return _dropout(self.dropout, y)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class KVCache:
    """Keys and values of one attention layer's past, preallocated for ``capacity`` positions at the first append.

    ``cache = KVCache(capacity)``, then ``attention(x, cache)`` for the positions as they come. Each layer needs a cache
    of its own. For inference: an append writes to memory that an earlier call's backward pass would need. With a
    window, too, it keeps all positions. A capacity that is no integer raises TypeError, a negative one ValueError.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = checked_integer("pygpt.nn.KVCache", "capacity", capacity), 0
        if self.capacity < 0:
            raise ValueError(f"pygpt.nn.KVCache: capacity must not be negative, got {capacity}")
        self.keys: Any = None
        self.values: Any = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the next T positions, ``(B, Hkv, T, D)`` each; returns all keys and values so far.

        ValueError if they exceed the capacity, or differ in batch, heads or dtype from those so far.
        """
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or values.dim() != 4:
            raise ValueError(
                "pygpt.nn.KVCache: keys and values must be (B, Hkv, T, D), "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        B, H, T, _ = keys.shape
        end = self.length + T
        if self.keys is not None and (
            keys.dtype != self.keys.dtype or keys[:, :, :0].shape != self.keys[:, :, :0].shape
        ):
            kept_B, kept_H, _, kept_D = self.keys.shape
            raise ValueError(
                f"pygpt.nn.KVCache: holds {self.keys.dtype} of shape ({kept_B}, {kept_H}, T, {kept_D}), "
                f"got {keys.dtype} {tuple(keys.shape)}"
            )
        if end > self.capacity:
            raise ValueError(f"pygpt.nn.KVCache: {end} positions, room for {self.capacity}")
        if self.keys is None:
            self.keys, self.values = (t.new_empty(B, H, self.capacity, t.shape[3]) for t in (keys, values))
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.narrow(2, self.length, T).copy_(new)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


def _lower_right(T: int, S: int, device: torch.device) -> Tensor:
    """The causal mask of queries at the last T of S positions."""
    if torch.compiler.is_compiling():  # torch.compile cannot create a CausalBias
        return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    from torch.nn.attention.bias import causal_lower_right  # imported here, because it imports torch._dynamo

    return causal_lower_right(T, S)


def _masking(T: int, S: int, window: int | None, device: torch.device) -> dict:
    """How queries at the last T of S positions are masked, as arguments of attention."""
    if window is not None and T < S:  # the diagonal of `window` is the mask's only where that is a CausalBias
        if not torch.compiler.is_compiling():
            return {"attn_mask": _lower_right(T, S, device), "window": (window, -1)}
        return {"attn_mask": _lower_right(T, S, device).triu(S - T - window)}
    if 1 < T < S:
        return {"attn_mask": _lower_right(T, S, device)}
    of_window = {} if window is None else {"window": (window, -1)}
    return {"is_causal": True, **of_window} if T > 1 else {}


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention; x (B, T, embed_dim) -> (B, T, embed_dim).

    c_attn projects to queries, keys and values side by side. Attention reads the heads there, and writes their gradient
    there unless they are rotated, so nothing is copied.

    ``num_kv_heads`` below num_heads shares each key and value head among num_heads / num_kv_heads queries (GQA; Ainslie
    et al. 2023). ``dropout`` acts on the attention weights and on the output. With ``window``, a position attends to
    itself and that many positions before it (Beltagy et al. 2020); Mistral's sliding_window counts itself, too.
    ``rotary`` rotates queries and keys; layers may share it. With ``qk_norm_eps``, RMSNorms of this eps over each head
    of queries and of keys, q_norm and k_norm, come before that (Henry et al. 2020). Head counts that do not divide
    raise ValueError, and so does a negative window.
    """

    window: int | None = None  # also of modules that were pickled before there was one

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
        rotary: "RotaryEmbedding | None" = None,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        owner = "pygpt.nn.CausalSelfAttention"
        embed_dim, num_heads = (
            checked_integer(owner, "embed_dim", embed_dim),
            checked_integer(owner, "num_heads", num_heads),
        )
        num_kv_heads = num_heads if num_kv_heads is None else checked_integer(owner, "num_kv_heads", num_kv_heads)
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"pygpt.nn.CausalSelfAttention: embed_dim {embed_dim} does not divide by num_heads {num_heads}"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"pygpt.nn.CausalSelfAttention: num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}"
            )
        if window is not None and not 0 <= (window := checked_integer(owner, "window", window)) < 2**31:
            raise ValueError(f"{owner}: window must be an integer from 0 on, got {window!r}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, embed_dim // num_heads
        self.window = window
        self.c_attn = Linear(embed_dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias, device, dtype)
        self.c_proj = Linear(embed_dim, embed_dim, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.rotary = rotary
        if qk_norm_eps is not None:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, qk_norm_eps, True, device, dtype) for _ in "qk")

    def reset_parameters(self) -> None:
        """Draws c_attn and c_proj anew, as torch.nn.Linear does, and sets the norms' weights to 1."""
        for layer in self.children():
            if layer._parameters:
                layer.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """``x (B, T, embed_dim)`` -> ``(B, T, embed_dim)``; with a cache, x holds the positions that follow its own.

        Another shape of x raises ValueError.
        """
        C = self.num_heads * self.head_dim
        if x.dim() != 3 or x.shape[2] != C:
            raise ValueError(f"pygpt.nn.CausalSelfAttention: x must be (B, T, {C}), got {tuple(x.shape)}")
        T, dropout_p = x.shape[1], self.dropout.p if self.training else 0.0
        qkv = self.c_attn(x)
        if cache is None and not self._changes_heads() and self._is_packed(qkv):
            masking = _masking(T, T, self.window, x.device)
            y = functional.qkv_attention(qkv, self.num_heads, self.num_kv_heads, dropout_p, **masking)
        else:
            q, k, v = (
                as_heads(t, t.shape[2] // self.head_dim)
                for t in qkv.split((C, *[self.num_kv_heads * self.head_dim] * 2), dim=2)
            )
            if self._changes_heads():
                q, k = self._normed_and_rotated(q, k, 0 if cache is None else cache.length)
            if cache is not None:
                k, v = cache.append(k, v)
            heads = functional.scaled_dot_product_attention(
                q, k, v,
                dropout_p=dropout_p,
                enable_gqa=self.num_heads != self.num_kv_heads,
                **_masking(T, k.shape[2], self.window, x.device),
            )  # fmt: skip
            y = heads.transpose(1, 2).flatten(2)
        return _dropout(self.dropout, self.c_proj(y))

    def _is_packed(self, qkv: Tensor) -> bool:
        """Whether qkv_attention's kernels serve these heads. DTensors are split first, so that heads can be sharded."""
        return self.head_dim <= dispatch.fast_head_dim and type(qkv) not in dispatch.SHARDED

    def _changes_heads(self) -> bool:
        return "q_norm" in self._modules or self._modules.get("rotary") is not None

    def _normed_and_rotated(self, q: Tensor, k: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """q and k (B, H, T, D), whose first position is ``position``, after q_norm, k_norm and rotary."""
        rotary, fused = self._modules.get("rotary"), {}
        if "q_norm" in self._modules:
            norms: tuple[Any, Any] = self.q_norm, self.k_norm
            if rotary is not None and all(map(_is_norm_of_rope, norms)) and norms[0].eps == norms[1].eps:
                fused = {"q_weight": norms[0].weight, "k_weight": norms[1].weight, "eps": norms[0].eps}
            else:
                q, k = norms[0](q), norms[1](k)
        return (q, k) if rotary is None else rotary(q, k, position, **fused)

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}{window}"


def _is_norm_of_rope(norm: nn.Module) -> bool:
    """Whether calling the module is the norm that rope computes with its weight and eps, and nothing else."""
    weight: Tensor | None = norm._parameters.get("weight")
    has_both = weight is not None and weight.dim() == 1 and isinstance(norm.eps, float)
    return has_both and _is_unmodified(norm, RMSNorm, nn.RMSNorm)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys (Su et al. 2021) on `pygpt.functional.rope`.

    The first ``rotary_dim`` of ``head_dim`` channels, by default all, are rotated: pair i at position t by the angle
    t base^(-2 i / rotary_dim). Pair i is (i, i + rotary_dim / 2), or (2 i, 2 i + 1) with ``interleaved``. The cosines
    and sines of ``max_positions`` positions are computed in float64 and kept in float32, whatever the module is
    converted to; they are not part of the state dict. ``dtype`` is accepted as by every module and changes nothing.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        rotary_dim: int | None = None,
        base: float = 10000.0,
        interleaved: bool = False,
        max_positions: int = 4096,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim // 2 * 2 if rotary_dim is None else rotary_dim
        if not 0 <= rotary_dim <= head_dim or rotary_dim % 2:
            raise ValueError(
                f"pygpt.nn.RotaryEmbedding: rotary_dim must be even and from 0 to head_dim {head_dim}, got {rotary_dim}"
            )
        if max_positions < 0:
            raise ValueError(f"pygpt.nn.RotaryEmbedding: max_positions must not be negative, got {max_positions}")
        if not 0 < base < math.inf:
            raise ValueError(f"pygpt.nn.RotaryEmbedding: base must be a positive number, got {base}")
        self.head_dim, self.rotary_dim, self.base = head_dim, rotary_dim, float(base)
        self.interleaved, self.max_positions = interleaved, max_positions
        for name, table in self._tables(device).items():
            self.register_buffer(name, table, persistent=False)

    def _tables(self, device: torch.device | str | None) -> dict[str, Tensor]:
        pairs = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64)
        frequencies = self.base ** (-pairs / max(self.rotary_dim, 1))
        angles = torch.arange(self.max_positions, dtype=torch.float64)[:, None] * frequencies
        return {name: t.to(device, torch.float32) for name, t in (("cos", angles.cos()), ("sin", angles.sin()))}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        if self.cos is not before["cos"]:  # converted, moved or emptied, each of which leaves other values
            tables = self._tables("cpu") if before["cos"].is_meta else before
            for name in before:
                setattr(self, name, tables[name].to(self.cos.device))
        return self

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        position_ids: Tensor | int | None = None,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor | None]:
        """``q (B, Hq, T, head_dim)``, ``k (B, Hkv, T, head_dim)`` or None -> both, rotated.

        ``position_ids``: the position of each row, integers ``(T,)`` or ``(B, T)``, or the position of the first row,
        such as the length of a KV cache; 0 by default. ``q_weight``, ``k_weight`` and ``eps`` are those of
        `pygpt.functional.rope`. Positions from max_positions on raise ValueError (a tensor's on a GPU give NaN).
        """
        cos, sin, ids = self.cos, self.sin, position_ids
        if not isinstance(ids, Tensor):
            first = 0 if ids is None else ids
            end = first + q.shape[-2]
            if first < 0 or end > self.max_positions:
                raise ValueError(
                    f"pygpt.nn.RotaryEmbedding: positions {first} to {end - 1}, tables for {self.max_positions}"
                )
            cos, sin, ids = cos[first:end], sin[first:end], None
        if q.dtype == torch.float64:
            cos, sin = cos.double(), sin.double()
        return functional.rope(
            q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, interleaved=self.interleaved,
            position_ids=ids,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, rotary_dim={self.rotary_dim}, base={self.base}, "
            f"interleaved={self.interleaved}, max_positions={self.max_positions}"
        )
