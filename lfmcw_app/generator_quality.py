"""Measures of a conditional generator: GAN-test, GAN-train, and the variety within a class.

    GAN-test   accuracy on generated pictures of a classifier trained on real ones: whether a
               picture shows its class. Real held-out pictures give the value to compare with.
    GAN-train  accuracy on real held-out pictures of a classifier trained on as many generated ones:
               what can be learned from them.
    variety    the distance between two generated pictures of a class, relative to that of real
               ones: 0 for one picture per class, 1 for pictures as different as real ones.

Each is the mean over the classes (for accuracies: balanced accuracy). So a classifier that always
answers the largest class is at chance, which is one over the number of classes, however unequal
the classes are.

A network that learns from generated pictures can recognise a mark of their class that no real
picture has. Its own accuracy on them is then high, while GAN-train is near chance.

The real pictures are those of the search: D_tr to train on, D_val to test on. They have their
correct labels, even if `data.wrong_labels` gives the search others. So the measures show if a
generator that learned from wrong labels draws another class than requested. The classifier is a
fixed small network, so that values of different runs can be compared. Training it takes 300 steps:
1.8 seconds on one core at 16×16 pixels, 0.6 at 8×8, 7 at 32×32; larger pictures are reduced to 32.
It is trained once per search on real pictures, and once per measurement on generated ones.

Reference: Shmelkov, Schmid and Alahari, How good is my GAN? (2018), section 3.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.data import Dataset, Images, in_order, subset
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.optimizers import step_options
from lfmcw_app.parts import search_parts
from lfmcw_app.recipe import Recipe
from mlo.randomness import preserved

__all__ = ["Judge", "Quality", "QualityByClass"]

MOST_IMAGES = 5000
"""Maximum number of pictures of each kind that are used."""

LARGEST_SIZE = 32
"""Largest height and width that the classifier sees."""

STEPS, BATCH, LEARNING_RATE, WIDTH = 300, 64, 0.01, 16
"""Settings of the classifier's training. Trained on 2,000 images of CIFAR-10 at 16×16, it
recognises 48% of other images. Half the width or half the steps give 45% and 41%.
"""

DRAWN_AT_ONCE = 100
"""Pictures in a batch of the generator. Its norms see this batch as they see one for W2."""

CELLS = 8
"""Largest side of the grid of means by which pictures are compared."""


@dataclass(frozen=True, kw_only=True)
class QualityByClass:
    """The measures of each class, in the order of the class names.

    Attributes:
        gan_test: %; None for a class without pictures.
        gan_train: %.
        real: what the classifier trained on real pictures knows of real held-out ones, %.
        variety: None where a class has fewer than two pictures, or real ones that are all equal.
    """

    gan_test: tuple[float | None, ...]
    gan_train: tuple[float | None, ...]
    real: tuple[float | None, ...]
    variety: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The measures of a generator: means over the classes that have one.

    Attributes:
        gan_test: accuracy on generated pictures after training on real ones, %.
        gan_train: accuracy on real held-out pictures after training on generated ones, %.
        real: accuracy on real held-out pictures after training on real ones, %.
        variety: None where no class has one.
        by_class: the same, class by class.
        largest: share of the largest class among the generated pictures, %: what always answering
            this class gives over all of them. None in files of earlier versions.
    """

    gan_test: float
    gan_train: float
    real: float
    variety: float | None
    by_class: QualityByClass
    largest: float | None = None

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        data = asdict(self)
        data["by_class"] = {key: list(values) for key, values in data["by_class"].items()}
        return {**data, "chance": round(self.chance, 3)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Quality:
        """From plain data; see `to_data`.

        Accuracies are averaged over the classes again, because earlier versions wrote those over
        all pictures.

        Raises:
            ValueError: if they are none.
        """
        # (A list stands for a tuple in JSON, and there alone.)
        try:
            read = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the measures"
            raise ValueError(f"{where}: {first['msg'].lower()}") from None
        by_class = read.by_class
        lengths = set(map(len, (by_class.gan_test, by_class.gan_train, by_class.real)))
        if len(lengths | {len(by_class.variety)}) > 1 or lengths == {0}:
            raise ValueError("by_class needs one value of each measure for each class")
        tested, learned, known = map(_mean, (by_class.gan_test, by_class.gan_train, by_class.real))
        return replace(
            read,
            gan_test=read.gan_test if tested is None else tested,
            gan_train=read.gan_train if learned is None else learned,
            real=read.real if known is None else known,
        )

    @property
    def chance(self) -> float:
        """Mean accuracy over the classes of a guess, or of one answer for all pictures, %."""
        return 100.0 / len(self.by_class.gan_test)

    def __str__(self) -> str:
        variety = "–" if self.variety is None else f"{self.variety:.2f}"
        return (
            f"GAN-test {self.gan_test:.1f}%, GAN-train {self.gan_train:.1f}% (real pictures "
            f"{self.real:.1f}%, chance {self.chance:.1f}%), variety within a class {variety} (real "
            "pictures 1); means over the classes"
        )


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    """Normalised pictures [N, C, S, S] and their labels [N], on the device."""

    images: Tensor
    labels: Tensor


class Judge:
    """Measures generators of one search, always in the same way.

    The measures are a function of the pictures, the seed and the generator's weights. The random
    state and the generator do not change. Nothing is read or trained before the first measurement.

    Args:
        train: real pictures to train on: D_tr.
        held_out: real pictures to test on: D_val.
        dataset: gives normalisation and the number of classes.
        seed: of the classifier's training and of the generator's noise.
        device: where it works.
    """

    def __init__(
        self,
        train: Images,
        held_out: Images,
        dataset: Dataset,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._train, self._held_out, self._dataset = train, held_out, dataset
        self._seed, self._device = seed, torch.device(device)

    @classmethod
    def of(cls, dataset: Dataset, recipe: Recipe, device: torch.device | str = "cpu") -> Judge:
        """The judge of a recipe's search."""
        parts = search_parts(recipe, dataset)
        return cls(*parts.rightly_labelled, dataset, seed=recipe.seed, device=device)

    def measure(self, source: ImageGenerator | Images) -> Quality:
        """Measures a generator, by as many pictures of each class as there are real ones.

        They are drawn as W2 sees them: by `sample`, in training mode.

        Args:
            source: a generator, or images of which some of each class are drawn in its place.
        """
        labels = self._real.labels
        if isinstance(source, Images):
            drawn = self._prepared(source[self._chosen(source.labels, labels.cpu())])
        else:
            drawn = self._drawn(source, labels)
        tested = self._right(self._of_real, drawn)
        learned = self._right(self._trained_on(drawn), self._others)
        known = self._right(self._of_real, self._others)
        by_class = QualityByClass(
            gan_test=self._shares(tested, drawn.labels),
            gan_train=self._shares(learned, self._others.labels),
            real=self._shares(known, self._others.labels),
            variety=self._variety(drawn),
        )
        return Quality(
            gan_test=_mean(by_class.gan_test) or 0.0,
            gan_train=_mean(by_class.gan_train) or 0.0,
            real=_mean(by_class.real) or 0.0,
            variety=_mean(by_class.variety, digits=4),
            by_class=by_class,
            largest=round(100.0 * int(drawn.labels.bincount().max()) / len(drawn.labels), 3),
        )

    # ------------------------------ pictures

    @cached_property
    def _real(self) -> _Pictures:
        return self._prepared(self._train)

    @cached_property
    def _others(self) -> _Pictures:
        return self._prepared(self._held_out)

    def _prepared(self, images: Images) -> _Pictures:
        """At most `MOST_IMAGES` of them, with every class in proportion."""
        batches = in_order(subset(images, MOST_IMAGES, 0), self._dataset, 256, self._device)
        small, labels = zip(*((_reduced(x), y) for x, y in batches), strict=True)
        return _Pictures(images=torch.cat(small), labels=torch.cat(labels))

    def _chosen(self, given: Tensor, wanted: Tensor) -> Tensor:
        """Places of images with the wanted labels among the given ones, none of them twice.

        Where a class has fewer images, all of these.
        """
        generator = torch.Generator().manual_seed(self._seed)
        counts = torch.bincount(wanted, minlength=self._dataset.num_classes).tolist()
        chosen = []
        for label, count in enumerate(counts):
            members = (given == label).nonzero()[:, 0]
            chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
        return torch.cat(chosen)

    @torch.no_grad()
    def _drawn(self, generator: ImageGenerator, labels: Tensor) -> _Pictures:
        """One generated picture per label."""
        # A copy is used, because in training mode norms follow what they see.
        copied = copy.deepcopy(generator).train()
        batches = labels.chunk(math.ceil(len(labels) / DRAWN_AT_ONCE))
        with preserved():
            torch.manual_seed(self._seed)
            images = torch.cat([_reduced(copied.sample(batch)) for batch in batches])
        return _Pictures(images=images, labels=labels)

    # ------------------------------ the classifier

    @cached_property
    def _of_real(self) -> nn.Module:
        """The classifier that was trained on real pictures."""
        return self._trained_on(self._real)

    def _trained_on(self, pictures: _Pictures) -> nn.Module:
        """Trains the classifier from the same beginning, on batches of the same places."""
        with preserved(), torch.enable_grad():
            torch.manual_seed(self._seed)
            network = _classifier(pictures.images.shape[1], self._dataset.num_classes)
            network.to(self._device)
            places = torch.randint(len(pictures.labels), (STEPS, BATCH)).to(self._device)
            optimizer = torch.optim.Adam(
                network.parameters(), lr=LEARNING_RATE, **step_options(self._device)
            )
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, LEARNING_RATE, total_steps=STEPS
            )
            for chosen in places:
                loss = F.cross_entropy(network(pictures.images[chosen]), pictures.labels[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        return network.eval()

    @torch.no_grad()
    def _right(self, network: nn.Module, pictures: _Pictures) -> Tensor:
        """Whether the network names the class of each picture, [N]."""
        logits = torch.cat([network(part) for part in torch.split(pictures.images, 1024)])
        # The largest of logits that are not numbers would be the first class.
        named = torch.where(logits.isnan().any(1), -1, logits.argmax(1))
        return named == pictures.labels

    def _shares(self, right: Tensor, labels: Tensor) -> tuple[float | None, ...]:
        """The share of right answers of each class, %."""
        classes = range(self._dataset.num_classes)
        chosen = (right[labels == label] for label in classes)
        return tuple(_percent(part) if len(part) else None for part in chosen)

    # ------------------------------ variety

    def _variety(self, drawn: _Pictures) -> tuple[float | None, ...]:
        found: list[float | None] = []
        for real, generated in zip(self._real_spreads, self._spreads(drawn), strict=True):
            ratio = generated / real if real > 0 else math.nan
            found.append(round(ratio, 4) if math.isfinite(ratio) else None)
        return tuple(found)

    @cached_property
    def _real_spreads(self) -> Sequence[float]:
        return self._spreads(self._real)

    def _spreads(self, pictures: _Pictures) -> list[float]:
        """Per class, the root of the mean squared distance of two pictures; NaN below two.

        It is measured in pixels, because features that were learned to tell classes apart are poor
        at telling pictures of one class apart. It uses means over a coarse grid, because different
        grain does not make a different picture.
        """
        side = max(1, min(CELLS, pictures.images.shape[-1] // 2))
        coarse = F.adaptive_avg_pool2d(pictures.images, side).flatten(1).double()
        spreads = []
        for label in range(self._dataset.num_classes):
            members = coarse[pictures.labels == label]
            # E|x − x'|² of two different pictures is twice the sum of the unbiased variances.
            enough = len(members) > 1
            spreads.append(math.sqrt(2.0 * float(members.var(0).sum())) if enough else math.nan)
        return spreads


def _classifier(channels: int, classes: int) -> nn.Sequential:
    """Three convolutions, two of them with a pool: [B, C, S, S] → [B, classes]."""
    layers: list[nn.Module] = []
    for index, width in enumerate((WIDTH, 2 * WIDTH, 4 * WIDTH)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), *([nn.MaxPool2d(2)] if index < 2 else [])]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def _reduced(images: Tensor) -> Tensor:
    """Images [N, C, S, S] with a side of at most `LARGEST_SIZE`, by means of their pixels."""
    if images.shape[-1] <= LARGEST_SIZE:
        return images
    return F.adaptive_avg_pool2d(images, LARGEST_SIZE)


def _mean(values: Sequence[float | None], digits: int = 3) -> float | None:
    """The mean of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), digits) if known else None


def _percent(right: Tensor) -> float:
    return round(100.0 * float(right.double().mean()), 3)
