"""Assigns images to D_tr, D_val and testing: by seed, by name, or by groups."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["held_out_by_name", "search_counts", "search_indices", "stratified"]

TEST_SHARE = 0.2
"""About this share of the images is for testing if the data set does not say which."""

SMALL_CLASS = 20
"""By names alone, a class of fewer images could have far more than a fifth for testing."""


# ------------------------------ by seed


def stratified(
    labels: Tensor, count: int, seed: int, least: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor]:
    """Splits indices in two: the first part has `count` entries, and every class is in proportion.

    Args:
        labels: [N].
        count: size of the first part, at most N.
        seed: seed of the shuffle.
        least: so many images of every class are in each part, as far as the class has them (the
            first part has priority) and both parts have room.

    Returns:
        Indices of the first and of the second part, each in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)

    # The k-th of a class's n examples gets the position (k + 1/2) / n: taking the smallest
    # positions takes every class in proportion, and rounds by fractions of an example.
    _, of_class, counts = torch.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = torch.argsort(of_class, stable=True)
    within = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    position = torch.empty(len(labels), dtype=torch.float64)
    position[by_class] = (within.double() + 0.5) / counts.repeat_interleave(counts)
    by_position = torch.argsort(position, stable=True)

    # Small classes can miss a part by this. Only then are some positions moved to the ends, so
    # that all other splits are what the proportions alone say.
    needs = counts.clamp(max=least[0])
    also = (counts - needs).clamp(max=least[1])
    found = torch.bincount(of_class[by_position[:count]], minlength=len(counts))
    lacks = bool(((found < needs) | (counts - found < also)).any())
    if lacks and int(needs.sum()) <= count and int(also.sum()) <= len(labels) - count:
        moved = position[by_class]
        moved[within < needs.repeat_interleave(counts)] = -1.0
        moved[within >= (counts - also).repeat_interleave(counts)] = 2.0
        position[by_class] = moved
        by_position = torch.argsort(position, stable=True)

    # By position the examples of the classes alternate; both parts are shuffled.
    first, second = order[by_position[:count]], order[by_position[count:]]
    return (
        first[torch.randperm(len(first), generator=generator)],
        second[torch.randperm(len(second), generator=generator)],
    )


def search_counts(images: int, fractions: tuple[float, float]) -> tuple[int, int]:
    """How many of the `images` are in D_tr and in D_val.

    Where the fractions sum to 1, D_val has all that is not in D_tr.
    """
    # + 1e-6: as floats 0.1 · 30 is 3.0000000000000004, but 0.29 · 100 is 28.999999999999996.
    first, second = (int(fraction * images + 1e-6) for fraction in fractions)
    return first, second if sum(fractions) < 1 - 1e-9 else images - first


def search_indices(
    labels: Tensor,
    limit: int | None,
    seed: int,
    fractions: tuple[float, float],
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Splits the training images (or `limit` of them) in D_tr and D_val.

    Every class is in proportion in both. A class of two images has one in each where the parts have
    room for all classes.

    Args:
        labels: [N], of the training images.
        limit: number of images that are split; None for all.
        seed: decides which.
        fractions: of these images, the parts that D_tr and D_val get.
        groups: [N]; images with the same number stay together. The sizes are then approximate.

    Returns:
        Indices of D_tr and of D_val, each in random order.
    """
    total = len(labels) if limit is None else min(limit, len(labels))
    first_count, second_count = search_counts(total, fractions)
    if groups is not None:
        return _by_groups(labels, groups, seed, (first_count, second_count))

    chosen = torch.arange(len(labels))
    if total < len(labels):
        chosen, _ = stratified(labels, total, seed, least=(2, 0))
    first, rest = stratified(labels[chosen], first_count, seed)
    if first_count + second_count < total:
        rest = rest[stratified(labels[chosen[rest]], second_count, seed)[0]]
    return chosen[first], chosen[rest]


def _by_groups(
    labels: Tensor, groups: Tensor, seed: int, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Assigns whole groups to D_tr, D_val and the unused rest, with classes in proportion.

    The largest groups are assigned first, each to the part with the fewest images of the group's
    classes: the greedy method of Sechidis et al. (2011), "On the stratification of multi-label
    data".
    """
    generator = torch.Generator().manual_seed(seed)
    _, of_image, group_sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    _, of_class, class_sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    holds = torch.zeros(len(group_sizes), len(class_sizes), dtype=torch.float64)
    holds.index_put_((of_image, of_class), torch.ones(len(labels)).double(), accumulate=True)

    # How full a part is: for each class, the share of its intended images.
    shares = torch.tensor([*sizes, len(labels) - sum(sizes)], dtype=torch.float64) / len(labels)
    shares = shares[shares > 0]
    full = torch.zeros(len(shares), len(class_sizes), dtype=torch.float64)
    shuffled = torch.randperm(len(group_sizes), generator=generator)
    part_of = torch.empty(len(group_sizes), dtype=torch.int64)
    for group in shuffled[torch.argsort(group_sizes[shuffled], descending=True, stable=True)]:
        part = int(torch.argmin(full @ holds[group]))
        full[part] += holds[group] / (class_sizes * shares[part])
        part_of[group] = part

    parts = part_of[of_image]
    first, second = ((parts == part).nonzero()[:, 0] for part in range(2))
    return (
        first[torch.randperm(len(first), generator=generator)],
        second[torch.randperm(len(second), generator=generator)],
    )


# ------------------------------ by name


def held_out_by_name(
    names: Sequence[str], labels: Tensor, groups: Sequence[str] | None = None
) -> Tensor:
    """Decides by names which images are for testing: about a fifth of each class.

    An image is a test image if the hash of its name lies in the lowest fifth. So files that are
    added move no other, and neither a renamed class nor a moved folder does.

    Small classes are an exception: a class of two or more has at least one test image, that with
    the lowest hash. At most half of a class is for testing, and of fewer than 20 images a quarter,
    rounded: those with the lowest hashes.

    With groups the hash is that of the group's name, and whole groups are held out. A class whose
    images are all in one group cannot have both; it then has training images.

    Args:
        names: N names, relative to the class's folder.
        labels: [N].
        groups: N names of groups.

    Returns:
        A mask, [N].
    """
    classes = int(labels.max()) + 1
    if groups is not None:
        return _groups_held_out(groups, labels, classes)
    hashes = torch.tensor([_hash(name) for name in names], dtype=torch.float64)
    held_out = torch.zeros(len(names), dtype=torch.bool)
    by_hash = torch.argsort(hashes, stable=True)
    counts = torch.bincount(labels, minlength=classes).tolist()
    by_class = by_hash[torch.argsort(labels[by_hash], stable=True)]
    for members in torch.split(by_class, counts):
        count = int((hashes[members] < TEST_SHARE).sum())
        size = len(members)
        most = (size + 2) // 4 if size < SMALL_CLASS else size // 2
        count = min(max(count, 1), most)
        held_out[members[:count]] = True
    return held_out


def _groups_held_out(groups: Sequence[str], labels: Tensor, classes: int) -> Tensor:
    names = sorted(set(groups), key=lambda name: (_hash(name), name))
    places = {name: place for place, name in enumerate(names)}
    of_image = torch.tensor([places[name] for name in groups])
    holds = torch.zeros(len(names), classes, dtype=torch.bool)
    holds[of_image, labels] = True

    # The number of training groups of each class.
    trained = holds.sum(0)
    held_out = torch.zeros(len(names), dtype=torch.bool)

    def hold_out(place: int, *, least: int) -> bool:
        """Holds out a group, if its classes remain in at least so many training groups."""
        if bool((trained[holds[place]] <= least).any()):
            return False
        trained[holds[place]] -= 1
        held_out[place] = True
        return True

    for place, name in enumerate(names):
        if _hash(name) < TEST_SHARE:
            hold_out(place, least=1)

    # A class without a test image gets its lowest group. Two training groups should remain: one for
    # D_tr and one for D_val.
    for least in (2, 1):
        for label in range(classes):
            if not bool(holds[held_out, label].any()):
                candidates = holds[:, label].nonzero()[:, 0].tolist()
                any(hold_out(place, least=least) for place in candidates)
    return held_out[of_image]


def _hash(name: str) -> float:
    """A number in [0, 1) that is the same for a name everywhere."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
