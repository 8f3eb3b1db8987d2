"""Reads result.json, which may have been edited: entries of another type are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from lfmcw_app.bounded_files import read_object
from lfmcw_app.errors import InputError, shown
from lfmcw_app.proportions import interval

__all__ = [
    "check_complete", "clearly_harder", "counted_errors", "how_sure", "read_result",
    "worst_classes", "wrong_images",
]  # fmt: skip

WORST = 3
"""Maximum number of classes that are named with a result."""

LEVEL = 0.05
"""How often chance may call a class hard that is not."""

Percent = Annotated[FiniteFloat, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Edge = Annotated[tuple[str, Count], Field(strict=False)]
Million = Annotated[FiniteFloat, Field(ge=0)]


class _Entries(BaseModel):
    """Entries that programs use; there may be others, and each may be missing."""

    model_config = ConfigDict(strict=True, extra="allow")


class _OfClass(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    images: Count
    error_percent: Percent | None


class _Lookup(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    file: str
    dataset: str
    seeds: list[Count]
    regret_percent: FiniteFloat
    rank: Count
    cells: Count
    best_cell: str


class _OfBudget(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    met: bool
    actual: FiniteFloat
    limit: FiniteFloat


class _Change(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    key: str


class _Quality(_Entries):
    gan_test: Percent | None = None
    gan_train: Percent | None = None
    variety: FiniteFloat | None = None
    doubts: list[str] = Field(default_factory=list)


class _Result(_Entries):
    dataset: str = ""
    test_error_percent: Percent = 0.0
    test_images: Count = 0
    parameters: Count = 0
    multiply_adds_millions: Million = 0.0
    seed: Count = 0
    genotype: dict[str, list[list[Edge]]] = Field(default_factory=dict)
    classes: list[_OfClass] = Field(default_factory=list)
    lookup: _Lookup | None = None
    budget: dict[str, _OfBudget] = Field(default_factory=dict)
    generator: _Quality | None = None
    changed: list[_Change] = Field(default_factory=list)
    doubt: str = ""


def read_result(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no result, naming the entry that is none.
    """
    found = read_object(path)
    try:
        _Result.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise ValueError(f"{where}: {what}, got {shown(first['input'])}") from None
    return found


def check_complete(result: Mapping[str, Any], path: Path, entries: Sequence[str]) -> None:
    """Refuses a result that lacks an entry.

    Raises:
        InputError: naming the entry.
    """
    for entry in entries:
        if entry not in result:
            raise InputError(
                f"{path} is damaged: it lacks {entry}. Delete it and resume: the result is "
                "computed again."
            )


def counted_errors(result: Mapping[str, Any]) -> tuple[int, int] | None:
    """Wrong answers and number of test images; None where the error was looked up in a table."""
    images = result.get("test_images")
    if "lookup" in result or not images:
        return None
    return round(images * result["test_error_percent"] / 100.0), images


def how_sure(result: Mapping[str, Any], *, noun: str = "", between: str = " to ") -> str:
    """How many answers are wrong, and the interval of the error; empty if it was looked up.

    Args:
        result: as read.
        noun: what the answers are of, in the singular; empty: only their number is given.
        between: the ends of the interval.
    """
    counted = counted_errors(result)
    if counted is None:
        return ""
    wrong, images = counted
    low, high = interval(wrong, images)
    of = f"{images:,} {noun}{'s' * (images != 1)}" if noun else f"{images:,}"
    return f"{wrong:,} of {of}; 95% interval {low:.1f}{between}{high:.1f}%"


def worst_classes(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of a result's classes with the largest errors, the largest first; none without one."""
    wrong = [entry for entry in classes if entry["error_percent"]]
    return sorted(wrong, key=lambda entry: -entry["error_percent"])[:WORST]


def wrong_images(entry: Mapping[str, Any]) -> int:
    """How many test images of a result's class the network gets wrong."""
    error = entry["error_percent"]
    return 0 if error is None else round(entry["images"] * error / 100.0)


def clearly_harder(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of `worst_classes` with more errors than chance explains.

    If all classes were equally hard, the network would get wrong the same share of each. A class is
    clearly harder if so many errors as it has, or more, would come up by chance in less than 5% of
    cases, corrected for the number of classes (exact binomial test, Bonferroni).
    """
    from scipy.stats import binom  # slow to import

    seen = [entry for entry in classes if entry["images"]]
    images = sum(entry["images"] for entry in seen)
    share = sum(map(wrong_images, seen)) / images if images else 0.0
    return [
        entry
        for entry in worst_classes(classes)
        if binom.sf(wrong_images(entry) - 1, entry["images"], share) * len(seen) < LEVEL
    ]
