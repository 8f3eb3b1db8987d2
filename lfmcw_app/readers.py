"""Readers of data sets in their original formats: training and test images, class names."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfmcw_app.cifar import read_cifar
from lfmcw_app.errors import InputError
from lfmcw_app.held_pixels import pixels_of
from lfmcw_app.image_files import ImageFiles, NoiseImages, common_size
from lfmcw_app.listing import list_split
from lfmcw_app.published_files import download, places

__all__ = [
    "DATASETS",
    "FASHION_MNIST_FILES",
    "NOISE",
    "Images",
    "read_folder",
    "read_noise",
    "stratified",
]

FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images in memory or in files.

    Attributes:
        pixels: [N, C, H, W], uint8; files are decoded where `pixels` is indexed.
        labels: [N], int64.
        source: the folder or file that they come from; "" for those of a package.
    """

    pixels: Tensor | ImageFiles
    labels: Tensor
    source: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Images:
        """Returns the images at `indices`; of files none is read."""
        pixels = self.pixels
        chosen = pixels.select(indices) if isinstance(pixels, ImageFiles) else pixels[indices]
        return replace(self, pixels=chosen, labels=self.labels[indices])


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits indices in two, the first part with `count` entries and every class in proportion.

    Args:
        labels: [N].
        count: size of the first part, at most N.
        seed: seed of the shuffle.

    Returns:
        Indices of the first and of the second part, each in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)

    # The k-th of a class's n examples gets the position (k + 1/2) / n: taking the smallest
    # positions takes every class in proportion, and rounds by fractions of an example.
    _, of_class, counts = torch.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = torch.argsort(of_class, stable=True)
    within = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    position = torch.empty(len(labels), dtype=torch.float64)
    position[by_class] = (within.double() + 0.5) / counts.repeat_interleave(counts)
    by_position = torch.argsort(position, stable=True)

    # By position the examples of the classes alternate; both parts are shuffled.
    first, second = order[by_position[:count]], order[by_position[count:]]
    return (
        first[torch.randperm(len(first), generator=generator)],
        second[torch.randperm(len(second), generator=generator)],
    )


Parts = tuple[Images, Images, tuple[str, ...]]


def _digits(root: Path) -> Parts:
    """scikit-learn's bundled digits: 1,797 images of 8×8.

    One fifth is the test set, fixed and stratified.
    """
    # Takes seconds to import, so it is imported only where it is used.
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pixels = torch.from_numpy(np.round(data.images * 255.0 / 16.0).astype(np.uint8))[:, None]
    images = Images(pixels=pixels, labels=torch.from_numpy(data.target.astype(np.int64)))
    test, train = stratified(images.labels, len(images) // 5, seed=0)
    return images[train], images[test], tuple(str(digit) for digit in range(10))


def _fashion_mnist(root: Path) -> Parts:
    # torchvision keeps the files as they are fetched, and unpacked ones beside them.
    looked = places(root, ("fashion-mnist", "FashionMNIST/raw"))
    for folder in (*looked, FASHION_MNIST_PACKAGE):
        found = {file: _either(folder / file) for file in FASHION_MNIST_FILES}
        if all(path.is_file() for path in found.values()):
            break
    else:
        folder = root / "fashion-mnist"
        found = {file: folder / file for file in FASHION_MNIST_FILES}
        otherwise = (
            f"put the four files {', '.join(FASHION_MNIST_FILES)} into {folder} (or install "
            "Debian's package dataset-fashion-mnist)"
        )
        for file, md5 in FASHION_MNIST_FILES.items():
            url = FASHION_MNIST_URL + file
            download("fashion-mnist", url, folder, md5, looked=looked, otherwise=otherwise)

    train, test = (
        Images(
            pixels=_idx(found[f"{part}-images-idx3-ubyte.gz"], 3)[:, None],
            labels=_idx(found[f"{part}-labels-idx1-ubyte.gz"], 1).long(),
            source=str(folder),
        )
        for part in ("train", "t10k")
    )
    return train, test, FASHION_CLASSES


def _either(path: Path) -> Path:
    """The gzipped file, or the unpacked one where that is what there is."""
    return path if path.is_file() else path.with_suffix("")


def _idx(path: Path, dimensions: int) -> Tensor:
    """Reads an IDX file of bytes, gzipped or not."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        magic, *shape = struct.unpack(f">{1 + dimensions}I", content[: 4 * (1 + dimensions)])
        if magic != 0x800 + dimensions:
            raise ValueError(f"it begins with {magic:#x}")
        values = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))
        return torch.from_numpy(values.reshape(shape).copy())
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(
            f"The file {path} is damaged ({error}). Delete it and fetch it again."
        ) from None


def _cifar(name: str) -> Callable[[Path], Parts]:
    def read(root: Path) -> Parts:
        held = read_cifar(name, root)
        train, test = (
            Images(pixels=pixels, labels=labels, source=str(held.source))
            for pixels, labels in (held.train, held.test)
        )
        return train, test, held.class_names

    return read


def read_folder(folder: Path, image_size: int | None, in_memory: bool | None = None) -> Parts:
    """Reads a folder of images, one subfolder per class.

    Where it is not split, a fifth of the images is the test set.

    Args:
        folder: see `list_split`.
        image_size: the shorter side is brought to it and the centre is cut out; None if all images
            have one square size.
        in_memory: whether all images are decoded at once; see `pixels_of`.

    Raises:
        InputError: if it cannot be used, or an image of it cannot be read.
    """
    train, test = list_split(folder)
    size = image_size or common_size([train] if test is None else [train, test])

    listings = [train] if test is None else [train, test]
    pixels = pixels_of([ImageFiles.of(listing, size) for listing in listings], in_memory)
    images, *rest = (
        Images(pixels=held, labels=listing.labels, source=str(folder))
        for held, listing in zip(pixels, listings, strict=True)
    )
    if rest:
        return images, rest[0], train.class_names
    held_out, others = stratified(images.labels, max(1, len(images) // 5), seed=0)
    return images[others], images[held_out], train.class_names


NOISE = {
    "cifar10": (50_000, 10_000, 10, 32),
    "cifar100": (50_000, 10_000, 100, 32),
    "imagenet": (1_281_167, 50_000, 1000, 224),
}
"""Data set → its numbers of training images, test images and classes, and its image size."""


def read_noise(name: str) -> Parts:
    """Random images in the shape and number of a data set, to measure a recipe without data.

    Args:
        name: one of `NOISE`.
    """
    train, test, classes, size = NOISE[name]

    def images(count: int, first: int) -> Images:
        pixels = NoiseImages.many(count, size, first)
        return Images(pixels=pixels, labels=torch.arange(count) % classes)

    class_names = tuple(f"class {label}" for label in range(classes))
    return images(train, 0), images(test, train), class_names


def _imagenet(root: Path) -> Parts:
    """ImageNet from its authors' archives, unpacked.

    The files are imagenet/train/SYNSET/*.JPEG and imagenet/val/SYNSET/*.JPEG.
    """
    folder = root / "imagenet"
    if not folder.is_dir():
        raise InputError(
            f"The data set imagenet is not in {folder}, and cannot be downloaded without an "
            f"account. Unpack it to {folder / 'train' / 'SYNSET'}/*.JPEG and "
            f"{folder / 'val' / 'SYNSET'}/*.JPEG."
        )
    train, test = list_split(folder)
    if test is None:
        raise InputError(
            f"{folder} has no folders train/SYNSET and val/SYNSET. Unpack ImageNet's archives into "
            "these."
        )

    # As in DARTS (Liu et al., 2019) and elsewhere: the central 224 pixels of a shorter side of 256.
    parts = (
        Images(pixels=ImageFiles.of(part, 224, 256 / 224), labels=part.labels)
        for part in (train, test)
    )
    return next(parts), next(parts), train.class_names


DATASETS: dict[str, Callable[[Path], Parts]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
    "imagenet": _imagenet,
}
