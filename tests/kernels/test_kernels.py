"""What the kernels of every backend promise beyond parity: what they return, leave alone and reach."""

from itertools import product

import cases
import pytest
import torch

import pygpt
from pygpt import reference, verify
from pygpt.dispatch import TABLE

GPU_SHARE = {"triton": 4, "cuda": 1}  # see conftest
TYPICAL = list(cases.variants(cases.TYPICAL))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels(compiled):
    return TABLE[compiled].kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("op, dims", [*TYPICAL, ("attention", {"S": 0}), ("layer_norm", {"M": 0})], ids=cases.ids)
def test_results_look_like_the_references(op, dims, dtype, kernels, device, generator):
    """Shape, dtype and strides; with every gradient wanted, and with none."""
    args, grads = verify.draw(op, {**cases.TINY[op], **dims}, dtype, generator, device=device)
    for name, call in cases.kernel_calls(op, args, grads, reference):
        for wanted in (True, False):
            call = [[wanted] * len(a) if isinstance(a, list) else a for a in call]
            ours, theirs = (verify.as_tuple(getattr(k, name)(*call)) for k in (kernels, reference))
            for a, b in zip(ours, theirs, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype), name
                assert cases.layout_of(a) == cases.layout_of(b), name


@pytest.mark.parametrize("op, dims", TYPICAL, ids=cases.ids)
def test_every_subset_of_gradients(op, dims, kernels, device, generator):
    """Bitwise the gradients of the full backward, run after run; the unwanted come back empty; inputs stay."""
    args, grads = verify.draw(op, dims, torch.bfloat16, generator, device=device)
    *_, (name, call) = cases.kernel_calls(op, args, grads, kernels)
    tensors = [a for a in call if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    backward = getattr(kernels, name)
    at = next((i for i, a in enumerate(call) if isinstance(a, list)), len(call))
    every = list(call[at : at + 1])
    full = verify.as_tuple(backward(*call))[: len(every[0]) if every else None]
    subsets = list(product((False, True), repeat=len(every[0]))) if every else [None]
    for needs in subsets[:: max(1, len(subsets) // 8)] + [subsets[-1]]:
        found = verify.as_tuple(backward(*call[:at], *(every and [list(needs)]), *call[at + 1 :]))
        for need, g, want in zip(needs or [True], found, full, strict=False):
            assert torch.equal(g, want) if need else g.numel() == 0
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("op", cases.NORMS)
@pytest.mark.parametrize("N", [8192, 10_000, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ids)
def test_wide_rows(op, N, dtype, compiled, device, generator):
    """The longest kept in registers, and those read in pieces."""
    cases.assert_exact(op, {"M": 5, "N": N, "mean": 3.0}, dtype, generator, compiled, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("causal", [False, True])
def test_any_scale(scale, causal, dtype, compiled, device, generator):
    args, grads = verify.draw(
        "attention_lse", {"L": 70, "S": 150, "B": 1, "H": 2, "E": 24}, dtype, generator, device=device
    )
    args = *args[:3], causal, scale
    with pygpt.backend(compiled):
        ours = verify.directions("attention_lse", verify.SPECS["attention_lse"].call, args, grads)
    theirs = verify.directions("attention_lse", verify.eager("attention_lse"), args, grads)
    exact, terms = verify.in_float64("attention_lse", args, grads)
    for key, want in exact.items():
        size = max(want.abs().max(), terms.get(key, want).abs().max(), torch.finfo(dtype).tiny)
        error, yardstick = ((t[key] - want).abs().max() / size for t in (ours, theirs))
        assert error <= 2 * yardstick.nan_to_num() + verify.allowance(dtype) * 2, (
            key
        )  # PyTorch's causal: NaN if scale <= 0


def test_large_offsets_are_64_bit(kernels, device, generator):
    """Rows farther apart than 2^31 elements; the memory in between is never touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of GPU memory")
    rows, width, far = 3, 5, 2**31 + 11
    x = torch.randn(rows, width, generator=generator).bfloat16().to(device)
    wide = torch.empty((rows - 1) * far + width, dtype=torch.bfloat16, device=device)
    wide = wide.as_strided((rows, width), (far, 1)).copy_(x)
    assert torch.equal(
        kernels.layer_norm_fwd(wide, None, None, 1e-5)[0], kernels.layer_norm_fwd(x, None, None, 1e-5)[0]
    )
    assert torch.equal(kernels.linear_fwd(wide, x, None), kernels.linear_fwd(x, x, None))
    heads = [wide.as_strided((1, 1, rows, width), (0, 0, far, 1)), x[None, None]]
    ours, want = (kernels.attention_fwd(t, t, t, True, 0.5)[0] for t in heads)
    assert torch.equal(ours, want)


# ------------------------------------------------------------------------------- many small problems
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "linear"])
def test_more_rows_than_a_grid_is_high(op, compiled, device, generator):
    """CUDA's y and z dimensions end at 65,535."""
    if (op, compiled, device) == ("linear", "triton", "cpu"):
        pytest.skip("grids are one-dimensional, and one program serves many rows")
    dims = {"M": 70_000, "N": 8} if op != "linear" else {"M": 70_000, "K": 8, "N": 3}
    cases.assert_exact(op, dims, torch.float32, generator, compiled, device=device)


def test_more_heads_than_a_grid_is_high(compiled, device, generator):
    if compiled == "triton" and device == "cpu":
        pytest.skip("grids are one-dimensional, and 70,000 programs take the interpreter half an hour")
    dims = {"B": 35_000, "H": 2, "L": 2, "S": 2, "E": 8}
    if compiled == "cuda" and device == "cpu":  # likewise; but the emulator refuses such a launch before it runs
        from tests import emulator

        calls = cases.kernel_calls("attention", *verify.draw("attention", dims, torch.bfloat16, generator), reference)
        launched = emulator.launches(lambda: [getattr(torch.ops.pygpt_emulator, name)(*args) for name, args in calls])
        assert {name.partition("<")[0].split("::")[-1] for name, *_ in launched} >= {"attention_fwd_kernel"}, launched
    else:
        cases.assert_exact("attention", dims, torch.bfloat16, generator, compiled, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator checks launches without running them")
def test_cuda_grids_for_millions_of_rows():
    """No sum over rows has more slices than a grid is high."""
    from tests import emulator

    emulator.build.load()
    ops, rows = torch.ops.pygpt_emulator, 5_000_000
    x, weight, bias = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((rows, 8), (8, 8), (8,)))
    statistics, wide = torch.empty(rows), torch.empty(1, 20_000, dtype=torch.bfloat16).expand(rows, 20_000)
    for call in (
        lambda: ops.linear_fwd(x, weight, bias),
        lambda: ops.linear_bwd(x, x, weight, [True] * 3),
        lambda: ops.mlp_fwd(x, weight, bias, weight, bias, "gelu"),
        lambda: ops.mlp_fwd(x, weight, bias, weight[:, :4], bias, "swiglu"),
        lambda: ops.layer_norm_fwd(x, bias, bias, 1e-5),
        lambda: ops.layer_norm_bwd(x, x, bias, statistics, statistics, [True] * 3),
        lambda: ops.layer_norm_bwd(wide, wide, None, statistics, statistics, [False, True, True]),
        lambda: ops.gelu_fwd(x, "none"),
    ):
        assert emulator.launches(call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator has an L2 cache of any size")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.ids)
@pytest.mark.parametrize("causal", [0, 1])
def test_cuda_groups_of_heads(causal, dtype, emulated, monkeypatch, generator):
    """Six heads in groups of four, whose keys and values share the L2 cache: the last group is a partial one."""
    emulated()
    dims = {"B": 2, "H": 3, "L": 150, "S": 150, "E": 16, "causal": causal}
    monkeypatch.setenv("PYGPT_EMULATED_L2", str(4 * 150 * 2 * 16 * dtype.itemsize))
    cases.assert_exact("attention_lse", dims, dtype, generator, "cuda")
