"""The figures of the pages of results: a forest plot of differences, and where searches end.

The SVGs are the same bytes each time that they are drawn with one matplotlib. Each names a digest
of what it shows, by which a test finds a figure that is older than the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_benchmarks import compared, draw_ratios, ratios_digest
from results_cells import ordered
from results_data import (
    BASELINE,
    BOTH,
    METHOD,
    NO_WEIGHT,
    RANDOM,
    SYNTHETIC,
    UNIFORM,
    Effect,
    Results,
)  # fmt: skip
from results_markdown import digest, save_figure

from lfmcw_app.drawing import as_label

GROUPS = (
    ("LFM-CW minus plain search", METHOD, BASELINE),
    ("LFM-CW minus LFM-CW with uniform class weights", METHOD, UNIFORM),
    ("LFM-CW with uniform class weights minus plain search", UNIFORM, BASELINE),
    ("LFM-CW minus LFM-CW with λ = 0", METHOD, NO_WEIGHT),
    ("images generated and real, minus generated only", BOTH, SYNTHETIC),
)
"""Heading → the arm, and what it is compared with."""

COLOURS = {"better": "#1a7f37", "worse": "#c0392b"}
"""Verdict → colour of the interval; others are grey."""

WIDEST = 15.0
"""Percentage points on either side of the forest plot; longer intervals end in an arrow."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the forest plot: a heading, or a comparison."""

    text: str
    effect: Effect | None = None


def forest_lines(results: Results) -> list[Line]:
    """The lines of the forest plot, from the top; groups without a comparison are left out."""
    lines = []
    for heading, arm, against in GROUPS:
        effects = results.kept_effects(arm, against)
        titles = results.titles(effect.design for effect in effects)
        if effects:
            lines.append(Line(text=heading))
        lines += [Line(text=titles[effect.design], effect=effect) for effect in effects]
    return lines


def forest_digest(results: Results) -> str:
    """Names what the forest plot shows."""
    lines = [(line.text, *_numbers(line.effect)) for line in forest_lines(results)]
    return digest([results.in_common, *lines])


def _numbers(effect: Effect | None) -> list[object]:
    if effect is None:
        return []
    found = effect.found
    figures = (found.difference, *effect.ends, found.detectable)
    return [*(f"{figure:.3f}" for figure in figures), found.pairs, effect.verdict]


def draw_forest(results: Results, path: Path) -> None:
    """Draws the differences with their 95% intervals; shaded is what could not be seen."""
    lines = forest_lines(results)
    figure = Figure(figsize=(11, 1.3 + 0.27 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(reversed(lines)):
        if line.effect is None:
            axes.text(-0.01, place, line.text, **_beside(axes), ha="right", weight="bold")
            continue
        axes.text(-0.01, place, as_label(line.text, longest=120), **_beside(axes), ha="right")
        _draw_effect(axes, place, line.effect)
    axes.axvline(0, color="black", linewidth=0.8)
    limit = min(WIDEST, max([0.5, *(1.1 * _reach(line.effect) for line in lines)]))
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-0.7, len(lines) + 0.5)
    head = "points (95% interval) · seeds · seen in 80%"
    axes.text(1.01, len(lines), head, **_beside(axes), ha="left", style="italic")
    if results.in_common:
        said = f"Unless named: {results.in_common}"
        axes.text(-0.01, len(lines), said, **_beside(axes), ha="right", style="italic")
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_xlabel("difference of the test errors, percentage points: left of 0 is better")
    save_figure(figure, path, forest_digest(results))


def _beside(axes: Axes) -> dict[str, object]:
    return {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8}


def _reach(effect: Effect | None) -> float:
    if effect is None or math.isnan(effect.found.interval):
        return 0.0
    return max(map(abs, effect.ends))


def _draw_effect(axes: Axes, place: int, effect: Effect) -> None:
    found, colour = effect.found, COLOURS.get(effect.verdict, "#555555")
    if not math.isinf(found.detectable):
        seen = found.detectable
        axes.fill_betweenx([place - 0.32, place + 0.32], -seen, seen, color="#e8e8e8", lw=0)
    shown = max(-WIDEST, min(WIDEST, found.difference))
    if not math.isnan(found.interval):
        low, high = effect.ends
        axes.plot([max(low, -WIDEST), min(high, WIDEST)], [place, place], color=colour, lw=1.3)
        for end, mark in ((low, "<"), (high, ">")):
            if abs(end) > WIDEST:
                at = math.copysign(WIDEST * 0.99, end)
                axes.plot([at], [place], marker=mark, color=colour, markersize=4)
    axes.plot([shown], [place], marker="s", color=colour, markersize=4.5)
    seen_text = "none" if math.isinf(found.detectable) else f"{found.detectable:.2f}"
    text = f"{found.describe()} · {found.pairs} · {seen_text}"
    axes.text(1.01, place, text, **_beside(axes), ha="left")


# ------------------------------ where searches end


ARM_COLOURS = {METHOD: "#d95f02", BASELINE: "#1f77b4", RANDOM: "#777777"}


def searched_arms(results: Results) -> list[tuple[str, dict[str, list[int]]]]:
    """(title, arm → ranks of its cells) of each experiment with look-ups; random cells once."""
    rows: list[tuple[str, dict[str, list[int]]]] = []
    drawn: list[int] = []
    for title, experiment in results.looked_up():
        ranks = {
            arm: sorted(row.rank for row in experiment.runs(arm) if row.rank is not None)
            for arm in ARM_COLOURS
        }
        drawn = drawn or ranks[RANDOM]
        rows.append((title, {arm: ranks[arm] for arm in (METHOD, BASELINE)}))
    return [*rows, (RANDOM, {RANDOM: drawn})] if drawn else rows


def cells_digest(results: Results) -> str:
    """Names what the figure of the cells shows."""
    cells = [] if results.cells is None else ordered(results.cells)
    means = [f"{cell.mean:.3f}" for _, cell in cells]
    return digest([*means, *searched_arms(results)])


def draw_cells(results: Results, path: Path) -> None:
    """Draws the errors of all cells by rank, and below them the ranks where searches end."""
    if results.cells is None:
        raise ValueError("there is no table of cells to be drawn")
    cells, arms = [cell for _, cell in ordered(results.cells)], searched_arms(results)
    figure = Figure(figsize=(11, 3.0 + 0.32 * len(arms)), layout="constrained")
    heights = (2.6, 0.32 * len(arms)) if arms else (1.0,)
    above, *others = figure.subplots(
        len(heights), squeeze=False, sharex=True, height_ratios=heights
    )[:, 0]
    ranks = range(1, len(cells) + 1)
    above.plot(ranks, [cell.mean for cell in cells], color="black", lw=1.2)
    lows, highs = ([end(cell.errors.values()) for cell in cells] for end in (min, max))
    above.vlines(ranks, lows, highs, color="#999999", lw=0.8)
    above.set_ylabel("test error, %\n(line: mean; bars: seeds)", fontsize=8)
    _leave_out_the_useless(above, [cell.mean for cell in cells])
    for below in others:
        _draw_ends(below, arms)
        for arm in (METHOD, BASELINE):
            above.plot([], [], "o", color=ARM_COLOURS[arm], markersize=4.5, label=arm)
        above.legend(fontsize=8, loc="upper left", frameon=False, title="where searches end")
    for axes in (above, *others):
        axes.tick_params(labelsize=8)
        axes.spines[["right", "top"]].set_visible(False)
    axes.set_xlabel("rank of the cell, 1: least error", fontsize=8)
    save_figure(figure, path, cells_digest(results))


def _leave_out_the_useless(axes: Axes, errors: Sequence[float]) -> None:
    """Cells without a path, at chance, would press the others into a line."""
    shown = errors[round(0.9 * (len(errors) - 1))]
    highest = shown + 0.5 * (shown - errors[0])
    beyond = sum(error > highest for error in errors)
    if beyond:
        axes.set_ylim(errors[0] - 0.1 * (highest - errors[0]), highest)
        text = f"{beyond} cells above, up to {errors[-1]:.0f}%"
        axes.text(len(errors), highest, text, ha="right", va="top", fontsize=8)


def _draw_ends(axes: Axes, arms: Sequence[tuple[str, dict[str, list[int]]]]) -> None:
    """Draws a row for each experiment: a dot for each search, LFM-CW above the search without."""
    offsets = {METHOD: -0.16, BASELINE: 0.16, RANDOM: 0.0}
    for place, (_, found) in enumerate(arms):
        for arm, ends in found.items():
            heights = [place + offsets[arm]] * len(ends)
            axes.plot(ends, heights, "o", color=ARM_COLOURS[arm], alpha=0.4, markersize=4.5)
    axes.set_yticks(range(len(arms)), [as_label(title, longest=110) for title, _ in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)


FIGURES: dict[str, tuple[Callable[[Results], str], Callable[[Results, Path], None]]] = {
    "results.svg": (forest_digest, draw_forest),
    "results_cells.svg": (cells_digest, draw_cells),
    "benchmarks.svg": (ratios_digest, draw_ratios),
}
"""File in docs/ → the digest of what it shows, and what draws it."""


def wanted(results: Results) -> Sequence[str]:
    """The figures for which there are data."""
    known = {"results_cells.svg": results.cells, "benchmarks.svg": compared(results) or None}
    return [name for name in FIGURES if known.get(name, FIGURES) is not None]
