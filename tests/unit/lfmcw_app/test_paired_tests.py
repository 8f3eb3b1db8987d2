"""Tests of paired differences, against enumeration, SciPy and simulation."""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import permutation_test

from lfmcw_app.paired_tests import (
    detectable_in_spreads,
    holm,
    least_pairs,
    sign_flip_bounds,
    sign_flip_p,
)


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


@pytest.mark.parametrize(("pairs", "tests"), [(6, 1), (7, 1), (10, 8), (12, 2)])
def test_what_is_detectable_is_seen_in_80_percent_of_experiments(pairs, tests):
    """Experiments with exactly that true difference, in which the SD has to be estimated too."""
    numbers = random.Random(0)
    effect = detectable_in_spreads(pairs, tests)
    seen = sum(
        sign_flip_p([numbers.gauss(effect, 1.0) for _ in range(pairs)]) < 0.05 / tests
        for _ in range(800)
    )
    assert 0.76 < seen / 800 < 0.84


@pytest.mark.parametrize("tests", [1, 2, 5, 8])
def test_the_fewest_pairs_detect_only_what_gives_all_one_sign(tests):
    """n normal differences with mean d and SD 1 are all positive with probability Φ(d)ⁿ."""
    pairs = least_pairs(tests)
    detectable = detectable_in_spreads(pairs, tests)
    assert NormalDist().cdf(detectable) ** pairs == pytest.approx(0.8, abs=0.02)


def test_fewer_seeds_than_a_test_needs_can_see_nothing():
    """n pairs of one sign have p = 2 / 2ⁿ: 6 pairs are needed for 5%, 9 for an eighth of it."""
    assert [least_pairs(tests) for tests in (1, 2, 5, 8)] == [6, 7, 8, 9]
    for tests in (1, 2, 5, 8):
        assert sign_flip_p([1.0] * least_pairs(tests)) <= 0.05 / tests
        assert sign_flip_p([1.0] * (least_pairs(tests) - 1)) > 0.05 / tests
    assert math.isinf(detectable_in_spreads(8, 8))
    assert detectable_in_spreads(9, 8) < math.inf


def test_p_values_are_adjusted_for_their_number():
    """The smallest of three counts three times, the next twice; none is below one that is
    smaller.
    """
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    found = holm([0.01, math.nan, 0.02])
    assert (found[0], found[2]) == (0.02, 0.02)
    assert math.isnan(found[1])
