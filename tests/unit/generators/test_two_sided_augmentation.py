"""Random changes of real and generated images alike."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.generators import two_sided_augmentation
from lfmcw_app.generators.two_sided_augmentation import augmented_alike


def drawn(monkeypatch, *draws):
    """Lets every image have these draws, in [0, 1)."""

    def given(count, number, **options):
        assert number == len(draws)
        return torch.tensor(draws, dtype=options["dtype"]).expand(count, number)

    monkeypatch.setattr(torch, "rand", given)


NEUTRAL = {"brightness": 0.5, "saturation": 0.5, "contrast": 0.5}
CENTRE = {"down": 0.5, "right": 0.5}
CORNER = {"row": 0.0, "column": 0.0}


def changed(monkeypatch, images, **changes):
    drawn(monkeypatch, *(NEUTRAL | CENTRE | CORNER | changes).values())
    return augmented_alike(images)


def test_neutral_draws_change_nothing_outside_the_hole(monkeypatch):
    """The hole's corner is at the image's: a half less what lies outside."""
    images = torch.randn(2, 3, 16, 16)
    found = changed(monkeypatch, images)
    expected = images.clone()
    expected[:, :, :4, :4] = 0.0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("draw", "pixels"), [(0.0, -2), (0.19, -2), (0.21, -1), (0.5, 0), (0.79, 1), (0.99, 2)]
)
def test_images_move_by_up_to_an_eighth_of_their_size(monkeypatch, draw, pixels):
    images = torch.randn(1, 1, 16, 16)
    found = changed(monkeypatch, images, down=draw)
    rows = torch.zeros_like(images)
    if pixels >= 0:
        rows[:, :, : 16 - pixels] = images[:, :, pixels:]
    else:
        rows[:, :, -pixels:] = images[:, :, :pixels]
    rows[:, :, :4, :4] = 0.0
    assert torch.allclose(found, rows, atol=1e-6)


def test_the_hole_is_half_a_side_wide(monkeypatch):
    found = changed(monkeypatch, torch.ones(1, 1, 16, 16), row=0.5, column=0.5)
    hole = (found[0, 0] == 0.0).nonzero()
    assert hole.min(0).values.tolist() == [4, 4]
    assert hole.max(0).values.tolist() == [11, 11]
    assert len(hole) == 64


def test_colours_are_shifted_and_scaled(monkeypatch):
    images = torch.randn(1, 3, 4, 4)
    part = (slice(None), slice(None), slice(2, 4), slice(2, 4))  # outside the hole
    brighter = changed(monkeypatch, images, brightness=1.0)
    torch.testing.assert_close(brighter[part], images[part] + 0.5)
    grey = changed(monkeypatch, images, saturation=0.0)
    torch.testing.assert_close(grey[part], images.mean(1, keepdim=True).expand(1, 3, 4, 4)[part])
    harder = changed(monkeypatch, images, contrast=1.0)
    middle = images.mean()
    torch.testing.assert_close(harder[part], (middle + 1.5 * (images - middle))[part])


def test_gradients_pass_through():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def replayed(x):
        torch.manual_seed(3)
        return augmented_alike(x)

    assert torch.autograd.gradcheck(replayed, images)
    (gradient,) = torch.autograd.grad(replayed(images).square().sum(), images)
    assert (gradient != 0).float().mean() > 0.4


def test_each_image_has_draws_of_its_own():
    torch.manual_seed(0)
    found = augmented_alike(torch.ones(8, 1, 16, 16))
    assert len({tuple(image.flatten().tolist()) for image in found}) == 8


def test_a_part_of_a_batch_is_changed_as_in_the_whole(monkeypatch):
    """Where processes share a batch, each draws for all of it."""
    images = torch.randn(8, 3, 8, 8)
    torch.manual_seed(0)
    whole = augmented_alike(images)
    monkeypatch.setattr(two_sided_augmentation, "rank_and_size", lambda *, of_loss: (1, 2))
    monkeypatch.setattr(two_sided_augmentation, "shard", lambda draws: draws[4:])
    torch.manual_seed(0)
    assert torch.equal(augmented_alike(images[4:]), whole[4:])
