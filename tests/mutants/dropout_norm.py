"""Faults in the norms of a sum with dropout, and in the offset of a weight, on every backend."""

from .mutant import Mutant

OWN = "tests/ops/test_dropout_norm.py"
CPU, TRITON = "csrc/cpu/norm.cpp", "triton_kernels/norm.py"
CUDA, CUDA_BWD = "csrc/cuda/norm.cuh", "csrc/cuda/norm_bwd.cu"

DROPOUT_NORM = [
    # ---- C++
    Mutant(
        "cpu: dropout of a row takes the next row's bits",
        "csrc/cpu/dropout.h",
        r"U32\{\} \+ uint32_t\(row\), U32\{\}, U32\{\}",
        r"U32{} + uint32_t(row + 1), U32{}, U32{}",
        (OWN, "which_elements", "cpp"),
    ),
    Mutant(
        "cpu: dropout of a row interleaves the words of two counters",
        "csrc/cpu/dropout.h",
        r"shuffle<float>\(kept\[w\], kept\[w \+ 2\], lanes, Interleave<kLanes, 0>\(\)\)",
        r"shuffle<float>(kept[w], kept[w ^ 1], lanes, Interleave<kLanes, 0>())",
        (OWN, "which_elements", "cpp"),
    ),
    Mutant(
        "cpu: a norm's gradient is not dropped",
        CPU,
        r"if \(dx && row\.factors\)",
        r"if (dx && row.factors && cols < 0)",
        (OWN, "which_elements", "cpp"),
    ),
    Mutant(
        "cpu: the residual's gradient is dropped, too",
        CPU,
        r"row\.dresidual, gradient\);",
        r"row.dresidual, [&](Columns c) { return row.factors ? gradient(c) * at(row.factors, c) : gradient(c); });",
        (OWN, "which_elements", "cpp"),
    ),
    Mutant(
        "cpu: a weight's offset is left out of dx",
        CPU,
        r"(dresidual\(a\.dresidual, a\.cols\);\s*const T\* w = .*), a\.weight_offset\);",
        r"\1);",
        (OWN, "offset_is_part", "cpp"),
    ),
    Mutant(
        "cpu: float32 gradients of parameters are stored in 16 bits",
        CPU,
        r"if \(General && sizeof\(S\) == 2 && a\.parameter_dtype == DType::f32\) reduce_to\(T\{\}\);",
        r"if (false) reduce_to(T{});",
        (OWN, "float32_beside", "cpp"),
    ),
    Mutant(
        "cpu: bf16 beside float is in the order of its halves",
        "csrc/cpu/simd.h",
        r"struct bf16_in_order : bf16 \{\};",
        r"using bf16_in_order = bf16;",
        (OWN, "float32_beside", "cpp", "bfloat16"),
    ),
    Mutant(
        "cpu: a NaN of a float32 is rounded to bfloat16 as a number",
        CPU,
        r"\[&\]\(Columns c\) \{ return canonical<S>\(f\(c\)\); \}",
        r"f",
        (OWN, "every_nan", "cpp", "bfloat16"),
    ),
    Mutant(
        "python: the input's dtype stands for that of no weight",
        "pygpt/dispatch.py",
        r"return \[\*args\[:leading\],",
        r"return [*(args[0] if a is None else a for a in args[:leading]),",
        (OWN, "which_dtypes"),
    ),
    Mutant(
        "bind: without dropout, the one gradient is given as dx",
        "csrc/bind/norm.h",
        r"if \(as_dx\) std::swap\(dx, dresidual\);",
        r"",
        (OWN, "without_dropout", "cpp"),
    ),
    # ---- Triton
    Mutant(
        "triton: dropout of a norm takes the next row's bits",
        TRITON,
        r"zero \+ row\.to\(tl\.uint32\)\[:, None\]",
        r"zero + (row + 1).to(tl.uint32)[:, None]",
        (OWN, "which_elements", "triton"),
    ),
    Mutant(
        "triton: a norm's gradient is not dropped",
        TRITON,
        r"to_storage\(d \* factors, dx",
        r"to_storage(d, dx",
        (OWN, "which_elements", "triton"),
    ),
    Mutant(
        "triton: the residual's gradient is dropped, too",
        TRITON,
        r"tl\.store\(dresidual \+ at, to_storage\(d,",
        r"tl.store(dresidual + at, to_storage(d * factors,",
        (OWN, "which_elements", "triton"),
    ),
    Mutant(
        "triton: a weight's offset is left out of dx",
        TRITON,
        r"w = _load_weight\(weight, offset, col, col < N\)\[None, :\]",
        r"w = _load_weight(weight, None, col, col < N)[None, :]",
        (OWN, "offset_is_part", "triton"),
    ),
    # ---- CUDA
    Mutant(
        "cuda: dropout of a norm takes the next row's bits",
        CUDA,
        r"random_words\(\*seed, group, static_cast<uint32_t>\(row\), 0\)",
        r"random_words(*seed, group, static_cast<uint32_t>(row + 1), 0)",
        (OWN, "which_elements", "cuda"),
    ),
    Mutant(
        "cuda: an element of an unaligned row takes its neighbour's word",
        CUDA,
        r"const bool odd = col & 1;",
        r"const bool odd = ~col & 1;",
        (OWN, "which_elements", "cuda"),
    ),
    Mutant(
        "cuda: a norm's gradient is not dropped",
        CUDA_BWD,
        r"if \(a\.dx && a\.general\.seed\) a\.general\.template drop<T>\(lane, row, c \* V, g\);",
        r"",
        (OWN, "which_elements", "cuda"),
    ),
    Mutant(
        "cuda: the residual's gradient is dropped, too",
        CUDA_BWD,
        r"(current\.x\.set\(c, g\);)\s*(if \(a\.dx && a\.general\.seed\)[^;]*;)",
        r"\2 \1",
        (OWN, "which_elements", "cuda"),
    ),
    Mutant(
        "cuda: a weight's offset is left out of dx",
        CUDA_BWD,
        r"weight\.element\(i\) = w \+ a\.general\.weight_offset;",
        r"weight.element(i) = w;",
        (OWN, "offset_is_part", "cuda"),
    ),
    # ---- Python
    Mutant(
        "python: a gradient that comes through the sum alone is not dropped",
        "pygpt/ops/dropout_norm.py",
        r"_dropped\(d, seed, ctx\.dropout_p\)\.to",
        r"acc(d).to",
        (OWN, "each_result_alone", "cpp"),
    ),
]
