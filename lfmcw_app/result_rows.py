"""Makes the row of a results file for a run from its folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfmcw_app.bounded_files import check_regular, lines_of, parse_json, read_object
from lfmcw_app.data import short_name
from lfmcw_app.errors import InputError, shown
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import preset_recipe
from lfmcw_app.result_file import check_complete
from lfmcw_app.results_file import DATE, Row
from lfmcw_app.resuming import leaves
from lfmcw_app.run_files import ENVIRONMENT, RESULT, TIMINGS
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.stages import TRAINING

__all__ = ["columns_of", "describe_setting", "row_of"]

IN_COLUMNS = {
    "preset", "dataset", "seed", "search.space", "search.order", "search.method",
    "search.generator.name",
}  # fmt: skip
"""Keys of a recipe that have columns of their own."""

LONGEST_LINE = 2**16
"""Bytes of a line of timings.jsonl."""

CONDITIONS = (
    "data.wrong_labels", "data.class_shares", "data.imbalance", "data.conditions_apply_to",
)  # fmt: skip
"""Keys of a recipe that make the data worse."""


def row_of(table: str, arm: str, folder: Path) -> Row:
    """The row of a complete run.

    Args:
        table: its name.
        arm: the label.
        folder: of the run.

    Raises:
        InputError: if the run has no result, or files of it are damaged.
    """
    run = RunFolder.open(folder)
    result = run.result
    if result is None:
        raise InputError(f"The run in {folder} has no result yet. Resume it.")
    check_complete(result, folder / RESULT, ("test_error_percent",))
    looked_up = result.get("lookup", {})
    generator = result.get("generator", {}) if _draws(run.recipe) else {}
    searching, training = _seconds(folder)
    return Row(
        table=table,
        arm=arm,
        **columns_of(run.recipe),
        test_error_percent=result["test_error_percent"],
        regret_percent=looked_up.get("regret_percent"),
        rank=looked_up.get("rank"),
        parameters=result.get("parameters"),
        multiply_adds_millions=result.get("multiply_adds_millions"),
        gan_test_percent=generator.get("gan_test"),
        gan_train_percent=generator.get("gan_train"),
        variety=generator.get("variety"),
        search_seconds=searching,
        training_seconds=training,
        recipe=folder.name.rpartition("-")[2],
        run=folder.name,
        **_made_by(folder),
    )


def columns_of(recipe: Recipe) -> dict[str, Any]:
    """The columns of a row that its recipe decides."""
    how = recipe.search
    return {
        "seed": recipe.seed,
        "dataset": short_name(recipe.dataset),
        "preset": recipe.preset,
        "space": how.space,
        "order": None if how.method == "random" else how.order,
        "generator": how.generator.name if _draws(recipe) else None,
        "method": how.method,
        "condition": _told(recipe, conditions=True),
        "settings": _told(recipe, conditions=False),
    }


def _draws(recipe: Recipe) -> bool:
    """Whether W2 learns from generated images."""
    return recipe.search.method == "lfmcw" and recipe.search.lam > 0


def _made_by(folder: Path) -> dict[str, Any]:
    """The columns on what completed the run; for a run of an earlier version, on what began it."""
    file = folder / ENVIRONMENT
    try:
        began = read_object(file)
        made = began.get("completed") or {
            "time": began["started"],
            "mlo": began["mlo"],
            "commit": None,
            "torch": began["torch"],
            "device": began["gpu"] or "CPU",
        }
        found = {
            "version": made["mlo"],
            "commit": made["commit"],
            "torch": made["torch"],
            "device": made["device"],
            "date": made["time"][:10],
        }
        for column, value in found.items():
            if not (isinstance(value, str) or (column == "commit" and value is None)):
                raise ValueError(f"{column} is {shown(value)}")
            if value == "":
                raise ValueError(f"{column} is empty")
        if not re.fullmatch(DATE, found["date"]):
            raise ValueError(f"time is {shown(made['time'])}")
        return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}, which says what made the result, cannot be read ({error}). Move the run "
            "away: the table then runs it again."
        ) from None


def _seconds(folder: Path) -> tuple[float | None, float | None]:
    """The time of the search's phases and of the training; None for what was not run.

    For an interrupted run this is the time actually spent, repeated rounds included. A killed
    process may leave half a line; the time is then unknown.
    """
    taken: dict[bool, float] = {}
    try:
        check_regular(folder / TIMINGS)
        with (folder / TIMINGS).open("rb") as file:
            for line in lines_of(file, LONGEST_LINE, cut=True):
                entry = parse_json(line.decode("utf-8"))
                trains, seconds = entry["phase"] == TRAINING, float(entry["seconds"])
                if not 0 <= seconds < math.inf:
                    return None, None
                taken[trains] = taken.get(trains, 0.0) + seconds
    except (OSError, ValueError, LookupError, TypeError):
        return None, None
    searching, training = taken.get(False), taken.get(True)
    return (
        None if searching is None else round(searching, 1),
        None if training is None else round(training, 1),
    )


def _told(recipe: Recipe, *, conditions: bool) -> str | None:
    """The settings that differ from the preset's, as key=value: of the data, or the others.

    Paths and digests are left out; the recipe's own digest covers them.
    """
    # If errors are looked up, conditions can apply only to the search.
    if conditions and not recipe.data.has_conditions:
        return None
    unsaid = set(IN_COLUMNS) if recipe.trains else {*IN_COLUMNS, "data.conditions_apply_to"}
    preset = preset_recipe(recipe)
    default = dict(_leaves(preset)) if preset else {}
    told = []
    for key, value in _leaves(recipe):
        if key in unsaid or key.endswith(".digest"):
            continue
        of_these = key.startswith(CONDITIONS) == conditions
        if of_these and value != default.get(key):
            shown = Path(value).name if isinstance(value, str) else json.dumps(value)
            told.append(describe_setting(key, shown.replace(" ", "")))
    return " ".join(filter(None, told)) or None


def describe_setting(key: str, value: str) -> str:
    """A setting as key=value, the same for all runs of an arm; empty if it is left out.

    Each seed can begin with weights of another run. The row says that there is one, but not which.
    It leaves out the file of a look-up, because the row has a rank. The recipe's digest covers
    both.
    """
    if key == "lookup.file":
        return ""
    if key.endswith(".init.run"):
        return f"{key.removesuffix('.run')}=run"
    return f"{key}={value}"


def _leaves(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    return leaves(recipe.model_dump(mode="json", by_alias=True))
