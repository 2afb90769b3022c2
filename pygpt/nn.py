"""Modules on `pygpt.functional`: torch's norms and Linear with another forward, and the two halves of a GPT block.

State dicts are interchangeable with torch.nn (LayerNorm, RMSNorm, Linear) and nanoGPT (MLP, CausalSelfAttention).
Under torch.jit.script the norms and Linear compute with PyTorch's kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from . import dispatch, functional, reference
from .dispatch import dispatches_for_itself
from .ops.qkv_attention import as_heads


@fx.wrap  # symbolic_trace records the call itself: while tracing, an omitted residual is a Proxy and not None
def _layer_norm(input: Tensor, residual: Tensor | None, *affine: Any) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return functional.layer_norm(input, *affine)
    return functional.add_layer_norm(input, residual, *affine)


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
    """torch.nn.RMSNorm on `pygpt.functional.rms_norm`; ``input (..., *normalized_shape)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the norm of ``input (..., *normalized_shape)``, of the same shape."""
        if torch.jit.is_scripting():
            return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)
        return functional.rms_norm(input, self.normalized_shape, self.weight, self.eps)


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


_FORWARDS: dict[type, Callable] = {
    module_class: module_class.forward for module_class in (Linear, nn.Linear, nn.Dropout)
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
    if not _is_unmodified(module, Linear, nn.Linear) or not module._parameters.keys() >= {"weight", "bias"}:
        return False
    weight, bias = module.weight, module.bias
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

    For inference: an append writes to memory that an earlier call's backward pass would need. With a window, too, it
    keeps all positions.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.heads: Tensor | None = None

    def append(self, heads: Tensor) -> Tensor:
        """Appends the key heads and then the value heads of the next T positions, (B, 2 Hkv, T, D); returns all so far.

        ValueError if they exceed the capacity, or differ in batch, heads or dtype from those so far.
        """
        B, H, T, D = heads.shape
        end = self.length + T
        if self.heads is not None and (
            heads.dtype != self.heads.dtype or heads[:, :, :0].shape != self.heads[:, :, :0].shape
        ):
            kept = *self.heads.shape[:2], "T", D
            raise ValueError(
                f"pygpt.nn.KVCache: holds {self.heads.dtype} of shape {kept}, got {heads.dtype} {tuple(heads.shape)}"
            )
        if end > self.capacity:
            raise ValueError(f"pygpt.nn.KVCache: {end} positions, room for {self.capacity}")
        if self.heads is None:
            self.heads = heads.new_empty(B, H, self.capacity, D)
        self.heads.narrow(2, self.length, T).copy_(heads)
        self.length = end
        return self.heads.narrow(2, 0, end)


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

    c_attn projects to queries, keys and values side by side. Attention reads the heads there and writes their gradient
    there, so nothing is copied.
    ``num_kv_heads`` below num_heads shares each key and value head among num_heads / num_kv_heads queries (GQA; Ainslie
    et al. 2023). ``dropout`` acts on the attention weights and on the output. With ``window``, a position attends to
    itself and that many positions before it (Beltagy et al. 2020); Mistral's sliding_window counts itself, too. Head
    counts that do not divide raise ValueError, and so does a negative window.
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
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"pygpt.nn.CausalSelfAttention: embed_dim {embed_dim} does not divide by num_heads {num_heads}"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"pygpt.nn.CausalSelfAttention: num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}"
            )
        if window is not None and not (isinstance(window, int) and 0 <= window < 2**31):
            raise ValueError(f"pygpt.nn.CausalSelfAttention: window must be an integer from 0 on, got {window!r}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, embed_dim // num_heads
        self.window = window
        self.c_attn = Linear(embed_dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias, device, dtype)
        self.c_proj = Linear(embed_dim, embed_dim, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draws c_attn and c_proj anew, as torch.nn.Linear does."""
        self.c_attn.reset_parameters()
        self.c_proj.reset_parameters()

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """``x (B, T, embed_dim)`` -> ``(B, T, embed_dim)``; with a cache, x holds the positions that follow its own.

        Another shape of x raises ValueError.
        """
        C = self.num_heads * self.head_dim
        if x.dim() != 3 or x.shape[2] != C:
            raise ValueError(f"pygpt.nn.CausalSelfAttention: x must be (B, T, {C}), got {tuple(x.shape)}")
        T, dropout_p = x.shape[1], self.dropout.p if self.training else 0.0
        qkv = self.c_attn(x)
        if cache is None and self.head_dim <= dispatch.fast_head_dim and type(qkv) not in dispatch.SHARDED:
            masking = _masking(T, T, self.window, x.device)
            y = functional.qkv_attention(qkv, self.num_heads, self.num_kv_heads, dropout_p, **masking)
        else:
            q, kv = (as_heads(t, t.shape[2] // self.head_dim) for t in qkv.split((C, qkv.shape[2] - C), dim=2))
            k, v = (kv if cache is None else cache.append(kv)).chunk(2, dim=1)
            heads = functional.scaled_dot_product_attention(
                q, k, v,
                dropout_p=dropout_p,
                enable_gqa=self.num_heads != self.num_kv_heads,
                **_masking(T, k.shape[2], self.window, x.device),
            )  # fmt: skip
            y = heads.transpose(1, 2).flatten(2)
        return _dropout(self.dropout, self.c_proj(y))

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}{window}"
