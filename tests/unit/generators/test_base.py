"""What every generator does."""

from __future__ import annotations

import pytest
import torch
from generator_cases import COLOUR, OPTIONS, make_generator

from lfmcw_app.errors import InputError
from lfmcw_app.generators import ConditionalBigGAN, ConditionalWGANGP, ImageGenerator
from lfmcw_app.generators.base import base_and_doublings


@pytest.mark.parametrize("size", [8, 16, 28, 32])
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_generator_draws_images_of_a_size_and_range(kind, size):
    """Every generator draws images of the data set's size, in its range."""
    changes = {"noise_dim": 12, "attention": size} if kind == "biggan-paper" else {}
    generator = make_generator(kind, size=size, **COLOUR, **changes)
    images = generator.sample(torch.arange(4))
    assert images.shape == (4, 3, size, size)
    assert float(images.detach().abs().max()) <= 2.0  # (1 - mean) / std
    assert isinstance(generator, ImageGenerator)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(8, (4, 1)), (28, (7, 2)), (32, (4, 3)), (96, (6, 4)), (224, (7, 5)), (36, (9, 2))],
)
def test_an_image_size_is_a_small_base_doubled(size, expected):
    assert base_and_doublings(size) == expected


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_image_depends_on_the_label_and_on_the_noise(kind):
    generator = make_generator(kind).double()
    noise = torch.randn(4, generator.noise_dim, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        images = generator(noise, labels)
        assert bool(
            (generator(noise, labels.roll(1)) - images).flatten(1).abs().amax(1).gt(1e-7).all()
        )
        assert bool(
            (generator(noise.roll(1, 0), labels) - images).flatten(1).abs().amax(1).gt(1e-7).all()
        )


def test_the_noise_comes_from_the_global_random_state():
    generator = make_generator("biggan").eval()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generator.sample(torch.arange(4)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_parameter_counts_are_the_published_sizes():
    def count(cls, **settings):
        generator = cls(num_classes=10, image_size=32, **COLOUR, **settings)
        return sum(p.numel() for p in generator.parameters())

    assert count(ConditionalBigGAN) == 4_304_387  # the authors' CIFAR program: 4.30 M
    assert count(ConditionalBigGAN, channels=16) == 375_683
    assert count(ConditionalWGANGP) == 1_218_307


@pytest.mark.parametrize("kind", ["wgan_gp", "biggan"])
@pytest.mark.parametrize("size", [9, 68])
def test_an_image_size_that_doubling_does_not_reach_is_refused(kind, size):
    with pytest.raises(InputError, match=f"images of {size}×{size}"):
        make_generator(kind, size=size)
