"""Makes the pages: one self-contained HTML file, of a run or of several side by side."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lfmcw_app.data import short_name
from lfmcw_app.report.architecture import evolution
from lfmcw_app.report.cells import cell_svg, primitive_label, state_label
from lfmcw_app.report.charts import Series, line_chart, short
from lfmcw_app.report.curves import (
    Rounds,
    at,
    error_charts,
    gradient_charts,
    loss_charts,
    training_charts,
)
from lfmcw_app.report.images import class_weights, gradient_bar, sheets
from lfmcw_app.report.reading import RunData, read_run
from lfmcw_app.report.tables import (
    FIGURES,
    PROBLEM_NAMES,
    costs,
    environment_rows,
    key_figures,
    progress_text,
    solves,
)
from lfmcw_app.run_folder import EVALUATED
from lfmcw_app.search_space.genotype import EDGES_PER_NODE, Genotype
from lfmcw_app.trainer import METHODS, SPACES
from lfmcw_app.units import duration, size

__all__ = ["REPORT", "comparison_page", "run_page", "write_report"]

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Writes report.html into a run folder and returns its path.

    Raises:
        InputError: if there is no run in the folder, or one of its files is damaged.
    """
    target = folder / REPORT
    target.write_text(run_page(read_run(folder)), encoding="utf-8")
    return target


def run_page(run: RunData) -> str:
    """The page of one run."""
    rounds = Rounds(run)
    alpha = evolution(run, rounds.offsets, rounds.boundaries)
    names, pictures = sheets(run)
    return _rendered(
        "run.html",
        title=_title(run),
        run=run,
        what=_what(run),
        state=progress_text(run),
        figures=key_figures(run),
        cells=_cells(run.genotype),
        alpha=alpha,
        losses=loss_charts(rounds),
        errors=error_charts(rounds),
        weights=class_weights(run),
        sheet_names=names,
        sheets=pictures,
        gradients=gradient_charts(rounds),
        solves=solves(run),
        costs=costs(run),
        training=training_charts(run.training.entries),
        environment=environment_rows(run.environment),
        command=repeat_command(run),
    )


def comparison_page(runs: Sequence[RunData]) -> str:
    """The page of several runs side by side."""
    rounds = [Rounds(run) for run in runs]
    labels = _labels(runs)

    def overlaid(title: str, *keys: str, unit: str = "", wrong: bool = False) -> Markup:
        pick = at(*keys, percent_wrong=wrong)
        lines = [
            Series(label=label, points=own.points(pick), colour=f"series-{1 + index % 8}")
            for index, (label, own) in enumerate(zip(labels, rounds, strict=True))
        ]
        return line_chart(title, lines, unit=unit)

    training = [
        Series(
            label=label,
            points=[(float(e["round"]), 100.0 * (1.0 - e["metrics"]["network"]["accuracy"])) for e in run.training.entries],
            colour=f"series-{1 + index % 8}",
        )
        for index, (label, run) in enumerate(zip(labels, runs, strict=True))
    ]  # fmt: skip
    charts = [
        overlaid(
            "Search: error of W2 on validation batches",
            "metrics",
            "arch",
            "accuracy",
            unit="%",
            wrong=True,
        ),
        overlaid("Search: loss of A on validation batches", "losses", "arch"),
        overlaid("Search: loss of W2", "losses", "w2"),
        overlaid("Search: loss of the generator", "losses", "gan", "generator"),
        line_chart("Training of the derived network: error on batches", training, unit="%"),
    ]
    figures = {
        label: {f.key: f for f in key_figures(run)} for label, run in zip(labels, runs, strict=True)
    }
    named = {f.key: f.label for found in figures.values() for f in found.values()}
    return _rendered(
        "comparison.html",
        title=f"{len(runs)} runs compared",
        labels=labels,
        whats=[_what(run) for run in runs],
        states=[progress_text(run) for run in runs],
        rows={key: named[key] for key in FIGURES if key in named},
        figures=figures,
        differences=_differences(runs),
        charts=[chart for chart in charts if chart],
        cells=[_cells(run.genotype) for run in runs],
        weights=[class_weights(run) for run in runs],
    )


def repeat_command(run: RunData) -> str:
    """The command that computes the same again, from the recipe in the run folder."""
    recipe = ["--config", str(run.path / "config.yaml")]
    if run.evaluated:
        parts = ["lfmcw_app.evaluate", str(run.path / EVALUATED), run.recipe.dataset, *recipe]
    else:
        parts = ["lfmcw_app.run", run.recipe.dataset, *recipe]
    return "python -m " + shlex.join(parts)


def _rendered(template: str, **context: Any) -> str:
    environment = Environment(
        loader=PackageLoader("lfmcw_app.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    environment.filters["duration"] = lambda seconds: " ".join(duration(seconds))
    environment.filters["size"] = lambda count: " ".join(size(count))
    environment.globals.update(colours=gradient_bar(), problem_names=PROBLEM_NAMES)
    return environment.get_template(template).render(context)


def _title(run: RunData) -> str:
    return (
        f"{short_name(run.recipe.dataset)}: "
        f"{'evaluation of a genotype' if run.evaluated else _what(run)}"
    )


def _what(run: RunData) -> str:
    if run.evaluated:
        return f"given genotype, preset {run.recipe.preset}, seed {run.recipe.seed}"
    how = run.recipe.search
    order = "" if how.method == "random" else f", {how.order} order"
    return (
        f"{METHODS[how.method]}, {SPACES[how.space]} space{order}, preset {run.recipe.preset}, "
        f"seed {run.recipe.seed}"
    )


def _cells(genotype: Genotype | None) -> list[dict[str, Any]]:
    """Each cell's picture, and its edges as text."""
    if genotype is None:
        return []
    return [
        {
            "kind": kind,
            "svg": cell_svg(kind, edges),
            "nodes": [
                [f"{primitive_label(e.primitive)} of {state_label(e.source)}" for e in edges[first : first + EDGES_PER_NODE]]
                for first in range(0, len(edges), EDGES_PER_NODE)
            ],
        }
        for kind, edges in (("normal", genotype.normal), ("reduction", genotype.reduction))
    ]  # fmt: skip


def _labels(runs: Sequence[RunData]) -> list[str]:
    """The folders' names, with as much of their paths as tells them apart."""
    paths = [run.path.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-length:]) for parts in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index}. {run.name}" for index, run in enumerate(runs, start=1)]


def _differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """The settings in which the recipes differ: key, and the value of each run."""
    flat = [_flat(run.recipe.model_dump(mode="json", by_alias=True)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    found = [
        (key, [json.dumps(settings[key], ensure_ascii=False).strip('"') for settings in flat])
        for key in keys
    ]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "hypergradient":
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
