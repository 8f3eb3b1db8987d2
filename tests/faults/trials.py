"""A fault of the campaign and its end: what is lost, and what is unclear."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from forked_runs import TRACEBACK, Runs

REFUSED = 2
"""The exit code of an error that is told in words."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fault and its end.

    Attributes:
        what: the fault.
        path: the run's folder.
        lost: what of the run is not as in the undisturbed one; empty if all is.
        unclear: what was not said, or not as it was; empty if all was.
    """

    what: str
    path: Path | None
    lost: str = ""
    unclear: str = ""


Kind = Callable[[Runs, int, float, int, random.Random], Iterator[Trial]]
"""Takes the runs, the changes of files and the seconds of an undisturbed one, the largest number
of faults, and a source of random numbers.
"""


def numbers(count: int, most: int, rng: random.Random) -> list[int]:
    """All numbers below a count, or so many of them."""
    return sorted(rng.sample(range(count), min(count, most)))


def resumed(runs: Runs, path: Path, what: str, unclear: str = "") -> Trial:
    """The trial of a run that can be resumed, and must end like an undisturbed one."""
    code = runs.completed(path)
    lost = runs.difference(path) if code == 0 else f"exit code {code} where it was resumed"
    return Trial(what=what, path=path, lost=lost, unclear=unclear)


def said(code: int, *expected: int) -> str:
    """What is unclear about an exit code."""
    if code in expected:
        return ""
    return "a traceback" if code == TRACEBACK else f"exit code {code}"
