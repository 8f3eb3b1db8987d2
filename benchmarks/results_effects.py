"""Chooses comparisons by their arms and data, and says them in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from results_data import (
    METHOD,
    NO_WEIGHT,
    ORACLE,
    UNIFORM,
    Effect,
    Results,
)  # fmt: skip

Pair = tuple[str, str]

ISOLATING = ((METHOD, UNIFORM), (METHOD, NO_WEIGHT))
"""The comparisons that isolate the class weights and the generated images."""


def points(effect: Effect) -> str:
    """The difference with its 95% interval, percentage points."""
    return effect.found.describe()


def verdict_said(effect: Effect) -> str:
    """The verdict; if no difference is seen, also which gain is ruled out, if any."""
    gain = effect.excluded_gain
    if effect.verdict != "no difference seen" or gain is None:
        return effect.verdict
    said = f"{effect.verdict}; a gain above {gain:.2f} points is ruled out"
    largest = effect.largest_gain
    return said if largest is None else f"{said}, of about {largest:.2f} possible"


def chosen(
    results: Results, pairs: Iterable[Pair], wanted: Callable[[Effect], bool]
) -> list[Effect]:
    """The wanted comparisons of these arms, where single runs are kept."""
    return [e for pair in pairs for e in results.kept_effects(*pair) if wanted(e)]


def is_plain(effect: Effect) -> bool:
    """Whether the data are as they are, and images come from a generator."""
    return effect.design.condition is None and effect.design.generator != ORACLE


def is_oracle(effect: Effect) -> bool:
    """Whether real images stand in for generated ones."""
    return effect.design.condition is None and effect.design.generator == ORACLE


def is_hard(effect: Effect) -> bool:
    """Whether the data were made harder."""
    return effect.design.condition is not None
