"""x W + b for a weight that lies transposed, by the kernels of linear."""

import pytest
import torch

from pygpt.integrations.transposed import transposed_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_linear(dtype, generator):
    """Its errors are at most twice those of torch's addmm; a bias that is added last costs a second rounding."""
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((40, 24), (24, 56), (56,))]
    grad = torch.randn(40, 56, generator=generator, dtype=torch.float64).to(dtype)
    narrow = [t.to(dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    runs = []
    for function, (x, w, b), dy in (
        (transposed_linear, narrow, grad),
        (lambda x, w, b: torch.addmm(b, x, w), narrow, grad),
        (lambda x, w, b: torch.addmm(b, x, w), exact, grad.double()),
    ):
        y = function(x, w, b)
        runs.append((y.detach(), *torch.autograd.grad(y, (x, w, b), dy)))
    for ours, theirs, wanted in zip(*runs, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        error, their_error = ((t.double() - wanted).abs().max() for t in (ours, theirs))
        eps = torch.finfo(dtype).eps
        assert error <= 2 * their_error + eps * wanted.abs().max()


def test_transposed_linear_everywhere(generator):
    """Second derivatives, torch.func, frozen weights, empty batches, leading dimensions, autocast, bad shapes."""
    x, w, b = (
        torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((9, 3), (3, 4), (4,))
    )
    assert torch.autograd.gradgradcheck(transposed_linear, (x, w, b))
    plain = lambda x, w, b: torch.addmm(b, x, w)
    for argnums in (0, 1, 2):
        of = [
            torch.func.grad(lambda *a, f=f: f(*a).square().sum(), argnums)(x, w, b) for f in (transposed_linear, plain)
        ]
        torch.testing.assert_close(*of)
    assert transposed_linear(x[:0], w, b).shape == (0, 4)
    assert transposed_linear(x.view(3, 1, 3, 3), w, b).shape == (3, 1, 3, 4)
    y = transposed_linear(x, w.detach(), b.detach())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], w.sum(1).expand(9, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert transposed_linear(x.float(), w.float(), b.float()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"pygpt.linear: input has 3 features, weight"):
        transposed_linear(x, w.t(), b)
