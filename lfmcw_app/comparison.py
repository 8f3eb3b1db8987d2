"""Arms of an experiment, compared over seeds: paired differences and verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lfmcw_app.paired_tests import (
    LEVEL,
    detectable_in_spreads,
    holm,
    least_pairs,
    sign_flip_bounds,
    sign_flip_p,
    t_interval,
)
from lfmcw_app.results_file import Row

__all__ = [
    "REGRET", "TEST_ERROR", "TOO_FEW", "TOO_FEW_DIFFER", "Comparison", "Finding", "Summary",
    "by_rank", "compare", "findings", "looked_up", "measure_of", "signed", "summaries",
]  # fmt: skip

TEST_ERROR, REGRET = "test error, %", "regret, percentage points"
"""What arms are compared by."""

TOO_FEW, TOO_FEW_DIFFER = "too few seeds", "too few seeds differ"
"""Verdicts if no difference, however large, could have been told from chance."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The runs of one arm.

    Attributes:
        label: of the arm.
        errors: seed → test error in %, or regret in percentage points.
        parameters: seed → parameters of the derived network, where they are known.
        ranks: seed → rank of the cell, where it was looked up.
    """

    label: str
    errors: Mapping[int, float] = field(default_factory=dict)
    parameters: Mapping[int, int] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean error, %."""
        return statistics.fmean(self.errors.values())

    @property
    def median(self) -> float:
        """Median error, %."""
        return statistics.median(self.errors.values())

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds, %; NaN for one."""
        return statistics.stdev(self.errors.values()) if len(self.errors) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm minus another one, paired by seed.

    Attributes:
        difference: mean of the differences, percentage points; negative: better.
        deviation: their standard deviation; NaN for one pair.
        interval: half the width of their 95% confidence interval (Student's t), of this comparison
            by itself; NaN for one pair.
        low, high: ends of the interval of `sign_flip_bounds` at 5% divided by the number of tests:
            the intervals of all tests hold at once in 95% of experiments. Infinite for few pairs.
        p_value: two-sided, of `sign_flip_p`; NaN without a pair.
        detectable: the true difference that 80% of such experiments detect, given this spread and
            the number of tests, if no seeds tie; infinite if too few pairs differ to detect any.
        pairs: number of seeds that both have.
        differing: number of those whose difference is not zero; None where the single runs are
            not known.
    """

    difference: float = math.nan
    deviation: float = math.nan
    interval: float = math.nan
    low: float = -math.inf
    high: float = math.inf
    p_value: float = math.nan
    detectable: float = math.inf
    pairs: int
    differing: int | None = None

    @property
    def seeds_text(self) -> str:
        """The number of seeds and, if some tie, how many of them differ."""
        if self.differing in (None, self.pairs):
            return str(self.pairs)
        return f"{self.pairs}, {self.differing} differ"

    @property
    def bounded(self) -> bool:
        """Whether there are enough pairs for `low` and `high`."""
        return not math.isinf(self.low)

    def describe(self, decimals: int = 2) -> str:
        """The difference with `low` and `high`; with Student's t (±) where pairs are too few."""
        difference, low, high = (
            signed(value, decimals) for value in (self.difference, self.low, self.high)
        )
        if self.bounded:
            return f"{difference} ({low} to {high})"
        return difference + (
            "" if math.isnan(self.interval) else f" (± {self.interval:.{decimals}f})"
        )

    @property
    def identical(self) -> bool:
        """Whether no seed tells the arms apart."""
        return self.pairs > 1 and self.difference == 0 and self.deviation == 0


def signed(value: float, decimals: int = 2) -> str:
    """A number with its sign, or without one if it rounds to zero."""
    said = f"{value:+.{decimals}f}"
    return said if float(said) else said[1:]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a table says of two arms.

    Attributes:
        arm: label.
        against: label of the arm that it is compared with.
        comparison: arm minus against.
        p_value: adjusted for the number of comparisons (Holm); 1 without a pair.
        verdict: in words.
    """

    arm: str
    against: str
    comparison: Comparison
    p_value: float
    verdict: str


# ------------------------------ two arms


def compare(arm: Summary, other: Summary, *, tests: int = 1) -> Comparison:
    """Compares two arms seed by seed: a seed decides split, initial values and noise of both.

    Args:
        arm: what is judged.
        other: what it is compared with.
        tests: number of comparisons that are made; see `detectable_in_spreads`.
    """
    seeds = sorted(set(arm.errors) & set(other.errors))
    differences = [arm.errors[seed] - other.errors[seed] for seed in seeds]
    pairs = len(seeds)
    if pairs == 0:
        return Comparison(pairs=0, differing=0)
    differing = sum(difference != 0 for difference in differences)
    difference, p_value = statistics.fmean(differences), sign_flip_p(differences)
    if pairs == 1:
        return Comparison(difference=difference, p_value=p_value, pairs=1, differing=differing)
    deviation = statistics.stdev(differences)
    low, high = sign_flip_bounds(differences, LEVEL / tests)
    # A tie is as far from zero with either sign: only pairs that differ can lower p.
    enough = differing >= least_pairs(tests)
    return Comparison(
        difference=difference,
        deviation=deviation,
        interval=t_interval(deviation, pairs),
        low=low,
        high=high,
        p_value=p_value,
        detectable=detectable_in_spreads(pairs, tests) * deviation if enough else math.inf,
        pairs=pairs,
        differing=differing,
    )


# ------------------------------ all of a table


def findings(arms: Sequence[Summary], contrasts: Sequence[tuple[str, str]]) -> list[Finding]:
    """Compares arms in pairs; all comparisons that were planned are one family of tests.

    Args:
        arms: those that have runs.
        contrasts: labels of an arm and of what it is compared with. If one of them has no runs yet,
            the comparison is left out, but still counts as a test.
    """
    by_label = {arm.label: arm for arm in arms}
    pairs = [pair for pair in contrasts if set(pair) <= set(by_label)]
    tests = len(contrasts)
    compared = [compare(by_label[arm], by_label[other], tests=tests) for arm, other in pairs]
    unknown = [1.0] * (tests - len(pairs))
    adjusted = holm([*(1.0 if found.pairs == 0 else found.p_value for found in compared), *unknown])
    made = []
    for (arm, other), found, p_value in zip(pairs, compared, adjusted, strict=False):
        verdict = _verdict(found, p_value, tests)
        made.append(
            Finding(arm=arm, against=other, comparison=found, p_value=p_value, verdict=verdict)
        )
    return made


def _verdict(found: Comparison, p_value: float, tests: int) -> str:
    """The one rule of all tables."""
    if found.identical:
        return "identical"
    if found.pairs < least_pairs(tests):
        return TOO_FEW
    if p_value < LEVEL:
        return "better" if found.difference < 0 else "worse"
    return TOO_FEW_DIFFER if math.isinf(found.detectable) else "no difference seen"


def measure_of(rows: Sequence[Row]) -> str:
    """What runs are compared by: the regret if all were looked up, otherwise the test error."""
    return REGRET if looked_up(rows) else TEST_ERROR


def looked_up(rows: Sequence[Row]) -> bool:
    """Whether there are runs, and the cells of all of them were looked up."""
    return bool(rows) and all(
        row.regret_percent is not None and row.rank is not None for row in rows
    )


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """The arms of the rows of one table, in the order in which they come first."""
    regret = measure_of(rows) == REGRET
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    found = []
    for label, runs in by_arm.items():
        errors: dict[int, float] = {}
        for row in runs:
            value = row.regret_percent if regret else row.test_error_percent
            assert value is not None
            errors[row.seed] = value
        parameters = {row.seed: row.parameters for row in runs if row.parameters is not None}
        ranks = {row.seed: row.rank for row in runs if row.rank is not None}
        found.append(Summary(label=label, errors=errors, parameters=parameters, ranks=ranks))
    return found


def by_rank(arms: Sequence[Summary]) -> list[Summary]:
    """The arms with the ranks of their cells in place of errors; empty if some have none.

    A single search that ends at a useless cell can dominate the mean regret. Ranks are bounded.
    """
    if not all(set(arm.ranks) == set(arm.errors) for arm in arms):
        return []
    return [replace(arm, errors={s: float(r) for s, r in arm.ranks.items()}) for arm in arms]
