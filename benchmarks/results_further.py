"""Comparisons of looked-up searches that were asked for after the results were seen.

They are exploratory: no table plans them, so each block corrects for its own rows only.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from results_data import (
    BASELINE,
    METHOD,
    NO_WEIGHT,
    SYNTHETIC_ONLY,
    UNIFORM,
    Experiment,
    Results,
    by_images,
)  # fmt: skip
from results_markdown import NOTHING, table

from lfmcw_app.comparison import Comparison, Summary, by_rank, compare, summaries
from lfmcw_app.paired_tests import holm

POOLED = ((METHOD, BASELINE), (UNIFORM, BASELINE), (METHOD, NO_WEIGHT), (METHOD, UNIFORM))

ALONE = "(95% interval, of this row alone)"


def equal_searches(results: Results) -> str:
    """λ = 0 beside plain search: one search with other random numbers, so their noise."""
    experiments = {experiment.design: experiment for _, experiment in results.looked_up()}
    effects = [e for e in results.effects(NO_WEIGHT, BASELINE) if e.design in experiments]
    titles = results.titles(effect.design for effect in effects)
    rows = [
        (
            titles[effect.design], effect.found.seeds_text, effect.found.describe(),
            f"{effect.found.deviation:.2f}",
            _correlation(experiments[effect.design], NO_WEIGHT, BASELINE),
        )
        for effect in effects
    ]  # fmt: skip
    head = (
        "experiment", "seeds", "λ = 0 minus no LFM-CW, points (95% interval)", "SD",
        "correlation of the two over the seeds",
    )  # fmt: skip
    return table(head, rows) if rows else NOTHING


def _correlation(experiment: Experiment, arm: str, other: str) -> str:
    """Pearson's correlation of two arms' errors over the seeds; empty where one does not vary."""
    both = _paired_errors(experiment, arm, other)
    if len(both) < 2 or any(len(set(errors)) == 1 for errors in zip(*both, strict=True)):
        return ""
    return f"{statistics.correlation(*zip(*both, strict=True)):+.2f}"


def _paired_errors(experiment: Experiment, arm: str, other: str) -> list[tuple[float, float]]:
    by_label = {summary.label: summary.errors for summary in summaries(experiment.rows)}
    first, second = by_label.get(arm, {}), by_label.get(other, {})
    return [(first[seed], second[seed]) for seed in sorted(set(first) & set(second))]


def images_of_w2(results: Results) -> str:
    """LFM-CW beside itself on generated images alone, which is the question of Table 4."""
    found = [
        (title, pair)
        for title, experiment in results.looked_up()
        if (pair := _compared([experiment], METHOD, SYNTHETIC_ONLY)).pairs > 1
    ]
    return _table([(title,) for title, _ in found], [pair for _, pair in found], ("experiment",))


def pooled(results: Results) -> str:
    """The mean over all experiments with the same images, seed by seed, by points and by rank."""
    labels, found = [], []
    for measure in ("points", "rank"):
        for images, experiments in by_images(results):
            for arm, against in POOLED:
                pair = _compared(experiments, arm, against, ranked=measure == "rank")
                if len(experiments) > 1 and pair.pairs > 1:
                    title = f"all {len(experiments)}, {images}"
                    labels.append((title, f"{arm} minus {against}", measure))
                    found.append(pair)
    return _table(labels, found, ("experiments", "difference", "by"))


def _compared(
    experiments: Sequence[Experiment], arm: str, against: str, *, ranked: bool = False
) -> Comparison:
    """Two arms by their means over some experiments, at the seeds that all of these have."""
    measured = [summaries(experiment.rows) for experiment in experiments]
    if ranked:
        measured = [by_rank(of) for of in measured]
    known = [{summary.label: summary.errors for summary in of} for of in measured]
    means = []
    for label in (arm, against):
        errors = [of.get(label, {}) for of in known]
        seeds = set.intersection(*map(set, errors))
        by_seed = {seed: statistics.fmean(of[seed] for of in errors) for seed in seeds}
        means.append(Summary(label=label, errors=by_seed))
    return compare(*means)


def _table(
    labels: Sequence[tuple[str, ...]], found: Sequence[Comparison], head: tuple[str, ...]
) -> str:
    """A row for each comparison, with p corrected over these rows."""
    if not found:
        return NOTHING
    adjusted = holm([pair.p_value for pair in found])
    rows = [
        (
            *label, pair.seeds_text, pair.describe(1 if "rank" in label else 2),
            f"{pair.p_value:.2g}", f"{p:.2g}",
        )
        for label, pair, p in zip(labels, found, adjusted, strict=True)
    ]  # fmt: skip
    measured = "difference" if "by" in head else "points"
    return table((*head, "seeds", f"{measured} {ALONE}", "p", f"p (Holm, of {len(rows)})"), rows)
