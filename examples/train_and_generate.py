"""Trains a small GPT on a text of your choice for a few seconds and lets it continue the text's beginning.

    python examples/train_and_generate.py [TEXT_FILE]      (default: this file, of which the model learns much by heart)

`pygpt train` does it in earnest: with validation, checkpoints and a resumable run.
"""

import sys
from pathlib import Path

import torch

import pygpt

torch.set_num_threads(1)  # The model is too small to be worth a second thread.
torch.manual_seed(0)
text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
data = torch.tensor(list(text))  # A token is a byte.
model = pygpt.GPT(pygpt.GPTConfig(vocab_size=256, block_size=32, n_layer=1, n_head=4, n_embd=128))

STEPS, BATCH, RATE = 400, 16, 5e-3
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
for step in range(STEPS):
    for group in optimizer.param_groups:
        group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / STEPS)  # warm-up, then a linear decay
    starts = torch.randint(len(data) - 32, (BATCH, 1))
    batch = data[starts + torch.arange(33)]
    _, loss = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, STEPS // 2, STEPS - 1):
        print(f"step {step + 1:3}: loss {loss.item():.2f}")

prompt = torch.tensor([list(text[:24])])
out = model.eval().generate(prompt, max_new_tokens=160, temperature=0.3)
print("---", bytes(out[0].tolist()).decode(errors="replace"), "---", sep="\n")
