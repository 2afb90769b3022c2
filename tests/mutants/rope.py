"""Faults in rope's kernels, on every backend."""

from .mutant import MEMORY, PARITY, THREADS, Mutant

OWN = "tests/ops/test_rope.py"
CPU, CUDA, TRITON = "csrc/cpu/rope.cpp", "csrc/cuda/rope.cu", "triton_kernels/rope.py"

ROPE = [
    # ---- C++
    Mutant(
        "cpu: rope's backward rotates by the angle itself",
        CPU,
        r"if constexpr \(Back\) pairs\.store\(write, y, i, n, a \* c \+ b \* s, b \* c - a \* s\);",
        r"if constexpr (Back) pairs.store(write, y, i, n, a * c - b * s, b * c + a * s);",
        (PARITY, "test_shapes", "cpp", "rope", "norm=0"),
    ),
    Mutant(
        "cpu: rope's backward of a norm rotates by the angle itself",
        CPU,
        r"add\(slot, a \* c \+ b \* s, (.*)add\(slot \+ 1, b \* c - a \* s,",
        r"add(slot, a * c - b * s, \1add(slot + 1, b * c + a * s,",
        (MEMORY, "past_the_end", "cpp", "rope", "exact"),
    ),
    Mutant(
        "cpu: rope's interleaved pairs are swapped",
        CPU,
        r"a = shuffle<T>\(low, high, lanes, Evens\(\)\), b = shuffle<T>\(low, high, lanes, Odds\(\)\);",
        r"b = shuffle<T>(low, high, lanes, Evens()), a = shuffle<T>(low, high, lanes, Odds());",
        (PARITY, "test_shapes", "cpp", "rope", "interleaved=1", "float32"),
    ),
    Mutant(
        "cpu: rope's position is off by one",
        CPU,
        r"b \* a\.table_stride \+ r \* a\.half;",
        r"b * a.table_stride + (r > 0 ? r - 1 : r) * a.half;",
        (MEMORY, "past_the_end", "cpp", "rope", "exact"),
    ),
    Mutant(
        "cpu: rope's positions of a batch are those of the first entry",
        CPU,
        r"i = b \* a\.positions_stride \+ t;",
        r"i = t;",
        (OWN, "position_ids_select", "cpp"),
    ),
    Mutant(
        "cpu: rope leaves out the channels that pass through",
        CPU,
        r"\{ write\(y \+ j, load\(x \+ j, n\), n\); \}\);",
        r"{ write(y + j, load(x + j, n) * T(0), n); });",
        (OWN, "keep_their_values", "cpp"),
    ),
    Mutant(
        "cpu: rope's sum of weights loses the last rows",
        CPU,
        r"        dw\.flush\(\);",
        r"",
        (MEMORY, "past_the_end", "cpp", "rope", "exact"),
    ),
    Mutant(
        "cpu: rope's last pairs are read as a whole vector",
        CPU,
        r"b = PYGPT_ISA::load\(row \+ half \+ i, n\);",
        r"b = PYGPT_ISA::load(row + half + i);",
        (MEMORY, "past_the_end", "cpp", "rope", "exact"),
    ),
    Mutant(
        "cpu: rope's rows at an offset of 32 bits",
        CPU,
        r"h \* x\.stride\[1\] \+ t \* x\.stride\[2\];",
        r"h * x.stride[1] + static_cast<int>(t * x.stride[2]);",
        (MEMORY, "32_bits", "cpp", "rope"),
    ),
    Mutant(
        "cpu: rope's tasks depend on the threads",
        CPU,
        r"std::max<int64_t>\(kTaskElements / elements, 1\);",
        r"std::max<int64_t>(kTaskElements / elements / threads.count(), 1);",
        (THREADS, "thread_counts", "rope", "float32"),
    ),
    Mutant(
        "bind: rope's positions are not checked",
        "csrc/bind/rope.h",
        r"if \(on_cpu\) check_positions\(call, a, ids\.numel\(\)\);",
        r"",
        (OWN, "out_of_range_raise"),
    ),
    Mutant(
        "bind: rope's key weight is the query's",
        "csrc/bind/rope.h",
        r"weights = \{call\.contiguous\(q_weight\), call\.contiguous\(k_weight\)\};",
        r"weights = {call.contiguous(q_weight), call.contiguous(k_weight ? q_weight : k_weight)};",
        (OWN, "complex_numbers", "cpp", "(1, 1)"),
    ),
    # ---- CUDA
    Mutant(
        "cuda: rope's backward rotates by the angle itself",
        CUDA,
        r"back \? -1\.f : 1\.f",
        r"back ? 1.f : 1.f",
        (MEMORY, "past_the_end", "cuda", "rope", "exact"),
    ),
    Mutant(
        "cuda: rope's interleaved pairs are swapped",
        CUDA,
        r"a\[i\] = x\[2 \* i\], b\[i\] = x\[2 \* i \+ 1\];",
        r"b[i] = x[2 * i], a[i] = x[2 * i + 1];",
        (PARITY, "test_shapes", "cuda", "rope", "D=64", "interleaved=1"),
    ),
    Mutant(
        "cuda: rope's position is off by one",
        CUDA,
        r"c\.batch \* a\.table_stride \+ row \* a\.half;",
        r"c.batch * a.table_stride + (row > 0 ? row - 1 : row) * a.half;",
        (MEMORY, "past_the_end", "cuda", "rope", "exact"),
    ),
    Mutant(
        "cuda: rope reads rows that do not exist",
        CUDA,
        r"if \(row < 0 \|\| row >= a\.table_rows\) return -1;",
        r"if (row < 0) return -1;",
        (OWN, "nan_on_a_gpu", "cuda"),
    ),
    Mutant(
        "cuda: rope's sum of weights loses a team",
        CUDA,
        r"for \(int t = 1; t < teams && team_index == 0; t\+\+\)",
        r"for (int t = 1; t < teams - 1 && team_index == 0; t++)",
        (MEMORY, "past_the_end", "cuda", "rope", "exact"),
    ),
    Mutant(
        "cuda: rope's gradient is read as vectors wherever it lies",
        CUDA,
        r"s->in\.can_vectorize\(\) && ",
        r"",
        (MEMORY, "without_vectors", "cuda", "rope"),
    ),
    Mutant(
        "cuda: rope's rows at an offset of 32 bits",
        CUDA,
        r"c\.position \* t\.stride\.position;",
        r"static_cast<int>(c.position * t.stride.position);",
        (MEMORY, "32_bits", "cuda", "rope"),
    ),
    # ---- Triton
    Mutant(
        "triton: rope's backward rotates by the angle itself",
        TRITON,
        r"return Angles\(c, s \* SIGN\)",
        r"return Angles(c, s)",
        (MEMORY, "past_the_end", "triton", "rope", "exact"),
    ),
    Mutant(
        "triton: rope's position is off by one",
        TRITON,
        r"\(at\.batch \* table_stride \+ row \* at\.half\)",
        r"(at.batch * table_stride + (row - (row > 0)) * at.half)",
        (MEMORY, "past_the_end", "triton", "rope", "exact"),
    ),
    Mutant(
        "triton: rope reads rows that do not exist",
        TRITON,
        r"exists = \(row >= 0\) & \(row < table_rows\)",
        r"exists = row == row",
        (OWN, "nan_on_a_gpu", "triton"),
    ),
    Mutant(
        "triton: rope's sum of weights loses the last positions",
        TRITON,
        r"in_range, paired, remaining = (.*)(\n    wa, wb = )",
        r"in_range, paired, remaining = \1\n    in_range = at.position < at.T - 1\2",
        (MEMORY, "past_the_end", "triton", "rope", "exact"),
    ),
    Mutant(
        "triton: rope writes past the last position",
        TRITON,
        r"(tl\.store\(out \+ column\[None, :\], to_storage\(value, out\.dtype\.element_ty\), )in_range\[:, None\] & ",
        r"\1",
        (MEMORY, "past_the_end", "triton", "rope"),
    ),
    # ---- Python
    Mutant(
        "python: the tables follow the model to 16 bits",
        "pygpt/nn/rotary.py",
        r"if self\.cos is not before\[\"cos\"\]:",
        r"if self.cos.device != before[\"cos\"].device:",
        (OWN, "keep_their_precision"),
    ),
]
