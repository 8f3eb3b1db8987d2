"""One evaluation of a problem's loss, kept so that it can be made again elsewhere: the 'where' of a
hypergradient.

An evaluation holds the parameters, batches, random states, buffers and read values that one value
of a loss was made of. Re-evaluating it never changes a live tensor: other tensors take the places
of parameters and buffers for a while.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlo.containers import map_tensors, versions_of
from mlo.distributed import DataParallel, inside
from mlo.errors import ProblemError
from mlo.problem import SINGLE_PLAYER, Problem, Tensors
from mlo.randomness import RandomState, replayed
from mlo.sharding import hooks_resting, is_sharded
from mlo.shared_parts import RecordedParts, SharedParts, using_parts

if TYPE_CHECKING:
    from mlo.response import Solution

__all__ = [
    "Evaluation",
    "GradientGraph",
    "Input",
    "LossModule",
    "LossValue",
    "alias",
    "call_deferred",
    "gradients",
    "zeros_for_none",
]


@dataclass(frozen=True, kw_only=True)
class LossValue:
    """What a loss returned: player → scalar (one player without a name unless the problem is a
    game), and metrics.

    Of a game's players only those that were asked for, where the loss of the others was not
    evaluated.
    """

    players: dict[str, Tensor]
    metrics: dict[str, Any]


class LossModule(nn.Module):
    """A problem's loss as a module, whose submodules are the modules of all problems that the loss
    sees.

    So one substitution puts other tensors in the places of the parameters of every one of them, and
    user code sees ordinary modules that hold the right parameters.
    """

    def __init__(self, problem: Problem, reads: Mapping[str, Problem]) -> None:
        super().__init__()
        self._problem = problem
        self._reads = tuple(reads)
        self.members = nn.ModuleDict(
            {
                self._key(name): other.module
                for name, other in {problem.name: problem, **reads}.items()
            }
        )
        # Where each tensor is registered; a tied one (two names, one tensor) in several places.
        by_tensor: dict[int, list[tuple[dict[str, Any], str]]] = {}
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for prefix, module in self.named_modules(remove_duplicate=False):
            for registry in (module._parameters, module._buffers):
                for key, tensor in registry.items():
                    if tensor is not None:
                        places = by_tensor.setdefault(id(tensor), [])
                        if not any(known is registry and name == key for known, name in places):
                            places.append((registry, key))
                        self._places[f"{prefix}.{key}" if prefix else key] = places
        self._all = tuple(self.modules())
        self._sharded = any(is_sharded(parameter) for parameter in self.parameters())

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
        return self._problem.loss(
            own, batch, **{name: self.members[self._key(name)] for name in self._reads}
        )

    @contextmanager
    def substituted(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Puts `tensors` (qualified name → tensor) in the places of live ones while the body runs.

        The body must contain the backward passes too: `torch.utils.checkpoint` runs the modules
        again in them.
        (`torch.func.functional_call` puts the live tensors back when the forward pass ends.)
        """
        before = [
            (registry, key, registry[key])
            for name in tensors
            for registry, key in self._places[name]
        ]
        try:
            for name, tensor in tensors.items():
                for registry, key in self._places[name]:
                    registry[key] = tensor
            with hooks_resting(self._all) if self._sharded else nullcontext():
                yield
        finally:
            for registry, key, tensor in reversed(before):
                registry[key] = tensor

    @property
    def modes(self) -> tuple[bool, ...]:
        """The training flag of every module in it."""
        return tuple(module.training for module in self._all)

    @contextmanager
    def in_modes(self, modes: tuple[bool, ...]) -> Iterator[None]:
        """Runs the body with these training flags."""
        before = self.modes
        if before == modes:
            yield
            return
        try:
            for module, training in zip(self._all, modes, strict=True):
                module.training = training
            yield
        finally:
            for module, training in zip(self._all, before, strict=True):
                module.training = training

    def value(
        self,
        batch: Any,
        *,
        players: Collection[str] | None = None,
        parts: RecordedParts | SharedParts | None = None,
    ) -> LossValue:
        """Evaluates the loss with the tensors and flags that the modules hold now.

        Args:
            batch: its batch.
            players: those whose losses are needed; None: all.
            parts: what becomes of its calls of `once`.

        Raises:
            ProblemError: if the loss changes its batch in place, so that it could not be evaluated
                again.
        """
        versions = versions_of(batch)
        # The same tensors in new containers, so that a loss may pop entries from its batch.
        with _autocast(self._problem), using_parts(parts):
            value = _parse(self._problem, self(map_tensors(batch, lambda tensor: tensor)), players)
        if versions_of(batch) != versions:
            raise ProblemError(
                f"The loss of problem {self._problem.name!r} changes its batch in place. The batch "
                "is needed again when the solution is differentiated: work on a copy (x = "
                "x.clone(), or x - mean in place of x.sub_(mean))."
            )
        return value


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Everything that one value of a problem's loss depends on.

    Attributes:
        parameters: own trainable parameters, name → tensor of the live parameter's shape.
        batches: the batches averaged over (`accumulate` many), with the random state before each.
        modes: the training flags of the modules.
        buffers: problem → its module's buffers before the evaluation, for the problem itself and
            all that it reads.
        reads: the problems whose modules the loss receives.
        uppers: problem listed later → its parameters, for every one that the loss, or a solution in
            it, depends on.
        lowers: problem listed earlier → its solution; also the ones that other solutions are
            conditioned on.
        dependent: those of them that are functions of the problem's own value.
        parallel: the processes among which batches are divided.
    """

    problem: Problem
    module: LossModule
    reads: tuple[str, ...]
    parameters: Tensors
    batches: tuple[Any, ...]
    random_states: tuple[RandomState, ...]
    modes: tuple[bool, ...]
    versions: tuple[tuple[int, ...], ...]
    buffers: dict[str, Tensors]
    uppers: dict[str, Tensors]
    lowers: dict[str, Solution] = field(default_factory=dict)
    dependent: frozenset[str] = frozenset()
    parallel: DataParallel | None = None

    @contextmanager
    def losses(
        self,
        parameters: Mapping[str, Tensor],
        reads: Mapping[str, Tensors],
        *,
        players: Collection[str] | None = None,
        parts: SharedParts | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Re-evaluates the loss at other `parameters` and `reads`, with the same batches, noise,
        buffers and modes.

        The gradients must be taken inside the context.

        Args:
            parameters: own parameters.
            reads: problem that the loss reads → its parameters.
            players: those whose losses are needed; None: all.
            parts: what it shares with other evaluations at the same `reads`.

        Yields:
            player → scalar, averaged over the batches; under exact data parallelism also over the
            processes, as a function of replicated parameters and reads (see `mlo.distributed`).

        Raises:
            ProblemError: if a batch was changed since the loss was evaluated on it.
        """
        self.check_batches()
        shared = self.parallel if self.parallel is not None and self.parallel.exact else None
        if shared is not None:
            # Each player's parameters, and what each problem read offers, in a reduction of their
            # own: a derivative in some of them computes and sends no other.
            members = self.problem.player_parameters.values()
            entered = [shared.enter({key: parameters[key] for key in keys}) for keys in members]
            parameters = {key: tensor for tensors in entered for key, tensor in tensors.items()}
            reads = {name: shared.enter(tensors) for name, tensors in reads.items()}
        if parts is not None:
            parts.begin()
        total: dict[str, Tensor] = {}
        with inside(shared), self.placed(parameters, reads):
            for batch, state in zip(self.batches, self.random_states, strict=True):
                with replayed(state, self.problem.generators):
                    value = self.module.value(batch, players=players, parts=parts)
                for player, loss in value.players.items():
                    share = loss / len(self.batches)
                    total[player] = total[player] + share if player in total else share
            yield total if shared is None else shared.leave(total)

    def check_batches(self) -> None:
        """Refuses to evaluate, or to run a checkpoint of an evaluation again, on batches that are
        not what they were.

        Raises:
            ProblemError: if one was changed.
        """
        if tuple(map(versions_of, self.batches)) != self.versions:
            raise ProblemError(
                f"Problem {self.problem.name!r}: a batch was changed in place after its loss was "
                "evaluated; perhaps its data fill one buffer again and again. Yield new tensors "
                "(batch.clone())."
            )

    @contextmanager
    def placed(
        self, parameters: Mapping[str, Tensor], reads: Mapping[str, Tensors]
    ) -> Iterator[None]:
        """Puts these tensors, copies of the buffers, and the modes into the modules while the body
        runs.
        """
        substitutes = LossModule.qualified(self.problem.name, parameters)
        for name, tensors in reads.items():
            substitutes |= LossModule.qualified(name, tensors)
        for name, buffers in self.buffers.items():
            substitutes |= LossModule.qualified(
                name, {key: buffer.clone() for key, buffer in buffers.items()}
            )
        with self.module.substituted(substitutes), self.module.in_modes(self.modes):
            yield

    @cached_property
    def free_inputs(self) -> tuple[Input, ...]:
        """What the problem's solution is a function of, each once: values of upper problems,
        responses of lower ones.

        A lower solution that itself depends on this problem is not an input: it is differentiated
        inside the
        evaluation, and what *it* depends on becomes an input instead.
        """
        found: dict[tuple[str, int], Input] = {}
        self._collect((Input(name, None) for name in self.reads), found)
        return tuple(found.values())

    def _collect(self, items: Iterable[Input], found: dict[tuple[str, int], Input]) -> None:
        # A method, since a closure that calls itself is a circle that would keep the evaluation
        # until the collector runs.
        for item in items:
            if item.solution is None and item.name == self.problem.name:
                continue
            solution = item.solution or self.lowers.get(item.name)
            if solution is None:
                found.setdefault((item.name, 0), item)
            elif solution.engine.drops_implicit_term:
                continue
            elif solution.name in self.dependent:
                self._collect(solution.free_inputs, found)
            else:
                found.setdefault((solution.name, id(solution)), Input(solution.name, solution))


@dataclass(kw_only=True, eq=False)
class GradientGraph:
    """The gradient that a step was made with, together with its graph: what an evaluation need not
    be made again for.

    Attributes:
        parameters: the tensors that stood for the own parameters.
        reads: problem → the tensors that stood for its parameters.
        gradients: player → parameter → gradient, differentiable in both; None when the graph was
            let go of.
    """

    parameters: Tensors
    reads: dict[str, Tensors]
    gradients: dict[str, Tensors] | None

    def release(self) -> None:
        """Lets go of the graph and of all that it holds."""
        self.parameters, self.reads, self.gradients = {}, {}, None


@dataclass(frozen=True, eq=False)
class Input:
    """One input of a solution: the value of the problem `name` (solution None), or the response of
    its `solution`.
    """

    name: str
    solution: Solution | None


def _autocast(problem: Problem) -> AbstractContextManager[Any]:
    if problem.precision is None:
        return nullcontext()
    return torch.autocast(problem.device.type, dtype=torch.bfloat16)


def _parse(problem: Problem, result: Any, chosen: Collection[str] | None) -> LossValue:
    loss, metrics = _with_metrics(problem.name, result)
    if problem.is_game:
        if not isinstance(loss, Mapping) or set(loss) != set(problem.players):
            got = (
                f"the players {sorted(loss)}"
                if isinstance(loss, Mapping)
                else f"a {type(loss).__name__}"
            )
            raise ProblemError(
                f"The loss of the game {problem.name!r} returned {got}; return a dict with one "
                f"scalar for each of {sorted(problem.players)}."
            )
        players = {player: loss[player] for player in loss if chosen is None or player in chosen}
        metrics |= call_deferred(players, problem.name, problem.generators)
    else:
        players = {SINGLE_PLAYER: loss}
    for player, scalar in players.items():
        of = f" of player {player!r}" if player else ""
        if (
            not isinstance(scalar, Tensor)
            or scalar.numel() != 1
            or not scalar.dtype.is_floating_point
        ):
            got = (
                f"a tensor of shape {tuple(scalar.shape)} and {scalar.dtype}"
                if isinstance(scalar, Tensor)
                else scalar
            )
            advice = "Reduce it, for example by .mean()."
            if isinstance(scalar, Mapping) and not problem.is_game:
                advice = "Where several players have losses of their own, declare them by players=."
            raise ProblemError(
                f"The loss{of} of problem {problem.name!r} must be a floating-point scalar tensor "
                f"(or a pair of it and a dict of metrics), got {got!r}. {advice}"
            )
    players = {player: scalar.reshape(()) for player, scalar in players.items()}
    return LossValue(
        players=players, metrics=map_tensors(metrics, lambda tensor: tensor.detach().clone())
    )


def _with_metrics(problem: str, result: Any) -> tuple[Any, dict[str, Any]]:
    """A loss, and the metrics that it may have come with."""
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(metrics, Mapping):
        raise ProblemError(
            f"The loss of problem {problem!r} returned a pair of which the second part is a "
            f"{type(metrics).__name__}; return (scalar, {{metric name: value}})."
        )
    return loss, dict(metrics)


def call_deferred(
    players: dict[str, Any], problem: str = "", generators: Sequence[torch.Generator] = ()
) -> dict[str, Any]:
    """Puts values in the places of losses that are functions, and returns the metrics that these
    came with.

    Each begins with the random state of the first, so that none depends on which others are
    evaluated.
    """
    found: dict[str, Any] = {}
    state: RandomState | None = None
    for player, loss in players.items():
        if callable(loss):
            if state is None:
                state = RandomState.capture(generators)
            else:
                state.restore(generators)
            players[player], metrics = _with_metrics(problem, loss())
            found |= metrics
    return found


def gradients(
    loss: Tensor,
    inputs: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """`torch.autograd.grad`, with zeros for inputs that the loss does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(
        loss, list(inputs), create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )
    return zeros_for_none(found, inputs)


def zeros_for_none(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """`found`, with zeros of the shape of the tensor in `like` where an entry is None."""
    return [
        torch.zeros_like(t) if entry is None else entry
        for entry, t in zip(found, like, strict=True)
    ]


def alias(saved: Tensor, recorded: Tensor, *, differentiate: bool, wanted: bool = True) -> Tensor:
    """A tensor to differentiate in, with a recorded value and, where that is asked for, the
    derivative of a saved tensor.

    Args:
        saved: the tensor of the graph.
        recorded: the value at which the loss was evaluated, of which `saved` may be a later one.
        differentiate: whether the derivative taken is itself differentiated, and so must flow into
            `saved`.
        wanted: whether a derivative in it is asked for at all.
    """
    if not differentiate or not saved.requires_grad:
        return recorded.detach().requires_grad_(wanted)
    if recorded.data_ptr() == saved.data_ptr():
        return saved.view_as(saved)
    return recorded + (saved - saved.detach())
