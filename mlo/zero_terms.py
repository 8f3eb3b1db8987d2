"""Warns of a problem that no gradient reaches through the solutions below it, and says why."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from mlo.backward import grad
from mlo.errors import warn_user
from mlo.gradient_paths import Engines
from mlo.graph import DependencyGraph
from mlo.hypergradient.first_order import FirstOrder
from mlo.problem import Problem, Tensors
from mlo.sharding import is_sharded
from mlo.solution import Evaluation, Started, Stationary, Stepped
from mlo.total_gradient import Flow

__all__ = ["ZeroTerms", "watched_problems"]

PATIENCE = 3
"""Updates after which a term that is zero for no known reason is reported.

It may be zero at the first one: a penalty's derivative at weights of zero, say, or a learning rate
that a scheduler raises from zero.
"""

Lower = dict[str, Started | Stationary | Stepped]
"""Problem → its solution, which is no constant."""

UNUSED = "It is detached, read under torch.no_grad(), or not used."

UNKNOWN = (
    f"That part of its gradient was exactly zero at the first {PATIENCE} updates: there the "
    "solution does not change with its value. Is its value only in terms of the lower loss that "
    "have no lower parameter in them?"
)
"""What is said where every loss depends on what it reads."""


def watched_problems(graph: DependencyGraph, engines: Engines) -> list[str]:
    """The problems whose gradients must contain a term through solutions, which may be zero.

    Not those of which an engine drops a part on purpose, nor sharded ones, nor those on the meta
    device, where there are no numbers.
    """
    found: list[str] = []
    for name, problem in graph.problems.items():
        dependent = graph.solutions_depending_on[name].intersection(graph.solutions_in[name])
        dropped = any(isinstance(engines[other], FirstOrder) for other in dependent)
        apart = problem.device.type == "meta" or any(map(is_sharded, problem.parameters.values()))
        estimated = problem.estimator is not None  # whose first values may be of earlier batches
        if dependent and not dropped and not apart and not estimated:
            found.append(name)
    return found


class ZeroTerms:
    """Looks at problems' first updates until something flows through the solutions below them.

    A detached tensor, a problem that a loss names and does not use, or a step of length zero leave
    a run that is finite, and in which an upper problem never hears of a lower one.

    Args:
        watched: the problems whose gradients contain responses.
    """

    def __init__(self, watched: Iterable[str]) -> None:
        self._zero = dict.fromkeys(watched, 0)

    def __contains__(self, name: str) -> bool:
        """Whether a problem is still watched."""
        return name in self._zero

    def look(self, evaluation: Evaluation, flow: Flow) -> None:
        """Looks at one gradient; warns if its part through solutions is exactly zero.

        Args:
            evaluation: of the problem, at an update.
            flow: what has reached its parameters through solutions.
        """
        name = evaluation.loss.problem.name
        lower: Lower = {}
        for other, solution in evaluation.solutions.items():
            if other not in evaluation.dependent:
                continue
            if not isinstance(solution, (Started, Stationary, Stepped)):
                return  # a problem in its warm-up
            lower[other] = solution
        # (Of a loss that is flat in the solutions, as at its optimum, the term is rightly zero.)
        flat = flow.read and not any(map(_any_nonzero, flow.read.values()))
        if flat or _any_nonzero(flow.tensors):
            del self._zero[name]
            return
        self._zero[name] += 1
        cause, certain = _cause(evaluation, flow.read, lower)
        if not certain and self._zero[name] < PATIENCE:
            return
        del self._zero[name]
        through = ", ".join(other for other in evaluation.loss.reads if other in lower)
        warn_user(f"No gradient reaches problem {name!r} through its read of {through}. {cause}")


def _any_nonzero(tensors: Iterable[Tensor]) -> bool:
    return any(bool(torch.count_nonzero(tensor)) for tensor in tensors)


def _cause(evaluation: Evaluation, read: Collection[str], lower: Lower) -> tuple[str, bool]:
    """Why nothing flows, and whether that is sure to stay so.

    Args:
        evaluation: of the problem.
        read: the problems on whose solutions its loss depends.
        lower: the solutions that should be functions of its value.
    """
    name = evaluation.loss.problem.name
    ignored = [other for other in evaluation.loss.reads if other in lower and other not in read]
    broken = [_ignored(name, other) for other in ignored]
    # Along the dependencies that are alive, from its loss to itself.
    certain = True
    waiting, seen = [lower[other] for other in read], set[int]()
    while waiting:
        solution = waiting.pop()
        if id(solution) in seen:
            continue
        seen.add(id(solution))
        if isinstance(solution, Stepped) and _stands_still(solution.evaluation.loss.problem):
            broken.append(f"The learning rate of {solution.name!r} is 0, so its step is, too.")
            certain &= not solution.evaluation.loss.problem.schedulers
            continue
        alive, dead = _sources(solution, {name, *evaluation.dependent})
        if name in alive:
            return UNKNOWN, False
        broken += [_ignored(solution.name, other) for other in dead]
        # As it has seen them; what it reads from above, as the problem itself has.
        seen_by = {} if isinstance(solution, Started) else solution.evaluation.solutions
        for other in alive:
            found = seen_by.get(other, lower.get(other))
            if isinstance(found, (Started, Stationary, Stepped)):
                waiting.append(found)
    return (" ".join(dict.fromkeys(broken)), certain) if broken else (UNKNOWN, False)


def _sources(
    solution: Started | Stationary | Stepped, names: Collection[str]
) -> tuple[list[str], list[str]]:
    """Those of some problems on which a solution depends, and those that its loss only names."""
    alive: list[str] = []
    if solution.start is not None:
        alive.append(solution.start.problem)
    if isinstance(solution, Started):
        return alive, []
    evaluation = solution.evaluation
    wanted = [other for other in evaluation.loss.reads if other in names]
    alive += _alive(evaluation, wanted)
    return alive, [other for other in wanted if other not in alive]


def _ignored(reader: str, read: str) -> str:
    return f"The loss of {reader!r} names {read!r} and does not depend on it. {UNUSED}"


def _stands_still(problem: Problem) -> bool:
    """Whether all learning rates of its optimizers are zero."""
    if problem.settings is not None:
        return False
    groups = [
        group for optimizer in problem.optimizers.values() for group in optimizer.param_groups
    ]
    rates = [group.get("lr") for group in groups]
    return all(rate is not None and float(rate) == 0.0 for rate in rates)


def _alive(evaluation: Evaluation, names: Collection[str]) -> list[str]:
    """Those of the problems that a loss reads on which its value depends.

    (What `after_step` and `settings` read counts as alive.)
    """
    problem = evaluation.loss.problem
    elsewhere = {*problem.after_step_reads, *problem.settings_reads}
    reads = evaluation.current_reads()
    leaves: list[Tensor] = []
    of: list[str] = []
    for name in names:
        if name not in elsewhere:
            reads[name] = {key: t.detach().requires_grad_() for key, t in reads[name].items()}
            leaves += reads[name].values()
            of += [name] * len(reads[name])
    if not leaves:
        return list(names)
    own: Tensors = {k: t.detach().requires_grad_() for k, t in evaluation.parameters.items()}
    with torch.enable_grad(), evaluation.losses(own, reads) as losses:
        total = torch.stack(list(losses.values())).sum()
        found = grad([total], leaves) if total.requires_grad else [None] * len(leaves)
    reached = {name for name, entry in zip(of, found, strict=True) if entry is not None}
    return [name for name in names if name in elsewhere or name in reached]
