"""The recipe that a command line asks for: data set, preset, space, file and settings together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lfmcw_app.data import check_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe, is_imagenet, load_recipe

__all__ = ["default_preset", "resolve_recipe"]

DEFAULT_PRESETS = {"digits": "smoke", "fashion-mnist": "small"}


def default_preset(dataset: str) -> str:
    """The preset that is meant for a data set."""
    return DEFAULT_PRESETS.get(dataset, "paper")


def resolve_recipe(
    dataset: str,
    preset: str | None,
    config: Path | None,
    assign: list[str] | None,
    seed: int | None,
    *,
    space: str | None = None,
    order: str | None = None,
    method: str | None = None,
) -> Recipe:
    """Makes the recipe of a command line.

    Raises:
        InputError: for an unknown data set, preset or key, or a value of the wrong type or range.
    """
    check_dataset(dataset)
    assigned = {}  # the last of several assignments to a key counts
    for assignment in assign or ():
        key, _, value = assignment.partition("=")
        assigned[key.strip()] = value.strip()

    # The space decides which of the preset's files are read, however it is given.
    set_space = assigned.get("search.space")
    if set_space is not None and space is not None and set_space != space:
        raise InputError(
            f"--space {space} and --set search.space={set_space} contradict each other; drop one."
        )
    space = space or set_space
    if "dataset" in assigned:
        raise InputError("The data set is the argument DATASET; drop --set dataset=….")
    given: dict[str, Any] = {
        "dataset": dataset,
        "search.order": order,
        "search.method": method,
        "seed": seed,
    }
    return load_recipe(
        preset or default_preset(dataset),
        space=space or ("pcdarts" if is_imagenet(dataset) else "darts"),
        config=config,
        overrides={key: value for key, value in given.items() if value is not None},
        assignments=tuple(assign or ()),
    )
