"""Arms of an experiment compared over seeds."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from made_arms import arm
from made_result_rows import result_row
from started_processes import finished

from lfmcw_app.comparison import (
    REGRET,
    TEST_ERROR,
    TOO_FEW_DIFFER,
    Summary,
    by_rank,
    compare,
    findings,
    looked_up,
    measure_of,
    summaries,
)


def judged(*differences, against=0.0):
    """The verdict on an arm with these differences from the baseline."""
    old = [against + 10.0] * len(differences)
    new = [before + change for before, change in zip(old, differences, strict=True)]
    [found] = findings([arm("old", *old), arm("new", *new)], [("new", "old")])
    return found.verdict


def test_arms_are_compared_seed_by_seed():
    """Differences -1, -2, -3: mean -2, SD 1, t(0.975, 2) = 4.303. Of the eight sign patterns two
    have a mean as far from zero.
    """
    found = compare(arm("new", 9.0, 11.0, 13.0), arm("old", 10.0, 13.0, 16.0))
    assert (found.difference, found.deviation) == pytest.approx((-2.0, 1.0))
    assert found.interval == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.p_value == pytest.approx(0.25)
    assert found.pairs == 3


def test_only_seeds_that_both_have_are_paired():
    found = compare(arm("new", 9.0), arm("old", 10.0, 20.0))
    assert (found.difference, found.pairs) == (-1.0, 1)
    assert math.isnan(found.interval)
    other = Summary(label="other", errors={7: 1.0}, parameters={7: 1})
    assert compare(other, arm("old", 10.0)).pairs == 0
    [found] = findings([other, arm("old", 10.0)], [("other", "old")])
    assert (found.p_value, found.verdict) == (1.0, "too few seeds")


def test_bounds_hold_for_all_tests_at_once():
    """In 5% of experiments without a difference, some of three intervals leaves zero out."""
    numbers = np.random.default_rng(0)
    missed = 0
    for _ in range(120):
        old = arm("old", *numbers.normal(size=10))
        new = [arm("new", *numbers.normal(size=10)) for _ in range(3)]
        found = [compare(each, old, tests=3) for each in new]
        missed += any(not each.low <= 0 <= each.high for each in found)
        assert all((each.p_value > 0.05 / 3) == (each.low <= 0 <= each.high) for each in found)
    assert missed / 120 < 0.09


def test_pairs_that_tie_do_not_count_for_a_verdict():
    """Of twenty pairs five differ, all with a loss: p cannot fall below 2/32."""
    arms = [arm("old", *[10.0] * 20), arm("new", *[10.0] * 15, *[11.0] * 5)]
    [found] = findings(arms, [("new", "old")])
    assert found.p_value == pytest.approx(2 / 32, rel=0.1)
    assert (found.comparison.pairs, found.comparison.differing) == (20, 5)
    assert found.verdict == TOO_FEW_DIFFER
    assert math.isinf(found.comparison.detectable)
    assert found.comparison.seeds_text == "20, 5 differ"
    assert found.comparison.describe() == "+0.25 (0.00 to +0.45)"
    assert judged(*[0.0] * 14, *[1.0] * 6) == "worse"  # one more is enough


def test_a_verdict_follows_one_rule():
    assert judged(*[-1.0, -2.0] * 4) == "better"
    assert judged(*[1.0, 2.0] * 4) == "worse"
    assert judged(*[-1.0, 2.0] * 4) == "no difference seen"
    assert judged(*[0.0] * 8) == "identical"
    assert judged(*[-1.0, -2.0, -1.5, -1.0, -2.0]) == "too few seeds"
    assert judged(*[-1.0, -2.0, -1.5, -1.0, -2.0, -1.0]) == "better"
    assert judged(-1.0) == "too few seeds"


def test_all_planned_comparisons_are_one_family():
    """The same eight differences are told from chance alone (p = 1/128), not among ten plans."""
    arms = [arm("old", *[10.0] * 8), arm("new", *[9.0, 9.5] * 4)]
    [found] = findings(arms, [("new", "old")])
    assert (found.p_value, found.verdict) == (pytest.approx(1 / 128), "better")
    planned = [("new", "old"), *((f"later {index}", "old") for index in range(9))]
    [found] = findings(arms, planned)
    assert found.p_value == pytest.approx(10 / 128)
    assert found.verdict == "too few seeds"


def test_an_arm_is_compared_with_other_arms_too():
    arms = [arm("old", 3.0, 4.0), arm("new", 1.0, 2.0), arm("control", 2.0, 2.0)]
    found = findings(arms, [("new", "old"), ("new", "control")])
    assert [(each.arm, each.against, each.comparison.difference) for each in found] == [
        ("new", "old", -2.0),
        ("new", "control", -0.5),
    ]


def test_rows_that_were_looked_up_are_compared_by_regret():
    rows = [
        result_row(seed=seed, arm=label, regret_percent=regret, rank=3)
        for label, regret in (("LFM-CW", 0.5), ("random", 2.0))
        for seed in (1, 0)
    ]
    assert measure_of(rows) == REGRET
    first, second = summaries(rows)
    assert (first.label, first.errors) == ("LFM-CW", {1: 0.5, 0: 0.5})
    assert second.ranks == {1: 3, 0: 3}
    mixed = [*rows, result_row()]
    assert looked_up(rows)
    assert not looked_up(mixed) and not looked_up([])
    assert measure_of(mixed) == TEST_ERROR
    assert summaries(mixed)[0].errors[3] == 49.75


def test_an_arm_has_its_mean_and_deviation():
    found = arm("new", 1.0, 3.0, 8.0)
    assert (found.mean, found.median) == (4.0, 3.0)
    assert found.deviation == pytest.approx(math.sqrt(13))
    assert math.isnan(arm("one", 1.0).deviation)


def test_one_useless_cell_does_not_decide_ranks():
    """By regret nothing is seen, by rank the arm is better in all pairs but one."""
    seeds = range(12)
    plain = Summary(label="plain", errors=dict.fromkeys(seeds, 3.0), ranks=dict.fromkeys(seeds, 60))
    ours = Summary(
        label="ours",
        errors={seed: 40.0 if seed == 0 else 1.0 for seed in seeds},
        ranks={seed: 125 if seed == 0 else 10 for seed in seeds},
    )
    (by_regret,) = findings([plain, ours], [("ours", "plain")])
    (ranked,) = findings(by_rank([plain, ours]), [("ours", "plain")])
    assert (by_regret.verdict, ranked.verdict) == ("no difference seen", "better")
    assert ranked.comparison.difference == pytest.approx((65 - 11 * 50) / 12)
    assert by_rank([plain, Summary(label="trained", errors={0: 1.0})]) == []


def test_statistics_are_imported_without_a_drawing_library():
    code = "import sys, lfmcw_app.comparison_text; print('matplotlib' in sys.modules)"
    assert finished([sys.executable, "-c", code]).stdout.strip() == "False"
