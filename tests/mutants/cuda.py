"""Faults in the CUDA kernels, but for those in what attention's calls may ask for."""

from .mutant import KERNELS, MEMORY, PARITY, POISON, Mutant

CUDA = [
    # ---- offsets of 32 bits
    Mutant(
        "cuda: a norm's row at an offset of 32 bits",
        "csrc/cuda/norm.cu",
        r"(const Row<T, E> x = lane\.load<E, T>\(a\.x \+) row \* a\.x_stride\);",
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
        r"lane\.load<E, T>\(a\.dy \+ row \* a\.dy_stride\)",
        r"lane.load<E, T>(a.dy + static_cast<int>(row * a.dy_stride))",
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
        r"can_vectorize\(static_cast<const T\*>\(a\.weight\)\) && ",
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
        "cuda: an activation's tail is written into a guard band",
        "csrc/cuda/activation.cu",
        r"start \+ kTile<T> < n \? start \+ kTile<T> : n;",
        r"start + kTile<T> < n ? start + kTile<T> : n + 1;",
        (POISON, "guard_band", "cuda", "float32"),
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
        r"if \(column<Lead>\(i\) < cols\) p\[column<Lead>\(i\)\] = ",
        r"if (column<Lead>(i) <= cols) p[column<Lead>(i)] = ",
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
        "cuda: gate and value are swapped",
        "csrc/cuda/epilogue.cuh",
        r"c = e\.gate \? h \* c : h;",
        r"c = e.gate ? x * activate(e.activation, c) : h;",
        (PARITY, "shapes", "cuda", "mlp", "M=33", "swiglu", "float32"),
    ),
    Mutant(
        "cuda: a gate's derivative is taken at the value",
        "csrc/cuda/epilogue.cuh",
        r"const float4 s = (load4\(.*\));\n(.*to_value\) \{)",
        r"float4 s = \1;\n\2\n      s = load4(e.saved + pre_offset + e.to_value, n, e.vectorized);",
        (PARITY, "shapes", "cuda", "mlp", "M=33", "swiglu", "float32"),
    ),
    Mutant(
        "cuda: the values' half of dpre is not written",
        "csrc/cuda/epilogue.cuh",
        r"store4\(e\.out \+ offset \+ e\.to_value, .*$",
        r"",
        (PARITY, "shapes", "cuda", "mlp", "M=33", "swiglu", "float32"),
    ),
    Mutant(
        "cuda: a unit that is 0 passes its gradient on",
        "csrc/cuda/activation.cuh",
        r"return saved <= 0 \? 0\.f : d;",
        r"return saved < 0 ? 0.f : d;",
        (MEMORY, "past_the_end", "cuda", "relu", "exact"),
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
