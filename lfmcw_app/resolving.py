"""The recipe that a command line describes: data set, preset, space, file and settings together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lfmcw_app.data import check_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.lookup import with_table_digest
from lfmcw_app.names import FOLDER
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import (
    contradiction,
    is_imagenet,
    load_recipe,
    merged_settings,
    read_config,
    with_options,
)
from lfmcw_app.starting_weights import with_digests

__all__ = ["LARGE_FOLDER", "default_preset", "resolve_recipe"]

DEFAULT_PRESETS = {"digits": "smoke", "fashion-mnist": "small"}

LARGE_FOLDER = 5000
"""Files of a folder from which a GPU gets the paper's settings by default, which take days."""


def default_preset(dataset: str, *, cuda: bool | None = None) -> str:
    """The default preset of a data set; for a folder it depends on its size and the device.

    Args:
        dataset: its name.
        cuda: whether there is a GPU to run on; by default whether the machine has one.
    """
    if not dataset.startswith(FOLDER):
        return DEFAULT_PRESETS.get(dataset, "paper")
    has_gpu = torch.cuda.is_available() if cuda is None else cuda
    return "paper" if has_gpu and _is_large(dataset.removeprefix(FOLDER)) else "small"


def _is_large(folder: str) -> bool:
    files = 0
    for _, _, names in os.walk(os.path.expanduser(folder), followlinks=True):
        files += len(names)
        if files >= LARGE_FOLDER:
            return True
    return False


def resolve_recipe(
    dataset: str,
    preset: str | None,
    config: Path | None,
    settings: Mapping[str, Any] | None,
    seed: int | None,
    *,
    space: str | None = None,
    order: str | None = None,
    method: str | None = None,
    cuda: bool | None = None,
) -> Recipe:
    """Makes the recipe of a command line or of a script.

    Args:
        dataset: its name.
        preset: of the option --preset; None if not given, as with the other options.
        config: of --config.
        settings: dotted key → value; they override the file.
        seed: of --seed.
        space: of --space.
        order: of --order.
        method: of --method.
        cuda: whether there is a GPU to run on, which decides on the preset if none is given.

    Raises:
        InputError: for an unknown data set, preset or key, a value of the wrong type or range, or
            options that contradict each other or the configuration file.
    """
    check_dataset(dataset)
    in_file = merged_settings({} if config is None else read_config(config))
    options = {"seed": seed, "search.order": order, "search.method": method}
    chosen = with_options(settings or {}, options)

    # Preset and space decide which files are read, the data set what is: each is given once. A
    # recipe that was made without a preset is called custom.
    presets = {
        "--preset": preset,
        "--set preset": chosen.get("preset"),
        f"preset in {config}": in_file.get("preset"),
    }
    preset = _agreed({place: name for place, name in presets.items() if name != "custom"})
    space = _agreed(
        {
            "--space": space,
            "--set search.space": chosen.get("search.space"),
            f"search.space in {config}": in_file.get("search.space"),
        }
    )
    _agreed({"the argument DATASET": dataset, f"dataset in {config}": in_file.get("dataset")})
    if "dataset" in chosen:
        raise InputError("The data set is the argument DATASET; drop the setting dataset=….")
    recipe = load_recipe(
        preset or default_preset(dataset, cuda=cuda),
        space=space or ("pcdarts" if is_imagenet(dataset) else "darts"),
        config=in_file,
        overrides={"dataset": dataset, **chosen},
    )
    return with_table_digest(with_digests(recipe))


def _agreed(given: dict[str, Any]) -> Any:
    """The given value, or None; several places may give it if they agree.

    Args:
        given: place → value.

    Raises:
        InputError: naming two places that contradict each other.
    """
    found = [(place, value) for place, value in given.items() if value is not None]
    for place, value in found[1:]:
        first, before = found[0]
        if value != before:
            raise contradiction(first, before, place, value)
    return found[0][1] if found else None
