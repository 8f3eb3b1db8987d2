"""`python -m lfmcw_app.table NAME`: a table of the paper over several seeds, run by run, from where it stands.

    table2   LFM-CW against its baseline (the same search without LFM-CW)
    table4   generated and real images against generated ones only (Eq. 19)
    table5   the generators
    fig3     the trade-off λ

Each run has a folder of its own; those with a result are not run again, interrupted ones go on. Then a Markdown table, a CSV
file with a row a run, and a figure are written beside them.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import t as student

from lfmcw_app import cli
from lfmcw_app.data import DATASETS, Dataset, short_name
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.trainer import read_data
from lfmcw_app.trainer import run as run_phases
from mlo.errors import nearest

__all__ = ["ARMS", "Comparison", "Summary", "compare", "summarise"]

# Table → its arms, the baseline of the comparison first: label → what is set in the recipe.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "table2": {"no LFM-CW": {"search.method": "darts"}, "LFM-CW": {"search.method": "lfmcw"}},
    "table4": {
        "generated images only": {"search.synthetic_only": "true"},
        "generated and real images": {"search.synthetic_only": "false"},
    },
    "table5": {
        "DCGAN": {"search.generator.name": "dcgan"},
        "WGAN-GP": {"search.generator.name": "wgan_gp"},
        "BigGAN": {"search.generator.name": "biggan"},
    },
    "fig3": {f"λ = {value:g}": {"search.lambda": value} for value in (0.0, 0.1, 0.5, 1.0, 2.0, 3.0)},
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The runs of one arm.

    Attributes:
        errors: seed → test error in %.
        parameters: seed → parameters of the derived network.
    """

    label: str
    errors: Mapping[int, float] = field(default_factory=dict)
    parameters: Mapping[int, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean test error, %."""
        return statistics.fmean(self.errors.values())

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds, %; NaN for one."""
        return statistics.stdev(self.errors.values()) if len(self.errors) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm minus the baseline, paired by seed.

    Attributes:
        difference: mean of the differences, percentage points; negative: better than the baseline.
        interval: half the width of their 95% confidence interval (Student's t); NaN for one pair.
        pairs: number of seeds that both have.
    """

    difference: float
    interval: float
    pairs: int


def compare(arm: Summary, baseline: Summary) -> Comparison:
    """Compares two arms seed by seed: a seed decides split, initial values and noise of both."""
    seeds = sorted(set(arm.errors) & set(baseline.errors))
    differences = [arm.errors[seed] - baseline.errors[seed] for seed in seeds]
    interval = math.nan
    if len(seeds) > 1:
        quantile = float(student.ppf(0.975, len(seeds) - 1))
        interval = quantile * statistics.stdev(differences) / math.sqrt(len(seeds))
    return Comparison(difference=statistics.fmean(differences), interval=interval, pairs=len(seeds))


def summarise(arms: Sequence[Summary]) -> str:
    """Returns the Markdown table; the first arm is the baseline."""
    lines = [
        "| arm | test error, % (mean ± SD) | runs | minus the first arm (95% interval) | parameters (mean) |",
        "|---|---|---|---|---|",
    ]
    for index, arm in enumerate(arms):
        against = "" if index == 0 else _against(compare(arm, arms[0]))
        spread = "" if math.isnan(arm.deviation) else f" ± {arm.deviation:.2f}"
        size = statistics.fmean(arm.parameters.values())
        lines.append(f"| {arm.label} | {arm.mean:.2f}{spread} | {len(arm.errors)} | {against} | {size:,.0f} |")
    return "\n".join(lines) + "\n"


def _against(found: Comparison) -> str:
    interval = "one pair only" if math.isnan(found.interval) else f"± {found.interval:.2f}"
    return f"{found.difference:+.2f} ({interval})"


def _figure(arms: Sequence[Summary], title: str, path: Path) -> None:
    figure = Figure(figsize=(1.6 + 1.25 * len(arms), 4.2), layout="constrained")
    axes = figure.subplots()
    for position, arm in enumerate(arms):
        axes.plot([position] * len(arm.errors), list(arm.errors.values()), "o", color="#1f77b4", alpha=0.45)
        deviation = 0.0 if math.isnan(arm.deviation) else arm.deviation
        axes.errorbar(position, arm.mean, deviation, fmt="_", color="black", capsize=6, ms=18)
    axes.set_xticks(range(len(arms)), [arm.label for arm in arms])
    axes.set_xlim(-0.6, len(arms) - 0.4)
    axes.set_ylabel("test error, %  (mean ± SD, runs)")
    axes.set_title(title, fontsize=11, loc="left")
    figure.savefig(path, dpi=110)


def table(
    name: Annotated[str, typer.Argument(help=f"Which: {', '.join(ARMS)}.")],
    dataset: Annotated[str, typer.Argument(help=f"Data set: {', '.join(DATASETS)}, folder:PATH.")] = "fashion-mnist",
    preset: cli.PresetOption = None,
    space: cli.SpaceOption = None,
    order: cli.OrderOption = None,
    config: cli.ConfigOption = None,
    assign: cli.SetOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Searches of each arm, with the seeds 0, 1, ...")] = 10,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs and the table. By default tables/NAME-DATASET-PRESET.")
    ] = None,
    data: cli.DataOption = Path("data"),
    device: cli.DeviceOption = "auto",
    threads: cli.ThreadsOption = None,
) -> None:
    """Runs what a table of the paper compares, seed by seed, and writes table.md, runs.csv and figure.png."""
    console = Console()
    with cli.reported_errors(Console(stderr=True)):
        if threads is not None:
            torch.set_num_threads(threads)
        if name not in ARMS:
            raise InputError(f"Unknown table {name!r}. {nearest(name, ARMS)}")
        _check_settings(name, assign or [])
        recipes = {
            (label, seed): cli.resolve_recipe(
                dataset,
                preset,
                config,
                [*(assign or []), *(f"{key}={value}" for key, value in changes.items())],
                seed,
                space=space,
                order=order,
            )
            for seed in range(seeds)  # seed by seed, so that an unfinished table compares equal numbers
            for label, changes in ARMS[name].items()
        }
        first = next(iter(recipes.values()))
        if name != "table2" and first.search.method != "lfmcw":
            raise InputError(
                f"{name} compares settings of LFM-CW; search.method must be lfmcw, got {first.search.method!r}."
            )
        for (label, seed), recipe in recipes.items():
            if recipe.seed != seed:
                raise InputError("The seeds are the table's own; drop the key seed from --config.")
            if len({other.search.model_dump_json() for (_, s), other in recipes.items() if s == seed}) < len(
                ARMS[name]
            ):
                raise InputError(
                    f"With these settings {name}'s arms are the same search ({label}); drop what makes them so."
                )
        folder = out or Path("tables") / f"{name}-{short_name(dataset)}-{first.preset}"
        target = cli.pick_device(device)
        images = read_data(first, data)
        results: dict[str, dict[int, dict[str, Any]]] = {label: {} for label in ARMS[name]}
        for (label, seed), recipe in recipes.items():
            results[label][seed] = _result(folder / _slug(label) / str(seed), recipe, images, console, target)
            _write(name, results, folder, f"{name}, {short_name(dataset)}, preset {first.preset}")
        console.print((folder / "table.md").read_text("utf-8"), markup=False, soft_wrap=True)
        console.print(f"In {folder}: table.md, runs.csv, figure.png", highlight=False, soft_wrap=True, markup=False)


def _check_settings(name: str, assign: Sequence[str]) -> None:
    """Refuses settings of what a table varies."""
    owned = {"seed", *(key for changes in ARMS[name].values() for key in changes)}
    for assignment in assign:
        key = assignment.partition("=")[0].strip()
        if key in owned or key == "search":
            raise InputError(f"{name} sets {', '.join(sorted(owned))} itself; drop --set {assignment}.")


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in label.replace("λ = ", "lambda-")).lower()


def _result(path: Path, recipe: Recipe, images: Dataset, console: Console, target: torch.device) -> dict[str, Any]:
    """The result of one run: read, gone on with, or made."""
    if not (path / "config.yaml").exists():
        folder = RunFolder.create(path, recipe)
    else:
        folder = RunFolder.open(path)
        if folder.recipe != recipe:
            raise InputError(
                f"The run in {path} has another recipe than this table's. Name another folder with --out, or delete it."
            )
    console.print(f"Run folder: {path}", highlight=False, soft_wrap=True, markup=False)
    return run_phases(folder, images, console, target)


def _write(name: str, results: Mapping[str, Mapping[int, Mapping[str, Any]]], folder: Path, title: str) -> None:
    """Writes what is there so far."""
    arms = [
        Summary(
            label=label,
            errors={seed: result["test_error_percent"] for seed, result in runs.items()},
            parameters={seed: result["parameters"] for seed, result in runs.items()},
        )
        for label, runs in results.items()
        if runs
    ]
    (folder / "table.md").write_text(f"# {title}\n\n{summarise(arms)}", encoding="utf-8")
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "arm", "seed", "test_error_percent", "parameters", "multiply_adds_millions"])
        for label, runs in results.items():
            for seed, result in runs.items():
                writer.writerow(
                    [name, label, seed]
                    + [result[key] for key in ("test_error_percent", "parameters", "multiply_adds_millions")]
                )
    _figure(arms, title, folder / "figure.png")


def main() -> None:
    """Entry point."""
    cli.main(table)


if __name__ == "__main__":
    main()
