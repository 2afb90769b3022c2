"""A GPT-2 of transformers, unchanged, on pygpt's attention; and its weights in pygpt's own GPT.

python examples/hf_model.py      (pip install transformers; the weights are random, nothing is downloaded)
"""

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import pygpt
import pygpt.functional as P

torch.manual_seed(0)
config = GPT2Config(vocab_size=512, n_positions=128, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).eval()  # its attention calls F.scaled_dot_product_attention
idx = torch.randint(config.vocab_size, (2, 100))

calls = 0


def attention(*args, **kwargs):
    global calls
    calls += 1
    return P.scaled_dot_product_attention(*args, **kwargs)


with torch.no_grad():
    theirs = model(idx).logits
    original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        patched = model(idx).logits
    finally:
        F.scaled_dot_product_attention = original

    ours, _ = pygpt.GPT.from_hf(model).eval()(idx)  # without targets: the last position's logits


def difference(logits):
    return f"{(logits - theirs[:, -1:]).abs().max():.1e}"


print(f"{calls} calls of attention went to pygpt; logits differ by {difference(patched[:, -1:])}")
print(f"GPT.from_hf gives pygpt's own GPT the same weights; logits differ by {difference(ours)}")
