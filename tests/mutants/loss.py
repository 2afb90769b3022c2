"""Faults in the losses, on every backend."""

from .mutant import PARITY, Mutant

LOSS_TESTS, LINEAR_TESTS = "tests/ops/test_loss.py", "tests/ops/test_linear_cross_entropy.py"

LOSS_CPU = [
    Mutant(
        "cpu: an ignored target counts",
        "csrc/cpu/loss.cpp",
        r"return kept\(i\) \? f\(args\.target\[i\]\) : T\(0\);",
        r"return f(kept(i) ? args.target[i] : 0);",
        (PARITY, "test_shapes", "cpp", "-cross_entropy", "V=97,ignored=2"),
    ),
    Mutant(
        "cpu: the smoothing term of the loss is dropped",
        "csrc/cpu/loss.cpp",
        r"if \(smoothing != 0\) out\[i\] \+=",
        r"if (false) out[i] +=",
        (PARITY, "test_shapes", "cpp", "-cross_entropy", "V=97,", "smoothing"),
    ),
    Mutant(
        "cpu: the loss is of logits without their maximum",
        "csrc/cpu/loss.cpp",
        r"log_sum - \(to_acc\(row\[target\]\) - row_max\)\)",
        r"log_sum - to_acc(row[target]))",
        (PARITY, "test_shapes", "cpp", "-cross_entropy", "V=97"),
    ),
    Mutant(
        "cpu: a block's sum is not rescaled when the maximum rises",
        "csrc/cpu/loss.cpp",
        r"sum \*= std::exp\(row_max - block_max\), row_max = block_max;",
        r"row_max = block_max;",
        (PARITY, "test_shapes", "cpp", "-cross_entropy", "V=4099"),
    ),
    Mutant(
        "cpu: the gradient of the target's logit lacks its one",
        "csrc/cpu/loss.cpp",
        r" - g\.one, 1\);",
        r", 1);",
        (PARITY, "test_shapes", "cpp", "-cross_entropy", "V=97"),
    ),
    Mutant(
        "cpu: z_loss is divided by the sum of the weights",
        "csrc/cpu/loss.cpp",
        r"mean \? squares / totals\[1\]",
        r"mean ? squares / totals[0]",
        (LOSS_TESTS, "z_loss_by_hand", "cpp"),
    ),
    Mutant(
        "cpu: the last chunk of rows is left out",
        "csrc/cpu/loss.cpp",
        r"while \(first < args\.loss\.rows\);",
        r"while (first + args.chunk < args.loss.rows);",
        (LINEAR_TESTS, "several_chunks", "cpp"),
    ),
    Mutant(
        "cpu: dW is that of the last chunk alone",
        "csrc/cpu/loss.cpp",
        r"if \(first > 0\) c \+= load\(sum, n\);",
        r"",
        (LINEAR_TESTS, "several_chunks", "cpp"),
    ),
    Mutant(
        "cpu: the bias's gradient is that of the last chunk alone",
        "csrc/cpu/loss.cpp",
        r"first > 0 \? db_sums\[j\] \+ sum :",
        r"first < 0 ? db_sums[j] + sum :",
        (LINEAR_TESTS, "several_chunks", "cpp"),
    ),
    Mutant(
        "cpu: float16's gradients are not scaled",
        "csrc/cpu/loss.cpp",
        r"std::is_same_v<S, f16> \? scale_of_float16",
        r"false ? scale_of_float16",
        (LINEAR_TESTS, "float16_gradients_keep", "cpp", "1e-08"),
    ),
    Mutant(
        "cpu: float16's scale forgets the class weights",
        "csrc/cpu/loss.cpp",
        r"loss\.kept\(i\) \? std::abs\(loss\.weight_of\(a\.target\[i\]\)\) : T\(0\)",
        r"T(1)",
        (LINEAR_TESTS, "float16_gradients_keep", "cpp", "1000000"),
    ),
    Mutant(
        "bind: classes out of range are not refused",
        "csrc/bind/loss.h",
        r"if \(on_cpu\) check_classes\(call, a\);",
        r"",
        (LOSS_TESTS, "class_out_of_range", "cpp", "-3"),
    ),
]

LOSS_TRITON = [
    Mutant(
        "triton: an ignored target counts",
        "triton_kernels/loss.py",
        r"kept = \(row < N\) & \(cls != ignore_index\)",
        r"kept = row < N",
        (LOSS_TESTS, "z_loss_by_hand", "triton"),
    ),
    Mutant(
        "triton: the smoothing term of the loss is dropped",
        "triton_kernels/loss.py",
        r"loss \+= tl\.sum\(smooth, 0\) \* smoothing / V",
        r"loss += 0",
        (LOSS_TESTS, "layouts_and_options", "triton", "label_smoothing"),
    ),
    Mutant(
        "triton: a block's sum is not rescaled when the maximum rises",
        "triton_kernels/loss.py",
        r"sums \* _exp\(row_max - shift\) \+",
        r"sums +",
        (PARITY, "test_shapes", "triton", "-cross_entropy", "V=50257"),
    ),
    Mutant(
        "triton: a class that is out of range is read",
        "triton_kernels/loss.py",
        r"known = \(cls >= 0\) & \(cls < V\)\n    at_target",
        r"known = cls == cls\n    at_target",
        (LOSS_TESTS, "class_out_of_range", "triton"),
    ),
    Mutant(
        "triton: dW is that of the last chunk alone",
        "triton_kernels/loss.py",
        r"Epilogue\(addend=self\.dw if rows\.start else None\)",
        r"Epilogue()",
        (LINEAR_TESTS, "several_chunks", "triton"),
    ),
    Mutant(
        "triton: float16's gradients are not scaled",
        "triton_kernels/loss.py",
        r"if any\(formed\) and x\.dtype == torch\.float16 else None",
        r"if False else None",
        (LINEAR_TESTS, "float16_gradients_keep", "triton", "1e-08"),
    ),
    Mutant(
        "triton: a chunk's losses replace those of the first chunk",
        "triton_kernels/loss.py",
        r"_set_rows\(o, of_chunk, row_losses, rows\.start\)",
        r"_set_rows(o, of_chunk, row_losses)",
        (LINEAR_TESTS, "several_chunks", "triton"),
    ),
]

LOSS_CUDA = [
    Mutant(
        "cuda: an ignored target counts",
        "csrc/cuda/loss.cu",
        r"if \(target == a\.ignore_index\) continue;",
        r"",
        (LOSS_TESTS, "z_loss_by_hand", "cuda"),
    ),
    Mutant(
        "cuda: the smoothing term of the loss is dropped",
        "csrc/cuda/loss.cu",
        r"if \(a\.smoothing != 0\) loss \+=",
        r"if (false) loss +=",
        (LOSS_TESTS, "layouts_and_options", "cuda", "label_smoothing"),
    ),
    Mutant(
        "cuda: a thread's sum is not rescaled when its maximum rises",
        "csrc/cuda/loss.cu",
        r"sums\[0\] \*= exponential\(max - pass_max\), max = pass_max;",
        r"max = pass_max;",
        (PARITY, "test_shapes", "cuda", "-cross_entropy", "V=50257"),
    ),
    Mutant(
        "cuda: the threads' sums are not rescaled to the row's maximum",
        "csrc/cuda/loss.cu",
        r"if \(row_max != -kInf\) sums\[0\] \*= exponential\(max - row_max\);",
        r"",
        (PARITY, "test_shapes", "cuda", "-cross_entropy", "V=4099"),
    ),
    Mutant(
        "cuda: a class that is out of range is read",
        "csrc/cuda/loss.cu",
        r"return t >= 0 && t < classes;",
        r"return true;",
        (LOSS_TESTS, "class_out_of_range", "cuda", "-3"),
    ),
    Mutant(
        "cuda: dW is that of the last chunk alone",
        "csrc/cuda/loss.cu",
        r"e\.addend = first > 0 \? dw_sums : nullptr;",
        r"e.addend = nullptr;",
        (LINEAR_TESTS, "several_chunks", "cuda"),
    ),
    Mutant(
        "cuda: float16's gradients are not scaled",
        "csrc/cuda/loss.cu",
        r"std::is_same_v<T, f16> && \(a\.dx",
        r"false && (a.dx",
        (LINEAR_TESTS, "float16_gradients_keep", "cuda", "1e-08"),
    ),
    Mutant(
        "cuda: a chunk's rows are those of the first chunk",
        "csrc/cuda/loss.cu",
        r"l\.p\.first = first;\n        Error failed",
        r"Error failed",
        (LINEAR_TESTS, "several_chunks", "cuda"),
    ),
]

LOSS_PYTHON = [
    Mutant(
        "python: backward scales the saved gradients in place",
        "pygpt/ops/loss.py",
        r"return \(g \* factor\)\.to",
        r"return g.mul_(factor).to",
        (LINEAR_TESTS, "graph_that_is_retained"),
    ),
    Mutant(
        "python: PyTorch's expression reads ignored rows",
        "pygpt/ops/loss_arguments.py",
        r"input = torch\.where\(kept\.unsqueeze\(at\), input, 0\)",
        r"pass",
        (LOSS_TESTS, "ignored_row_is_not_read", "torch"),
    ),
    Mutant(
        "python: the mean of no loss has NaN for a gradient",
        "pygpt/ops/loss.py",
        r"factor = torch\.where\(totals\[1\] > 0, dloss / totals\[0\], 0\)",
        r"factor = dloss / totals[0]",
        (LOSS_TESTS, "no_kept_target", "linear", "mean", "cpp"),
    ),
    Mutant(
        "python: the reference GPT counts negative targets",
        "pygpt/model.py",
        r"targets\.flatten\(\)\.clamp\(min=-1\)",
        r"targets.flatten().clamp(min=0)",
        ("tests/model/test_gpt.py", "negative_targets"),
    ),
    Mutant(
        "python: the reference GPT bypasses a hook of its head",
        "pygpt/model.py",
        r"not return_logits and is_unmodified_linear\(head\)",
        r"not return_logits",
        ("tests/model/test_gpt.py", "head_that_is_no_plain"),
    ),
]

LOSS = [*LOSS_CPU, *LOSS_TRITON, *LOSS_CUDA, *LOSS_PYTHON]
