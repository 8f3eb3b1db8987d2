"""One evaluation of a problem's loss, kept so that it can be made again elsewhere: the 'where' of a hypergradient.

An evaluation holds the parameters, batches, random states, buffers and read values that one value of a loss was made
of. Re-evaluating it never touches a live tensor: parameters and buffers are substituted by `torch.func.functional_call`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlo.errors import ProblemError
from mlo.problem import SINGLE_PLAYER, Problem, Tensors
from mlo.randomness import RandomState, replayed

if TYPE_CHECKING:
    from mlo.response import Solution

__all__ = ["Evaluation", "LossModule", "LossValue"]


@dataclass(frozen=True, kw_only=True)
class LossValue:
    """What a loss returned: player → scalar (one player without a name unless the problem is a game), and metrics."""

    players: dict[str, Tensor]
    metrics: dict[str, Any]


class LossModule(nn.Module):
    """A problem's loss as a module, whose submodules are the modules of all problems that the loss sees.

    So one `functional_call` substitutes the parameters of every one of them for the whole of the loss, and user code
    sees ordinary modules that hold the right parameters.
    """

    def __init__(self, problem: Problem, reads: Mapping[str, Problem]) -> None:
        super().__init__()
        self._problem = problem
        self._reads = tuple(reads)
        self.members = nn.ModuleDict(
            {self._key(name): other.module for name, other in {problem.name: problem, **reads}.items()}
        )

    @staticmethod
    def _key(name: str) -> str:
        return f"problem_{name}"  # a bare name could be a method of ModuleDict

    @classmethod
    def qualified(cls, name: str, tensors: Mapping[str, Tensor]) -> Tensors:
        """Returns `tensors` of the problem `name` under the names that they have in this module."""
        prefix = f"members.{cls._key(name)}."
        return {prefix + key: value for key, value in tensors.items()}

    def forward(self, batch: Any) -> Any:
        """Calls the user's loss with the members as they stand."""
        own = self.members[self._key(self._problem.name)]
        return self._problem.loss(own, batch, **{name: self.members[self._key(name)] for name in self._reads})

    def value(self, substitutes: Tensors, batch: Any) -> LossValue:
        """Evaluates the loss with `substitutes` (qualified name → tensor) in place of live tensors."""
        with _autocast(self._problem):
            return _parse(self._problem, functional_call(self, substitutes, (batch,)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Everything that one value of a problem's loss depends on.

    Attributes:
        parameters: own trainable parameters, name → tensor of the live parameter's shape.
        batches: the batches averaged over (`accumulate` many), with the random state before each.
        buffers: problem → its module's buffers before the evaluation, for the problem itself and all that it reads.
        reads: the problems whose modules the loss receives.
        uppers: problem listed later → its parameters, for every one that the loss, or a solution in it, depends on.
        lowers: problem listed earlier → its solution; also the ones that other solutions are conditioned on.
    """

    problem: Problem
    module: LossModule
    reads: tuple[str, ...]
    parameters: Tensors
    batches: tuple[Any, ...]
    random_states: tuple[RandomState, ...]
    buffers: dict[str, Tensors]
    uppers: dict[str, Tensors]
    lowers: dict[str, Solution] = field(default_factory=dict)

    def losses(self, parameters: Mapping[str, Tensor], reads: Mapping[str, Tensors]) -> dict[str, Tensor]:
        """Re-evaluates the loss at other `parameters` and `reads`, with the same batches, noise and buffers.

        Returns:
            player → scalar, averaged over the batches.
        """
        substitutes = LossModule.qualified(self.problem.name, parameters)
        for name, tensors in reads.items():
            substitutes |= LossModule.qualified(name, tensors)
        for name, buffers in self.buffers.items():
            substitutes |= LossModule.qualified(name, {key: buffer.clone() for key, buffer in buffers.items()})
        total: dict[str, Tensor] = {}
        for batch, state in zip(self.batches, self.random_states, strict=True):
            with replayed(state, self.problem.generators):
                value = self.module.value(substitutes, batch)
            for player, loss in value.players.items():
                share = loss / len(self.batches)
                total[player] = total[player] + share if player in total else share
        return total

    @cached_property
    def free_inputs(self) -> tuple[Input, ...]:
        """What the problem's solution is a function of, each once: values of upper problems, responses of lower ones.

        A lower solution that itself depends on this problem is not an input: it is differentiated inside the
        evaluation, and what *it* depends on becomes an input instead.
        """
        found: dict[tuple[str, int], Input] = {}

        def visit(item: Input) -> None:
            if item.solution is None and item.name == self.problem.name:
                return
            solution = item.solution or self.lowers.get(item.name)
            if solution is None:
                found.setdefault((item.name, 0), item)
            elif solution.engine.drops_implicit_term:
                return
            elif solution.depends_on(self.problem.name, self.lowers):
                for inner in solution.evaluation.free_inputs:
                    visit(inner)
            else:
                found.setdefault((solution.name, id(solution)), Input(solution.name, solution))

        for name in self.reads:
            visit(Input(name, None))
        return tuple(found.values())


@dataclass(frozen=True, eq=False)
class Input:
    """One input of a solution: the value of the problem `name` (solution None), or the response of its `solution`."""

    name: str
    solution: Solution | None


def _autocast(problem: Problem) -> AbstractContextManager[Any]:
    if problem.precision is None:
        return nullcontext()
    return torch.autocast(problem.device.type, dtype=torch.bfloat16)


def _parse(problem: Problem, result: Any) -> LossValue:
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if problem.is_game:
        if not isinstance(loss, Mapping) or set(loss) != set(problem.players):
            got = f"the players {sorted(loss)}" if isinstance(loss, Mapping) else f"a {type(loss).__name__}"
            raise ProblemError(
                f"The loss of the game {problem.name!r} returned {got}; return a dict with one scalar for each of "
                f"{sorted(problem.players)}."
            )
        players = dict(loss)
    else:
        players = {SINGLE_PLAYER: loss}
    for player, scalar in players.items():
        of = f" of player {player!r}" if player else ""
        if not isinstance(scalar, Tensor) or scalar.numel() != 1 or not scalar.dtype.is_floating_point:
            got = (
                f"a tensor of shape {tuple(scalar.shape)} and {scalar.dtype}" if isinstance(scalar, Tensor) else scalar
            )
            raise ProblemError(
                f"The loss{of} of problem {problem.name!r} must be a floating-point scalar tensor (or a pair of it and a "
                f"dict of metrics), got {got!r}. Reduce it, for example by .mean()."
            )
    players = {player: scalar.reshape(()) for player, scalar in players.items()}
    return LossValue(players=players, metrics={key: _detached(value) for key, value in dict(metrics).items()})


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def gradients(
    loss: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool | None = None
) -> list[Tensor]:
    """`torch.autograd.grad`, with zeros for inputs that the loss does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(
        loss, list(inputs), create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]
