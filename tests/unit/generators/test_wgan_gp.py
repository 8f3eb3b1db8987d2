"""WGAN-GP's generator."""

from __future__ import annotations

import torch
from generator_cases import make_generator
from torch import nn


def test_a_block_doubles_the_resolution():
    generator = make_generator("wgan_gp", size=16)
    sizes = []
    for block in generator.blocks:
        block.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[2:])))
    generator.sample(torch.arange(4))
    assert generator.base == 4
    assert sizes == [(8, 8), (16, 16)]


def test_classes_differ_from_the_first_step_on():
    """Their gains and shifts begin near one and zero, but not at them."""
    generator = make_generator("wgan_gp")
    embeddings = [module for module in generator.modules() if isinstance(module, nn.Embedding)]
    assert embeddings
    for embedding in embeddings:
        rows = embedding.weight.detach()
        assert 0.0 < float(rows.std()) < 0.1
        assert not torch.equal(rows[0], rows[1])


def test_pixels_lie_between_minus_one_and_one():
    generator = make_generator("wgan_gp")
    noise = 100.0 * torch.randn(4, generator.noise_dim)
    pixels = generator.pixels(noise, torch.arange(4)).detach()
    assert pixels.shape == (4, 1, 8, 8)
    assert 0.0 < float(pixels.abs().max()) <= 1.0


def test_the_norms_are_of_the_whole_batch():
    """The generator's BatchNorm is right, and the critic's would be wrong."""
    generator = make_generator("wgan_gp")
    noise = torch.randn(4, generator.noise_dim)
    whole = generator(noise, torch.arange(4)).detach()
    half = generator(noise[:2], torch.arange(2)).detach()
    assert not torch.allclose(whole[:2], half)
