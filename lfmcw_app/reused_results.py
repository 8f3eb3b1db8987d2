"""Takes results of a table's runs from results files, such as those of another machine."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lfmcw_app.data import Dataset, short_name
from lfmcw_app.errors import InputError, listed, shown
from lfmcw_app.recipe import Recipe
from lfmcw_app.result_rows import columns_of
from lfmcw_app.results_file import Row, read_results
from lfmcw_app.table_files import run_digest

__all__ = ["reused_results"]

Key = TypeVar("Key", bound=Hashable)


def reused_results(
    files: Sequence[Path], recipes: Mapping[Key, Recipe], dataset: Dataset
) -> tuple[dict[Key, Row], list[str]]:
    """The results that files hold of a table's runs.

    A row is the result of a run if its digest (column `recipe`) is that of the run: all settings
    are equal, the images are the same files, and so are starting weights and look-up tables.
    Wherever these lie, the digest is the same.

    Args:
        files: in the schema of `results_file`. If several have a run, the first one counts.
        recipes: key of a run → its recipe.
        dataset: the data of all runs.

    Returns:
        results: key → the row, with the name that the data set has here.
        said: what was found, a sentence per file.

    Raises:
        InputError: if a file cannot be read, or has no run of this table.
    """
    if not files:
        return {}, []
    keys = {run_digest(recipe, dataset): key for key, recipe in recipes.items()}
    results: dict[Key, Row] = {}
    said = []
    for file in files:
        rows = read_results(file)
        of_table = {keys[row.recipe]: row for row in rows if row.recipe in keys}
        if not of_table:
            raise InputError(
                f"{file} has no run of this table: none of its {len(rows)} rows has the digest of "
                f"one (column recipe). {_difference(rows, recipes)} Without --reuse {file} all "
                "runs are made here."
            )
        new = {key: row for key, row in of_table.items() if key not in results}
        for key, row in new.items():
            name = short_name(recipes[key].dataset)
            results[key] = row.model_copy(update={"dataset": name})
        twice = len(of_table) - len(new)
        said.append(
            f"{len(new)} of {len(recipes)} runs are taken from {file}"
            + (f", which has {twice} more that an earlier file has" if twice else "")
            + "."
        )
    return results, said


def _difference(rows: Sequence[Row], recipes: Mapping[Key, Recipe]) -> str:
    """Names the settings in which the first row differs from the run that is most like it."""
    if not rows:
        return "It is empty."
    first = rows[0]
    runs = [columns_of(recipe) for recipe in recipes.values()]
    differences = [
        {name: value for name, value in run.items() if getattr(first, name) != value}
        for run in runs
    ]
    least = min(differences, key=len)
    if not least:
        return (
            "The settings that a row names are equal, so the images or other files differ, or "
            "another version of this program made the rows."
        )
    told = [f"{name} is {shown(getattr(first, name))}, here {shown(least[name])}" for name in least]
    return f"In its first row, {listed(told)}."
