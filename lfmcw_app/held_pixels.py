"""Whether the pixels of image files are held in memory, or read when they are used."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from lfmcw_app.image_files import ImageFiles, all_pixels
from lfmcw_app.memory import memory_of

__all__ = ["SHARE", "pixels_of", "total_memory"]

SHARE = 0.25
"""The pixels of a data set may take this share of the memory that the process may use."""


def pixels_of(parts: Sequence[ImageFiles], in_memory: bool | None) -> list[Tensor | ImageFiles]:
    """Returns the pixels of a data set's parts: all of them decoded, or all of them still in files.

    Both give the same batches, except that random windows (`resized_crop`) are cut out of the
    original image where it is in a file, and out of the one brought to its size where it is not.

    Args:
        parts: the image files.
        in_memory: the choice; None decodes them if that takes no more than `SHARE` of the memory.
            The answer is the same for each run on a machine: it depends on the memory that exists,
            not on what is free.

    Raises:
        InputError: naming all files that cannot be read.
    """
    if in_memory is None:
        in_memory = sum(math.prod(part.shape) for part in parts) <= SHARE * total_memory()
    if not in_memory:
        return list(parts)
    return list(all_pixels(parts))


def total_memory() -> float:
    """Bytes of memory that this process may use, as far as is known.

    Processes that `torchrun` starts on one machine have equal shares.
    """
    known = memory_of(torch.device("cpu"))
    return (known or math.inf) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
