"""Random changes of real and generated images alike, through which a game's gradients pass.

With few images a discriminator learns them by heart. It cannot if it sees only changed images, both
real and generated. The generator still learns to draw unchanged images.

Reference: Zhao et al., Differentiable Augmentation for Data-Efficient GAN Training (2020),
    appendix: translation by 1/8 of the size, cutout of half of it, colour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlo.distributed import rank_and_size, shard

__all__ = ["augmented_alike"]

SHIFT, HOLE = 1 / 8, 1 / 2
"""Largest translation, and side of the square that is cut out, in sides of the image."""


def augmented_alike(images: Tensor) -> Tensor:
    """Changes the colours of each image at random, moves it, and cuts a square out of it.

    Draws come from the global random state, which `mlo` replays in re-evaluations. If processes
    share a batch, each draws for all of it and takes its rows.

    Args:
        images: [B, C, H, W], normalised to a mean near 0, which is what fills empty places.

    Returns:
        the same shape, differentiable in `images`.
    """
    count, _, height, width = images.shape
    whole = count * rank_and_size(of_loss=True)[1]
    draws = shard(torch.rand(whole, 7, device=images.device, dtype=images.dtype))
    brightness, saturation, contrast, *places = draws[:, :, None, None, None].unbind(1)

    # Brightness by up to a half of the deviation, saturation and contrast by a factor.
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2.0 * saturation)
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    images = middle + (images - middle) * (contrast + 0.5)

    moved = _moved(images, places[0].flatten(), places[1].flatten())
    return moved * _outside_hole(places[2], places[3], height, width).to(images.dtype)


def _moved(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Moves each image by whole pixels; pixels that enter are 0. The draws [B] are in [0, 1)."""
    count, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) + _pixels(down, height)[:, None]
    columns = torch.arange(width, device=images.device) + _pixels(right, width)[:, None]

    # One gather from the image with a border of zeros, to which places outside are clamped.
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    rows, columns = (rows + 1).clamp(0, height + 1), (columns + 1).clamp(0, width + 1)
    example = torch.arange(count, device=images.device)[:, None, None]
    found = padded.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]]
    return found.movedim(-1, 1)


def _pixels(draws: Tensor, size: int) -> Tensor:
    """Draws in [0, 1) as whole numbers from -most to most, with equal chances."""
    most = int(size * SHIFT + 0.5)
    return (draws * (2 * most + 1)).long() - most


def _outside_hole(row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Which pixels stay, [B, 1, H, W]: those outside a square around a random place."""
    inside = []
    for draw, size, shape in ((row, height, (1, 1, -1, 1)), (column, width, (1, 1, 1, -1))):
        side = int(size * HOLE + 0.5)
        centre = (draw * (size + 1 - side % 2)).long()
        offset = torch.arange(size, device=draw.device).view(shape) - centre + side // 2
        inside.append((offset >= 0) & (offset < side))
    return ~(inside[0] & inside[1])
