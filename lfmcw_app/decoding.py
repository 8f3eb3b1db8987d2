"""How an image file becomes pixels: turned upright, flattened, scaled to 8 bits, made square."""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from lfmcw_app.augmentation import crop_box
from lfmcw_app.bounded_files import check_regular
from lfmcw_app.deep_pixels import (
    Depth,
    Values,
    deep_values,
    depth_of,
    loses_when_loaded,
    may_have_lost,
)
from lfmcw_app.errors import InputError, listed, shown
from lfmcw_app.recipe import Channels

__all__ = [
    "Background", "DamagedImage", "Decoding", "Fit", "damaged_images", "opened", "orientation_of",
    "value_range", "window",
]  # fmt: skip

Fit = Literal["crop", "pad", "stretch"]
Background = Literal["white", "black"]
Source = Image.Image | str | Path
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]

MOST_RESIZED = 2**24
"""Pixels that an image may have after its shorter side has its size."""

NAMED = 10
"""Maximum number of damaged files named in a message."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an image file becomes pixels; kept with a network, so that new files are decoded alike.

    An image is turned upright as its EXIF data say. Transparency is laid over the background.
    Pixels of more than 8 bits are mapped linearly: `low` to 0 and `high` to 255. If a file has
    several pictures, the first one is read.

    Attributes:
        size: height and width of what is made.
        fit: "crop" brings the shorter side to margin · size and cuts out the centre; "pad" brings
            the longer side to size and fills the rest with black; "stretch" changes the ratio.
        channels: 1 for grey, 3 for red, green and blue.
        low: the value that becomes 0 in files of more than 8 bits, as do lower values; None if the
            files have 8 bits.
        high: the value that becomes 255, as do higher values.
        takes_8_bits: whether files of 8 bits are accepted beside others, with their values
            unchanged. With a measured range these would not be comparable.
        margin: for "crop"; ImageNet's is 256 / 224.
        background: the colour behind transparent pixels.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    size: Annotated[int, Field(strict=True, ge=1, le=2**14)]
    fit: Fit = "crop"
    channels: Channels = 3
    low: Finite | None = None
    high: Finite | None = None
    takes_8_bits: Annotated[bool, Field(strict=True)] = True
    margin: Annotated[float, Field(strict=True, ge=1, le=16)] = 1.0
    background: Background = "white"

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high are given together")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.margin != 1.0 and self.fit != "crop":
            raise ValueError(f"margin is for fit crop, not {self.fit}")

    def decode(self, image: Source) -> Tensor:
        """Returns the pixels of an image: [channels, size, size], uint8.

        Args:
            image: a file, or a Pillow image.

        Raises:
            DamagedImage: if it cannot be read.
            InputError: if its pixels have another depth than those of the training images.
        """
        return self._read(image, self._fitted)

    def decode_window(self, image: Source, draws: Tensor) -> Tensor:
        """Returns a random window of an image at its original resolution, scaled to the size.

        The window is nearly square and within the image, so `fit` and `margin` do not matter.

        Args:
            image: a file, or a Pillow image.
            draws: `CROP_DRAWS` numbers, uniform in [0, 1).

        Returns:
            [channels, size, size], uint8.

        Raises:
            DamagedImage: if it cannot be read.
            InputError: if its pixels have another depth than those of the training images.
        """
        return self._read(image, lambda plane: window(plane, draws, self.size))

    def to_data(self) -> dict[str, Any]:
        """Returns it as plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Decoding:
        """Makes it of the data that `to_data` returns.

        Raises:
            InputError: naming the entry that is wrong.
        """
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "all"
            raise InputError(
                f"The description of how images are decoded is damaged: {where}: {first['msg']}, "
                f"got {shown(first['input'])}. Copy the file from the run again."
            ) from None

    # ------------------------------ from a file to planes, and from planes to pixels

    def _read(self, source: Source, view: Callable[[Image.Image], Image.Image]) -> Tensor:
        with opened(source) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            self._check_whole(image)
            depth = depth_of(image)
            self._check(depth, source)
            planes = self._planes(image) if depth == "8 bits" else self._scaled(deep_values(image))
            method = UPRIGHT.get(orientation_of(image))
        if method is not None:
            planes = [plane.transpose(method) for plane in planes]
        pixels = torch.cat([_pixels(view(plane)) for plane in planes])
        return pixels.expand(self.channels, -1, -1).contiguous()

    def _check_whole(self, image: Image.Image) -> None:
        """Refuses a Pillow image that was loaded and of which values were lost by that."""
        if not may_have_lost(image):
            return
        path = getattr(image, "filename", "")
        lost = image.format == "TIFF" or _lost(path)
        if lost or (lost is None and self.low is not None):
            raise InputError(
                f"The image {'had' if lost else 'may have had'} more than 8 bits, of which Pillow "
                "has dropped some when it was loaded. Give the path of the file"
                f"{f' ({os.fsdecode(path)})' if path else ''}, or the image before it is loaded."
            )

    def _check(self, depth: Depth, source: Source) -> None:
        name = "The image" if isinstance(source, Image.Image) else f"The image {source}"
        if depth != "8 bits" and self.low is None:
            raise InputError(
                f"{name} has {depth} of more than 8 bits, but the training images have 8 bits. "
                "Save it with 8 bits too."
            )
        if depth == "8 bits" and self.low is not None and not self.takes_8_bits:
            raise InputError(
                f"{name} has 8 bits, but the training images have values from {self.low:g} to "
                f"{self.high:g}. Give it with its original values."
            )

    def _planes(self, image: Image.Image) -> list[Image.Image]:
        """An image of 8 bits without transparency, in the mode of the channels."""
        image.load()
        if image.has_transparency_data:
            colours = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, (*[self._behind] * 3, 255))
            image = Image.alpha_composite(behind, colours)
        if self.channels == 1 and image.mode == "LAB":
            image = image.convert("RGB")
        return [image.convert("L" if self.channels == 1 else "RGB")]

    def _scaled(self, values: Values) -> list[Image.Image]:
        """Planes of floating-point numbers from 0 to 255; one for grey."""
        assert self.low is not None and self.high is not None
        colours = np.clip(values.colours, self.low, self.high) - self.low
        colours *= 255.0 / (self.high - self.low)
        if values.opacity is not None:
            colours = values.opacity * colours + (1.0 - values.opacity) * self._behind
        if self.channels == 1 and colours.shape[2] == 3:
            colours = colours @ np.array([[0.299], [0.587], [0.114]])  # as Pillow's, ITU-R 601-2
        return [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(colours, 2, 0)]

    @property
    def _behind(self) -> int:
        return 255 if self.background == "white" else 0

    # ------------------------------ the size

    def _fitted(self, image: Image.Image) -> Image.Image:
        size = self.size
        if self.fit == "crop":
            return _centre(image, size, round(self.margin * size))
        if self.fit == "stretch":
            return _resized(image, (size, size))
        longer = max(image.size)
        width, height = (max(1, round(size * side / longer)) for side in image.size)
        whole = Image.new(image.mode, (size, size))
        whole.paste(_resized(image, (width, height)), ((size - width) // 2, (size - height) // 2))
        return whole


def window(image: Image.Image, draws: Tensor, size: int) -> Image.Image:
    """A random window of an image, brought to a size; see `Decoding.decode_window`."""
    return image.crop(crop_box(*image.size, draws)).resize((size, size), Image.Resampling.BILINEAR)


def _centre(image: Image.Image, size: int, shorter: int) -> Image.Image:
    """Resizes the shorter side to `shorter` pixels and crops the centre, as torchvision does."""
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    if width * height > MOST_RESIZED:  # a line of pixels: only its centre is made
        side = min(image.size) * size / shorter
        left, top = ((whole - side) / 2 for whole in image.size)
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _resized(image, (width, height)).crop((left, top, left + size, top + size))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def _pixels(image: Image.Image) -> Tensor:
    """[H, W] or [H, W, C] of Pillow → [C, H, W], uint8."""
    array = np.array(image)
    if image.mode == "F":
        array = np.rint(array).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(-1, 0)


# ------------------------------ opening a file


UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation of EXIF → what turns the picture upright, as in Pillow's ImageOps."""

# What Pillow raises for files that are damaged, are not images, or are too large to be harmless.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class DamagedImage(InputError):
    """An image that cannot be read.

    Args:
        name: of the file.
        reason: why.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"The image {name} cannot be read ({reason}). Give another one.")
        self.name, self.reason = name, reason


def damaged_images(damaged: Sequence[DamagedImage]) -> InputError:
    """One error for all of them, in a data set; the first ones are named."""
    # A run that has begun is refused with fewer files than it began with.
    skip = "in a new run, leave such files out with --set data.on_damaged=skip."
    if len(damaged) == 1:
        (image,) = damaged
        return InputError(
            f"The image {image.name} cannot be read ({image.reason}). Put a sound copy of it there "
            f"and repeat the command; or, {skip}"
        )
    named = listed([f"{image.name} ({image.reason})" for image in damaged], most=NAMED)
    return InputError(
        f"{len(damaged):,} images cannot be read: {named}. Put sound copies of them there and "
        f"repeat the command; or, {skip}"
    )


def _lost(path: str | bytes) -> bool | None:
    """Whether a file has values that a loaded image of it lacks; None if it cannot be read."""
    if not path:
        return None
    try:
        with opened(os.fsdecode(path)) as file:
            return loses_when_loaded(file)
    except DamagedImage:
        return None


@contextmanager
def _not_to_be_loaded(image: Image.Image) -> Iterator[Image.Image]:
    """A Pillow image, or the same opened anew where loading it would lose values.

    Otherwise a second call with the same image would find other values.
    """
    file = getattr(image, "fp", None)
    if file is None or file.closed or not loses_when_loaded(image):
        yield image
        return
    place, number = file.tell(), image.tell()
    file.seek(0)
    content = io.BytesIO(file.read())
    file.seek(place)
    with Image.open(content) as again:
        again.seek(number)
        yield again


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """Opens an image; errors of its format or file become a `DamagedImage`."""
    try:
        if isinstance(source, Image.Image):
            with _not_to_be_loaded(source) as image:
                yield image
            return
        # Pillow maps files that it opens by name into memory. For an uncompressed TIFF that lies on
        # its side, it then confuses height and width. So files are opened here.
        check_regular(Path(source))
        with open(source, "rb") as file, Image.open(file) as image:
            yield image
    except InputError:
        raise
    except UNREADABLE as error:
        name = "that was given" if isinstance(source, Image.Image) else str(source)
        raise DamagedImage(name, _reason(error, source)) from None


def _reason(error: BaseException, source: Source) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = not isinstance(source, Image.Image) and Path(source).stat().st_size == 0
        return "it is empty" if empty else "it is not an image of a known kind"
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
        return f"it has more than {most:,.0f} pixels; save it smaller"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def orientation_of(image: Image.Image) -> int:
    """The orientation that a file's EXIF data give; 1 (upright) where they give none.

    Pillow turns a TIFF as it loads it, after which its orientation is 1.
    """
    try:
        # A PNG's own `getexif` reads the whole file, because EXIF data may follow the pixels.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:  # all programs show pictures with damaged EXIF data as they are
        return 1
    return found if isinstance(found, int) and found in UPRIGHT else 1


def value_range(path: str) -> tuple[float, float]:
    """The lowest and highest value of the opaque pixels of a file of more than 8 bits.

    Raises:
        DamagedImage: if it cannot be read.
    """
    with opened(path) as image:
        colours, opacity = deep_values(image)
    if opacity is not None and opacity.any():
        colours = colours[(opacity > 0)[..., 0]]
    return float(colours.min()), float(colours.max())
