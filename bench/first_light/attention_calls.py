"""A call for each of Triton's attention kernels, for the checks that time or compile them one by one."""

from collections.abc import Callable

SHAPES = {64: (16, 12, 1024), 128: (2, 16, 4096), 256: (2, 8, 2048)}  # head dimension: batch, heads, positions


def calls(kernels, q, k, v, dout) -> dict[str, Callable]:
    """A causal call for each kernel of a namespace of ops; backward's calls launch attention_delta_kernel as well."""
    scale = q.shape[-1] ** -0.5
    out, lse = kernels.attention_fwd(q, k, v, True, scale)

    def backward(*needs):
        kernels.attention_bwd(dout, None, q, k, v, out, lse, True, scale, list(needs))

    return {
        "fwd": lambda: kernels.attention_fwd(q, k, v, True, scale),
        "dkdv": lambda: backward(False, True, True),
        "dq": lambda: backward(True, False, False),
    }
