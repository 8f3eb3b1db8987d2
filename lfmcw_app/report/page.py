"""Makes the pages: one self-contained HTML file, of a run or of several side by side."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lfmcw_app.data import short_name
from lfmcw_app.output_files import replacing
from lfmcw_app.report.architecture import evolution
from lfmcw_app.report.charts import Series, line_chart, short
from lfmcw_app.report.classes import class_errors, w1_confusion
from lfmcw_app.report.curves import (
    Pick,
    Rounds,
    at,
    error_charts,
    gradient_charts,
    loss_charts,
    points_of,
    training_charts,
    w2_on_real,
    warmup_charts,
)
from lfmcw_app.report.images import class_weights, gradient_bar, sheets, tile_size
from lfmcw_app.report.quality import generator_quality, quality_charts
from lfmcw_app.report.reading import RunData, read_run
from lfmcw_app.report.summary import comparison_summary, summary
from lfmcw_app.report.tables import (
    FIGURES,
    PROBLEM_NAMES,
    Figure,
    costs,
    environment_rows,
    key_figures,
    other_costs,
    progress_text,
    setting_text,
    solves,
)
from lfmcw_app.run_files import CONFIG, EVALUATED, REPORT
from lfmcw_app.search_space.cell_cards import graphs_of
from lfmcw_app.search_space.cell_svg import CELL_STYLE, cell_layout, cell_svg, primitive_label
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.operations import primitive_named
from lfmcw_app.spaces import space_named
from lfmcw_app.stages import METHOD_LABELS
from lfmcw_app.units import duration, size, text_units

__all__ = ["comparison_page", "run_page", "write_page", "write_report"]


SHAPES = (
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    OSError,
    RuntimeError,
)
"""What Python, NumPy, Pillow and torch raise at values of another shape than runs write."""


def write_report(folder: Path) -> Path:
    """Writes report.html into a run folder and returns its path.

    Raises:
        InputError: if there is no run in the folder, or one of its files is damaged.
    """
    target = folder / REPORT
    for left in folder.glob(f".{target.stem}.*.part{target.suffix}"):  # of a writer that was killed
        left.unlink(missing_ok=True)
    write_page(run_page(read_run(folder)), target)
    return target


def write_page(page: str, path: Path) -> None:
    """Writes a page, completely or not at all; half characters become question marks.

    Raises:
        OSError: if it cannot be written.
    """
    # (The name of a folder may be no text, and paths are shown.)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def run_page(run: RunData) -> str:
    """The page of one run."""
    rounds = Rounds(run)
    unshown = list(run.unreadable)
    shown = partial(_shown, unshown)
    warmup = run.warmup.entries
    names, pictures = shown("the images", lambda: sheets(run), ([], []))
    parts: dict[str, Any] = {
        "state": shown("where the run stands", lambda: progress_text(run), "unfinished"),
        "summary": shown("the summary", lambda: summary(run), ""),
        "figures": shown("the key figures", lambda: key_figures(run), []),
        "cells": shown("the cells", lambda: _cells(run.genotype), []),
        "alpha": shown(
            "the architecture", lambda: evolution(run, rounds.offsets, rounds.boundaries), None
        ),
        "losses": shown("the losses", lambda: loss_charts(rounds), []),
        "errors": shown("the errors", lambda: error_charts(rounds), []),
        "weights": shown("the class weights", lambda: class_weights(run), None),
        "classes": shown("the errors by class", lambda: class_errors(run), None),
        "w1_confusion": shown("the confusion of W1", lambda: w1_confusion(run), None),
        "quality": shown("what images are worth", lambda: generator_quality(run, rounds), None),
        "sheet_names": names,
        "tile": tile_size(names),
        "sheets": pictures,
        "warmup": shown(
            "the warm-up",
            lambda: [*warmup_charts(warmup), *quality_charts(partial(points_of, warmup))],
            [],
        ),
        "gradients": shown("the gradients", lambda: gradient_charts(rounds), []),
        "solves": shown("the solves", lambda: solves(run), []),
        "costs": shown("time and memory", lambda: costs(run), []),
        "other_costs": shown("time beside the updates", lambda: other_costs(run), []),
        "training": shown("the training", lambda: training_charts(run.training.entries), []),
        "environment": shown("the environment", lambda: environment_rows(run.environment), ()),
    }
    return _rendered(
        "run.html",
        [run],
        title=_title(run),
        run=run,
        what=_what(run),
        command=repeat_command(run),
        unshown=unshown,
        **parts,
    )


def _shown(unshown: list[str], what: str, make: Callable[[], Any], otherwise: Any) -> Any:
    """A part of a page; where its numbers allow none, it is named in `unshown` instead."""
    try:
        return make()
    except SHAPES as error:
        said = " ".join(str(error).split())[:200]
        unshown.append(f"{what} ({type(error).__name__}: {said})")
        return otherwise


def comparison_page(runs: Sequence[RunData]) -> str:
    """The page of several runs side by side."""
    rounds = [Rounds(run) for run in runs]
    labels = _labels(runs)

    def overlaid(title: str, pick: Pick, unit: str = "") -> Markup:
        lines = [
            Series(label=label, points=own.points(pick), colour=f"series-{1 + index % 8}")
            for index, (label, own) in enumerate(zip(labels, rounds, strict=True))
        ]
        return line_chart(title, lines, unit=unit, mark_ends=True)

    # Curves of one run have one colour in all charts.
    training = []
    for index, (label, run) in enumerate(zip(labels, runs, strict=True)):
        of_network = at("metrics", "network", "accuracy", percent_wrong=True)
        errors = points_of(run.training.entries, of_network)
        training.append(Series(label=label, points=errors, colour=f"series-{1 + index % 8}"))

    of_w2 = at("metrics", "arch", "accuracy", percent_wrong=True)
    charts = [
        overlaid("Search: error of W2 on validation batches", of_w2, "%"),
        overlaid("Search: loss of A on validation batches", at("losses", "arch")),
        overlaid("Search: loss of W2 on real training images", w2_on_real),
        overlaid("Search: loss of the generator", at("losses", "gan", "generator")),
        line_chart(
            "Training of the derived network: error on batches", training, unit="%", mark_ends=True
        ),
    ]

    # The rows of the table: all figures that some run has, in their order on a run's page.
    figures: dict[str, dict[str, Figure]] = {}
    named: dict[str, str] = {}
    unshown: list[str] = []

    def of_each(what: str, make: Callable[[RunData], Any], otherwise: Any) -> list[Any]:
        named = zip(labels, runs, strict=True)
        return [
            _shown(unshown, f"{label}: {what}", partial(make, run), otherwise)
            for label, run in named
        ]

    for label, run in zip(labels, runs, strict=True):
        unshown += [f"{label}: {what}" for what in run.unreadable]
    for label, found in zip(labels, of_each("the key figures", key_figures, []), strict=True):
        figures[label] = {figure.key: figure for figure in found}
        named |= {figure.key: figure.label for figure in figures[label].values()}
    return _rendered(
        "comparison.html",
        runs,
        title=f"{len(runs)} runs compared",
        summary=_shown(unshown, "the summary", lambda: comparison_summary(labels, runs), ""),
        summaries=of_each("the summary", summary, ""),
        labels=labels,
        whats=[_what(run) for run in runs],
        states=of_each("where the run stands", progress_text, "unfinished"),
        rows={key: named[key] for key in FIGURES if key in named},
        figures=figures,
        differences=_differences(runs),
        charts=[chart for chart in charts if chart],
        cells=of_each("the cells", lambda run: _cells(run.genotype), []),
        weights=of_each("the class weights", class_weights, None),
        unshown=unshown,
    )


def repeat_command(run: RunData) -> str:
    """The command that computes the same again, from the recipe in the run folder."""
    recipe = ["--config", str(run.path / CONFIG)]
    if run.evaluated:
        parts = ["lfmcw_app.evaluate", str(run.path / EVALUATED), run.recipe.dataset, *recipe]
    else:
        parts = ["lfmcw_app.run", run.recipe.dataset, *recipe]
    return "python -m " + shlex.join(parts)


def _rendered(template: str, runs: Sequence[RunData], **context: Any) -> str:
    environment = Environment(
        loader=PackageLoader("lfmcw_app.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    environment.filters["setting"] = setting_text
    environment.filters["units"] = text_units
    environment.filters["duration"] = lambda seconds: " ".join(duration(seconds))
    environment.filters["size"] = lambda count: " ".join(size(count))
    environment.globals.update(
        cell_style=Markup(CELL_STYLE),
        colours=gradient_bar(),
        problem_names=PROBLEM_NAMES,
        operation_colours=_operation_colours(runs, dark=False),
        dark_operation_colours=_operation_colours(runs, dark=True),
    )
    return environment.get_template(template).render(context)


def _operation_colours(runs: Sequence[RunData], *, dark: bool) -> Markup:
    """The colours of the operations that runs can have, as CSS variables."""
    names: set[str] = set()
    for run in runs:
        how = run.recipe.search
        names |= space_named(how.space).operations(how)
        names |= run.genotype.primitives if run.genotype is not None else set()
    found = []
    for name in sorted(names):
        primitive = primitive_named(name)
        colour = primitive.dark_colour if dark and primitive.dark_colour else primitive.colour
        found.append(Markup("--op-{}: {};").format(name, colour))
    return Markup(" ").join(found)


def _title(run: RunData) -> str:
    what = "evaluation of a genotype" if run.evaluated else _what(run)
    return f"{short_name(run.recipe.dataset)}: {what}"


def _what(run: RunData) -> str:
    if run.evaluated:
        return f"given genotype, preset {run.recipe.preset}, seed {run.recipe.seed}"
    how = run.recipe.search
    order = "" if how.method == "random" else f", {how.order} order"
    return (
        f"{METHOD_LABELS[how.method]}, {space_named(how.space).title} space{order}, preset "
        f"{run.recipe.preset}, seed {run.recipe.seed}"
    )


def _cells(genotype: Cells | None) -> list[dict[str, Any]]:
    """Each cell's picture, its width in pixels, and its edges as text, a list per node."""
    if genotype is None:
        return []
    texts = genotype.to_data().values()
    return [
        {
            "title": graph.title,
            "svg": cell_svg(graph),
            "width": round(cell_layout(graph).width),
            "nodes": [_edges_as_drawn(edges, genotype) for edges in nodes],
        }
        for graph, nodes in zip(graphs_of(genotype), texts, strict=True)
    ]


def _edges_as_drawn(edges: Sequence[Any], cells: Cells) -> list[str]:
    """The edges of a node in words, with the names that operations have in the drawing."""
    return [
        f"{primitive_label(primitive)} from {cells.state_name(source)}"
        for primitive, source in edges
    ]


def _labels(runs: Sequence[RunData]) -> list[str]:
    """The folders' names, with as much of their paths as tells them apart."""
    # The shortest ends of the paths that all differ; numbers for one folder given twice.
    paths = [run.path.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-length:]) for parts in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index}. {run.name}" for index, run in enumerate(runs, start=1)]


def _differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """The settings in which the recipes differ: key, and the value of each run."""
    flat = [_flat(run.recipe.model_dump(mode="json", by_alias=True)) for run in runs]
    found = []
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = [setting_text(settings[key]) for settings in flat]
        if len(set(values)) > 1:
            found.append((key, values))
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "hypergradient":  # an engine is one setting
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
