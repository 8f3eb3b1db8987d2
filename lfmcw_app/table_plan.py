"""Plans a table of the paper: its runs, and which of them have a result already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lfmcw_app.arms import TABLES
from lfmcw_app.data import Dataset, short_name
from lfmcw_app.data_checks import adaptations, describe_parts, fitted, read_data
from lfmcw_app.lookup import table_of
from lfmcw_app.recipe import Recipe
from lfmcw_app.results_file import Row
from lfmcw_app.reused_results import reused_results
from lfmcw_app.run_files import RESULT
from lfmcw_app.starting_weights import check_generator_fits
from lfmcw_app.table_files import run_path

__all__ = ["Key", "TablePlan", "plan_table"]

Key = tuple[str, int]
"""A run of a table: the label of its arm, and its seed."""


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """The runs of a table.

    Attributes:
        name: of the table.
        recipes: the recipe of each run, fitted to the images; in the order in which they are made.
        images: the data of all runs.
        reused: the results of runs that were made elsewhere.
        complete: the runs that have a result in their own folder.
    """

    name: str
    recipes: Mapping[Key, Recipe]
    images: Dataset
    reused: Mapping[Key, Row]
    complete: frozenset[Key]

    @property
    def first_seed(self) -> int:
        """The smallest of the seeds."""
        return min(seed for _, seed in self.recipes)

    @property
    def arms(self) -> dict[str, Recipe]:
        """The recipe of each arm's first run."""
        return {label: self.recipes[label, self.first_seed] for label in TABLES[self.name]}

    @property
    def preset(self) -> str:
        """The preset of all runs."""
        return next(iter(self.recipes.values())).preset

    @property
    def title(self) -> str:
        """The table's heading."""
        return f"{self.name}, {short_name(self.images.name)}, preset {self.preset}"

    @property
    def made(self) -> Counter[str]:
        """The number of results of each arm that are there already."""
        return Counter(label for label, _ in self.complete | self.reused.keys())


def plan_table(
    name: str,
    recipes: Mapping[Key, Recipe],
    *,
    runs: Path,
    reuse: Sequence[Path],
    data: Path,
    tell: Callable[[str], None],
) -> TablePlan:
    """Plans a table, and checks that all of its runs can start.

    Args:
        name: one of `TABLES`.
        recipes: of all runs; see `table_recipes`.
        runs: the folder of the runs.
        reuse: results files whose rows count as runs; see `reused_results`.
        data: the folder of downloaded data sets.
        tell: is called with each sentence about the data and about reused results.

    Raises:
        InputError: if the data, a look-up table, a results file or starting weights cannot be used.
    """
    first = next(iter(recipes.values()))
    table_of(first)  # whether it fits
    _, images = read_data(first, data)
    fitting = fitted(first, images)
    adapted = adaptations(first, fitting, images)
    for said in (images.summary, *describe_parts(fitting, images), *adapted):
        tell(said)
    recipes = {key: fitted(recipe, images) for key, recipe in recipes.items()}
    reused, found = reused_results(reuse, recipes, images)
    for said in found:
        tell(said)

    paths = {key: run_path(runs, recipe, images) for key, recipe in recipes.items()}
    complete = frozenset(key for key, path in paths.items() if (path / RESULT).exists())
    for key, path in paths.items():
        begun = key in complete or key in reused or any(path.glob("*.pt"))
        if not begun:
            check_generator_fits(recipes[key], images)
    return TablePlan(name=name, recipes=recipes, images=images, reused=reused, complete=complete)
