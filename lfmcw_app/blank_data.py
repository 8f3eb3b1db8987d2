"""Data sets without their pixels, to count a recipe's memory before anything is read.

The images are black, in the number and shape of the real ones. A data set known by its name needs
no file. In a folder of images, the files are listed and their headers read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lfmcw_app.data import IMAGENET_MEAN, IMAGENET_STD, LEAST_GPU, RESIDENT_SHARE, Dataset
from lfmcw_app.image_files import ImageFiles, NoiseImages
from lfmcw_app.readers import NOISE, Images

__all__ = ["blank"]

IN_FILES = ("imagenet",)
"""The data sets of `NOISE` that are never held in memory."""


def blank(name: str, image_size: int | None, *, in_memory: bool | None, read: Any) -> Dataset:
    """A data set whose images have the right number, shape and labels, and no pixels.

    Args:
        name: of the data set.
        image_size: larger images are reduced to this height and width; None for their own.
        in_memory: whether the images of a folder are held in memory (`data.in_memory`).
        read: reads the data set where its shape is not known by its name; of a folder's images it
            is to leave the pixels in their files.
    """
    if name in NOISE:
        return _known(name, image_size)
    return _without_pixels(read(), in_memory)


def _known(name: str, image_size: int | None) -> Dataset:
    train, test, classes, size = NOISE[name]
    size = size if image_size is None else min(size, image_size)

    def images(count: int) -> Images:
        many: Callable[[int, int], Any] = NoiseImages.many if name in IN_FILES else _black
        return Images(pixels=many(count, size), labels=torch.arange(count) % classes)

    return Dataset(
        name=name,
        train=images(train),
        test=images(test),
        class_names=tuple(f"class {label}" for label in range(classes)),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _black(count: int, size: int, channels: int = 3) -> torch.Tensor:
    """Black images, [count, channels, size, size], of a single byte."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(count, channels, size, size)


def _without_pixels(dataset: Dataset, in_memory: bool | None) -> Dataset:
    """The data set with black images instead of files, if a GPU could hold them all.

    Larger data sets stay in files: only their batches are read and sent.
    """

    def black(images: Images) -> Images:
        shape = images.pixels.shape
        held = math.prod(shape) <= RESIDENT_SHARE * LEAST_GPU and in_memory is not False
        if not (isinstance(images.pixels, ImageFiles) and held):
            return images
        return replace(images, pixels=_black(shape[0], shape[-1], shape[1]))

    held_out = dataset.validation
    return replace(
        dataset,
        train=black(dataset.train),
        test=black(dataset.test),
        validation=None if held_out is None else black(held_out),
    )
