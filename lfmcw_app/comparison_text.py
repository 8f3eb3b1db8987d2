"""The Markdown text of a table: its power first, then its arms, and what can be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lfmcw_app.comparison import REGRET, TEST_ERROR, Finding, Summary, by_rank, findings
from lfmcw_app.paired_tests import LEVEL, POWER, detectable_in_spreads, least_pairs

__all__ = ["describe_planned_power", "describe_power", "summarise"]


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
    parts = [describe_power(found, len(contrasts)), _arms_table(arms, measure)]
    if found and measure == REGRET:
        parts[0] += f" {_describe_largest_gain(arms, found[0].against)}"
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


def _describe_largest_gain(arms: Sequence[Summary], baseline: str) -> str:
    (mean,) = (arm.mean for arm in arms if arm.label == baseline)
    return (
        "No arm can gain more than the mean regret of the arm that it is compared with: "
        f"{mean:.2f} points in comparisons with {baseline}."
    )


def describe_planned_power(pairs: int, tests: int) -> str:
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


def describe_power(found: Sequence[Finding], tests: int) -> str:
    """What an experiment of this size can see, to be said before what it has seen."""
    pairs = min((finding.comparison.pairs for finding in found), default=0)
    said = f"**Power.** {describe_planned_power(pairs, tests)}"
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
    return [of.seeds_text, detectable, of.describe(), f"{finding.p_value:.2g}", finding.verdict]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _notes(tests: int) -> str:
    family = f"for the {tests} comparisons of this table, one family of tests"
    return (
        "Differences are paired by seed; negative is better. An interval of two ends inverts the "
        f"test at {LEVEL:.0%} divided by the number of comparisons, so that all intervals hold at "
        "once. With ±, where seeds are too few for it, it is Student's t for that comparison by "
        "itself. *p (Holm)*: two-sided, by flipping the signs of the differences, which assumes "
        "only that the arms are interchangeable within a seed (the interval, that differences are "
        f"symmetric around the true one); adjusted {family}. *seen in {POWER:.0%}*: the true "
        f"difference that {POWER:.0%} of such experiments see at Holm's strictest level, if "
        "differences are continuous. Seeds that tie have no sign and lower this power. "
        f"*verdict*: better or worse if p (Holm) is below {LEVEL:.0%}; too few seeds below "
        f"{least_pairs(tests)}, too few seeds differ if fewer than these do; identical if no seed "
        "tells the arms apart."
    )
