"""The small discriminator of a generator's warm-up."""

from __future__ import annotations

import pytest
import torch
from generator_cases import largest_singular_value
from torch import nn

from lfmcw_app.generators.warmup_discriminator import WarmupDiscriminator


def make(**changes):
    torch.manual_seed(0)
    how = {"num_classes": 3, "image_size": 8, "image_channels": 1, "channels": 4}
    return WarmupDiscriminator(**how | changes)


@pytest.mark.parametrize("size", [8, 9, 16, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_scores_images_of_any_size(size, channels):
    discriminator = make(image_size=size, image_channels=channels)
    scores = discriminator(torch.randn(5, channels, size, size), torch.tensor([0, 1, 2, 0, 1]))
    assert scores.shape == (5,)


def test_scores_depend_on_the_class():
    discriminator = make(augments=False).eval()
    image = torch.randn(1, 1, 8, 8).expand(3, 1, 8, 8)
    assert len(set(discriminator(image, torch.arange(3)).tolist())) == 3


def test_every_layer_has_spectral_norm():
    discriminator = make()
    for _ in range(40):
        discriminator(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    discriminator.eval()
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
    layers = [m for m in discriminator.modules() if isinstance(m, kinds)]
    assert len(layers) == 5
    for layer in layers:
        assert largest_singular_value(layer.weight) == pytest.approx(1.0, abs=0.03)


def test_it_augments_only_where_it_is_told_to():
    images, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    plain, augmenting = make(augments=False).eval(), make().eval()
    assert torch.equal(plain(images, labels), plain(images, labels))
    assert not torch.equal(augmenting(images, labels), augmenting(images, labels))


def test_generated_images_get_a_gradient():
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(make()(images, torch.tensor([0, 1])).sum(), images)
    assert gradient.abs().sum() > 0
