"""Arms of an experiment compared over seeds."""

from __future__ import annotations

import math

import pytest

from lfmcw_app.comparison import Summary, compare, draw_comparison, holm, summarise


def arm(label, *errors):
    return Summary(
        label=label,
        errors=dict(enumerate(errors)),
        parameters=dict.fromkeys(range(len(errors)), 1000),
    )


def test_arms_are_compared_seed_by_seed():
    """Differences -1, -2, -3: mean -2, SD 1, t(0.975, 2) = 4.303; t = -2 √3 has p = 0.0742 with two
    degrees of freedom.
    """
    found = compare(arm("new", 9.0, 11.0, 13.0), arm("old", 10.0, 13.0, 16.0))
    assert found.difference == pytest.approx(-2.0)
    assert found.interval == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.p_value == pytest.approx(0.0742, abs=1e-4)
    quantiles = 4.3027 + 1.0607  # the second is t(0.8, 2)
    assert found.detectable == pytest.approx(quantiles / math.sqrt(3), rel=1e-4)
    assert found.pairs == 3


def test_only_seeds_that_both_have_are_paired():
    found = compare(arm("new", 9.0), arm("old", 10.0, 20.0))
    assert (found.difference, found.pairs) == (-1.0, 1)
    assert math.isnan(found.interval)
    other = Summary(label="other", errors={7: 1.0}, parameters={7: 1})
    assert compare(other, arm("old", 10.0)).pairs == 0


def test_p_values_are_adjusted_for_their_number():
    """The smallest of three counts three times, the next twice; none is below one that is
    smaller.
    """
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    found = holm([0.01, math.nan, 0.02])
    assert (found[0], found[2]) == (0.02, 0.02)
    assert math.isnan(found[1])


def test_a_table_says_what_one_run_cannot_show():
    text = summarise([arm("old", 10.0), arm("new", 9.5)])
    assert "| old | 10.00 | 1 |  |  |  | 1,000 |" in text
    assert "-0.50 (one pair only)" in text


def test_differences_without_spread_have_no_doubt():
    found = compare(arm("new", 9.0, 10.0), arm("old", 10.0, 11.0))
    assert (found.difference, found.interval, found.p_value) == (-1.0, 0.0, 0.0)
    same = compare(arm("new", 9.0, 10.0), arm("old", 9.0, 10.0))
    assert (same.difference, same.p_value) == (0.0, 1.0)


def test_an_arm_has_its_mean_and_deviation():
    found = arm("new", 1.0, 3.0)
    assert (found.mean, found.deviation) == (2.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(arm("one", 1.0).deviation)


def test_a_figure_is_drawn_of_one_run_too(tmp_path):
    path = tmp_path / "figure.png"
    draw_comparison([arm("a long label of an arm", 1.0), arm("new", 2.0, 3.0)], "title", path)
    assert path.stat().st_size > 2000
