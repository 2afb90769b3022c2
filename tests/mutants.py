"""The faults that tests/mutate.py plants, each with the test that must notice it and what it would do to a user.

``old`` is a regular expression that matches once in all files that ``file``, a pattern, names. ``new`` may refer to its
groups. A fault that no test can notice without a GPU, because it changes no result, is in EQUIVALENT, with the reason.
"""

from dataclasses import dataclass

MEMORY, KERNELS, TRITON_TESTS = (f"tests/kernels/test_{name}.py" for name in ("memory", "kernels", "triton"))
PARITY, TRAIN = "tests/ops/test_parity.py", "tests/model/test_train.py"
OPTIONS = "tests/ops/test_attention_options.py"
VARLEN = "tests/ops/test_varlen_attn.py"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # words that the names of the tests contain, the first of them their file

    @property
    def builds_cpu_library(self) -> bool:
        return self.file.startswith(("csrc/cpu", "csrc/attention")) or self.file == "csrc/bind/*.h"


CUDA = [
    # ---- offsets of 32 bits
    Mutant(
        "cuda: a norm's row at an offset of 32 bits",
        "csrc/cuda/norm.cu",
        r"(const Row<T, E> x = lane\.load<E>\(a\.x \+) row \* a\.x_stride\);",
        r"\1 static_cast<int>(row * a.x_stride));",
        (MEMORY, "32_bits", "cuda", "rms_norm", "17"),
    ),
    Mutant(
        "cuda: a norm's gradient at an offset of 32 bits",
        "csrc/cuda/norm_bwd.cu",
        r"dy\.copy_from\(a\.dy \+ row \* a\.dy_stride",
        r"dy.copy_from(a.dy + static_cast<int>(row * a.dy_stride)",
        (MEMORY, "32_bits", "cuda", "rms_norm", "17"),
    ),
    Mutant(
        "cuda: a wide norm's gradient at an offset of 32 bits",
        "csrc/cuda/norm_bwd.cu",
        r"lane\.load<E>\(a\.dy \+ row \* a\.dy_stride\)",
        r"lane.load<E>(a.dy + static_cast<int>(row * a.dy_stride))",
        (MEMORY, "32_bits", "cuda", "rms_norm", "8200"),
    ),
    Mutant(
        "cuda: the first line of a GEMM's tile at an offset of 32 bits",
        "csrc/cuda/gemm.cuh",
        r"x\.data \+ \(line \+ l\) \* x\.stride",
        r"x.data + static_cast<int>((line + l) * x.stride)",
        (MEMORY, "32_bits", "cuda", "linear", "17", "bfloat16"),
    ),
    Mutant(
        "cuda: the further lines of a GEMM's tile at an offset of 32 bits",
        "csrc/cuda/gemm.cuh",
        r"from \+ i \* x\.stride, cols_left",
        r"from + static_cast<int>(i * x.stride), cols_left",
        (MEMORY, "32_bits", "cuda", "linear", "17", "bfloat16"),
    ),
    Mutant(
        "cuda: float32's tile at an offset of 32 bits",
        "csrc/cuda/gemm.cuh",
        r"load4\(from \+ u \* kLinesPerPass \* x\.stride, n",
        r"load4(from + u * kLinesPerPass * static_cast<int>(x.stride), n",
        (MEMORY, "32_bits", "cuda", "linear", "float32"),
    ),
    Mutant(
        "cuda: few rows at an offset of 32 bits",
        "csrc/cuda/gemm.cuh",
        r"const T\* from = x\.data \+ line \* x\.stride \+ c;",
        r"const T* from = x.data + static_cast<int>(line * x.stride) + c;",
        (MEMORY, "32_bits", "cuda", "linear", "M=3,"),
    ),
    Mutant(
        "cuda: attention's first row of a tile at an offset of 32 bits",
        "csrc/cuda/attention/tiles.cuh",
        r"int64_t\(row0 \+ first\) \* from\.row_stride \+ channel : 0",
        r"(row0 + first) * static_cast<int>(from.row_stride) + channel : 0",
        (MEMORY, "32_bits", "cuda", "attention_lse", "H=1,", "causal=1", "bfloat16"),
    ),
    Mutant(
        "cuda: attention's further rows of a tile at an offset of 32 bits",
        "csrc/cuda/attention/tiles.cuh",
        r"source \+= kStep \* from\.row_stride;",
        r"source += kStep * static_cast<int>(from.row_stride);",
        (MEMORY, "32_bits", "cuda", "attention_lse", "H=1,", "causal=1", "bfloat16"),
    ),
    Mutant(
        "cuda: a head at an offset of 32 bits",
        "csrc/cuda/attention/params.cuh",
        r"head % t\.heads \* t\.stride\[1\]",
        r"head % t.heads * static_cast<int>(t.stride[1])",
        (MEMORY, "32_bits", "cuda", "attention_lse", "H=5,", "bfloat16"),
    ),
    # ---- vectors that are not aligned
    Mutant(
        "cuda: a bias is read as vectors wherever it lies",
        "csrc/cuda/gemm.cuh",
        r" && aligned\(epilogue\.bias\)",
        r"",
        (MEMORY, "without_vectors", "cuda", "linear"),
    ),
    Mutant(
        "cuda: a norm's weight is read as vectors wherever it lies",
        "csrc/cuda/norm.cu",
        r" && can_vectorize\(a\.weight\)",
        r"",
        (MEMORY, "without_vectors", "cuda", "rms_norm"),
    ),
    Mutant(
        "cuda: a norm's gradient is read as vectors wherever it lies",
        "csrc/cuda/norm_bwd.cu",
        r" && can_vectorize\(a\.dy, a\.dy_stride\)",
        r"",
        (MEMORY, "without_vectors", "cuda", "rms_norm"),
    ),
    Mutant(
        "cuda: attention reads vectors wherever a head begins",
        "csrc/cuda/attention/params.cuh",
        r" && address % \(elements \* sizeof\(T\)\) == 0;",
        r" && address;",
        (MEMORY, "without_vectors", "cuda", "attention_lse"),
    ),
    Mutant(
        "cuda: an activation's gradient is read as vectors wherever it lies",
        "csrc/cuda/activation.cu",
        r"can_vectorize\(dy\) && ",
        r"",
        (MEMORY, "without_vectors", "cuda", "relu"),
    ),
    # ---- past an end
    Mutant(
        "cuda: an activation's tail is an element too long",
        "csrc/cuda/activation.cu",
        r"start \+ kTile<T> < n \? start \+ kTile<T> : n;",
        r"start + kTile<T> < n ? start + kTile<T> : n + 1;",
        (MEMORY, "past_the_end", "cuda", "relu"),
    ),
    Mutant(
        "cuda: a GEMM reads a row past the end of W",
        "csrc/cuda/gemm.cuh",
        r"cols_left > 0 && i < lines_left\);",
        r"cols_left > 0 && i <= lines_left);",
        (MEMORY, "past_the_end", "cuda", "linear", "bfloat16"),
    ),
    Mutant(
        "cuda: few rows read rows past the end of W",
        "csrc/cuda/gemm.cuh",
        r"min\(j \+ c, g\.N - 1\)",
        r"j + c",
        (MEMORY, "past_the_end", "cuda", "linear", "M=3,"),
    ),
    Mutant(
        "cuda: few rows read a whole vector at a row's end",
        "csrc/cuda/gemm.cuh",
        r"e < left \? to_float\(from\[e\]\) : 0\.0f;",
        r"to_float(from[e]) * (e < left);",
        (MEMORY, "past_the_end", "cuda", "linear", "M=3,"),
    ),
    Mutant(
        "cuda: a norm writes an element past its row",
        "csrc/cuda/norm.cuh",
        r"if \(column<T>\(i\) < cols\) p\[column<T>\(i\)\] = ",
        r"if (column<T>(i) <= cols) p[column<T>(i)] = ",
        (MEMORY, "past_the_end", "cuda", "rms_norm"),
    ),
    Mutant(
        "cuda: attention reads a row past the last key",
        "csrc/cuda/attention/tiles.cuh",
        r"(cp_async_16\(element<D>\(tile, row, channel\), source, row) < inside &&",
        r"\1 <= inside &&",
        (MEMORY, "past_the_end", "cuda", "attention", "bfloat16"),
    ),
    # ---- order of events
    Mutant(
        "cuda: norms' sums of two rows meet in one buffer",
        "csrc/cuda/norm_bwd.cu",
        r"shared\[parity\]",
        r"shared[0]",
        ("tests/emulator/test_emulator.py", "ahead", "rms_norm"),
    ),
    Mutant(
        "cuda: attention computes with a tile before all of it is there",
        "csrc/cuda/attention/walk.cuh",
        r"__syncthreads\(\);  // this stage has arrived, and no warp reads the other.*$",
        r"",
        (MEMORY, "past_the_end", "cuda", "attention_lse", "exact"),
    ),
    Mutant(
        "cuda: a GEMM waits for one tile too few",
        "csrc/cuda/gemm.cuh",
        r"cp_async_wait<S::kStages - 2>",
        r"cp_async_wait<S::kStages - 1>",
        (MEMORY, "past_the_end", "cuda", "linear", "exact"),
    ),
    Mutant(
        "cuda: a GEMM's epilogue starts before the tile is written",
        "csrc/cuda/gemm.cuh",
        r"__syncthreads\(\);(\n  store_tile<T, TILE)",
        r"\1",
        (MEMORY, "past_the_end", "cuda", "linear", "exact"),
    ),
    # ---- blocks
    Mutant(
        "cuda: the last group of heads is taken for a whole one",
        "csrc/cuda/attention/walk.cuh",
        r"min\(params\.tiled_heads - first_head, params\.head_group\)",
        r"params.head_group",
        (KERNELS, "groups_of_heads", "cuda"),
    ),
    Mutant(
        "cuda: sums of columns take more slices than a grid is high",
        "csrc/cuda/reduce.cuh",
        r"int64_t slice_rows = std::max\(kMinSliceRows, .*$",
        r"int64_t slice_rows = kMinSliceRows;",
        (KERNELS, "millions_of_rows", "cuda"),
    ),
    # ---- values
    Mutant(
        "cuda: float16 takes bfloat16's limit of exponents",
        "csrc/cuda/attention/params.cuh",
        r"std::is_same_v<T, f16> \? 0x1p11f",
        r"std::is_same_v<T, f16> ? 0x1p14f",
        (PARITY, "single_key", "cuda", "float16"),
    ),
    Mutant(
        "cuda: the causal mask hides the diagonal",
        "csrc/cuda/attention/walk.cuh",
        r"c - r > right \|\|",
        r"c - r >= right ||",
        (MEMORY, "past_the_end", "cuda", "attention", "exact"),
    ),
    Mutant(
        "cuda: a unit that is 0 passes its gradient on",
        "csrc/cuda/activation.cuh",
        r"return saved <= 0 \? 0\.f : d;",
        r"return saved < 0 ? 0.f : d;",
        (MEMORY, "past_the_end", "cuda", "relu", "exact"),
    ),
]

CPU = [
    Mutant(
        "cpu: an activation's tail is written as a whole vector",
        "csrc/cpu/activation.cpp",
        r"f\(load\(in \+ i, last - i\)\.\.\.\), last - i\)",
        r"f(load(in + i, last - i)...), w)",
        (MEMORY, "past_the_end", "cpp", "relu"),
    ),
    Mutant(
        "cpu: an activation's tail is read as a whole vector",
        "csrc/cpu/activation.cpp",
        r"f\(load\(in \+ i, last - i\)\.\.\.\), last - i\)",
        r"f(load(in + i)...), last - i)",
        (MEMORY, "past_the_end", "cpp", "relu"),
    ),
    Mutant(
        "cpu: a norm's last columns are written as a whole vector",
        "csrc/cpu/norm.cpp",
        r"write\(out \+ j, f\(Columns\{j, n\}\), n\);",
        r"write(out + j, f(Columns{j, n}), w);",
        (MEMORY, "past_the_end", "cpp", "rms_norm"),
    ),
    Mutant(
        "cpu: a norm's row at an offset of 32 bits",
        "csrc/cpu/norm.cpp",
        r"data \? data \+ i \* stride : nullptr",
        r"data ? data + int(i * stride) : nullptr",
        (MEMORY, "32_bits", "cpp", "rms_norm"),
    ),
    Mutant(
        "cpu: a row of a product at an offset of 32 bits",
        "csrc/cpu/gemm/pack.h",
        r"return \{data \+ i \* rs \+ j \* cs, rs, cs\};",
        r"return {data + int(i * rs) + j * cs, rs, cs};",
        (MEMORY, "32_bits", "cpp", "linear"),
    ),
    Mutant(
        "cpu: decoding reads rows past the end of W",
        "csrc/cpu/gemm/gemv.h",
        r"b \+ std::min\(j, columns - 1\) \* ldb;",
        r"b + j * ldb;",
        (MEMORY, "past_the_end", "cpp", "linear", "M=3,"),
    ),
    Mutant(
        "cpu: decoding reads a whole vector at a row's end",
        "csrc/cpu/gemm/gemv.h",
        r"return PackReader<E>\(\)\.load_k\(p, K - k \* d\); \}\);",
        r"return PackReader<E>().load_k(p); });",
        (MEMORY, "past_the_end", "cpp", "linear", "M=3,"),
    ),
    Mutant(
        "cpu: attention of few queries reads a whole vector at a key's end",
        "csrc/cpu/attention/decode.cpp",
        r"(add_products\(whole, \[&\]\(const S\* at\) \{ return load\(at), channels - whole\)",
        r"\1)",
        (MEMORY, "past_the_end", "cpp", "attention", "L=3,", "E=13"),
    ),
    Mutant(
        "cpu: results past the caches are stored as vectors wherever they lie",
        "csrc/cpu/nontemporal.h",
        r"n >= W<Acc<S>> && reinterpret_cast<uintptr_t>\(p\) % \(W<Acc<S>> \* sizeof\(S\)\) == 0",
        r"n >= W<Acc<S>>",
        ("tests/ops/test_large.py", "rows_at_any_address"),
    ),
    Mutant(
        "cpu: the chunks of a norm's rows depend on the threads",
        "csrc/cpu/norm.cpp",
        r"ceil_div\(a\.rows, 64\)\}\);",
        r"ceil_div(a.rows, threads.count())});",
        ("tests/kernels/test_threads.py", "thread_counts", "rms_norm", "float32"),
    ),
    Mutant(
        "cpu: a query sees one key too few",
        "csrc/attention/visible.h",
        r"return last < k_len \? last : k_len;",
        r"return last < k_len ? last - (last > 1) : k_len;",
        (MEMORY, "past_the_end", "cpp", "attention", "exact"),
    ),
    Mutant(
        "cpu: a norm's dsum is forgotten",
        "csrc/cpu/norm.cpp",
        r"return dsum \? d \+ at\(dsum, c\) : d;",
        r"return d;",
        (MEMORY, "past_the_end", "cpp", "add_layer_norm", "exact"),
    ),
    Mutant(
        "cpu: a norm's g is fused with its mean",
        "csrc/cpu/norm.cpp",
        r"Vec<T> g = no_fma\(at\(dy, c\) \* at\(w, c\)\);",
        r"Vec<T> g = at(dy, c) * at(w, c);",
        ("tests/ops/test_norm.py", "single_column", "cpp"),
    ),
]

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
        (OPTIONS, "which_weights", "cpp", "37-float32"),
    ),
    Mutant(
        "cpu options: dropout's words in another order",
        "csrc/cpu/dropout.h",
        r"c\[word\]\[lane\] < threshold",
        r"c[3 - word][lane] < threshold",
        (OPTIONS, "which_weights", "cpp", "37-float32"),
    ),
    Mutant(
        "cpu options: every head drops the same weights",
        "csrc/cpu/dropout.h",
        r"U32\{\} \+ uint32_t\(head\)",
        r"U32{}",
        (OPTIONS, "which_weights", "cpp", "37-float32"),
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

PYTHON = [
    Mutant(
        "python: every step has the same dropout",
        "pygpt/train.py",
        r'seed_of\("dropout", s\.seed, self\.done\)',
        r'seed_of("dropout", s.seed)',
        (TRAIN, "dropout_differs"),
    ),
    Mutant(
        "python: the gradient scaler is not resumed",
        "pygpt/train.py",
        r'self\.scaler\.load_state_dict\(metadata\["scaler"\]\)',
        r"pass",
        (TRAIN, "scaler_is_resumed"),
    ),
    Mutant(
        "python: bfloat16 is trained as float16",
        "pygpt/train.py",
        r'"bfloat16": torch\.bfloat16',
        r'"bfloat16": torch.float16',
        (TRAIN, "16_bits"),
    ),
    Mutant(
        "python: bfloat16's gradients are scaled too",
        "pygpt/train.py",
        r'enabled=s\.dtype == "float16"',
        r'enabled=s.dtype in ("float16", "bfloat16")',
        (TRAIN, "16_bits"),
    ),
    Mutant(
        "python: AdamW decays vectors too",
        "pygpt/train.py",
        r'\{"params": vectors, "weight_decay": 0\.0\}',
        r'{"params": vectors, "weight_decay": s.weight_decay}',
        (TRAIN, "plain_training_step"),
    ),
    Mutant(
        "python: evaluation keeps dropout on",
        "pygpt/train.py",
        r"self\.model\.eval\(\)",
        r"self.model.train()",
        (TRAIN, "evaluation_changes_nothing"),
    ),
    Mutant(
        "python: gradients are not zeroed after a step",
        "pygpt/train.py",
        r"self\.optimizer\.zero_grad\(\)",
        r"pass",
        (TRAIN, "plain_training_step"),
    ),
    Mutant(
        "python: the reference forgets to centre a norm's gradient",
        "pygpt/ops/norm.py",
        r"return \(dx - g\.mean\(-1, keepdim=True\) if centre else dx\)",
        r"return (dx)",
        ("tests/ops/test_reference.py", "explicit_formulas", "layer_norm"),
    ),
    Mutant(
        "python: a choice of backend outlives its block",
        "pygpt/dispatch.py",
        r"state\.chosen, state\.cache = previous",
        r"pass",
        ("tests/dispatch/test_backend.py", "choice_nests"),
    ),
]

TRITON = [
    Mutant(
        "triton: an activation's tail is written past its end",
        "triton_kernels/activation.py",
        r"(tl\.store\(y \+ offset, to_storage\(out, y\.dtype\.element_ty\), offset) < n\)",
        r"\1 < n + 1)",
        (MEMORY, "past_the_end", "triton", "relu"),
    ),
    Mutant(
        "triton: a norm's row at an offset of 32 bits",
        "triton_kernels/norm.py",
        r"row = tl\.program_id\(0\)\.to\(tl\.int64\) \* ROWS",
        r"row = tl.program_id(0) * ROWS",
        (TRITON_TESTS, "norms_of_rows_that_are_far", "True"),
    ),
    Mutant(
        "triton: a unit that is 0 passes its gradient on",
        "triton_kernels/activation.py",
        r"tl\.where\(saved <= 0, 0\.0, d\)",
        r"tl.where(saved < 0, 0.0, d)",
        (MEMORY, "past_the_end", "triton", "relu-M"),
    ),
    Mutant(
        "triton: the causal mask hides the diagonal",
        "triton_kernels/attention/tiles.py",
        r"j\[None, :\] <= last - col",
        r"j[None, :] < last - col",
        (TRITON_TESTS, "vanishes_in_float32"),
    ),
    Mutant(
        "triton: a product's last rows of tiles are taken for a whole group",
        "triton_kernels/mlp.py",
        r"height = tl\.minimum\(tiles_m - first, GROUP\)",
        r"height = GROUP",
        (TRITON_TESTS, "scheduled_in_groups_of_rows"),
    ),
    Mutant(
        "triton: attention's rows at an offset of 32 bits",
        "triton_kernels/attention/tiles.py",
        r"row \+ tl\.arange\(0, x\.TILE_ROWS\)\.to\(tl\.int64\), tl\.arange\(0, COLS\)",
        r"row + tl.arange(0, x.TILE_ROWS), tl.arange(0, COLS)",
        (TRITON_TESTS, "attention_of_what_is_far_apart", "sm80"),
    ),
    Mutant(
        "triton: the last group of heads is taken for a whole one",
        "triton_kernels/attention/tiles.py",
        r"tl\.minimum\(heads - first, group\)",
        r"group",
        (TRITON_TESTS, "scheduled_in_groups_of_heads"),
    ),
    Mutant(
        "triton: a group has more heads than there are",
        "triton_kernels/attention/__init__.py",
        r"max\(1, min\(B \* self\.kv_heads, L2_BYTES // (.*)\)\)$",
        r"max(1, L2_BYTES // \1)",
        (TRITON_TESTS, "groups_of_heads_are_no_larger"),
    ),
]

# Faults that change no result without a GPU: why.
EQUIVALENT = {
    Mutant(
        "cuda: a row of attention's output at an offset of 32 bits",
        "csrc/cuda/attention/tiles.cuh",
        r"to\.data \+ int64_t\(row\) \* to\.row_stride",
        r"to.data + row * static_cast<int>(to.row_stride)",
        (),
    ): "Outputs are dense, so that rows are at most heads * 256 elements apart: only an output of 2^31 elements would "
    "show the fault, which takes the emulator days.",
    Mutant(
        "cuda: a norm's g is fused with its mean",
        "csrc/cuda/norm_bwd.cu",
        r"__fmul_rn\(dy\[i\], w\[i\]\)",
        r"dy[i] * w[i]",
        ("tests/ops/test_norm.py", "single_column", "cuda"),
    ): "nvcc may fuse g with each sum that it goes into, and only a GPU shows that. GCC, the emulator's compiler, "
    "fuses a product only if it goes into nothing but sums, and g is also multiplied by xhat.",
}

MUTANTS = [*CUDA, *CPU, *CPU_OPTIONS, *CPU_VARLEN, *PYTHON, *TRITON]
