"""The table of status: a row for every table and figure of the paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from results_data import (
    BASELINE,
    BOTH,
    DATASETS,
    GENERATORS,
    METHOD,
    NO_WEIGHT,
    SYNTHETIC,
    Effect,
    PaperRow,
    Results,
)  # fmt: skip
from results_effects import Pair, is_plain, points
from results_markdown import NOT_RUN, table
from results_power import errors_of

from lfmcw_app.arms import contrasts
from lfmcw_app.comparison import TOO_FEW, TOO_FEW_DIFFER

SEARCHES = {
    ("darts", "first"): "DARTS-1st", ("darts", "second"): "DARTS-2nd", ("pdarts", None): "P-DARTS",
    ("pcdarts", None): "PC-DARTS",
}  # fmt: skip

DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}

STATUS_PAIRS: dict[str, list[Pair]] = {
    "Table 2": [(METHOD, BASELINE)],
    "Table 3": [(METHOD, BASELINE)],
    "Table 4": [(BOTH, SYNTHETIC)],
    "Table 5": contrasts("table5"),
    "Figure 3": [("λ = 1", "λ = 0"), ("λ = 1", "λ = 0.5"), ("λ = 3", "λ = 0")],
}

ALSO_IN_CONTROLS: dict[Pair, Pair] = {("λ = 1", "λ = 0"): (METHOD, NO_WEIGHT)}
"""A comparison of Figure 3 → the arms of `controls` that are the same two searches."""

VARIED = {
    "Table 4": ": W2 on generated images only → on real ones too",
    "Table 5": ": DCGAN → WGAN-GP → BigGAN",
    "Figure 3": ": λ",
}
"""Item → what its figures compare; elsewhere search without and with LFM-CW."""

FIGURE_3 = "only drawn: least error at λ = 1"

FURTHER_ITEMS = (
    ("Figure 4", "cells found on CIFAR-100", "drawings", "every run draws its cells"),
    ("Figures 5 and 6", "images of BigGAN", "pictures", "every run draws its images"),
    (
        "Tables 6 and 7", "settings", "lists",
        "the recipes `paper` have them: `tests/unit/lfmcw_app/test_recipe.py`",
    ),
    ("Table 1, Figures 1 and 2", "notation, illustrations", "", "nothing to run"),
)  # fmt: skip


def status(results: Results) -> str:
    """A row for every table and figure of the paper."""
    rows = [
        _status_row(results, list(group))
        for _, group in groupby(
            results.paper, key=lambda row: (row.item, row.data, row.space, row.order)
        )
    ]
    for data, space, order in (("cifar10", "darts", "first"), ("cifar100", "pdarts", None)):
        drawn = PaperRow(
            item="Figure 3", data=data, space=space, order=order, searched_on=data, arm="",
            error=math.nan, printed="",
        )  # fmt: skip
        rows.append(_status_row(results, [drawn]))
    for item, what, figure, verdict in FURTHER_ITEMS:
        rows.append((f"{item}, {what}", figure, "", "", "", "", verdict))
    head = (
        "in the paper", "its figure, test error in %", "run here?", "at what size", "seeds",
        "our figure, points (95% interval)", "verdict",
    )  # fmt: skip
    return table(head, rows)


def _status_row(results: Results, group: list[PaperRow]) -> tuple[object, ...]:
    first = group[0]
    what = f"{SEARCHES[first.space, first.order]}, {DATA[first.data]}"
    if first.searched_on != first.data:
        what += f", searched on {DATA[first.searched_on]}"
    what += VARIED.get(first.item, "")
    figures = " → ".join(row.printed for row in group) if first.arm else FIGURE_3
    if (errors := errors_of(group, *STATUS_PAIRS[first.item][0])) is not None and len(group) == 2:
        figures += f" ({100 * (errors[0] / errors[1] - 1):+.0f}%)"
    effects = []
    for pair in STATUS_PAIRS[first.item]:
        found = results.effects(*pair)
        if pair in ALSO_IN_CONTROLS:
            others = results.effects(*ALSO_IN_CONTROLS[pair])
            found += [replace(effect, arm=pair[0], against=pair[1]) for effect in others]
        effects += _nearest(found, first)
    where = f"{first.item}, {what}"
    if not effects:
        return (where, figures, NOT_RUN, "", "", "", "open")
    at_size = all(_at_the_papers_size(effect, first) for effect in effects)
    return (
        where,
        figures,
        "yes" if at_size else "small",
        _stacked(_size(effect) for effect in effects),
        _stacked(effect.found.seeds_text for effect in effects),
        "<br>".join(_named(effect, len(group) > 2 or not first.arm) for effect in effects),
        _stacked(status_verdict(e, group) for e in effects),
    )


def _size(effect: Effect) -> str:
    """Data, preset and generator; the row says the rest."""
    design = effect.design
    parts = [DATASETS.get(design.dataset, design.dataset), design.preset]
    if design.generator and design.table != "table5":
        parts.append(GENERATORS.get(design.generator, design.generator))
    return ", ".join(parts)


def _stacked(texts: Iterable[str]) -> str:
    """Texts one under the other; once where all are the same."""
    listed = list(texts)
    return listed[0] if len(set(listed)) == 1 else "<br>".join(listed)


def _named(effect: Effect, with_arms: bool) -> str:
    return f"{effect.arm} − {effect.against}: {points(effect)}" if with_arms else points(effect)


def _at_the_papers_size(effect: Effect, row: PaperRow) -> bool:
    return effect.design.preset == "paper" and effect.design.dataset == row.data


def _nearest(effects: Sequence[Effect], row: PaperRow) -> list[Effect]:
    """The comparisons that are nearest to a row of the paper: same search, then same data.

    None where the paper searched on other data: no table trains on one data set what was found on
    another.
    """
    if row.searched_on != row.data:
        return []
    same = [
        effect
        for effect in effects
        if is_plain(effect) and not effect.design.looked_up
        and effect.design.space == row.space
        and row.order in (None, effect.design.order)
    ]  # fmt: skip
    levels = (
        [e for e in same if _at_the_papers_size(e, row)],
        [e for e in same if e.design.dataset.partition("-")[0] == row.data],
        # Of the data sets with ten classes, another one stands in.
        [e for e in same if row.data == "cifar10" and e.design.dataset not in DATA],
    )
    return next((level for level in levels if level), [])


def status_verdict(effect: Effect, group: Sequence[PaperRow]) -> str:
    """The verdict, and whether the paper's change is in the interval.

    An error that is many times the paper's could change by as many points as the paper's does, or
    by the same share: nobody knows which. So both are compared.
    """
    claimed = errors_of(group, effect.arm, effect.against)
    if claimed is None or effect.verdict in (TOO_FEW, TOO_FEW_DIFFER):
        return effect.verdict
    points_there = claimed[0] - claimed[1]
    share = points_there / claimed[1]
    here = share * effect.error_against
    low, high = effect.ends
    where = {True: "inside", False: "outside"}
    said = (
        f"{effect.verdict}; the paper's {points_there:+.2f} points are "
        f"{where[low <= points_there <= high]} the interval"
    )
    shared = f"its {100 * share:+.0f}% (here {here:+.2f} points)"
    reachable = effect.reachable_gain
    if reachable is not None and -here > reachable:
        return f"{said}; no network here was good enough for {shared}"
    return f"{said}, and {shared} {where[low <= here <= high]} it"
