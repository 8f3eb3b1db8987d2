"""Where looked-up searches end: dead cells, the others, and what random cells would give.

The network of a dead cell guesses. In the space with three nodes these are the cells without a path
from input to output. These tables were asked for after the results were seen: no planned tests.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from results_data import (
    BASELINE,
    DEAD,
    METHOD,
    NO_WEIGHT,
    RANDOM,
    SYNTHETIC_ONLY,
    UNIFORM,
    Experiment,
    Results,
    by_images,
    is_dead,
)  # fmt: skip
from results_markdown import NOTHING, folded, table
from scipy.stats import binomtest

from lfmcw_app.arms import contrasts
from lfmcw_app.cell_table import CellTable
from lfmcw_app.comparison import Finding
from lfmcw_app.paired_tests import holm
from lfmcw_app.results_file import Row

DRAWS, SEED = 100_000, 0
"""Draws of as many random cells as an arm has searches, and their generator's seed."""

ENDING_DEAD = (METHOD, UNIFORM, SYNTHETIC_ONLY, NO_WEIGHT)
"""The arms whose dead cells are compared with those of plain search."""

LIVING = ((METHOD, BASELINE), (UNIFORM, BASELINE), (METHOD, UNIFORM))


def dead_cells(results: Results) -> str:
    """How many searches of each arm end at dead cells, in each experiment and in total."""
    found = results.looked_up()
    if not found:
        return NOTHING
    arms = list(dict.fromkeys(arm for _, experiment in found for arm in experiment.arms))
    rows: list[tuple[str, ...]] = [
        (title, *(_dead_of([experiment], arm) for arm in arms)) for title, experiment in found
    ]
    for images, same in by_images(results):
        if len(same) > 1:
            rows.append((f"all {len(same)}, {images}", *(_dead_of(same, arm) for arm in arms)))
    if results.cells is not None:
        dead = sum(cell.mean >= DEAD for cell in results.cells.cells.values())
        count = len(results.cells.cells)
        said = f"Of the {count} cells {dead} are dead, so a random cell is dead with a probability"
        return f"{table(('experiment', *arms), rows)}\n\n{said} of {100 * dead / count:.1f}%."
    return table(("experiment", *arms), rows)


def dead_said(results: Results) -> list[str]:
    """How many searches of LFM-CW and of plain search end at dead cells, in a sentence."""
    parts = [
        f"{_dead_of(same, METHOD)} of LFM-CW with {images}, {_dead_of(same, BASELINE)} of plain "
        "search beside it"
        for images, same in by_images(results)
    ]
    return [f"Searches that end at dead cells: {'; '.join(parts)}."] if parts else []


def _dead_of(experiments: Sequence[Experiment], *arms: str) -> str:
    runs = [row for experiment in experiments for arm in arms for row in experiment.runs(arm)]
    return f"{sum(map(is_dead, runs))} of {len(runs)}" if runs else ""


def dead_tests(results: Results) -> str:
    """McNemar's exact test of arms against plain search, over all kinds of data.

    A seed occurs in each experiment, so the unit is a seed, not a search.
    """
    rows = []
    for images, same in by_images(results):
        for arm in ENDING_DEAD:
            ours, plain = (_seeds_with_dead(same, [label]) for label in (arm, BASELINE))
            seeds = {row.seed for experiment in same for row in experiment.runs(arm)}
            if not seeds:
                continue
            first, second = len(ours - plain), len(plain - ours)
            rows.append((images, arm, len(seeds), first, second, mcnemar_p(first, second)))
    adjusted = holm([float(row[-1]) for row in rows])
    lines = [
        (*row[:-1], f"{row[-1]:.2g}", f"{p:.2g}") for row, p in zip(rows, adjusted, strict=True)
    ]
    head = (
        "images of W2", "arm", "seeds", "with a dead cell of the arm only",
        "with a dead cell of plain search only", "p", f"p (Holm, of {len(rows)})",
    )  # fmt: skip
    return "\n\n".join([table(head, lines), *_dead_together(results)])


USING_IMAGES, NOT_USING = (METHOD, UNIFORM), (BASELINE, NO_WEIGHT)
"""As many arms that use further images as arms that do not."""


def _dead_together(results: Results) -> list[str]:
    """All arms that use further images beside those that do not, in sentences."""
    said = []
    for images, same in by_images(results):
        using, others = (*USING_IMAGES, SYNTHETIC_ONLY), NOT_USING
        counts = [_dead_of(same, *arms) for arms in (using, others)]
        sides = [_seeds_with_dead(same, arms) for arms in (USING_IMAGES, NOT_USING)]
        only = [len(sides[0] - sides[1]), len(sides[1] - sides[0])]
        said.append(
            f"With {images}, {counts[0]} searches of the arms that use them ({', '.join(using)}) "
            f"end at dead cells, and {counts[1]} of the others ({', '.join(others)}). By seed, "
            f"{' or '.join(USING_IMAGES)} does so with {only[0]} seeds with which neither "
            f"{' nor '.join(NOT_USING)} does, and the reverse holds for {only[1]} "
            f"(p = {mcnemar_p(*only):.2g})."
        )
    return said


def _seeds_with_dead(experiments: Sequence[Experiment], arms: Sequence[str]) -> set[int]:
    runs = (row for experiment in experiments for arm in arms for row in experiment.runs(arm))
    return {row.seed for row in runs if is_dead(row)}


def mcnemar_p(first: int, second: int) -> float:
    """The exact two-sided p-value that a differing pair is as likely of one kind as the other."""
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def living(results: Results) -> str:
    """The differences over the seeds with which neither arm ends at a dead cell."""
    rows = []
    for title, experiment in results.looked_up():
        for found in experiment.findings_of_living:
            if (found.arm, found.against) in LIVING:
                of = found.comparison
                name = f"{found.arm} minus {found.against}"
                rows.append(
                    (title, name, of.pairs, of.describe(), f"{found.p_value:.2g}", found.verdict)
                )
    head = (
        "experiment", "difference", "seeds with two living cells", "points (95% interval)",
        "p (Holm)", "verdict",
    )  # fmt: skip
    return table(head, rows)


# ------------------------------ beside random cells


def beside_random(results: Results) -> str:
    """Each arm's mean regret beside that of random cells, which the table of all cells gives."""
    if results.cells is None or not results.looked_up():
        return NOTHING
    regrets, living = _regrets(results.cells)
    found = [
        (f"all {len(same)}, {images}", arm, [row for e in same for row in e.runs(arm)])
        for images, same in by_images(results)
        for arm in same[0].arms
        if len(same) > 1
    ]
    said = (
        f"The mean regret of a random cell is {regrets.mean():.2f} points, and of a random living "
        f"one {living.mean():.2f}."
    )
    return f"{said}\n\n{_beside_random(regrets, living, found)}" if found else said


def beside_random_by_experiment(results: Results) -> str:
    """The same for each experiment by itself."""
    if results.cells is None or not results.looked_up():
        return NOTHING
    found = [
        (title, arm, experiment.runs(arm))
        for title, experiment in results.looked_up()
        for arm in experiment.arms
    ]
    return folded("Each experiment by itself", _beside_random(*_regrets(results.cells), found))


def _regrets(cells: CellTable) -> tuple[np.ndarray, np.ndarray]:
    """The regrets of all cells, and of the living ones, percentage points."""
    means = np.array([cell.mean for cell in cells.cells.values()])
    regrets = means - means.min()
    return regrets, regrets[means < DEAD]


def _beside_random(
    regrets: np.ndarray, living: np.ndarray, found: Sequence[tuple[str, str, list[Row]]]
) -> str:
    """A row for each arm with other runs; those of two experiments come once."""
    different = {frozenset(row.run for row in runs): (title, arm, runs)
                 for title, arm, runs in reversed(found) if arm != RANDOM}  # fmt: skip
    listed = [entry for entry in found if entry in different.values()]
    values = [[row.regret_percent or 0.0 for row in runs] for *_, runs in listed]
    tails = [random_p(regrets, of) for of in values]
    among_living = holm([random_p(living, of)[1] for of in values])
    lines = [
        (
            title, arm, len(of), f"{statistics.fmean(of):.2f}", _share(lower), _share(p),
            _share(holm_p), _share(living_p),
        )
        for (title, arm, _), of, (lower, p), holm_p, living_p in zip(
            listed, values, tails, holm([p for _, p in tails]), among_living, strict=True
        )
    ]  # fmt: skip
    head = (
        "experiment", "arm", "searches", "mean regret, points",
        "draws of as many random cells with a mean up to that, share", "p",
        f"p (Holm, of {len(lines)})", f"p beside living cells (Holm, of {len(lines)})",
    )  # fmt: skip
    return table(head, lines)


def _share(value: float) -> str:
    return f"below {1e-4:g}" if value < 1e-4 else f"{value:.2g}"


def random_p(regrets: np.ndarray, found: Sequence[float]) -> tuple[float, float]:
    """How often as many random cells have a mean regret up to that of an arm.

    Args:
        regrets: of all cells, each as likely as the others.
        found: regrets of the arm's cells.

    Returns:
        That share of `DRAWS` draws, and the two-sided p-value: twice the smaller tail.
    """
    numbers = np.random.default_rng(SEED)
    means = numbers.choice(regrets, (DRAWS, len(found))).mean(axis=1)
    mean = statistics.fmean(found)
    tolerance = 1e-9 * max(1.0, abs(mean))
    below = (int((means <= mean + tolerance).sum()) + 1) / (DRAWS + 1)
    above = (int((means >= mean - tolerance).sum()) + 1) / (DRAWS + 1)
    return below, min(1.0, 2 * min(below, above))


# ------------------------------ what is significant


def significant(results: Results) -> str:
    """Every planned comparison that its family of tests calls better or worse."""
    rows = []
    planned = {"points": 0, "rank": 0}
    different: set[tuple[str, frozenset[str]]] = set()
    of_weights: list[Finding] = []
    for title, experiment in results.titled(results.families):
        families = {"points": experiment.findings, "rank": experiment.findings_by_rank}
        for measure, found in families.items():
            planned[measure] += len(contrasts(experiment.design.table)) if found else 0
            different |= {(measure, _runs_of(experiment, of)) for of in found}
            of_weights += [of for of in found if {of.arm, of.against} == {METHOD, UNIFORM}]
            rows += [
                (
                    title, f"{of.arm} minus {of.against}", measure,
                    of.comparison.describe(2 if measure == "points" else 1), f"{of.p_value:.2g}",
                    of.verdict,
                )
                for of in found if _is_significant(of)
            ]  # fmt: skip
    total = sum(planned.values())
    if not total:
        return NOTHING
    said = (
        f"Of {total} planned comparisons ({planned['points']} by points, {planned['rank']} by "
        f"rank; {len(different)} have different runs), {len(rows)} "
        f"{'is' if len(rows) == 1 else 'are'} statistically significant after Holm's correction "
        f"within a family. {len(of_weights)} of the {total} compare LFM-CW with itself with "
        f"uniform class weights; {sum(map(_is_significant, of_weights))} of these are significant."
    )
    head = ("experiment", "difference", "by", "difference (95% interval)", "p (Holm)", "verdict")
    return f"{said}\n\n{table(head, rows)}" if rows else said


def _is_significant(found: Finding) -> bool:
    return found.verdict in ("better", "worse")


def _runs_of(experiment: Experiment, found: Finding) -> frozenset[str]:
    """The names of the runs that a comparison has."""
    return frozenset(
        row.run for label in (found.arm, found.against) for row in experiment.runs(label)
    )
