"""Which classes lack images for the search, the training or the test, and what that means."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from lfmcw_app.data import Dataset
from lfmcw_app.errors import DataWarning, InputError, listed

__all__ = ["check_classes"]

MEANINGS = {
    "D_tr": "The networks of the search do not learn them. Add images, or raise "
    "data.search_images.",
    "D_val": "The search does not measure mistakes on them: their class weights are those of a "
    "class that was never seen. Add images, or raise data.search_images.",
    "training": "The derived network cannot learn them. Add images, or raise data.train_images.",
    "test": "The test error says nothing about them. Add images, or raise data.test_images.",
}
"""Part → what it means that a class has no images there, and what to do."""


def check_classes(dataset: Dataset, labels: Mapping[str, Tensor], *, matched: bool) -> None:
    """Warns of classes without images in a part.

    Args:
        dataset: what the parts are of.
        labels: part, of `MEANINGS` → the labels of its images.
        matched: whether every class of D_tr must be in D_val (`search.validation_batch`).

    Raises:
        InputError: if it must, and is not.
    """
    counts = {
        part: torch.bincount(of_part, minlength=dataset.num_classes)
        for part, of_part in labels.items()
    }
    if matched and "D_val" in counts:
        unmatched = _names(dataset, (counts["D_tr"] > 0) & (counts["D_val"] == 0))
        if unmatched:
            raise InputError(
                "search.validation_batch is matched, so each class of D_tr needs images in D_val. "
                f"{_classes(unmatched)} of {dataset.name} {_have(unmatched)} none there. Add "
                "images, raise data.search_images, or choose another validation_batch."
            )
    for part, of_part in counts.items():
        lacking = _names(dataset, of_part == 0)
        if lacking:
            warnings.warn(
                f"{_classes(lacking)} of {dataset.name} {_have(lacking)} "
                f"no images in the {part} part. "
                f"{MEANINGS[part]}",
                DataWarning,
                stacklevel=2,
            )


def _names(dataset: Dataset, which: Tensor) -> list[str]:
    """The names of the classes of a mask."""
    return [dataset.class_names[label] for label in which.nonzero()[:, 0].tolist()]


def _have(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _classes(names: list[str]) -> str:
    """How many classes, and the first of them."""
    return f"{len(names):,} class{'es' * (len(names) > 1)} ({listed(names)})"
