"""Describes a table of all cells of a small space, and how far its noise lets it be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import norm, spearmanr

from lfmcw_app.cell_table import CellTable, TrainedCell

NEAR_THE_BEST = 0.25
"""Share of the best networks whose noise counts; the noise of a useless network is zero."""


def ordered(table: CellTable) -> list[tuple[str, TrainedCell]]:
    """The cells with their notations, the best first."""
    return sorted(table.cells.items(), key=lambda item: (item[1].mean, item[0]))


def networks(table: CellTable) -> list[tuple[str, TrainedCell, int]]:
    """The different networks, the best first: one of its cells, and how many cells it has.

    Cells of the same network share its trainings, and so its noise. They differ in the order of
    their nodes, or in operations whose output is not used, and with these in parameters. One
    training that is alike may be chance: then parameters have to be alike too.
    """
    found: dict[object, list[tuple[str, TrainedCell]]] = {}
    for notation, cell in ordered(table):
        repeated = len(cell.errors) > 1
        key = (tuple(sorted(cell.errors.items())), None if repeated else cell.parameters)
        found.setdefault(key, []).append((notation, cell))
    return [(*same[0], len(same)) for same in found.values()]


def noise_between_seeds(table: CellTable) -> float:
    """SD of one training's error around its mean, percentage points, of the better networks.

    NaN where none has two trainings.
    """
    known = networks(table)
    better = known[: max(1, round(NEAR_THE_BEST * len(known)))]
    variances = [
        statistics.variance(cell.errors.values()) for _, cell, _ in better if len(cell.errors) > 1
    ]
    return math.sqrt(statistics.fmean(variances)) if variances else math.nan


def rank_correlation(table: CellTable) -> float:
    """Spearman's correlation of the errors of the first two seeds; NaN where there is one."""
    seeds = sorted({seed for cell in table.cells.values() for seed in cell.errors})[:2]
    both = [cell.errors for _, cell, _ in networks(table) if set(seeds) <= set(cell.errors)]
    if len(seeds) < 2 or len(both) < 3:
        return math.nan
    first, second = ([errors[seed] for errors in both] for seed in seeds)
    return float(spearmanr(first, second).statistic)


def regret_of_the_chosen(means: Sequence[float], noise: float) -> float:
    """The expected regret of the network that looks best, where each mean has an error.

    The means are taken for the true errors; each is seen with normal noise, and the least is
    chosen. Network i is chosen with probability ∫ φᵢ(x) Πⱼ≠ᵢ (1 − Φⱼ(x)) dx.

    Args:
        means: error of each network, %.
        noise: SD of what is seen, percentage points.
    """
    errors = np.asarray(means, dtype=np.float64)
    if noise == 0:
        return 0.0
    grid = np.linspace(errors.min() - 6 * noise, errors.min() + 6 * noise, 4001)
    place = (grid[None, :] - errors[:, None]) / noise
    log_above = norm.logsf(place)
    density = np.exp(norm.logpdf(place) + log_above.sum(0) - log_above) / noise
    chosen = density.sum(1) * (grid[1] - grid[0])
    return float((chosen * (errors - errors.min())).sum() / chosen.sum())


def cell_lines(table: CellTable) -> Iterator[tuple[object, ...]]:
    """Rows (what, cell, cells, test error, errors by seed, parameters) of the page's table."""
    known = networks(table)
    places = {"best": 0, "second": 1, "third": 2, "median": len(known) // 2, "worst": -1}
    for name, place in places.items():
        if place < len(known):
            notation, cell, count = known[place]
            shown = notation.replace("|", "\\|")
            by_seed = ", ".join(f"{cell.errors[seed]:.2f}" for seed in sorted(cell.errors))
            yield name, f"`{shown}`", count, f"{cell.mean:.2f}", by_seed, f"{cell.parameters:,}"
    means = [cell.mean for cell in table.cells.values()]
    yield "different networks", "", len(known), "", "", ""
    yield "median of the cells", "", len(means), f"{statistics.median(means):.2f}", "", ""
    yield "mean of all cells", "", len(means), f"{statistics.fmean(means):.2f}", "", ""
    regret = statistics.fmean(means) - min(means)
    yield "a random cell's regret", "", len(means), f"{regret:.2f}", "", ""
    noise = noise_between_seeds(table)
    if math.isnan(noise):
        return
    trainings = statistics.fmean(len(cell.errors) for _, cell, _ in known)
    chosen = regret_of_the_chosen([c.mean for _, c, _ in known], noise / math.sqrt(trainings))
    yield "SD between seeds, better quarter", "", "", f"{noise:.2f}", "", ""
    of_two = noise * math.sqrt(2 / trainings)
    yield "SD of the difference of two cells that are equally good", "", "", f"{of_two:.2f}", "", ""
    yield "rank correlation of two seeds", "", "", f"{rank_correlation(table):.3f}", "", ""
    yield "regret of the network that looks best", "", "", f"{chosen:.2f}", "", ""
