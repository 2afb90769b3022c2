"""Calls that together launch every kernel of a GPU backend, with every tile and split that it has."""

from collections.abc import Callable, Iterator

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def calls(
    kernels, dtype: torch.dtype, device: str, wide: bool = False, options: bool = False
) -> Iterator[tuple[str, Callable]]:
    """(name, call) of launchers of the namespace ``kernels`` on tensors whose content does not matter.

    wide: also sizes that need odd tiles, or that alignment keeps from descriptors. options: also attention's options.
    """

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device=device)

    def attention(E, EV, L=1024, S=1024):
        q, k, v = empty(2, 4, L, E), empty(2, 4, S, E), empty(2, 4, S, EV)
        out, lse = kernels.attention_fwd(q, k, v, True, 0.1)
        kernels.attention_bwd(out, None, q, k, v, out, lse, True, 0.1, [True] * 3)

    def attention_options(E, L=1024, S=1024):
        q, k = empty(2, 4, L, E), empty(2, 2, S, E)
        slopes, sink, seed = torch.empty(1, 4, device=device), torch.empty(4, device=device), empty(1).long()
        for mask in (empty(1, 1, L, S), empty(1, 1, L, S).bool()):
            o = mask, slopes, sink, seed, 0.1, 1.0
            out, lse = kernels.attention_fwd(q, k, k, True, 0.1, *o)
            needs = [True] * 3 + [mask.dtype != torch.bool, True, True]
            kernels.attention_bwd(out, lse, q, k, k, out, lse, True, 0.1, needs, *o)

    def mlp(M, C, H, activation):
        width = 2 * H if activation == "swiglu" else H
        x, fc, fb, proj, pb = empty(M, C), empty(width, C), empty(width), empty(C, H), empty(C)
        y, hidden, pre = kernels.mlp_fwd(x, fc, fb, proj, pb, activation)
        kernels.mlp_bwd(y, x, fc, proj, hidden, pre, activation, [True] * 5)

    def norm(M, N):
        x, w = empty(M, N), empty(N)
        y, s, mean, rstd = kernels.add_layer_norm_fwd(x, x, w, w, 1e-5)
        kernels.add_layer_norm_bwd(y, s, x, w, mean, rstd, [True] * 3)
        y, s, rstd = kernels.add_rms_norm_fwd(x, x, w, 1e-5)
        kernels.add_rms_norm_bwd(y, s, x, w, rstd, [True] * 2)
        kernels.rms_norm_fwd(x, w, 1e-5, 1.0)
        dropout, wide = (torch.empty(1, dtype=torch.int64, device=device), 0.1), torch.empty(N, device=device)
        for residual, weight in ((x, w), (x.float(), wide)):
            y, s, mean, rstd = kernels.dropout_add_layer_norm_fwd(x, residual, weight, weight, 1e-5, *dropout)
            kernels.dropout_add_layer_norm_bwd(y, s, s, weight, mean, rstd, [True] * 4, *dropout)

    def rope(D, interleaved):
        q, k, w = empty(4, 32, 1024, D), empty(4, 8, 1024, D), torch.empty(D, device=device)
        cos = torch.empty(1024, D // 2, device=device)
        for weight, rstds in ((None, None), (w, torch.empty(4, 32, 1024, device=device))):
            norm = weight is not None
            kernels.rope_fwd(q, k, cos, cos, weight, weight, None, 1e-6, interleaved)
            saved = (q, k, cos, cos, w, w, rstds, rstds[:, :8]) if norm else (None, None, cos, cos, *[None] * 4)
            kernels.rope_bwd(q, k, *saved, None, interleaved, [True, True, norm, norm])

    def losses(N, K, V):
        x, w, target = empty(N, K), empty(V, K), torch.zeros(N, dtype=torch.int64, device=device)
        weight = torch.empty(V, device=device)
        for options in ((-100, None, "mean", 0.0, 0.0), (-100, weight, "none", 0.1, 0.1)):
            logits = empty(N, V)
            loss, *saved = kernels.cross_entropy_fwd(logits, target, *options)
            kernels.cross_entropy_bwd(loss, logits, target, *saved, *options)
            loss, *_, stats, totals = kernels.linear_cross_entropy_fwd(x, w, target, None, [True] * 3, *options)
            rest = None, stats, totals, [True] * 3
            kernels.linear_cross_entropy_bwd(loss, x, w, target, *rest, *options)

    def elements(n):
        x = empty(n)
        for approximate in ("none", "tanh"):
            kernels.gelu_bwd(kernels.gelu_fwd(x, approximate), x, approximate)
        kernels.relu_bwd(kernels.relu_fwd(x), x)

    for E, EV in ((64, 64), (128, 128), (256, 256), *(((80, 48), (20, 20)) if wide else ())):
        yield f"attention {E}" + (f",{EV}" if EV != E else ""), lambda E=E, EV=EV: attention(E, EV)
    for E in (64, 128, 256) if options else ():
        yield f"attention options {E}", lambda E=E: attention_options(E)
    for activation in ("gelu", "swiglu", "relu2") if wide else ("gelu", "swiglu"):
        yield f"mlp {activation}", lambda activation=activation: mlp(16384, 768, 3072, activation)
    for M in (4, 16, 256):  # for few rows there are other kernels and tiles; K is split where tiles are few
        yield f"mlp {M} rows", lambda M=M: mlp(M, 768, 3072, "gelu_tanh")
    if wide:
        yield "mlp odd", lambda: mlp(1000, 771, 517, "gelu")
    for N in (*((16, 32, 128, 256, 512, 2048) if wide else ()), 64, 768, 1024, 4096, 8192, 16384, 40000):
        yield f"norm {N}", lambda N=N: norm(8192, N)
    for D in (64, 128, *((80, 256) if wide else ())):
        for interleaved in (False, True):
            name = f"rope {D}{' interleaved' * interleaved}"
            yield name, lambda D=D, interleaved=interleaved: rope(D, interleaved)
    for V in (300, 50304):  # few classes have a tile of their own
        yield f"losses {V}", lambda V=V: losses(4096, 768, V)
    yield "activation", lambda: elements(1 << 24)


def attention_options(kernels, dtype: torch.dtype, device: str, wide: bool = False) -> Iterator[tuple[str, Callable]]:
    """The same for attention with options: all of them together, and a window alone."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    def attention(E, mask, slopes, sink, seed, softcap, left):
        q, k, v = empty(2, 4, 1024, E), empty(2, 2, 1024, E), empty(2, 2, 1024, E)
        options = mask, slopes, sink, seed, 0.1 if seed is not None else 0.0, softcap, left, 0, True
        out, lse = kernels.attention_fwd(q, k, v, False, 0.1, *options)
        floating = mask is not None and mask.dtype != torch.bool
        needs = [True] * 3 + [floating, slopes is not None, sink is not None]
        kernels.attention_bwd(out, lse, q, k, v, out, lse, False, 0.1, needs, *options)

    for E in (64, 128) if wide else (64,):
        for of_mask in (dtype, torch.bool) if wide else (dtype,):
            mask, seed = empty(2, 1, 1024, 1024, dtype=of_mask), empty(1, dtype=torch.int64)
            of_heads = empty(1, 4, dtype=torch.float32), empty(4, dtype=torch.float32)
            name = f"attention options {E}{', boolean' * (of_mask == torch.bool)}"
            yield (
                name,
                lambda E=E, mask=mask, of_heads=of_heads, seed=seed: attention(E, mask, *of_heads, seed, 30.0, 128),
            )
        yield f"attention window {E}", lambda E=E: attention(E, None, None, None, None, 0.0, 128)


def packed_attention(kernels, dtype: torch.dtype, device: str, wide: bool = False) -> Iterator[tuple[str, Callable]]:
    """The same for packed sequences: with a causal mask, and with a window and a gradient of lse."""

    def attention(E, left, right, heads, with_dlse):
        q, k, v = (torch.empty(4096, h, E, dtype=dtype, device=device) for h in (4, heads, heads))
        cu_seq = torch.empty(9, dtype=torch.int32, device=device)
        packing = cu_seq, cu_seq, None, 1024, 1024, 0.1, left, right
        out, lse = kernels.varlen_attn_fwd(q, k, v, *packing)
        kernels.varlen_attn_bwd(out, lse if with_dlse else None, q, k, v, out, lse, [True] * 3, *packing)

    for E in (64, 128, 256):
        yield f"varlen_attn {E}", lambda E=E: attention(E, -1, 0, 4, False)
        if wide and E < 256:
            yield f"varlen_attn window {E}", lambda E=E: attention(E, 128, 0, 2, True)
