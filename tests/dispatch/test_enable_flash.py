"""pygpt as an implementation of torch.nn.attention.activate_flash_attention_impl, torch's own door for attention."""

import cases
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import verify
from tests.dispatch.test_enable import results


@pytest.fixture
def flash():
    """ "pygpt" activated by torch's own function."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        pytest.skip("this torch has no such door")
    torch.nn.attention.activate_flash_attention_impl("pygpt")
    yield
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)


def test_the_door_lists_us():
    assert "pygpt" in torch.nn.attention.list_flash_attention_impls()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("option", ["plain", "causal", "boolean", "floating", "grouped"])
def test_through_the_door(option, dtype, counts, flash):
    """By the rule of exactness, with the strides that torch's meta functions promise."""
    options = {
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.rand(6, 6) > 0.3},
        "floating": {"attn_mask": torch.randn(6, 6).to(dtype)},
        "grouped": {"enable_gqa": True},
    }.get(option, {})
    heads = 2 if option == "grouped" else 4
    leaves = [torch.randn(2, 6, n, 8, dtype=dtype).transpose(1, 2).requires_grad_() for n in (4, heads, heads)]
    run = lambda leaves: results(lambda f, *a: f.scaled_dot_product_attention(*a, **options), leaves)
    got = run(leaves)
    assert torch.nn.attention.current_flash_attention_impl() == "pygpt"
    torch.nn.attention.restore_flash_attention_impl()
    torchs = run(leaves)
    assert counts.served == {"flash attention": 1, "flash attention backward": 1}
    assert [t.stride() for t in got] == [t.stride() for t in torchs]
    if option == "floating":
        options["attn_mask"] = options["attn_mask"].double()
    for exact, *found in zip(run([t.detach().double().requires_grad_() for t in leaves]), got, torchs, strict=True):
        ours, theirs = ((t.double() - exact).abs().max() / exact.abs().max() for t in found)
        roundings = 2 if dtype == torch.float64 else 1  # there the truth is as far from the exact result as ours
        assert ours <= 2 * theirs + roundings * verify.allowance(dtype)


def test_the_doors_strides_are_those_of_torchs_meta_functions(flash):
    ops = torch.ops.aten
    forward = ops._scaled_dot_product_flash_attention_for_cpu
    backward = ops._scaled_dot_product_flash_attention_for_cpu_backward
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    for query in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        out, lse = forward(query, k, v)
        grads = backward(out, query, k, v, out, lse, 0.0, False)
        meta = [t.to("meta") for t in (query, k, v)]
        of_meta = forward(*meta)
        want = *of_meta, *backward(of_meta[0], *meta, *of_meta, 0.0, False)
        assert [(t.shape, t.dtype, t.stride()) for t in (out, lse, *grads)] == [
            (t.shape, t.dtype, t.stride()) for t in want
        ]


def test_the_door_closes_between_forward_and_backward(flash):
    """Either side reads what the other has kept, also of rows that see no key."""
    leaves = [t.requires_grad_() for t in torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)]
    mask = torch.rand(5, 5) > 0.3
    run = lambda: F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    gradients = lambda out: torch.autograd.grad(out.square().sum(), leaves)
    ours, want = run(), gradients(run())
    torch.nn.attention.restore_flash_attention_impl()
    torch.testing.assert_close(gradients(ours), want)
    theirs = run()
    torch.nn.attention.activate_flash_attention_impl("pygpt")
    torch.testing.assert_close(gradients(theirs), want)


def test_enable_leaves_the_active_implementation_alone():
    class Handle:
        removed = False

        def remove(self):
            self.removed = True

    door, handle = torch.nn.attention, Handle()
    door.register_flash_attention_impl("test", register_fn=lambda: handle)
    try:
        door.activate_flash_attention_impl("test")
        with pygpt.enable():
            assert door.current_flash_attention_impl() == "test"
        assert door.current_flash_attention_impl() == "test" and not handle.removed
    finally:
        door.restore_flash_attention_impl(_raise_warn=False)
        door._registry._FLASH_ATTENTION_IMPLS.pop("test")
