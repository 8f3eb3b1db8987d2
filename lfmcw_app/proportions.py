"""Shares of wrong answers: their interval, and whether two differ by more than chance explains."""

from __future__ import annotations

import math

__all__ = ["difference_by_chance", "interval"]


def interval(errors: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of an error rate, in %, from `errors` wrong answers of `count`.

    Reference: Wilson, Probable Inference, the Law of Succession (1927).
    """
    if count == 0:
        return 0.0, 100.0
    share, square = errors / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half /= 1 + square / count
    return 100.0 * max(0.0, centre - half), 100.0 * min(1.0, centre + half)


def difference_by_chance(first: tuple[int, int], second: tuple[int, int]) -> float:
    """How often chance alone gives two equal error rates so different a number of errors, of 1.

    The test is exact and two-sided. It treats the answers of both as independent. Two networks that
    were tested on the same images often fail on the same ones, and then it is cautious.

    Args:
        first: wrong answers, and of how many.
        second: the same of the other.

    Reference: Fisher, The logic of inductive inference (1935).
    """
    from scipy.stats import fisher_exact  # slow to import

    table = [[errors, count - errors] for errors, count in (first, second)]
    return float(fisher_exact(table).pvalue)
