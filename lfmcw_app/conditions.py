"""Conditions of an experiment: wrong labels and reduced classes; test images stay as they are.

Every training image is kept or not, and has one label, for the whole run: a function of the recipe
and the seed. So an image that is mislabelled in D_tr is mislabelled in the training of the derived
network too, if the conditions apply to it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmcw_app.data import Dataset, Images
from lfmcw_app.errors import InputError, listed, shown
from lfmcw_app.recipe import Data, Recipe
from mlo.errors import nearest

__all__ = ["Conditioned", "conditioned", "describe_conditions"]

NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
"""Names of classes that a number could mean: 1, 01, 0.5."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioned:
    """The training or validation images of a data set, under the conditions.

    Attributes:
        kept: places of the images that are left, ascending, [K].
        given: the labels of all images as D_tr and the training have them, [N].
        validating: the labels of all images as D_val has them, [N].
    """

    kept: Tensor
    given: Tensor
    validating: Tensor


def conditioned(recipe: Recipe, dataset: Dataset, images: Images) -> Conditioned:
    """Applies the conditions of a recipe to the images of a part.

    Args:
        recipe: its section `data` has the conditions, and its seed chooses images.
        dataset: gives the names of the classes.
        images: the training images, or D_val's where a data set has its own.

    Raises:
        InputError: for an unknown class, or one that loses all its images.
    """
    how, labels = recipe.data, images.labels
    kept = _kept(how, dataset, labels, recipe.seed)
    given, validating = labels.clone(), labels.clone()
    mislabelled = _labels(dataset, [wrong.of for wrong in how.wrong_labels], "data.wrong_labels")
    for wrong, of in zip(how.wrong_labels, mislabelled, strict=True):
        others = _labels(dataset, wrong.as_, "`as` in data.wrong_labels")
        if of in others:
            raise InputError(
                f"data.wrong_labels labels {wrong.of} as itself. Name other classes in `as`."
            )
        generator = _generator(recipe.seed, "wrong labels", of)
        members = kept[labels[kept] == of]
        count = round(wrong.share * len(members))
        chosen = members[torch.randperm(len(members), generator=generator)[:count]]
        drawn = torch.randint(len(others), (count,), generator=generator)
        given[chosen] = torch.tensor(others)[drawn]
        if wrong.in_ == "both":
            validating[chosen] = given[chosen]
    _check_none_is_empty(dataset, labels, given[kept])
    return Conditioned(kept=kept, given=given, validating=validating)


def _kept(how: Data, dataset: Dataset, labels: Tensor, seed: int) -> Tensor:
    """The places of the images that are kept, [K]: each class's share, rounded."""
    shares = _shares(how, dataset)
    places = torch.arange(len(labels))
    if min(shares) == 1.0:
        return places
    chosen = []
    for label, share in enumerate(shares):
        members = places[labels == label]
        order = torch.randperm(len(members), generator=_generator(seed, "class shares", label))
        chosen.append(members[order[: round(share * len(members))]])
    return torch.cat(chosen).sort().values


def _shares(how: Data, dataset: Dataset) -> list[float]:
    """The share of each class's images that is left.

    Reference for the exponential profile: Cui et al., Class-Balanced Loss Based on Effective Number
    of Samples (2019), section 5.1. Their imbalance factor is 1 / `imbalance`.
    """
    classes = dataset.num_classes
    factor = how.imbalance or 1.0
    shares = [factor ** (label / max(1, classes - 1)) for label in range(classes)]
    reduced = _labels(dataset, list(how.class_shares), "data.class_shares")
    for label, share in zip(reduced, how.class_shares.values(), strict=True):
        shares[label] = share
    return shares


def _labels(dataset: Dataset, names: Sequence[str], key: str) -> list[int]:
    """The classes of names, or of numbers; no class twice.

    Args:
        dataset: gives the names of the classes.
        names: what the recipe calls the classes.
        key: where it does.

    Raises:
        InputError: if there is no such class, or one has several names.
    """
    called: dict[int, str] = {}
    for name in names:
        label = _label(dataset, name)
        if label in called:
            raise InputError(
                f"{key} names the class {dataset.class_names[label]} twice, as {called[label]} and "
                f"as {name}. Name it once."
            )
        called[label] = name
    return list(called)


def _label(dataset: Dataset, name: str) -> int:
    """The class of a name, or of a number if the names of the classes are no numbers.

    Raises:
        InputError: if there is none.
    """
    names = dataset.class_names
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        numbers = [of for of in names if NUMBER.fullmatch(of)]
        if not numbers:
            return int(name)
        raise InputError(
            f"The conditions in data name the class {name}, but no class of {dataset.name} has "
            f"this name. As classes are called by numbers ({listed(numbers)}), it cannot be the "
            f'place of a class either. Write the name in quotes, as "{numbers[0]}".'
        )
    raise InputError(
        f"The conditions in data name the class {shown(name)}, which {dataset.name} does not have. "
        f"{nearest(name, names)}"
    )


def _generator(seed: int, what: str, label: int) -> torch.Generator:
    # Of each class and condition, so that one more condition shifts no draws of another.
    digest = hashlib.sha256(repr((what, seed, label)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _check_none_is_empty(dataset: Dataset, labels: Tensor, left: Tensor) -> None:
    before, after = (torch.bincount(of, minlength=dataset.num_classes) for of in (labels, left))
    lost = ((before > 0) & (after == 0)).nonzero()[:, 0].tolist()
    if lost:
        raise InputError(
            "With data.class_shares, data.imbalance and data.wrong_labels as they are, no image "
            f"keeps the label {listed([dataset.class_names[label] for label in lost])}. Raise the "
            "share of the class that is kept, or mislabel a smaller share."
        )


# ------------------------------ in words


def describe_conditions(recipe: Recipe, dataset: Dataset) -> str:
    """What the conditions do to the training images, as a sentence; empty without conditions.

    Raises:
        InputError: as `conditioned` does.
    """
    how, names = recipe.data, dataset.class_names
    if not how.has_conditions:
        return ""
    labels = dataset.train.labels
    found = conditioned(recipe, dataset, dataset.train)
    before, after = (
        torch.bincount(of, minlength=len(names)).tolist() for of in (labels, labels[found.kept])
    )
    said = [
        f"{after[label]:,} of {before[label]:,} images of {names[label]}"
        for label in range(len(names))
        if after[label] < before[label]
    ]
    parts = [f"{listed(said, most=10)} are left"] if said else []
    for wrong in how.wrong_labels:
        of = _label(dataset, wrong.of)
        count = int((found.given[labels == of] != of).sum())
        others = " or ".join(names[_label(dataset, name)] for name in wrong.as_)
        where = "" if wrong.in_ == "both" else ", but not in D_val"
        parts.append(f"{count:,} of {after[of]:,} of {names[of]} are labelled {others}{where}")
    trains = how.conditions_apply_to == "all" and recipe.trains
    applies = "the search and the training" if trains else "the search"
    return f"Conditions, in {applies}: {'; '.join(parts) or 'none takes effect'}."
