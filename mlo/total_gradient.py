"""`total_gradient`: a loss's gradient, including the part through the solutions that it reads.

It lets each solution's engine make its response (`response.py`). It evaluates the loss with the
responses detached from their graphs, and takes the direct gradient and the responses' cotangents.
Then it sends the cotangents through the responses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from operator import attrgetter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from mlo.backward import grad
from mlo.distributed import ACTIVE, running_statistics
from mlo.estimators import Estimates, Point
from mlo.gradient_sums import GradientSums
from mlo.loss import Examine
from mlo.problem import Problem, Tensors
from mlo.randomness import RandomState
from mlo.records import SolveReport
from mlo.response import IS_NONE, PullbackEngine, pulled_back
from mlo.solution import (
    Constant,
    Evaluation,
    GradientGraph,
    Reading,
    Solution,
    Stationary,
    Stepped,
    restore_buffers,
)
from mlo.tensors import add, add_all, zeros_for_none

__all__ = ["Flow", "TotalGradient", "total_gradient"]

NOTHING: frozenset[str] = frozenset()
P = ParamSpec("P")
R = TypeVar("R")

REQUIRES_GRAD = attrgetter("requires_grad")


@dataclass(kw_only=True, eq=False)
class TotalGradient:
    """A problem's total gradient at one point, and what came with it.

    Attributes:
        gradient: parameter → gradient; zero for parameters that no loss depends on, or whose player
            rests.
        unused: the names of these parameters. Their optimizer leaves them alone, as it does in
            plain PyTorch.
        losses: player → loss, averaged over the batches.
        metrics: what the loss returned beside it.
        reports: its solves.
        evaluation: where it was taken, with the random state before each batch.
        has_derivative: whether the loss depends on any parameter at all.
        graph: the gradient with its graph, where it was to be kept.
    """

    gradient: Tensors
    unused: frozenset[str]
    losses: dict[str, Tensor]
    metrics: dict[str, Any]
    reports: list[SolveReport]
    evaluation: Evaluation
    has_derivative: bool
    graph: GradientGraph | None = None


@dataclass(kw_only=True, eq=False)
class Flow:
    """What reaches a problem's parameters through the solutions that its loss reads.

    Attributes:
        tensors: the terms of its gradient that came through solutions.
        read: problem on whose solution its loss depends → the derivatives in its parameters.
    """

    tensors: list[Tensor] = field(default_factory=list)
    read: dict[str, list[Tensor]] = field(default_factory=dict)

    def note_read(self, cut: _Cut, cotangents: Sequence[Tensor | None]) -> None:
        """Notes the problems on whose leaves a loss depends."""
        for leaf, v in zip(cut.names, cotangents, strict=True):
            if v is not None:
                self.read.setdefault(leaf.partition("/")[0], []).append(v)


def _with_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which enables gradients where the caller has disabled them."""

    @wraps(function)
    def enabled(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.enable_grad():
            return function(*args, **kwargs)

    return enabled


@_with_gradients
def total_gradient(
    evaluation: Evaluation,
    *,
    is_update: bool = False,
    players: Collection[str] | None = None,
    keep_graph: bool = False,
    held_constant: frozenset[str] = frozenset(),
    examine: Examine | None = None,
    displaced: bool = False,
    linked: bool = False,
    estimates: Estimates | None = None,
    begun: RandomState | None = None,
    flow: Flow | None = None,
) -> TotalGradient:
    """Evaluates a problem's loss at its live parameters; differentiates it through solutions too.

    The loss sees the responses detached from their graphs. Their cotangents are summed over the
    batches and sent through the responses at the end. So each inverse product is computed once,
    however many batches are averaged.

    Args:
        evaluation: the problem, its batches, and what it reads; its random states are drawn now.
        is_update: whether the problem's own buffers may change, as they do in its own update.
        players: those whose losses are differentiated, each in its own parameters; None: all.
        keep_graph: whether the gradient's graph is kept, for a problem whose gradient contains no
            response.
        held_constant: problems whose solutions are treated as constants.
        examine: is shown each player's loss on the first batch, before it is differentiated.
        displaced: whether aliases stand for the own parameters, as copies do for a kept graph.
        linked: whether what is read requires gradients, as it does for a kept graph.
        estimates: corrects the gradient, or its terms.
        begun: the random state now, where it is known.
        flow: is told what came through solutions.
    """
    loss, problem = evaluation.loss, evaluation.loss.problem
    live: Any = problem.parameters  # which are only read
    reading = Reading(
        values={**evaluation.values, problem.name: live},
        solutions=evaluation.solutions,
        reader=problem.name,
        held_constant=held_constant,
    )

    # 1. What the loss reads, as leaves that are detached from their graphs.
    lone = _lone_response(evaluation, reading) if estimates is None else None
    cut = _cut_reads(evaluation, reading, keep_graph=keep_graph or linked, lone=lone)

    # 2. The direct gradient, and the cotangents of what is read.
    parameters: Tensors = live
    own: Tensors = parameters if loss.sharded else {}  # empty: the live ones stay in place
    if keep_graph:
        # At copies, which the step will not change.
        own = parameters = {}
        for key, tensor in evaluation.parameters.items():
            parameters[key] = tensor.detach().requires_grad_()
    elif displaced and not loss.sharded:
        # What the loss does to them in place, it does to the live ones.
        own = parameters = {key: p.detach().requires_grad_() for key, p in live.items()}
    parallel = loss.parallel
    begun = begun or RandomState.capture(problem.generators)

    def differentiated() -> GradientSums:
        placed = evaluation.substituted(own, cut.tensors, is_update=is_update)
        with placed if ACTIVE[-1] is parallel else loss.among_processes(parallel, placed):
            return loss.differentiate(
                evaluation.batches,
                parameters,
                cut.leaves,
                players=players,
                create_graph=keep_graph,
                examine=examine,
                versions=evaluation.versions,
                begun=begun,
            )

    try:
        found = differentiated()
    except RuntimeError as error:
        if not loss.lends_after(error):
            raise
        begun.restore(problem.generators)
        if is_update:
            restore_buffers(evaluation)
        found = differentiated()

    evaluation.random_states, evaluation.value = tuple(found.random_states), dict(found.losses)

    # 3. The implicit term. Exact parallelism averages the cotangents before they pass through the
    # responses, which gives the inverse product of the mean. Otherwise the total is averaged at the
    # end.
    moving = running_statistics(problem.module) if is_update and parallel is not None else []
    if parallel is not None and parallel.exact:
        found.average(parallel, moving)
        evaluation.value = dict(found.losses)  # as evaluations that are repeated are averaged
    estimated = None
    if estimates is not None and not held_constant:  # of a part of the gradient nothing is kept
        estimated = _Estimated(
            evaluation=evaluation,
            players=tuple(found.direct),
            estimates=estimates,
            reports=reading.reports,
        )
    corrected = found if estimated is None else estimated.terms(found, cut)
    gradient = _with_implicit_term(problem, reading, corrected, cut, flow)
    if estimated is not None:
        gradient = estimated.total(gradient)
    if parallel is not None and not parallel.exact:
        found.average(parallel, moving, gradient=gradient)
    # A response's node holds the reading, which holds the response. PyTorch does not free such a
    # cycle, nor does Python's collector where the node has several outputs.
    reading.responses.clear()

    # 4. What is kept for later.
    graph = None
    if keep_graph:
        if is_update:
            _copy_changed(problem, parameters)
        graph = _kept_graph(problem, parameters, cut.tensors, found)
        for key, value in gradient.items():
            gradient[key] = None if value is None else value.detach()
    full, unused = _with_zeros(problem, gradient)
    return TotalGradient(
        gradient=full,
        unused=unused,
        losses=found.losses,
        metrics=found.metrics,
        reports=reading.reports,
        evaluation=evaluation,
        has_derivative=found.has_derivative,
        graph=graph,
    )


def _with_zeros(
    problem: Problem, gradient: Mapping[str, Tensor | None]
) -> tuple[Tensors, frozenset[str]]:
    """The gradient with zeros for parameters on which the loss does not depend, and their names."""
    full: Tensors = {}
    unused: list[str] = []
    for key, parameter in problem.parameters.items():
        value = gradient.get(key)
        if value is None:
            unused.append(key)
            value = torch.zeros_like(parameter)
        full[key] = value
    return full, frozenset(unused) if unused else NOTHING


@dataclass(kw_only=True, eq=False)
class _Cut:
    """What a loss reads, detached from its origin.

    Attributes:
        tensors: problem → the tensors that the loss sees.
        responses: the differentiable tensors on the far side of the cut; none with `lone`.
        leaves: what represents each of them on the loss's side.
        names: the name of each leaf.
        lone: the only response, which is pulled back without a node.
    """

    tensors: dict[str, Tensors]
    responses: list[Tensor]
    leaves: list[Tensor]
    names: list[str]
    lone: _Lone | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Lone:
    """The only response that a loss reads, as a function of values alone.

    Autograd has nothing to add up behind it, so that its node would only pass things on.

    Attributes:
        solution: whose response.
        inputs: the values that it depends on, flat.
    """

    solution: Stationary | Stepped
    inputs: list[Tensor]

    def pulled(self, reading: Reading, cotangents: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Id of an input → what flows into it."""
        if all(map(IS_NONE, cotangents)):
            return {}
        enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # `no_grad` takes twice the time, in each round
        try:
            found = pulled_back(
                self.solution,
                reading,
                tuple(self.solution.value.values()),
                self.inputs,
                wanted=list(map(REQUIRES_GRAD, self.inputs)),
                differentiate=False,
                cotangents=cotangents,
            )
        finally:
            torch.set_grad_enabled(enabled)
        flows: dict[int, Tensor] = {}
        for tensor, entry in zip(self.inputs, found, strict=True):
            if entry is not None:
                flows[id(tensor)] = entry
        return flows


def _lone_response(evaluation: Evaluation, reading: Reading) -> _Lone | None:
    """The only response that the loss reads, where that can be pulled back without a node."""
    found: Any = None
    for name in evaluation.loss.reads:
        solution = evaluation.solutions.get(name)
        if solution is None or name not in evaluation.dependent or type(solution) is Constant:
            continue
        if found is not None or name in reading.held_constant:
            return None
        found = solution
    if found is None or evaluation.loss.problem.is_game:
        return None
    # An engine whose response is not the node must be asked for it.
    if type(found.engine).respond is not PullbackEngine.respond:
        return None
    inputs: list[Tensor] = []
    for item in found.evaluation.free_inputs:
        # A problem between the two stands for its own response, which has to have its node, also
        # where the loss does not name it.
        if item.solution is not None or item.name not in reading.values:
            return None
        inputs += reading.values[item.name].values()
    return _Lone(solution=found, inputs=inputs)


def _cut_reads(
    evaluation: Evaluation, reading: Reading, *, keep_graph: bool, lone: _Lone | None = None
) -> _Cut:
    """Resolves what a loss reads, as leaves whose cotangents return through the responses.

    A kept graph is later differentiated with respect to everything that the solution depends on, so
    these tensors require gradients too.
    """
    cut = _Cut(tensors={}, responses=[], leaves=[], names=[], lone=lone)
    inputs = {item.name for item in evaluation.free_inputs} if keep_graph else NOTHING
    for other in evaluation.loss.reads:
        solution = evaluation.solutions.get(other)
        if lone is not None and solution is lone.solution:
            responds = any(map(REQUIRES_GRAD, lone.inputs))
            leaves = cut.tensors[other] = {}
            for key, tensor in lone.solution.value.items():
                leaf = leaves[key] = tensor.detach()
                if responds:
                    leaf.requires_grad_()
                    cut.leaves.append(leaf)
                    cut.names.append(f"{other}/{key}")
            continue
        if type(solution) is Constant and other not in inputs:
            cut.tensors[other] = solution.constants()
            continue
        # A solution that does not depend on the own value contributes nothing to this gradient.
        depends = solution is None or other in evaluation.dependent
        read = reading.tensors(other) if solution is None or depends else solution.value
        if not depends and other not in inputs:
            cut.tensors[other] = {key: tensor.detach() for key, tensor in read.items()}
            continue
        leaves = cut.tensors[other] = {}
        for key, tensor in read.items():
            responds = depends and tensor.requires_grad
            leaf = leaves[key] = tensor.detach()
            if responds or other in inputs:
                leaf.requires_grad_()
            if responds:
                cut.responses.append(tensor)
                cut.leaves.append(leaf)
                cut.names.append(f"{other}/{key}")
    return cut


def _with_implicit_term(
    problem: Problem,
    reading: Reading,
    found: GradientSums,
    cut: _Cut,
    flow: Flow | None = None,
) -> dict[str, Tensor | None]:
    """Parameter → direct gradient plus what flows through the responses; None: neither."""
    # None stays None, so that an optimizer skips a parameter on which nothing depends.
    total: dict[str, Tensor | None] = {}
    players = list(found.direct)
    for player, direct in found.direct.items():
        names = problem.player_parameters[player]
        total.update(zip(names, direct, strict=True))
        if flow is not None:
            flow.note_read(cut, found.cotangents[player])
        if cut.lone is not None:
            flows = cut.lone.pulled(reading, found.cotangents[player])
            for name in names:
                through = flows.get(id(reading.values[problem.name][name]))
                if through is not None:
                    total[name] = add(total[name], through)
                    if flow is not None:
                        flow.tensors.append(through)
            continue
        responses = cut.responses
        if not responses:
            continue
        reached: list[Tensor] = []
        cotangents: list[Tensor] = []
        for tensor, v in zip(responses, found.cotangents[player], strict=True):
            if v is not None:
                reached.append(tensor)
                cotangents.append(v)
        if not reached:
            continue
        # Each player has its own cotangents, and so its own solves.
        reading.reader = f"{problem.name}.{player}" if problem.is_game else problem.name
        implicit = grad(
            reached,
            [reading.values[problem.name][name] for name in names],
            cotangents,
            retain_graph=player != players[-1],
        )
        if flow is not None:
            flow.tensors += [entry.detach() for entry in implicit if entry is not None]
        total.update(zip(names, add_all(direct, implicit), strict=True))
    return total


def _kept_graph(
    problem: Problem, parameters: Tensors, reads: dict[str, Tensors], found: GradientSums
) -> GradientGraph:
    of_player: dict[str, Tensors] = {}
    for player, names in problem.player_parameters.items():
        own = list(map(parameters.__getitem__, names))
        full = zeros_for_none(found.direct[player], own)
        of_player[player] = dict(zip(names, full, strict=True))
    return GradientGraph(parameters=parameters, reads=reads, gradients=of_player)


def _copy_changed(problem: Problem, parameters: Tensors) -> None:
    """Repeats on the live parameters what the loss did in place to the copies of them.

    (`nn.Embedding(max_norm=…)` renormalises its weights so.)
    """
    for key, tensor in parameters.items():
        if tensor._version > 0:  # the copy was new, and has been changed since
            with torch.no_grad():
                problem.parameters[key].copy_(tensor)


# ------------------------------ estimated gradients


@dataclass(frozen=True, kw_only=True, eq=False)
class _Estimated:
    """The gradient of one evaluation, corrected by the problem's estimator.

    Attributes:
        evaluation: where it was taken, with the random states that it began from.
        players: whose gradients.
        estimates: what corrects them.
        reports: where those of solves at other points are added.
    """

    evaluation: Evaluation
    players: tuple[str, ...]
    estimates: Estimates
    reports: list[SolveReport]

    def terms(self, found: GradientSums, cut: _Cut) -> GradientSums:
        """The direct gradients and cotangents as estimated, unless the total is."""
        if self.estimates.of_total:
            return found

        def again(point: Point) -> dict[str, Tensor | None]:
            there, elsewhere, reading = self._taken_at(point)
            reading.responses.clear()  # as in `total_gradient`
            return dict(self._named(there, elsewhere.names))

        named = self._estimate("terms", dict(self._named(found, cut.names)), again)
        rest = iter(named.values())
        direct: dict[str, list[Tensor | None]] = {}
        cotangents: dict[str, list[Tensor | None]] = {}
        for player in found.direct:
            direct[player] = [next(rest) for _ in found.direct[player]]
            cotangents[player] = [next(rest) for _ in found.cotangents[player]]
        return found.replaced(direct, cotangents)

    def total(self, gradient: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The total gradient as estimated, unless its terms were."""
        if not self.estimates.of_total:
            return gradient

        def again(point: Point) -> dict[str, Tensor | None]:
            there, elsewhere, reading = self._taken_at(point)
            problem = self.evaluation.loss.problem
            gradient = _with_implicit_term(problem, reading, there, elsewhere)
            reading.responses.clear()
            self.reports.extend(reading.reports)
            return gradient

        return self._estimate("total", gradient, again)

    def _estimate(
        self,
        group: str,
        found: Mapping[str, Tensor | None],
        again: Callable[[Point], Mapping[str, Tensor | None]],
    ) -> dict[str, Tensor | None]:
        return self.estimates.estimate(
            f"{group} {' '.join(self.players)}",
            self.evaluation.batches,
            found,
            point=self._point,
            again=again,
        )

    def _named(
        self, found: GradientSums, leaves: Sequence[str]
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Name → each direct gradient and cotangent, player by player."""
        problem = self.evaluation.loss.problem
        for player, direct in found.direct.items():
            for key, value in zip(problem.player_parameters[player], direct, strict=True):
                yield f"{player}/direct {key}", value
            for key, value in zip(leaves, found.cotangents[player], strict=True):
                yield f"{player}/cotangent {key}", value

    def _point(self) -> Point:
        """Where the evaluation was made: the tensors of all problems that it depends on."""
        found: dict[str, Tensors] = {}
        _collect_point(self.evaluation, found)
        point: Point = {}
        for name, tensors in found.items():
            point |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
        return point

    def _taken_at(self, point: Point) -> tuple[GradientSums, _Cut, Reading]:
        """The evaluation's terms on the same batches at another point, and its reading there."""
        there: dict[str, Tensors] = {}
        for name, tensor in point.items():
            other, _, key = name.partition("/")
            there.setdefault(other, {})[key] = tensor
        moved = _moved(self.evaluation, there)
        problem = moved.loss.problem
        parameters = {k: t.detach().requires_grad_() for k, t in moved.parameters.items()}
        reading = Reading(
            values={**moved.values, problem.name: parameters},
            solutions=moved.solutions,
            reader=problem.name,
        )
        cut = _cut_reads(moved, reading, keep_graph=False)
        found = GradientSums(problem, 1, cut.leaves)
        with moved.losses(parameters, cut.tensors, players=self.players) as losses:
            for player, loss in losses.items():
                own = [parameters[key] for key in problem.player_parameters[player]]
                found.add(player, loss, own, retain_graph=True, create_graph=False)
        return found, cut, reading


def _collect_point(evaluation: Evaluation, found: dict[str, Tensors]) -> None:
    found.setdefault(evaluation.loss.problem.name, evaluation.parameters)
    for name, tensors in evaluation.values.items():
        found.setdefault(name, tensors)
    for name, solution in evaluation.solutions.items():
        found.setdefault(name, solution.constants())
        if isinstance(solution, Stationary):
            _collect_point(solution.evaluation, found)


def _moved(evaluation: Evaluation, there: Mapping[str, Tensors]) -> Evaluation:
    """The same evaluation, on the same batches and noise, at another point."""
    solutions: dict[str, Solution] = {}
    for name, solution in evaluation.solutions.items():
        solution = replace(solution, value=there[name])
        if isinstance(solution, Stationary):
            solution = replace(
                solution,
                evaluation=_moved(solution.evaluation, there),
                fresh=tuple([_moved(other, there) for other in solution.fresh]),
                memory=dict(solution.memory),
                graph=None,
            )
        solutions[name] = solution
    return replace(
        evaluation,
        parameters=there[evaluation.loss.problem.name],
        values={name: there[name] for name in evaluation.values},
        solutions=solutions,
    )
