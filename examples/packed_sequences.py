"""Compares attention over packed sequences with PyTorch's over the same sequences in a padded batch.

python examples/packed_sequences.py
"""

import time

import torch

import pygpt.functional as P

torch.manual_seed(0)
torch.set_num_threads(1)
lengths, heads, head_dim = [300, 17, 5, 160, 40], 4, 64
q, k, v = (torch.randn(sum(lengths), heads, head_dim) for _ in range(3))
rows = torch.tensor([0, *lengths]).cumsum(0).int()  # sequence b has the rows rows[b] .. rows[b + 1] - 1


def packed():
    """Every token attends to those before it in its own sequence; nothing is computed for padding."""
    return P.varlen_attn(q, k, v, rows, rows, max(lengths), max(lengths), window_size=(-1, 0))


# The usual way: a batch as long as its longest sequence, and a mask that hides the padding and what comes later.
batch = [torch.nn.utils.rnn.pad_sequence(t.split(lengths), batch_first=True).transpose(1, 2) for t in (q, k, v)]
mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None, None, None]
mask = mask & torch.ones(max(lengths), max(lengths)).tril().bool()


def padded():
    return torch.nn.functional.scaled_dot_product_attention(*batch, mask)


def milliseconds(function):
    """The fastest of ten calls."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


print(f"{len(lengths)} sequences, {len(q)} tokens; padded {len(lengths) * max(lengths)}")
each = zip(packed().split(lengths), padded().transpose(1, 2), lengths, strict=True)
print(f"largest difference: {max((ours - theirs[:n]).abs().max() for ours, theirs, n in each):.1e}")
print(f"packed: {milliseconds(packed):.2f} ms; PyTorch, padded: {milliseconds(padded):.2f} ms")
