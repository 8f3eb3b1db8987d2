"""BigGAN's generator."""

from __future__ import annotations

import copy

import pytest
import torch
from generator_cases import COLOUR, make_generator

from lfmcw_app.errors import InputError


@pytest.mark.parametrize("size", [64, 96, 224])
def test_biggan_grows_with_the_image(size):
    generator = make_generator("biggan", size=size, channels=1, **COLOUR)
    assert generator.sample(torch.arange(2)).shape == (2, 3, size, size)


def test_each_chunk_of_hierarchical_noise_reaches_the_image():
    generator = make_generator("biggan-paper", size=16, noise_dim=9, attention=None).double()
    noise = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(generator(noise, torch.arange(4)).square().sum(), noise)
    assert bool((grad.abs() > 0).any(0).all())


def test_biggan_shows_images_of_the_averaged_weights():
    """BigGAN shows images of the averaged weights, and samples with the live ones."""
    generator = make_generator("biggan", average_decay=0.5, average_start=1).eval()
    generator.track()
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(0.3 * torch.randn_like(p))

    def draw(method):
        torch.manual_seed(0)
        return method(torch.arange(4))

    live = draw(generator.sample)
    before = draw(generator.show)
    assert not torch.allclose(live, before)
    assert not before.requires_grad
    generator.track()  # half way
    halfway = draw(generator.show)
    assert not torch.allclose(halfway, before)
    assert torch.equal(draw(generator.sample), live)
    twin = make_generator("biggan", average_decay=0.5, average_start=1).eval()
    twin.load_state_dict(copy.deepcopy(generator.state_dict()))
    assert torch.equal(draw(twin.show), halfway)
    assert int(twin.average.updates) == 2


def test_showing_images_changes_no_buffer_even_in_training_mode():
    generator = make_generator("biggan")
    before = copy.deepcopy(generator.state_dict())
    generator.show(torch.arange(4))
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hierarchical": True}, "shared_dim is 0"),
        ({"hierarchical": True, "shared_dim": 3, "noise_dim": 7}, "multiple of 2"),
        ({"attention": 4}, "attention=4; .* there are 8"),
        ({"size": 1024}, "at most 7 times"),
    ],
)
def test_biggan_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_generator("biggan", **settings)
