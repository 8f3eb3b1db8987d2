"""The forms of an image in a program: a file, a Pillow image, an array, a tensor."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lfmcw_app.errors import InputError, shown

__all__ = ["ImageLike", "picture_of"]

ImageLike = str | PathLike[str] | Image.Image | Tensor | np.ndarray[Any, Any]


def picture_of(image: ImageLike) -> Path | Image.Image:
    """The file or the Pillow image that `Decoding` takes; nothing is read.

    Args:
        image: a file, a Pillow image, a NumPy array ([H, W] or [H, W, C], as Pillow has it) or
            a tensor ([H, W] or [C, H, W], as torchvision has it) of uint8, grey ones also of
            uint16.

    Raises:
        InputError: if it is none of these.
    """
    if isinstance(image, str | PathLike):
        return Path(image)
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        array = image.detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise InputError(
            "An image is a path, a Pillow image, or an array or tensor of its pixels, got "
            f"{shown(image)}."
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    is_colour = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not is_colour and not (array.ndim == 2 and array.dtype in (np.uint8, np.uint16)):
        raise InputError(
            "An array of an image has the shape [H, W] or [H, W, C], a tensor [H, W] or [C, "
            "H, W], with 1, 3 or 4 channels of uint8, or grey ones of uint16; got "
            f"{array.dtype} {list(image.shape)}. Give one image at a time, with its pixels as "
            "the file has them."
        )
    return Image.fromarray(array)
