"""Folders of image files, one subfolder a class: listed at once, decoded when they are read; random views of photographs."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lfmcw_app.errors import InputError

__all__ = [
    "CROP_DRAWS",
    "ImageFiles",
    "Listing",
    "adjust_colors",
    "common_size",
    "crop_box",
    "list_split",
    "random_crops",
]

Used = TypeVar("Used")

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "validation")

# What Pillow raises for files that are damaged, no images, or too large to be harmless.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

# ------------------------------------------------------------------ listing


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The image files of a folder with one subfolder a class.

    Attributes:
        paths: N files, class by class.
        labels: [N], int64: positions in `class_names`.
        class_names: names of the subfolders, sorted.
    """

    paths: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]


def list_split(folder: Path) -> tuple[Listing, Listing | None]:
    """Lists training and test images: folder/train/CLASS/* and folder/test/CLASS/* (or val, validation), or folder/CLASS/*.

    Returns:
        The training images and the test images; all images and None for a folder that is not split.

    Raises:
        InputError: if there are no images, a class is empty, or the two parts have different classes.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    if not _class_folders(folder / "train"):
        return _list_classes(folder), None
    held_out = next((folder / name for name in TEST_FOLDERS if _class_folders(folder / name)), None)
    if held_out is None:
        raise InputError(
            f"{folder} has classes in its folder train, but none in {', '.join(TEST_FOLDERS)}. Put the test images into one "
            f"of these, one folder a class; or put all class folders into {folder} itself, to have a fifth held out."
        )
    train, test = _list_classes(folder / "train"), _list_classes(held_out)
    if train.class_names != test.class_names:
        name = min(set(train.class_names) ^ set(test.class_names))
        has, lacks = ("train", held_out.name) if name in train.class_names else (held_out.name, "train")
        raise InputError(
            f"{folder} has different classes in train ({len(train.class_names)}) and {held_out.name} "
            f"({len(test.class_names)}): {name!r} is in {has} and not in {lacks}."
        )
    return train, test


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list_classes(folder: Path) -> Listing:
    classes = _class_folders(folder)
    if len(classes) < 2:
        raise InputError(
            f"{folder} needs at least two folders of images, one a class, and has {len(classes)}. For example: "
            f"{folder / 'cat' / '1.png'}, {folder / 'dog' / '1.png'}."
        )
    paths: list[str] = []
    counts = []
    for path in classes:
        with os.scandir(path) as entries:  # knows what is a file without asking for each of a million
            files = sorted(entry.path for entry in entries if entry.name.lower().endswith(SUFFIXES) and entry.is_file())
        files = [file for file in files if not os.path.basename(file).startswith(".")]
        if not files:
            raise InputError(
                f"The class folder {path} has no images (files ending in {', '.join(SUFFIXES)}). Add some, or remove it."
            )
        paths += files
        counts.append(len(files))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Listing(paths=tuple(paths), labels=labels, class_names=tuple(path.name for path in classes))


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
                f"The images have no common square size ({path} has {size[0]}×{size[1]}, the first one "
                f"{first[0]}×{first[1]}). Say to which size they are to be brought: --set data.image_size=64."
            )
    assert first is not None  # a listing has images
    return first[0]


# ------------------------------------------------------------------ reading


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFiles:
    """Images in files, used like a tensor of their pixels: an index decodes the files that it takes, and no others.

    Attributes:
        paths: all files of a listing, which its subsets share.
        rows: [N], int64: positions of these images in `paths`.
        size: height and width of what is read.
        margin: the shorter side is brought to margin · size, and the centre is cut out (ImageNet: 256 / 224).
    """

    paths: Sequence[str]
    rows: Tensor
    size: int
    margin: float = 1.0

    @classmethod
    def of(cls, listing: Listing, size: int, margin: float = 1.0) -> ImageFiles:
        """All images of a listing."""
        return cls(paths=listing.paths, rows=torch.arange(len(listing.paths)), size=size, margin=margin)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all pixels, [N, 3, size, size]."""
        return (len(self.rows), 3, self.size, self.size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Returns the pixels of the images at `indices` [B] or where it is true [N]: [B, 3, size, size], uint8.

        Raises:
            InputError: naming a file that cannot be read.
        """
        return self._read(indices, lambda image, position: _centre(image, self.size, round(self.margin * self.size)))

    def select(self, indices: Tensor) -> ImageFiles:
        """Returns the images at `indices` without reading any."""
        return replace(self, rows=self.rows[indices])

    def at_size(self, size: int) -> ImageFiles:
        """Returns the same images, to be read at another size."""
        return replace(self, size=size)

    def random_crops(self, indices: Tensor, draws: Tensor) -> Tensor:
        """Returns random crops of the images at `indices`; see `random_crops`."""
        return self._read(indices, lambda image, position: _cropped(image, draws[position], self.size))

    def _read(self, indices: Tensor, view: Callable[[Image.Image, int], Image.Image]) -> Tensor:
        rows = self.rows[indices].tolist()
        pixels = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)

        def read(position: int) -> None:
            rgb = _opened(self.paths[rows[position]], _as_rgb)
            pixels[position] = _pixels(view(rgb, position))

        # Pillow decodes without the interpreter's lock. Every image has its own place, so the order is of no account.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(read, range(len(rows))):
                pass
        return pixels


def _opened(path: str, use: Callable[[Image.Image], Used]) -> Used:
    try:
        with Image.open(path) as image:
            return use(image)
    except UNREADABLE as error:
        raise InputError(f"The image {path} cannot be read ({error}). Replace it, or remove it.") from None


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
    """Brings the shorter side to `shorter` pixels and cuts out the centre, with torchvision's rounding."""
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


# ------------------------------------------------------------------ random views

CROP_DRAWS = (10, 4)
"""Uniform numbers that a random crop takes: for each of ten attempts its area, aspect ratio, row and column."""


def crop_box(width: int, height: int, draws: Tensor) -> tuple[int, int, int, int]:
    """A window with 8% to 100% of the area and an aspect ratio of 3/4 to 4/3; the first attempt that fits.

    Args:
        width: of the image.
        height: of the image.
        draws: `CROP_DRAWS` numbers, uniform in [0, 1).

    Returns:
        Left, top, right and bottom.

    Reference: Szegedy et al., Going Deeper with Convolutions (2015), section 6, as torchvision's RandomResizedCrop.
    """
    least, most = math.log(3 / 4), math.log(4 / 3)
    for area, ratio, row, column in draws.tolist():
        pixels, aspect = width * height * (0.08 + 0.92 * area), math.exp(least + (most - least) * ratio)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(column * (width - w + 1)), int(row * (height - h + 1))
            return left, top, left + w, top + h
    # No attempt fits a very long image: the largest window of an allowed ratio, in the centre.
    w, h = max(min(width, round(height * 4 / 3)), 1), max(min(height, round(width * 4 / 3)), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _cropped(image: Image.Image, draws: Tensor, size: int) -> Image.Image:
    return image.crop(crop_box(*image.size, draws)).resize((size, size), Image.Resampling.BILINEAR)


def random_crops(pixels: Tensor | ImageFiles, indices: Tensor, draws: Tensor) -> Tensor:
    """Cuts a random window out of each image and brings it to the images' size.

    Args:
        pixels: images in memory [N, C, size, size] with one or three channels, uint8, or in files, whose windows are of
            the original image.
        indices: [B].
        draws: [B, *CROP_DRAWS], uniform in [0, 1).

    Returns:
        [B, C, size, size], uint8.
    """
    if isinstance(pixels, ImageFiles):
        return pixels.random_crops(indices, draws)
    images = (Image.fromarray(image.movedim(0, -1).squeeze(-1).numpy()) for image in pixels[indices])
    crops = [_pixels(_cropped(image, draw, pixels.shape[-1])) for image, draw in zip(images, draws, strict=True)]
    return torch.stack(crops)


def adjust_colors(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue of each image, in its own order: torchvision's ColorJitter.

    Args:
        images: [B, C, H, W] in [0, 1], with one or three channels; grey images have no saturation and hue.
        factors: [B, 4], of the four in this order; 1, 1, 1 and 0 change nothing. The hue is a part of the circle.
        order: [B, 4], permutations of 0 to 3: which of them comes first, second, ...

    Returns:
        [B, C, H, W] in [0, 1].
    """
    images = images.clone()
    adjustments = (_brightness, _contrast, _saturation, _hue) if images.shape[1] == 3 else (_brightness, _contrast)
    for step in range(4):
        for kind, adjust in enumerate(adjustments):
            members = ((order[:, step] == kind) & (factors[:, kind] != (0.0 if kind == 3 else 1.0))).nonzero()[:, 0]
            if len(members):
                factor = factors[members, kind].view(-1, 1, 1, 1).to(images)
                members = members.to(images.device)
                images[members] = adjust(images[members], factor)
    return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (factor * images).clamp(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * _grey(images).mean(dim=(1, 2, 3), keepdim=True)).clamp(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * _grey(images)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (weights * images).sum(dim=1, keepdim=True)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue (in HSV) by `shift` of the circle."""
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    scale = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(
        value == red,
        (green - blue) / scale,
        torch.where(value == green, 2.0 + (blue - red) / scale, 4.0 + (red - green) / scale),
    )
    # A channel falls from the value by the chroma as the hue moves away from its colour: red at 0, green at 2, blue at 4.
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    k = (offsets + (sector.unsqueeze(1) + 6.0 * shift)) % 6.0
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4.0 - k).clamp(0, 1)
