"""Random changes of training images, as functions of given draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.recipe import Augmentation

__all__ = [
    "CROP_DRAWS",
    "Part",
    "adjust_colors",
    "augmented",
    "crop_box",
    "jittered",
    "rows_of",
    "sent",
]


Part = tuple[int, int]
"""(Number of a part, number of equal parts) of a batch."""


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; a GPU gets it without the CPU waiting (from pinned memory)."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # Pinned memory is not shared between entries, as that of an expanded tensor is.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def rows_of(draws: Tensor, part: Part) -> Tensor:
    """A part's rows of what was drawn for a whole batch."""
    rows = len(draws) // part[1]
    return draws[part[0] * rows : (part[0] + 1) * rows]


def augmented(
    images: Tensor,
    how: Augmentation,
    generator: torch.Generator,
    black: Tensor,
    part: Part = (0, 1),
) -> Tensor:
    """Crops, mirrors and cuts out each image of a batch at random.

    Crops see black outside the image; cut-outs are set to the mean (0).

    Args:
        images: [B, C, H, W], a part of the batch.
        how: what is changed.
        generator: draws for the whole batch.
        black: a black pixel.
        part: which part it is.
    """
    count, _, height, width = images.shape
    total = count * part[1]
    rows = torch.arange(height).expand(count, height)
    columns = torch.arange(width).expand(count, width)

    # All draws are for the whole batch, so dividing the batch does not change an image's draws.
    if how.crop_padding:
        shift = 2 * how.crop_padding + 1
        rows = rows + rows_of(torch.randint(shift, (total, 1), generator=generator), part)
        columns = columns + rows_of(torch.randint(shift, (total, 1), generator=generator), part)
        border = F.pad(torch.zeros_like(images[:1, :1]), (how.crop_padding,) * 4, value=1.0)
        images = F.pad(images, (how.crop_padding,) * 4) + border * black
    if how.flip:
        mirror = rows_of(torch.rand(total, 1, generator=generator), part) < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)

    # One gather does both: each image has its own rows and columns of the padded one.
    if how.crop_padding or how.flip:
        example = torch.arange(count, device=images.device)[:, None, None]
        rows, columns = sent(rows, images.device), sent(columns, images.device)
        pixels = images.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]]
        images = pixels.movedim(-1, 1).contiguous()

    if how.cutout:
        # DARTS's square: centred on a random pixel, clipped at the borders.
        inside = []
        for size in (height, width):
            centre = rows_of(torch.randint(size, (total, 1), generator=generator), part)
            offset = torch.arange(size) - centre
            inside.append((offset >= -(how.cutout // 2)) & (offset < how.cutout // 2))
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        images = images.masked_fill(sent(hole, images.device), 0.0)
    return images


CROP_DRAWS = (10, 4)
"""Uniform numbers of a random crop: ten attempts, each of area, aspect ratio, row and column."""


def crop_box(width: int, height: int, draws: Tensor) -> tuple[int, int, int, int]:
    """The first attempted window that fits: 8% to 100% of the area, ratio 3/4 to 4/3.

    Args:
        width: of the image.
        height: of the image.
        draws: `CROP_DRAWS` numbers, uniform in [0, 1).

    Returns:
        Left, top, right and bottom.

    Reference: Szegedy et al., Going Deeper with Convolutions (2015), section 6, as torchvision's
        RandomResizedCrop.
    """
    least, most = math.log(3 / 4), math.log(4 / 3)
    for area, ratio, row, column in draws.tolist():
        pixels = width * height * (0.08 + 0.92 * area)
        aspect = math.exp(least + (most - least) * ratio)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(column * (width - w + 1)), int(row * (height - h + 1))
            return left, top, left + w, top + h

    # No attempt fits a very long image: the largest window of an allowed ratio, in the centre.
    w, h = max(min(width, round(height * 4 / 3)), 1), max(min(height, round(width * 4 / 3)), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jittered(
    images: Tensor,
    strength: tuple[float, float, float, float],
    generator: torch.Generator,
    part: Part = (0, 1),
) -> Tensor:
    """Changes the colours of each image of a batch at random.

    Args:
        images: [B, C, H, W] in [0, 1].
        strength: largest change of brightness, contrast and saturation (around 1) and hue (around
            0, of the circle).
        generator: draws for the whole batch.
        part: which part of the batch it is.
    """
    total = len(images) * part[1]
    uniform = rows_of(torch.rand(total, 4, generator=generator), part)
    order = rows_of(torch.rand(total, 4, generator=generator), part).argsort(1)
    if not any(strength):
        return images
    middle, most = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor(strength)
    least = (middle - most).clamp(min=torch.tensor([0.0, 0.0, 0.0, -0.5]))
    return adjust_colors(images, least + (middle + most - least) * uniform, order)


def adjust_colors(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue of each image, in its own order.

    The same as torchvision's ColorJitter.

    Args:
        images: [B, C, H, W] in [0, 1], with one or three channels; grey images have no saturation
            and hue.
        factors: [B, 4], of the four in this order; 1, 1, 1 and 0 change nothing. The hue is a part
            of the circle.
        order: [B, 4], permutations of 0 to 3: which of them comes first, second, ...

    Returns:
        [B, C, H, W] in [0, 1].
    """
    images = images.clone()
    adjustments: list[Callable[[Tensor, Tensor], Tensor]] = [_brightness, _contrast]
    if images.shape[1] == 3:
        adjustments += [_saturation, _hue]
    for step in range(4):
        for kind, adjust in enumerate(adjustments):
            # The images that this adjustment changes in this step are changed together.
            neutral = 0.0 if kind == 3 else 1.0
            chosen = (order[:, step] == kind) & (factors[:, kind] != neutral)
            members = chosen.nonzero()[:, 0]
            if len(members):
                factor = sent(factors[members, kind].view(-1, 1, 1, 1), images.device)
                members = sent(members, images.device)
                images[members] = adjust(images[members], factor.to(images.dtype))
    return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (factor * images).clamp(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return (factor * images + (1 - factor) * mean).clamp(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * _grey(images)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=images.dtype, device=images.device)
    return (weights.view(1, 3, 1, 1) * images).sum(dim=1, keepdim=True)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue (in HSV) by `shift` of the circle."""
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    scale = torch.where(chroma == 0, 1.0, chroma)

    # The hue in sixths of the circle, between the two colours that are largest.
    not_red = torch.where(value == green, 2.0 + (blue - red) / scale, 4.0 + (red - green) / scale)
    sector = torch.where(value == red, (green - blue) / scale, not_red)

    # A channel falls from the value by the chroma as the hue moves away from its colour: red at 0,
    # green at 2, blue at 4.
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device)
    k = (offsets.view(1, 3, 1, 1) + (sector.unsqueeze(1) + 6.0 * shift)) % 6.0
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4.0 - k).clamp(0, 1)
