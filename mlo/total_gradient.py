"""The total gradient of a problem's loss: its direct gradient plus what flows through the responses
that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.distributed import DataParallel, inside, running_statistics
from mlo.errors import ProblemError
from mlo.evaluation import Evaluation, GradientGraph, LossModule, zeros_for_none
from mlo.problem import Problem, Tensors
from mlo.randomness import RandomState, forked
from mlo.records import SolveReport
from mlo.response import Context
from mlo.sharding import gathered, is_sharded
from mlo.shared_parts import RecordedParts

__all__ = ["Examine", "TotalGradient", "total_gradient"]

Examine = Callable[[Tensor, Sequence[Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class TotalGradient:
    """A problem's total gradient at one point, and what came with it.

    Attributes:
        gradient: parameter → gradient; zero for parameters that no loss depends on, or whose player
            rests.
        unused: these; their optimizer leaves them alone, as it does in plain PyTorch.
        losses: player → loss, averaged over the batches.
        metrics: what the loss returned beside it.
        reports: the solves that it took.
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


@torch.enable_grad()
def total_gradient(
    evaluation: Evaluation,
    *,
    live: bool,
    examine: Examine | None = None,
    fixed: frozenset[str] = frozenset(),
    moving: Collection[str] | None = None,
    keep_graph: bool = False,
) -> TotalGradient:
    """Evaluates a problem's loss at its live parameters and differentiates it, through the
    responses that it reads.

    The loss sees the responses cut off from their graphs; their cotangents are summed over the
    batches and sent through the responses at the end, so that each inverse product is done once
    however many batches are averaged.

    Args:
        evaluation: the problem, its batches, and what it reads; its random states are drawn now.
        live: whether the problem's own buffers may change, as they do in its own update.
        examine: is shown each player's loss on the first batch, with the player's parameters,
            before it is differentiated.
        fixed: problems whose solutions are taken for constants.
        moving: the players whose losses are differentiated, each in its own parameters; None: all.
        keep_graph: whether the gradient's graph is kept, for a problem whose gradient contains no
            response.
    """
    problem, module, batches = evaluation.problem, evaluation.module, evaluation.batches
    values = dict(evaluation.uppers) | {problem.name: dict(problem.parameters)}
    context = Context(values=values, lowers=evaluation.lowers, asker=problem.name, fixed=fixed)
    read = {
        other: context.value(other)
        if other in evaluation.dependent or other not in evaluation.lowers
        else {key: value.detach() for key, value in evaluation.lowers[other].value.items()}
        for other in evaluation.reads
    }
    inputs = frozenset(item.name for item in evaluation.free_inputs) if keep_graph else frozenset()
    cut = {
        other: {
            key: t.detach().requires_grad_(t.requires_grad or other in inputs)
            for key, t in tensors.items()
        }
        for other, tensors in read.items()
    }
    parameters: Tensors = dict(problem.parameters)
    if keep_graph:  # whose tensors the step will not change
        _check_hooks(problem)
        parameters = {key: t.detach().requires_grad_() for key, t in evaluation.parameters.items()}
    leaves = [
        cut[other][key]
        for other, tensors in read.items()
        for key, t in tensors.items()
        if t.requires_grad
    ]
    states: list[RandomState] = []
    sums = _Sums(problem.name, len(batches))
    parallel = evaluation.parallel
    substitutes = _substitutes(evaluation, cut, live=live)
    if keep_graph:
        substitutes |= LossModule.qualified(problem.name, parameters)
    with inside(parallel), module.substituted(substitutes):
        for batch in batches:
            parts = RecordedParts(problem.name) if examine is not None and not states else None
            with _own_noise(parallel, problem):
                states.append(RandomState.capture(problem.generators))
                value = module.value(batch, players=moving, parts=parts)
            if parts is not None:
                parts.check(list(parameters.values()))
            sums.add_metrics(value.metrics)
            remaining = len(value.players)
            for player, loss in value.players.items():
                remaining -= 1
                own = [parameters[key] for key in problem.player_parameters[player]]
                if examine is not None and len(states) == 1:
                    examine(loss, own)
                sums.add(
                    player, loss, own, leaves, retain_graph=remaining > 0, create_graph=keep_graph
                )
    statistics = running_statistics(problem.module) if live else []
    if parallel is not None and parallel.exact:
        # Cotangents are averaged before they go through the responses: an inverse product of the
        # mean.
        sums.synchronise(parallel, problem, leaves, statistics)
    responses = [t for tensors in read.values() for t in tensors.values() if t.requires_grad]
    gradient: dict[str, Tensor | None] = {}
    for index, (player, direct) in enumerate(sums.direct.items()):
        members = problem.player_parameters[player]
        own = [problem.parameters[key] for key in members]
        last = index + 1 == len(sums.direct)
        context.asker = f"{problem.name}.{player}" if player else problem.name
        implicit = _implicit(responses, sums.cotangents[player], own, retain_graph=not last)
        for key, first, second in zip(members, direct, implicit, strict=True):
            gradient[key] = second if first is None else first if second is None else first + second
    if parallel is not None and not parallel.exact:
        sums.direct, sums.cotangents = {"": [gradient.get(key) for key in problem.parameters]}, {}
        sums.synchronise(parallel, problem, leaves, statistics)
        gradient = dict(zip(problem.parameters, sums.direct[""], strict=True))
    # A response's node holds the context, which holds the response: PyTorch frees no such circle,
    # nor does Python's collector where the node has several outputs.
    context.responses.clear()
    graph = None
    if keep_graph:
        if live:
            _copy_changed(problem, parameters)
        of_player = {
            player: dict(
                zip(
                    names,
                    zeros_for_none(sums.direct[player], [parameters[n] for n in names]),
                    strict=True,
                )
            )
            for player, names in problem.player_parameters.items()
        }
        graph = GradientGraph(parameters=parameters, reads=cut, gradients=of_player)
        gradient = {
            key: None if value is None else value.detach() for key, value in gradient.items()
        }
    found = {key: value for key, value in gradient.items() if value is not None}
    return TotalGradient(
        gradient={
            key: found[key] if key in found else torch.zeros_like(p)
            for key, p in problem.parameters.items()
        },
        unused=frozenset(problem.parameters) - frozenset(found),
        losses=sums.losses,
        metrics=sums.metrics,
        reports=context.reports,
        evaluation=replace(evaluation, random_states=tuple(states)),
        has_derivative=sums.has_derivative,
        graph=graph,
    )


def _substitutes(evaluation: Evaluation, reads: dict[str, Tensors], *, live: bool) -> Tensors:
    """What takes the places of live tensors: the tensors that are read, and copies of buffers that
    must not change.
    """
    substitutes: Tensors = {}
    own: Tensors = {}
    own.update((key, p) for key, p in evaluation.problem.parameters.items() if is_sharded(p))
    for other, tensors in {**reads, evaluation.problem.name: own}.items():
        substitutes |= LossModule.qualified(other, gathered(tensors))
    for other, buffers in evaluation.buffers.items():
        if other != evaluation.problem.name or not live:
            substitutes |= LossModule.qualified(
                other, {key: value.clone() for key, value in buffers.items()}
            )
    return substitutes


def _check_hooks(problem: Problem) -> None:
    """Refuses hooks on parameters where the gradient is computed at copies of them.

    Raises:
        ProblemError: if there is one.
    """
    hooked = [key for key, parameter in problem.parameters.items() if parameter._backward_hooks]
    if hooked:
        raise ProblemError(
            f"Parameter {hooked[0]!r} of problem {problem.name!r} has a hook (register_hook), "
            "which changes gradients of this tensor only. With keep_graph the gradient is computed "
            "at a copy: give the problem the engine 'one_step' without keep_graph."
        )


@torch.no_grad()
def _copy_changed(problem: Problem, parameters: Tensors) -> None:
    """Does to the live parameters what the loss did in place to the new copies in their places
    (`nn.Embedding(max_norm=…)`).
    """
    for key, tensor in parameters.items():
        if tensor._version > 0:
            problem.parameters[key].copy_(tensor)


def _own_noise(parallel: DataParallel | None, problem: Problem) -> AbstractContextManager[None]:
    """A random state of this process's own, where that is asked for."""
    if parallel is None or parallel.noise != "own":
        return nullcontext()
    return forked(parallel.rank, problem.generators)


def _implicit(
    responses: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool,
) -> Sequence[Tensor | None]:
    """The gradient in `inputs` that flows through responses with these cotangents."""
    reached = [(t, v) for t, v in zip(responses, cotangents, strict=True) if v is not None]
    if not reached:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [t for t, _ in reached],
        list(inputs),
        grad_outputs=[v for _, v in reached],
        allow_unused=True,
        retain_graph=retain_graph,
    )


class _Sums:
    """Averages over the batches of one update.

    Attributes:
        losses: player → loss.
        direct: player → direct gradient of its parameters (None: the loss does not depend on one).
        cotangents: player → cotangent of every leaf that stands for a response.
        has_derivative: whether every loss had one.
    """

    def __init__(self, problem: str, batches: int) -> None:
        self._problem = problem
        self._batches = batches
        self.losses: dict[str, Tensor] = {}
        self.direct: dict[str, list[Tensor | None]] = {}
        self.cotangents: dict[str, list[Tensor | None]] = {}
        self.metrics: dict[str, Any] = {}
        self.has_derivative = True

    def add(
        self,
        player: str,
        loss: Tensor,
        own: Sequence[Tensor],
        leaves: Sequence[Tensor],
        *,
        retain_graph: bool,
        create_graph: bool,
    ) -> None:
        """Adds one batch's loss of a player, and its gradients."""
        share = loss / self._batches
        inputs = [*own, *leaves]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        self.has_derivative &= share.requires_grad
        if share.requires_grad:
            found = torch.autograd.grad(
                share,
                inputs,
                allow_unused=True,
                retain_graph=retain_graph or create_graph,
                create_graph=create_graph,
            )
            if any(g is not None and g.layout != torch.strided for g in found):
                raise ProblemError(
                    f"Problem {self._problem!r}: its loss has sparse gradients, which no engine "
                    "takes. Build embeddings with sparse=False."
                )
        _add_to(self.direct, player, found[: len(own)])
        _add_to(self.cotangents, player, found[len(own) :])
        detached = share.detach()
        self.losses[player] = self.losses[player] + detached if player in self.losses else detached

    def synchronise(
        self,
        parallel: DataParallel,
        problem: Problem,
        leaves: Sequence[Tensor],
        statistics: Sequence[Tensor],
    ) -> None:
        """Averages everything over the processes, in one reduction.

        Args:
            parallel: the processes.
            problem: whose parameters `direct` is in.
            leaves: what `cotangents` is in.
            statistics: running statistics of BatchNorm layers, averaged in place.
        """
        entries: list[_Entry] = []
        for player, terms in self.direct.items():
            members = problem.player_parameters.get(player, tuple(problem.parameters))
            like = [problem.parameters[key] for key in members]
            entries += [_Entry(terms, index, parameter) for index, parameter in enumerate(like)]
        for terms in self.cotangents.values():
            entries += [_Entry(terms, index, leaf) for index, leaf in enumerate(leaves)]
        entries += [_Entry(self.losses, player, loss) for player, loss in self.losses.items()]
        for key, value in self.metrics.items():
            if _is_number(value):
                number = (
                    value
                    if isinstance(value, Tensor)
                    else torch.tensor(value, device=problem.device)
                )
                self.metrics[key] = number
                entries.append(_Entry(self.metrics, key, number))
        moving = list(statistics)
        entries += [_Entry(moving, index, statistic) for index, statistic in enumerate(statistics)]
        entries = [
            entry for entry in entries if not is_sharded(entry.like)
        ]  # which are averaged as they are scattered
        means = parallel.average(
            [entry.within[entry.key] for entry in entries], [entry.like for entry in entries]
        )
        for entry, mean in zip(entries, means, strict=True):
            entry.within[entry.key] = mean
        with torch.no_grad():
            for statistic, mean in zip(statistics, moving, strict=True):
                statistic.copy_(mean)

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds one batch's metrics: floating-point ones are averaged, of others the last stays."""
        for key, value in metrics.items():
            share = value / self._batches if _is_number(value) else value
            self.metrics[key] = (
                self.metrics[key] + share if _is_number(value) and key in self.metrics else share
            )


class _Entry(NamedTuple):
    """One tensor of what is averaged: where it is kept, and a tensor of its shape."""

    within: Any
    key: Any
    like: Tensor


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())


def _add_to(
    total: dict[str, list[Tensor | None]], player: str, terms: Sequence[Tensor | None]
) -> None:
    known = total.get(player)
    if known is None:
        total[player] = list(terms)
        return
    total[player] = [
        b if a is None else a if b is None else a + b for a, b in zip(known, terms, strict=True)
    ]
