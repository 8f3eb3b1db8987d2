"""Readers of data sets in their original formats: training and test images, class names."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lfmcw_app.cifar import read_cifar
from lfmcw_app.copies import copies_in_files, copies_in_memory, tell_copies
from lfmcw_app.decoding import Decoding
from lfmcw_app.errors import InputError
from lfmcw_app.fingerprint import Fingerprint
from lfmcw_app.folders import (
    TEST,
    TRAIN,
    VALIDATION,
    FolderListing,
    list_folder,
    list_parts,
)
from lfmcw_app.groups import read_groups
from lfmcw_app.held_pixels import pixels_of
from lfmcw_app.image_files import ImageFiles, NoiseImages
from lfmcw_app.image_survey import DecodingOptions, Reading, survey, without_damaged
from lfmcw_app.published_files import describe_places, download, places, unusable_file
from lfmcw_app.splits import held_out_by_name, stratified

__all__ = [
    "DATASETS",
    "FASHION_MNIST_FILES",
    "NOISE",
    "Images",
    "Parts",
    "read_folder",
    "read_noise",
    "split_folder",
]

FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
LARGEST_IDX = 2**26
"""Bytes. The largest published file has 47 million."""

FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images, in memory or in files.

    Attributes:
        pixels: [N, C, H, W], uint8; files are decoded when `pixels` is indexed.
        labels: [N], int64.
        source: the folder or file that they come from; "" for those of a package.
        groups: [N], int64; images of one group stay in one part. None without groups.
    """

    pixels: Tensor | ImageFiles
    labels: Tensor
    source: str = ""
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Images:
        """Returns the images at `indices`; no file is read."""
        pixels = self.pixels
        chosen = pixels.select(indices) if isinstance(pixels, ImageFiles) else pixels[indices]
        groups = None if self.groups is None else self.groups[indices]
        return replace(self, pixels=chosen, labels=self.labels[indices], groups=groups)


class Parts(NamedTuple):
    """What a reader returns; the first three entries are enough.

    Attributes:
        train: training images.
        test: test images.
        class_names: one name per class.
        validation: images of D_val; None where D_val is a part of the training images.
        fingerprint: None for images in memory, for which that of the pixels is made.
        left_out: says what else a folder holds.
        reading: what was read of a folder's files.
    """

    train: Images
    test: Images
    class_names: tuple[str, ...]
    validation: Images | None = None
    fingerprint: Fingerprint | None = None
    left_out: str = ""
    reading: Reading | None = None


def _digits(root: Path) -> Parts:
    """scikit-learn's bundled digits: 1,797 images of 8×8.

    One fifth is the test set, fixed and stratified.
    """
    # This import takes seconds, so it is done only if it is needed.
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pixels = torch.from_numpy(np.round(data.images * 255.0 / 16.0).astype(np.uint8))[:, None]
    images = Images(pixels=pixels, labels=torch.from_numpy(data.target.astype(np.int64)))
    test, train = stratified(images.labels, len(images) // 5, seed=0)
    return Parts(images[train], images[test], tuple(str(digit) for digit in range(10)))


def _fashion_mnist(root: Path) -> Parts:
    # torchvision keeps the files as they are fetched, and unpacked ones beside them.
    folders = ("fashion-mnist", "FashionMNIST/raw")
    for folder in (*places(root, folders), FASHION_MNIST_PACKAGE):
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
        looked = describe_places(root, folders)
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
    return Parts(train, test, FASHION_CLASSES)


def _either(path: Path) -> Path:
    """The gzipped file, or the unpacked one if only that exists."""
    return path if path.is_file() else path.with_suffix("")


def _idx(path: Path, dimensions: int) -> Tensor:
    """Reads an IDX file of bytes, gzipped or not."""
    try:
        # A small archive can unpack to any size.
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(LARGEST_IDX + 1)
        if len(content) > LARGEST_IDX:
            raise ValueError(f"it has more than {LARGEST_IDX:,} bytes")
        magic, *shape = struct.unpack(f">{1 + dimensions}I", content[: 4 * (1 + dimensions)])
        if magic != 0x800 + dimensions:
            raise ValueError(f"it begins with {magic:#x}")
        values = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))
        return torch.from_numpy(values.reshape(shape).copy())
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise unusable_file(path, error) from None


def _cifar(name: str) -> Callable[[Path], Parts]:
    def read(root: Path) -> Parts:
        held = read_cifar(name, root)
        train, test = (
            Images(pixels=pixels, labels=labels, source=str(held.source))
            for pixels, labels in (held.train, held.test)
        )
        return Parts(train, test, held.class_names)

    return read


def read_folder(
    folder: Path,
    image_size: int | None,
    in_memory: bool | None = None,
    groups: str | None = None,
    options: DecodingOptions | None = None,
) -> Parts:
    """Reads a folder of images, one subfolder per class.

    If it has no test part, about a fifth of the images is held out by name.

    Args:
        folder: see `list_folder`.
        image_size: height and width that images are scaled to; None if all have one size.
        in_memory: whether all images are decoded at once; see `pixels_of`.
        groups: a file that says which images stay together; see `read_groups`.
        options: how files become pixels; None for the defaults.

    Raises:
        InputError: if it cannot be used, or images of it cannot be read.
    """
    options = options or DecodingOptions()
    listing, of_group = split_folder(folder, groups, skips_damaged=options.on_damaged == "skip")
    others = [images for part, images in listing.parts.items() if part != TRAIN]
    other_paths = [path for images in others for path in images.paths]
    decoding, reading = survey(listing.parts[TRAIN].paths, other_paths, options, image_size)

    pixels = pixels_of(
        [ImageFiles.of(images, decoding) for images in listing.parts.values()], in_memory
    )
    read = {
        part: Images(pixels=held, labels=images.labels, source=str(folder))
        for held, (part, images) in zip(pixels, listing.parts.items(), strict=True)
    }
    train, test = read[TRAIN].pixels, read[TEST].pixels
    if isinstance(train, Tensor) and isinstance(test, Tensor):
        copies = copies_in_memory(train, test)
    else:
        copies = copies_in_files(listing.parts[TRAIN], listing.parts[TEST])
    paths = listing.parts[TEST].paths
    tell_copies(str(folder), copies, len(paths), paths, split=TEST in listing.folders)
    if of_group is not None:
        _, numbers = np.unique(of_group[TRAIN], return_inverse=True)
        read[TRAIN] = replace(read[TRAIN], groups=torch.from_numpy(numbers))
    return Parts(
        read[TRAIN],
        read[TEST],
        listing.parts[TRAIN].class_names,
        validation=read.get(VALIDATION),
        fingerprint=Fingerprint.of_files(listing.parts, of_group),
        left_out=listing.describe_left_out(),
        reading=reading,
    )


def split_folder(
    folder: Path, groups: str | None = None, *, skips_damaged: bool = False
) -> tuple[FolderListing, dict[str, list[str]] | None]:
    """Lists the images of a folder by the parts that a run uses, a test part among them.

    Args:
        folder: see `list_folder`.
        groups: a file that says which images stay together; see `read_groups`.
        skips_damaged: whether files that cannot be read are left out.

    Returns:
        The images of each part; and part → the name of the group of each image, with groups.

    Raises:
        InputError: if it cannot be used.
    """
    listing = list_folder(folder)
    if skips_damaged:
        listing = without_damaged(listing)
    of_group = None
    if groups is not None:
        of_group = read_groups(Path(os.path.expanduser(groups)), folder, listing)
    return (listing, of_group) if TEST in listing.parts else _with_test_part(listing, of_group)


def _with_test_part(
    listing: FolderListing, groups: dict[str, list[str]] | None
) -> tuple[FolderListing, dict[str, list[str]] | None]:
    """Holds out the test images of a folder that is not split."""
    images = listing.parts[TRAIN]
    held_out = held_out_by_name(
        images.names, images.labels, None if groups is None else groups[TRAIN]
    )
    if not held_out.any():
        kind = "image" if groups is None else "group"
        raise InputError(
            f"No image is left for testing: each class has only one {kind}, which is for training. "
            f"{'Add images' if groups is None else 'Divide the groups of data.groups'}, or make "
            "folders train and test."
        )
    masks = {TRAIN: ~held_out, TEST: held_out}
    where = {part: mask.nonzero()[:, 0] for part, mask in masks.items()}
    parts = {part: images.select(indices) for part, indices in where.items()}
    if groups is not None:
        names = groups[TRAIN]
        groups = {part: [names[i] for i in indices.tolist()] for part, indices in where.items()}
    return replace(listing, parts=parts), groups


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
    return Parts(
        images(train, 0),
        images(test, train),
        class_names,
        fingerprint=Fingerprint.of_name(f"random:{name}"),
    )


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
    places = {TRAIN: folder / "train", TEST: folder / "val"}
    if not all(place.is_dir() for place in places.values()):
        raise InputError(
            f"{folder} has no folders train/SYNSET and val/SYNSET. Unpack ImageNet's archives into "
            "these."
        )
    listing = list_parts(folder, places)

    # As in DARTS (Liu et al., 2019) and elsewhere: the central 224 pixels of a shorter side of 256.
    decoding = Decoding(size=224, margin=256 / 224)
    train, test = (
        Images(pixels=ImageFiles.of(part, decoding), labels=part.labels)
        for part in (listing.parts[TRAIN], listing.parts[TEST])
    )
    return Parts(
        train,
        test,
        listing.parts[TRAIN].class_names,
        fingerprint=Fingerprint.of_files(listing.parts),
        left_out=listing.describe_left_out(),
    )


DATASETS: dict[str, Callable[[Path], Parts]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
    "imagenet": _imagenet,
}
