"""Faults in the options and packed sequences of attention in CUDA."""

from .mutant import DROPOUT, EDGES, OPTIONS, VARLEN, Mutant

CUDA_OPTIONS = [
    # ---- which keys a query sees
    Mutant(
        "cuda options: a window shows one key too few on the left",
        "csrc/cuda/attention/walk.cuh",
        r"r - c > left\)",
        r"r - c >= left)",
        (OPTIONS, "each_option", "cuda", "sink_and_causal_window"),
    ),
    Mutant(
        "cuda options: a window shows one key too few on the right",
        "csrc/cuda/attention/walk.cuh",
        r"c - r > right",
        r"c - r >= right",
        (OPTIONS, "each_option", "cuda", "window_right"),
    ),
    Mutant(
        "cuda options: the first tile of a boolean mask is not looked at",
        "csrc/cuda/attention/scores.cuh",
        r"for \(int j = key / kMaskTile; j",
        r"for (int j = key / kMaskTile + 1; j",
        (OPTIONS, "whole_tiles", "cuda", "False"),
    ),
    # ---- scores
    Mutant(
        "cuda options: ALiBi counts keys after a query's own as negative",
        "csrc/cuda/attention/scores.cuh",
        r"return fabsf\((origin .*)\);",
        r"return (\1);",
        (OPTIONS, "each_option", "cuda", "alibi"),
    ),
    Mutant(
        "cuda options: a transposed tile of ALiBi's distances is mirrored",
        "csrc/cuda/attention/scores.cuh",
        r"transposed \? -right : right\) - params\.visible\.diagonal",
        r"right) - params.visible.diagonal",
        (OPTIONS, "each_option", "cuda", "alibi"),
    ),
    Mutant(
        "cuda options: the derivative of softcap is left out",
        "csrc/cuda/attention/scores.cuh",
        r"derivative\(m, n, i, fmaf\(-t, t, 1\.0f\)\);",
        r"derivative(m, n, i, 1.0f);",
        (OPTIONS, "each_option", "cuda", "everything_else"),
    ),
    Mutant(
        "cuda options: rows of a mask are read as its columns in backward",
        "csrc/cuda/attention/scores.cuh",
        r"row_stride = stride\[transposed \? 3 : 2\]",
        r"row_stride = stride[2]",
        (OPTIONS, "masks_that_are_broadcast", "cuda"),
    ),
    # ---- dropout
    Mutant(
        "cuda options: every batch entry drops the same weights",
        "csrc/cuda/attention/scores.cuh",
        r"\(lower \? 8 : 0\) \+ g, head\);",
        r"(lower ? 8 : 0) + g, head % params.q.heads);",
        (DROPOUT, "which_weights", "cuda"),
    ),
    Mutant(
        "cuda options: neighbouring lanes exchange the wrong words",
        "csrc/cuda/attention/scores.cuh",
        r"w\[0\] = lower \? first : drawn\.word\[0\], w\[1\] = lower \? second : drawn\.word\[1\];",
        r"w[0] = lower ? second : drawn.word[0], w[1] = lower ? first : drawn.word[1];",
        (DROPOUT, "which_weights", "cuda"),
    ),
    Mutant(
        "cuda options: dk and dv drop other weights than forward",
        "csrc/cuda/attention/scores.cuh",
        r"transpose_step<1>\(w, g\), transpose_step<2>\(w, g\);",
        r"transpose_step<1>(w, g);",
        (OPTIONS, "each_option", "cuda", "dropout"),
    ),
    Mutant(
        "cuda options: kept weights are not scaled up",
        "csrc/cuda/attention/fwd.cuh",
        r"general \? result\.factor \* params\.scores\.keep : result\.factor;",
        r"result.factor;",
        (OPTIONS, "each_option", "cuda", "dropout"),
    ),
    # ---- the sink
    Mutant(
        "cuda options: all heads have the first one's sink",
        "csrc/cuda/attention/fwd.cuh",
        r"params\.sink\[coord\.head % params\.q\.heads\]",
        r"params.sink[0]",
        (OPTIONS, "each_option", "cuda", "sink_and_causal_window"),
    ),
    Mutant(
        "cuda options: a row that sees one key and a sink is taken for one of one key",
        "csrc/cuda/attention/bwd.cuh",
        r"return !params\.sink && params\.visible\.sees_one_key\(row\);",
        r"return params.visible.sees_one_key(row);",
        (OPTIONS, "each_option", "cuda", "sink_and_causal_window"),
    ),
    Mutant(
        "cuda options: a row that sees one key is like any other",
        "csrc/cuda/attention/bwd.cuh",
        r"return !params\.sink && keys <= 1;",
        r"return false;",
        (OPTIONS, "see_one_key", "cuda", "float32", "window"),
    ),
    Mutant(
        "cuda options: the sink's gradient is that of the first batch entry",
        "csrc/cuda/attention/bias.cu",
        r"for \(int head = blockIdx\.x; head < params\.total_heads; head \+= params\.q\.heads\) \{",
        r"for (int head = blockIdx.x; head < params.q.heads; head += params.q.heads) {",
        (OPTIONS, "see_no_key", "cuda", "True"),
    ),
    # ---- gradients of masks and slopes
    Mutant(
        "cuda options: the gradient of a mask that heads share is the first one's",
        "csrc/cuda/attention/bias.cu",
        r"bias\.heads == 1 \? heads : mask_head \+ 1;",
        r"mask_head + 1;",
        (OPTIONS, "masks_that_are_broadcast", "cuda"),
    ),
    Mutant(
        "cuda options: the gradient of slopes takes keys that no query sees",
        "csrc/cuda/attention/bias.cu",
        r"if \(row \+ r >= visible\.q_len \|\| !visible\.sees\(row \+ r, key \+ column\)\) return;",
        r"",
        (EDGES, "infinite_key", "cuda"),
    ),
    # ---- heads
    Mutant(
        "cuda options: query heads take the wrong head of keys",
        "csrc/cuda/attention/fwd.cuh",
        r"key_head = coord\.head / params\.group;",
        r"key_head = coord.head / params.q.heads * params.k.heads + coord.head % params.k.heads;",
        (OPTIONS, "each_option", "cuda", "dropout"),
    ),
    Mutant(
        "cuda options: the keys' gradients are those of one query head of the group",
        "csrc/cuda/attention/bwd.cuh",
        r"q\.data \+= member \* params\.q\.stride\[1\], dout",
        r"dout",
        (OPTIONS, "each_option", "cuda", "dropout"),
    ),
]
CUDA_VARLEN = [
    Mutant(
        "cuda varlen: values begin where the first sequence does",
        "csrc/cuda/attention/params.cuh",
        r"shift\(params\.k, at\.k_row\), shift\(params\.v, at\.k_row\),",
        r"shift(params.k, at.k_row),",
        (VARLEN, "by_hand", "cuda"),
    ),
    Mutant(
        "cuda varlen: the diagonal starts at the first key",
        "csrc/cuda/attention/params.cuh",
        r"params\.visible\.diagonal = params\.visible\.k_len - params\.visible\.q_len;",
        r"params.visible.diagonal = 0;",
        (VARLEN, "by_hand", "cuda"),
    ),
    Mutant(
        "cuda varlen: the gradient of lse is that of the first sequence",
        "csrc/cuda/attention/params.cuh",
        r"if \(params\.dlse\) params\.dlse \+= at\.q_row;",
        r"",
        (VARLEN, "by_hand", "cuda"),
    ),
    Mutant(
        "cuda varlen: the workspaces of two sequences overlap",
        "csrc/cuda/attention/params.cuh",
        r"\(\(at\.q_row \+ int64_t\(b\) \* kRowPadding\) & -kRowPadding\)",
        r"(at.q_row & -kRowPadding)",
        (VARLEN, "by_hand", "cuda"),
    ),
    Mutant(
        "cuda varlen: the tiles of a longer sequence are computed of a shorter one too",
        "csrc/cuda/attention/fwd.cuh",
        r"if \(kind == Kind::packed && row0 < 0\) return;",
        r"",
        (VARLEN, "same_bits_alone", "cuda"),
    ),
    Mutant(
        "cuda varlen: how far a row sees depends on the longest sequence",
        "csrc/cuda/attention/params.cuh",
        r"const bool packed = a\.sequences\.cu_seq_q;",
        r"const bool packed = false;",
        (VARLEN, "longest_sequence", "cuda"),
    ),
]
