"""The exactness of your own shapes from Python: every error against float64, beside PyTorch's own.

python examples/verify_my_shapes.py
"""

import torch

from pygpt.verify import measure

SHAPES = {  # op -> the sizes of your model; `pygpt verify --help` and --shape have the same names
    "attention": {"B": 2, "H": 4, "L": 100, "S": 100, "E": 80, "causal": 1},
    "mlp": {"M": (4, 50), "C": 192},
    "layer_norm": {"M": (4, 50), "N": 192},
}

generator = torch.Generator().manual_seed(0)
rows = [
    row
    for op, dims in SHAPES.items()
    for dtype in (torch.float32, torch.bfloat16)
    for row in measure(op, dims, dtype, generator)
]
for row in rows:
    print(f"{row.op:11} {row.dtype:9} {row.direction:12} {row.backend:6} ours {row.ours:.1e}  PyTorch {row.torch:.1e}")
print(f"{sum(row.passed for row in rows)} of {len(rows)} pass: error at most twice PyTorch's plus a few roundings")
