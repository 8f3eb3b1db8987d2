"""Refuses code of the user's that moves a solution where its derivative would miss the move.

A loss, a hook before or after an update, and an optimizer of one's own may write to parameters. If
the solution is differentiated, such a change would be missing in its derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlo.advice import WITHOUT_STEPS
from mlo.errors import ProblemError
from mlo.history import History
from mlo.inner_optimizer import is_foreign
from mlo.problem import Problem, Tensors
from mlo.sharding import is_sharded
from mlo.solution import StepEngine
from mlo.tensors import copied_options, copies

__all__ = ["MoveChecks", "check_groups", "kept_in_groups"]


class _Watched(NamedTuple):
    """A problem's parameters before its loss was evaluated."""

    versions: list[int]
    values: Sequence[Tensor] | None


class MoveChecks:
    """Calls hooks, and watches losses.

    Args:
        history: which solutions are differentiated, and by which engines.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._written: set[str] = set()  # problems whose losses write to their parameters

    def call_before(
        self, problem: Problem, hook: Callable[[Problem], object], engine: StepEngine | None
    ) -> None:
        """Calls `before_update`; if an engine differentiates the step, it may change nothing.

        Raises:
            ProblemError: naming what it changed.
        """
        if engine is None:
            hook(problem)
            return
        before = {
            key: None if parameter.grad is None else parameter.grad.clone()
            for key, parameter in problem.parameters.items()
        }
        seen = self._copied_values(problem)
        hook(problem)
        for key, parameter in problem.parameters.items():
            if not _same(before[key], parameter.grad):
                raise ProblemError(
                    f"before_update of problem {problem.name!r} changed the gradient of {key!r}, "
                    f"and the engine {engine.label!r} differentiates the step, in which the change "
                    "would be missing. Put the change into the loss or the optimizer (grad_clip= "
                    "clips), or give the problem an engine that does not differentiate steps"
                    + self._history.losses[problem.name].advice.phrase(
                        ", such as {}", *WITHOUT_STEPS
                    )
                    + "."
                )
        changed = self._changed_value(problem, seen)
        if changed:
            raise ProblemError(
                f"before_update of problem {problem.name!r} changed {changed}, and the engine "
                f"{engine.label!r} differentiates the step from the gradient that was taken before "
                "the change. Change values between rounds, make the change part of the loss, of "
                "the optimizer or of after_step=, or give the problem the engine 'first_order'."
            )

    def call_after(self, problem: Problem, hook: Callable[[Problem], object]) -> None:
        """Calls `after_update`, which may not move a solution that is differentiated.

        Raises:
            ProblemError: naming what it changed.
        """
        if problem.name not in self._history.differentiated:
            hook(problem)
            self._history.mark(problem.name)
            return
        # A change would be missing in the derivative, so it is refused instead of differentiated.
        seen = self._copied_values(problem)
        hook(problem)
        changed = self._changed_value(problem, seen)
        if changed:
            raise ProblemError(
                f"after_update of problem {problem.name!r} changed {changed}, and the engine "
                f"{self._history.engines[problem.name].label!r} differentiates its solution, in "
                "which the change would be missing. Make the change part of the loss, of the "
                "optimizer or of after_step=, or give the problem the engine 'first_order'."
            )

    def watched(self, problem: Problem) -> _Watched | None:
        """What to compare a problem's parameters with after its loss was evaluated.

        None if the loss may move them: its solution is not differentiated, or one step of it from a
        start that is a constant, as the moved start is too. Sharded parameters are not compared.
        """
        engine = self._history.engines[problem.name]
        one = isinstance(engine, StepEngine) and engine.recorded_steps == 1
        if problem.name not in self._history.differentiated or (one and not problem.restart_from):
            return None
        if self._history.losses[problem.name].sharded:
            return None
        parameters = problem.parameters.values()
        # Versions do not tell of changes by `.data`, nor whether a value is another one.
        due = self._history.losses[problem.name].checks.is_due("moves in its loss")
        values = copies(parameters) if due or problem.name in self._written else None
        return _Watched([parameter._version for parameter in parameters], values)

    def check_unmoved(self, problem: Problem, before: _Watched | None) -> None:
        """Refuses a loss that has moved what `watched` returned.

        Raises:
            ProblemError: naming the parameter.
        """
        if before is None:
            return
        parameters = problem.parameters
        if before.values is None:
            versions = [parameter._version for parameter in parameters.values()]
            if versions != before.versions:
                self._written.add(problem.name)  # from the next update on, values are compared
            return
        for (key, parameter), value in zip(parameters.items(), before.values, strict=True):
            if not _same(value, parameter):
                raise ProblemError(
                    f"The loss of problem {problem.name!r} changes its parameter {key!r} in place, "
                    f"and the engine {self._history.engines[problem.name].label!r} differentiates "
                    "its solution, in which the change would be missing. Compute with a changed "
                    "copy (for max_norm= of an embedding: scale the rows that it returns), project "
                    "in after_step=, or give the problem the engine 'first_order'."
                )

    def _copied_values(self, problem: Problem) -> dict[str, Tensors]:
        """Problem → copies of its parameters: this one, and all that its solution depends on."""
        copied: dict[str, Tensors] = {}
        for name in (problem.name, *self._history.graph.reads[problem.name]):
            live = self._history.graph.problems[name].parameters
            copied[name] = dict(zip(live, copies(live.values()), strict=True))
        return copied

    def _changed_value(self, problem: Problem, before: Mapping[str, Tensors]) -> str:
        """The first parameter that is not as it was, in words; empty if all are."""
        for name, copied in before.items():
            for key, parameter in self._history.graph.problems[name].parameters.items():
                if not _same(copied[key], parameter):
                    if name == problem.name:
                        return f"its parameter {key!r}"
                    return f"the parameter {key!r} of problem {name!r}, which it reads"
        return ""


def kept_in_groups(problem: Problem) -> list[tuple[Optimizer, dict[str, Any]]]:
    """The entries of the groups of own optimizers that a restart should make fresh."""
    found: list[tuple[Optimizer, dict[str, Any]]] = []
    if problem.restart_from is not None:
        for optimizer in filter(is_foreign, problem.optimizers.values()):
            found += [(optimizer, copied_options(group)) for group in optimizer.param_groups]
    return found


def check_groups(problem: Problem, kept: list[tuple[Optimizer, dict[str, Any]]]) -> None:
    """Refuses an optimizer that keeps state where a restart does not find it.

    Args:
        problem: whose optimizers have moved.
        kept: what `kept_in_groups` returned before that.

    Raises:
        ProblemError: naming the entry.
    """
    now = kept_in_groups(problem)
    for (optimizer, before), (_, after) in zip(kept, now, strict=True):
        for key, value in after.items():
            if key not in before or not _same(before[key], value):
                raise ProblemError(
                    f"Problem {problem.name!r} restarts with a fresh optimizer, but a step of "
                    f"its {type(optimizer).__name__} has changed {key!r} of a group, which a "
                    "restart leaves as it is, since settings such as the learning rate are "
                    "there too. Let the optimizer keep it in `state`."
                )


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors, or two entries of a group, have the same values; NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if torch.equal(one, other):
            return True
        if is_sharded(one) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and bool(one == other))
