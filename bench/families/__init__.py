"""Models of other people on pygpt's kernels: `python -m bench.families` prints the tables of docs/models.md.

Every family is a small model with random weights, once as it is and once after `pygpt.patch(model)` with
attn_implementation="pygpt".

speed      the share of a training step's matmul and attention FLOPs that our kernels serve; how much faster a forward
           pass and a training step are (the medians of runs in turn); the largest error of a logit, loss or gradient
           against float64 over PyTorch's own; and whether greedy decoding gives the same tokens
ways       the same errors with padding, under torch.compile, autocast and checkpointing, and with LoRA
parallel   a training step under DDP and FSDP2, in two processes: speed, memory and loss

FLOPs are counted by torch's formulas in a step of the unpatched model under the math backend, because torch counts its
fused attention on CPUs as nothing. What the patched model still runs of torch's matmuls is not served.
"""
