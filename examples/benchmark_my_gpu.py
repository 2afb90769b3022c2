"""Attention, forward and backward, on this machine's GPU beside PyTorch's; without a GPU, on its CPU.

    python examples/benchmark_my_gpu.py

For figures to publish use `pygpt bench` (CPU) or `make gpu` (GPU): they rotate inputs, check results and show spreads.
"""

import time
from statistics import median

import torch

import pygpt
import pygpt.functional as P

device = "cuda" if torch.cuda.is_available() else "cpu"
name = torch.cuda.get_device_name() if device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
print(f"{'' if device == 'cuda' else 'torch finds no GPU here; '}measuring {name}")
B, H, T, D = (8, 16, 2048, 64) if device == "cuda" else (1, 8, 512, 64)
dtype = torch.bfloat16 if device == "cuda" else torch.float32

q, k, v, dout = (torch.randn(B, H, T, D, device=device, dtype=dtype) for _ in range(4))
inputs = [t.requires_grad_() for t in (q, k, v)]


def seconds(function) -> float:
    """One forward and backward pass, until the device has finished."""
    start = time.perf_counter()
    torch.autograd.grad(function(*inputs, is_causal=True), inputs, dout)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


functions = {"PyTorch": torch.nn.functional.scaled_dot_product_attention, "pygpt": P.scaled_dot_product_attention}
times = {name: [] for name in functions}
for _ in range(12):  # in turns, so that drift hits both alike
    for name, function in functions.items():
        times[name].append(seconds(function))

flops = 0.5 * 14 * B * H * T * T * D  # two products forward and five backward, half of them masked
for name, found in times.items():
    middle = median(found[2:])  # the first two compile and fill caches
    print(f"{name:8} {middle * 1e3:8.2f} ms  {flops / middle / 1e12:7.3f} TFLOP/s")
ratio = median(times["PyTorch"][2:]) / median(times["pygpt"][2:])
print(f"pygpt ({pygpt.explain('attention', q, k, v, is_causal=True).backend}) is {ratio:.2f} times as fast")
