"""Times, sizes and widths of texts, for people."""

from __future__ import annotations

import pytest

from lfmcw_app.units import duration, size, text_units


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, ("0.0", "s")),
        (19.96, ("20.0", "s")),
        (20.0, ("20", "s")),
        (119.0, ("119", "s")),
        (120.0, ("2.0", "min")),
        (7199.0, ("120.0", "min")),
        (7200.0, ("2.0", "h")),
        (3 * 86400.0, ("3.0", "days")),
        (700 * 86400.0, ("700.0", "days")),
        (3e11, ("9506.4", "years")),
    ],
)
def test_a_time_has_the_unit_that_suits_it(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, ("0", "kB")),
        (999_999, ("1e+03", "kB")),
        (1_500_000, ("1.5", "MB")),
        (12_345_678_901, ("12.3", "GB")),
    ],
)
def test_a_size_has_three_digits(count, expected):
    assert size(count) == expected


def test_east_asian_letters_are_twice_as_wide():
    assert text_units("abc") == 3
    assert text_units("猫a") == 3
    assert text_units("정상") == 4
