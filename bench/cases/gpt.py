"""The GPT itself: a training step (forward, backward, AdamW), and one token decoded with a cache of keys and values.

bfloat16 is autocast over float32 parameters in training, and bfloat16 parameters in decoding, as is usual. PyTorch
eager is the same model under `pygpt.backend("torch")`.
"""

import itertools

import torch

import pygpt

from . import ops
from .ops import Case

BATCHES = 4


# ------------------------------------------------------------------------------- the models
def gpt(make, layers, heads, width, batch, block, vocabulary):
    """The set-up functions' place in a Case; see `trainer`."""


def decode(make, layers, heads, width, batch, block, vocabulary):
    """The same; ``block`` tokens are in the cache. See `decoder`."""


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


def flops_per_token(model) -> int:
    """6 N + 12 L C T: forward and backward of every weight, and of attention (PaLM, Chowdhery et al. 2022)."""
    c, embedding = model.config, model.transformer.wpe.weight.numel()
    return 6 * (sum(p.numel() for p in model.parameters()) - embedding) + 12 * c.n_layer * c.n_embd * c.block_size


# ------------------------------------------------------------------------------- the candidates
def names(op: str, peers) -> list[str]:
    """The peers that take part. A cache grows with each token, which torch.compile would compile anew."""
    return [name for name in ("eager", "compile") if name in peers and (op, name) != ("decode", "compile")]


def candidate(row, device: str, name: str, peaks):
    """A call -> results that can be compared, the tokens it is worth, and how many a second the machine's peak allows.

    ``name``: a backend or a peer.
    """
    return {"gpt": trainer, "decode": decoder}[row.case.op](row.case.dims, row.dtype, device, name, peaks)


def model_of(dims: dict, device: str, room: int = 0):
    torch.manual_seed(0)
    return pygpt.GPT(
        pygpt.GPTConfig(dims["vocabulary"], dims["block"] + room, dims["layers"], dims["heads"], dims["width"]), device
    )


def serving(name: str):
    return pygpt.backend("torch" if name in ("eager", "compile") else name)


def trainer(dims: dict, dtype: str, device: str, name: str, peaks):
    """Trains a model by one step on its next batch. Peak: the FLOPs of the dtype in which it multiplies."""
    model = model_of(dims, device).train()
    forward = torch.compile(model) if name == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    B, T = dims["batch"], dims["block"]
    batches = itertools.cycle(torch.randint(dims["vocabulary"], (BATCHES, 2, B, T), device=device))

    def step():
        tokens, targets = next(batches)
        with serving(name), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = forward(tokens, targets)
        loss.backward()
        optimizer.step()
        farthest = model.transformer.h[0].attn.c_attn.weight.grad  # from the loss
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), farthest

    return step, B * T, peaks.flops[dtype] * 1e9 / flops_per_token(model)


def decoder(dims: dict, dtype: str, device: str, name: str, peaks):
    """Decodes one token after ``block`` others, always at the same position.

    Peak: all weights, keys and values are read at the speed of `Tensor.sum`.
    """
    B, T = dims["batch"], dims["block"]
    model = model_of(dims, device, room=1).to(ops.DTYPES[dtype]).eval()
    tokens = torch.randint(dims["vocabulary"], (B, T + 1), device=device)
    caches = model.new_caches()

    @torch.no_grad()
    def token():
        with serving(name):
            logits, _ = model(tokens[:, -1:], caches=caches)
        for cache in caches:
            cache.length = T
        return (logits,)

    with torch.no_grad(), serving(name):
        model(tokens[:, :T], caches=caches)
    cached = sum(cache.heads.nbytes for cache in caches)
    weights = sum(p.nbytes for p in model.parameters()) - model.transformer.wpe.weight.nbytes
    return token, B, B * peaks.read * 1e9 / (weights + cached)
