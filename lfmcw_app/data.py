"""Image data sets in memory, their split for the search, and batches that are a pure function of seed and position."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Augmentation
from mlo.errors import nearest

__all__ = ["DATASETS", "Batches", "Dataset", "Images", "PairedBatches", "load_dataset", "search_split", "stratified"]

FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images in memory.

    Attributes:
        pixels: [N, C, H, W], uint8.
        labels: [N], int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Images:
        return Images(pixels=self.pixels[indices], labels=self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set with its training and test images.

    Attributes:
        mean: mean of each channel of the training images, for pixels in [0, 1].
        std: standard deviation of each channel.
        class_names: one name a class.
    """

    name: str
    train: Images
    test: Images
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train.pixels.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width of an image."""
        return self.train.pixels.shape[2]


def load_dataset(name: str, root: Path = Path("data"), image_size: int | None = None) -> Dataset:
    """Reads a data set from `root`, from where the system keeps it, or from its authors' site.

    Args:
        name: one of `DATASETS`.
        root: folder of data files.
        image_size: larger images are reduced to this height and width.

    Raises:
        InputError: for an unknown name, or a data set that is neither on disk nor can be downloaded.
    """
    if name not in DATASETS:
        raise InputError(f"Unknown data set {name!r}. {nearest(name, DATASETS)}")
    train, test, class_names = DATASETS[name](root)
    if image_size is not None and train.pixels.shape[-1] > image_size:
        train, test = _reduced(train, image_size), _reduced(test, image_size)
    if train.pixels.shape[-1] % 4:
        raise InputError(f"Images of {name} are {train.pixels.shape[-1]} pixels wide; the size must be divisible by 4.")
    for part, images in (("training", train), ("test", test)):
        if len(images) and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < len(class_names):
            raise InputError(
                f"The {part} labels of {name} range from {int(images.labels.min())} to {int(images.labels.max())}; "
                f"with {len(class_names)} classes they must lie in 0 to {len(class_names) - 1}. The files are damaged."
            )
    pixels = train.pixels.double() / 255.0
    return Dataset(
        name=name,
        train=train,
        test=test,
        class_names=class_names,
        mean=tuple(pixels.mean(dim=(0, 2, 3)).tolist()),
        std=tuple(pixels.std(dim=(0, 2, 3)).tolist()),
    )


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
    # The k-th of a class's n examples gets the position (k + 1/2) / n: taking the smallest positions takes every class
    # in proportion, and rounds by fractions of an example.
    shuffled = labels[order]
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(shuffled):
        members = (shuffled == label).nonzero().squeeze(1)
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    by_position = torch.argsort(position, stable=True)
    first, second = order[by_position[:count]], order[by_position[count:]]
    return (
        first[torch.randperm(len(first), generator=generator)],
        second[torch.randperm(len(second), generator=generator)],
    )


def search_split(dataset: Dataset, limit: int | None, seed: int) -> tuple[Images, Images]:
    """Splits the training images (or `limit` of them) in halves: D_tr and D_val, stratified and seeded."""
    train = subset(dataset.train, limit, seed)
    first, second = stratified(train.labels, len(train) // 2, seed)
    return train[first], train[second]


def subset(images: Images, limit: int | None, seed: int) -> Images:
    """Returns at most `limit` images, stratified."""
    if limit is None or limit >= len(images):
        return images
    return images[stratified(images.labels, limit, seed)[0]]


class Batches:
    """An endless stream of normalised batches; batch k of a stream depends on the seed and k alone.

    So streams with one seed are synchronised without sharing anything, and a position is one number.

    Args:
        images: the images; at least one batch of them.
        dataset: gives the normalisation.
        batch_size: examples in a batch; the last ones of a pass that do not fill a batch wait for another pass.
        seed: decides the order and the augmentation.
        augmentation: random changes; None for none.
        device: where batches go.
        dtype: of the images.
    """

    def __init__(
        self,
        images: Images,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(images) < batch_size:
            raise InputError(
                f"{dataset.name}: {len(images)} images are fewer than one batch of {batch_size}. Lower the batch size, or "
                "use more images."
            )
        self._images = images
        self._batch_size = batch_size
        self._seed = seed
        self._augmentation = augmentation or Augmentation()
        self._device = device
        self._normalise = _Normaliser(dataset, device, dtype)
        self._order: tuple[int, Tensor] | None = None
        self.per_epoch = len(images) // batch_size
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            batch = self.batch(self.position)
            self.position += 1
            yield batch

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns batch `index` of the stream: images [B, C, H, W], normalised, and labels [B]."""
        epoch, within = divmod(index, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mixed(self._seed, epoch, 0))
            self._order = (epoch, torch.randperm(len(self._images), generator=generator))
        chosen = self._images[self._order[1][within * self._batch_size : (within + 1) * self._batch_size]]
        generator = torch.Generator().manual_seed(_mixed(self._seed, index, 1))
        images = _augmented(self._normalise(chosen.pixels), self._augmentation, generator)
        return images, chosen.labels.to(self._device)

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position."""
        self.position = state["position"]


class PairedBatches:
    """Yields (training images, training labels, validation images, validation labels) of two synchronised streams."""

    def __init__(self, train: Batches, validation: Batches) -> None:
        self._train, self._validation = train, validation
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        while True:
            batch = self._train.batch(self.position) + self._validation.batch(self.position)
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position."""
        self.position = state["position"]


def in_order(
    images: Images, dataset: Dataset, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every image once, normalised, in order: for testing."""
    normalise = _Normaliser(dataset, device, torch.float32)
    for start in range(0, len(images), batch_size):
        chosen = images[torch.arange(start, min(start + batch_size, len(images)))]
        yield normalise(chosen.pixels), chosen.labels.to(device)


class _Normaliser:
    """Maps uint8 pixels to the data set's zero mean and unit variance."""

    def __init__(self, dataset: Dataset, device: torch.device | str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._mean = torch.tensor(dataset.mean, dtype=dtype, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(dataset.std, dtype=dtype, device=device).view(1, -1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self._device, self._dtype) / 255.0 - self._mean) / self._std


def _augmented(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Crops, mirrors and cuts out each image of a batch at random; zero is the mean."""
    count, _, height, width = images.shape
    rows = torch.arange(height).expand(count, height)
    columns = torch.arange(width).expand(count, width)
    if how.crop_padding:
        shift = 2 * how.crop_padding + 1
        rows = rows + torch.randint(shift, (count, 1), generator=generator)
        columns = columns + torch.randint(shift, (count, 1), generator=generator)
        images = F.pad(images, (how.crop_padding,) * 4)
    if how.flip:
        mirror = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)
    if how.crop_padding or how.flip:
        example = torch.arange(count)[:, None, None]
        images = images.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
    if how.cutout:
        # DARTS's square: centred on a random pixel, clipped at the borders.
        inside = []
        for size in (height, width):
            centre = torch.randint(size, (count, 1), generator=generator)
            offset = torch.arange(size) - centre
            inside.append((offset >= -(how.cutout // 2)) & (offset < how.cutout // 2))
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        images = images.masked_fill(hole.to(images.device), 0.0)
    return images


def _mixed(*numbers: int) -> int:
    """A seed from several numbers, well apart for neighbouring ones."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _reduced(images: Images, size: int) -> Images:
    pixels = images.pixels
    small = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        for part in torch.split(pixels, 4096)
    ]
    return replace(images, pixels=torch.cat(small).round().clamp(0, 255).to(torch.uint8))


# ------------------------------------------------------------------ readers: root → train, test, class names

Parts = tuple[Images, Images, tuple[str, ...]]


def _digits(root: Path) -> Parts:
    """scikit-learn's embedded digits: 1,797 images of 8×8; one fifth of them is the test set, fixed and stratified."""
    from sklearn.datasets import load_digits  # takes seconds to import, so only where it is used

    data: Any = load_digits()
    pixels = torch.from_numpy(np.round(data.images * 255.0 / 16.0).astype(np.uint8))[:, None]
    images = Images(pixels=pixels, labels=torch.from_numpy(data.target.astype(np.int64)))
    test, train = stratified(images.labels, len(images) // 5, seed=0)
    return images[train], images[test], tuple(str(digit) for digit in range(10))


def _fashion_mnist(root: Path) -> Parts:
    folders = (root / "fashion-mnist", root / "FashionMNIST" / "raw", FASHION_MNIST_PACKAGE)
    complete = (folder for folder in folders if all((folder / file).is_file() for file in FASHION_MNIST_FILES))
    folder = next(complete, None)
    if folder is None:
        folder = folders[0]
        for file, md5 in FASHION_MNIST_FILES.items():
            _download(
                "fashion-mnist",
                FASHION_MNIST_URL + file,
                folder,
                md5,
                f"put the four files {', '.join(FASHION_MNIST_FILES)} into {folder} (or install Debian's package "
                "dataset-fashion-mnist)",
            )
    train, test = (
        Images(
            pixels=_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:, None],
            labels=_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).long(),
        )
        for part in ("train", "t10k")
    )
    return train, test, FASHION_CLASSES


def _idx(path: Path, dimensions: int) -> Tensor:
    """Reads a gzipped IDX file of bytes."""
    try:
        with gzip.open(path) as file:
            content = file.read()
        magic, *shape = struct.unpack(f">{1 + dimensions}I", content[: 4 * (1 + dimensions)])
        if magic != 0x800 + dimensions:
            raise ValueError(f"it begins with {magic:#x}")
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape).copy())
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise InputError(f"The file {path} is damaged ({error}). Delete it and fetch it again.") from None


def _cifar10(root: Path) -> Parts:
    files = [f"cifar-10-batches-bin/data_batch_{index}.bin" for index in range(1, 6)]
    files.append("cifar-10-batches-bin/test_batch.bin")
    *train, test = _cifar_files(root, "cifar10", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", files)
    return _cifar_records(b"".join(train), 1, files[0]), _cifar_records(test, 1, files[-1]), CIFAR10_CLASSES


def _cifar100(root: Path) -> Parts:
    files = [f"cifar-100-binary/{file}" for file in ("train.bin", "test.bin", "fine_label_names.txt")]
    train, test, names = _cifar_files(
        root, "cifar100", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", files
    )
    class_names = tuple(names.decode("utf-8").split())
    # A record's first label is the coarse class, its second the fine one.
    return _cifar_records(train, 2, files[0]), _cifar_records(test, 2, files[1]), class_names


def _cifar_files(root: Path, dataset: str, archive: str, md5: str, files: list[str]) -> list[bytes]:
    """Reads files of CIFAR's binary version, from its folder or the archive (nothing is unpickled or unpacked)."""
    if all((root / file).is_file() for file in files):
        return [(root / file).read_bytes() for file in files]
    path = root / archive
    if not path.is_file():
        _download(dataset, CIFAR_URL + archive, root, md5, f"put the file {archive} (the binary version) into {root}")
    try:
        with tarfile.open(path) as tar:
            return [_member(tar, file) for file in files]
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise InputError(f"The file {path} is damaged ({error}). Delete it and fetch it again.") from None


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def _cifar_records(content: bytes, label_bytes: int, name: str) -> Images:
    """Records of label bytes (the last one is the class) and 3·32·32 pixels."""
    size = label_bytes + 3 * 32 * 32
    if not content or len(content) % size:
        raise InputError(f"The CIFAR file {name} is damaged: its {len(content)} bytes are not whole records of {size}.")
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, size).copy())
    return Images(
        pixels=records[:, label_bytes:].reshape(-1, 3, 32, 32).contiguous(), labels=records[:, label_bytes - 1].long()
    )


def _download(dataset: str, url: str, folder: Path, md5: str, otherwise: str) -> None:
    from torchvision.datasets.utils import download_url  # takes seconds to import, so only where it is used

    try:
        folder.mkdir(parents=True, exist_ok=True)
        download_url(url, str(folder), md5=md5)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; a wrong checksum is a RuntimeError
        for made in (folder, folder.parent):
            with contextlib.suppress(OSError):
                made.rmdir()  # only where it is empty
        raise InputError(
            f"The data set {dataset} is not in {folder} and could not be downloaded from {url} ({error}). Connect to "
            f"the internet, or {otherwise}; or try the embedded data set: digits."
        ) from None


DATASETS: dict[str, Callable[[Path], Parts]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
}
