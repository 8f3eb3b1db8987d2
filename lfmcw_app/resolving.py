"""The recipe that a command line asks for: data set, preset, space, file and settings together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lfmcw_app.data import check_dataset
from lfmcw_app.errors import InputError, shown
from lfmcw_app.recipe import Recipe, is_imagenet, load_recipe, read_config

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
        InputError: for an unknown data set, preset or key, a value of the wrong type or range, or
            options that contradict each other or the configuration file.
    """
    check_dataset(dataset)
    tree = {} if config is None else read_config(config)
    assigned = {}  # the last of several assignments to a key counts
    for assignment in assign or ():
        key, _, value = assignment.partition("=")
        assigned[key.strip()] = value.strip()

    # Preset and space decide which files are read, the data set what is: each is given once.
    if tree.get("preset") != "custom":  # the name of a recipe that was made without a preset
        preset = _agreed({"--preset": preset, f"preset in {config}": tree.get("preset")})
    section = tree.get("search")
    in_file = section.get("space") if isinstance(section, dict) else None
    space = _agreed(
        {
            "--space": space,
            "--set search.space": assigned.get("search.space"),
            f"search.space in {config}": in_file,
        }
    )
    _agreed({"the argument DATASET": dataset, f"dataset in {config}": tree.get("dataset")})
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
        config=tree,
        overrides={key: value for key, value in given.items() if value is not None},
        assignments=tuple(assign or ()),
    )


def _agreed(given: dict[str, Any]) -> Any:
    """The value that was given, or None; several places may give it if they agree.

    Args:
        given: place → value.

    Raises:
        InputError: naming two places that contradict each other.
    """
    found = [(place, value) for place, value in given.items() if value is not None]
    for place, value in found[1:]:
        first, before = found[0]
        if value != before:
            raise InputError(
                f"{first} is {shown(before)}, and {place} is {shown(value)}. They contradict each "
                "other; drop one."
            )
    return found[0][1] if found else None
