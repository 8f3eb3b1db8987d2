"""Calls a user's loss with other tensors in place of the live ones, and differentiates it.

User code sees ordinary modules. While it runs, the tensors that its modules hold are replaced: by
responses, by the values at which a step was made, by displaced parameters, by copies of buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlo.advice import EngineAdvice
from mlo.check_schedule import CheckSchedule, NoChecks
from mlo.distributed import DataParallel, inside
from mlo.errors import ProblemError, nearest
from mlo.gradient_sums import GradientSums, MetricKinds
from mlo.loss_errors import (
    NO_DERIVATIVE,
    WANTS_GRADIENT,
    explain_inference,
    explain_undifferentiated,
    say_whose,
)
from mlo.loss_results import LossValue, read_result
from mlo.once import CURRENT, RecordedResults, SharedResults, sharing
from mlo.placed_tensors import TRAINING, Placed, placed_without_fsdp_hooks, places_of
from mlo.problem import Problem, Tensors
from mlo.randomness import RandomState, forked
from mlo.sharding import is_sharded
from mlo.step_formulas import resolve_settings
from mlo.tensors import copies, in_new_containers, versions_of

__all__ = ["Examine", "LossFunction"]

Examine = Callable[[Tensor, Sequence[Tensor]], None]
"""Checks a player's loss on a first batch, given the leaves whose gradient moves the problem.

Raises if the loss is unfit.
"""


class LossFunction:
    """A problem's loss, with the modules of all problems that it sees.

    Args:
        problem: whose loss.
        reads: the problems that it reads, by name.
        parallel: the processes among which its batches are divided.

    Attributes:
        in_common: problem that it reads → names of what that problem's module shares with
            the own one: buffers and frozen parameters of a module that is in both.
        lends: whether constants that stand for parameters require gradients while it is evaluated
            (see `lends_after`).
    """

    def __init__(
        self, problem: Problem, reads: Mapping[str, Problem], parallel: DataParallel | None = None
    ) -> None:
        self.problem = problem
        self.reads = tuple(reads)
        self.parallel = parallel
        modules = {name: other.module for name, other in reads.items()}
        # Each function of the problem is called with those that it names.
        self._of_loss = {n: module for n, module in modules.items() if n in problem.loss_reads}
        self._of_step = {n: m for n, m in modules.items() if n in problem.after_step_reads}
        self._of_settings = {n: m for n, m in modules.items() if n in problem.settings_reads}
        members = {problem.name: problem.module, **modules}
        self._places = places_of(members)
        # Not the trainable parameters, which are in one module each.
        own_places = {id(places) for places in self._places[problem.name].values()}
        self.in_common: dict[str, frozenset[str]] = {}
        for name in self.reads:
            common = [key for key, places in self._places[name].items() if id(places) in own_places]
            self.in_common[name] = frozenset(common)
        # Every module once, however many members hold it.
        unique = {id(inner): inner for module in members.values() for inner in module.modules()}
        self._modules = list(unique.values())
        self.checks = NoChecks() if problem.device.type == "meta" else CheckSchedule()
        self.lends = False
        self.displaced: Tensors = {}  # memory for the points of finite differences, by parameter
        self.advice = EngineAdvice()  # on engines of its solution
        self.metric_kinds: MetricKinds = {}  # those that processes average
        # The declared structure: the place of each of its parameters and modules.
        self._declared: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        for module in problem.module.modules():
            for registry in (module._parameters, module._modules):
                self._declared += [(registry, key, value) for key, value in registry.items()]
                self._sizes.append((registry, len(registry)))
        frozen = [p for p in problem.module.parameters() if not p.requires_grad]
        self._frozen = frozen, list(problem.parameters.values())
        self.sharded = any(
            is_sharded(p) for module in members.values() for p in module.parameters()
        )

    def check_unedited(self) -> None:
        """Refuses a module that is not the one that the problem was declared with.

        Its optimizer, its engine and its readers hold the original parameters.

        Raises:
            ProblemError: naming what was edited.
        """
        # By identity: values may change in place, tensors and modules may not be exchanged.
        for registry, key, value in self._declared:
            if registry.get(key) is not value:
                raise self._edited(f"{key!r} was replaced or removed")
        for registry, size in self._sizes:
            if len(registry) != size:
                raise self._edited(f"{list(registry)[-1]!r} was added")
        frozen, trainable = self._frozen
        for parameter in frozen:
            if parameter.requires_grad:
                raise self._edited("a parameter that was frozen requires a gradient now")
        for parameter in trainable:
            if not parameter.requires_grad:
                raise self._edited("a parameter was frozen (requires_grad_(False))")

    def _edited(self, what: str) -> ProblemError:
        return ProblemError(
            f"The module of problem {self.problem.name!r} was edited after the optimizer was made: "
            f"{what}. Change values in place (copy_, load_state_dict without assign=True), or make "
            "a new Problem, torch optimizer and MultilevelOptimizer for the edited module."
        )

    def copied(self, names: Mapping[str, Iterable[str]]) -> dict[str, Tensors]:
        """Copies of the tensors that the modules hold now, by problem and name."""
        found: dict[str, Tensors] = {}
        for problem, of_problem in names.items():
            held: Tensors = {}
            for name in of_problem:
                registry, key, _ = self._places[problem][name][0]
                tensor = registry.get(key)
                if tensor is not None:
                    held[name] = tensor
            found[problem] = dict(zip(held, copies(held.values()), strict=True))
        return found

    @property
    def modes(self) -> list[bool]:
        """The training flag of every module in it."""
        return list(map(TRAINING, self._modules))

    def placed(
        self, tensors: Mapping[str, Mapping[str, Tensor]], modes: Sequence[bool] | None = None
    ) -> AbstractContextManager[None]:
        """Puts tensors in place of the live ones, and sets training flags, while the body runs.

        The body must contain the backward passes too, since `torch.utils.checkpoint` runs the
        modules again in them. (`torch.func.functional_call` would restore the live tensors when the
        forward pass ends.)

        Args:
            tensors: problem → name → tensor. A tied tensor is replaced in all its places.
            modes: the training flags, as `modes` returned them; None leaves them alone. Otherwise
                the flags are restored at the end, so that a loss may call `eval()` on a module.
        """
        where = []
        for problem, named in tensors.items():
            if named:
                where.append((self._places[problem], named))
        placed = Placed(where, self._modules, modes)
        return placed_without_fsdp_hooks(placed, self._modules) if self.sharded else placed

    def lends_after(self, error: RuntimeError) -> bool:
        """Whether the loss is to be evaluated once more after an error, and lends from now on.

        A loss may take gradients itself, by torch.autograd.grad or hooks of tensors: in its own
        parameters (SAM, MAML), in what it reads (gradient matching), in activations. It then needs
        parameters that require gradients, also where constants stand for them: values of problems
        whose derivative nobody asks for, displaced parameters. No gradient is computed in these,
        but the graphs of what is computed from them are kept. So only losses that need it get them.
        """
        if self.lends or not any(text in str(error) for text in WANTS_GRADIENT):
            return False
        self.lends = True
        return True

    def lent(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors that stand for parameters; if the loss lends, constants among them are leaves."""
        if not self.lends:
            return tensors
        return {
            key: tensor if tensor.requires_grad else tensor.detach().requires_grad_()
            for key, tensor in tensors.items()
        }

    def value(
        self,
        batch: Any,
        *,
        players: Collection[str] | None = None,
        shared: RecordedResults | SharedResults | None = None,
        versions: tuple[int, ...] | None = None,
        function: Callable[..., Any] | None = None,
    ) -> LossValue:
        """Evaluates the loss with the tensors and flags that the modules hold now.

        Args:
            batch: its batch.
            players: those whose losses are needed; None: all.
            shared: takes its calls of `once`.
            versions: those of the batch's tensors, where they are known.
            function: the user's loss, if it may have been another one then; None: that of now.

        Raises:
            ProblemError: if the loss changes its batch in place, so that it could not be evaluated
                again.
        """
        problem = self.problem
        given = batch
        if batch is not None:
            # So that a loss may pop entries from its batch.
            given = in_new_containers(batch)
            if versions is None:
                versions = versions_of(batch)

        # Around whole rounds, autocast would give casts of weights as they were before a step: it
        # keeps them until its outermost region ends.
        torch.clear_autocast_cache()
        # A loss may run another optimizer inside, which must not share results with this one.
        if problem.precision is not None:
            with torch.autocast(problem.device.type, dtype=torch.bfloat16), sharing(shared):
                value = self._called(given, players, function)
        elif shared is CURRENT.get():
            value = self._called(given, players, function)
        else:
            token = CURRENT.set(shared)
            try:
                value = self._called(given, players, function)
            finally:
                CURRENT.reset(token)

        if versions is not None and versions_of(batch) != versions:
            raise ProblemError(
                f"The loss of problem {problem.name!r} changes its batch in place. The batch is "
                "needed again when the solution is differentiated. Work on a copy (x = "
                "x.clone(), or x - mean instead of x.sub_(mean))."
            )
        return value

    def _called(
        self, batch: Any, players: Collection[str] | None, function: Callable[..., Any] | None
    ) -> LossValue:
        """Calls the loss, and reads what it returns."""
        problem = self.problem
        try:
            loss = problem.loss if function is None else function
            result = loss(problem.module, batch, **self._of_loss)
        except Exception as error:
            explain_inference(error, problem.name)
            missing = isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error)
            if missing and batch is None and problem.data is None:
                error.add_note(f"Problem {problem.name!r} has no data=, so its batch is None.")
            else:
                say_whose(error, problem.name)
            if any(text in str(error) for text in NO_DERIVATIVE):
                error.add_note(
                    "PyTorch takes this argument as a constant, so that it cannot be learned. "
                    "Write its part of the formula in plain operations: for weights of classes "
                    "(weight[y] * cross_entropy(output, y, reduction='none')).sum() / "
                    "weight[y].sum()."
                )
            raise
        return read_result(problem, result, players)

    def settings(self, made: int) -> dict[str, dict[str, Any]]:
        """The optimizers' settings with the tensors that the modules hold: parameter → setting.

        Args:
            made: the number of steps that the problem has made.

        Raises:
            ProblemError: if the problem's `settings` returned what cannot be used.
        """
        problem = self.problem
        if problem.settings is None:
            return {}
        optimizer_of: dict[str, Optimizer] = {}
        for optimizer in problem.optimizers.values():
            members = {id(p) for group in optimizer.param_groups for p in group["params"]}
            optimizer_of |= {
                key: optimizer for key, p in problem.parameters.items() if id(p) in members
            }
        count = (made,) if problem.settings_take_count else ()
        returned = problem.settings(*count, **self._of_settings)
        return resolve_settings(problem.name, returned, optimizer_of, problem.parameters)

    def after_step(self, parameters: Tensors, made: int) -> Tensors:
        """The parameters as `after_step` leaves them, with the tensors that the modules hold.

        Args:
            parameters: those after the optimizers' step.
            made: the number of steps that the problem had made before.

        Raises:
            ProblemError: if it returned anything but tensors that take their places.
        """
        problem = self.problem
        if problem.after_step is None:
            return parameters
        count = (made,) if problem.after_step_takes_count else ()
        returned = problem.after_step(dict(parameters), *count, **self._of_step)
        if not isinstance(returned, Mapping):
            raise ProblemError(
                f"Problem {problem.name!r}: after_step must return a dict parameter → tensor, got "
                f"a {type(returned).__name__}."
            )
        for key, tensor in returned.items():
            before = parameters.get(key)
            if before is None:
                raise ProblemError(
                    f"Problem {problem.name!r}: after_step returned {key!r}, which is not one of "
                    f"the parameters that it was given. {nearest(str(key), parameters)}"
                )
            if not isinstance(tensor, Tensor) or tensor.shape != before.shape:
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
                raise ProblemError(
                    f"Problem {problem.name!r}: after_step must return {key!r} as a tensor of its "
                    f"shape {tuple(before.shape)}, got {got!r}."
                )
        return parameters | dict(returned)

    @contextmanager
    def among_processes(
        self, parallel: DataParallel | None, placed: AbstractContextManager[None]
    ) -> Iterator[None]:
        """Makes `mlo.distributed.global_mean` and its like refer to these processes in the body.

        Args:
            parallel: the processes.
            placed: another context of the body.
        """
        with inside(parallel), placed:
            yield

    def differentiate(
        self,
        batches: Sequence[Any],
        parameters: Tensors,
        leaves: Sequence[Tensor],
        *,
        players: Collection[str] | None = None,
        create_graph: bool = False,
        examine: Examine | None = None,
        versions: Sequence[tuple[int, ...] | None] = (),
        begun: RandomState | None = None,
    ) -> GradientSums:
        """Evaluates the loss on each batch and differentiates it at the modules' current point.

        Args:
            batches: those averaged over.
            parameters: the tensors that stand for the problem's own parameters.
            leaves: other tensors with respect to which it is differentiated.
            players: those whose losses are differentiated, each in its own parameters; None: all.
            create_graph: whether the gradients can themselves be differentiated.
            examine: is shown each player's loss on the first batch, before it is differentiated.
            versions: of each batch's tensors, where they are known.
            begun: the random state now, where it is known.
        """
        problem, parallel = self.problem, self.parallel
        found = GradientSums(problem, len(batches), leaves, self.metric_kinds)
        for index, batch in enumerate(batches):
            first = examine is not None and index == 0
            recorded = RecordedResults(problem.name) if first else None

            known = versions[index] if versions else None
            # With noise="own" each process has a random state of its own inside the loss. The state
            # is captured in there: it is the one that a re-evaluation must replay.
            if parallel is not None and parallel.noise == "own":
                with forked(parallel.rank, problem.generators):
                    found.random_states.append(RandomState.capture(problem.generators))
                    value = self.value(batch, players=players, shared=recorded, versions=known)
            else:
                now = begun if begun is not None and index == 0 else None
                found.random_states.append(now or RandomState.capture(problem.generators))
                value = self.value(batch, players=players, shared=recorded, versions=known)
            if recorded is not None:
                recorded.check(list(parameters.values()))
            if value.metrics:
                found.add_metrics(value.metrics)

            remaining = len(value.players)
            for player, loss in value.players.items():
                remaining -= 1
                own = list(map(parameters.__getitem__, problem.player_parameters[player]))
                if examine is not None and first:
                    try:
                        examine(loss, [*own, *leaves])
                    except RuntimeError as error:
                        explain_undifferentiated(error, problem.name)
                        raise
                # A game's players may share a graph, which the last one releases.
                retain = create_graph or remaining > 0
                found.add(player, loss, own, retain_graph=retain, create_graph=create_graph)
        if self.lends:  # what is lent makes every loss require a gradient
            found.has_derivative = all(
                any(entry is not None for entry in (*direct, *found.cotangents[player]))
                for player, direct in found.direct.items()
            )
        return found
