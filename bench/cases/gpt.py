"""The GPT itself: a training step (forward, backward, AdamW), and one token decoded with a cache of keys and values.

bfloat16 is autocast over float32 parameters in training, and bfloat16 parameters in decoding, as is usual. PyTorch
eager is the same model under `pygpt.backend("torch")`.
"""

import itertools
from dataclasses import dataclass

import torch

import pygpt

from ..timing.clocks import Peaks
from . import ops
from .ops import Case

BATCHES = 4


@dataclass(frozen=True)
class Candidate:
    """A backend or a peer, and where it runs."""

    name: str
    dtype: str
    device: str
    peaks: Peaks

    def backend(self):
        return pygpt.backend("torch" if self.name in ("eager", "compile") else self.name)

    def model(self, layers: int, heads: int, width: int, block: int, vocabulary: int):
        torch.manual_seed(0)
        return pygpt.GPT(pygpt.GPTConfig(vocabulary, block, layers, heads, width), self.device)


# ------------------------------------------------------------------------------- set-up functions, one per op
# Each returns a call -> results that can be compared, the tokens it is worth, and how many a second the machine's peak
# allows.
def gpt(candidate: Candidate, layers, heads, width, batch, block, vocabulary):
    """Trains a model by one step on its next batch. Peak: the FLOPs of the dtype in which it multiplies."""
    model = candidate.model(layers, heads, width, block, vocabulary).train()
    forward = torch.compile(model) if candidate.name == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    batches = itertools.cycle(torch.randint(vocabulary, (BATCHES, 2, batch, block), device=candidate.device))
    bfloat16 = candidate.dtype == "bfloat16"

    def step():
        tokens, targets = next(batches)
        with candidate.backend(), torch.autocast(candidate.device, torch.bfloat16, enabled=bfloat16):
            _, loss = forward(tokens, targets, return_logits=False)
        loss.backward()
        optimizer.step()
        farthest = model.transformer.h[0].attn.c_attn.weight.grad  # from the loss
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), farthest

    return step, batch * block, candidate.peaks.flops[candidate.dtype] * 1e9 / flops_per_token(model)


def decode(candidate: Candidate, layers, heads, width, batch, block, vocabulary):
    """Decodes one token after ``block`` others, which are in the cache, always at the same position.

    Peak: all weights, keys and values are read at the speed of `Tensor.sum`.
    """
    model = candidate.model(layers, heads, width, block + 1, vocabulary).to(ops.DTYPES[candidate.dtype]).eval()
    tokens = torch.randint(vocabulary, (batch, block + 1), device=candidate.device)
    caches = model.new_caches()

    @torch.no_grad()
    def token():
        with candidate.backend():
            logits, _ = model(tokens[:, -1:], caches=caches)
        for cache in caches:
            cache.length = block
        return (logits,)

    with torch.no_grad(), candidate.backend():
        model(tokens[:, :block], caches=caches)
    cached = sum(t.nbytes for cache in caches for t in (cache.keys, cache.values))
    weights = sum(p.nbytes for p in model.parameters()) - model.transformer.wpe.weight.nbytes
    return token, batch, batch * candidate.peaks.read * 1e9 / (weights + cached)


def flops_per_token(model) -> int:
    """6 N + 12 L C T: forward and backward of every weight, and of attention (PaLM, Chowdhery et al. 2022)."""
    c, embedding = model.config, model.transformer.wpe.weight.numel()
    return 6 * (sum(p.numel() for p in model.parameters()) - embedding) + 12 * c.n_layer * c.n_embd * c.block_size


# ------------------------------------------------------------------------------- the models
NANO, GPT2 = (6, 6, 384), (12, 12, 768)  # nanoGPT's character model, GPT-2 124M


def case(setup, model, batch, block, vocabulary, standard=()) -> Case:
    layers, heads, width = model
    shape = f"L{layers} C{width} H{heads} B{batch} T{block} V{vocabulary}"
    return Case(setup, (*model, batch, block, vocabulary), shape, standard)


CASES = [  # vocabulary: bytes, Shakespeare's characters, GPT-2's
    case(gpt, NANO, 8, 256, 256, standard=("float32", "bfloat16")),
    case(gpt, NANO, 8, 256, 65),
    case(gpt, GPT2, 1, 512, 50304),
    case(decode, GPT2, 1, 512, 50304),
]
DTYPES = ("float32", "bfloat16")
DIRECTIONS = {"gpt": "step", "decode": "token"}


def names(op: str, peers) -> list[str]:
    """The peers that take part. A cache grows with each token, which torch.compile would compile anew."""
    return [name for name in ("eager", "compile") if name in peers and (op, name) != ("decode", "compile")]


def candidate(row, device: str, name: str, peaks: Peaks):
    """What the row's set-up function returns for a backend or a peer."""
    return row.case.setup(Candidate(name, row.dtype, device, peaks), *row.case.args)
