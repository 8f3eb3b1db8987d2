"""Which solutions gradients flow through, given what losses read and the engines chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mlo.distributed import DataParallel
from mlo.graph import DependencyGraph
from mlo.hypergradient.first_order import FirstOrder
from mlo.restart import Start
from mlo.solution import AbstractEngine

__all__ = [
    "Engines",
    "differentiated_problems",
    "differentiated_starts",
    "estimates_total",
    "inner_responses",
    "readers_of_response",
    "why_graph_cannot_be_kept",
]

Engines = Mapping[str, AbstractEngine]
"""Problem → engine of its solution."""


def differentiated_problems(graph: DependencyGraph, engines: Engines) -> frozenset[str]:
    """The problems whose solutions some total gradient differentiates."""
    # Over all problems: what is read inside a solution is in that problem's own `solutions_in`.
    read: set[str] = set()
    for name in graph.problems:
        read.update(graph.solutions_in[name])
    return frozenset(name for name in read if not isinstance(engines[name], FirstOrder))


def differentiated_starts(
    graph: DependencyGraph, engines: Engines, starts: Mapping[str, Start]
) -> frozenset[str]:
    """The problems through whose solutions a gradient flows into the value they started from.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.
        starts: problem → where it starts each block of its steps.
    """
    found: set[str] = set()
    for name, start in starts.items():
        # The source's own gradient, and those of problems above that see both by their solutions.
        for reader, solutions in graph.solutions_in.items():
            passes = start.problem in solutions
            passes = passes and not isinstance(engines[start.problem], FirstOrder)
            if name in solutions and start.source_of and (reader == start.problem or passes):
                found.add(name)
    return frozenset(found)


def inner_responses(graph: DependencyGraph, engines: Engines, name: str) -> Iterator[str]:
    """The problems whose responses the problem's own gradient contains."""
    for inner in graph.solutions_in[name]:
        # A solution that does not depend on the problem's own value is a constant in its gradient.
        dependent = inner in graph.solutions_depending_on[name]
        # (`first_order` passes the derivative on to the solution's start.)
        passes = not isinstance(engines[inner], FirstOrder) or graph.problems[inner].restart_from
        if dependent and passes:
            yield inner


def readers_of_response(graph: DependencyGraph, engines: Engines, name: str) -> list[str]:
    """The differentiated problems whose own gradients contain the response of a problem."""
    differentiated = differentiated_problems(graph, engines)
    return [
        other
        for other in graph.problems
        if other in differentiated and name in set(inner_responses(graph, engines, other))
    ]


def why_graph_cannot_be_kept(
    graph: DependencyGraph, engines: Engines, name: str, parallel: DataParallel | None
) -> str:
    """Why a problem's gradient is a sum of several, or has no graph to keep; empty if neither."""
    if any(inner_responses(graph, engines, name)):
        return "contains the response of another problem"
    if graph.problems[name].accumulate > 1:
        return "is averaged over several batches"
    if parallel is not None:
        return "is averaged over processes"
    if graph.problems[name].restart_from is not None:
        return "depends on the value that it restarts from"
    return ""


def estimates_total(graph: DependencyGraph, engines: Engines, name: str) -> bool:
    """Whether a problem's estimator corrects its total gradient rather than its terms.

    `soba` is linear in means over batches: it takes corrected cotangents and corrects its products.
    Other engines' results are not linear in the batch, so there the total gradient is corrected.
    """
    through = [engines[inner] for inner in inner_responses(graph, engines, name)]
    return any(not engine.takes_estimates for engine in through)
