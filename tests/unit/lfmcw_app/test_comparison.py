"""Arms of an experiment compared over seeds."""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from made_result_rows import result_row
from scipy.stats import binom, permutation_test

from lfmcw_app.comparison import (
    REGRET,
    TEST_ERROR,
    TOO_FEW_DIFFER,
    Summary,
    by_rank,
    compare,
    detectable_in_spreads,
    draw_comparison,
    findings,
    holm,
    least_pairs,
    looked_up,
    measure_of,
    power_planned,
    sign_flip_bounds,
    sign_flip_p,
    summaries,
    summarise,
)


def arm(label, *errors):
    return Summary(
        label=label,
        errors=dict(enumerate(errors)),
        parameters=dict.fromkeys(range(len(errors)), 1000),
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


def test_the_p_value_is_scipys_exact_permutation_test():
    differences = [0.0, 0.4, -0.1, 1.7, 0.9, 0.2, -0.6, 2.5, 0.4]
    exact = permutation_test(
        (differences, np.zeros(9)),
        lambda x, y: float(np.mean(x) - np.mean(y)),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert sign_flip_p(differences) == pytest.approx(exact.pvalue)


def test_every_sign_pattern_of_the_usual_pairs_counts():
    """18 pairs with ties: their 2¹⁸ sums, one by one. Forty pairs of one sign: two patterns."""
    numbers = random.Random(2)
    differences = [round(numbers.gauss(0.3, 1.0), 1) for _ in range(18)]
    signs = 2 * ((np.arange(2**18)[:, None] >> np.arange(18)) & 1) - 1
    tenths = np.rint(10 * np.array(differences)).astype(int)
    expected = (abs(signs @ tenths) >= abs(tenths.sum())).mean()
    assert 0.05 < expected < 0.99 and sign_flip_p(differences) == expected
    assert sign_flip_p([1.0] * 20) == 2 / 2**20
    assert sign_flip_p([0.0] * 20) == 1.0


def test_bounds_are_the_subset_means_that_the_test_leaves():
    """The p-value at a true difference d is twice the share of subsets with a mean up to d, the
    empty one included. Of 6 pairs at 5% the ends are the extremes, of 8 the sixth from each end.
    """
    six, eight = [3.0, -1.0, 0.5, 2.0, 1.0, 0.0], [3.0, -1.0, 0.5, 2.0, 1.0, 0.0, 1.7, 0.3]
    assert sign_flip_bounds(six, 0.05) == pytest.approx((-1.0, 3.0), abs=1e-5)
    subsets = [set(chosen) for size in range(1, 9) for chosen in combinations(range(8), size)]
    means = sorted(np.mean([eight[place] for place in chosen]) for chosen in subsets)
    assert sign_flip_bounds(eight, 0.05) == pytest.approx((means[5], means[-6]), abs=1e-5)
    assert sign_flip_bounds(six, 0.01) == (-math.inf, math.inf)
    assert sign_flip_bounds([], 0.05) == (-math.inf, math.inf)


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


def test_the_p_value_of_many_pairs_is_drawn_and_repeats():
    numbers = random.Random(3)
    differences = [numbers.gauss(0.4, 1.0) for _ in range(40)]
    p_value = sign_flip_p(differences)
    assert p_value == sign_flip_p(differences)
    # Of normal differences it is about that of the t-test.
    t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(40))
    assert p_value == pytest.approx(2 * (1 - NormalDist().cdf(abs(t))), rel=0.4)
    assert 0 < sign_flip_p([1.0] * 40) < 1e-4
    low, high = sign_flip_bounds(differences, 0.05)
    for end in (low, high):
        assert sign_flip_p([value - end for value in differences]) == pytest.approx(0.05, abs=0.005)


def test_a_rounding_error_does_not_make_patterns_differ():
    """0, 6, 2, 9 and -3 tenths sum to 14. Of their 32 sign patterns 12 are as far from zero; as
    floating-point numbers some of these sums are below 1.4.
    """
    assert sign_flip_p([0.0, 0.6, 0.2, 0.9, -0.3]) == 12 / 32


def test_what_is_detectable_is_seen_in_80_percent_of_experiments():
    """Experiments with exactly that true difference, in which the SD has to be estimated too."""
    numbers, pairs, tests = random.Random(0), 12, 2
    effect = detectable_in_spreads(pairs, tests)
    seen = sum(
        sign_flip_p([numbers.gauss(effect, 1.0) for _ in range(pairs)]) < 0.05 / tests
        for _ in range(400)
    )
    assert 0.74 < seen / 400 < 0.86


def test_fewer_seeds_than_a_test_needs_can_see_nothing():
    """n pairs of one sign have p = 2 / 2ⁿ: 6 pairs are needed for 5%, 9 for an eighth of it."""
    assert [least_pairs(tests) for tests in (1, 2, 5, 8)] == [6, 7, 8, 9]
    for tests in (1, 2, 5, 8):
        assert sign_flip_p([1.0] * least_pairs(tests)) <= 0.05 / tests
        assert sign_flip_p([1.0] * (least_pairs(tests) - 1)) > 0.05 / tests
    assert math.isinf(detectable_in_spreads(8, 8))
    assert detectable_in_spreads(9, 8) < math.inf
    assert "too few" in power_planned(8, 8)
    assert "too few" not in power_planned(9, 8)


def test_ties_lower_the_planned_power_and_notes_say_so():
    """Differences of 0 or −1, the latter with probability q: their mean is q, their variance
    q (1 − q). A mean of d SDs has q = d² / (1 + d²). Seen: where `least_pairs` or more differ.
    """
    pairs, tests = 20, 8
    spreads = detectable_in_spreads(pairs, tests)
    assert spreads == pytest.approx(0.88, abs=0.005)
    share = spreads**2 / (1 + spreads**2)
    assert binom.sf(least_pairs(tests) - 1, pairs, share) == pytest.approx(0.54, abs=0.01)
    assert "in fewer of them where seeds tie" in power_planned(pairs, tests)
    text = summarise([arm("old", *[2.0] * 8), arm("new", *[1.0] * 8)], [("new", "old")])
    assert "Seeds that tie have no sign and lower this power." in text


def test_pairs_that_tie_do_not_count_for_a_verdict():
    """Of twenty pairs five differ, all with a loss: p cannot fall below 2/32."""
    arms = [arm("old", *[10.0] * 20), arm("new", *[10.0] * 15, *[11.0] * 5)]
    [found] = findings(arms, [("new", "old")])
    assert found.p_value == pytest.approx(2 / 32, rel=0.1)
    assert (found.comparison.pairs, found.comparison.differing) == (20, 5)
    assert found.verdict == TOO_FEW_DIFFER
    assert math.isinf(found.comparison.detectable)
    text = summarise(arms, [("new", "old")])
    row = "| new | old | 20, 5 differ |  | +0.25 (0.00 to +0.45) |"
    assert row in text and "| too few seeds differ |" in text
    assert judged(*[0.0] * 14, *[1.0] * 6) == "worse"  # one more is enough


def test_p_values_are_adjusted_for_their_number():
    """The smallest of three counts three times, the next twice; none is below one that is
    smaller.
    """
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    found = holm([0.01, math.nan, 0.02])
    assert (found[0], found[2]) == (0.02, 0.02)
    assert math.isnan(found[1])


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


def test_the_power_is_said_before_the_result():
    numbers = random.Random(1)
    old = [10.0 + numbers.gauss(0, 1) for _ in range(20)]
    arms = [arm("old", *old), arm("new", *(value + numbers.gauss(0, 1) for value in old))]
    text = summarise(arms, [("new", "old")])
    detectable = f"{compare(arms[1], arms[0]).detectable:.2f}"
    power, first, second, notes = text.strip().split("\n\n")
    assert power.startswith(
        "**Power.** With 20 seeds and one comparison, a true difference of 0.66"
    )
    assert f"With the spread found here, that is {detectable} percentage points." in power
    assert f"| arm | {TEST_ERROR} (mean ± SD) | median | runs | parameters (mean) |" in first
    row = second.splitlines()[2]
    assert row.startswith(f"| new | old | 20 | {detectable} | ")
    assert row.endswith("| no difference seen |")
    assert "one family" in notes


def test_arms_that_are_alike_are_called_identical():
    text = summarise([arm("old", *[10.0, 9.0] * 5), arm("new", *[10.0, 9.0] * 5)], [("new", "old")])
    assert "| new | old | 10 |  |  |  | identical |" in text
    assert "± 0.00)" not in text


def test_a_table_says_what_few_runs_cannot_show():
    text = summarise([arm("old", 10.0), arm("new", 9.5)], [("new", "old")])
    assert "Seeds: 1, which are too few." in text
    assert "| old | 10.00 | 10.00 | 1 | 1,000 |" in text
    assert "| new | old | 1 |  | -0.50 | 1 | too few seeds |" in text
    assert "Seeds: 0" in summarise([arm("old", 10.0)], [("new", "old")])


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
    text = summarise([first, second], [("random", "LFM-CW")], REGRET)
    assert "| LFM-CW | 0.50 ± 0.00 | 0.50 | 2 | 3 | 10,165 |" in text
    assert "it is compared with: 0.50 points in comparisons with LFM-CW." in text
    assert "No arm can gain" not in summarise([first, second], [("random", "LFM-CW")])
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


def test_a_figure_is_drawn_of_one_run_too(tmp_path):
    path = tmp_path / "figure.png"
    draw_comparison([arm("a long label of an arm", 1.0), arm("new", 2.0, 3.0)], "title", path)
    assert path.stat().st_size > 2000


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
    text = summarise([plain, ours], [("ours", "plain")], REGRET)
    assert text.count("| ours | plain |") == 2
    assert by_rank([plain, Summary(label="trained", errors={0: 1.0})]) == []
