"""Faults in the Triton kernels, but for those in what attention's calls may ask for."""

from .mutant import MEMORY, PARITY, POISON, Mutant

ATTENTION, FAR_APART, LAUNCH, SCHEDULE = (
    f"tests/kernels/test_triton_{name}.py" for name in ("attention", "far_apart", "launch", "schedule")
)

TRITON = [
    Mutant(
        "triton: an activation's tail is written past its end",
        "triton_kernels/activation.py",
        r"(tl\.store\(y \+ offset, to_storage\(out, y\.dtype\.element_ty\), offset) < n\)",
        r"\1 < n + 1)",
        (MEMORY, "past_the_end", "triton", "relu"),
    ),
    Mutant(
        "triton: an activation's tail is written into a guard band",
        "triton_kernels/activation.py",
        r"(tl\.store\(y \+ offset, to_storage\(out, y\.dtype\.element_ty\), offset) < n\)",
        r"\1 < n + 1)",
        (POISON, "guard_band", "triton", "float32"),
    ),
    Mutant(
        "triton: a product is written into a guard band",
        "triton_kernels/mlp.py",
        r"(    tl\.store\(out \+ offset, to_storage\(acc, out\.dtype\.element_ty\)), mask\)",
        r"\1, mask | (offset == M * N))",
        (POISON, "guard_band", "triton", "float32"),
    ),
    Mutant(
        "triton: attention's gradients are written into a guard band",
        "triton_kernels/attention/tiles.py",
        r"mask = \(r < x\.operand\.length\)\[:, None\] & (.*)\n(    tl\.store\(first)",
        r"mask = (r <= x.operand.length)[:, None] & \1\n\2",
        (POISON, "guard_band", "triton", "float32"),
    ),
    Mutant(
        "triton: a norm's row at an offset of 32 bits",
        "triton_kernels/norm.py",
        r"row = tl\.program_id\(0\)\.to\(tl\.int64\) \* ROWS",
        r"row = tl.program_id(0) * ROWS",
        (FAR_APART, "norms_of_rows_that_are_far", "True"),
    ),
    Mutant(
        "triton: a unit that is 0 passes its gradient on",
        "triton_kernels/activation.py",
        r"tl\.where\(saved <= 0, 0\.0, d\)",
        r"tl.where(saved < 0, 0.0, d)",
        (MEMORY, "past_the_end", "triton", "relu-M"),
    ),
    Mutant(
        "triton: gate and value are swapped",
        "triton_kernels/mlp.py",
        r"acc \*= activate\((tl\.load\(gate.*tl\.float32\)), ACTIVATION\)",
        r"acc = activate(acc, ACTIVATION) * \1",
        (PARITY, "shapes", "triton", "mlp", "M=33", "swiglu", "float32"),
    ),
    Mutant(
        "triton: a gate's derivative is taken at the value",
        "triton_kernels/mlp.py",
        r"acc \*= (tl\.load\(saved \+ pre_offset \+ N, .*)$",
        r"x = \1; acc *= x",
        (PARITY, "shapes", "triton", "mlp", "M=33", "swiglu", "float32"),
    ),
    Mutant(
        "triton: the values' half of dpre is not written",
        "triton_kernels/mlp.py",
        r"tl\.store\(out \+ offset \+ N, .*$",
        r"pass",
        (PARITY, "shapes", "triton", "mlp", "M=33", "swiglu", "float32"),
    ),
    Mutant(
        "triton: the causal mask hides the diagonal",
        "triton_kernels/attention/tiles.py",
        r"j\[None, :\] <= last - col",
        r"j[None, :] < last - col",
        (ATTENTION, "vanishes_in_float32"),
    ),
    Mutant(
        "triton: measuring leaves its own results where a kernel reads",
        "triton_kernels/common.py",
        r"t\.copy_\(values\)",
        r"pass",
        (LAUNCH, "measuring_restores"),
    ),
    Mutant(
        "triton: a product's last rows of tiles are taken for a whole group",
        "triton_kernels/mlp.py",
        r"height = tl\.minimum\(tiles_m - first, GROUP\)",
        r"height = GROUP",
        (SCHEDULE, "scheduled_in_groups_of_rows"),
    ),
    Mutant(
        "triton: attention's rows at an offset of 32 bits",
        "triton_kernels/attention/tiles.py",
        r"row \+ tl\.arange\(0, x\.TILE_ROWS\)\.to\(tl\.int64\), tl\.arange\(0, COLS\)",
        r"row + tl.arange(0, x.TILE_ROWS), tl.arange(0, COLS)",
        (FAR_APART, "attention_of_what_is_far_apart", "sm80"),
    ),
    Mutant(
        "triton: the last group of heads is taken for a whole one",
        "triton_kernels/attention/tiles.py",
        r"tl\.minimum\(heads - first, group\)",
        r"group",
        (SCHEDULE, "scheduled_in_groups_of_heads"),
    ),
    Mutant(
        "triton: a group has more heads than there are",
        "triton_kernels/attention/__init__.py",
        r"max\(1, min\(B \* self\.kv_heads, L2_BYTES // (.*)\)\)$",
        r"max(1, L2_BYTES // \1)",
        (SCHEDULE, "groups_of_heads_are_no_larger"),
    ),
]
