"""What a table of all cells of a small space says, and how far its noise lets it be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import norm, spearmanr

from lfmcw_app.cell_table import CellTable, TrainedCell

NEAR_THE_BEST = 0.25
"""Share of the cells, the best ones, whose noise counts: the noise of a useless cell is zero."""


def ordered(table: CellTable) -> list[tuple[str, TrainedCell]]:
    """The cells with their notations, the best first."""
    return sorted(table.cells.items(), key=lambda item: (item[1].mean, item[0]))


def noise_between_seeds(table: CellTable) -> float:
    """SD of one training's error around its cell's mean, percentage points, of the better cells.

    NaN where no cell has two trainings.
    """
    better = ordered(table)[: max(1, round(NEAR_THE_BEST * len(table.cells)))]
    variances = [
        statistics.variance(cell.errors.values()) for _, cell in better if len(cell.errors) > 1
    ]
    return math.sqrt(statistics.fmean(variances)) if variances else math.nan


def rank_correlation(table: CellTable) -> float:
    """Spearman's correlation of the errors of the first two seeds; NaN where there is one."""
    seeds = sorted({seed for cell in table.cells.values() for seed in cell.errors})[:2]
    both = [cell.errors for cell in table.cells.values() if set(seeds) <= set(cell.errors)]
    if len(seeds) < 2 or len(both) < 3:
        return math.nan
    first, second = ([errors[seed] for errors in both] for seed in seeds)
    return float(spearmanr(first, second).statistic)


def regret_of_the_chosen(means: Sequence[float], noise: float) -> float:
    """The expected regret of the cell that looks best, where each mean has an error.

    The means are taken for the true errors; each is seen with normal noise, and the least is
    chosen. Cell i is chosen with probability ∫ φᵢ(x) Πⱼ≠ᵢ (1 − Φⱼ(x)) dx.

    Args:
        means: error of each cell, %.
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
    """Rows (what, cell, test error, errors by seed, parameters) of the table of the page."""
    cells = ordered(table)
    places = [0, 1, 2, len(cells) // 2, len(cells) - 1]
    names = ["best", "second", "third", "median", "worst"]
    for place, name in zip(places, names, strict=True):
        if place < len(cells):
            notation, cell = cells[place]
            shown = notation.replace("|", "\\|")
            by_seed = ", ".join(f"{cell.errors[seed]:.2f}" for seed in sorted(cell.errors))
            yield name, f"`{shown}`", f"{cell.mean:.2f}", by_seed, f"{cell.parameters:,}"
    means = [cell.mean for _, cell in cells]
    trainings = statistics.fmean(len(cell.errors) for _, cell in cells)
    noise = noise_between_seeds(table)
    yield "mean of all", "", f"{statistics.fmean(means):.2f}", "", ""
    yield "a drawn cell's regret", "", f"{statistics.fmean(means) - means[0]:.2f}", "", ""
    if math.isnan(noise):
        return
    regret = regret_of_the_chosen(means, noise / math.sqrt(trainings))
    yield "SD between seeds, better quarter", "", f"{noise:.2f}", "", ""
    yield "rank correlation of two seeds", "", f"{rank_correlation(table):.3f}", "", ""
    yield "regret of the cell that looks best", "", f"{regret:.2f}", "", ""
