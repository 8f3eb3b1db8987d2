"""Predictions of a trained network for image files, and its error where their classes are known."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lfmcw_app.classifier import Classifier, Preprocess
from lfmcw_app.errors import InputError
from lfmcw_app.listing import SUFFIXES

__all__ = ["ClassScore", "ImageFile", "Prediction", "Predictions", "find_images", "predict"]


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image to predict.

    Attributes:
        path: of the file.
        label: its class, where it is in a folder that is named after one; else None.
    """

    path: Path
    label: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What the network says of an image.

    Attributes:
        image: which.
        probabilities: [classes], the softmax of the logits.
    """

    image: ImageFile
    probabilities: Tensor

    def top(self, count: int) -> list[tuple[int, float]]:
        """The likeliest classes with their probabilities; of equal ones the class listed first."""
        order = self.probabilities.argsort(descending=True, stable=True)[:count]
        return [(label, float(self.probabilities[label])) for label in order.tolist()]


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """How the images of a class were predicted.

    Attributes:
        label: the class.
        images: number of its images.
        wrong: how many of them were taken for another class.
    """

    label: int
    images: int
    wrong: int

    @property
    def error_percent(self) -> float:
        """Of the class."""
        return 100.0 * self.wrong / self.images


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The predictions of several images.

    Attributes:
        class_names: one name per class.
        done: of the images that could be read, in their order.
        failed: image → why it could not be read.
    """

    class_names: tuple[str, ...]
    done: tuple[Prediction, ...]
    failed: dict[Path, str]

    def scores(self) -> list[ClassScore]:
        """For each class that has images whose class is known."""
        images = [0] * len(self.class_names)
        wrong = list(images)
        for prediction in self.done:
            label = prediction.image.label
            if label is not None:
                images[label] += 1
                wrong[label] += prediction.top(1)[0][0] != label
        return [
            ClassScore(label=label, images=images[label], wrong=wrong[label])
            for label in range(len(images))
            if images[label]
        ]


def find_images(sources: Sequence[Path], class_names: Sequence[str]) -> list[ImageFile]:
    """The images that are named, and those in the folders that are named, each once.

    In a folder, files count that end as images do; an image is of the class that the outermost of
    the folders between is named after. A file that is named by itself may end in anything.

    Args:
        sources: files and folders, which are searched through all their levels.
        class_names: of the network.

    Raises:
        InputError: if one does not exist, or there is no image.
    """
    missing = [path for path in sources if not path.exists()]
    if missing:
        raise InputError(f"There is no file or folder {', '.join(map(str, missing))}.")
    labels = {name: label for label, name in enumerate(class_names)}
    found: dict[Path, ImageFile] = {}
    for source in sources:
        for path in _files_below(source) if source.is_dir() else [source]:
            folders = path.relative_to(source).parts[:-1] if source.is_dir() else ()
            known = (labels[name] for name in folders if name in labels)
            found.setdefault(path, ImageFile(path=path, label=next(known, None)))
    if not found:
        raise InputError(
            f"There are no images in {', '.join(map(str, sources))} (files ending in "
            f"{', '.join(SUFFIXES)})."
        )
    return list(found.values())


def _files_below(folder: Path) -> Iterator[Path]:
    """The image files of a folder and those below it, sorted, without hidden ones."""
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(path, name)


@torch.no_grad()
def predict(
    network: Classifier,
    preprocess: Preprocess,
    class_names: tuple[str, ...],
    images: Sequence[ImageFile],
    *,
    batch_size: int = 64,
) -> Predictions:
    """Predicts images; those that cannot be read are told together, with the reasons.

    Args:
        network: on the device that computes.
        preprocess: decodes the files.
        class_names: one name per logit.
        images: which.
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
        except InputError as error:
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
