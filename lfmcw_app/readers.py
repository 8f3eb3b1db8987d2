"""Readers of data sets in their original formats: training and test images, class names."""

from __future__ import annotations

import contextlib
import gzip
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lfmcw_app.errors import InputError
from lfmcw_app.fingerprint import Fingerprint
from lfmcw_app.groups import read_groups
from lfmcw_app.image_files import ImageFiles, NoiseImages, common_size
from lfmcw_app.listing import (
    TEST,
    TRAIN,
    VALIDATION,
    FolderListing,
    list_folder,
    list_parts,
)
from lfmcw_app.splits import held_out_by_name, stratified

__all__ = [
    "DATASETS",
    "FASHION_MNIST_FILES",
    "NOISE",
    "Images",
    "Parts",
    "read_folder",
    "read_noise",
]

FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
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
        groups: [N], int64; images of one group are in one part. None for no groups.
    """

    pixels: Tensor | ImageFiles
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Images:
        """Returns the images at `indices`; of files none is read."""
        pixels = self.pixels
        chosen = pixels.select(indices) if isinstance(pixels, ImageFiles) else pixels[indices]
        groups = None if self.groups is None else self.groups[indices]
        return Images(pixels=chosen, labels=self.labels[indices], groups=groups)


class Parts(NamedTuple):
    """What a reader returns; the first three will do.

    Attributes:
        train: training images.
        test: test images.
        class_names: one name per class.
        validation: images of D_val; None where D_val is a part of the training images.
        fingerprint: None for images in memory: that of their pixels is made.
        left_out: words on what else a folder holds.
    """

    train: Images
    test: Images
    class_names: tuple[str, ...]
    validation: Images | None = None
    fingerprint: Fingerprint | None = None
    left_out: str = ""


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
    return Parts(images[train], images[test], tuple(str(digit) for digit in range(10)))


def _fashion_mnist(root: Path) -> Parts:
    def is_complete(folder: Path) -> bool:
        return all((folder / file).is_file() for file in FASHION_MNIST_FILES)

    folders = (root / "fashion-mnist", root / "FashionMNIST" / "raw", FASHION_MNIST_PACKAGE)
    folder = next(filter(is_complete, folders), None)
    if folder is None:
        folder = folders[0]
        otherwise = (
            f"put the four files {', '.join(FASHION_MNIST_FILES)} into {folder} (or install "
            "Debian's package dataset-fashion-mnist)"
        )
        for file, md5 in FASHION_MNIST_FILES.items():
            _download("fashion-mnist", FASHION_MNIST_URL + file, folder, md5, otherwise)

    train, test = (
        Images(
            pixels=_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:, None],
            labels=_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).long(),
        )
        for part in ("train", "t10k")
    )
    return Parts(train, test, FASHION_CLASSES)


def _idx(path: Path, dimensions: int) -> Tensor:
    """Reads a gzipped IDX file of bytes."""
    try:
        with gzip.open(path) as file:
            content = file.read()
        magic, *shape = struct.unpack(f">{1 + dimensions}I", content[: 4 * (1 + dimensions)])
        if magic != 0x800 + dimensions:
            raise ValueError(f"it begins with {magic:#x}")
        values = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))
        return torch.from_numpy(values.reshape(shape).copy())
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(
            f"The file {path} is damaged ({error}). Delete it and fetch it again."
        ) from None


def _cifar10(root: Path) -> Parts:
    files = [f"cifar-10-batches-bin/data_batch_{index}.bin" for index in range(1, 6)]
    files.append("cifar-10-batches-bin/test_batch.bin")
    *train, test = _cifar_files(
        root, "cifar10", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", files
    )
    return Parts(
        _cifar_records(b"".join(train), 1, files[0]),
        _cifar_records(test, 1, files[-1]),
        CIFAR10_CLASSES,
    )


def _cifar100(root: Path) -> Parts:
    names = ("train.bin", "test.bin", "fine_label_names.txt")
    files = [f"cifar-100-binary/{name}" for name in names]
    train, test, classes = _cifar_files(
        root, "cifar100", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", files
    )
    class_names = tuple(classes.decode("utf-8", errors="replace").split())
    if len(class_names) != 100:
        raise InputError(
            f"The CIFAR file {files[2]} is damaged: it holds {len(class_names)} class names "
            "instead of 100."
        )
    # A record's first label is the coarse class, its second the fine one.
    return Parts(_cifar_records(train, 2, files[0]), _cifar_records(test, 2, files[1]), class_names)


def _cifar_files(root: Path, dataset: str, archive: str, md5: str, files: list[str]) -> list[bytes]:
    """Reads files of CIFAR's binary version, from its folder or from the archive.

    Nothing is unpickled or unpacked.
    """
    if all((root / file).is_file() for file in files):
        return [(root / file).read_bytes() for file in files]
    path = root / archive
    if not path.is_file():
        otherwise = f"put the file {archive} (the binary version) into {root}"
        _download(dataset, CIFAR_URL + archive, root, md5, otherwise)
    try:
        with tarfile.open(path) as tar:
            return [_member(tar, file) for file in files]
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise InputError(
            f"The file {path} is damaged ({error}). Delete it and fetch it again."
        ) from None


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def _cifar_records(content: bytes, label_bytes: int, name: str) -> Images:
    """Records of label bytes (the last one is the class) and 3·32·32 pixels."""
    size = label_bytes + 3 * 32 * 32
    if not content or len(content) % size:
        raise InputError(
            f"The CIFAR file {name} is damaged: its {len(content)} bytes are not whole records of "
            f"{size}."
        )
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, size).copy())
    return Images(
        pixels=records[:, label_bytes:].reshape(-1, 3, 32, 32).contiguous(),
        labels=records[:, label_bytes - 1].long(),
    )


def read_folder(folder: Path, image_size: int | None, groups: str | None = None) -> Parts:
    """Reads a folder of images, one subfolder per class.

    Where it has no test part, about a fifth of the images is held out by name.

    Args:
        folder: see `list_folder`.
        image_size: the shorter side is brought to it and the centre is cut out; None if all images
            have one square size.
        groups: a file that says which images stay together; see `read_groups`.

    Raises:
        InputError: if it cannot be used, or an image of it cannot be read.
    """
    listing = list_folder(folder)
    of_group = None
    if groups is not None:
        of_group = read_groups(Path(groups).expanduser(), folder, listing)
    if TEST not in listing.parts:
        listing, of_group = _with_test_part(listing, of_group)
    size = image_size or common_size(list(listing.parts.values()))

    def read(part: str) -> Images:
        files = ImageFiles.of(listing.parts[part], size)
        return Images(pixels=files[files.rows], labels=listing.parts[part].labels)

    train = read(TRAIN)
    if of_group is not None:
        _, numbers = np.unique(of_group[TRAIN], return_inverse=True)
        train = replace(train, groups=torch.from_numpy(numbers))
    return Parts(
        train,
        read(TEST),
        listing.parts[TRAIN].class_names,
        validation=read(VALIDATION) if VALIDATION in listing.parts else None,
        fingerprint=Fingerprint.of_files(listing.parts, of_group),
        left_out=listing.words(),
    )


def _with_test_part(
    listing: FolderListing, groups: dict[str, list[str]] | None
) -> tuple[FolderListing, dict[str, list[str]] | None]:
    """Holds out the test images of a folder that is not split."""
    images = listing.parts[TRAIN]
    held_out = held_out_by_name(
        images.names, images.labels, None if groups is None else groups[TRAIN]
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
    train, test = (
        Images(pixels=ImageFiles.of(part, 224, 256 / 224), labels=part.labels)
        for part in (listing.parts[TRAIN], listing.parts[TEST])
    )
    return Parts(
        train,
        test,
        listing.parts[TRAIN].class_names,
        fingerprint=Fingerprint.of_files(listing.parts),
        left_out=listing.words(),
    )


def _download(dataset: str, url: str, folder: Path, md5: str, otherwise: str) -> None:
    # Takes seconds to import, so it is imported only where it is used.
    from torchvision.datasets.utils import download_url

    missing = [made for made in (folder, *folder.parents) if not made.exists()]
    name = url.rpartition("/")[2]
    partial = folder / f"{name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Under another name until its checksum is right: later runs read the file unchecked.
        download_url(url, str(folder), filename=partial.name, md5=md5)
        partial.replace(folder / name)
    except (OSError, RuntimeError) as error:
        # urllib's errors are OSErrors; a wrong checksum is a RuntimeError.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()  # only where it is empty
        raise InputError(
            f"The data set {dataset} is not in {folder} and could not be downloaded from {url} "
            f"({error}). Connect to the internet, or {otherwise}; or try the embedded data set: "
            "digits."
        ) from None


DATASETS: dict[str, Callable[[Path], Parts]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "imagenet": _imagenet,
}
