"""Images in files, used like a tensor of their pixels and decoded when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lfmcw_app.decoding import DamagedImage, Decoding, damaged_images, window
from lfmcw_app.folders import Listing
from lfmcw_app.image_survey import in_threads

__all__ = ["ImageFiles", "NoiseImages", "all_pixels", "random_crops"]

_Read = tuple[Tensor, list[DamagedImage]]
"""Pixels [B, C, size, size], and the files that cannot be read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFiles:
    """Images in files, used like a tensor of their pixels: indexing decodes those files only.

    Attributes:
        paths: all files of a listing, which its subsets share.
        rows: [N], int64: positions of these images in `paths`.
        decoding: how a file becomes pixels.
    """

    paths: Sequence[str]
    rows: Tensor
    decoding: Decoding

    @classmethod
    def of(cls, listing: Listing, decoding: Decoding) -> ImageFiles:
        """All images of a listing."""
        return cls(paths=listing.paths, rows=torch.arange(len(listing.paths)), decoding=decoding)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all pixels, [N, C, size, size]."""
        size = self.decoding.size
        return (len(self.rows), self.decoding.channels, size, size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Returns the pixels of the images at `indices`: [B, C, size, size], uint8.

        `indices` is [B], or a mask [N].

        Raises:
            InputError: naming all of these files that cannot be read.
        """
        return _undamaged(self._read(indices, self._whole))

    def select(self, indices: Tensor) -> ImageFiles:
        """Returns the images at `indices` without reading any."""
        return replace(self, rows=self.rows[indices])

    def at_size(self, size: int) -> ImageFiles:
        """Returns the same images, to be read at another size."""
        return replace(self, decoding=replace(self.decoding, size=size))

    def random_crops(self, indices: Tensor, draws: Tensor) -> Tensor:
        """Returns random crops of the images at `indices`; see `random_crops`."""
        return _undamaged(
            self._read(indices, lambda path, k: self.decoding.decode_window(path, draws[k]))
        )

    def _whole(self, path: str, place: int) -> Tensor:
        return self.decoding.decode(path)

    def _read(self, indices: Tensor, decode: Callable[[str, int], Tensor]) -> _Read:
        """Decodes the files at `indices`, each with its place among them."""
        paths = [self.paths[row] for row in self.rows[indices].tolist()]
        pixels = torch.empty(len(paths), *self.shape[1:], dtype=torch.uint8)

        def read(place: int) -> None:
            pixels[place] = decode(paths[place], place)

        # Every image has its own place, so the order of decoding does not matter.
        results = in_threads(read, range(len(paths)))
        return pixels, [result for result in results if result is not None]


@dataclass(frozen=True, kw_only=True)
class NoiseImages(ImageFiles):
    """Random pixels in place of files, a function of the row: to try a recipe without data."""

    @classmethod
    def many(cls, count: int, size: int, first: int = 0) -> NoiseImages:
        """`count` images of `size` pixels, different from those of other rows."""
        rows = torch.arange(first, first + count)
        return cls(paths=(), rows=rows, decoding=Decoding(size=size))

    def _read(self, indices: Tensor, decode: Callable[[str, int], Tensor]) -> _Read:
        pixels = []
        for row in self.rows[indices].tolist():
            generator = torch.Generator().manual_seed(row)
            shape = self.shape[1:]
            pixels.append(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
        return torch.stack(pixels), []


def all_pixels(parts: Sequence[ImageFiles]) -> list[Tensor]:
    """The pixels of all images of some parts, [N, C, size, size] each.

    Raises:
        InputError: naming all files of all parts that cannot be read.
    """
    read = [part._read(torch.arange(len(part)), part._whole) for part in parts]
    damaged = [image for _, of_part in read for image in of_part]
    if damaged:
        raise damaged_images(damaged)
    return [pixels for pixels, _ in read]


def _undamaged(read: _Read) -> Tensor:
    pixels, damaged = read
    if damaged:
        raise damaged_images(damaged)
    return pixels


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
        crop = np.array(window(picture, draw, pixels.shape[-1]))
        crops.append(torch.from_numpy(crop.reshape(*crop.shape[:2], -1)).movedim(-1, 0))
    return torch.stack(crops)
