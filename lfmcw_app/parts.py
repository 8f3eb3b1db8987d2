"""The parts of the images that a recipe uses: D_tr, D_val, unused images, and training.

All are under the conditions of the recipe (conditions.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lfmcw_app.conditions import conditioned
from lfmcw_app.data import Dataset, Images, search_places, subset_places
from lfmcw_app.errors import InputError, listed
from lfmcw_app.recipe import Recipe

__all__ = [
    "SearchParts",
    "search_part_labels",
    "search_parts",
    "training_labels",
    "training_part",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchParts:
    """The images of a search.

    Attributes:
        train: D_tr.
        validation: D_val.
        rightly_labelled: the images of D_tr and of D_val with their correct labels, which
            `data.wrong_labels` may have changed in the other two.
        unused: the training images that `generator.name: real` draws from; None without it.
    """

    train: Images
    validation: Images
    rightly_labelled: tuple[Images, Images]
    unused: Images | None = None


def search_parts(recipe: Recipe, dataset: Dataset) -> SearchParts:
    """The images of a recipe's search.

    Raises:
        InputError: if there is nothing to split, or if no image of some class is left to draw.
    """
    (first, train_labels), (second, validation_labels) = _placed(recipe, dataset)
    unused = None
    if recipe.search.draws_real:
        unused = dataset.train[_unused(dataset, first, second, train_labels)]
    whole = dataset.train if dataset.validation is None else dataset.validation
    train, validation = dataset.train[first], whole[second]
    return SearchParts(
        train=replace(train, labels=train_labels),
        validation=replace(validation, labels=validation_labels),
        rightly_labelled=(train, validation),
        unused=unused,
    )


def search_part_labels(recipe: Recipe, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The labels of D_tr and of D_val, without reading an image.

    Raises:
        InputError: as `search_parts` does.
    """
    (first, train_labels), (second, validation_labels) = _placed(recipe, dataset)
    if recipe.search.draws_real:
        _unused(dataset, first, second, train_labels)
    return train_labels, validation_labels


def training_part(recipe: Recipe, dataset: Dataset) -> Images:
    """The images that the derived network is trained on.

    Raises:
        InputError: if the recipe's conditions name an unknown class, or empty one.
    """
    places, labels = _training(recipe, dataset)
    if len(places) == len(dataset.train):  # nothing is copied
        return replace(dataset.train, labels=labels)
    return replace(dataset.train[places], labels=labels)


def training_labels(recipe: Recipe, dataset: Dataset) -> Tensor:
    """The labels of the `training_part`, without reading an image.

    Raises:
        InputError: as `training_part` does.
    """
    return _training(recipe, dataset)[1]


Placed = tuple[Tensor, Tensor]
"""Places of images among the training or validation images, and their labels there."""


def _placed(recipe: Recipe, dataset: Dataset) -> tuple[Placed, Placed]:
    """D_tr and D_val.

    Which images are in them is decided by their right labels, so that a search with wrong labels
    has the same images as one without.
    """
    how = recipe.data
    of_train = conditioned(recipe, dataset, dataset.train)
    of_validation, kept = of_train, None
    if dataset.validation is not None:
        of_validation = conditioned(recipe, dataset, dataset.validation)
        kept = of_validation.kept
    first, second = search_places(
        dataset, how.search_images, recipe.seed, how.search_fractions, (of_train.kept, kept)
    )
    return (first, of_train.given[first]), (second, of_validation.validating[second])


def _training(recipe: Recipe, dataset: Dataset) -> Placed:
    """The images that the derived network is trained on; if it is all, in their order."""
    how, train = recipe.data, dataset.train
    if how.conditions_apply_to == "search":
        places = subset_places(train.labels, how.train_images, recipe.seed)
        return places, train.labels[places]
    found = conditioned(recipe, dataset, train)
    places = found.kept[subset_places(train.labels[found.kept], how.train_images, recipe.seed)]
    return places, found.given[places]


def _unused(dataset: Dataset, first: Tensor, second: Tensor, needed: Tensor) -> Tensor:
    """The places of the training images that are in neither part, nor in a group of one.

    They have their correct labels, and include images that `class_shares` removes: a generator that
    draws as well as the data set is not subject to conditions.

    Args:
        dataset: the data set.
        first: places of D_tr among the training images.
        second: places of D_val among the training images, or its own validation images.
        needed: labels of D_tr, of which images are drawn.

    Raises:
        InputError: if one of these classes has none.
    """
    train = dataset.train
    used = torch.zeros(len(train), dtype=torch.bool)
    used[first] = True
    if dataset.validation is None:
        used[second] = True
    if train.groups is not None:
        used = torch.isin(train.groups, train.groups[used])
    places = (~used).nonzero()[:, 0]

    counts = torch.bincount(train.labels[places], minlength=dataset.num_classes)
    if bool((counts[needed] == 0).any()):
        left = [
            f"{count:,} of {name}"
            for name, count in zip(dataset.class_names, counts.tolist(), strict=True)
        ]
        raise InputError(
            "search.generator.name is real, which draws training images that the search does not "
            f"use. This search uses {len(first) + len(second):,} images, and leaves "
            f"{listed(left, most=10)}. Set data.search_images below "
            f"{len(first) + len(second):,}, so that each class has images left."
        )
    return places
