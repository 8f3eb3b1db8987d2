"""The discriminator, whose trunk has the searched architecture."""

from __future__ import annotations

import pytest
import torch
from generator_cases import largest_singular_value, make_discriminator
from torch import nn

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.recipe_loading import load_recipe


def test_the_spectral_discriminator_divides_head_and_trunk():
    discriminator, arch = make_discriminator("none", head="sum", spectral_norm="all")
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    for _ in range(40):
        discriminator(images, labels, arch())
    discriminator.eval()
    layers = [
        m for m in discriminator.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))
    ]
    assert len(layers) > 5
    assert all(
        largest_singular_value(layer.weight) == pytest.approx(1.0, abs=0.03) for layer in layers
    )


def test_the_discriminators_own_weights():
    """The discriminator's own weights are what they were without spectral norm."""
    discriminator, _ = make_discriminator()
    names = [name for name, _ in discriminator.named_parameters() if not name.startswith("trunk.")]
    assert names == ["score.weight", "score.bias", "embedding.weight"]
    assert list(discriminator.state_dict()) == [
        name for name, _ in discriminator.named_parameters()
    ]


@pytest.mark.parametrize(
    ("norm", "spectral_norm", "message"),
    [
        ("batch", "head", "BatchNorm"),
        ("batch", "all", "BatchNorm"),
        ("group", "all", "cancels the scale"),
    ],
)
def test_spectral_norm_that_a_norm_undoes_is_refused(norm, spectral_norm, message):
    with pytest.raises(InputError, match=message):
        make_discriminator(norm, spectral_norm=spectral_norm)


def gan_parts():
    torch.manual_seed(0)
    modules = build_modules(load_recipe("smoke").search, load_dataset("digits"))
    return modules, (torch.randn(8, 1, 8, 8), torch.arange(8))


def test_the_discriminator_has_the_searched_architecture():
    """Its scores depend on A, through the same α as the classifiers'."""
    modules, (images, labels) = gan_parts()
    score = modules.gan.discriminator(images, labels, modules.arch()).sum()
    grads = torch.autograd.grad(score, [modules.arch.normal, modules.arch.reduction])
    assert all(bool(g.abs().sum() > 0) for g in grads)
    assert not any("arch" in name or "normal" in name for name, _ in modules.gan.named_parameters())
