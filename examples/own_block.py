"""A transformer block of your own on pygpt's modules and functions, beside the same block on torch's.

python examples/own_block.py
"""

import copy

import torch

import pygpt
import pygpt.functional as P


class Block(torch.nn.Module):
    """x + attention(norm(x)), then the same with an MLP; x (B, T, width)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = pygpt.nn.LayerNorm(width), pygpt.nn.LayerNorm(width)
        self.attn, self.mlp = pygpt.nn.CausalSelfAttention(width, heads), pygpt.nn.MLP(width)

    def forward(self, x):
        delta = self.attn(self.norm1(x))
        # One pass over memory adds the residual and normalises the sum.
        normed, x = P.add_layer_norm(x, delta, (x.shape[-1],), self.norm2.weight, self.norm2.bias, self.norm2.eps)
        return x + self.mlp(normed)


torch.manual_seed(0)
block, x = Block(width=256, heads=4), torch.randn(2, 128, 256)
gradients = {}
for backend in ("cpp", "torch"):
    model = copy.deepcopy(block)
    with pygpt.backend(backend):
        model(x).square().mean().backward()
    gradients[backend] = torch.cat([p.grad.flatten() for p in model.parameters()])

difference = (gradients["cpp"] - gradients["torch"]).norm() / gradients["torch"].norm()
print(f"{gradients['cpp'].numel():,} gradients; relative difference between the backends: {difference:.1e}")
print(pygpt.explain("layer_norm", x, (256,), block.norm1.weight, block.norm1.bias))
