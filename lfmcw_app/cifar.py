"""CIFAR-10 and CIFAR-100, from their binary version or the Python version that torchvision has.

The Python version's files are pickles. They are read only if their MD5s are the published ones. The
unpickler then makes byte strings, numbers, lists, dictionaries and numpy arrays, and nothing else.
(Krizhevsky, 2009; https://www.cs.toronto.edu/~kriz/cifar.html)
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lfmcw_app.errors import InputError
from lfmcw_app.known_pickle import Limits, PickleError, unpickled
from lfmcw_app.published_files import describe_places, download, places, unusable_file

__all__ = ["CIFAR10_CLASSES", "CifarData", "read_cifar"]

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
IMAGE_BYTES = 3 * 32 * 32
LARGEST_FILE = 2**28
"""Bytes. The largest published file has 155 million."""

Part = tuple[Tensor, Tensor]
"""Pixels [N, 3, 32, 32], uint8, and labels [N], int64."""


class CifarData(NamedTuple):
    """What is read of a CIFAR.

    Attributes:
        train: the training images and their labels.
        test: the test images and their labels.
        class_names: one name per class.
        source: the folder or archive that it comes from.
    """

    train: Part
    test: Part
    class_names: tuple[str, ...]
    source: Path


@dataclass(frozen=True, kw_only=True)
class _Version:
    """One of the forms in which a CIFAR is published.

    Attributes:
        archive: name of the archive.
        folder: in which its files lie, in the archive and where it is unpacked.
        train: names of the files with training images.
        test: name of the file with test images.
        names: name of the file with the names of the classes; None where they are known.
    """

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files that are read."""
        return (*self.train, self.test, *([self.names] if self.names else []))


@dataclass(frozen=True, kw_only=True)
class _Cifar:
    """A CIFAR, and its two versions.

    Attributes:
        class_names: one name per class; none where a file has them.
        binary_md5: MD5 of the archive of the binary version, which is the one that is downloaded.
        label_bytes: of a record of the binary version; the last one is the class.
        label_key: name of the labels in the Python version.
        torchvision: name of torchvision's class, which has the published MD5s.
    """

    class_names: tuple[str, ...]
    binary: _Version
    binary_md5: str
    label_bytes: int
    python: _Version
    label_key: bytes
    torchvision: str


_CIFARS = {
    "cifar10": _Cifar(
        class_names=CIFAR10_CLASSES,
        binary=_Version(
            archive="cifar-10-binary.tar.gz",
            folder="cifar-10-batches-bin",
            train=tuple(f"data_batch_{index}.bin" for index in range(1, 6)),
            test="test_batch.bin",
        ),
        binary_md5="c32a1d4ab5d03f1284b67883e8d87530",
        label_bytes=1,
        python=_Version(
            archive="cifar-10-python.tar.gz",
            folder="cifar-10-batches-py",
            train=tuple(f"data_batch_{index}" for index in range(1, 6)),
            test="test_batch",
        ),
        label_key=b"labels",
        torchvision="CIFAR10",
    ),
    "cifar100": _Cifar(
        class_names=(),
        binary=_Version(
            archive="cifar-100-binary.tar.gz",
            folder="cifar-100-binary",
            train=("train.bin",),
            test="test.bin",
            names="fine_label_names.txt",
        ),
        binary_md5="03b5dce01913d631647c71ecec9e9cb8",
        label_bytes=2,  # the coarse class, and the fine one
        python=_Version(
            archive="cifar-100-python.tar.gz",
            folder="cifar-100-python",
            train=("train",),
            test="test",
            names="meta",
        ),
        label_key=b"fine_labels",
        torchvision="CIFAR100",
    ),
}


def read_cifar(name: str, root: Path) -> CifarData:
    """Reads a CIFAR from where it is found, or downloads its binary version into `root`.

    Both versions give the same images in the same order.

    Args:
        name: cifar10 or cifar100.
        root: folder of data files. It is looked at first, then the folders of
            `published_files.PLACES`; in each the files may also lie in a folder of the data set's
            name (cifar10, CIFAR10).

    Raises:
        InputError: if it is neither found nor can be downloaded, is damaged, or is a Python version
            whose files are not the published ones.
    """
    cifar = _CIFARS[name]
    folders = (".", name, name.upper())
    for place in places(root, folders):
        for version in (cifar.binary, cifar.python):
            for source in (place / version.folder, place / version.archive):
                if _is_complete(source, version):
                    return _read(cifar, version, source)

    archive = cifar.binary.archive
    download(
        name,
        CIFAR_URL + archive,
        root,
        cifar.binary_md5,
        looked=describe_places(root, folders),
        otherwise=f"put the file {archive} or {cifar.python.archive} into {root}",
    )
    return _read(cifar, cifar.binary, root / archive)


def _is_complete(source: Path, version: _Version) -> bool:
    """Whether it is the version's archive, or its folder with all files."""
    if source.name == version.archive:
        return source.is_file()
    return all((source / file).is_file() for file in version.files)


def _read(cifar: _Cifar, version: _Version, source: Path) -> CifarData:
    contents = _contents(version, source)
    if version is cifar.python:
        return _from_python(cifar, contents, source)
    return _from_binary(cifar, contents, source)


def _contents(version: _Version, source: Path) -> dict[str, bytes]:
    """File → what it holds, from a folder or an archive, of which nothing is unpacked."""
    if source.name != version.archive:
        return {file: _file(source / file) for file in version.files}
    try:
        with _Bounded(source) as content, tarfile.open(fileobj=content, mode="r:") as tar:
            files = {file: _member(tar, f"{version.folder}/{file}") for file in version.files}
            content.check()
            return files
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise unusable_file(source, error) from None


class _Bounded(gzip.GzipFile):
    """An unpacked archive that is read in bounded parts: its head may name any length."""

    def check(self) -> None:
        """Reads it to its end, where its checksum is: a changed bit would be other pixels.

        Raises:
            OSError: if the checksum is another one.
            tarfile.ReadError: if it is longer than any archive.
        """
        while self.read(1 << 20):
            if self.tell() > 4 * LARGEST_FILE:
                raise tarfile.ReadError(f"it has more than {4 * LARGEST_FILE:,} bytes")

    def read(self, size: int | None = -1) -> bytes:
        """Reads so many bytes.

        Raises:
            tarfile.ReadError: if they are more than any file has.
        """
        if size is None or not 0 <= size <= 2 * LARGEST_FILE:  # a file, and what is read ahead
            raise tarfile.ReadError(f"it asks for {size} bytes at once")
        return super().read(size)


def _file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return _all_of(file, path.name)
    except (OSError, KeyError) as error:
        raise unusable_file(path, error) from None


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return _all_of(file, name)


def _all_of(file: IO[bytes], name: str) -> bytes:
    content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise KeyError(f"{name} has more than {LARGEST_FILE} bytes")
    return content


def _checked_names(names: list[bytes], source: Path, file: str) -> tuple[str, ...]:
    if len(names) != 100:
        raise InputError(
            f"The CIFAR file {source}: {file} is damaged: it holds {len(names)} class names "
            "instead of 100."
        )
    return tuple(name.decode("utf-8", errors="replace") for name in names)


# ------------------------------ the binary version


def _from_binary(cifar: _Cifar, contents: Mapping[str, bytes], source: Path) -> CifarData:
    version = cifar.binary
    names = cifar.class_names
    if version.names:
        names = _checked_names(contents[version.names].split(), source, version.names)
    return CifarData(
        _joined([_records(contents[file], cifar.label_bytes, file) for file in version.train]),
        _records(contents[version.test], cifar.label_bytes, version.test),
        names,
        source,
    )


def _joined(parts: list[Part]) -> Part:
    pixels, labels = zip(*parts, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def _records(content: bytes, label_bytes: int, name: str) -> Part:
    """Records of label bytes (the last one is the class) and 3·32·32 pixels."""
    size = label_bytes + IMAGE_BYTES
    if not content or len(content) % size:
        raise InputError(
            f"The CIFAR file {name} is damaged: its {len(content)} bytes are not whole records of "
            f"{size}."
        )
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, size).copy())
    pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32).contiguous()
    return pixels, records[:, label_bytes - 1].long()


# ------------------------------ the Python version


def _from_python(cifar: _Cifar, contents: Mapping[str, bytes], source: Path) -> CifarData:
    version = cifar.python
    published = _published(cifar.torchvision)
    for file in version.files:
        _check_md5(contents[file], published[file], source, file)

    def part(file: str) -> Part:
        return _arrays(_unpickled(contents[file], source, file), cifar.label_key, source, file)

    names = cifar.class_names
    if version.names:
        described = _unpickled(contents[version.names], source, version.names)
        names = _checked_names(described.get(b"fine_label_names", []), source, version.names)
    return CifarData(_joined(list(map(part, version.train))), part(version.test), names, source)


def _published(name: str) -> dict[str, str]:
    """File → its MD5 as torchvision publishes it."""
    # This import takes seconds, so it is done only if it is needed.
    from torchvision import datasets

    listed = getattr(datasets, name)
    published: dict[str, str] = dict((*listed.train_list, *listed.test_list))
    return published | {listed.meta["filename"]: listed.meta["md5"]}


def _check_md5(content: bytes, published: str, source: Path, file: str) -> None:
    """Refuses a file that is not the published one.

    Two files of one MD5 can be made, but none with the MD5 of a given file.
    """
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != published:
        raise InputError(
            f"{source}: {file} is not the published file: its MD5 is {found}, that of the "
            f"published one {published}. It is a pickle, which can run code, so only the "
            "published file is read. Delete it and fetch it again. Your own pictures are read "
            "from folder:PATH."
        )


def _dtype(name: Any, *_: Any) -> np.dtype[Any]:
    """A type of numpy's of its own, so that no pickle sets the state of one that others have."""
    of_its_own: np.dtype[Any] = np.dtype(name, copy=True)
    return of_its_own


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
}
"""All that the published files name."""

LARGEST = Limits(content=LARGEST_FILE, operations=2**20)
"""The largest published file has 50,000 file names and 100,000 labels."""


def _unpickled(content: bytes, source: Path, file: str) -> dict[bytes, Any]:
    """What a file of the Python version holds. Python 2's strings are byte strings here."""
    try:
        held = unpickled(
            io.BytesIO(content),
            _KNOWN,
            limits=LARGEST,
            states=(np.ndarray, np.dtype),
            encoding="bytes",
        )
    except PickleError as error:
        raise InputError(
            f"The CIFAR file {source}: {file} cannot be read ({error}). Delete it and fetch it "
            "again."
        ) from None
    if not isinstance(held, dict):
        raise InputError(f"The CIFAR file {source}: {file} is damaged: it holds no dictionary.")
    return held


def _arrays(held: Mapping[bytes, Any], label_key: bytes, source: Path, file: str) -> Part:
    data, labels = held.get(b"data"), held.get(label_key)
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.shape[1:] != (IMAGE_BYTES,)
        or not isinstance(labels, list)
        or not all(type(label) is int and 0 <= label < 256 for label in labels)
        or len(labels) != len(data)
    ):
        raise InputError(
            f"The CIFAR file {source}: {file} is damaged: it does not hold images of "
            f"{IMAGE_BYTES} bytes and as many labels."
        )
    pixels = torch.from_numpy(data.reshape(-1, 3, 32, 32).copy())
    return pixels, torch.tensor(labels, dtype=torch.int64)
