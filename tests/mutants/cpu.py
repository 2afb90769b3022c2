"""Faults in the CPU kernels, but for those in what attention's calls may ask for."""

from .mutant import MEMORY, PARITY, POISON, THREADS, Mutant

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
    *(
        Mutant(
            f"cpu: an activation's tail is written into a guard band, {front}",
            "csrc/cpu/activation.cpp",
            r"f\(load\(in \+ i, last - i\)\.\.\.\), last - i\)",
            r"f(load(in + i, last - i)...), w)",
            (POISON, "guard_band", front, "float32"),
        )
        for front in ("fastcall", "dispatcher")
    ),
    Mutant(
        "cpu: a packed operand needs more scratch memory than is asked for",
        "csrc/cpu/gemm/gemm.h",
        r"(Region::packed_b, panels \* NR \* packs)(\);\n    auto pack)",
        r"\1 / 2\2",
        (POISON, "guard_band", "fastcall", "float32"),
    ),
    Mutant(
        "cpu: gate and value are swapped",
        "csrc/cpu/mlp.cpp",
        r"(activate<Activation::silu, S>)\(g\) : (activate<Activation::gelu, S>)\(g\);(\n.*)h \* c",
        r"\1(c) : \2(c);\3h * g",
        (PARITY, "shapes", "cpp", "mlp", "M=33", "swiglu", "float32"),
    ),
    Mutant(
        "cpu: act(gate) is rounded before it is multiplied",
        "csrc/cpu/mlp.cpp",
        r"write\(hidden \+ i \* H \+ j, h \* c, n\);",
        r"S h16[W<Acc<S>>]; store(h16, h); write(hidden + i * H + j, load(h16) * c, n);",
        (PARITY, "rounded_once", "cpp"),
    ),
    Mutant(
        "cpu: a gate's derivative is taken at the value",
        "csrc/cpu/mlp.cpp",
        r"backpropagate<Activation::silu, S>\(dv, g\)",
        r"backpropagate<Activation::silu, S>(dv, load(pre + at + H, n))",
        (PARITY, "shapes", "cpp", "mlp", "M=33", "swiglu", "float32"),
    ),
    Mutant(
        "cpu: the values' half of dpre is not written",
        "csrc/cpu/mlp.cpp",
        r"write\(out \+ at \+ H, d \* activate<Activation::silu.*\);",
        r"",
        (PARITY, "shapes", "cpp", "mlp", "M=33", "swiglu", "float32"),
    ),
    Mutant(
        "cpu: a norm's last columns are written as a whole vector",
        "csrc/cpu/rows.h",
        r"write\(out \+ j, f\(Columns\{j, n\}\), n\);",
        r"write(out + j, f(Columns{j, n}), w);",
        (MEMORY, "past_the_end", "cpp", "rms_norm"),
    ),
    Mutant(
        "cpu: a norm's row at an offset of 32 bits",
        "csrc/cpu/rows.h",
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
        (THREADS, "thread_counts", "rms_norm", "float32"),
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
        "bind: add_rms_norm's ds is forgotten",
        "csrc/bind/*.h",
        r"a, \{dy, ds, s, weight, \{\}, rstd\}",
        r"a, {dy, {}, s, weight, {}, rstd}",
        (MEMORY, "past_the_end", "cpp", "add_rms_norm", "exact"),
    ),
    Mutant(
        "cpu: a norm's g is fused with its mean",
        "csrc/cpu/norm.cpp",
        r"Vec<T> g = no_fma\(at\(dy, c\) \* at\(w, c\)\);",
        r"Vec<T> g = at(dy, c) * at(w, c);",
        ("tests/ops/test_norm.py", "single_column", "cpp"),
    ),
]
