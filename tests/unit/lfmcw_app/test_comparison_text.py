"""The text of a table."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from made_arms import arm
from scipy.stats import binom

from lfmcw_app.comparison import REGRET, TEST_ERROR, compare
from lfmcw_app.comparison_text import describe_planned_power, summarise
from lfmcw_app.paired_tests import detectable_in_spreads, least_pairs


def test_ties_lower_the_planned_power_and_notes_say_so():
    """Differences of 0 or −1, the latter with probability q: their mean is q, their variance
    q (1 − q). A mean of d SDs has q = d² / (1 + d²). Seen: where `least_pairs` or more differ.
    """
    pairs, tests = 20, 8
    spreads = detectable_in_spreads(pairs, tests)
    assert spreads == pytest.approx(0.88, abs=0.005)
    share = spreads**2 / (1 + spreads**2)
    assert binom.sf(least_pairs(tests) - 1, pairs, share) == pytest.approx(0.54, abs=0.01)
    assert "in fewer of them where seeds tie" in describe_planned_power(pairs, tests)
    text = summarise([arm("old", *[2.0] * 8), arm("new", *[1.0] * 8)], [("new", "old")])
    assert "Seeds that tie have no sign and lower this power." in text


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


def test_seeds_that_tie_are_counted_in_the_table():
    arms = [arm("old", *[10.0] * 20), arm("new", *[10.0] * 15, *[11.0] * 5)]
    text = summarise(arms, [("new", "old")])
    row = "| new | old | 20, 5 differ |  | +0.25 (0.00 to +0.45) |"
    assert row in text and "| too few seeds differ |" in text


def test_the_planned_power_says_when_seeds_are_too_few():
    assert "too few" in describe_planned_power(8, 8)
    assert "too few" not in describe_planned_power(9, 8)


def test_arms_that_were_looked_up_have_ranks_and_a_largest_gain():
    ranks = {0: 3, 1: 3}
    first = replace(arm("LFM-CW", 0.5, 0.5), ranks=ranks)
    second = replace(arm("random", 2.0, 2.0), ranks=ranks)
    text = summarise([first, second], [("random", "LFM-CW")], REGRET)
    assert "| LFM-CW | 0.50 ± 0.00 | 0.50 | 2 | 3 | 1,000 |" in text
    assert "it is compared with: 0.50 points in comparisons with LFM-CW." in text
    assert text.count("| random | LFM-CW |") == 2  # by regret, and by rank
    assert "No arm can gain" not in summarise([first, second], [("random", "LFM-CW")])
