"""Images in files: decoded where they are read, whole or as random crops."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lfmcw_app.augmentation import crop_box
from lfmcw_app.errors import InputError
from lfmcw_app.listing import Listing

__all__ = ["ImageFiles", "NoiseImages", "common_size", "random_crops"]

Used = TypeVar("Used")

# What Pillow raises for files that are damaged, no images, or too large to be harmless.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def common_size(listings: Sequence[Listing]) -> int:
    """The height and width of all images, from their headers.

    Raises:
        InputError: if they are not all of one square size.
    """
    first: tuple[int, int] | None = None
    for path in (path for listing in listings for path in listing.paths):
        size = _opened(path, lambda image: image.size)
        first = first or size
        if size != first or size[0] != size[1]:
            raise InputError(
                f"The images have no common square size ({path} has {size[0]}×{size[1]}, the first "
                f"one {first[0]}×{first[1]}). Say to which size they are to be brought: --set "
                "data.image_size=64."
            )
    assert first is not None  # a listing has images
    return first[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFiles:
    """Images in files, used like a tensor of their pixels: indexing decodes those files only.

    Attributes:
        paths: all files of a listing, which its subsets share.
        rows: [N], int64: positions of these images in `paths`.
        size: height and width of what is read.
        margin: the shorter side is brought to margin · size, and the centre is cut out (ImageNet:
            256 / 224).
    """

    paths: Sequence[str]
    rows: Tensor
    size: int
    margin: float = 1.0

    @classmethod
    def of(cls, listing: Listing, size: int, margin: float = 1.0) -> ImageFiles:
        """All images of a listing."""
        return cls(
            paths=listing.paths, rows=torch.arange(len(listing.paths)), size=size, margin=margin
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all pixels, [N, 3, size, size]."""
        return (len(self.rows), 3, self.size, self.size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Returns the pixels of the images at `indices`: [B, 3, size, size], uint8.

        `indices` is [B], or a mask [N].

        Raises:
            InputError: naming a file that cannot be read.
        """
        shorter = round(self.margin * self.size)
        return self._read(indices, lambda image, position: _centre(image, self.size, shorter))

    def select(self, indices: Tensor) -> ImageFiles:
        """Returns the images at `indices` without reading any."""
        return replace(self, rows=self.rows[indices])

    def at_size(self, size: int) -> ImageFiles:
        """Returns the same images, to be read at another size."""
        return replace(self, size=size)

    def random_crops(self, indices: Tensor, draws: Tensor) -> Tensor:
        """Returns random crops of the images at `indices`; see `random_crops`."""
        return self._read(
            indices, lambda image, position: _cropped(image, draws[position], self.size)
        )

    def _read(self, indices: Tensor, view: Callable[[Image.Image, int], Image.Image]) -> Tensor:
        rows = self.rows[indices].tolist()
        pixels = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)

        def read(position: int) -> None:
            rgb = _opened(self.paths[rows[position]], _as_rgb)
            pixels[position] = _pixels(view(rgb, position))

        # Pillow releases the interpreter's lock while it decodes. Every image has its own place, so
        # the order in which they are done does not matter.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(read, range(len(rows))):
                pass
        return pixels


@dataclass(frozen=True, kw_only=True)
class NoiseImages(ImageFiles):
    """Random pixels in place of files, a function of the row: to try a recipe without data."""

    @classmethod
    def many(cls, count: int, size: int, first: int = 0) -> NoiseImages:
        """`count` images of `size` pixels, different from those of other rows."""
        return cls(paths=(), rows=torch.arange(first, first + count), size=size)

    def _read(self, indices: Tensor, view: Callable[[Image.Image, int], Image.Image]) -> Tensor:
        pixels = []
        for row in self.rows[indices].tolist():
            generator = torch.Generator().manual_seed(row)
            shape = (3, self.size, self.size)
            pixels.append(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
        return torch.stack(pixels)


def _opened(path: str, use: Callable[[Image.Image], Used]) -> Used:
    try:
        with Image.open(path) as image:
            return use(image)
    except UNREADABLE as error:
        raise InputError(
            f"The image {path} cannot be read ({error}). Replace it, or remove it."
        ) from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip these to 255 instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, of unknown range; save it with 8 bits")
    return image.convert("RGB")


def _pixels(image: Image.Image) -> Tensor:
    """[H, W] or [H, W, C] of Pillow → [C, H, W], uint8."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(-1, 0)


def _centre(image: Image.Image, size: int, shorter: int) -> Image.Image:
    """Resizes the shorter side to `shorter` pixels and crops the centre, as torchvision does."""
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


# ------------------------------ random views


def _cropped(image: Image.Image, draws: Tensor, size: int) -> Image.Image:
    return image.crop(crop_box(*image.size, draws)).resize((size, size), Image.Resampling.BILINEAR)


def random_crops(pixels: Tensor | ImageFiles, indices: Tensor, draws: Tensor) -> Tensor:
    """Cuts a random window out of each image and brings it to the images' size.

    Args:
        pixels: images in memory [N, C, size, size] with one or three channels, uint8, or in files,
            whose windows are of the original image.
        indices: [B].
        draws: [B, *CROP_DRAWS], uniform in [0, 1).

    Returns:
        [B, C, size, size], uint8.
    """
    if isinstance(pixels, ImageFiles):
        return pixels.random_crops(indices, draws)
    crops = []
    for image, draw in zip(pixels[indices], draws, strict=True):
        picture = Image.fromarray(image.movedim(0, -1).squeeze(-1).numpy())
        crops.append(_pixels(_cropped(picture, draw, pixels.shape[-1])))
    return torch.stack(crops)
