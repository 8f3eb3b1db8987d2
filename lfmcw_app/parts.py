"""The parts of the images that a recipe uses: D_tr, D_val, what the search leaves, and training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lfmcw_app.data import Dataset, Images, search_places
from lfmcw_app.errors import InputError, listed
from lfmcw_app.recipe import Recipe

__all__ = ["SearchParts", "search_part_labels", "search_parts"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchParts:
    """The images of a search.

    Attributes:
        train: D_tr.
        validation: D_val.
        unused: the training images that `generator.name: real` draws from; None without it.
    """

    train: Images
    validation: Images
    unused: Images | None = None


def search_parts(recipe: Recipe, dataset: Dataset) -> SearchParts:
    """The images of a recipe's search.

    Raises:
        InputError: if there is nothing to split, or no image of some class is left to draw.
    """
    first, second = _places(recipe, dataset)
    unused = None
    if recipe.search.draws_real:
        unused = dataset.train[_unused(recipe, dataset, first, second)]
    return SearchParts(
        train=dataset.train[first],
        validation=(dataset.validation or dataset.train)[second],
        unused=unused,
    )


def search_part_labels(recipe: Recipe, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The labels of D_tr and of D_val, without touching an image.

    Raises:
        InputError: as `search_parts` does.
    """
    first, second = _places(recipe, dataset)
    if recipe.search.draws_real:
        _unused(recipe, dataset, first, second)
    return dataset.train.labels[first], (dataset.validation or dataset.train).labels[second]


def _places(recipe: Recipe, dataset: Dataset) -> tuple[Tensor, Tensor]:
    how = recipe.data
    return search_places(dataset, how.search_images, recipe.seed, how.search_fractions)


def _unused(recipe: Recipe, dataset: Dataset, first: Tensor, second: Tensor) -> Tensor:
    """The places of the training images that are in neither part, nor in a group with such.

    Args:
        recipe: of the search.
        dataset: the data set.
        first: places of D_tr among the training images.
        second: places of D_val among the training images, or its own validation images.

    Raises:
        InputError: if a class of D_tr has none.
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
    needed = torch.bincount(train.labels[first], minlength=dataset.num_classes) > 0
    lacking = (needed & (counts == 0)).nonzero()[:, 0].tolist()
    if lacking:
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
