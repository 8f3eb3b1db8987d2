"""Pixels of more than 8 bits, as numbers: integers of 16 or 32 bits, and floating-point numbers.

Pillow keeps grey ones as they are (its modes I;16, I and F). Of coloured ones it keeps only the
high byte of each value, so these are read twice: once for the high bytes, once for the low.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

__all__ = [
    "Depth", "Values", "deep_values", "depth_of", "is_grey", "loses_when_loaded", "may_have_lost",
]  # fmt: skip

Depth = Literal["8 bits", "integers", "floating-point numbers"]
"""What the pixels of a file are; integers have more than 8 bits."""

BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339
"""Tags of TIFF 6.0 (Adobe, 1992)."""
WHITE_IS_ZERO, IN_PLANES, UNSIGNED, SIGNED = 0, 2, 1, 2
"""Values of the last three."""

SGI = "SGI16"
"""Pillow's decoder of SGI files of 16 bits, which keeps the high bytes."""

GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of Pillow without colours."""


UNSURE = {
    "FITS": ("L", "I", "F", "I;16"),
    "PNG": ("LA", "RGB", "RGBA"),
    "PPM": ("I", "RGB"),
    "SGI": ("L", "RGB", "RGBA"),
}
"""Format → modes of a loaded image that do not tell whether its file had other values."""


class Values(NamedTuple):
    """The pixels of an image.

    Attributes:
        colours: [H, W, 1] grey or [H, W, 3] red, green and blue, float64, as the file holds them.
        opacity: [H, W, 1] in [0, 1]; None for an image without transparency.
    """

    colours: NDArray[np.float64]
    opacity: NDArray[np.float64] | None


def depth_of(image: Image.Image) -> Depth:
    """What the pixels of an opened file are. It is not to have been loaded.

    Raises:
        ValueError: if they mean something that is not supported.
    """
    if image.format == "FITS" and _tiles(image):
        _check_fits(image)
    if image.mode == "F":
        return "floating-point numbers"
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(BITS_PER_SAMPLE, (8,)))
    if bits <= 8 and SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError("its values of 8 bits have a sign; save it with 16 bits, or from 0 to 255")
    deep = (
        image.mode == "I"
        or image.mode.startswith("I;16")
        or ";16" in _layout(image)
        or bits > 8
        or (_largest_of_ppm(image) or 255) > 255
        or SGI in _codecs(image)
    )
    return "integers" if deep else "8 bits"


def is_grey(image: Image.Image) -> bool:
    """Whether an opened file has no colours. A palette counts as colours."""
    return image.mode in GREY or _layout(image).startswith("LA;16")


def loses_when_loaded(image: Image.Image) -> bool:
    """Whether an opened file has values that Pillow does not keep once it has loaded the image."""
    if depth_of(image) != "integers":
        return False
    kept = image.mode in GREY and not _layout(image).startswith("LA;16")
    return not kept or (_largest_of_ppm(image) or 65535) < 65535 or SGI in _codecs(image)


def may_have_lost(image: Image.Image) -> bool:
    """Whether a loaded image could be the rest of a file that `loses_when_loaded`."""
    if not isinstance(image, ImageFile.ImageFile) or _tiles(image):
        return False
    if image.format == "TIFF":  # it keeps its tags
        return depth_of(image) == "integers" and image.mode not in GREY
    return image.mode in UNSURE.get(image.format or "", ())


def deep_values(image: Image.Image) -> Values:
    """Reads the pixels of an opened file whose `depth_of` is not 8 bits.

    Raises:
        ValueError: if they are not finite, or mean something that is not served.
        OSError: or another error of Pillow, if the file is damaged.
    """
    tags = getattr(image, "tag_v2", {})
    # What is unknown once it is loaded.
    layout, largest, codecs = _layout(image), _largest_of_ppm(image), _codecs(image)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        raise ValueError("its values of more than 8 bits count from white; save it as PNG")
    if tags.get(PLANAR) == IN_PLANES and len(tags[BITS_PER_SAMPLE]) > 1:
        raise ValueError("its colours of 16 bits lie in separate planes; save it as PNG")
    if layout.startswith("LA;16"):
        # Bytes: grey high, grey low, opacity high, opacity low.
        pixels = _loaded(image, "RGBA")
        values = _joined(pixels[..., 0::2], pixels[..., 1::2])
    elif layout.startswith(("RGB;16", "RGBA;16", "RGBX;16")):
        values = _joined(*_bytes(image, layout))
    elif image.mode not in GREY or SGI in codecs:
        raise ValueError(
            f"its values of more than 8 bits ({layout}) are not supported; save it as PNG"
        )
    else:
        values = _loaded(image)[..., None]
        if tags.get(BITS_PER_SAMPLE) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (UNSIGNED,):
            values = values.view(np.uint32) if values.dtype == np.int32 else values
        if largest is not None and largest < 65535:  # Pillow has brought it to this
            values = np.rint(values * (largest / 65535.0))
    return _parted(values.astype(np.float64), image)


def _parted(values: NDArray[np.float64], image: Image.Image) -> Values:
    """Colours and opacity."""
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers; replace them")
    channels = values.shape[2]
    if channels in (2, 4) and image.mode != "RGBX":
        return Values(values[..., :-1], values[..., -1:] / 65535.0)
    colours = values[..., :3]
    transparent = image.info.get("transparency")  # one colour of a PNG that has no opacity
    if transparent is None:
        return Values(colours, None)
    seen = (colours != np.asarray(transparent, dtype=np.float64)).any(axis=2, keepdims=True)
    return Values(colours, seen.astype(np.float64))


def _check_fits(image: Image.Image) -> None:
    """Refuses a FITS file whose pixels are not what its head makes of them; Pillow does not tell.

    The value is BZERO + BSCALE · pixel, and integers of 16 bits have a sign (FITS Standard 4.0,
    sections 4.4.1 and 4.4.2.5), which Pillow drops.

    Raises:
        ValueError: if it must be saved otherwise.
    """
    (tile,) = _tiles(image)
    assert isinstance(image, ImageFile.ImageFile)
    assert image.fp is not None
    place = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(tile.offset)
    image.fp.seek(place)
    # A later unit's cards count where the first unit has no pixels.
    cards = {
        head[start : start + 8].rstrip(): head[start + 10 : start + 80].split(b"/")[0].strip()
        for start in range(0, len(head), 80)
        if head[start + 8 : start + 10] == b"= "
    }

    def number(name: bytes, default: bytes) -> float:
        return float(cards.get(name, default).replace(b"D", b"E"))

    if (
        tile.codec_name != "raw"
        or image.mode.startswith("I;16")
        or number(b"BSCALE", b"1") != 1
        or number(b"BZERO", b"0") != 0
        or number(b"NAXIS3", b"1") != 1
    ):
        raise ValueError(
            "FITS files with integers of 16 bits, scaled values (BSCALE, BZERO), several planes or "
            "compression are not supported; save it as TIFF of floating-point numbers"
        )


def _tiles(image: Image.Image) -> list[Any]:
    """What must still be read of an opened file; nothing for an image in memory."""
    return list(image.tile) if isinstance(image, ImageFile.ImageFile) else []


def _codecs(image: Image.Image) -> set[str]:
    return {tile.codec_name for tile in _tiles(image)}


def _layout(image: Image.Image) -> str:
    """How the file's bytes become Pillow's pixels: "RGB;16B", for instance."""
    for tile in _tiles(image):
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        return next((name for name in arguments if isinstance(name, str)), "")
    return ""


def _largest_of_ppm(image: Image.Image) -> int | None:
    """The largest value that the head of a PPM or PGM file names, where it is not 255 or 65535."""
    for tile in _tiles(image):
        if tile.codec_name == "ppm":
            return int(tile.args[1])
    return None


def _bytes(image: Image.Image, layout: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The high bytes and the low bytes of colours of 16 bits."""
    # The low bytes are the high ones to a reader that takes the other order of bytes. N is that of
    # the machine, to which libtiff brings what it decodes.
    name, order = layout[:-1], layout[-1]
    if order == "N":
        order = "L" if np.little_endian else "B"
    assert isinstance(image, ImageFile.ImageFile)
    assert image.fp is not None
    file = image.fp
    file.seek(0)
    with Image.open(file) as again:
        low = _loaded(again, name + {"L": "B", "B": "L"}[order])
    file.seek(0)
    return _loaded(image), low


def _loaded(image: Image.Image, layout: str | None = None) -> NDArray[Any]:
    """The image's pixels; with a layout its bytes are taken as that one."""
    if layout is not None:
        assert isinstance(image, ImageFile.ImageFile)
        image.tile = [_taken_as(tile, layout) for tile in image.tile]
    image.load()
    return np.asarray(image)


def _taken_as(tile: Any, layout: str) -> Any:
    arguments = tile.args
    if isinstance(arguments, tuple):
        return tile._replace(args=(layout, *arguments[1:]))
    return tile._replace(args=layout)


def _joined(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return high.astype(np.uint16) * np.uint16(256) + low
