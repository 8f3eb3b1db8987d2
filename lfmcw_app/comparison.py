"""Arms of an experiment, compared over seeds: power first, then paired differences and verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from lfmcw_app.drawing import as_label, drawing
from lfmcw_app.results_file import Row

__all__ = [
    "LEVEL", "POWER", "REGRET", "TEST_ERROR", "TOO_FEW", "TOO_FEW_DIFFER", "Comparison", "Finding",
    "Summary", "by_rank", "compare", "detectable_in_spreads", "draw_comparison", "findings", "holm",
    "least_pairs", "looked_up", "measure_of", "power_planned", "power_said",
    "sign_flip_bounds", "sign_flip_p", "signed", "summaries", "summarise",
]  # fmt: skip

LEVEL, POWER = 0.05, 0.8

TEST_ERROR, REGRET = "test error, %", "regret, percentage points"
"""What arms are compared by."""

TOO_FEW, TOO_FEW_DIFFER = "too few seeds", "too few seeds differ"
"""Verdicts if no difference, however large, could have been told from chance."""

MOST_EXACT = 32
"""Pairs up to which all sign patterns count; beyond, `DRAWN_FLIPS` random ones stand for them."""

DRAWN_FLIPS = 2**16

BISECTIONS = 30
"""Halvings of the range of the differences: its 1e-9th part is left."""


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
    def seeds_said(self) -> str:
        """The number of seeds and, if some tie, how many of them differ."""
        if self.differing in (None, self.pairs):
            return str(self.pairs)
        return f"{self.pairs}, {self.differing} differ"

    @property
    def bounded(self) -> bool:
        """Whether there are enough pairs for `low` and `high`."""
        return not math.isinf(self.low)

    def said(self, decimals: int = 2) -> str:
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
        interval=float(student.ppf(1 - LEVEL / 2, pairs - 1)) * deviation / math.sqrt(pairs),
        low=low,
        high=high,
        p_value=p_value,
        detectable=detectable_in_spreads(pairs, tests) * deviation if enough else math.inf,
        pairs=pairs,
        differing=differing,
    )


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """The two-sided p-value that the mean difference is zero, by flipping signs of differences.

    If the arms are alike, each seed's difference could as well have the other sign: p is the share
    of sign patterns with a mean at least as far from zero (Fisher 1935). It assumes no
    distribution: regrets over a list of cells are discrete, skewed, and often equal.

    Args:
        differences: one per seed.
    """
    values = np.asarray(differences, dtype=np.float64)
    least = abs(float(values.sum())) - 1e-9 * float(np.abs(values).sum())  # sums are rounded
    if len(values) <= MOST_EXACT:
        return float(_as_far(values, least) / 2.0 ** len(values))
    drawn = _drawn_flips(len(values))
    as_far = int((np.abs((2.0 * drawn - 1.0) @ values) >= least).sum())
    return (as_far + 1) / (DRAWN_FLIPS + 1)


def _drawn_flips(count: int) -> np.ndarray:
    """Random sign patterns, the same each time: ones for the pairs of one sign, zeros."""
    return np.random.default_rng(0).integers(0, 2, (DRAWN_FLIPS, count))


def _as_far(values: np.ndarray, least: float) -> int:
    """How many of all sign patterns have a sum at least `least` from zero.

    A pattern is one of the first half of the values with one of the second. With the sums of the
    second half in order, a search counts those that reach far enough with each sum of the first.
    """
    half = len(values) // 2
    first, second = _sums(values[:half]), np.sort(_sums(values[half:]))
    if least <= 0:
        return len(first) * len(second)
    above = len(second) - np.searchsorted(second, least - first, side="left")
    below = np.searchsorted(second, -least - first, side="right")
    return int(above.sum() + below.sum())


def _sums(values: np.ndarray) -> np.ndarray:
    """The sums of the values with each pattern of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def sign_flip_bounds(differences: Sequence[float], level: float) -> tuple[float, float]:
    """The interval of all true differences that `sign_flip_p` does not reject at this level.

    A true difference is tested by taking it off every pair. It is as far from the mean as p says
    where that share of the pairs' subsets has a mean beyond it (Hartigan 1969). So p only rises
    towards the mean, and bisection finds each end. Of drawn patterns the subsets' means are known.

    Args:
        differences: one per seed.
        level: of the test; the interval covers the true difference with probability 1 − level.

    Returns:
        Lower and upper end; infinite where this number of pairs can reject nothing at this level.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) == 0 or 2.0 ** (1 - len(values)) > level:
        return -math.inf, math.inf
    if len(values) > MOST_EXACT:
        drawn = _drawn_flips(len(values))
        means = (drawn @ values) / np.maximum(1, drawn.sum(axis=1))
        low, high = (float(np.quantile(means, q)) for q in (level / 2, 1 - level / 2))
        return low, high
    mean = float(values.mean())
    ends = (float(values.min()) - 1e-6, float(values.max()) + 1e-6)
    low, high = (_rejected_from(values, mean, end, level) for end in ends)
    return low, high


def _rejected_from(values: np.ndarray, inside: float, outside: float, level: float) -> float:
    """The end of the interval between a difference that is in it and one that is not."""
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        if sign_flip_p(values - middle) > level:
            inside = middle
        else:
            outside = middle
    return (inside + outside) / 2


def least_pairs(tests: int) -> int:
    """The number of differing pairs from which `sign_flip_p` can reach 5% divided by the tests.

    The least p-value of n pairs, all of one sign, is 2 / 2ⁿ. Ties do not lower it.
    """
    return 1 + math.ceil(math.log2(tests / LEVEL))


def detectable_in_spreads(pairs: int, tests: int = 1) -> float:
    """The true difference that is seen in 80% of experiments, in SDs of the paired differences.

    "Seen" means told from zero at 5% divided by `tests`, Holm's strictest level. The value is known
    before any run. It is infinite for fewer than `least_pairs`. It is the t-test's, for continuous
    differences: ties, as of regrets over a list of cells, lower the power of `sign_flip_p` below
    80%.
    """
    if pairs < least_pairs(tests):
        return math.inf
    freedom = pairs - 1
    quantiles = student.ppf(1 - LEVEL / tests / 2, freedom) + student.ppf(POWER, freedom)
    return float(quantiles) / math.sqrt(pairs)


# ------------------------------ all of a table


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for multiple tests (Holm 1979), in their order; NaNs stay."""
    adjusted = list(p_values)
    tested = [index for index, p in enumerate(p_values) if not math.isnan(p)]
    known = sorted(tested, key=p_values.__getitem__)

    # The smallest of k counts k times, the next one k − 1 times; none falls below the one before.
    largest = 0.0
    for rank, index in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


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


# ------------------------------ as text


def summarise(
    arms: Sequence[Summary], contrasts: Sequence[tuple[str, str]], measure: str = TEST_ERROR
) -> str:
    """Returns the Markdown text of a table: its power, its arms, and what can be said of them.

    Args:
        arms: those that have runs.
        contrasts: see `findings`.
        measure: what the errors are.
    """
    found = findings(arms, contrasts)
    parts = [power_said(found, len(contrasts)), _arms_table(arms, measure)]
    if found and measure == REGRET:
        parts[0] += f" {_largest_gain_said(arms, found[0].against)}"
    if found:
        parts.append(_findings_table(found))
        if ranked := by_rank(arms):
            parts += [
                "By the rank of the cells (1: the best), which a single search that ends at a "
                "useless cell cannot dominate:",
                _findings_table(findings(ranked, contrasts)),
            ]
        parts.append(_notes(len(contrasts)))
    return "\n\n".join(parts) + "\n"


def _largest_gain_said(arms: Sequence[Summary], baseline: str) -> str:
    (mean,) = (arm.mean for arm in arms if arm.label == baseline)
    return (
        "No arm can gain more than the mean regret of the arm that it is compared with: "
        f"{mean:.2f} points in comparisons with {baseline}."
    )


def power_planned(pairs: int, tests: int) -> str:
    """What this number of seeds can detect in this many comparisons, known before any run."""
    comparisons = f"{tests} comparisons" if tests > 1 else "one comparison"
    if pairs < least_pairs(tests):
        return (
            f"Seeds: {pairs}, which are too few. With {comparisons}, fewer than "
            f"{least_pairs(tests)} seeds cannot tell any difference from chance, however large."
        )
    return (
        f"With {pairs} seeds and {comparisons}, a true difference of "
        f"{detectable_in_spreads(pairs, tests):.2f} standard deviations of the paired differences "
        f"is seen in {POWER:.0%} of such experiments; in fewer of them where seeds tie."
    )


def power_said(found: Sequence[Finding], tests: int) -> str:
    """What an experiment of this size can see, to be said before what it has seen."""
    pairs = min((finding.comparison.pairs for finding in found), default=0)
    said = f"**Power.** {power_planned(pairs, tests)}"
    compared = [finding.comparison for finding in found if not finding.comparison.identical]
    seen = [of.detectable for of in compared if not math.isinf(of.detectable)]
    if pairs < least_pairs(tests) or not seen:
        return said
    low, high = f"{min(seen):.2f}", f"{max(seen):.2f}"
    points = low if low == high else f"{low} to {high}"
    return f"{said} With the spread found here, that is {points} percentage points."


def _arms_table(arms: Sequence[Summary], measure: str) -> str:
    ranked = any(arm.ranks for arm in arms)
    head = ["arm", f"{measure} (mean ± SD)", "median", "runs"]
    head += ["rank (median)"] if ranked else []
    head.append("parameters (mean)")
    lines = [_line(head), "|---" * len(head) + "|"]
    for arm in arms:
        spread = "" if math.isnan(arm.deviation) else f" ± {arm.deviation:.2f}"
        cells = [arm.label, f"{arm.mean:.2f}{spread}", f"{arm.median:.2f}", str(len(arm.errors))]
        if ranked:
            cells.append(f"{statistics.median(arm.ranks.values()):g}" if arm.ranks else "")
        sizes = arm.parameters.values()
        cells.append(f"{statistics.fmean(sizes):,.0f}" if sizes else "")
        lines.append(_line(cells))
    return "\n".join(lines)


def _findings_table(found: Sequence[Finding]) -> str:
    head = [
        "arm", "minus", "seeds", f"seen in {POWER:.0%}", "difference (95% interval)", "p (Holm)",
        "verdict",
    ]  # fmt: skip
    lines = [_line(head), "|---" * len(head) + "|"]
    lines += [_line([finding.arm, finding.against, *_compared(finding)]) for finding in found]
    return "\n".join(lines)


def _compared(finding: Finding) -> list[str]:
    """Seeds, detectable difference, difference, p and verdict, as text."""
    of = finding.comparison
    if of.pairs == 0 or of.identical:
        return [str(of.pairs), "", "", "", finding.verdict]
    detectable = "" if math.isinf(of.detectable) else f"{of.detectable:.2f}"
    return [of.seeds_said, detectable, of.said(), f"{finding.p_value:.2g}", finding.verdict]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _notes(tests: int) -> str:
    family = f"for the {tests} comparisons of this table, one family of tests"
    return (
        "Differences are paired by seed; negative is better. An interval of two ends inverts the "
        f"test at {LEVEL:.0%} divided by the number of comparisons, so that all intervals hold at "
        "once. With ±, where seeds are too few for it, it is Student's t for that comparison by "
        "itself. *p (Holm)*: two-sided, by flipping the signs of the differences, "
        f"which assumes no distribution; adjusted {family}. *seen in {POWER:.0%}*: the true "
        f"difference that {POWER:.0%} of such experiments see at Holm's strictest level, if "
        "differences are continuous. Seeds that tie have no sign and lower this power. "
        f"*verdict*: better or worse if p (Holm) is below {LEVEL:.0%}; too few seeds below "
        f"{least_pairs(tests)}, too few seeds differ if fewer than these do; identical if no seed "
        "tells the arms apart."
    )


# ------------------------------ as a picture


@drawing()
def draw_comparison(
    arms: Sequence[Summary], title: str, path: Path, measure: str = TEST_ERROR
) -> None:
    """Draws the runs of each arm, their mean and standard deviation."""
    figure = Figure(figsize=(1.6 + 1.25 * max(2, len(arms)), 4.2), layout="constrained")
    axes = figure.subplots()
    # Every run is a transparent dot, so that equal ones are darker.
    for position, arm in enumerate(arms):
        places, errors = [position] * len(arm.errors), list(arm.errors.values())
        axes.plot(places, errors, "o", color="#1f77b4", alpha=0.45)
        deviation = 0.0 if math.isnan(arm.deviation) else arm.deviation
        axes.errorbar(position, arm.mean, deviation, fmt="_", color="black", capsize=6, ms=18)
    axes.set_xticks(range(len(arms)), [_wrapped(as_label(arm.label)) for arm in arms])
    axes.set_xlim(-0.6, len(arms) - 0.4)
    axes.set_ylabel(f"{measure}  (mean ± SD, runs)")
    axes.set_title(as_label(title, longest=90), fontsize=11, loc="left")
    figure.savefig(path, dpi=110, format="png")


def _wrapped(label: str, width: int = 14) -> str:
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
