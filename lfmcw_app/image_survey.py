"""Reads the headers of a folder's image files and decides how all of them are decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import compress
from pathlib import Path
from typing import Literal, TypeVar

import torch

from lfmcw_app.decoding import (
    Background,
    DamagedImage,
    Decoding,
    Fit,
    Source,
    damaged_images,
    opened,
    orientation_of,
    value_range,
)
from lfmcw_app.deep_pixels import Depth, deep_values, depth_of, is_grey
from lfmcw_app.errors import InputError, listed
from lfmcw_app.folders import FolderListing, Listing
from lfmcw_app.recipe import Data

__all__ = [
    "DecodingOptions", "Header", "Reading", "common_size", "header_of", "in_threads", "survey",
    "without_damaged",
]  # fmt: skip

Item = TypeVar("Item")
Result = TypeVar("Result")
Size = tuple[int, int]

CHECKED = 20_000
"""Maximum number of files that are read after a damaged one, to name all damaged ones."""
FEW_LEVELS = 1 / 8
"""Share of the range: if half of the images stay below it, single values stretch the range."""
LARGE_LOSS, LARGE_SHARE = 1 / 4, 1 / 4
"""Share of an image that a crop may cut off, and share of images that may lose it unsaid."""
ON_THEIR_SIDE = (5, 6, 7, 8)
"""Orientations of EXIF with width and height exchanged."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """What a recipe says of how files become pixels; the keys of its section `data`.

    Attributes:
        fit: how an image becomes square; see `Decoding`.
        channels: 1 or 3; None for 1 where all training images are grey, and 3 otherwise.
        bits: 2 ** bits - 1 becomes white; None: the highest value of the training images does.
        background: the colour behind transparent pixels.
        on_damaged: whether files that cannot be read are an error, or left out.
    """

    fit: Fit = "crop"
    channels: Literal[1, 3] | None = None
    bits: int | None = None
    background: Background = "white"
    on_damaged: Literal["stop", "skip"] = "stop"

    @classmethod
    def of(cls, data: Data) -> DecodingOptions:
        """Those of a recipe's section."""
        return cls(**{field.name: getattr(data, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known of an image before its pixels are decoded.

    Attributes:
        size: width and height, turned upright.
        depth: what its pixels are.
        grey: whether it has no colours.
        turned: whether its EXIF data turn it.
        transparent: whether it may have transparency.
        several: whether the file has several pictures.
    """

    size: Size
    depth: Depth
    grey: bool
    turned: bool
    transparent: bool
    several: bool


def header_of(source: Source) -> Header:
    """Reads the header of a file, or of a Pillow image.

    Raises:
        DamagedImage: if it cannot be read.
    """
    with opened(source) as image:
        orientation = orientation_of(image)
        # Pillow gives the size of a TIFF after it is turned upright.
        lies = orientation in ON_THEIR_SIDE and image.format != "TIFF"
        return Header(
            size=(image.height, image.width) if lies else image.size,
            depth=depth_of(image),
            grey=is_grey(image),
            turned=orientation != 1,
            transparent=image.has_transparency_data,
            several=getattr(image, "is_animated", False),
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read of a folder's files.

    Attributes:
        images: number of all.
        smallest: width and height of the smallest image, turned upright.
        largest: width and height of the largest image.
        not_square: number of images that are cropped, padded or stretched.
        cut: number of images of which a crop leaves out `LARGE_LOSS` of the area or more.
        turned: number of images that their EXIF data turn.
        transparent: number of images that may have transparency.
        several: number of files with several pictures, of which the first is read.
        made_grey: number of images whose colours are dropped.
        decoding: how they become pixels.
        measured: the lowest and the highest value of the training images, where they have more
            than 8 bits.
        mostly_below: the value that half of the training images stay below, where that leaves them
            few levels; None otherwise.
    """

    images: int
    smallest: Size
    largest: Size
    not_square: int
    cut: int
    turned: int
    transparent: int
    several: int
    made_grey: int
    decoding: Decoding
    measured: tuple[float, float] | None = None
    mostly_below: float | None = None

    @classmethod
    def of(
        cls,
        headers: Sequence[Header],
        decoding: Decoding,
        measured: tuple[float, float] | None = None,
        mostly_below: float | None = None,
    ) -> Reading:
        """What was read of images with these headers, of which there is at least one."""
        sizes = [header.size for header in headers]
        return cls(
            smallest=min(sizes, key=_area),
            largest=max(sizes, key=_area),
            images=len(sizes),
            not_square=sum(width != height for width, height in sizes),
            cut=sum(map(_loses_much, sizes)) if decoding.fit == "crop" else 0,
            turned=sum(header.turned for header in headers),
            transparent=sum(header.transparent for header in headers),
            several=sum(header.several for header in headers),
            made_grey=sum(not header.grey for header in headers) if decoding.channels == 1 else 0,
            decoding=decoding,
            measured=measured,
            mostly_below=mostly_below,
        )

    def summary(self) -> str:
        """All of it, as a part of a sentence."""
        how = self.decoding
        sizes = " to ".join(dict.fromkeys(map(_shown, (self.smallest, self.largest))))
        made = _shown((how.size, how.size))
        said = [
            made if sizes == made else f"{sizes} → {made}",
            f"{how.channels} channel{'s' * (how.channels > 1)}",
            f"values {self._values()}",
        ]
        cropped = "cropped to a square"
        if self.cut > LARGE_SHARE * self.images:
            cropped += (
                f" ({self.cut:,} lose a quarter of their area or more: objects at the edge are cut "
                "off, and --set data.fit=pad keeps them)"
            )
        fitted = {"crop": cropped, "pad": "padded with black", "stretch": "stretched"}
        counts = {
            fitted[how.fit]: self.not_square,
            "turned upright by their EXIF data": self.turned,
            f"with transparency, laid over {how.background}": self.transparent,
            "with several pictures, of which the first is read": self.several,
            "with colours, made grey": self.made_grey,
        }
        said += [f"{count:,} {words}" for words, count in counts.items() if count]
        return ", ".join(said)

    def _values(self) -> str:
        low, high = self.decoding.low, self.decoding.high
        if low is None or high is None or self.measured is None:
            return "0–255"
        said = f"{low:,.6g} to {high:,.6g} → 0–255"
        if self.measured[0] < low or self.measured[1] > high:
            found = f"{self.measured[0]:,.6g} to {self.measured[1]:,.6g}"
            said += f" (the training images have {found}: values outside are clipped)"
        if self.mostly_below is not None:
            said += (
                f" (half of the training images stay below {self.mostly_below:,.6g}: set "
                "data.bits to clip higher values)"
            )
        return said


def survey(
    train: Sequence[str], others: Sequence[str], options: DecodingOptions, size: int | None
) -> tuple[Decoding, Reading]:
    """Decides how the files of a folder are decoded.

    The headers of all files are read. Files of more than 8 bits are read in full if their range is
    measured. Channels and range are those of the training images.

    Args:
        train: the files of the training images.
        others: those of validation and test images.
        options: what the recipe says.
        size: of the pixels; None for the size of the files.

    Raises:
        InputError: naming files that cannot be read, or that do not fit together.
    """
    paths = [*train, *others]
    headers = _all_read(in_threads(header_of, paths), paths)
    depths = _depths(paths, headers, options)
    channels: Literal[1, 3] = 1 if all(header.grey for header in headers[: len(train)]) else 3
    if options.channels is not None:
        channels = options.channels
    low = high = measured = mostly_below = None
    if depths != {"8 bits"}:
        deep = [header.depth != "8 bits" for header in headers[: len(train)]]
        measured, mostly_below = _measured(list(compress(train, deep)), paths)
        low, high = measured
    if options.bits is not None:
        low, high = 0.0, 2.0**options.bits - 1
    sizes = [header.size for header in headers]
    decoding = Decoding(
        size=size or common_size(paths, sizes, options.fit),
        fit=options.fit,
        channels=channels,
        low=low,
        high=high,
        takes_8_bits=low is None or options.bits is not None,
        background=options.background,
    )
    if options.bits is not None:
        mostly_below = None
    return decoding, Reading.of(headers, decoding, measured, mostly_below)


def without_damaged(listing: FolderListing) -> FolderListing:
    """The listing without the files that cannot be read. Each file is read in full for this.

    Raises:
        InputError: if a class has no other files.
    """
    parts: dict[str, Listing] = {}
    names: list[str] = []
    for part, images in listing.parts.items():
        found = in_threads(_check, images.paths)
        damaged = [result for result in found if isinstance(result, DamagedImage)]
        sound = torch.tensor([not isinstance(result, DamagedImage) for result in found])
        parts[part] = images.select(sound.nonzero()[:, 0])
        names += ["/".join(Path(image.name).parts[-2:]) for image in damaged]
        left = torch.bincount(parts[part].labels, minlength=len(images.class_names))
        if int(left.min()) == 0:
            name = images.class_names[int(left.argmin())]
            raise InputError(f"No image of class {name!r} can be read. {damaged_images(damaged)}")
    kinds = dict(listing.skipped)
    if names:
        kinds[f"damaged ({listed(names)})"] = len(names)
    return replace(listing, parts=parts, skipped=kinds)


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item]
) -> list[Result | DamagedImage]:
    """The results of a function that reads files, in the items' order; its error if one is damaged.

    Any other error is raised.
    """

    def result(item: Item) -> Result | DamagedImage:
        try:
            return function(item)
        except DamagedImage as error:
            return error

    # Pillow releases the interpreter's lock while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(result, items))


# ------------------------------ whole files


def _check(path: str) -> None:
    """Reads a file whole."""
    with opened(path) as image:
        if depth_of(image) == "8 bits":
            image.load()
        else:
            deep_values(image)


def _all_read(results: Sequence[Result | DamagedImage], paths: Sequence[str]) -> list[Result]:
    """The results, if no file is damaged.

    Raises:
        InputError: naming the damaged ones, including those whose damage shows only in a full read.
    """
    read = [result for result in results if not isinstance(result, DamagedImage)]
    if len(read) == len(results):
        return read
    found = in_threads(_check, paths) if len(paths) <= CHECKED else results
    raise damaged_images([result for result in found if isinstance(result, DamagedImage)])


# ------------------------------ what is decided


def _shown(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def _loses_much(size: Size) -> bool:
    return 1 - min(size) / max(size) >= LARGE_LOSS


def _area(size: Size) -> tuple[int, Size]:
    return size[0] * size[1], size


def common_size(names: Sequence[str], sizes: Sequence[Size], fit: Fit) -> int:
    """The side of the square that images of one size become.

    Raises:
        InputError: if they have several sizes.
    """
    for name, size in zip(names, sizes, strict=True):
        if size != sizes[0]:
            raise InputError(
                f"The images have no common size ({name} has {_shown(size)}, the first one "
                f"{_shown(sizes[0])}). Set the size to scale them to: --set data.image_size=64."
            )
    return min(sizes[0]) if fit == "crop" else max(sizes[0])


def _depths(
    paths: Sequence[str], headers: Sequence[Header], options: DecodingOptions
) -> set[Depth]:
    """The kinds of pixels that there are.

    Raises:
        InputError: if they have no common range.
    """
    first: dict[Depth, str] = {}
    counts: dict[Depth, int] = {}
    for path, header in zip(paths, headers, strict=True):
        first.setdefault(header.depth, path)
        counts[header.depth] = counts.get(header.depth, 0) + 1
    has_floats = "floating-point numbers" in first
    if options.bits is not None and (has_floats or first.keys() == {"8 bits"}):
        what = "some files have floating-point numbers" if has_floats else "all files have 8 bits"
        raise InputError(
            f"data.bits is {options.bits}, but it applies only to whole numbers of more than 8 "
            f"bits, and {what} ({first['floating-point numbers' if has_floats else '8 bits']}). "
            "Drop it."
        )
    if len(first) > (2 if options.bits is not None else 1):
        kinds = "; ".join(
            f"{counts[depth]:,} files have {_described(depth)}, such as {path}"
            for depth, path in first.items()
        )
        advice = "" if has_floats else (
            " Or set data.bits, so that 2 ** bits - 1 is white in the deeper ones."
        )  # fmt: skip
        raise InputError(
            f"The values of the images have no common range: {kinds}. Save all of them "
            f"alike.{advice}"
        )
    return set(first)


def _described(depth: Depth) -> str:
    return "whole numbers of more than 8 bits" if depth == "integers" else depth


def _measured(
    train: Sequence[str], paths: Sequence[str]
) -> tuple[tuple[float, float], float | None]:
    """The lowest and highest value and, if it is low, the value that half of the images stay below.

    Raises:
        InputError: if all values are one.
    """
    if not train:
        raise InputError(
            "Some images have more than 8 bits, but none of the training images has. Save all of "
            "them alike."
        )
    ranges = _all_read(in_threads(value_range, train), paths)
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low == high:
        raise InputError(
            f"All pixels of all training images have the value {low:g} ({train[0]} and others). "
            "Are the files right?"
        )
    median = sorted(high for _, high in ranges)[len(ranges) // 2]
    return (low, high), median if median - low < FEW_LEVELS * (high - low) else None
