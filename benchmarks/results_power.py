"""What the experiments could detect, stated before what they saw."""

from __future__ import annotations

import math
from collections.abc import Sequence

from results_data import (
    BASELINE,
    METHOD,
    PaperRow,
    Results,
)  # fmt: skip
from results_markdown import table

from lfmcw_app.arms import contrasts
from lfmcw_app.paired_tests import LEVEL, POWER, detectable_in_spreads, least_pairs


def power(results: Results) -> str:
    """What experiments of these sizes can see, before what they saw."""
    tests = len(contrasts("ablation"))
    head = ("seeds", "one comparison", f"{tests} comparisons (`ablation`)")
    counts = (5, 6, 10, 20, 40)
    rows = [(pairs, *_spreads(pairs, (1, tests))) for pairs in counts]
    general = table(head, rows)
    effects = results.kept_effects(METHOD, BASELINE)
    titles = results.titles(effect.design for effect in effects)
    claimed = paper_errors(results)
    rows = []
    for effect in effects:
        spread, planned = effect.found.deviation, len(contrasts(effect.design.table))
        if math.isnan(spread) or spread == 0 or claimed is None:
            continue
        seen, largest = effect.found.detectable, effect.largest_gain
        gain = claimed[1] - claimed[0]
        share = gain / claimed[1] * effect.error_against
        reachable = math.inf if effect.reachable_gain is None else effect.reachable_gain
        beyond = "no network here is that good" if largest is None else "not possible here"
        needed = [
            seeds_needed(wanted, spread, planned) if wanted <= reachable else beyond
            for wanted in (share, gain)
        ]
        rows.append(
            (
                titles[effect.design], f"{effect.error_against:.2f}", f"{spread:.2f}",
                effect.found.seeds_text,
                "none" if math.isinf(seen) else f"{seen:.2f}",
                "" if largest is None else f"{largest:.2f}",
                f"{share:.2f}", needed[0], needed[1],
            )
        )  # fmt: skip
    there = "" if claimed is None else f" {claimed[0] - claimed[1]:+.2f} points"
    change = "" if claimed is None else f" {100 * (claimed[0] / claimed[1] - 1):+.0f}%"
    head = (
        "experiment", "error of plain search, %", "SD of the paired differences", "seeds",
        f"seen in {POWER:.0%}, points", "largest possible gain, points",
        f"the paper's{change} in points here", "seeds to see that many",
        f"seeds to see the paper's{there}",
    )  # fmt: skip
    return f"{general}\n\n{table(head, rows)}\n\n{families(results)}"


def families(results: Results) -> str:
    """How many families of tests there are: nothing is corrected over them."""
    count = len(results.families)
    by_rank = sum(bool(experiment.findings_by_rank) for experiment in results.families)
    if count == 0:
        return "Families of tests: 0. Each experiment whose single runs are kept is one."
    ranked = f", and {by_rank} of them by rank too" if by_rank else ""
    expected = LEVEL * (count + by_rank)
    return (
        f"Families of tests: {count + by_rank}. They are {count} experiments by points{ranked}. "
        "Holm's correction is within a family, not over them. If no arm differed from any other, "
        f"up to {expected:.2g} of these families would contain a false *better* or *worse* on "
        "average."
    )


def _spreads(pairs: int, tests: Sequence[int]) -> list[str]:
    found = [detectable_in_spreads(pairs, of) for of in tests]
    return ["none" if math.isinf(spreads) else f"{spreads:.2f} SD" for spreads in found]


def seeds_needed(difference: float, spread: float, tests: int) -> int:
    """The least number of seeds with which a difference is seen, given the pairs' spread."""
    pairs = least_pairs(tests)
    while detectable_in_spreads(pairs, tests) * spread > difference:
        pairs += 1
    return pairs


def paper_errors(results: Results) -> tuple[float, float] | None:
    """The paper's errors of DARTS in first order on CIFAR-10 with LFM-CW and without it, %."""
    rows = [
        row for row in results.paper
        if (row.item, row.data, row.space, row.order) == ("Table 2", "cifar10", "darts", "first")
    ]  # fmt: skip
    return errors_of(rows, METHOD, BASELINE)


def errors_of(rows: Sequence[PaperRow], arm: str, against: str) -> tuple[float, float] | None:
    """The paper's errors of two arms among some of its figures, %; None if one is missing."""
    errors = {row.arm: row.error for row in rows}
    return (errors[arm], errors[against]) if {arm, against} <= set(errors) else None
