"""DCGAN's generator."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.generators import ConditionalDCGAN


@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_the_generator_draws_images_of_a_size_and_range(size):
    """The generator draws images of the data set's size, in its range."""
    generator = ConditionalDCGAN(
        num_classes=10,
        image_size=size,
        image_channels=3,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        channels=4,
    )
    images = generator.sample(torch.arange(10))
    assert images.shape == (10, 3, size, size)
    assert float(images.detach().abs().max()) <= 2.0  # (1 - mean) / std
