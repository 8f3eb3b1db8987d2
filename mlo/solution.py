"""What a loss reads of the problems below it, and where it was evaluated.

These classes refer to each other, so one file has them all, in this order:

- an `Evaluation`: where a loss was evaluated, so that it can be evaluated again;
- a `Solution`: what a loss reads of a problem below it;
- an `AbstractEngine`: how a solution is differentiated;
- a `Reading`: the tensors that stand for problems while one loss is evaluated.

How a solution becomes a node of the autograd graph, its response, is in `response.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from mlo.distributed import ACTIVE, inside
from mlo.errors import ProblemError
from mlo.estimators import Estimates
from mlo.gradient_sums import share_of
from mlo.loss import Examine, LossFunction
from mlo.once import SharedResults
from mlo.optimizer_step import OptimizerStep
from mlo.optimizer_traits import acts_around_step
from mlo.problem import Problem, Tensors
from mlo.randomness import RandomState, preserved, replayed
from mlo.records import CONVERGED, SolveReport
from mlo.replays import check_stand_ins
from mlo.restart import Start
from mlo.sharding import gathered
from mlo.tensors import copies, versions_of

__all__ = [
    "COMPARES_EVALUATIONS",
    "AbstractEngine",
    "Constant",
    "Evaluation",
    "GradientGraph",
    "Input",
    "Reading",
    "RecordedStep",
    "Residual",
    "Solution",
    "Started",
    "Stationary",
    "StepEngine",
    "Stepped",
    "restore_buffers",
]

R = TypeVar("R")

COMPARES_EVALUATIONS = (
    "stand-ins",
    "repeats",
    "finite difference",
    "batch bias",
    "custom gradient",
)
"""The checks that evaluate a loss once more. One that keeps state shows nothing else in them."""


# ------------------------------ where a loss was evaluated


@dataclass(kw_only=True, eq=False)
class Evaluation:
    """Everything that one value of a problem's loss depends on, so that it can be computed again.

    Computing it again changes no live tensor: other tensors replace them temporarily. An evaluation
    never changes, except that `total_gradient` notes the random states and the value.

    Attributes:
        loss: the loss of the problem, with the modules that it sees.
        parameters: own trainable parameters, name → tensor of the live parameter's shape.
        batches: the batches averaged over (`accumulate` many).
        random_states: the random state before each batch.
        versions: the in-place versions of each batch's tensors; None for a batch that is None.
        modes: the training flags of the modules.
        buffers: problem → its module's buffers before the evaluation, for the problem itself and
            everything that it reads.
        values: problem listed later → its parameters, for every one that the loss, or a solution in
            it, depends on.
        solutions: problem listed earlier → its solution, including those that other solutions are
            conditioned on.
        dependent: the names of those solutions that are functions of the problem's own value.
        made: the number of steps that the problem had made before.
        function: what the user's `problem.loss` was; None: what it is.
        value: player → the loss, where it was evaluated here; otherwise empty.
    """

    loss: LossFunction
    parameters: Tensors
    batches: tuple[Any, ...]
    random_states: tuple[RandomState, ...]
    versions: tuple[tuple[int, ...] | None, ...]
    modes: Sequence[bool]
    buffers: dict[str, Tensors]
    values: dict[str, Tensors]
    solutions: dict[str, Solution]
    dependent: frozenset[str]
    made: int = 0
    function: Callable[..., Any] | None = None
    value: dict[str, Tensor] = field(default_factory=dict, init=False)  # not copied by `replace`

    def with_changes(self, **changes: Any) -> Evaluation:
        """The same evaluation with other batches, random states or modes.

        (`dataclasses.replace` takes twenty times as long.) What `free_inputs` has found stays: it
        depends on none of these.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, value={}, **changes)
        return other

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Those in which the loss is computed, as far as is known."""
        found = {p.dtype.to_real() for p in self.parameters.values() if p.is_floating_point()}
        return found if self.loss.problem.precision is None else {torch.bfloat16}

    def losses(
        self,
        parameters: Mapping[str, Tensor],
        reads: Mapping[str, Tensors],
        *,
        players: Collection[str] | None = None,
        shared: SharedResults | None = None,
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """Re-evaluates the loss elsewhere, with the same batches, noise, buffers and modes.

        The gradients must be taken inside the context.

        Args:
            parameters: own parameters.
            reads: problem that the loss reads → its parameters.
            players: those whose losses are needed; None: all.
            shared: what it shares with other evaluations at the same `reads` (`mlo.once`).

        Returns:
            A context that yields player → scalar, averaged over the batches; under exact data
            parallelism also over the processes, as a function of replicated parameters and reads
            (see `mlo.distributed`). Entering it raises a ProblemError if a batch was changed since
            the loss was evaluated on it.
        """
        if self.loss.parallel is not None or ACTIVE[-1] is not None:
            return self._losses_among_processes(parameters, reads, players=players, shared=shared)
        return _Losses(self, parameters, reads, players=players, shared=shared)

    @contextmanager
    def _losses_among_processes(
        self,
        parameters: Mapping[str, Tensor],
        reads: Mapping[str, Tensors],
        *,
        players: Collection[str] | None,
        shared: SharedResults | None,
    ) -> Iterator[dict[str, Tensor]]:
        """As `losses`, which several processes evaluate together."""
        problem, parallel = self.loss.problem, self.loss.parallel
        averaged = parallel if parallel is not None and parallel.exact else None
        if averaged is not None:
            # One reduction per player, and one per problem that is read. A derivative with respect
            # to some of them then computes and sends no others.
            entered: Tensors = {}
            for keys in problem.player_parameters.values():
                entered |= averaged.enter({key: parameters[key] for key in keys})
            parameters = entered
            reads = {name: averaged.enter(tensors) for name, tensors in reads.items()}
        losses = _Losses(self, parameters, reads, players=players, shared=shared)
        with inside(averaged), losses as total:
            yield total if averaged is None else averaged.leave(total)

    # ------------------------------ what acts around the optimizer's step

    def current_reads(self) -> dict[str, Tensors]:
        """Problem that is read → its parameters at the evaluation, as constants."""
        found: dict[str, Tensors] = {}
        for name in self.loss.reads:
            solution = self.solutions.get(name)
            found[name] = self.values[name] if solution is None else solution.constants()
        return found

    def step_at(self, step: OptimizerStep, reads: Mapping[str, Tensors]) -> OptimizerStep:
        """The optimizers' step with the settings that these reads give (`settings=`)."""
        if not step.by_formula:
            return step
        with self.replayed_at({}, reads):
            return step.with_settings(self.loss.settings(self.made))

    def after_step(self, parameters: Tensors, reads: Mapping[str, Tensors]) -> Tensors:
        """The parameters after the optimizers' step and what follows it (`after_step=`)."""
        if self.loss.problem.after_step is None:
            return parameters
        with self.replayed_at({}, reads):
            return self.loss.after_step(parameters, self.made)

    def stepped(
        self,
        step: OptimizerStep,
        parameters: Tensors,
        gradients: Tensors,
        reads: Mapping[str, Tensors],
    ) -> Tensors:
        """θ' = P(step(θ, g; s(x)), x): the whole step, with settings s and `after_step` P.

        Args:
            step: of the optimizers.
            parameters: θ, before the step.
            gradients: g, for the same names.
            reads: x, problem → parameters.

        Returns:
            The parameters after the step, differentiable in all three.
        """
        moved = self.step_at(step, reads).apply(parameters, gradients)
        return self.after_step(moved, reads)

    def check_batches(self) -> None:
        """Refuses to evaluate again on batches that have changed.

        Raises:
            ProblemError: if one was changed.
        """
        for batch, versions in zip(self.batches, self.versions, strict=True):
            if versions is not None and versions_of(batch) != versions:
                raise ProblemError(
                    f"Problem {self.loss.problem.name!r}: a batch was changed in place after its "
                    "loss was evaluated; perhaps its data fill one buffer again and again. Yield "
                    "new tensors (batch.clone()) or arrays (batch.copy())."
                )

    def apart(self, examine: Examine) -> Examine:
        """A function that examines a loss likewise, and moves nothing that an update keeps.

        A derivative of a loss with activation checkpoints runs their modules again: BatchNorm moves
        its statistics, spectral norm its vectors, dropout may draw.
        """

        def apart(loss: Tensor, leaves: Sequence[Tensor]) -> None:
            copied = self.loss.copied(self.buffers)
            with (
                preserved(self.loss.problem.generators),
                self.loss.placed(copied, self.loss.modes),
            ):
                examine(loss, leaves)

        return apart

    def check_stand_ins(self, live: dict[str, Tensors], *, replayed: bool) -> None:
        """Refuses a loss that takes another value with the live parameters in their places.

        Args:
            live: problem that the loss reads → its live parameters, or what it reads instead.
            replayed: whether engines evaluate the loss again too. Otherwise this is done once
                only, and a difference is warned of.

        Raises:
            ProblemError: if it does, so that it tells parameters by their identity.
        """

        def at(parameters: Mapping[str, Tensor], reads: dict[str, Tensors]) -> dict[str, Tensor]:
            players = tuple(self.value)
            with torch.enable_grad(), self.losses(parameters, reads, players=players) as losses:
                return {player: value.detach() for player, value in losses.items()}

        def in_place() -> dict[str, Tensor]:
            # A loss that freezes what it reads must not do so for good here.
            own = self.loss.problem.parameters
            of_all: list[Mapping[str, Tensor]] = [own, *live.values()]
            leaves = [p for named in of_all for p in named.values() if p.is_leaf]
            flags = [leaf.requires_grad for leaf in leaves]
            try:
                return at(own, live)
            finally:
                for leaf, flag in zip(leaves, flags, strict=True):
                    leaf.requires_grad_(flag)

        with_stand_ins = [
            partial(self.at_stand_ins, at, responds=responds) for responds in (True, False)
        ]
        if not check_stand_ins(
            self.loss.problem.name,
            self.value,
            in_place,
            with_stand_ins if replayed else (),
            self.dtypes,
            calls=len(self.batches),
        ):
            self.loss.checks.dismiss(*COMPARES_EVALUATIONS)

    def at_stand_ins(
        self, at: Callable[[Tensors, dict[str, Tensors]], R], *, responds: bool = True
    ) -> R:
        """Calls a function of other tensors of the recorded values.

        Args:
            at: is given own parameters, and problem → its parameters, as `losses` is.
            responds: whether those that are read require gradients.
        """
        reads: dict[str, Tensors] = {}
        for name, tensors in self.current_reads().items():
            reads[name] = {k: t.detach().requires_grad_(responds) for k, t in tensors.items()}
        own = {key: t.detach().requires_grad_() for key, t in self.parameters.items()}
        return at(own, reads)

    def replayed_at(
        self, parameters: Mapping[str, Tensor], reads: Mapping[str, Mapping[str, Tensor]]
    ) -> AbstractContextManager[None]:
        """Puts these tensors, copies of the recorded buffers, and the modes into the modules."""
        tensors: dict[str, Mapping[str, Tensor]] = {**reads, self.loss.problem.name: parameters}
        if any(self.buffers.values()):
            tensors = self._with_buffers(tensors)
        return self.loss.placed(tensors, self.modes)

    def substituted(
        self, parameters: Tensors, reads: dict[str, Tensors], *, is_update: bool
    ) -> AbstractContextManager[None]:
        """Puts these tensors into the modules to take a gradient at the problem's current point.

        Training flags that the loss changes are restored at the end. Sharded tensors are gathered.

        Args:
            parameters: what replaces own parameters; parameters without a replacement stay.
            reads: problem that the loss reads → its tensors.
            is_update: whether the problem's own buffers may change, as they do in its own update.
        """
        name = self.loss.problem.name
        tensors: dict[str, Mapping[str, Tensor]] = {**reads, name: parameters}
        if self.loss.sharded:
            tensors = {other: gathered(named) for other, named in tensors.items()}
        if self.loss.lends:
            tensors = {other: self.loss.lent(named) for other, named in tensors.items()}
        if any(self.buffers.values()):
            tensors = self._with_buffers(tensors, but=name if is_update else "")
        return self.loss.placed(tensors, self.modes)

    def _with_buffers(
        self, tensors: dict[str, Mapping[str, Tensor]], but: str = ""
    ) -> dict[str, Mapping[str, Tensor]]:
        """Adds copies of the buffers of all problems but one to the tensors."""
        # Copies again, since each evaluation may change them (BatchNorm's running statistics).
        # Buffers that others share with that one (a frozen encoder) are among its own, and stay.
        for other, buffers in self.buffers.items():
            if buffers and other != but:
                live = self.loss.in_common[other] if but else ()
                own = {key: buffer for key, buffer in buffers.items() if key not in live}
                copied = dict(zip(own, copies(own.values()), strict=True))
                tensors[other] = {**tensors[other], **copied}
        return tensors

    @cached_property
    def free_inputs(self) -> tuple[Input, ...]:
        """The inputs of the problem's solution: values from above, responses from below.

        A lower solution that itself depends on this problem is not an input. It is differentiated
        inside the evaluation, and what *it* depends on becomes an input instead.
        """
        found: dict[tuple[str, int], Input] = {}
        self._collect([Input(name, None) for name in self.loss.reads], found)
        return tuple(found.values())

    @cached_property
    def inner(self) -> bool:
        """Whether the loss reads solutions that are functions of the problem's own value."""
        return not self.dependent.isdisjoint(self.loss.reads)

    def depends(self, solution: Solution) -> bool:
        """Whether a solution in this evaluation is a function of the problem's own value."""
        return solution.name in self.dependent and not isinstance(solution, Constant)

    @cached_property
    def sweeps(self) -> bool:
        """Whether those solutions depend on nothing else, and can be swept (`sweep.py`)."""
        found: dict[int, bool] = {}
        waiting = [self.solutions[name] for name in self.loss.reads if name in self.dependent]
        while waiting:
            lower = waiting.pop()
            if id(lower) in found or isinstance(lower, Constant):
                continue
            found[id(lower)] = lower.sweeps
            if not lower.sweeps:
                return False
            for item in lower.free_inputs:
                if item.solution is None and item.name == self.loss.problem.name:
                    continue
                solution = item.solution or self.solutions.get(item.name)
                if solution is None or not (
                    isinstance(solution, Constant) or self.depends(solution)
                ):
                    return False
                waiting.append(solution)
        return True

    def _collect(self, items: Iterable[Input], found: dict[tuple[str, int], Input]) -> None:
        # A method, because a closure that calls itself is a reference cycle. It would keep the
        # evaluation alive until the garbage collector runs.
        for item in items:
            if item.solution is None and item.name == self.loss.problem.name:
                continue
            # A problem in `solutions` is seen by its solution, any other problem by its value.
            solution = item.solution or self.solutions.get(item.name)
            if solution is None:
                found.setdefault((item.name, 0), item)
            elif isinstance(solution, Constant):
                continue
            elif solution.name in self.dependent:
                self._collect(solution.free_inputs, found)
            else:
                # By identity: one problem's solutions at different times are different inputs.
                found.setdefault((solution.name, id(solution)), Input(solution.name, solution))


@torch.no_grad()
def restore_buffers(evaluation: Evaluation) -> None:
    """Restores the problem's buffers to their values before an evaluation.

    A buffer that the evaluation has made itself (a cached mask) stays. Frozen parameters are
    restored where they were recorded.
    """
    problem = evaluation.loss.problem
    recorded = evaluation.buffers[problem.name]
    for prefix, module in problem.module.named_modules():
        for key, buffer in module._buffers.items():
            before = recorded.get(f"{prefix}.{key}" if prefix else key)
            if before is None:
                continue
            # A buffer may be exchanged for another one (a queue that grows).
            if buffer is not None and buffer.shape == before.shape:
                buffer.copy_(before)
            else:
                module._buffers[key] = before.clone()
    for key, parameter in problem.module.named_parameters():
        if key in recorded:
            parameter.copy_(recorded[key])


class _Losses:
    """The context of `Evaluation.losses` in one process.

    (A class takes a third of the time of a generator with `contextmanager`.)
    """

    __slots__ = ("_evaluation", "_parameters", "_placed", "_players", "_reads", "_shared")

    def __init__(
        self,
        evaluation: Evaluation,
        parameters: Mapping[str, Tensor],
        reads: Mapping[str, Mapping[str, Tensor]],
        *,
        players: Collection[str] | None,
        shared: SharedResults | None,
    ) -> None:
        self._evaluation, self._parameters, self._reads = evaluation, parameters, reads
        self._players, self._shared = players, shared

    def __enter__(self) -> dict[str, Tensor]:
        try:
            return self._entered()
        except RuntimeError as error:
            if not self._evaluation.loss.lends_after(error):
                raise
        if self._shared is not None:
            self._shared.begin_again()
        return self._entered()  # with the same noise, on new copies of the buffers

    def _entered(self) -> dict[str, Tensor]:
        evaluation, shared = self._evaluation, self._shared
        evaluation.check_batches()
        if shared is not None:
            shared.begin()
        parameters, reads = self._parameters, self._reads
        if evaluation.loss.lends:
            lent = evaluation.loss.lent
            parameters = lent(parameters)
            reads = {name: lent(tensors) for name, tensors in reads.items()}
        # It stays open while the caller differentiates: checkpoints run modules again.
        self._placed = evaluation.replayed_at(parameters, reads)
        self._placed.__enter__()
        try:
            return self._total(evaluation, shared)
        except BaseException:
            self.__exit__()
            raise

    def _total(self, evaluation: Evaluation, shared: SharedResults | None) -> dict[str, Tensor]:
        loss, batches = evaluation.loss, evaluation.batches
        total: dict[str, Tensor] = {}
        for batch, state, known in zip(
            batches, evaluation.random_states, evaluation.versions, strict=True
        ):
            with replayed(state, loss.problem.generators):
                value = loss.value(
                    batch,
                    players=self._players,
                    shared=shared,
                    versions=known,
                    function=evaluation.function,
                )
            for player, scalar in value.players.items():
                share = share_of(scalar, len(batches))
                total[player] = total[player] + share if player in total else share
        return total

    def __exit__(self, *_: object) -> None:
        self._placed.__exit__(None, None, None)


@dataclass(kw_only=True, eq=False)
class GradientGraph:
    """A step's gradient with its graph, so that the loss need not be evaluated again.

    Attributes:
        parameters: the tensors that stood for the own parameters.
        reads: problem → the tensors that stood for its parameters.
        gradients: player → parameter → gradient, differentiable in both; None once the graph was
            released.
    """

    parameters: Tensors
    reads: dict[str, Tensors]
    gradients: dict[str, Tensors] | None

    def release(self) -> None:
        """Releases the graph and everything that it holds."""
        self.parameters, self.reads, self.gradients = {}, {}, None


# ------------------------------ what a loss reads


@dataclass(frozen=True, eq=False)
class Input:
    """One input of a solution: the value of `name` (`solution` None), or a solution's response."""

    name: str
    solution: Solution | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution(ABC):
    """A problem's current parameters, as the losses above it read them.

    Attributes:
        name: the problem.
        engine: how the solution is differentiated.
        value: its parameters.
    """

    name: str
    engine: AbstractEngine
    value: Tensors

    @property
    @abstractmethod
    def free_inputs(self) -> tuple[Input, ...]:
        """What the solution is a function of, each once."""

    @property
    def sweeps(self) -> bool:
        """Whether its derivative may be a part of a sweep (`hypergradient/sweep.py`)."""
        return False

    def constants(self) -> Tensors:
        """The value, through which no derivative flows."""
        return dict(zip(self.value, map(Tensor.detach, self.value.values()), strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Constant(Solution):
    """The solution of a problem that rests, or whose derivative its engine drops."""

    @property
    def free_inputs(self) -> tuple[Input, ...]:
        """Nothing."""
        return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Started(Solution):
    """Parameters that started from a value from above, and depend on it only through that start.

    Attributes:
        start: where they began.
    """

    start: Start

    @property
    def free_inputs(self) -> tuple[Input, ...]:
        """The problem at whose value they began."""
        return (Input(self.start.problem, None),)


Residual = Callable[[Evaluation, Tensors, dict[str, Tensors]], AbstractContextManager[Tensors]]
"""F of a solution: (evaluation, own parameters, problem read → its tensors) → a context.

The context yields parameter → entry of F, differentiable in the tensors that were given. It closes
after the derivatives were taken, so it may hold an evaluation of the loss open (see
`Evaluation.losses`). F is complete: an optimizer's weight decay is not added to it.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stationary(Solution):
    """A solution of a condition F = 0, for implicit engines.

    Attributes:
        evaluation: the current point; in a simultaneous round that of the problem's last update.
        memory: what the engine keeps from one solve to the next (warm starts): name → tensor.
        residual: F, where it is another map than the gradient of the problem's loss.
        graph: the gradient of that update with its graph, where it is kept.
        simultaneous: whether all problems see each other as they were when the round began.
        estimates: corrects this problem's quantities on a batch.
        fresh: the same point on other batches, one for each product of an engine that asks for it.
        learning_rates: those of the problem's optimizers at its last update.
    """

    evaluation: Evaluation
    memory: dict[str, Tensor] = field(default_factory=dict)
    residual: Residual | None = None
    graph: GradientGraph | None = None
    simultaneous: bool = False
    start: ClassVar[None] = None
    estimates: Estimates | None = None
    fresh: tuple[Evaluation, ...] = ()
    learning_rates: tuple[float, ...] = ()

    @property
    def free_inputs(self) -> tuple[Input, ...]:
        """Those of its evaluation."""
        return self.evaluation.free_inputs

    @cached_property
    def sweeps(self) -> bool:
        """Whether its derivative may be a part of a sweep."""
        return self.engine.sweeps and self.residual is None and self.evaluation.sweeps


@dataclass(frozen=True, kw_only=True, eq=False)
class Stepped(Solution):
    """The result of the optimizer's last steps, for engines that differentiate steps.

    Attributes:
        evaluation: where the gradient of the last step was evaluated.
        step: the last step as it was made.
        gradient: the gradient that it used.
        graph: that gradient with its graph, where the engine keeps it.
        history: the last steps, oldest first, as many as the engine differentiates.
        memory: what the engine keeps from one solve to the next: name → tensor.
        start: where the first of these steps started, if from a value from above; None: from
            constants.
    """

    evaluation: Evaluation
    step: OptimizerStep
    gradient: Tensors
    graph: GradientGraph | None
    history: tuple[RecordedStep, ...]
    memory: dict[str, Tensor] = field(default_factory=dict)
    start: Start | None = None
    residual: ClassVar[None] = None

    @cached_property
    def free_inputs(self) -> tuple[Input, ...]:
        """Those of all recorded steps."""
        found: dict[tuple[str, int], Input] = {}
        for recorded in self.history:
            for item in recorded.evaluation.free_inputs:
                found.setdefault((item.name, id(item.solution)), item)
        return tuple(found.values())

    @cached_property
    def sweeps(self) -> bool:
        """Whether its derivative may be a part of a sweep."""
        around = acts_around_step(self.evaluation.loss.problem) or self.start is not None
        return self.engine.sweeps and not around and self.evaluation.sweeps

    def at_step(self, recorded: RecordedStep) -> Stepped:
        """The same solution with its derivative taken at one of the recorded steps."""
        return replace(self, evaluation=recorded.evaluation, step=recorded.step)


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedStep:
    """One step of a problem's optimizer: where its gradient was evaluated, and the step."""

    evaluation: Evaluation
    step: OptimizerStep


# ------------------------------ how it is differentiated


@dataclass(frozen=True, kw_only=True)
class AbstractEngine(ABC):
    """The task of every engine: it makes the response of a solution.

    Engines are immutable, so one object can serve many problems. Options declared by
    `mlo.hypergradient.options` are checked when an engine is made.

    Attributes:
        needs_symmetry: whether A must be symmetric, which a game's Jacobian is not.
        takes_sharded: whether it serves problems with sharded parameters.
        takes_estimates: whether it is linear in means over batches, and corrects its products by
            the estimator of the problem.
        takes_start: whether it differentiates a solution with respect to its start.
    """

    name: ClassVar[str]
    takes_start: ClassVar[bool] = False
    needs_symmetry: ClassVar[bool] = False
    takes_sharded: ClassVar[bool] = True
    takes_estimates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option in fields(self):
            check = option.metadata.get("check")
            if check is not None:
                check(self.name, option.name, getattr(self, option.name))

    @property
    def differentiable(self) -> bool:
        """Whether the response can be differentiated twice."""
        return True

    @property
    def uses_second_derivatives(self) -> bool:
        """Whether it differentiates the gradient of the loss."""
        return True

    @property
    def takes_residuals(self) -> bool:
        """Whether it differentiates any condition F = 0, not only that a gradient vanishes."""
        return False

    @property
    def sweeps(self) -> bool:
        """Whether it can be a part of a sweep through several problems (`sweep.py`)."""
        return False

    @property
    def fresh_products(self) -> int:
        """The number of products in a solve that each use their own batches."""
        return 0

    @property
    def keeps_memory(self) -> bool:
        """Whether a solve resumes from what the last one has kept (`LinearSystem.keep`).

        By default so if the engine has an option `warm_start`, which is on.
        """
        return bool(getattr(self, "warm_start", False))

    @property
    def label(self) -> str:
        """What messages and reports call it."""
        return self.name

    @abstractmethod
    def respond(self, solution: Solution, reading: Reading) -> Tensors:
        """Returns the solution's parameters as a function of everything that they depend on.

        Args:
            solution: of a lower problem.
            reading: resolves what the solution depends on to tensors.
        """

    def report(
        self,
        problem: str,
        *,
        iterations: int = 0,
        residual: float | None = None,
        converged: bool | None = None,
        advice: str = "",
        curvature: float | None = None,
    ) -> SolveReport:
        """Makes this engine's report on a problem (see `SolveReport`).

        Args:
            problem: whose response was differentiated.
            iterations: products or steps that it took.
            residual: the relative one; None: no system was solved.
            converged: None: if there is no residual, or it is at most `CONVERGED`.
            advice: what to change; empty unless the solve failed.
            curvature: the smallest one met.
        """
        if converged is None:
            converged = residual is None or residual <= CONVERGED
        return SolveReport(
            problem=problem,
            engine=self.label,
            iterations=iterations,
            residual=residual,
            converged=converged,
            advice=advice,
            curvature=curvature,
        )


class StepEngine(AbstractEngine):
    """An engine that differentiates the optimizer's last steps, each at its own point."""

    @property
    def recorded_steps(self) -> int:
        """How many of the last steps are kept for the derivative."""
        return 1

    @property
    def keeps_graph(self) -> bool | Literal["auto"]:
        """Whether the gradient of a step is kept with its graph until it is differentiated.

        "auto": if it has one graph, which fits the memory.
        """
        return False

    def capture(self, problem: Problem, unused: frozenset[str]) -> OptimizerStep:
        """Copies, before a step is made, what its derivative will need.

        Args:
            problem: whose optimizers make the step.
            unused: its parameters without a gradient.
        """
        return OptimizerStep.capture(problem, unused=unused)


@dataclass(kw_only=True, eq=False)
class Reading:
    """The tensors that stand for problems while one loss is evaluated.

    Attributes:
        values: problem → parameters, for problems seen by value.
        solutions: problem → solution, for problems below the one whose loss it is.
        responses: id of a solution → its response, made once however many losses read it.
        reports: of the solves that the total gradient takes.
        reader: the problem, or player, whose gradient is taken. Engines that resume from their last
            solve keep one memory per reader, since several upper problems may request the response
            of the same lower problem.
        held_constant: problems whose solutions are treated as constants.
        in_graph: whether responses are wanted as plain operations, if an engine can provide them,
            because the loss's gradient is differentiated.
    """

    values: dict[str, Tensors]
    solutions: Mapping[str, Solution]
    responses: dict[int, Tensors] = field(default_factory=dict)
    reports: list[SolveReport] = field(default_factory=list)
    reader: str
    held_constant: frozenset[str] = frozenset()
    in_graph: bool = False

    def tensors(self, name: str) -> Tensors:
        """What represents a problem: its response if it is below, otherwise its value."""
        if name in self.values:
            return self.values[name]
        return self._response(self.solutions[name])

    def note(self, report: SolveReport) -> None:
        """Notes how a solve went."""
        self.reports.append(report)

    def of(self, item: Input) -> Tensors:
        """The tensors of one input of a solution."""
        return self.tensors(item.name) if item.solution is None else self._response(item.solution)

    def inputs_of(self, solution: Stationary | Stepped) -> list[Tensor]:
        """The tensors of all inputs of a solution, flat."""
        # Resolving an input may make the response of a problem further down. So the autograd graph
        # mirrors the graph of problems.
        inputs: list[Tensor] = []
        for item in solution.evaluation.free_inputs:
            inputs += self.of(item).values()
        return inputs

    def _response(self, solution: Solution) -> Tensors:
        """The parameters of a solution as a function of all that they depend on."""
        known = self.responses.get(id(solution))
        if known is None:
            held = solution.name in self.held_constant
            known = solution.constants() if held else solution.engine.respond(solution, self)
            self.responses[id(solution)] = known
        return known
