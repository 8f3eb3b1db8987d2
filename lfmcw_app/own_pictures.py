"""Your own pictures, given one after another, each as a file, an image or an array.

Unlike the images of one tensor, they may have any size. They become pixels as those of a folder do.
They are fetched once and one at a time: a data set may decode files as it is indexed, and need not
bear threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfmcw_app.decoding import DamagedImage, Decoding, damaged_images
from lfmcw_app.errors import InputError, listed, shown
from lfmcw_app.image_forms import picture_of
from lfmcw_app.image_survey import DecodingOptions, Header, Reading, common_size, header_of

__all__ = ["Decoded", "decoded_parts", "pairs_of"]

READ_TWICE = 8
"""Items of a data set that are fetched a second time, to notice random transforms."""

PLAIN = (
    "Leave out transforms that normalise, such as ToTensor and Normalize: pixels are whole "
    "numbers from 0 to 255, as PILToTensor gives them."
)


class Decoded(NamedTuple):
    """The pictures of a part.

    Attributes:
        pixels: [N, C, size, size], uint8.
        labels: of the N pictures, as they were given.
    """

    pixels: Tensor
    labels: list[Any]


def decoded_parts(
    parts: Mapping[str, Any], size: int | None, options: DecodingOptions
) -> tuple[dict[str, Decoded], Reading, str]:
    """Decodes the pictures of all parts of a data set, the training images first.

    Args:
        parts: "The training images of …", for messages, and the other parts → what `pairs_of`
            takes.
        size: height and width of the pixels; None if all pictures have one size.
        options: what the recipe says of how pictures become pixels.

    Returns:
        The pictures of each part; what was read of all; and which damaged ones were left out, ""
        without any.

    Raises:
        InputError: for what is no picture, or pictures that do not fit together.
    """
    if options.bits is not None:
        raise InputError(
            f"data.bits is {options.bits}, but it is for files of more than 8 bits in a folder of "
            "images (folder:PATH). Drop it."
        )
    reader = _Reader(size, options)
    made = {where: reader.part(where, given) for where, given in parts.items()}
    if reader.damaged and options.on_damaged == "stop":
        raise damaged_images(reader.damaged)
    for where, pictures in made.items():
        if not pictures.labels:
            raise InputError(f"{where}: none can be read.")
    assert reader.decoding is not None
    left_out = ""
    if reader.damaged:
        names = listed([error.name for error in reader.damaged])
        left_out = f"{len(reader.damaged):,} skipped: damaged ({names})"
    return made, Reading.of(reader.headers, reader.decoding), left_out


class _Reader:
    """Reads part after part.

    Attributes:
        decoding: how the pictures become pixels; known once the first one is opened.
        headers: of all pictures read so far.
        damaged: those that cannot be read.
    """

    def __init__(self, size: int | None, options: DecodingOptions) -> None:
        self._size, self._options = size, options
        self.decoding: Decoding | None = None
        self.headers: list[Header] = []
        self.damaged: list[DamagedImage] = []

    def part(self, where: str, given: Any) -> Decoded:
        """Decodes the pictures of a part."""
        pixels: list[Tensor] = []
        labels: list[Any] = []
        places: list[int] = []
        for place, (picture, label) in enumerate(pairs_of(where, given)):
            name = _named(where, place, picture)
            try:
                pixels.append(self._decoded(name, picture))
            except DamagedImage as error:
                self.damaged.append(error)
            else:
                labels.append(label)
                places.append(place)
        if not labels:
            return Decoded(torch.empty(0), [])
        assert self.decoding is not None
        if _is_indexed(given):
            for place, known in list(zip(places, pixels, strict=True))[:READ_TWICE]:
                again = self.decoding.decode(picture_of(given[place][0]))
                _check_equal(where, place, known, again)
        # The training images decide on the channels, and each is fetched once. So they are read in
        # three, which are equal where an image is grey.
        if self._options.channels is None and all(header.grey for header in self.headers):
            self.decoding = replace(self.decoding, channels=1)
            pixels = [image[:1] for image in pixels]
        return Decoded(torch.stack(pixels), labels)

    def _decoded(self, name: str, picture: Any) -> Tensor:
        """Decodes a picture.

        Raises:
            DamagedImage: if it cannot be read.
            InputError: if it is no picture, has more than 8 bits, or has not the size of all.
        """
        try:
            source = picture_of(picture)
        except InputError as error:
            dtype = str(getattr(picture, "dtype", ""))
            raise InputError(f"{name}: {error}{f' {PLAIN}' if 'float' in dtype else ''}") from None
        try:
            header = header_of(source)
            if header.depth != "8 bits":
                raise InputError(
                    f"{name} has {header.depth} of more than 8 bits. Save such images in a folder "
                    "(folder:PATH), where they are read at full precision, or bring them to 8 bits."
                )
            if self._size is None and self.headers:
                sizes = [self.headers[0].size, header.size]
                common_size(["the first", name], sizes, self._options.fit)
            if self.decoding is None:
                how = self._options
                self.decoding = Decoding(
                    size=self._size or common_size([name], [header.size], how.fit),
                    fit=how.fit,
                    channels=how.channels or 3,
                    background=how.background,
                )
            pixels = self.decoding.decode(source)
        except DamagedImage as error:
            raise DamagedImage(name, error.reason) from None
        self.headers.append(header)
        return pixels


def pairs_of(where: str, given: Any) -> Iterator[tuple[Any, Any]]:
    """Yields picture and label of a part.

    Args:
        where: the part, for messages.
        given: a pair of pictures and their labels, each in any order that can be iterated; or a
            data set (or another iterable) whose items are pairs of a picture and its label.

    Raises:
        InputError: if it is neither.
    """
    if isinstance(given, tuple | list) and len(given) == 2:
        pictures, labels = given
        try:
            yield from zip(pictures, labels, strict=True)
        except ValueError as error:
            if not str(error).startswith("zip() argument"):
                raise
            raise InputError(f"{where}: there must be as many images as labels.") from None
        return
    for place, item in enumerate(_items(where, given)):
        if isinstance(item, Mapping):
            keys = listed(list(map(str, item)))
            raise InputError(
                f"{where}: item {place} is a mapping with the keys {keys}. Give the columns of "
                'images and of labels as a pair, for example (data["image"], data["label"]), or '
                "items that are pairs."
            )
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(
                f"{where}: item {place} must be a pair of an image and its label, got "
                f"{shown(item)}."
            )
        yield item[0], item[1]


def _items(where: str, given: Any) -> Iterable[Any]:
    # A data set of PyTorch need not say where it ends other than by its length.
    if _is_indexed(given):
        return (given[place] for place in range(len(given)))
    if not isinstance(given, Iterable):
        raise InputError(
            f"{where} must be a pair of images and labels, or a data set of such pairs, got "
            f"{shown(given)}."
        )
    return given


def _is_indexed(given: Any) -> bool:
    """Whether it is a data set whose items can be fetched again."""
    is_pair = isinstance(given, tuple | list) and len(given) == 2
    return not is_pair and hasattr(given, "__getitem__") and hasattr(given, "__len__")


def _named(where: str, place: int, picture: Any) -> str:
    return os.fspath(picture) if isinstance(picture, str | PathLike) else f"{where}: item {place}"


def _check_equal(where: str, place: int, known: Tensor, again: Tensor) -> None:
    """Refuses an item that is another one when it is fetched again.

    Random transforms would be drawn once and kept, and a resumed run would find other data.
    """
    if not torch.equal(known, again):
        raise InputError(
            f"{where}: item {place} is another image each time it is read. Leave random transforms "
            "out; the recipe has its own, in search.augmentation and evaluation.augmentation."
        )
