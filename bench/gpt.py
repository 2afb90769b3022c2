"""One training step of the GPT: forward, backward and AdamW, on 8 sequences of 256 tokens.

6 layers, 384 wide, 6 heads (nanoGPT's character model). bfloat16 is autocast over float32 parameters, as in
training. PyTorch eager is the same model under `pygpt.backend("torch")`.
"""

import itertools

import torch

import pygpt

from .ops import Case

BATCH, BLOCK, LAYERS, HEADS, WIDTH = 8, 256, 6, 6, 384
BATCHES = 4


def gpt(make, vocabulary):
    """The set-up functions' place in a Case; see `trainer`."""


CASES = [  # vocabulary: bytes, Shakespeare's characters
    Case(gpt, (vocabulary,), f"L{LAYERS} C{WIDTH} H{HEADS} B{BATCH} T{BLOCK} V{vocabulary}", standard)
    for vocabulary, standard in ((256, ("float32", "bfloat16")), (65, ()))
]
DTYPES = ("float32", "bfloat16")
DIRECTION = "step"


def flops_per_token(model) -> int:
    """6 N + 12 L C T: forward and backward of every weight, and of attention (PaLM, Chowdhery et al. 2022)."""
    embedding = model.transformer.wpe.weight.numel()
    return 6 * (sum(p.numel() for p in model.parameters()) - embedding) + 12 * LAYERS * WIDTH * BLOCK


def trainer(vocabulary: int, dtype: str, device: str, name: str):
    """A model and a function that trains it by one step on its next batch. ``name``: a backend, "eager" or "compile"."""
    torch.manual_seed(0)
    config = pygpt.GPTConfig(vocab_size=vocabulary, block_size=BLOCK, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)
    model = pygpt.GPT(config).to(device).train()
    forward = torch.compile(model) if name == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    batches = itertools.cycle(torch.randint(vocabulary, (BATCHES, 2, BATCH, BLOCK), device=device))
    backend = "torch" if name in ("eager", "compile") else name

    def step():
        tokens, targets = next(batches)
        with pygpt.backend(backend), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = forward(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step
