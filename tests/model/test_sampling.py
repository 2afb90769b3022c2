"""Drawing a token: any temperature, from none at all to infinity, and no other."""

import math

import pytest
import torch

import pygpt
from pygpt.model import _sample

LOGITS = torch.tensor([[1.0, 3.0, 2.0, -math.inf], [-3e38, -2e38, -2.5e38, -3.1e38], [3e38, 1e38, 2e38, -3e38]])


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-45, 1e-320, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_temperatures_take_the_likeliest(temperature, dtype, generator):
    for top_k in (None, 1, 3, 10):
        tokens = [_sample(LOGITS.to(dtype), temperature, top_k, generator) for _ in range(20)]
        assert all(torch.equal(token, LOGITS.argmax(-1, keepdim=True)) for token in tokens)


def test_ties_stay_ties(generator):
    """The two likeliest of equal logits are drawn alike, at every temperature."""
    logits = torch.tensor([[5.0, 5.0, 4.0]]).expand(4000, 3)
    for temperature in (1e-40, 1e-3):
        share = _sample(logits, temperature, None, generator).float()
        assert share.max() == 1 and abs(share.mean().item() - 0.5) < 6 * 0.5 / math.sqrt(
            4000
        )  # six standard deviations


def test_every_logit_counts_as_softmax_says(generator):
    logits = torch.tensor([[0.3, -1.0, 1.2, 0.0]])
    for temperature in (0.7, 1.0, 3.0, math.inf):
        tokens = _sample(logits.expand(20_000, 4), temperature, None, generator)
        p = (logits.double() / temperature).softmax(-1)[0]
        found = torch.bincount(tokens[:, 0], minlength=4) / 20_000
        assert bool(((found - p).abs() < 6 * (p * (1 - p) / 20_000).sqrt()).all())  # six standard deviations


@pytest.mark.parametrize("temperature", [math.nan, -1.0, -math.inf, -1e-320])
def test_no_other_temperature(temperature):
    """Refused before the model computes anything."""
    model = pygpt.GPT(pygpt.GPTConfig(8, 4, 1, 1, 4)).eval()
    model.forward = None
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 1, temperature)


def test_a_model_generates_at_every_temperature():
    model = pygpt.GPT(pygpt.GPTConfig(8, 4, 1, 1, 4)).eval()
    greedy = model.generate(torch.zeros(1, 1, dtype=torch.long), 6, 0.0)
    for temperature in (1e-40, 1e-320):
        assert torch.equal(model.generate(torch.zeros(1, 1, dtype=torch.long), 6, temperature), greedy)
