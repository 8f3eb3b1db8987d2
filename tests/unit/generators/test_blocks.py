"""Layers of the generators and the discriminator."""

from __future__ import annotations

import pytest
import torch
from generator_cases import largest_singular_value, make_generator
from torch import nn

from lfmcw_app.generators.blocks import SelfAttention, initialize, normalize_spectrally


def test_attention_is_the_identity_at_first():
    """Attention is the identity at first, and reads every position later."""
    attention = SelfAttention(8).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(attention(x), x)
    nn.init.ones_(attention.gamma)
    (grad,) = torch.autograd.grad(attention(x)[0, :, 0, 0].sum(), x)
    # One position of each 2×2 patch at the least.
    assert bool((grad[0].abs().sum(0) > 0).flatten().sum() >= 4)
    assert not grad[1].any()


def test_attention_has_a_second_derivative():
    attention = SelfAttention(4).double()
    nn.init.ones_(attention.gamma)
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(attention, (x,))


def test_orthogonal_weights_have_singular_values_of_one():
    layer = nn.Conv2d(4, 6, 3)
    initialize(layer, "orthogonal")
    assert torch.allclose(
        torch.linalg.svdvals(layer.weight.detach().flatten(1)), torch.ones(6), atol=1e-5
    )
    initialize(layer, "normal")
    assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_spectral_norm_bounds_the_largest_singular_value():
    """Spectral norm bounds the largest singular value while the weights move."""
    generator = make_generator("biggan", size=16)
    layers = [m for m in generator.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for _ in range(30):
            for p in generator.parameters():
                p.add_(0.01 * torch.randn_like(p))
            generator.sample(torch.arange(4))
        for p in generator.parameters():
            p.mul_(7.0)
        for _ in range(60):
            generator.sample(torch.arange(4))
    generator.eval()
    assert len(layers) == 1 + 3 * 2 + 1  # linear, three convolutions a block, the last
    assert all(
        largest_singular_value(layer.weight) == pytest.approx(1.0, abs=0.02) for layer in layers
    )


def test_spectral_norm_of_a_known_matrix():
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data.copy_(torch.diag(torch.tensor([5.0, 2.0, 1.0])))
    normalize_spectrally(layer)
    layer(torch.eye(3))
    assert torch.allclose(layer.weight, torch.diag(torch.tensor([1.0, 0.4, 0.2])), atol=1e-4)
