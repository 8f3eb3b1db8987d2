"""The files of a table: its runs' folders, and the results in table.md, runs.csv and figure.png."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lfmcw_app.arms import TABLES
from lfmcw_app.comparison import Summary, draw_comparison, summarise
from lfmcw_app.data import Dataset, short_name
from lfmcw_app.errors import InputError
from lfmcw_app.pictures import describe_dataset
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_folder import RunFolder

__all__ = ["TableReport", "claim", "run_folder"]


def run_folder(runs: Path, recipe: Recipe, dataset: Dataset) -> Path:
    """The folder of a recipe's run on these data, named by a digest of both; made if missing."""
    how = recipe.search
    # Of a table that is looked up in, its digest counts, and not where it lies.
    lookup = recipe.lookup.model_copy(update={"file": None})
    named = recipe.model_copy(update={"lookup": lookup})
    content = f"{named.to_yaml()}{dataset.fingerprint.digest}"
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    name = f"{short_name(recipe.dataset)}-{how.space}-{how.method}-seed{recipe.seed}-{digest}"
    path = runs / name
    if not (path / "config.yaml").exists():
        describe_dataset(dataset, RunFolder.create(path, recipe))
    return path


def claim(folder: Path, recipes: Mapping[str, Recipe], dataset: Dataset) -> None:
    """Makes the table's folder, or sees that it belongs to the same table.

    Raises:
        InputError: if it holds a table of other settings, or of other data, or of other data.
    """
    settings = {
        label: recipe.model_dump(
            mode="json", by_alias=True, exclude={"seed": True, "lookup": {"file"}}
        )
        for label, recipe in recipes.items()
    }
    described = {"data": dataset.fingerprint.digest, **settings}
    text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    file = folder / "recipes.yaml"
    if file.exists():
        held = file.read_text("utf-8")
        if held == text:
            return
        same_settings = held.partition("\n")[2] == text.partition("\n")[2]
        what = f"other data ({dataset.name} has changed)" if same_settings else "other settings"
        raise InputError(
            f"{folder} holds a table of {what} (recipes.yaml). Name another folder with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


class TableReport:
    """The results of a table's runs, and its files."""

    def __init__(self, name: str, folder: Path, title: str) -> None:
        self._name, self._folder, self._title = name, folder, title
        self._results: dict[str, dict[int, tuple[Path, dict[str, Any]]]] = {
            label: {} for label in TABLES[name]
        }
        self.path = folder / "table.md"

    def error(self, key: tuple[str, int]) -> float:
        """The test error of a run, %."""
        label, seed = key
        return float(self._results[label][seed][1]["test_error_percent"])

    def add(self, key: tuple[str, int], path: Path) -> bool:
        """Takes up the result of a run, if it has one; says whether."""
        result = RunFolder.open(path).result
        if result is None:
            return False
        if result.get("changed"):
            keys = sorted({change["key"] for change in result["changed"]})
            raise InputError(
                f"The run in {path} was resumed with other settings ({', '.join(keys)}), so it is "
                "none of this table's arms. Move it away: the table then runs it anew."
            )
        label, seed = key
        self._results[label][seed] = (path, result)
        return True

    def write(self) -> None:
        """Writes table.md, runs.csv and figure.png of the results so far."""
        # An arm without a finished run is not in the table yet.
        arms = []
        for label, runs in self._results.items():
            if runs:
                by_seed = {seed: result for seed, (_, result) in sorted(runs.items())}
                errors = {seed: r["test_error_percent"] for seed, r in by_seed.items()}
                parameters = {seed: r["parameters"] for seed, r in by_seed.items()}
                arms.append(Summary(label=label, errors=errors, parameters=parameters))

        self.path.write_text(f"# {self._title}\n\n{summarise(arms)}", encoding="utf-8")
        columns = ("test_error_percent", "parameters", "multiply_adds_millions")
        with (self._folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            of_lookup = ("regret_percent", "rank")  # empty where networks were trained
            writer.writerow(["table", "arm", "seed", *columns, *of_lookup, "run"])
            for label, runs in self._results.items():
                for seed, (path, result) in sorted(runs.items()):
                    found = result.get("lookup", {})
                    values = [result[key] for key in columns]
                    values += [found.get(key, "") for key in of_lookup]
                    writer.writerow([self._name, label, seed, *values, path.name])
        draw_comparison(arms, self._title, self._folder / "figure.png")
