"""Saved states of problems: copies of them, and checks that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mlo.errors import CheckpointError
from mlo.problem import Problem

__all__ = ["check_state", "copied"]


def check_state(problem: Problem, saved: Mapping[str, Any]) -> None:
    """Checks that a saved state fits its problem.

    Raises:
        CheckpointError: naming what differs.
    """
    own = problem.module.state_dict()
    theirs = saved.get("module", {})
    wrong = [
        key
        for key in own
        if key not in theirs
        or getattr(theirs[key], "shape", None) != getattr(own[key], "shape", None)
    ]
    wrong += [key for key in theirs if key not in own]
    for part, mine in (("optimizers", problem.optimizers), ("schedulers", problem.schedulers)):
        wrong += [f"{part}.{key}" for key in set(mine) ^ set(saved.get(part, {}))]
    wrong += [part for part in ("data", "updates", "memory") if part not in saved]
    if wrong:
        raise CheckpointError(
            f"The state of problem {problem.name!r} does not fit: "
            f"{', '.join(map(repr, wrong[:3]))} {'differ' if len(wrong) > 1 else 'differs'} in "
            "name or shape. It is of another model or declaration."
        )


def copied(value: Any) -> Any:
    """A nested state with every tensor in it copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(entry) for entry in value)
    return value
