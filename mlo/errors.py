"""Errors and warnings of mlo: what is wrong, what was received, what to do."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "ConfigurationError",
    "EngineError",
    "GraphError",
    "NonFiniteError",
    "ProblemError",
    "SolveWarning",
    "check_choice",
    "nearest",
    "warn_user",
]


class ProblemError(ValueError):
    """A problem is declared wrongly, or its loss returned something unusable."""


class GraphError(ValueError):
    """The problems do not form a valid dependency graph."""


class EngineError(ValueError):
    """A hypergradient engine is unknown, misconfigured or does not support this graph."""


class ConfigurationError(ValueError):
    """A configuration value has the wrong name, type or range."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or belongs to something else."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not finite, so its step was not made.

    Attributes:
        problem: name of the problem.
        round: number of the round, counted from 1.
        term: what is not finite: the loss, the direct gradient, or the implicit term through a
            lower problem.
        data: for a diagnostic file, as `save_checkpoint` takes it: losses, norms of the gradient by
            parameter, the gradient, the tensors of the batches, the random state before each, and
            which tensors were not finite already.
    """

    def __init__(
        self, message: str, *, problem: str, round: int, term: str, data: dict[str, Any]
    ) -> None:
        super().__init__(message)
        self.problem, self.round, self.term, self.data = problem, round, term, data


class CheckpointWarning(UserWarning):
    """A checkpoint was damaged or could not be written; the message says what happens instead."""


class SolveWarning(UserWarning):
    """A linear solve of a hypergradient engine failed (see `SolveReport`)."""


def nearest(name: str, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """Returns advice for a mistyped name: the closest valid one, and all of them.

    Args:
        name: as it was given.
        known: the valid names.
        others: what else the valid ones are called → the valid one. The keys are in lower case,
            without hyphens and underscores.
    """
    names = sorted(known)
    plain = "".join(filter(str.isalnum, name.lower()))
    meant = (others or {}).get(plain) or _closest(name, names)
    hint = "" if meant is None else f"Did you mean {meant!r}? "
    return f"{hint}Valid names: {', '.join(names) if names else '(none)'}."


def _closest(name: str, names: list[str]) -> str | None:
    """The valid name that a mistyped one is like, whatever its case; None if none is."""
    by_lower, given = {known.lower(): known for known in names}, name.lower()
    # Of two letters, one may be wrong (w3). Of more, half would suggest a name that is unrelated.
    close = difflib.get_close_matches(given, by_lower, n=1, cutoff=0.5 if len(given) < 3 else 0.6)
    if not close and len(given) > 3:
        close = [known for known in by_lower if given in known]  # mnist of fashion-mnist
    return by_lower[close[0]] if close else None


def check_choice(option: str, value: object, choices: Iterable[str | None]) -> None:
    """Raises a `ConfigurationError` for a value of an option that is none of its choices."""
    known = list(choices)
    if value not in known:
        raise ConfigurationError(f"{option} is {value!r}. {nearest(str(value), map(str, known))}")


def warn_user(message: str, category: type[UserWarning] = SolveWarning) -> None:
    """Issues a warning that points at the nearest line outside this package."""
    # `stacklevel` is how many frames up that line is, from `warnings.warn` on.
    # A backward pass runs in frames of PyTorch between ours and the user's.
    inside = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
