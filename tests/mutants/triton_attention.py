"""Faults in the options and packed sequences of attention in Triton."""

from .mutant import DROPOUT, OPTIONS, PARITY, QKV, VARLEN, Mutant

TRITON_OPTIONS = [
    # ---- which keys a query sees
    Mutant(
        "triton options: a window shows one key too few on the left",
        "triton_kernels/attention/tiles.py",
        r"mask &= j\[None, :\] >= \(i",
        r"mask &= j[None, :] > (i",
        (OPTIONS, "each_option", "triton", "sink_and_causal_window"),
    ),
    Mutant(
        "triton options: a window shows the keys' gradients one query too few",
        "triton_kernels/attention/tiles.py",
        r"mask &= j\[:, None\] >= \(i",
        r"mask &= j[:, None] > (i",
        (OPTIONS, "each_option", "triton", "sink_and_causal_window"),
    ),
    Mutant(
        "triton options: the last key that a query sees is left out",
        "triton_kernels/attention/tiles.py",
        r"return tl\.minimum\(i \+ \(visible\.diagonal \+ visible\.right \+ 1\), visible\.k_len\)",
        r"return tl.minimum(i + (visible.diagonal + visible.right), visible.k_len)",
        (OPTIONS, "each_option", "triton"),
    ),
    # ---- scores
    Mutant(
        "triton options: ALiBi counts from the first key",
        "triton_kernels/attention/scores.py",
        r"tl\.abs\(j - i - params\.visible\.diagonal\)",
        r"tl.abs(j - i)",
        (OPTIONS, "each_option", "triton", "everything_else"),
    ),
    Mutant(
        "triton options: the derivative of softcap is left out",
        "triton_kernels/attention/scores.py",
        r"return ds \* \(1 - capped \* capped\)",
        r"return ds",
        (OPTIONS, "each_option", "triton", "everything_else"),
    ),
    Mutant(
        "triton options: a mask that heads share is read as if they did not",
        "triton_kernels/attention/__init__.py",
        r"0 if n == 1 else stride for n",
        r"stride for n",
        (OPTIONS, "masks_that_are_broadcast", "triton"),
    ),
    Mutant(
        "triton options: tanh of a small number has a wrong coefficient",
        "triton_kernels/attention/scores.py",
        r"small = small \* z \+ 0\.13332924246788025",
        r"small = small * z + 0.13032924246788025",
        (PARITY, "attention_softcap", "triton"),
    ),
    # ---- dropout
    Mutant(
        "triton options: keys take each other's words",
        "triton_kernels/attention/scores.py",
        r"tl\.join\(tl\.join\(w0, w2\), tl\.join\(w1, w3\)\)",
        r"tl.join(tl.join(w0, w1), tl.join(w2, w3))",
        (DROPOUT, "which_weights", "triton"),
    ),
    Mutant(
        "triton options: every head drops the same weights",
        "triton_kernels/attention/scores.py",
        r"zero \+ head\.to\(tl\.uint32\)",
        r"zero",
        (DROPOUT, "which_weights", "triton"),
    ),
    Mutant(
        "triton options: kept weights are not scaled up",
        "triton_kernels/attention/fwd.py",
        r"acc = acc \* params\.scores\.keep",
        r"pass",
        (OPTIONS, "each_option", "triton", "dropout"),
    ),
    # ---- the sink
    Mutant(
        "triton options: the sink is no part of the sum",
        "triton_kernels/attention/fwd.py",
        r"rescale \+ tl\.exp2\(\(s - new_max_or_0\) \* LOG2E\)",
        r"rescale",
        (OPTIONS, "each_option", "triton", "sink_and_causal_window"),
    ),
    Mutant(
        "triton options: the sink's gradient has the wrong sign",
        "triton_kernels/attention/bwd.py",
        r"-weight \* row_delta",
        r"weight * row_delta",
        (OPTIONS, "each_option", "triton", "sink_and_causal_window"),
    ),
    Mutant(
        "triton options: a row that sees one key is like any other",
        "triton_kernels/attention/bwd.py",
        r"row_delta = tl\.where\(one, NO_GRADIENT if dlse is None else 0\.0, row_delta\)",
        r"pass",
        (OPTIONS, "see_one_key", "triton", "float32", "window"),
    ),
    # ---- heads
    Mutant(
        "triton options: query heads take the wrong head of keys",
        "triton_kernels/attention/tiles.py",
        r"at\.h // params\.heads_per_kv",
        r"at.h % (params.H // params.heads_per_kv)",
        (OPTIONS, "each_option", "triton", "dropout"),
    ),
]
TRITON_VARLEN = [
    Mutant(
        "triton varlen: the keys begin where the queries do",
        "triton_kernels/attention/tiles.py",
        r"tl\.load\(cu_seq_q \+ at\.b\), tl\.load\(cu_seq_k \+ at\.b\)",
        r"tl.load(cu_seq_q + at.b), tl.load(cu_seq_q + at.b)",
        (VARLEN, "by_hand", "triton"),
    ),
    Mutant(
        "triton varlen: the diagonal of the statistics starts at the first key",
        "triton_kernels/attention/bwd.py",
        r"at, diagonal, rows = within_sequence\(at\), S - L, total_q(\s+o = )",
        r"at, rows = within_sequence(at), total_q\1",
        (VARLEN, "by_hand", "triton"),
    ),
    Mutant(
        "triton varlen: the gradient of lse is that of the first sequence",
        "triton_kernels/attention/bwd.py",
        r"tl\.load\(dlse \+ \(q_row \+ i\)",
        r"tl.load(dlse + (i)",
        (VARLEN, "by_hand", "triton"),
    ),
    Mutant(
        "triton varlen: gradients of keys go to the first sequence",
        "triton_kernels/attention/tiles.py",
        r"\.to\(tl\.int64\) \* x\.operand\.length \+ x\.operand\.first_row",
        r".to(tl.int64) * x.operand.length",
        (VARLEN, "by_hand", "triton"),
    ),
    Mutant(
        "triton varlen: how far a row sees depends on the longest sequence",
        "triton_kernels/attention/__init__.py",
        r"diagonal, unlimited = 0, MAX_PACKED_LENGTH",
        r"diagonal, unlimited = 0, L",
        (VARLEN, "by_hand", "triton"),
    ),
    Mutant(
        "triton qkv: a gradient's rows are as dense as if it stood alone",
        "triton_kernels/attention/__init__.py",
        r", row_heads=heads \+ 2 \* kv_heads\)",
        r")",
        (QKV, "attention_of_the_heads", "triton"),
    ),
]
