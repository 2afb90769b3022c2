"""One training step of the GPT beside the same model in PyTorch eager: `python -m bench gpt`.

A step is forward, backward and AdamW, on 8 sequences of 256 tokens, with 6 layers, 384 wide, 6 heads
(nanoGPT's character model). bfloat16 is autocast over float32 parameters, as in training.
"""

import itertools

import torch

import pygpt
from pygpt.backend import choose

from . import harness

BATCH, BLOCK, LAYERS, HEADS, WIDTH = 8, 256, 6, 6, 384
CASES = [(256, True), (65, False)]  # vocabulary (bytes, Shakespeare's characters), standard
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = 4


def flops_per_token(model) -> int:
    """6 N + 12 L C T: forward and backward of every weight, and of attention (PaLM, Chowdhery et al. 2022)."""
    embedding = model.transformer.wpe.weight.numel()
    return 6 * (sum(p.numel() for p in model.parameters()) - embedding) + 12 * LAYERS * WIDTH * BLOCK


def trainer(vocabulary, dtype):
    """A model and a function that runs one training step on its next batch."""
    torch.manual_seed(0)
    config = pygpt.GPTConfig(vocab_size=vocabulary, block_size=BLOCK, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)
    model = pygpt.GPT(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    batches = itertools.cycle(torch.randint(vocabulary, (BATCHES, 2, BATCH, BLOCK)))

    def step():
        tokens, targets = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def pytest_generate_tests(metafunc):
    options = metafunc.config.option
    found = [
        (vocabulary, standard, dtype)
        for vocabulary, standard in CASES
        for dtype in DTYPES
        if dtype in options.dtypes and (standard or not options.only_standard)
    ]
    ids = [f"gpt-vocab{vocabulary}-{dtype}" for vocabulary, _, dtype in found]
    metafunc.parametrize("vocabulary, standard, dtype", found, ids=ids)


def test_step(vocabulary, standard, dtype, benchmark, peaks, keep, pytestconfig):
    (model, ours), (_, step) = (trainer(vocabulary, dtype) for _ in range(2))

    def eager():
        with pygpt.backend("torch"):
            step()

    row = harness.compare(benchmark, ours, eager, 8 * pytestconfig.option.seconds)
    if row is not None:
        harness.rates(row, BATCH * BLOCK, "tok/s", peaks.fma * 1e9 / flops_per_token(model))
        row["backend"] = choose("linear", [model.lm_head.weight]).backend
    shape = f"L{LAYERS} C{WIDTH} H{HEADS} B{BATCH} T{BLOCK} V{vocabulary}"
    keep(row, op="gpt", shape=shape, dtype=dtype, direction="step", standard=standard)
