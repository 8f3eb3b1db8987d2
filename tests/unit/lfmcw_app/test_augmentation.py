"""Random changes of images."""

from __future__ import annotations

import torch
from torchvision.transforms import functional as TF

from lfmcw_app.augmentation import CROP_DRAWS, adjust_colors, crop_box
from lfmcw_app.data import Batches, load_dataset
from lfmcw_app.recipe import Augmentation


def test_augmentation_crops_mirrors_and_cuts():
    digits = load_dataset("digits")
    plain = Batches(digits.train, digits, batch_size=64, seed=0).batch(0)[0]
    flipped = Batches(
        digits.train, digits, batch_size=64, seed=0, augmentation=Augmentation(flip=True)
    ).batch(0)[0]
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 10 < int(mirrored.sum()) < 54
    cropped = Batches(
        digits.train, digits, batch_size=64, seed=0, augmentation=Augmentation(crop_padding=2)
    ).batch(0)[0]
    black = float(plain.min())  # a pixel of 0, which is what a crop sees outside the image
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2), value=black)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).reshape(64, 25, 8, 8)
    assert bool((windows == cropped).flatten(2).all(2).any(1).all())
    cut = Batches(
        digits.train, digits, batch_size=64, seed=0, augmentation=Augmentation(cutout=4)
    ).batch(0)[0]
    changed = (cut != plain).flatten(1).sum(1)
    assert int(changed.max()) <= 16
    assert bool((cut[cut != plain] == 0).all())


def test_windows_have_the_areas_and_ratios_of_inception():
    draws = torch.rand(500, *CROP_DRAWS, generator=torch.Generator().manual_seed(0))
    boxes = [crop_box(400, 300, draw) for draw in draws]
    left, top, right, bottom = torch.tensor(boxes).unbind(1)
    assert bool(((left >= 0) & (top >= 0) & (right <= 400) & (bottom <= 300)).all())
    areas, ratios = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert 0.075 < float(areas.min()) < 0.12
    assert 0.9 < float(areas.max()) <= 1.0
    assert 0.74 < float(ratios.min()) < 0.78
    assert 1.28 < float(ratios.max()) < 1.35
    # What no attempt fits: the central window of the nearest ratio.
    assert crop_box(1000, 3, torch.full(CROP_DRAWS, 0.99)) == (498, 0, 502, 3)
    assert crop_box(3, 1000, torch.full(CROP_DRAWS, 0.99)) == (0, 498, 3, 502)


def test_colours_are_adjusted_as_torchvision_does():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 9, 9, generator=generator)
    images[0] = images[0, :1]  # grey: no hue
    images[1].zero_()
    factors = torch.cat(
        [
            0.6 + 0.8 * torch.rand(24, 3, generator=generator),
            torch.rand(24, 1, generator=generator) - 0.5,
        ],
        1,
    )
    order = torch.rand(24, 4, generator=generator).argsort(1)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    before = images.clone()
    result = adjust_colors(images, factors, order)
    assert torch.equal(images, before)
    for image, factor, kinds, out in zip(
        images, factors.tolist(), order.tolist(), result, strict=True
    ):
        for kind in kinds:
            image = adjust[kind](image, factor[kind])
        assert torch.allclose(out, image, atol=2e-6)
    unchanged = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(24, 4)
    assert torch.equal(adjust_colors(images, unchanged, order), images)
    grey = adjust_colors(images[:, :1], factors, order)
    assert grey.shape == (24, 1, 9, 9)


def test_jitter_stays_within_its_strength(imagenet):
    data = load_dataset("imagenet", imagenet, image_size=16)
    how = Augmentation(color_jitter=(0.4, 0.0, 0.0, 0.0))
    plain = Batches(data.train, data, batch_size=60, seed=0).batch(0)[0]
    bright = Batches(data.train, data, batch_size=60, seed=0, augmentation=how).batch(0)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    ratio = (bright * std + mean).flatten(1).mean(1) / (plain * std + mean).flatten(1).mean(1)
    assert 0.6 <= float(ratio.min()) < 0.75
    assert 1.1 < float(ratio.max()) <= 1.4001
