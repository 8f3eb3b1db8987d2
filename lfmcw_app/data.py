"""Image data sets, the split for the search, and batches as a function of seed and position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.augmentation import CROP_DRAWS, Part, augmented, jittered, rows_of, sent
from lfmcw_app.errors import InputError
from lfmcw_app.fingerprint import Fingerprint
from lfmcw_app.image_files import ImageFiles, random_crops
from lfmcw_app.own_datasets import dataset_names, reader_of
from lfmcw_app.readers import DATASETS, NOISE, Images, Parts, read_folder, read_noise
from lfmcw_app.recipe import Augmentation
from lfmcw_app.splits import search_indices, stratified
from mlo.errors import nearest

__all__ = [
    "DATASETS", "Batches", "Dataset", "Images", "PairedBatches", "check_dataset", "in_order",
    "load_dataset", "resident", "search_labels", "search_split", "short_name", "subset",
]  # fmt: skip

FOLDER, RANDOM = "folder:", "random:"
RESIDENT_SHARE = 0.1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images, as everybody uses them."""


# ------------------------------ data sets


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set with its training and test images.

    Attributes:
        mean: mean of each channel of the training images, for pixels in [0, 1].
        std: standard deviation of each channel.
        class_names: one name per class.
        validation: images of D_val; None where D_val is a part of the training images.
        fingerprint: what the data are known by; empty for data made in memory.
        left_out: words on what else a folder holds.
    """

    name: str
    train: Images
    test: Images
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: Images | None = None
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    left_out: str = ""

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

    @property
    def summary(self) -> str:
        """What was read, in one line."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        sizes = {part: len(images) for part, images in parts.items() if images is not None}
        channels = f"{self.channels} channel{'s' * (self.channels > 1)}"
        said = (
            f"{sum(sizes.values()):,} images, {self.num_classes:,} classes, "
            f"{' / '.join(f'{size:,} {part}' for part, size in sizes.items())}, "
            f"{self.image_size}×{self.image_size}, {channels}"
        )
        return f"{said}; {self.left_out}" if self.left_out else said


def check_dataset(name: str) -> None:
    """Raises an InputError for a name that `load_dataset` does not know.

    Known are the names in `DATASETS`, folder:PATH, and random: with a name in `NOISE`.
    """
    if name.startswith(RANDOM):
        if name.removeprefix(RANDOM) not in NOISE:
            raise InputError(
                "random: takes the name of a data set whose shape its images have. "
                f"{nearest(name.removeprefix(RANDOM), NOISE)}"
            )
        return
    if not name.startswith(FOLDER) and name not in DATASETS and name not in dataset_names():
        raise InputError(
            f"Unknown data set {name!r}. {nearest(name, dataset_names())} Your own images: "
            "folder:PATH; your own tensors: lfmcw_app.register_dataset; noise: random:NAME."
        )
    if name.strip() == FOLDER:
        raise InputError(
            "folder: needs the path of a folder of images, for example folder:pictures."
        )


def short_name(name: str) -> str:
    """A name of a data set for file names and titles: of folder:PATH the last part of the path."""
    if name.startswith(FOLDER):
        return Path(name.removeprefix(FOLDER)).resolve().name
    return name.replace(":", "-")


def load_dataset(
    name: str,
    root: Path = Path("data"),
    image_size: int | None = None,
    groups: str | None = None,
) -> Dataset:
    """Reads a data set from `root`, from where the system keeps it, or from its authors' site.

    Args:
        name: one of `DATASETS` or of your own (`register_dataset`), folder:PATH for a folder of
            images (see `read_folder`), or random:NAME for random ones in the shape of another data
            set (see `read_noise`).
        root: folder of data files.
        image_size: larger images are reduced to this height and width; images in files are brought
            to it.
        groups: for folder:PATH, a file that says which images stay together; see `read_groups`.

    Raises:
        InputError: for an unknown name, or a data set that is neither on disk nor can be
            downloaded.
    """
    check_dataset(name)
    if groups is not None and not name.startswith(FOLDER):
        raise InputError(f"data.groups is for the images of a folder (folder:PATH), not {name}.")
    if name.startswith(FOLDER):
        folder = Path(name.removeprefix(FOLDER)).expanduser()
        read = read_folder(folder, image_size, groups)
    elif name.startswith(RANDOM):
        read = read_noise(name.removeprefix(RANDOM))
    else:
        read = reader_of(name)(root)
    train, validation, test = read.train, read.validation, read.test
    class_names = read.class_names

    # Checked before anything is computed: files may be damaged, or not what their name says.
    parts = {"training": train, "test": test}
    if validation is not None:
        parts["validation"] = validation
    for part, images in parts.items():
        if len(images.pixels) != len(images.labels) or len(images) == 0:
            raise InputError(
                f"The {part} set of {name} has {len(images.pixels)} images and "
                f"{len(images.labels)} labels. The files are damaged or incomplete."
            )
        if images.pixels.shape[-1] != images.pixels.shape[-2]:
            raise InputError(
                f"The {part} images of {name} are {tuple(images.pixels.shape[-2:])}; they must be "
                "square."
            )
    fingerprint = read.fingerprint or _fingerprint(read)
    if image_size is not None:
        train, test = _reduced(train, image_size), _reduced(test, image_size)
        validation = None if validation is None else _reduced(validation, image_size)
    if train.pixels.shape[-1] % 4:
        raise InputError(
            f"Images of {name} are {train.pixels.shape[-1]} pixels wide; the size must be "
            "divisible by 4. Set data.image_size."
        )
    for part, images in parts.items():
        smallest, largest = int(images.labels.min()), int(images.labels.max())
        if not 0 <= smallest <= largest < len(class_names):
            raise InputError(
                f"The {part} labels of {name} range from {smallest} to "
                f"{largest}; with {len(class_names)} classes they must lie in 0 "
                f"to {len(class_names) - 1}. The files are damaged."
            )

    mean, std = _statistics(train, name)
    return Dataset(
        name=name,
        train=train,
        test=test,
        class_names=class_names,
        mean=mean,
        std=std,
        validation=validation,
        fingerprint=fingerprint,
        left_out=read.left_out,
    )


def _fingerprint(read: Parts) -> Fingerprint:
    """Of images in memory, before they are reduced: rounding there depends on the machine."""
    parts = {"train": read.train, "validation": read.validation, "test": read.test}
    pixels = {}
    for part, images in parts.items():
        if images is not None:
            assert isinstance(images.pixels, Tensor)
            pixels[part] = (images.pixels, images.labels)
    return Fingerprint.of_pixels(pixels, read.class_names)


def _statistics(images: Images, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels in [0, 1].

    They come from histograms, which take no memory. Images in files have ImageNet's.
    """
    if isinstance(images.pixels, ImageFiles):
        return IMAGENET_MEAN, IMAGENET_STD
    # In parts, since counting takes eight bytes per pixel.
    values = torch.arange(256, dtype=torch.float64) / 255.0
    mean, std = [], []
    for channel in range(images.pixels.shape[1]):
        parts = torch.split(images.pixels[:, channel], 4096)
        histograms = [torch.bincount(part.flatten(), minlength=256) for part in parts]
        counts = torch.stack(histograms).sum(0)
        mean.append(float(counts.double() @ values / counts.sum()))
        std.append(float((counts.double() @ (values - mean[-1]) ** 2 / (counts.sum() - 1)).sqrt()))
        if not std[-1] > 0:
            raise InputError(
                f"All training images of {name} are one colour in channel {channel}. Are the files "
                "right?"
            )
    return tuple(mean), tuple(std)


# ------------------------------ the split


HALVES = (0.5, 0.5)


def search_split(
    dataset: Dataset, limit: int | None, seed: int, fractions: tuple[float, float] = HALVES
) -> tuple[Images, Images]:
    """Splits the training images (or `limit` of them) in D_tr and D_val, stratified and seeded.

    Where the data set has validation images of its own, these are D_val and all training images are
    D_tr; `limit` takes as much of both.

    Args:
        dataset: the data set.
        limit: number of images that are split; None for all.
        seed: decides which.
        fractions: of these images, the parts that D_tr and D_val get; halves by default. PC-DARTS
            takes 0.1 and 0.025 of ImageNet (Xu et al. (2020), section 4.3).

    Raises:
        InputError: if the fractions are not positive, or sum to more than 1; or where there is
            nothing to split.
    """
    first, second = _search_places(dataset, limit, seed, fractions)
    return dataset.train[first], (dataset.validation or dataset.train)[second]


def search_labels(
    dataset: Dataset, limit: int | None, seed: int, fractions: tuple[float, float] = HALVES
) -> tuple[Tensor, Tensor]:
    """The labels of D_tr and of D_val, without touching an image; see `search_split`."""
    first, second = _search_places(dataset, limit, seed, fractions)
    return dataset.train.labels[first], (dataset.validation or dataset.train).labels[second]


def _search_places(
    dataset: Dataset, limit: int | None, seed: int, fractions: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The places of the images of D_tr among the training images, and of those of D_val."""
    if min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise InputError(
            "The fractions of the training images for the search must be positive and sum to at "
            f"most 1, got {fractions}."
        )
    train, validation = dataset.train, dataset.validation
    if validation is None:
        return search_indices(train.labels, limit, seed, fractions, train.groups)
    if tuple(fractions) != HALVES:
        raise InputError(
            f"data.search_fractions is {list(fractions)}, but {dataset.name} has validation images "
            "of its own, so that there is nothing to split. Drop it."
        )
    both = len(train) + len(validation)
    share = 1.0 if limit is None else min(1.0, limit / both)
    first, second = (
        stratified(labels, max(1, round(share * len(labels))), seed, least=(1, 0))[0]
        for labels in (train.labels, validation.labels)
    )
    return first, second


def subset(images: Images, limit: int | None, seed: int) -> Images:
    """Returns at most `limit` images, stratified, with every class as far as there is room."""
    if limit is None or limit >= len(images):
        return images
    return images[stratified(images.labels, limit, seed, least=(1, 0))[0]]


# ------------------------------ batches


def resident(images: Images, how: Augmentation, device: torch.device | str) -> Images:
    """The images with their pixels on a GPU, where batches are cut out without being sent.

    The pixels stay where they are if the device is a CPU, if they are in files, if the CPU cuts
    windows out of them (`resized_crop`), or if they would take more than `RESIDENT_SHARE` of the
    GPU's free memory.
    """
    device, pixels = torch.device(device), images.pixels
    if device.type != "cuda" or not isinstance(pixels, Tensor) or how.resized_crop:
        return images
    if pixels.numel() > RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        return images
    return replace(images, pixels=pixels.to(device))


class Batches:
    """An endless stream of normalised batches; batch k of a stream depends on the seed and k alone.

    So streams with one seed are synchronised without sharing anything, and the position in a stream
    is one number.

    Args:
        images: the images; at least one batch of them. Streams share those that are on the device
            already (`resident`).
        dataset: gives the normalisation.
        batch_size: examples in a batch. Where the last ones of a pass do not fill a batch, they
            wait for another pass.
        seed: decides the order and the augmentation.
        augmentation: random changes; None for none.
        device: where batches go.
        dtype: of the images.
        part: which part of every batch this stream yields, with the random changes that it has in
            the whole batch.
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
        part: Part = (0, 1),
    ) -> None:
        if len(images) < batch_size:
            raise InputError(
                f"{dataset.name}: {len(images)} images are fewer than one batch of {batch_size}. "
                "Lower the batch size, or use more images."
            )
        self._images = images
        self._labels = sent(images.labels, device)
        self._num_classes = dataset.num_classes
        self._batch_size = batch_size
        self._seed = seed
        self._augmentation = augmentation or Augmentation()
        self._device = device
        self._part = part
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
        """Returns batch `index` of the stream, or its part of it.

        Images [B, C, H, W] are normalised; labels are [B].
        """
        return self._prepared(self._chosen(index), index)

    def labels(self, index: int) -> Tensor:
        """The labels of batch `index`, [B], on the CPU."""
        return self._images.labels[self._chosen(index)]

    def _chosen(self, index: int) -> Tensor:
        """The positions of the images of batch `index`, [B]."""
        # Every epoch has an order of its own, a function of the seed. The last one is kept.
        epoch, within = divmod(index, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mixed(self._seed, epoch, 0))
            self._order = (epoch, torch.randperm(len(self._images), generator=generator))
        whole = self._order[1][within * self._batch_size : (within + 1) * self._batch_size]
        return rows_of(whole, self._part)

    def of_classes(self, labels: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Returns a batch like `batch(index)`, with one random image per label, of its class.

        `labels` are [B], on the CPU.

        Raises:
            InputError: if a class has no image.
        """
        by_class, counts = self._by_class
        if int(counts[labels].min()) == 0:
            raise InputError(
                "search.validation_batch is matched, but class "
                f"{int(labels[counts[labels] == 0][0])} of the training batch has no validation "
                "image. Use more images, or another validation_batch."
            )

        # Each class's images stand together in `by_class`: one of them is drawn per label.
        generator = torch.Generator().manual_seed(_mixed(self._seed, index, 3))
        whole = torch.rand(len(labels) * self._part[1], generator=generator, dtype=torch.float64)
        draws = rows_of(whole, self._part)
        ranks = (draws * counts[labels]).long()  # of the image among those of its class
        firsts = counts.cumsum(0) - counts
        return self._prepared(by_class[firsts[labels] + ranks], index)

    @cached_property
    def _by_class(self) -> tuple[Tensor, Tensor]:
        """The positions of the images, class by class [N], and each class's count [classes]."""
        labels = self._images.labels
        return labels.argsort(stable=True), torch.bincount(labels, minlength=self._num_classes)

    def _prepared(self, chosen: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The chosen images, [B] positions, normalised and augmented.

        The random numbers are those of batch `index`.
        """
        # The order of the images, their windows and colours, and the other changes each have random
        # numbers of their own, so that one of them does not shift the draws of another.
        images = self._normalise.centred(self._photographs(chosen, index))
        generator = torch.Generator().manual_seed(_mixed(self._seed, index, 1))
        images = augmented(images, self._augmentation, generator, self._normalise.black, self._part)
        return images, self._labels[sent(chosen, self._device)]

    def _photographs(self, chosen: Tensor, index: int) -> Tensor:
        """The chosen images in [0, 1], after random changes of window and colours."""
        how = self._augmentation
        generator = torch.Generator().manual_seed(_mixed(self._seed, index, 2))
        draws = rows_of(torch.rand(self._batch_size, *CROP_DRAWS, generator=generator), self._part)
        pixels = self._images.pixels
        if how.resized_crop:
            images = random_crops(pixels, chosen, draws)
        else:
            places = sent(chosen, pixels.device) if isinstance(pixels, Tensor) else chosen
            images = pixels[places]
        return jittered(self._normalise.scaled(images), how.color_jitter, generator, self._part)

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position."""
        self.position = state["position"]


class PairedBatches:
    """Yields (training images, their labels, validation images, their labels).

    Args:
        train: the stream of training batches.
        validation: the stream of validation batches.
        matched: whether each training image gets a validation image of its class, instead of the
            stream's batches.
    """

    def __init__(self, train: Batches, validation: Batches, *, matched: bool = False) -> None:
        self._train, self._validation, self._matched = train, validation, matched
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        while True:
            images, labels = self._train.batch(self.position)
            if self._matched:
                of_training = self._train.labels(self.position)
                validation = self._validation.of_classes(of_training, self.position)
            else:
                validation = self._validation.batch(self.position)
            self.position += 1
            yield (images, labels, *validation)

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
        chosen = torch.arange(start, min(start + batch_size, len(images)))
        pixels = normalise.centred(normalise.scaled(images.pixels[chosen]))
        yield pixels, images.labels[chosen].to(device)


class _Normaliser:
    """Maps uint8 pixels to the data set's zero mean and unit variance."""

    def __init__(self, dataset: Dataset, device: torch.device | str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._mean = torch.tensor(dataset.mean, dtype=dtype, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(dataset.std, dtype=dtype, device=device).view(1, -1, 1, 1)

    @property
    def black(self) -> Tensor:
        """A black pixel, [1, C, 1, 1]."""
        return -self._mean / self._std

    def scaled(self, pixels: Tensor) -> Tensor:
        """Pixels of 0 to 255 → values in [0, 1], on the device."""
        return sent(pixels, self._device).to(self._dtype) / 255.0

    def centred(self, values: Tensor) -> Tensor:
        """Values in [0, 1] → normalised ones."""
        return (values - self._mean) / self._std


def _mixed(*numbers: int) -> int:
    """A seed from several numbers, well apart for neighbouring ones."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _reduced(images: Images, size: int) -> Images:
    pixels = images.pixels
    if isinstance(pixels, ImageFiles):
        return replace(images, pixels=pixels.at_size(size))
    if pixels.shape[-1] <= size:
        return images
    # In parts, since floating-point numbers take four times the memory.
    small = [
        F.interpolate(
            part.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )
        for part in torch.split(pixels, 4096)
    ]
    return replace(images, pixels=torch.cat(small).round().clamp(0, 255).to(torch.uint8))
