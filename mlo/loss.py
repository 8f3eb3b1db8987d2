"""Calls a user's loss with other tensors in place of the live ones, and differentiates it.

User code sees ordinary modules. While it runs, the tensors that its modules hold are replaced: by
responses, by the values at which a step was made, by displaced parameters, by copies of buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mlo.advice import EngineAdvice
from mlo.backward import grad
from mlo.check_schedule import CheckSchedule, NoChecks
from mlo.distributed import DataParallel, inside
from mlo.errors import ProblemError, nearest
from mlo.once import CURRENT, RecordedResults, SharedResults, sharing
from mlo.problem import Problem, Tensors
from mlo.randomness import RandomState, forked
from mlo.sharding import is_sharded, without_fsdp_hooks
from mlo.step_formulas import resolve_settings
from mlo.tensors import add_all, copies, in_new_containers, map_tensors, versions_of, zeros_for_none

__all__ = [
    "Examine",
    "GradientSums",
    "LossFunction",
    "LossValue",
    "call_deferred",
    "check_dense",
    "explain_frozen",
    "gradients",
    "is_number",
    "share_of",
]

Examine = Callable[[Tensor, Sequence[Tensor]], None]
"""Checks a player's loss on a first batch, given the leaves whose gradient moves the problem.

Raises if the loss is unfit.
"""

Places = list[tuple[dict[str, Any], str, bool]]
"""All places of one tensor: a module's dict, its name there, and whether it is a parameter."""

MetricKinds = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name → shape and dtype of a metric that is averaged."""

TRAINING = attrgetter("training")

WANTS_GRADIENT = (
    "does not require grad",  # torch.autograd.grad, of or in such a tensor
    "has requires_grad=False",  # Tensor.retain_grad
    "doesn't require gradient",  # Tensor.register_hook
)
"""What PyTorch says where a tensor must require a gradient and does not."""

NO_DERIVATIVE = (
    "is not differentiable with respect to argument",  # cross_entropy(weight=)
    "must be float, not Tensor",  # cross_entropy(label_smoothing=), dropout(p=)
)
"""What PyTorch says where a tensor that requires a gradient is in the place of a constant."""

RAISED_IN = "It was raised in the loss of problem"


@dataclass(kw_only=True, eq=False)
class LossValue:
    """What a loss returned: player → scalar, and metrics.

    Players that were not requested are missing.
    """

    players: dict[str, Tensor]
    metrics: dict[str, Any]


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
        self._places = _places_of(members)
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
        placed = _Placed(where, self._modules, modes)
        return _placed_without_fsdp_hooks(placed, self._modules) if self.sharded else placed

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
        """Calls the loss, and parses what it returns."""
        problem = self.problem
        try:
            loss = problem.loss if function is None else function
            result = loss(problem.module, batch, **self._of_loss)
        except Exception as error:
            _explain_inference(error, problem.name)
            missing = isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error)
            if missing and batch is None and problem.data is None:
                error.add_note(f"Problem {problem.name!r} has no data=, so its batch is None.")
            else:
                _say_whose(error, problem.name)
            if any(text in str(error) for text in NO_DERIVATIVE):
                error.add_note(
                    "PyTorch takes this argument as a constant, so that it cannot be learned. "
                    "Write its part of the formula in plain operations: for weights of classes "
                    "(weight[y] * cross_entropy(output, y, reduction='none')).sum() / "
                    "weight[y].sum()."
                )
            raise
        return _parse(problem, result, players)

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
                        _explain(error, problem.name)
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


class GradientSums:
    """A loss and its first derivatives, averaged over the batches of one evaluation.

    Args:
        problem: whose loss.
        batches: how many are averaged.
        leaves: the other tensors with respect to which it is differentiated.
        kinds: the metrics on which the processes have agreed; `average` changes it.

    Attributes:
        losses: player → loss.
        metrics: what the loss returned beside it.
        direct: player → gradient in each of its parameters; None where the loss does not depend on
            the parameter.
        cotangents: player → gradient in each leaf, likewise.
        has_derivative: whether every loss had a derivative at all.
        random_states: the random state before each batch.
    """

    def __init__(
        self,
        problem: Problem,
        batches: int,
        leaves: Sequence[Tensor],
        kinds: MetricKinds | None = None,
    ) -> None:
        self._problem, self._batches, self._leaves = problem, batches, leaves
        self._kinds: MetricKinds = {} if kinds is None else kinds
        self._counts: dict[str, int] = {}
        self.losses: dict[str, Tensor] = {}
        self.metrics: dict[str, Any] = {}
        self.direct: dict[str, list[Tensor | None]] = {}
        self.cotangents: dict[str, list[Tensor | None]] = {}
        self.has_derivative = True
        self.random_states: list[RandomState] = []

    def add(
        self,
        player: str,
        loss: Tensor,
        own: Sequence[Tensor],
        *,
        retain_graph: bool,
        create_graph: bool,
    ) -> None:
        """Adds one batch's loss of a player, and its gradients.

        Raises:
            ProblemError: if a gradient is sparse.
        """
        share = loss if self._batches == 1 else share_of(loss, self._batches)
        inputs = [*own, *self._leaves]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if share.requires_grad:
            # One backward pass for both: own parameters, and the other tensors to differentiate by.
            try:
                found = grad([share], inputs, retain_graph=retain_graph, create_graph=create_graph)
            except RuntimeError as error:
                _explain(error, self._problem.name)
                raise
            check_dense(self._problem.name, found)

        self.has_derivative &= any(entry is not None for entry in found)

        # The sum over the batches; each has contributed its share of the mean.
        direct, cotangents, detached = found[: len(own)], found[len(own) :], share.detach()
        if share.is_leaf or share._is_view():  # a parameter, perhaps, which is about to move
            detached = detached.clone()
        if player not in self.losses:
            self.direct[player], self.cotangents[player] = list(direct), list(cotangents)
            self.losses[player] = detached
            return
        self.direct[player] = add_all(self.direct[player], direct)
        self.cotangents[player] = add_all(self.cotangents[player], cotangents)
        self.losses[player] = self.losses[player] + detached

    def replaced(
        self,
        direct: dict[str, list[Tensor | None]],
        cotangents: dict[str, list[Tensor | None]],
    ) -> GradientSums:
        """The same sums with other derivatives."""
        found = copy.copy(self)
        found.direct, found.cotangents = direct, cotangents
        return found

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds a batch's metrics.

        Numbers are averaged over the batches that returned them. Of anything else (a count, a
        string) the last value stays.
        """
        for key, value in metrics.items():
            count = self._counts.get(key, 0) if is_number(value) else 0
            if count:
                value = (self.metrics[key] * count + value) / (count + 1)
            self.metrics[key] = value
            self._counts[key] = count + 1 if is_number(value) else 0

    def average(
        self,
        parallel: DataParallel,
        statistics: Sequence[Tensor],
        *,
        gradient: dict[str, Tensor | None] | None = None,
    ) -> None:
        """Averages everything over the processes, in one reduction.

        Args:
            parallel: the processes.
            statistics: running statistics of BatchNorm layers, averaged in place.
            gradient: parameter → total gradient, averaged instead of its terms.
        """
        # Every tensor is listed with its place, to which its mean is written back.
        entries = self._gradient_entries() if gradient is None else self._total_entries(gradient)
        entries += [_Entry(self.losses, player, loss) for player, loss in self.losses.items()]
        # Not all processes need return the same metrics, but all must reduce the same buffers. So
        # they reduce those on which they have agreed, and whether a process has another one.
        numbers = self._numbers()
        known = _MetricSums(numbers, self._kinds, self._problem.device)
        entries += known.entries
        others = any(self._kinds.get(key) != _kind(value) for key, value in numbers.items())
        flag = {"others": torch.full_like(next(iter(self.losses.values())), float(others))}
        entries.append(_Entry(flag, "others", flag["others"]))
        moving = list(statistics)
        entries += [_Entry(moving, index, value) for index, value in enumerate(statistics)]
        # Not sharded tensors, which the reduce-scatter of their backward pass has averaged already.
        entries = [entry for entry in entries if not is_sharded(entry.like)]
        _reduce(parallel, entries)
        with torch.no_grad():
            for statistic, mean in zip(statistics, moving, strict=True):
                statistic.copy_(mean)
        self.metrics |= known.means()
        if float(flag["others"]) > 0.0:
            fresh = self._agree(parallel, numbers)
            added = _MetricSums(numbers, fresh, self._problem.device)
            _reduce(parallel, added.entries)
            self.metrics |= added.means()

    def _numbers(self) -> dict[str, Tensor]:
        """The metrics that are averaged, as tensors where the problem is."""
        return {
            key: torch.as_tensor(value, device=self._problem.device)
            for key, value in self.metrics.items()
            if is_number(value)
        }

    def _agree(self, parallel: DataParallel, numbers: Mapping[str, Tensor]) -> MetricKinds:
        """Agrees with the other processes on all metrics; returns those that are new or changed.

        Raises:
            ProblemError: on all processes, if a metric has different shapes or dtypes.
        """
        own = {key: _kind(value) for key, value in numbers.items()}
        agreed: MetricKinds = {}
        for rank, theirs in enumerate(parallel.gather_objects(own)):
            for key, kind in theirs.items():
                if agreed.setdefault(key, kind) != kind:
                    raise ProblemError(
                        f"The loss of problem {self._problem.name!r} returned the metric {key!r} "
                        f"as {_of_kind(kind)} on process {rank} and as {_of_kind(agreed[key])} on "
                        "another. It is averaged over the processes: return the same shape and "
                        "dtype on all."
                    )
        fresh = {key: kind for key, kind in agreed.items() if self._kinds.get(key) != kind}
        self._kinds.update(fresh)
        return fresh

    def _gradient_entries(self) -> list[_Entry]:
        entries: list[_Entry] = []
        for player, terms in self.direct.items():
            names = self._problem.player_parameters[player]
            like = [self._problem.parameters[name] for name in names]
            entries += [_Entry(terms, index, parameter) for index, parameter in enumerate(like)]
        for terms in self.cotangents.values():
            entries += [_Entry(terms, index, leaf) for index, leaf in enumerate(self._leaves)]
        return entries

    def _total_entries(self, gradient: dict[str, Tensor | None]) -> list[_Entry]:
        for key in self._problem.parameters:
            gradient.setdefault(key, None)
        return [_Entry(gradient, key, p) for key, p in self._problem.parameters.items()]


class _Entry(NamedTuple):
    """One averaged tensor: where it is kept, and a tensor of its shape."""

    within: Any
    key: Any
    like: Tensor


class _MetricSums:
    """Metrics in a reduction, each with the share of the processes that returned it.

    Args:
        numbers: those of this process.
        kinds: those of all processes.
        device: where the problem is.

    Attributes:
        entries: what is reduced.
    """

    def __init__(
        self, numbers: Mapping[str, Tensor], kinds: MetricKinds, device: torch.device
    ) -> None:
        self._sums: dict[str, Tensor | None] = {}
        self._shares: dict[str, Tensor | None] = {}
        self.entries: list[_Entry] = []
        for key in sorted(kinds):
            shape, dtype = kinds[key]
            one = torch.ones((), dtype=dtype, device=device)
            has = key in numbers and _kind(numbers[key]) == kinds[key]
            self._sums[key] = numbers[key] if has else None
            self._shares[key] = one if has else None
            self.entries.append(_Entry(self._sums, key, one.expand(shape)))
            self.entries.append(_Entry(self._shares, key, one))

    def means(self) -> dict[str, Tensor]:
        """After the reduction: name → mean over the processes that returned it."""
        found: dict[str, Tensor] = {}
        for key, total in self._sums.items():
            share = self._shares[key]
            if total is not None and share is not None:
                found[key] = total / share
        return found


def _reduce(parallel: DataParallel, entries: Sequence[_Entry]) -> None:
    """Writes the means over the processes to the entries' places."""
    means = parallel.average(
        [entry.within[entry.key] for entry in entries], [entry.like for entry in entries]
    )
    for entry, mean in zip(entries, means, strict=True):
        entry.within[entry.key] = mean


def _kind(value: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(value.shape), value.dtype


def _of_kind(kind: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{kind[1]} of shape {kind[0]}"


def check_dense(problem: str, found: Iterable[Tensor | None]) -> None:
    """Refuses derivatives of a problem's loss that are sparse.

    Raises:
        ProblemError: with what to do.
    """
    for gradient in found:
        if gradient is not None and gradient.layout != torch.strided:
            raise ProblemError(
                f"Problem {problem!r}: its loss has sparse gradients, which no engine supports. "
                "Build embeddings with sparse=False."
            )


def share_of(value: Any, count: int) -> Any:
    """What one of that many batches adds to a mean; a single batch adds its value unchanged."""
    return value if count == 1 else value / count


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
    found = grad([loss], inputs, retain_graph=retain_graph, create_graph=create_graph)
    return zeros_for_none(found, inputs)


def call_deferred(
    players: dict[str, Any],
    problem: str = "",
    generators: Sequence[torch.Generator] = (),
    *,
    functions: int | None = None,
) -> dict[str, Any]:
    """Replaces losses that are functions by their values; returns the metrics beside them.

    Each function starts from the same random state, so its value does not depend on which others
    are called.

    Args:
        players: player → scalar or function, of the players that were requested; changed.
        problem: its name, for messages.
        generators: those that it names.
        functions: how many functions the loss returned for all players; None: these are all.
    """
    called = [player for player, loss in players.items() if callable(loss)]
    found: dict[str, Any] = {}
    if functions is None:
        functions = len(called)
    if functions < 2:
        for player in called:
            players[player], found = _with_metrics(problem, players[player]())
        return found
    # One state that several functions start from has no end that lies behind all that they draw,
    # as far as can be told. So they draw from a stream of their own, a new one at each evaluation;
    # the common one moves by the number that chooses it.
    if called:
        with forked(0, generators):
            state = RandomState.capture(generators)
            for player in called:
                state.restore(generators)
                players[player], metrics = _with_metrics(problem, players[player]())
                found |= metrics
    return found


# ------------------------------ parts of the above


class _Placed:
    """A context in which the modules hold other tensors, as `LossFunction.placed` describes.

    (A class takes a third of the time of a generator with `contextmanager`.)

    Args:
        where: pairs of the places of tensors by name, and tensors to put there.
        modules: whose training flags are set.
        modes: the flags; None leaves them alone. Otherwise they are restored, also if the body
            changes them.
    """

    __slots__ = ("_before", "_flags", "_modes", "_modules", "_where")

    def __init__(
        self,
        where: Sequence[tuple[dict[str, Places], Mapping[str, Tensor]]],
        modules: Sequence[nn.Module],
        modes: Sequence[bool] | None,
    ) -> None:
        self._where, self._modules, self._modes = where, modules, modes
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        self._flags: list[bool] | None = None

    def __enter__(self) -> None:
        before = self._before
        try:
            for places, named in self._where:
                for name, tensor in named.items():
                    # One object in all places of a tied parameter.
                    registry, key, is_parameter = places[name][0]
                    if is_parameter:
                        tensor = _like(registry[key], tensor)
                    for registry, key, _ in places[name]:
                        # In the registry itself, which takes any tensor; assigning the module's
                        # attribute would demand an nn.Parameter.
                        before.append((registry, key, registry[key]))
                        registry[key] = tensor
            if self._modes is not None:
                flags = self._flags = list(map(TRAINING, self._modules))
                if flags != self._modes:
                    _set_modes(self._modules, self._modes)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        flags = self._flags
        if flags is not None and flags != list(map(TRAINING, self._modules)):
            _set_modes(self._modules, flags)
        # Backwards: a place that was replaced twice gets its first tensor back last.
        for registry, key, tensor in reversed(self._before):
            registry[key] = tensor


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor made to look like the parameter in whose place it is put, to the user's code."""
    if tensor is parameter:
        return tensor
    kind, given = type(parameter), type(tensor)
    if kind is not nn.Parameter and given is not kind and issubclass(kind, nn.Parameter):
        tensor = tensor.as_subclass(kind)
    if given is not nn.Parameter:
        # So that the methods of modules treat it as one (`get_parameter`).
        tensor._is_param = True
    if parameter.__dict__:
        # Attributes of the user's (`p.no_decay = True`); the compiler's are about the one tensor.
        for key, value in parameter.__dict__.items():
            if not key.startswith("_dynamo"):
                tensor.__dict__[key] = value
    return tensor


@contextmanager
def _placed_without_fsdp_hooks(
    placed: AbstractContextManager[None], modules: Sequence[nn.Module]
) -> Iterator[None]:
    """Runs the body with tensors in their places, and without the hooks of `fully_shard`."""
    with placed, without_fsdp_hooks(modules):
        yield


def _set_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    for module, training in zip(modules, modes, strict=True):
        module.training = training


class _PlacesByName(dict[str, Places]):
    """Name of a parameter or buffer of a problem → all places of that tensor.

    Those of a buffer that a module makes during the run (a cached mask) are found when they are
    first needed.
    """

    def __init__(self, member: str, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._member, self._members = member, members

    def __missing__(self, name: str) -> Places:
        for key, places in _places_of(self._members)[self._member].items():
            self.setdefault(key, places)
        if name not in self:
            raise KeyError(name)
        return self[name]


def _places_of(members: Mapping[str, nn.Module]) -> dict[str, _PlacesByName]:
    """Problem → name of a parameter or buffer → all places of that tensor in all modules."""
    # With duplicates: a submodule that has two names has its tensors under both.
    by_tensor: dict[int, Places] = {}
    found: dict[str, _PlacesByName] = {}
    for member, whole in members.items():
        found[member] = _PlacesByName(member, members)
        for prefix, module in whole.named_modules(remove_duplicate=False):
            for registry in (module._parameters, module._buffers):
                for key, tensor in registry.items():
                    if tensor is None:
                        continue
                    # A tied tensor (two names, one tensor) has several places, perhaps in several
                    # problems' modules.
                    places = by_tensor.setdefault(id(tensor), [])
                    if not any(known is registry and name == key for known, name, _ in places):
                        places.append((registry, key, isinstance(tensor, nn.Parameter)))
                    found[member][f"{prefix}.{key}" if prefix else key] = places
    return found


def _say_whose(error: Exception, problem: str) -> None:
    """Adds to an error whose loss it came from: all losses may share one function."""
    note = f"{RAISED_IN} {problem!r}."
    if note not in getattr(error, "__notes__", ()) and repr(problem) not in str(error):
        error.add_note(note)


def explain_frozen(error: BaseException, problems: Sequence[str]) -> None:
    """Says that a loss has frozen what it is differentiated in, if that is the error.

    Args:
        error: as PyTorch raised it.
        problems: those whose losses it may be.

    Raises:
        ProblemError: naming them.
    """
    notes = getattr(error, "__notes__", ())
    if any(note.startswith(RAISED_IN) for note in notes):
        return  # where the loss itself takes a gradient
    if "differentiated Tensors does not require grad" not in str(error):
        return
    whose = " or ".join(map(repr, problems))
    raise ProblemError(
        f"The loss of problem {whose} freezes parameters (requires_grad_(False)) of a module that "
        "it reads, in which it must be differentiated. Leave them as they are: a loss moves no "
        "parameters but its own. To hold a value constant, detach() what is computed from it."
    ) from error


def _explain_inference(error: Exception, problem: str) -> None:
    """Says whose loss uses a tensor of inference mode, if that is the error.

    Raises:
        ProblemError: naming the problem.
    """
    if isinstance(error, RuntimeError) and "nference tensor" in str(error):
        raise ProblemError(
            f"Problem {problem!r}: its loss uses a tensor that was made under "
            "torch.inference_mode(): of its batch, or a constant. PyTorch cannot differentiate "
            "what is computed from it. Make it outside, or under torch.no_grad() instead, or "
            "clone() it outside."
        ) from error


def _explain(error: RuntimeError, problem: str) -> None:
    """Says whose loss PyTorch could not differentiate.

    Raises:
        ProblemError: if a part of the loss's graph is gone, or what it depends on was frozen.
    """
    explain_frozen(error, [problem])
    _explain_inference(error, problem)
    if "backward through the graph a second time" in str(error):
        raise ProblemError(
            f"Problem {problem!r}: a part of the graph of its loss was used up before the loss "
            "could be differentiated. Either the loss calls backward() itself, or it contains a "
            "tensor with the graph of an earlier call (a running mean, say). Return the loss, and "
            "let mlo differentiate it. Inside it use torch.autograd.grad(..., create_graph=True); "
            "detach() what is kept between calls."
        ) from error
    _say_whose(error, problem)


def _parse(problem: Problem, result: Any, chosen: Collection[str] | None) -> LossValue:
    metrics: dict[str, Any] = {}
    loss = result
    if isinstance(result, tuple):
        loss, metrics = _with_metrics(problem.name, result)
    if problem.is_game:
        if not isinstance(loss, Mapping) or set(loss) != set(problem.players):
            is_mapping = isinstance(loss, Mapping)
            got = f"the players {sorted(loss)}" if is_mapping else f"a {type(loss).__name__}"
            raise ProblemError(
                f"The loss of the game {problem.name!r} returned {got}; return a dict with one "
                f"scalar for each of {sorted(problem.players)}."
            )
        # First the requested players, then their functions: the others are never called.
        players = {player: loss[player] for player in loss if chosen is None or player in chosen}
        functions = sum(map(callable, loss.values()))
        metrics |= call_deferred(players, problem.name, problem.generators, functions=functions)
    else:
        players = {problem.name: loss}
    for player, scalar in players.items():
        is_tensor = isinstance(scalar, Tensor)
        if not is_tensor or scalar.numel() != 1 or not scalar.dtype.is_floating_point:
            raise _no_scalar(problem, player, scalar)
        if scalar.dim():
            players[player] = scalar.reshape(())
    if metrics:
        metrics = map_tensors(metrics, _kept)
    return LossValue(players=players, metrics=metrics)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _no_scalar(problem: Problem, player: str, value: Any) -> ProblemError:
    of = f" of player {player!r}" if problem.is_game else ""
    got = repr(value)
    if isinstance(value, Tensor):
        got = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    advice = "Reduce it, for example by .mean()."
    if isinstance(value, Mapping) and not problem.is_game:
        advice = (
            "Return the loss and its metrics as a pair: `return loss, {'accuracy': accuracy}`. If "
            "several players have their own losses, declare them with players=."
        )
        if isinstance(value.get("loss"), Tensor):  # of transformers, of Lightning
            advice = (
                "Return its entry 'loss', or with metrics a pair: `return loss, {'accuracy': "
                "accuracy}`."
            )
        elif all(isinstance(part, Tensor) and part.numel() == 1 for part in value.values()):
            advice = "If these are parts of one loss, return their sum. " + advice
        got = f"a dict of {', '.join(map(repr, value))}"
    return ProblemError(
        f"The loss{of} of problem {problem.name!r} must be a floating-point scalar tensor (or a "
        f"pair of it and a dict of metrics), got {got}. {advice}"
    )


def _with_metrics(problem: str, result: Any) -> tuple[Any, dict[str, Any]]:
    """A loss, and the metrics that may come with it."""
    if not (isinstance(result, tuple) and len(result) == 2):
        return result, {}
    loss, metrics = result
    if not isinstance(metrics, Mapping):
        raise ProblemError(
            f"The loss of problem {problem!r} returned a pair whose second part is a "
            f"{type(metrics).__name__}; return (scalar, {{metric name: value}})."
        )
    return loss, dict(metrics)


def is_number(value: Any) -> bool:
    """Whether a metric is averaged: a floating-point number, or a tensor of such."""
    return isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
