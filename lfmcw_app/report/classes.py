"""What a run gets wrong, class by class, beside the weights that the search gave the classes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from lfmcw_app.report.images import COLOURS, class_names, data_url, last_class_weights
from lfmcw_app.report.reading import RunData

__all__ = [
    "ClassRow", "Classes", "Confusion", "Mistake", "Relation", "class_errors", "rank_correlation",
    "w1_confusion",
]  # fmt: skip

MOST_ROWS = 40
MOST_MISTAKES = 15
PERMUTATIONS = 1999
"""Orders drawn at random, to see what chance gives: its share is known to a hundredth or so."""

COUNTED = 7
"""Maximum number of classes of which all orders are counted, 5,040 at most."""

FEWEST = 5
"""Least number of classes: 2 of the 24 orders of four are as far from 0 as can be, too many."""

LEVEL = 0.05
"""Share of chance below which a relation is called one."""

MOST_NUMBERS = 20
"""Classes of which the confusion is written in numbers; of more it is a picture."""


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """A class.

    Attributes:
        error: on the test images, %; None where there are none.
        interval: its 95% interval.
        weight: l_c, the mean over the last tenth of the search; None without LFM-CW.
        taken_for: the class that it is most often taken for, and how many images are; None where
            there is none, or it is not known.
    """

    name: str
    images: int
    error: float | None
    interval: tuple[float, float]
    weight: float | None
    taken_for: tuple[str, int] | None


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often a class (row) was taken for another (column).

    Attributes:
        names: of the classes.
        rows: for each its counts, with their shares of the row.
        source: the shares as a picture, where there are too many classes for numbers.
    """

    names: Sequence[str]
    rows: Sequence[Sequence[tuple[int, float]]]
    source: str | None


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A class that is taken for another.

    Attributes:
        right: the class.
        answer: what it is taken for.
        images: how many of its test images are.
        share: of its test images, %.
    """

    right: str
    answer: str
    images: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Relation:
    """How class weights and errors go together.

    Attributes:
        correlation: of their ranks, -1 to 1.
        classes: how many there are.
        chance: how often chance alone gives a value at least as far from 0, of 1.
    """

    correlation: float
    classes: int
    chance: float

    @property
    def how_often(self) -> str:
        """The share of chance, for people."""
        cases = round(100 * self.chance)
        return f"about {cases}" if cases else "fewer than 1"

    @property
    def is_seen(self) -> bool:
        """Whether chance hardly explains it."""
        return self.chance < LEVEL


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The errors of all classes.

    Attributes:
        rows: those with the largest errors, first.
        count: number of classes.
        balanced: the mean error of the classes, %.
        heaviest: the largest of all class weights; 0 without any.
        weighted: whether their weights are known.
        relation: of errors and class weights; None where it is not defined, or says nothing.
        confusion: None where the result has none, as of very many classes.
        mistakes: the commonest ones; empty where the confusion says all in numbers.
    """

    rows: Sequence[ClassRow]
    count: int
    balanced: float
    heaviest: float
    weighted: bool
    relation: Relation | None
    confusion: Confusion | None
    mistakes: Sequence[Mistake]


def class_errors(run: RunData) -> Classes | None:
    """The errors of a run's classes; None where its result has none (earlier versions)."""
    result = run.result or {}
    if not result.get("classes"):
        return None
    entries = result["classes"]
    weights = last_class_weights(run)
    known: Sequence[float | None] = [None] * len(entries)
    if weights is not None and len(weights) == len(entries):
        known = weights
    names = [str(entry["name"]) for entry in entries]
    mistakes = _mistakes_of(result)
    commonest: dict[int, tuple[str, int]] = {}
    for right, answer, images in mistakes:
        if images > commonest.get(right, ("", 0))[1]:
            commonest[right] = (names[answer], images)
    rows = [
        ClassRow(
            name=name,
            images=operator.index(entry["images"]),
            error=_number(entry["error_percent"]),
            interval=_interval(entry["interval_percent"]),
            weight=weight,
            taken_for=commonest.get(label),
        )
        for label, (name, entry, weight) in enumerate(zip(names, entries, known, strict=True))
    ]
    pairs = [(row.error, row.weight) for row in rows if row.error is not None]
    worst = sorted(rows, key=lambda row: -1.0 if row.error is None else row.error, reverse=True)
    return Classes(
        rows=worst[:MOST_ROWS],
        count=len(rows),
        balanced=result["balanced_error_percent"],
        heaviest=max((weight for weight in known if weight is not None), default=0.0),
        weighted=any(weight is not None for weight in known),
        relation=_relation([(e, w) for e, w in pairs if w is not None]),
        confusion=_confusion(names, result.get("confusion")),
        mistakes=_mistakes(rows, mistakes) if len(rows) > MOST_NUMBERS else [],
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _interval(given: Any) -> tuple[float, float]:
    low, high = map(float, given)
    return low, high


def w1_confusion(run: RunData) -> Confusion | None:
    """What W1 takes the images of D_val for at the end of the search; None if not known."""
    counts = run.search_end.get("w1_confusion")
    return _confusion(class_names(run, len(counts)), counts) if counts else None


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The correlation of the ranks of two numbers; None for fewer than three pairs or equal ranks.

    Reference: Spearman (1904); equal numbers share their mean rank.
    """
    if len(pairs) < 3:
        return None
    first, second = (_ranks(np.array(column)) for column in zip(*pairs, strict=True))
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _relation(pairs: Sequence[tuple[float, float]]) -> Relation | None:
    """The rank correlation, beside those of the same numbers in other orders.

    All orders up to `COUNTED` classes, and of more classes some drawn at random, always the same.
    None for fewer than `FEWEST` classes.
    """
    found = rank_correlation(pairs)
    if found is None or len(pairs) < FEWEST:
        return None
    first, second = (_ranks(np.array(column)) for column in zip(*pairs, strict=True))
    first, second = first - first.mean(), second - second.mean()
    product = abs(float(first @ second)) - 1e-9
    if len(pairs) <= COUNTED:
        orders = np.array(list(permutations(second)))
        chance = float((np.abs(orders @ first) >= product).mean())
    else:
        draws = np.random.default_rng(0)
        beyond = sum(abs(first @ draws.permutation(second)) >= product for _ in range(PERMUTATIONS))
        chance = float(1 + beyond) / (1 + PERMUTATIONS)
    return Relation(correlation=found, classes=len(pairs), chance=chance)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]] | None) -> Confusion | None:
    if not counts:
        return None
    matrix = np.array(counts, dtype=float)
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1.0)
    if len(names) <= MOST_NUMBERS:
        rows = [
            list(zip(row, share, strict=True))
            for row, share in zip(counts, shares.tolist(), strict=True)
        ]
        return Confusion(names=names, rows=rows, source=None)
    # Right answers would outshine all others: the scale ends at the largest mistake.
    largest = float((shares * (1.0 - np.eye(len(names)))).max()) or 1.0
    coloured = colormaps[COLOURS](np.minimum(shares / largest, 1.0), bytes=True)[:, :, :3]
    source = data_url(Image.fromarray(np.ascontiguousarray(coloured)))
    return Confusion(names=names, rows=[], source=source)


def _mistakes_of(result: Mapping[str, Any]) -> list[list[int]]:
    """[class, answer, images] of all mistakes, from the list of them or the confusion matrix."""
    return result.get("mistakes") or [
        [right, answer, images]
        for right, answers in enumerate(result.get("confusion") or [])
        for answer, images in enumerate(answers)
        if images and right != answer
    ]


def _mistakes(rows: Sequence[ClassRow], found: Sequence[list[int]]) -> list[Mistake]:
    """The commonest mistakes."""
    commonest = sorted(found, key=lambda mistake: -mistake[2])[:MOST_MISTAKES]
    return [
        Mistake(
            right=rows[right].name,
            answer=rows[answer].name,
            images=images,
            share=100.0 * images / rows[right].images,
        )
        for right, answer, images in commonest
    ]
