"""Tests of paired differences: by flipping signs, their intervals, their power, several at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.stats import t as student

__all__ = [
    "LEVEL", "POWER", "detectable_in_spreads", "holm", "least_pairs", "sign_flip_bounds",
    "sign_flip_p", "t_interval",
]  # fmt: skip

LEVEL, POWER = 0.05, 0.8
"""Of all tests: probability of a false positive, and of seeing what is called detectable."""

MOST_EXACT = 32
"""Pairs up to which all sign patterns count; beyond, `DRAWN_FLIPS` random ones stand for them."""

DRAWN_FLIPS = 2**16

BISECTIONS = 30
"""Halvings of the range of the differences: its 1e-9th part is left."""

MOST_SIMULATED, SIMULATED = 11, 2000
"""Pairs up to which the power is simulated, and the number of experiments."""


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value for the hypothesis that the mean difference is zero, by flipping signs.

    If the arms are alike, each seed's difference could as well have the other sign: p is the share
    of sign patterns with a mean at least as far from zero (Fisher 1935). It assumes only that the
    arms are interchangeable within a seed. Regrets over a list of cells are discrete, skewed, and
    often equal, which no parametric test allows for.

    Args:
        differences: one per seed.
    """
    values = np.asarray(differences, dtype=np.float64)
    least = abs(float(values.sum())) - 1e-9 * float(np.abs(values).sum())  # sums are rounded
    if len(values) <= MOST_EXACT:
        return float(_as_far(values, least) / 2.0 ** len(values))
    drawn = _drawn_flips(len(values))
    as_far = int((np.abs((2.0 * drawn - 1.0) @ values) >= least).sum())
    return (as_far + 1) / (DRAWN_FLIPS + 1)


def _drawn_flips(count: int) -> np.ndarray:
    """Random sign patterns, the same each time: ones for the pairs of one sign, zeros."""
    return np.random.default_rng(0).integers(0, 2, (DRAWN_FLIPS, count))


def _as_far(values: np.ndarray, least: float) -> int:
    """How many of all sign patterns have a sum at least `least` from zero.

    A pattern is one of the first half of the values with one of the second. With the sums of the
    second half in order, a search counts those that reach far enough with each sum of the first.
    """
    half = len(values) // 2
    first, second = _sums(values[:half]), np.sort(_sums(values[half:]))
    if least <= 0:
        return len(first) * len(second)
    above = len(second) - np.searchsorted(second, least - first, side="left")
    below = np.searchsorted(second, -least - first, side="right")
    return int(above.sum() + below.sum())


def _sums(values: np.ndarray) -> np.ndarray:
    """The sums of the values with each pattern of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def sign_flip_bounds(differences: Sequence[float], level: float) -> tuple[float, float]:
    """The interval of all true differences that `sign_flip_p` does not reject at this level.

    A true difference is tested by taking it off every pair. It is as far from the mean as p says
    where that share of the pairs' subsets has a mean beyond it (Hartigan 1969). So p only rises
    towards the mean, and bisection finds each end. Of drawn patterns the subsets' means are known.

    It assumes that differences are symmetric around the true one. A few failures of one arm, with
    large errors, break that: the end on their side is then too near.

    Args:
        differences: one per seed.
        level: of the test; the interval covers the true difference with probability 1 − level.

    Returns:
        Lower and upper end; infinite where this number of pairs can reject nothing at this level.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) == 0 or 2.0 ** (1 - len(values)) > level:
        return -math.inf, math.inf
    if len(values) > MOST_EXACT:
        drawn = _drawn_flips(len(values))
        means = (drawn @ values) / np.maximum(1, drawn.sum(axis=1))
        low, high = (float(np.quantile(means, q)) for q in (level / 2, 1 - level / 2))
        return low, high
    mean = float(values.mean())
    ends = (float(values.min()) - 1e-6, float(values.max()) + 1e-6)
    low, high = (_rejected_from(values, mean, end, level) for end in ends)
    return low, high


def _rejected_from(values: np.ndarray, inside: float, outside: float, level: float) -> float:
    """The end of the interval between a difference that is in it and one that is not."""
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        if sign_flip_p(values - middle) > level:
            inside = middle
        else:
            outside = middle
    return (inside + outside) / 2


def least_pairs(tests: int) -> int:
    """The number of differing pairs from which `sign_flip_p` can reach 5% divided by the tests.

    The least p-value of n pairs, all of one sign, is 2 / 2ⁿ. Ties do not lower it.
    """
    return 1 + math.ceil(math.log2(tests / LEVEL))


@cache
def detectable_in_spreads(pairs: int, tests: int = 1) -> float:
    """The true difference that is seen in 80% of experiments, in SDs of the paired differences.

    "Seen" means told from zero by `sign_flip_p` at 5% divided by `tests`, Holm's strictest level.
    The value is known before any run, for differences from a normal distribution: ties, as of
    regrets over a list of cells, lower the power below 80%. It is infinite for fewer pairs than
    `least_pairs`. Few pairs have few p-values, so up to `MOST_SIMULATED` it is simulated; beyond,
    it is that of the t-test, which is too small by 5% or less.
    """
    if pairs < least_pairs(tests):
        return math.inf
    if pairs <= MOST_SIMULATED:
        return _simulated_detectable(pairs, tests)
    freedom = pairs - 1
    quantiles = student.ppf(1 - LEVEL / tests / 2, freedom) + student.ppf(POWER, freedom)
    return float(quantiles) / math.sqrt(pairs)


def _simulated_detectable(pairs: int, tests: int) -> float:
    """The 80% quantile, over experiments, of the true difference from which on each is significant.

    Let T be the sum of an experiment's n values without the true difference d, and a that with a
    pattern of signs whose own sum is k. The pattern reaches as far as all plus signs do if
    |a + d k| ≥ T + d n, so up to d = max((a − T) / (n − k), −(a + T) / (n + k)). The experiment is
    significant once no more patterns do than the level allows.
    """
    values = np.random.default_rng(0).standard_normal((SIMULATED, pairs))
    # A pattern and its opposite reach equally far: the first sign is plus.
    sums, signs = values[:, :1], np.ones(1)
    for value in values[:, 1:].T[..., None]:
        sums = np.concatenate([sums + value, sums - value], axis=1)
        signs = np.concatenate([signs + 1, signs - 1])
    total, sums, signs = sums[:, :1], sums[:, 1:], signs[1:]  # all plus comes first
    reach = np.maximum((sums - total) / (pairs - signs), -(sums + total) / (pairs + signs))
    others = math.floor(LEVEL / tests * 2 ** (pairs - 1)) - 1
    place = reach.shape[1] - 1 - others
    return float(np.quantile(np.partition(reach, place, axis=1)[:, place], POWER))


def t_interval(deviation: float, pairs: int) -> float:
    """Half the width of Student's 95% confidence interval of a mean, for two or more pairs."""
    return float(student.ppf(1 - LEVEL / 2, pairs - 1)) * deviation / math.sqrt(pairs)


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
