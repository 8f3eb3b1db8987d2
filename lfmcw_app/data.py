"""Image data sets, the split for the search, and batches as a function of seed and position."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.augmentation import CROP_DRAWS, Part, augmented, jittered, rows_of, sent
from lfmcw_app.decoding import Decoding
from lfmcw_app.errors import InputError, shown
from lfmcw_app.fingerprint import Fingerprint
from lfmcw_app.image_files import ImageFiles, random_crops
from lfmcw_app.image_survey import DecodingOptions, Reading
from lfmcw_app.names import FOLDER, RANDOM
from lfmcw_app.own_datasets import dataset_names, read_own
from lfmcw_app.prefetch import DEPTH, Prefetcher
from lfmcw_app.readers import DATASETS, NOISE, Images, Parts, read_folder, read_noise
from lfmcw_app.recipe import Augmentation
from lfmcw_app.splits import search_indices, stratified
from mlo.errors import CheckpointError, nearest

__all__ = [
    "DATASETS", "Batches", "Dataset", "Images", "PairedBatches", "check_dataset",
    "in_order", "load_dataset", "resident", "search_places", "search_split", "short_name",
    "subset", "subset_places",
]  # fmt: skip

RESIDENT_SHARE = 0.1
LEAST_GPU = 16 * 10**9
"""Bytes that a GPU is assumed to have if there is none (the meta device)."""
LAST_POSITION = 10**15
STATISTICS_IMAGES = 4096
"""Maximum number of a folder's images that are read for mean and standard deviation."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's training images, the commonly used values."""


# ------------------------------ data sets


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set with its training and test images.

    Attributes:
        mean: mean of each channel of the training images, for pixels in [0, 1].
        std: standard deviation of each channel.
        class_names: one name per class.
        validation: images of D_val; None where D_val is a part of the training images.
        fingerprint: identifies the data; empty for data made in memory.
        left_out: says what else a folder holds.
        files: what was read of a folder's files.
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
    files: Reading | None = None

    @property
    def decoding(self) -> Decoding:
        """How a file becomes an image like those of the data set."""
        if isinstance(self.train.pixels, ImageFiles):
            return self.train.pixels.decoding
        if self.files is not None:
            return self.files.decoding
        return Decoding(size=self.image_size, channels=1 if self.channels == 1 else 3)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def source(self) -> str:
        """The folder or file that was read; "" for a data set of a package."""
        return self.train.source

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
        shape = f"{self.image_size}×{self.image_size}, {channels}"
        said = (
            f"{sum(sizes.values()):,} images, {self.num_classes:,} classes, "
            f"{' / '.join(f'{size:,} {part}' for part, size in sizes.items())}, "
            f"{shape if self.files is None else self.files.summary()}"
        )
        if isinstance(self.train.pixels, ImageFiles) and not self.name.startswith(RANDOM):
            said += ", read from files as needed"
        if self.source and not self.name.startswith(FOLDER):
            said += f", from {self.source}"
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
        is_folder = os.path.isdir(os.path.expanduser(name))
        meant = f"To use the folder of that name, write folder:{name}. " if is_folder else ""
        raise InputError(
            f"Unknown data set {name!r}. {meant}{nearest(name, dataset_names())} Your own images: "
            "folder:PATH; your own data set: lfmcw_app.register_dataset, in the script that "
            "runs them; noise: random:NAME."
        )
    if name.strip() == FOLDER:
        raise InputError(
            "folder: needs the path of a folder of images, for example folder:pictures."
        )


def short_name(name: str) -> str:
    """A data set's name for file names and titles: for folder:PATH the last part of the path."""
    if name.startswith(FOLDER):
        return Path(name.removeprefix(FOLDER)).resolve().name
    return name.replace(":", "-")


def load_dataset(
    name: str,
    root: Path = Path("data"),
    image_size: int | None = None,
    in_memory: bool | None = None,
    groups: str | None = None,
    options: DecodingOptions | None = None,
) -> Dataset:
    """Reads a data set from `root`, from where the system keeps it, or from its authors' site.

    Args:
        name: one of `DATASETS`, a name of your own (`register_dataset`), folder:PATH for a folder
            of images (see `read_folder`), or random:NAME for random images in the shape of another
            data set (see `read_noise`).
        root: folder of data files.
        image_size: larger images are reduced to this height and width; images in files, and your
            own pictures of any size, are brought to it.
        in_memory: for folder:PATH, whether the images are decoded at once; see `pixels_of`.
        groups: for folder:PATH, a file that says which images stay together; see `read_groups`.
        options: for folder:PATH, how files become pixels; None for the defaults.

    Raises:
        InputError: for an unknown name, or a data set that is neither on disk nor can be
            downloaded.
    """
    check_dataset(name)
    if groups is not None and not name.startswith(FOLDER):
        raise InputError(f"data.groups is for the images of a folder (folder:PATH), not {name}.")
    of_program = name in DATASETS or name.startswith(RANDOM)
    if of_program and options not in (None, DecodingOptions()):
        raise InputError(
            "data.fit, data.channels, data.bits, data.background and data.on_damaged are for the "
            f"images of a folder (folder:PATH), not {name}."
        )
    if name.startswith(FOLDER):
        folder = Path(os.path.expanduser(name.removeprefix(FOLDER)))
        read = read_folder(folder, image_size, in_memory, groups, options)
    elif name.startswith(RANDOM):
        read = read_noise(name.removeprefix(RANDOM))
    elif of_program:
        read = DATASETS[name](root)
    else:
        read = read_own(name, root, image_size, options)
    train, validation, test = read.train, read.validation, read.test
    class_names = read.class_names

    # Checked before anything is computed: files may be damaged, or not match their names.
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
        files=read.reading,
    )


def _fingerprint(read: Parts) -> Fingerprint:
    """The fingerprint of images in memory, before they are reduced: that rounds by machine."""
    parts = {"train": read.train, "validation": read.validation, "test": read.test}
    pixels = {}
    for part, images in parts.items():
        if images is not None:
            assert isinstance(images.pixels, Tensor)
            pixels[part] = (images.pixels, images.labels)
    return Fingerprint.of_pixels(pixels, read.class_names)


def _statistics(images: Images, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels in [0, 1].

    They come from histograms, which take no memory. ImageNet and random images have ImageNet's;
    those of a large folder come from a part of its images, the same whether they are in memory or
    in files.
    """
    if name == "imagenet" or name.startswith(RANDOM):
        return IMAGENET_MEAN, IMAGENET_STD
    pixels = images.pixels
    if name.startswith(FOLDER) and len(images) > STATISTICS_IMAGES:
        pixels = pixels[torch.linspace(0, len(images) - 1, STATISTICS_IMAGES).long()]
    elif isinstance(pixels, ImageFiles):
        pixels = pixels[torch.arange(len(images))]
    # In parts, since counting takes eight bytes per pixel.
    values = torch.arange(256, dtype=torch.float64) / 255.0
    mean, std = [], []
    for channel in range(pixels.shape[1]):
        parts = torch.split(pixels[:, channel], 4096)
        histograms = [torch.bincount(part.flatten(), minlength=256) for part in parts]
        counts = torch.stack(histograms).sum(0)
        mean.append(float(counts.double() @ values / counts.sum()))
        std.append(float((counts.double() @ (values - mean[-1]) ** 2 / (counts.sum() - 1)).sqrt()))
    if not max(std) > 0:
        raise InputError(
            f"All pixels of the training images of {name} are equal. Are the files right? If the "
            "transparency alone carries the picture, set data.background."
        )
    # A channel that is empty in all images (a stain that was not used) is left at zero.
    return tuple(mean), tuple(value if value > 0 else 1.0 for value in std)


# ------------------------------ the split


HALVES = (0.5, 0.5)


def search_split(
    dataset: Dataset, limit: int | None, seed: int, fractions: tuple[float, float] = HALVES
) -> tuple[Images, Images]:
    """Splits the training images (or `limit` of them) in D_tr and D_val, stratified and seeded.

    It ignores the conditions of a recipe, such as wrong labels; a search uses `parts.search_parts`.

    If the data set has its own validation images, these are D_val and all training images are D_tr,
    and `limit` applies to both.

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
    first, second = search_places(dataset, limit, seed, fractions)
    whole = dataset.train if dataset.validation is None else dataset.validation
    return dataset.train[first], whole[second]


def search_places(
    dataset: Dataset,
    limit: int | None,
    seed: int,
    fractions: tuple[float, float] = HALVES,
    kept: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The places of the images of D_tr among the training images, and of those of D_val.

    See `search_split`.

    Args:
        dataset: the data set.
        limit: number of images that are split.
        seed: decides which.
        fractions: of these images, the parts that D_tr and D_val get.
        kept: places of the training images that are kept, and of the validation images if the data
            set has its own; None for all.
    """
    if min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise InputError(
            "The fractions of the training images for the search must be positive and sum to at "
            f"most 1, got {fractions}."
        )
    train, validation = dataset.train, dataset.validation
    pool, held = kept or (torch.arange(len(train)), None)
    if validation is None:
        groups = None if train.groups is None else train.groups[pool]
        first, second = search_indices(train.labels[pool], limit, seed, fractions, groups)
        return pool[first], pool[second]
    if tuple(fractions) != HALVES:
        raise InputError(
            f"data.search_fractions is {list(fractions)}, but {dataset.name} has its own "
            "validation images, so there is nothing to split. Drop it."
        )
    held = torch.arange(len(validation)) if held is None else held
    share = 1.0 if limit is None else min(1.0, limit / (len(pool) + len(held)))
    places = []
    for part, labels in ((pool, train.labels[pool]), (held, validation.labels[held])):
        count = max(1, round(share * len(part)))
        places.append(part[stratified(labels, count, seed, least=(1, 0))[0]])
    return places[0], places[1]


def subset(images: Images, limit: int | None, seed: int) -> Images:
    """Returns at most `limit` images, stratified, with every class if there is room."""
    if limit is None or limit >= len(images):
        return images
    return images[subset_places(images.labels, limit, seed)]


def subset_places(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """The places of the images of a `subset`, by their labels [N]; all in their order if it is all.

    No image is touched.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    return stratified(labels, limit, seed, least=(1, 0))[0]


# ------------------------------ batches


def resident(images: Images, how: Augmentation, device: torch.device | str) -> Images:
    """The images with their pixels on a GPU, where batches are cut out without being sent.

    The pixels stay where they are if the device is a CPU, if they are in files, if the CPU cuts
    windows out of them (`resized_crop`), or if they would take more than `RESIDENT_SHARE` of the
    GPU's free memory.
    """
    device, pixels = torch.device(device), images.pixels
    if device.type == "cpu" or not isinstance(pixels, Tensor) or how.resized_crop:
        return images
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else LEAST_GPU
    if pixels.numel() > RESIDENT_SHARE * free:
        return images
    return replace(images, pixels=pixels.to(device))


class Batches:
    """An endless stream of normalised batches; batch k of a stream depends on the seed and k alone.

    So streams with one seed are synchronised without sharing anything, and the position in a stream
    is one number. Threads read files ahead and cut out random windows. All other work on the pixels
    is done when the batch is requested.

    Args:
        images: the images; at least one batch of them. Streams share images that are already on the
            device (`resident`).
        dataset: gives the normalisation.
        batch_size: examples in a batch. The last ones of a pass that do not fill a batch wait for
            another pass.
        seed: decides the order and the augmentation.
        augmentation: random changes; None for none.
        device: where batches go.
        dtype: of the images.
        part: which part of every batch this stream yields, with the random changes of the whole
            batch.
        matched_to: a stream of training batches. If it is given, batch k has one random image of
            the same class for each label of that stream's batch k. Fewer images than a batch are
            enough.
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
        matched_to: Batches | None = None,
    ) -> None:
        if len(images) < batch_size and matched_to is None:
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
        if matched_to is None:
            self._chosen = self._shuffled
        else:
            self._chosen = partial(self._of_classes, matched_to.labels)
        # Indexing a tensor takes less time than handing it over (docs/benchmarks.md).
        slow = isinstance(images.pixels, ImageFiles) or self._augmentation.resized_crop
        self._read = Prefetcher(self._photographs, depth=DEPTH if slow else 0)
        self.position = 0

    def alike(self) -> Batches:
        """Returns a stream of the same batches, with its own position.

        Both share what is read ahead, so a batch that both reach is read once.
        """
        other = copy.copy(self)
        other.position = 0
        return other

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            batch = self.batch(self.position)
            self.position += 1
            yield batch

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns batch `index` of the stream, or its part of it.

        Images [B, C, H, W] are normalised; labels are [B].
        """
        chosen, pixels = self._read.get(index, id(self))
        # The order of the images, their windows and colours, and the other changes have separate
        # random numbers, so that none of them shifts the draws of another.
        how, (_, colours) = self._augmentation, self._windows_and_colours(index)
        images = self._normalise.scaled(pixels)
        images = self._normalise.centred(jittered(images, how.color_jitter, colours, self._part))
        generator = torch.Generator().manual_seed(_mixed(self._seed, index, 1))
        images = augmented(images, how, generator, self._normalise.black, self._part)
        return images, self._labels[sent(chosen, self._device)]

    def labels(self, index: int) -> Tensor:
        """The labels of batch `index`, [B], on the CPU."""
        return self._images.labels[self._chosen(index)]

    def _shuffled(self, index: int) -> Tensor:
        """The positions of the images of batch `index`, [B]."""
        # Every epoch has its own order, a function of the seed. The last one is cached; threads
        # that prepare batches of two epochs may replace it at any time.
        epoch, within = divmod(index, self.per_epoch)
        order = self._order
        if order is None or order[0] != epoch:
            generator = torch.Generator().manual_seed(_mixed(self._seed, epoch, 0))
            order = (epoch, torch.randperm(len(self._images), generator=generator))
            self._order = order
        whole = order[1][within * self._batch_size : (within + 1) * self._batch_size]
        return rows_of(whole, self._part)

    def _of_classes(self, labels_of: Callable[[int], Tensor], index: int) -> Tensor:
        """The positions of one random image per label of `labels_of(index)`, of its class, [B].

        Raises:
            InputError: if a class has no image.
        """
        labels = labels_of(index)
        by_class, counts = self._by_class
        if int(counts[labels].min()) == 0:
            raise InputError(
                f"Class {int(labels[counts[labels] == 0][0])} of the training batch has no image "
                "among those that could match it (search.validation_batch matched, or "
                "search.generator.name real). Use more images, or turn the matching off."
            )

        # Each class's images are adjacent in `by_class`: one of them is drawn per label.
        generator = torch.Generator().manual_seed(_mixed(self._seed, index, 3))
        whole = torch.rand(len(labels) * self._part[1], generator=generator, dtype=torch.float64)
        draws = rows_of(whole, self._part)
        ranks = (draws * counts[labels]).long()  # of the image among those of its class
        firsts = counts.cumsum(0) - counts
        return by_class[firsts[labels] + ranks]

    @cached_property
    def _by_class(self) -> tuple[Tensor, Tensor]:
        """The positions of the images, class by class [N], and each class's count [classes]."""
        labels = self._images.labels
        return labels.argsort(stable=True), torch.bincount(labels, minlength=self._num_classes)

    def _photographs(self, index: int) -> tuple[Tensor, Tensor]:
        """The positions of the images of batch `index`, [B], and their pixels, uint8.

        The pixels are those of random windows if the augmentation has them. Threads run this: it
        reads files, but does not touch the device or the global random state.
        """
        chosen, pixels = self._chosen(index), self._images.pixels
        if self._augmentation.resized_crop:
            return chosen, random_crops(pixels, chosen, self._windows_and_colours(index)[0])
        places = sent(chosen, pixels.device) if isinstance(pixels, Tensor) else chosen
        return chosen, pixels[places]

    def _windows_and_colours(self, index: int) -> tuple[Tensor, torch.Generator]:
        """The draws of the windows of batch `index`, and the generator of its colours."""
        generator = torch.Generator().manual_seed(_mixed(self._seed, index, 2))
        draws = torch.rand(self._batch_size, *CROP_DRAWS, generator=generator)
        return rows_of(draws, self._part), generator

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position.

        Raises:
            CheckpointError: if it is none.
        """
        self.position = _position(state)


def _position(state: Mapping[str, Any]) -> int:
    """The position in a stream's state, which may come from an edited file."""
    position = state.get("position")
    if type(position) is not int or not 0 <= position < LAST_POSITION:
        raise CheckpointError(
            f"The position of a stream of batches is a count below {LAST_POSITION:,}, got "
            f"{shown(position)}: the checkpoint was edited. Use an earlier one."
        )
    return position


class PairedBatches:
    """Yields batch k of several streams together: images and labels of one, then of the next.

    Args:
        streams: the stream of training batches, that of validation batches, and any other.
    """

    def __init__(self, *streams: Batches) -> None:
        self._streams = streams
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            batches = [stream.batch(self.position) for stream in self._streams]
            self.position += 1
            yield tuple(itertools.chain(*batches))

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position.

        Raises:
            CheckpointError: if it is none.
        """
        self.position = _position(state)


def in_order(
    images: Images,
    dataset: Dataset,
    batch_size: int,
    device: torch.device | str = "cpu",
    part: Part = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every image once, normalised and in order, for testing. Files are read ahead.

    Args:
        images: the images.
        dataset: gives the normalisation.
        batch_size: images in a batch; the last one may have fewer.
        device: where batches go.
        part: which batches: those whose number is part[0] modulo part[1]. The others are not read.
    """
    normalise = _Normaliser(dataset, device, torch.float32)
    parts = torch.split(torch.arange(len(images)), batch_size)[part[0] :: part[1]]
    in_files = isinstance(images.pixels, ImageFiles)
    read = Prefetcher(
        lambda k: images.pixels[parts[k]], depth=DEPTH if in_files else 0, end=len(parts)
    )
    for k, chosen in enumerate(parts):
        pixels = normalise.centred(normalise.scaled(read.get(k)))
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
