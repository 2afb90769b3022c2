"""Faults in the options and packed sequences of attention on a CPU."""

from .mutant import DROPOUT, OPTIONS, VARLEN, Mutant

# Attention's options. "1x4x1x21x35" has tiles, "2x4x2x6x4" two heads of keys, "2x4x4x4x6" is decoding.
TILES, GROUPS, DECODING = "1x4x1x21x35", "2x4x2x6x4", "2x4x4x4x6"
CPU_OPTIONS = [
    # ---- which keys a query sees
    Mutant(
        "cpu options: a window shows one key too many on the left",
        "csrc/attention/visible.h",
        r"const Int first = i \+ diagonal - left;",
        r"const Int first = i + diagonal - left - 1;",
        (OPTIONS, "each_option", "cpp", "window_left", TILES),
    ),
    Mutant(
        "cpu options: a window shows one key too many on the right",
        "csrc/attention/visible.h",
        r"const Int last = i \+ diagonal \+ right \+ 1;",
        r"const Int last = i + diagonal + right + 2;",
        (OPTIONS, "each_option", "cpp", "window_right", TILES),
    ),
    Mutant(
        "cpu options: a tile hides a window's first key",
        "csrc/cpu/attention/tile.h",
        r"x\.visible\.begin\(row0 \+ r\) - first, 0, NR",
        r"x.visible.begin(row0 + r) + 1 - first, 0, NR",
        (OPTIONS, "each_option", "cpp", "window-", TILES),
    ),
    Mutant(
        "cpu options: a tile shows the key behind a window's last",
        "csrc/cpu/attention/tile.h",
        r"x\.visible\.end\(row0 \+ r\) - first, 0, NR",
        r"x.visible.end(row0 + r) + 1 - first, 0, NR",
        (OPTIONS, "each_option", "cpp", "window-", TILES),
    ),
    Mutant(
        "cpu options: the queries that see a key are those of a window turned round",
        "csrc/attention/visible.h",
        r"-diagonal, right, left\}",
        r"-diagonal, left, right}",
        (OPTIONS, "each_option", "cpp", "window_left", TILES),
    ),
    Mutant(
        "cpu options: the queries that see a key are those of another diagonal",
        "csrc/attention/visible.h",
        r"\{k_len, q_len, -diagonal,",
        r"{k_len, q_len, diagonal,",
        (OPTIONS, "each_option", "cpp", "lower_right-", TILES),
    ),
    Mutant(
        "cpu options: a block is skipped if its first row is masked",
        "csrc/cpu/attention/tile.h",
        r"rows = s\.mask_stride\[2\] \? std::min\(rows, sequence\.q_len - row0\) : 1;",
        r"rows = 1;",
        (OPTIONS, "see_no_key", "cpp", "40", "bool_mask"),
    ),
    # ---- scores and weights
    Mutant(
        "cpu options: ALiBi's distance forgets the diagonal",
        "csrc/cpu/attention/tile.h",
        r"T\(j - i - visible\.diagonal\)",
        r"T(j - i)",
        (OPTIONS, "each_option", "cpp", "lower_right,_window,_alibi", TILES),
    ),
    Mutant(
        "cpu options: dropout's rows are counted in each block",
        "csrc/cpu/dropout.h",
        r"row\[lane\] = uint32_t\(row0 \+ r\)",
        r"row[lane] = uint32_t(r)",
        (DROPOUT, "which_weights", "cpp", "37-float32"),
    ),
    Mutant(
        "cpu options: dropout's words in another order",
        "csrc/cpu/dropout.h",
        r"c\[word\]\[lane\] < threshold",
        r"c[3 - word][lane] < threshold",
        (DROPOUT, "which_weights", "cpp", "37-float32"),
    ),
    Mutant(
        "cpu options: every head drops the same weights",
        "csrc/cpu/dropout.h",
        r"U32\{\} \+ uint32_t\(head\)",
        r"U32{}",
        (DROPOUT, "which_weights", "cpp", "37-float32"),
    ),
    Mutant(
        "cpu options: decoding's dropout starts at the wrong word",
        "csrc/cpu/attention/decode.cpp",
        r"return factors \+ j % 4;",
        r"return factors;",
        (OPTIONS, "each_option", "cpp", "everything_else", DECODING),
    ),
    Mutant(
        "cpu options: backward drops nothing from dP",
        "csrc/cpu/attention/bwd.cpp",
        r"e\[n\] \* \(f \* dp\.c\[r \+ n\]\[w\] - of\.delta\[r \+ n\]\)",
        r"e[n] * (dp.c[r + n][w] - of.delta[r + n])",
        (OPTIONS, "each_option", "cpp", "dropout-", TILES),
    ),
    Mutant(
        "cpu options: the derivative of softcap is left out",
        "csrc/cpu/attention/bwd.cpp",
        r"scores_g\[n\] = o\.softcap > 0 \? g\[n\] \* \(1 - t \* t\) : g\[n\];",
        r"scores_g[n] = g[n];",
        (OPTIONS, "each_option", "cpp", "softcap-", TILES),
    ),
    Mutant(
        "cpu options: the derivative of softcap is left out of decoding",
        "csrc/cpu/attention/decode.cpp",
        r"if \(general && a\.scores\.softcap > 0\) g \*= .*$",
        r"",
        (OPTIONS, "each_option", "cpp", "softcap-", DECODING),
    ),
    Mutant(
        "cpu options: the sink is no part of the sum",
        "csrc/cpu/attention/tile.h",
        r"if \(x\.a\.scores\.sink && x\.sink\(\) != -kInf<T>\)",
        r"if (false)",
        (OPTIONS, "each_option", "cpp", "sink-", TILES),
    ),
    Mutant(
        "cpu options: a row that sees one key and a sink is taken for one of one key",
        "csrc/cpu/attention/tile.h",
        r"return x\.visible\.sees_one_key\(i\) && !x\.a\.scores\.sink;",
        r"return x.visible.sees_one_key(i);",
        (OPTIONS, "each_option", "cpp", "sink_and_causal_window", TILES),
    ),
    Mutant(
        "cpu options: a row that sees one key is like any other",
        "csrc/cpu/attention/tile.h",
        r"return x\.visible\.sees_one_key\(i\) && !x\.a\.scores\.sink;",
        r"return false;",
        (OPTIONS, "see_one_key", "cpp", "window", "float32"),
    ),
    Mutant(
        "cpu options: the sink's gradient forgets the first query",
        "csrc/cpu/attention/bwd.cpp",
        r"(total -= double\(std::exp\(x\.sink\(\) - lse\) \* delta_of\(x, i\)\));",
        r"\1 * (i > 0);",
        (OPTIONS, "each_option", "cpp", "sink-", TILES),
    ),
    # ---- heads
    Mutant(
        "cpu options: query heads take the wrong head of keys",
        "csrc/cpu/attention/tile.h",
        r"head<S>\(t, b, h / a\.group\(\), sequence\.k_row\)",
        r"head<S>(t, b, h % a.kv_heads, sequence.k_row)",
        (OPTIONS, "each_option", "cpp", "sink-", GROUPS),
    ),
    Mutant(
        "cpu options: decoding takes the wrong query heads",
        "csrc/cpu/attention/decode.cpp",
        r"h0 = task / splits % a\.kv_heads \* group;",
        r"h0 = task / splits % a.kv_heads;",
        (OPTIONS, "keys_are_split", "3-2240"),
    ),
    # ---- the gradient of a mask
    Mutant(
        "cpu options: the gradient of a mask that heads share is one head's",
        "csrc/cpu/attention/bwd.cpp",
        r"each\(stride\[1\], h0, a\.heads, 1",
        r"each(true, h0, a.heads, 1",
        (OPTIONS, "masks_that_are_broadcast", "cpp", "0100-True"),
    ),
    Mutant(
        "cpu options: the gradient of a mask is added up head by head, then batch entry by batch entry",
        "csrc/cpu/attention/bwd.cpp",
        r"(each\(stride\[0\], b0, .*)(\s+)(each\(stride\[1\], h0, .*)$",
        r"\3\2\1",
        (OPTIONS, "masks_gradient_is_added_up", "cpp", "float32"),
    ),
    Mutant(
        "cpu options: the rows of a mask's gradient lie too close",
        "csrc/cpu/attention/bwd.cpp",
        r"store<M>\(to \+ r \* stride\[2\] \+ c",
        r"store<M>(to + r * columns + c",
        (OPTIONS, "several_tiles", "cpp", "HLS"),
    ),
    # ---- decoding
    Mutant(
        "cpu options: decoding merges the sums of two splits as if their maxima were equal",
        "csrc/cpu/attention/decode.cpp",
        r"from\[width \+ 1\] \* theirs;",
        r"from[width + 1];",
        (OPTIONS, "keys_are_split", "3-2240"),
    ),
    Mutant(
        "cpu options: the splits of a sequence's keys depend on the batch",
        "csrc/cpu/attention/decode.cpp",
        r"const int64_t chunk = split_keys\(k_len\),",
        r"const int64_t chunk = split_keys(k_len) * std::min<int64_t>(a.batch, 2),",
        (OPTIONS, "alone_and_in_a_batch", "cpp", "1-mask_of_keys"),
    ),
]

CPU_VARLEN = [
    Mutant(
        "cpu varlen: the keys begin where the queries do",
        "csrc/attention/sequence.h",
        r"k = cu_seq_k\[b\];",
        r"k = q;",
        (VARLEN, "by_hand", "cpp"),
    ),
    Mutant(
        "cpu varlen: seqused_k is not read",
        "csrc/attention/sequence.h",
        r"seqused_k \? seqused_k\[b\] : ",
        r"",
        (VARLEN, "by_hand", "cpp", "used"),
    ),
    Mutant(
        "cpu varlen: the diagonal starts at the first key",
        "csrc/bind/varlen_attn.h",
        r"packing\.right, true\}",
        r"packing.right, false}",
        (VARLEN, "by_hand", "cpp"),
    ),
    Mutant(
        "cpu varlen: a short sequence beside a long one is left out",
        "csrc/cpu/attention/tile.h",
        r"if \(all_decode \|\| .*\) decode\(a\);",
        r"if (all_decode) decode(a);",
        (VARLEN, "by_hand", "cpp"),
    ),
    Mutant(
        "cpu varlen: the splits of a sequence follow the longest",
        "csrc/cpu/attention/decode.cpp",
        r"const int64_t chunk = split_keys\(k_len\),",
        r"const int64_t chunk = split_keys(a.sequences.k_len),",
        (VARLEN, "same_bits_alone", "cpp"),
    ),
    Mutant(
        "cpu varlen: rows of no sequence keep what was in memory",
        "csrc/bind/varlen_attn.h",
        r"  zero\(first_row\[a\.batch\], t\.size\(0\)\);",
        r"",
        (VARLEN, "by_hand", "cpp"),
    ),
    Mutant(
        "cpu varlen: keys from seqused_k on keep what was in memory",
        "csrc/bind/varlen_attn.h",
        r"b < a\.batch; b\+\+\) zero\(first_row\[b\] \+ s\.seqused_k\[b\], first_row\[b \+ 1\]\);",
        r"b < a.batch; b++) zero(0, 0);",
        (VARLEN, "by_hand", "cpp", "used"),
    ),
    Mutant(
        "cpu varlen: a falling cu_seq is taken",
        "csrc/bind/varlen_attn.h",
        r"valid = valid && first_row\[b\] <= first_row\[b \+ 1\];",
        r"",
        (VARLEN, "rows_are_checked", "cpp"),
    ),
]
