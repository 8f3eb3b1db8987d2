"""Arms of an experiment, compared over seeds: mean, spread, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import t as student

from lfmcw_app.drawing import as_label, drawing

__all__ = ["Comparison", "Summary", "compare", "draw_comparison", "holm", "summarise"]

POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The runs of one arm.

    Attributes:
        errors: seed → test error in %.
        parameters: seed → parameters of the derived network.
    """

    label: str
    errors: Mapping[int, float] = field(default_factory=dict)
    parameters: Mapping[int, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean test error, %."""
        return statistics.fmean(self.errors.values())

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds, %; NaN for one."""
        return statistics.stdev(self.errors.values()) if len(self.errors) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm minus the baseline, paired by seed.

    Attributes:
        difference: mean of the differences, percentage points; negative: better than the baseline.
        interval: half the width of their 95% confidence interval (Student's t); NaN for one pair.
        p_value: of a two-sided paired t-test; NaN for one pair.
        detectable: the true difference that a test at 5% would find with probability 0.8, given
            this spread; NaN for one pair.
        pairs: number of seeds that both have.
    """

    difference: float
    interval: float = math.nan
    p_value: float = math.nan
    detectable: float = math.nan
    pairs: int


def compare(arm: Summary, baseline: Summary) -> Comparison:
    """Compares two arms seed by seed: a seed decides split, initial values and noise of both."""
    seeds = sorted(set(arm.errors) & set(baseline.errors))
    differences = [arm.errors[seed] - baseline.errors[seed] for seed in seeds]
    if not differences:
        return Comparison(difference=math.nan, pairs=0)
    difference, pairs = statistics.fmean(differences), len(seeds)
    if pairs == 1:
        return Comparison(difference=difference, pairs=1)

    # Student's t of the mean difference. Without spread, differences are 0 or certainly not.
    error = statistics.stdev(differences) / math.sqrt(pairs)
    freedom = pairs - 1
    quantile = float(student.ppf(0.975, freedom))
    p_value = 1.0 if difference == 0 else 0.0
    if error > 0:
        p_value = 2 * float(student.sf(abs(difference) / error, freedom))
    return Comparison(
        difference=difference,
        interval=quantile * error,
        p_value=p_value,
        detectable=(quantile + float(student.ppf(POWER, freedom))) * error,
        pairs=pairs,
    )


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


def summarise(arms: Sequence[Summary]) -> str:
    """Returns the Markdown table; the first arm is the baseline."""
    found = [compare(arm, arms[0]) for arm in arms[1:]]
    adjusted = holm([comparison.p_value for comparison in found])
    lines = [
        "| arm | test error, % (mean ± SD) | runs | minus the first arm (95% interval) | p (Holm) "
        "| detectable | parameters |",
        "|---|---|---|---|---|---|---|",
    ]

    # The baseline has no comparison with itself.
    against = [("", "", ""), *(_against(c, p) for c, p in zip(found, adjusted, strict=True))]
    for arm, (difference, p_value, detectable) in zip(arms, against, strict=True):
        spread = "" if math.isnan(arm.deviation) else f" ± {arm.deviation:.2f}"
        size = statistics.fmean(arm.parameters.values())
        cells = (
            arm.label,
            f"{arm.mean:.2f}{spread}",
            len(arm.errors),
            difference,
            p_value,
            detectable,
            f"{size:,.0f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    notes = (
        "Differences and intervals are paired by seed (Student's t). *p (Holm)*: of the paired "
        "t-test, adjusted for the number of arms. *detectable*: the true difference that such a "
        f"test at 5% would find in {POWER:.0%} of such tables. *parameters*: mean."
    )
    return "\n".join([*lines, "", notes]) + "\n"


def _against(found: Comparison, p_value: float) -> tuple[str, str, str]:
    if found.pairs < 2:
        return (f"{found.difference:+.2f} (one pair only)" if found.pairs else "no pair"), "", ""
    return (
        f"{found.difference:+.2f} (± {found.interval:.2f})",
        f"{p_value:.2g}",
        f"{found.detectable:.2f}",
    )


@drawing()
def draw_comparison(arms: Sequence[Summary], title: str, path: Path) -> None:
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
    axes.set_ylabel("test error, %  (mean ± SD, runs)")
    axes.set_title(as_label(title, longest=90), fontsize=11, loc="left")
    figure.savefig(path, dpi=110)


def _wrapped(label: str, width: int = 14) -> str:
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
