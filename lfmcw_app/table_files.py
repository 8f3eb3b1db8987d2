"""The files of a table: its runs' folders, and the results in table.md, runs.csv and figure.png."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

import mlo
from lfmcw_app.arms import TABLES, contrasts
from lfmcw_app.bounded_files import text_of
from lfmcw_app.comparison import measure_of, summaries
from lfmcw_app.comparison_figure import draw_comparison
from lfmcw_app.comparison_text import summarise
from lfmcw_app.data import Dataset, short_name
from lfmcw_app.errors import InputError
from lfmcw_app.names import FOLDER
from lfmcw_app.output_files import replacing
from lfmcw_app.pictures import describe_dataset
from lfmcw_app.recipe import Recipe
from lfmcw_app.result_rows import row_of
from lfmcw_app.results_file import Row, write_results
from lfmcw_app.run_files import CONFIG, DATASET, LOCK, RESULT
from lfmcw_app.run_folder import RunFolder

__all__ = ["TableReport", "claim", "run_digest", "run_folder", "run_path"]


def run_path(runs: Path, recipe: Recipe, dataset: Dataset) -> Path:
    """The place of a recipe's run on these data, named by a digest of both."""
    how, digest = recipe.search, run_digest(recipe, dataset)
    name = f"{short_name(recipe.dataset)}-{how.space}-{how.method}-seed{recipe.seed}-{digest}"
    return runs / name


def run_digest(recipe: Recipe, dataset: Dataset) -> str:
    """Identifies a recipe's run on these data, on every machine: 12 hexadecimal digits."""
    content = f"{_without_places(recipe).to_yaml()}{dataset.fingerprint.digest}"
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _without_places(recipe: Recipe) -> Recipe:
    """The recipe without the places of its images, of its look-up table and of starting weights.

    What lies there is known by the fingerprint of the images, and by the digests of the others.
    """

    def digest_only(section: Any) -> Any:
        init = section.init
        unplaced = init.model_copy(update={"run": None}) if init.digest else init
        return section.model_copy(update={"init": unplaced})

    generator = digest_only(recipe.search.generator)
    search = digest_only(recipe.search).model_copy(update={"generator": generator})
    evaluation = digest_only(recipe.evaluation)
    lookup = recipe.lookup.model_copy(update={"file": None})
    dataset = FOLDER if recipe.dataset.startswith(FOLDER) else recipe.dataset
    unplaced = {"dataset": dataset, "lookup": lookup, "search": search, "evaluation": evaluation}
    return recipe.model_copy(update=unplaced)


def run_folder(runs: Path, recipe: Recipe, dataset: Dataset, *, keep: str = "all") -> Path:
    """The folder of a recipe's run on these data; made if missing.

    Args:
        runs: folder of the runs; several processes may make folders in it.
        recipe: of the run.
        dataset: its data.
        keep: what the run keeps, a name in `KEEP`.
    """
    path = run_path(runs, recipe, dataset)
    if (path / DATASET).exists():
        return path
    runs.mkdir(parents=True, exist_ok=True)
    with FileLock(runs / LOCK):
        if not (path / DATASET).exists():
            made = (path / CONFIG).exists()
            folder = RunFolder.open(path) if made else RunFolder.create(path, recipe)
            folder.keep = keep
            describe_dataset(dataset, folder)
    return path


def claim(
    folder: Path, recipes: Mapping[str, Recipe], dataset: Dataset, *, first_seed: int = 0
) -> None:
    """Makes the table's folder, or checks that it belongs to the same table.

    Args:
        folder: of the table.
        recipes: arm → the recipe of its first run.
        dataset: their data.
        first_seed: the least seed. A table of other seeds would replace the files of this one.

    Raises:
        InputError: if it holds a table of other settings, or of other data.
    """
    settings = {
        label: _without_places(recipe).model_dump(mode="json", by_alias=True, exclude={"seed"})
        for label, recipe in recipes.items()
    }
    first = {"first_seed": first_seed} if first_seed else {}
    described = {"data": dataset.fingerprint.digest, **first, **settings}
    text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    file = folder / "recipes.yaml"
    if file.exists():
        try:
            held = text_of(file)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file}, which says of which runs the table is, cannot be read ({error}). Name "
                "another folder with --out, or put the file back."
            ) from None
        if held == text:
            return
        same_settings = held.partition("\n")[2] == text.partition("\n")[2]
        what = f"other data ({dataset.name} has changed)" if same_settings else "other settings"
        raise InputError(
            f"{folder} holds a table of {what} (recipes.yaml). Name another folder with --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"The table's folder {folder} cannot be written ({error.strerror or error}). Free "
            "some space or fix the permissions, then repeat the command, or name another folder "
            "with --out."
        ) from None


class TableReport:
    """The results of a table's runs, and its files."""

    def __init__(self, name: str, folder: Path, title: str) -> None:
        self._name, self._folder, self._title = name, folder, title
        self._rows: dict[tuple[str, int], Row] = {}
        self.path, self.results = folder / "table.md", folder / "runs.csv"

    def said(self, key: tuple[str, int]) -> str:
        """The result of a run, in words."""
        row = self._rows[key]
        regret = "" if row.regret_percent is None else f", regret {row.regret_percent:.2f}"
        return f"{row.test_error_percent:.2f}% test error{regret}"

    def add(self, key: tuple[str, int], path: Path) -> bool:
        """Adds the result of a run, if it has one; returns whether it has."""
        if not (path / RESULT).exists():
            return False
        folder = RunFolder.open(path)
        result = folder.result
        if result is None:
            return False
        folder.finish_clearing()
        if result.get("changed"):
            keys = sorted({change["key"] for change in result["changed"]})
            raise InputError(
                f"The run in {path} was resumed with other settings ({', '.join(keys)}), so it "
                "does not belong to any arm of this table. Move it away: the table then runs it "
                "again."
            )
        self._rows[key] = row_of(self._name, key[0], path)
        return True

    def collect(self, folders: Mapping[tuple[str, int], Path]) -> list[Path]:
        """Adds the results that runs have by now; returns the folders of runs without one.

        Other table commands complete runs too. A file that knew only the runs of its own command
        would lose theirs.

        Args:
            folders: (arm, seed) → the run's folder.
        """
        missing = {key: path for key, path in folders.items() if key not in self._rows}
        return [path for key, path in missing.items() if not self.add(key, path)]

    def add_reused(self, key: tuple[str, int], row: Row) -> None:
        """Adds the result of a run of another machine or table."""
        self._rows[key] = row.model_copy(update={"table": self._name, "arm": key[0]})

    def to_contribute(self) -> str:
        """Says how to add these results to the page of results."""
        return (
            f"To contribute: copy {self.results} to docs/data/runs/{self._folder.name}.csv in a "
            "checkout of this repository (under another name if that one is taken), run `make "
            "results`, which fills the table's row in docs/results.md, and open a pull request."
        )

    def write_so_far(self) -> None:
        """Writes table.md and runs.csv with the results so far; a failure is a warning."""
        try:
            self._write(figure=False)  # a second each
        except OSError as error:
            warnings.warn(
                f"{self.path} cannot be written ({error.strerror or error}). The runs continue, "
                "and the next one tries again.",
                mlo.CheckpointWarning,
                stacklevel=2,
            )

    def write(self) -> None:
        """Writes table.md, runs.csv and figure.png.

        Raises:
            InputError: if they cannot be written.
        """
        try:
            self._write(figure=True)
        except OSError as error:
            raise InputError(
                f"The files of {self._folder} cannot be written ({error.strerror or error}). Free "
                "some space or fix the permissions, then repeat the command. No run is made "
                "again."
            ) from None

    def _write(self, *, figure: bool) -> None:
        order = list(TABLES[self._name])
        rows = sorted(self._rows.values(), key=lambda row: (order.index(row.arm), row.seed))
        arms, measure = summaries(rows), measure_of(rows)
        write_results(self.results, rows)
        text = f"# {self._title}\n\n{summarise(arms, contrasts(self._name), measure)}"
        with replacing(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        if figure:
            with replacing(self._folder / "figure.png") as temporary:
                draw_comparison(arms, self._title, temporary, measure)
