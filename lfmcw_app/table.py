"""`python -m lfmcw_app.table NAME`: a table of the paper over several seeds, resumed if begun.

    table2     LFM-CW against its baseline (the same search without LFM-CW)
    table4     generated and real images against generated ones only (Eq. 19)
    table5     the generators
    fig3       the trade-off λ
    controls   what would explain a gain without class weighting: random cells, more rounds, λ = 0,
               uniform class weights

Every run has a folder of its own under --runs, named by its recipe. So tables share runs: those
with a result are not run again, interrupted ones are resumed. A Markdown table, a CSV file with one
row per run, and a figure are written after each.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console

from lfmcw_app import cli
from lfmcw_app.comparison import Summary, draw_comparison, summarise
from lfmcw_app.data import short_name
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe, key_value
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search import read_data
from lfmcw_app.sweep import LAUNCHERS, make_launcher, resume_command, sweep
from mlo.errors import nearest

__all__ = ["TABLES", "Arm", "arm_recipe"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a table compares.

    Attributes:
        settings: recipe key → value.
        length: the search has so many times the recipe's epochs or steps.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0


EQUAL_TIME = 4.0
"""LFM-CW takes 3.75 times as long as a first-order DARTS search in the paper, 3 to 5 times here."""

TABLES: dict[str, dict[str, Arm]] = {
    "table2": {
        "no LFM-CW": Arm(settings={"search.method": "darts"}),
        "LFM-CW": Arm(settings={"search.method": "lfmcw"}),
    },
    "table4": {
        "generated images only": Arm(settings={"search.synthetic_only": True}),
        "generated and real images": Arm(settings={"search.synthetic_only": False}),
    },
    "table5": {
        "DCGAN": Arm(settings={"search.generator.name": "dcgan"}),
        "WGAN-GP": Arm(settings={"search.generator.name": "wgan_gp"}),
        "BigGAN": Arm(settings={"search.generator.name": "biggan"}),
    },
    "fig3": {
        f"λ = {value:g}": Arm(settings={"search.lambda": value})
        for value in (0.0, 0.1, 0.5, 1.0, 2.0, 3.0)
    },
    "controls": {
        "LFM-CW": Arm(settings={"search.method": "lfmcw"}),
        "random cells": Arm(settings={"search.method": "random"}),
        "no LFM-CW": Arm(settings={"search.method": "darts"}),
        "no LFM-CW, 4 times the rounds": Arm(
            settings={"search.method": "darts"}, length=EQUAL_TIME
        ),
        "λ = 0": Arm(settings={"search.lambda": 0.0}),
        "uniform class weights": Arm(settings={"search.class_weighting": "uniform"}),
    },
}
"""Table → label → arm, the baseline of the comparison first."""


def table(
    name: Annotated[str, typer.Argument(help=f"Which: {', '.join(TABLES)}.")],
    dataset: Annotated[
        str, typer.Argument(autocompletion=cli.complete_dataset, help=cli.DATASET_HELP)
    ] = "fashion-mnist",
    preset: cli.PresetOption = None,
    space: cli.SpaceOption = None,
    order: cli.OrderOption = None,
    config: cli.ConfigOption = None,
    assign: cli.SetOption = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Searches of each arm, with the seeds 0, 1, ...")
    ] = 10,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the table. By default tables/NAME-DATASET-PRESET."),
    ] = None,
    runs: Annotated[
        Path,
        typer.Option(help="Folder of the runs, which tables share."),
    ] = Path("tables/runs"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    launcher: Annotated[
        str, typer.Option(help=f"Where they run: {', '.join(LAUNCHERS)}.")
    ] = "local",
    launcher_set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Option of the launcher, such as num_gpus=1 or timeout_min=1440. Repeatable.",
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Tries of a failed run from its last checkpoint.")
    ] = 2,
    data: cli.DataOption = Path("data"),
    device: cli.DeviceOption = "auto",
    threads: cli.ThreadsOption = None,
) -> None:
    """Runs a table of the paper, seed by seed, and writes table.md, runs.csv and figure.png."""
    console = Console()
    with cli.reported_errors(Console(stderr=True)):
        if name not in TABLES:
            raise InputError(f"Unknown table {name!r}. {nearest(name, TABLES)}")
        settings = assign or []
        _check_settings(name, settings)

        # Seed by seed, so that an unfinished table compares arms of equal numbers of runs.
        recipes = {}
        for seed in range(seeds):
            for label, arm in TABLES[name].items():
                recipes[label, seed] = arm_recipe(
                    arm, dataset, preset, config, settings, seed, space=space, order=order
                )
        _check_arms(name, recipes)
        first = next(iter(recipes.values()))
        read_data(first, data)
        options = dict(
            key_value(setting, "--launcher-set", "num_gpus=1") for setting in launcher_set or []
        )
        place = make_launcher(launcher, jobs=jobs, folder=runs / "launcher", options=options)

        # What has run before is in the report already; the rest is missing.
        folder = out or Path("tables") / f"{name}-{short_name(dataset)}-{first.preset}"
        _claim(folder, {label: recipes[label, 0] for label in TABLES[name]})
        report = _Report(name, folder, f"{name}, {short_name(dataset)}, preset {first.preset}")
        folders = {key: _run_folder(runs, recipe) for key, recipe in recipes.items()}
        keys = {path: key for key, path in folders.items()}
        missing = [path for key, path in folders.items() if not report.add(key, path)]
        if len(missing) < len(folders):
            report.write()
        _say(
            console,
            f"{len(recipes)} runs, {len(recipes) - len(missing)} of them done before. They log to "
            f"{runs}/*/log.txt",
        )

        # The runs share the processor, where they do not need only one thread each.
        shared = max(1, (os.cpu_count() or 1) // jobs)
        cpu_threads = threads or cli.default_threads(first.preset) or shared
        command = partial(resume_command, data=data, device=device, threads=cpu_threads)
        signal.signal(signal.SIGTERM, _stop)
        failures = []
        with place as where:
            for outcome in sweep(missing, command, where, retries=retries):
                key = keys[outcome.folder]
                run = f"{key[0]}, seed {key[1]}"
                tries = f" after {outcome.tries} tries" if outcome.tries > 1 else ""
                if outcome.failure is None and report.add(key, outcome.folder):
                    report.write()
                    _say(console, f"{run}: {report.error(key):.2f}% test error{tries}")
                else:
                    failures.append(f"{run}: {outcome.failure}{tries}")
                    _say(console, f"Failed: {failures[-1]}")

        if report.path.exists():
            _say(console, report.path.read_text("utf-8"))
            _say(console, f"In {folder}: table.md, runs.csv, figure.png")
        if failures:
            raise InputError(
                f"{len(failures)} of {len(recipes)} runs failed, the table lacks them: "
                f"{'; '.join(failures)}"
            )


def _stop(*_: Any) -> NoReturn:
    raise SystemExit(143)  # through the launcher's end, which stops what runs


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def arm_recipe(
    arm: Arm,
    dataset: str,
    preset: str | None,
    config: Path | None,
    assign: Sequence[str],
    seed: int,
    *,
    space: str | None,
    order: str | None,
) -> Recipe:
    """The recipe of a run of an arm."""
    settings = [*assign, *(f"{key}={json.dumps(value)}" for key, value in arm.settings.items())]
    recipe = cli.resolve_recipe(dataset, preset, config, settings, seed, space=space, order=order)
    if arm.length == 1.0:
        return recipe

    # Its length is known only now: the search has as many epochs or steps as its preset says.
    how = recipe.search
    longer = f"epochs={(how.epochs or 0) * arm.length}"
    if how.steps:
        longer = f"steps={round(how.steps * arm.length)}"
    settings.append(f"search.{longer}")
    return cli.resolve_recipe(dataset, preset, config, settings, seed, space=space, order=order)


def _check_settings(name: str, assign: Sequence[str]) -> None:
    """Refuses settings of what a table varies."""
    owned = {"seed", *(key for arm in TABLES[name].values() for key in arm.settings)}
    for assignment in assign:
        key = assignment.partition("=")[0].strip()
        if key in owned or key == "search":  # the latter replaces the whole section
            raise InputError(
                f"{name} sets {', '.join(sorted(owned))} itself; drop --set {assignment}."
            )


def _check_arms(name: str, recipes: Mapping[tuple[str, int], Recipe]) -> None:
    """Refuses settings that leave nothing to compare."""
    first = next(iter(recipes.values()))
    if name in ("table4", "table5", "fig3") and first.search.method != "lfmcw":
        raise InputError(
            f"{name} compares settings of LFM-CW; search.method must be lfmcw, got "
            f"{first.search.method!r}."
        )

    # Two arms with one recipe would be one run, compared with itself.
    known: dict[str, str] = {}
    for (label, _), recipe in recipes.items():
        same = known.setdefault(recipe.to_yaml(), label)
        if same != label:
            raise InputError(
                f"With these settings the arms {same!r} and {label!r} of {name} are the same "
                "search."
            )


def _run_folder(runs: Path, recipe: Recipe) -> Path:
    """The folder of a recipe's run, named by a digest of the recipe; made where it is missing."""
    how = recipe.search
    digest = hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:12]
    name = f"{short_name(recipe.dataset)}-{how.space}-{how.method}-seed{recipe.seed}-{digest}"
    path = runs / name
    if not (path / "config.yaml").exists():
        RunFolder.create(path, recipe)
    return path


def _claim(folder: Path, recipes: Mapping[str, Recipe]) -> None:
    """Makes the table's folder, or sees that it belongs to the same table.

    Raises:
        InputError: if it holds a table of other settings.
    """
    described = {
        label: recipe.model_dump(mode="json", by_alias=True, exclude={"seed"})
        for label, recipe in recipes.items()
    }
    text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    claim = folder / "recipes.yaml"
    if claim.exists():
        if claim.read_text("utf-8") != text:
            raise InputError(
                f"{folder} holds a table of other settings (recipes.yaml). Name another folder "
                "with --out."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    claim.write_text(text, encoding="utf-8")


class _Report:
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
            writer.writerow(["table", "arm", "seed", *columns, "run"])
            for label, runs in self._results.items():
                for seed, (path, result) in sorted(runs.items()):
                    values = (result[key] for key in columns)
                    writer.writerow([self._name, label, seed, *values, path.name])
        draw_comparison(arms, self._title, self._folder / "figure.png")


def main() -> None:
    """Entry point."""
    cli.main(table)


if __name__ == "__main__":
    main()
