"""Intervals of shares and the test of two shares, against known values."""

from __future__ import annotations

import pytest

from lfmcw_app.proportions import difference_by_chance, interval


def test_intervals_are_those_of_wilson():
    """Of 10 in 100; the ends stay within 0 and 100%."""
    assert interval(10, 100) == pytest.approx((5.5229, 17.4367), abs=1e-3)
    assert interval(2, 37) == pytest.approx((1.4951, 17.7050), abs=1e-3)
    assert interval(0, 50)[0] == 0.0
    assert interval(50, 50)[1] == 100.0
    assert interval(0, 0) == (0.0, 100.0)


def test_two_shares_differ_as_often_as_fisher_counts():
    """The tea of Fisher's lady: 3 of 4 right and 1 of 4 is 34/70, both sides counted."""
    assert difference_by_chance((3, 4), (1, 4)) == pytest.approx(34 / 70)
    assert difference_by_chance((2, 37), (3, 37)) == pytest.approx(1.0)
    assert difference_by_chance((0, 4), (4, 4)) == pytest.approx(2 / 70)
    assert difference_by_chance((5, 100), (5, 100)) == pytest.approx(1.0)
