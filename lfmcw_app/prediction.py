"""Predictions of a trained network for image files, and its error if their classes are known."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lfmcw_app.classifier import Classifier, Preprocess
from lfmcw_app.decoding import DamagedImage
from lfmcw_app.errors import InputError, listed
from lfmcw_app.folders import identity_of, images_below, in_one_spelling
from lfmcw_app.near_paths import near_paths

__all__ = [
    "ClassScore", "FoundImages", "ImageFile", "Prediction", "Predictions", "find_images", "predict",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image to predict.

    Attributes:
        path: of the file.
        label: its class, if it is in a folder named after one; otherwise None.
        trained_on: whether the network was trained on it; None if that is unknown.
    """

    path: Path
    label: int | None = None
    trained_on: bool | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """The network's prediction for an image.

    Attributes:
        image: which.
        probabilities: [classes], the softmax of the logits.
    """

    image: ImageFile
    probabilities: Tensor

    @property
    def is_wrong(self) -> bool:
        """Whether the image's class is known, and another one is likelier."""
        return self.image.label is not None and self.top(1)[0][0] != self.image.label

    def top(self, count: int) -> list[tuple[int, float]]:
        """The most likely classes with their probabilities; if they tie, the class listed first."""
        order = self.probabilities.argsort(descending=True, stable=True)[:count]
        return [(label, float(self.probabilities[label])) for label in order.tolist()]


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """The predictions for the images of a class.

    Attributes:
        label: the class.
        images: number of its images.
        wrong: how many of them were predicted as another class.
    """

    label: int
    images: int
    wrong: int

    @property
    def error_percent(self) -> float:
        """Share of the class's images that are wrong, in percent."""
        return 100.0 * self.wrong / self.images


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The predictions of several images.

    Attributes:
        class_names: one name per class.
        done: predictions for the images that could be read, in their order.
        failed: image → why it could not be read.
    """

    class_names: tuple[str, ...]
    done: tuple[Prediction, ...]
    failed: dict[Path, str]

    @property
    def trained_on(self) -> int:
        """How many of the predicted images the network was trained on, as far as that is known."""
        return sum(bool(prediction.image.trained_on) for prediction in self.done)

    def held_out(self) -> Predictions:
        """The predictions for images that the network was not trained on."""
        done = tuple(one for one in self.done if one.image.trained_on is False)
        return replace(self, done=done)

    def scores(self) -> list[ClassScore]:
        """The predictions class by class, for images whose class is known."""
        images = [0] * len(self.class_names)
        wrong = list(images)
        for prediction in self.done:
            label = prediction.image.label
            if label is not None:
                images[label] += 1
                wrong[label] += prediction.is_wrong
        return [
            ClassScore(label=label, images=images[label], wrong=wrong[label])
            for label in range(len(images))
            if images[label]
        ]


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """The images of some files and folders.

    Attributes:
        images: each once, whatever its names.
        skipped: kind of file → how many files in the folders are not images.
        ambiguous: paths of images that are in the folders of several classes under several names;
            these have no label.
    """

    images: tuple[ImageFile, ...]
    skipped: dict[str, int]
    ambiguous: tuple[Path, ...] = ()


def _unexpanded(path: Path) -> str:
    """Advice on a missing path that is written as a pattern or as standard input; "" for others."""
    if str(path) == "-":
        return " For a list of paths in standard input give --list -."
    if set("*?[") & set(str(path)):
        return " A pattern in quotes stays as it is: write it without them, or name the folder."
    return ""


def find_images(sources: Sequence[Path], class_names: Sequence[str]) -> FoundImages:
    """Finds the named images, and those in the named folders.

    An image in a folder belongs to the class that the outermost folder above it is named after. A
    file that is named directly may have any ending. A file under several names is one image; its
    class is that which any of them tells, and unknown if they tell several.

    Args:
        sources: files, and folders with everything below them.
        class_names: of the network.

    Raises:
        InputError: if one does not exist, or there is no image.
    """
    missing = [path for path in sources if not os.path.exists(path)]
    if missing:
        named = listed(list(map(str, missing)))
        raise InputError(
            f"There is no file or folder {named}.{_unexpanded(missing[0])}{near_paths(missing[0])}"
        )
    labels = {in_one_spelling(name): label for label, name in enumerate(class_names)}
    # A file may be named twice, by links or by folders that overlap; not each name tells a class.
    paths: dict[tuple[int, int], Path] = {}
    found: dict[tuple[int, int], set[int]] = {}
    skipped: Counter[str] = Counter()
    for source in sources:
        if not source.is_dir():
            paths.setdefault(identity_of(source), source)
            continue
        images, others = images_below(source)
        skipped += Counter(others)
        for name, path in images:
            image = identity_of(path)
            paths.setdefault(image, Path(path))
            known = (labels[folder] for folder in name.split("/")[:-1] if folder in labels)
            if (label := next(known, None)) is not None:
                found.setdefault(image, set()).add(label)
    if not paths:
        raise InputError(f"There are no images in {listed(list(map(str, sources)))}.")
    certain = {image: min(of_image) for image, of_image in found.items() if len(of_image) == 1}
    return FoundImages(
        images=tuple(
            ImageFile(path=path, label=certain.get(image)) for image, path in paths.items()
        ),
        skipped=dict(skipped),
        ambiguous=tuple(paths[image] for image in found if image not in certain),
    )


@torch.no_grad()
def predict(
    network: Classifier,
    preprocess: Preprocess,
    class_names: tuple[str, ...],
    images: Sequence[ImageFile],
    *,
    batch_size: int = 64,
) -> Predictions:
    """Predicts images; those that cannot be read are reported together, with the reasons.

    Args:
        network: on the device that computes.
        preprocess: decodes the files.
        class_names: one name per logit.
        images: the images to predict.
        batch_size: images at a time; memory grows with it, and results do not depend on it beyond
            rounding.

    Raises:
        InputError: if the network returns numbers that are not finite.
    """
    device = next(network.parameters()).device
    done: list[Prediction] = []
    failed: dict[Path, str] = {}

    def decoded(image: ImageFile) -> Tensor | str:
        try:
            return preprocess.pixels(image.path)
        except DamagedImage as error:
            return error.reason
        except InputError as error:  # its depth differs from that of the training images
            return str(error)

    # Pillow releases the interpreter's lock while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels: list[Tensor] = []
            read: list[ImageFile] = []
            for image, result in zip(batch, pool.map(decoded, batch), strict=True):
                if isinstance(result, str):
                    failed[image.path] = result
                else:
                    pixels.append(result)
                    read.append(image)
            if not read:
                continue
            logits = network(preprocess.normalised(torch.stack(pixels).to(device)))
            if not bool(torch.isfinite(logits).all()):
                raise InputError(
                    f"The network's output for {read[0].path} and {len(read) - 1} more is not "
                    "finite. Its weights are too large: see the run's report, and train it again."
                )
            for image, row in zip(read, logits.double().softmax(1).cpu(), strict=True):
                done.append(Prediction(image=image, probabilities=row))
    return Predictions(class_names=class_names, done=tuple(done), failed=failed)
