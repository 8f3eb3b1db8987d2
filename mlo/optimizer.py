"""`MultilevelOptimizer`: moves every problem of a dependency graph down its total gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mlo.batches import BatchStream
from mlo.errors import CheckpointError, GraphError, ProblemError, SolveWarning, nearest
from mlo.evaluation import Evaluation, LossModule, batch_versions
from mlo.graph import DependencyGraph
from mlo.hypergradient.base import Engine
from mlo.hypergradient.compatibility import check_engines
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.optimizer_step import OptimizerStep
from mlo.hypergradient.registry import EngineChoice, engines_for
from mlo.problem import SINGLE_PLAYER, Problem, Tensors
from mlo.randomness import RandomState, preserved
from mlo.records import Record, SolveReport
from mlo.response import Context, Solution

__all__ = ["MultilevelOptimizer"]

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class _TotalGradient:
    """A problem's total gradient at one point, and what came with it.

    Attributes:
        gradient: zero for parameters that the loss does not depend on.
        unused: these; their optimizer leaves them alone, as it does in plain PyTorch.
    """

    gradient: Tensors
    unused: frozenset[str]
    losses: dict[str, Tensor]
    metrics: dict[str, Any]
    reports: list[SolveReport]
    evaluation: Evaluation


class MultilevelOptimizer:
    """Optimizes problems that depend on each other's solutions.

    Args:
        problems: from the innermost to the outermost. A loss that reads a problem listed before its own is
            differentiated through that problem's solution; one that reads a later one takes its current value.
        hypergradient: how solutions are differentiated: an engine, a name (`mlo.available_engines()`), a mapping with a
            name and options, or a dict *lower problem* → one of these, with "default" for the others.

    Raises:
        GraphError: if the problems do not form a valid graph.
        EngineError: if an engine is unknown or cannot serve this graph.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        hypergradient: EngineChoice | Mapping[str, EngineChoice] = "one_step",
    ) -> None:
        self.graph = DependencyGraph(problems)
        self.engines: dict[str, Engine] = engines_for(self.graph.problems, hypergradient)
        self.round = 0
        self._schedule = self.graph.schedule()
        self._streams = {name: BatchStream(problem.data, name) for name, problem in self.problems.items()}
        self._modules = {
            name: LossModule(problem, {read: self.problems[read] for read in self.graph.reads[name]})
            for name, problem in self.problems.items()
        }
        self._differentiated = {
            lower
            for name in self.problems
            for lower in self.graph.responses(name)
            if not self.engines[lower].drops_implicit_term
        }
        self._dependencies: dict[str, frozenset[str]] = {}
        for name in self.problems:
            own = frozenset({name, *self.graph.upper(name)})
            self._dependencies[name] = own.union(*(self._dependencies[lower] for lower in self.graph.lower(name)))
        check_engines(self.graph, self.engines)
        for problem in self.problems.values():
            if problem.compile:
                problem.module.compile(**(problem.compile if isinstance(problem.compile, Mapping) else {}))
        self._updates = dict.fromkeys(self.problems, 0)
        self._warned: set[str] = set()
        self._memory: dict[str, dict[str, Tensor]] = {name: {} for name in self.problems}
        # What later gradients need of earlier updates: the evaluation of each problem's last update, its solution where
        # the engine differentiates that update, and other solutions with the state of the updates they were made at.
        self._current: dict[str, Evaluation] = {}
        self._steps: dict[str, Solution] = {}
        self._solutions: dict[str, tuple[tuple[int, ...], Solution]] = {}

    @property
    def problems(self) -> dict[str, Problem]:
        """Name → problem, from the innermost to the outermost."""
        return self.graph.problems

    def __repr__(self) -> str:
        engines = ", ".join(
            f"{name}: {self.engines[name].label}" for name in self.problems if name in self._differentiated
        )
        return f"MultilevelOptimizer({' → '.join(self.problems)}; {engines or 'no response is differentiated'})"

    def run(self, steps: int) -> Iterator[Record]:
        """Runs `steps` rounds; yields the record of each."""
        for _ in range(steps):
            yield self.step()

    def step(self) -> Record:
        """Runs one round: every problem is updated, in the order of `graph.schedule()`; returns its record."""
        if torch.is_inference_mode_enabled():
            raise ProblemError("A round cannot run under torch.inference_mode(), where nothing has a gradient.")
        record = Record(round=self.round + 1)
        for name in self._schedule:
            if self.round >= self.problems[name].warmup_steps:
                self._update(name, record)
        self.round += 1
        return record

    def gradient(self, name: str) -> Tensors:
        """Returns the total gradient of a problem's loss, and changes nothing.

        The gradient is taken at the current parameters and the problem's current batches: the ones of its last update,
        or, before the first, the ones that it will draw. Engines that differentiate the optimizer's step use the last
        step of each lower problem; for one that has not moved yet they look one step ahead of it.

        Args:
            name: the problem.

        Returns:
            parameter name → gradient, of the parameter's shape.

        Raises:
            GraphError: if there is no problem of that name.
        """
        if name not in self.problems:
            raise GraphError(f"There is no problem {name!r}. {nearest(name, self.problems)}")
        solutions = dict(self._solutions)
        memory = {other: dict(kept) for other, kept in self._memory.items()}
        with preserved([generator for problem in self.problems.values() for generator in problem.generators]):
            found = self._total_gradient(name, self._batches(name), live=False)
        self._solutions = solutions
        for other, kept in self._memory.items():
            kept.clear()
            kept.update(memory[other])
        return found.gradient

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a run needs to go on, as tensors and plain values (loadable with `weights_only=True`).

        Parameters, buffers, optimizers, schedulers, positions in the data, and the random state, as copies. Not the last
        steps themselves: until each problem has moved again, `gradient` looks ahead as it does before the first round.
        """
        generators = [generator for problem in self.problems.values() for generator in problem.generators]
        return {
            "version": STATE_VERSION,
            "round": self.round,
            "random": RandomState.capture(generators).state_dict(),
            "problems": {
                name: {
                    "module": _copied(dict(problem.module.state_dict())),
                    "optimizers": {key: _copied(o.state_dict()) for key, o in problem.optimizers.items()},
                    "schedulers": {key: _copied(s.state_dict()) for key, s in problem.schedulers.items()},
                    "data": self._streams[name].state_dict(),
                    "updates": self._updates[name],
                    "memory": {key: tensor.clone() for key, tensor in self._memory[name].items()},
                }
                for name, problem in self.problems.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state_dict` returned.

        Raises:
            CheckpointError: if the state is of another graph, or of a version that this one cannot read.
        """
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"The state has version {state.get('version')!r}; this version of mlo reads {STATE_VERSION}."
            )
        if set(state["problems"]) != set(self.problems):
            raise CheckpointError(
                f"The state is of the problems {sorted(state['problems'])}, this optimizer has {sorted(self.problems)}."
            )
        generators = [generator for problem in self.problems.values() for generator in problem.generators]
        random_state = RandomState.from_state_dict(state["random"])
        if len(random_state.generators) != len(generators):
            raise CheckpointError(
                f"The state has {len(random_state.generators)} generators, the problems name {len(generators)}."
            )
        for name, problem in self.problems.items():  # all of it, before anything is changed
            _check_state(problem, state["problems"][name])
        for name, problem in self.problems.items():
            saved = state["problems"][name]
            try:
                problem.module.load_state_dict(saved["module"])
                for key, optimizer in problem.optimizers.items():
                    optimizer.load_state_dict(saved["optimizers"][key])
                for key, scheduler in problem.schedulers.items():
                    scheduler.load_state_dict(saved["schedulers"][key])
            except (RuntimeError, KeyError, ValueError) as error:
                raise CheckpointError(
                    f"The state of problem {name!r} does not fit its module, optimizer or scheduler: {error}"
                ) from error
            self._streams[name].load_state_dict(saved["data"])
            self._updates[name] = saved["updates"]
            self._memory[name].clear()
            self._memory[name].update(
                {key: tensor.to(problem.device, copy=True) for key, tensor in saved["memory"].items()}
            )
        self.round = state["round"]
        self._current, self._steps, self._solutions = {}, {}, {}
        random_state.restore(generators)

    # ------------------------------------------------------------------ one update

    def _update(self, name: str, record: Record) -> None:
        problem = self.problems[name]
        batches = self._draw(name)
        found = self._total_gradient(name, batches, live=True)
        keeps_step = self._keeps_step(name)
        step = OptimizerStep.capture(problem) if keeps_step else None
        norm = torch.nn.utils.get_total_norm(list(found.gradient.values()))
        for key, parameter in problem.parameters.items():
            # Clipping scales in place, and the recorded step starts from the bare gradient.
            gradient = found.gradient[key].clone() if keeps_step and problem.grad_clip else found.gradient[key]
            parameter.grad = None if key in found.unused else gradient
        if problem.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(problem.parameters.values(), problem.grad_clip, norm)
        for optimizer in problem.optimizers.values():
            optimizer.step()
        for parameter in problem.parameters.values():
            parameter.grad = None
        for player, scheduler in problem.schedulers.items():
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(float(found.losses.get(player, sum(found.losses.values()))))
            else:
                scheduler.step()
        self._updates[name] += 1
        self._current[name] = found.evaluation
        if keeps_step:
            self._steps[name] = Solution(
                name=name,
                engine=self.engines[name],
                value=dict(problem.parameters),
                evaluation=found.evaluation,
                step=step,
                gradient=found.gradient,
                memory=self._memory[name],
            )
        self._note(name, found, norm, record)

    def _draw(self, name: str) -> tuple[Any, ...]:
        """Takes the batches of one update.

        Raises:
            ProblemError: if drawing a batch changed an earlier one.
        """
        batches: list[Any] = []
        versions: list[tuple[int, ...]] = []
        for _ in range(self.problems[name].accumulate):
            batches.append(self._streams[name].next())
            versions.append(batch_versions(batches[-1]))
        if list(map(batch_versions, batches)) != versions:
            raise ProblemError(
                f"Problem {name!r}: a batch was changed in place after it was drawn; perhaps its data fill one buffer again "
                "and again. Yield new tensors (batch.clone())."
            )
        return tuple(batches)

    @torch.enable_grad()
    def _total_gradient(self, name: str, batches: tuple[Any, ...], *, live: bool) -> _TotalGradient:
        """Computes the total gradient of a problem's loss at its current parameters.

        Args:
            name: the problem.
            batches: the batches to average over.
            live: whether the problem's own buffers may change, as they do in its own update.
        """
        problem, module = self.problems[name], self._modules[name]
        evaluation = self._evaluation(name, batches, states=(), copy=live and self._keeps_step(name))
        values = dict(evaluation.uppers) | {name: dict(problem.parameters)}
        context = Context(values=values, lowers=evaluation.lowers)
        read = {other: context.value(other) for other in self.graph.reads[name]}
        # The loss sees the responses cut off from their graphs; their cotangents are summed over the batches and sent
        # through the responses at the end, so that each inverse product is done once an update.
        cut = {
            other: {key: t.detach().requires_grad_(t.requires_grad) for key, t in tensors.items()}
            for other, tensors in read.items()
        }
        leaves = [t for tensors in cut.values() for t in tensors.values() if t.requires_grad]
        substitutes: Tensors = {}
        for other, tensors in cut.items():
            substitutes |= LossModule.qualified(other, tensors)
        for other, buffers in evaluation.buffers.items():
            if other != name or not live:
                substitutes |= LossModule.qualified(other, {key: value.clone() for key, value in buffers.items()})
        states: list[RandomState] = []
        sums = _Sums(len(batches))
        with module.substituted(substitutes):
            for batch in batches:
                states.append(RandomState.capture(problem.generators))
                value = module.value(batch)
                sums.add_metrics(value.metrics)
                remaining = len(value.players)
                for player, loss in value.players.items():
                    remaining -= 1
                    self._check_differentiable(name, loss)
                    own = [problem.parameters[key] for key in problem.player_parameters[player]]
                    sums.add(player, loss, own, leaves, retain_graph=remaining > 0)
        gradient: dict[str, Tensor | None] = {}
        responses = [t for tensors in read.values() for t in tensors.values() if t.requires_grad]
        for index, player in enumerate(sums.direct):
            members = problem.player_parameters[player]
            implicit: Sequence[Tensor | None] = [None] * len(members)
            cotangents = [(t, v) for t, v in zip(responses, sums.cotangents[player], strict=True) if v is not None]
            if cotangents:
                implicit = torch.autograd.grad(
                    [t for t, _ in cotangents],
                    [problem.parameters[key] for key in members],
                    grad_outputs=[v for _, v in cotangents],
                    allow_unused=True,
                    retain_graph=index + 1 < len(sums.direct),
                )
            for key, first, second in zip(members, sums.direct[player], implicit, strict=True):
                gradient[key] = second if first is None else first if second is None else first + second
        return _TotalGradient(
            gradient={
                key: torch.zeros_like(parameter) if gradient[key] is None else gradient[key]  # type: ignore[misc]
                for key, parameter in problem.parameters.items()
            },
            unused=frozenset(key for key, value in gradient.items() if value is None),
            losses=sums.losses,
            metrics=sums.metrics,
            reports=context.reports,
            evaluation=replace(evaluation, random_states=tuple(states)),
        )

    def _check_differentiable(self, name: str, loss: Tensor) -> None:
        """Notices a loss without a derivative: nothing would ever move.

        Raises:
            ProblemError: if the loss is cut off from all parameters.
        """
        if loss.requires_grad:
            return
        earlier = list(self.problems)[: self.graph.position[name]]
        dropped = [other for other in earlier if self.engines[other].drops_implicit_term]
        resting = [other for other in earlier if self.round < self.problems[other].warmup_steps]
        if not dropped and not resting:
            raise ProblemError(
                f"The loss of problem {name!r} does not depend on any parameter: it was detached, computed under "
                "torch.no_grad(), or reads none."
            )
        if name not in self._warned:
            self._warned.add(name)
            cause = f"'first_order' of {', '.join(dropped)}" if dropped else f"warm-up of {', '.join(resting)}"
            warnings.warn(
                f"The gradient of problem {name!r} is zero: its loss depends only on the solutions of other problems, and "
                f"the {cause} drops their derivative. Choose an engine that keeps it, such as 'one_step'.",
                SolveWarning,
                stacklevel=5,
            )

    def _note(self, name: str, found: _TotalGradient, norm: Tensor, record: Record) -> None:
        """Writes an update into the record, and warns once per problem of a solve that did not converge."""
        loss = found.losses if self.problems[name].is_game else found.losses[SINGLE_PLAYER]
        record.add(name, loss=loss, metrics=found.metrics, gradient_norm=norm)
        for report in found.reports:
            record.solves[report.problem] = report
            if not report.converged and report.problem not in self._warned:
                self._warned.add(report.problem)
                residual = "" if report.residual is None else f" (relative residual {report.residual:.2g})"
                warnings.warn(
                    f"Engine {report.engine!r} did not converge on problem {report.problem!r}{residual}. {report.advice} "
                    "Later failures on this problem are only in the records.",
                    SolveWarning,
                    stacklevel=4,
                )

    # ------------------------------------------------------------------ solutions of lower problems

    def _solution(self, name: str) -> Solution:
        """The problem's solution as those above it see it now."""
        engine = self.engines[name]
        rests = self.round < self.problems[name].warmup_steps
        if engine.differentiates_step and name in self._steps and not rests:
            return self._steps[name]
        # Made once, and again only after something that it depends on has moved.
        stamp = (int(rests), *(self._updates[other] for other in sorted(self._dependencies[name])))
        known = self._solutions.get(name)
        if known is None or known[0] != stamp:
            if rests or engine.drops_implicit_term:
                solution = self._constant(name)
            else:
                solution = self._look_ahead(name) if engine.differentiates_step else self._stationary(name)
            known = self._solutions[name] = (stamp, solution)
        return known[1]

    def _constant(self, name: str) -> Solution:
        """The current parameters as a constant: of a problem that rests, or whose derivative is dropped."""
        problem = self.problems[name]
        evaluation = Evaluation(
            problem=problem, module=self._modules[name], reads=(), parameters={}, batches=(), random_states=(),
            modes=(), versions=(), buffers={}, uppers={},
        )  # fmt: skip
        return Solution(name=name, engine=FirstOrder(), value=dict(problem.parameters), evaluation=evaluation)

    def _stationary(self, name: str) -> Solution:
        """The current parameters as a solution of the problem's stationarity condition at its current batches."""
        current = self._current.get(name)
        batches = self._batches(name)
        now = RandomState.capture(self.problems[name].generators)
        states = current.random_states if current is not None else (now,) * len(batches)
        evaluation = self._evaluation(name, batches, states=states, copy=False)
        if current is not None:
            evaluation = replace(evaluation, modes=current.modes)
        return Solution(
            name=name,
            engine=self.engines[name],
            value=dict(self.problems[name].parameters),
            evaluation=evaluation,
            memory=self._memory[name],
        )

    def _look_ahead(self, name: str) -> Solution:
        """The solution of a problem that has not moved yet: one step of its optimizer, made on copies."""
        problem = self.problems[name]
        found = self._total_gradient(name, self._batches(name), live=False)
        step = OptimizerStep.capture(problem)
        before = {key: parameter.detach() for key, parameter in problem.parameters.items()}
        after = step.apply(before, found.gradient)
        return Solution(
            name=name,
            engine=self.engines[name],
            value={key: value.detach() for key, value in after.items()},
            evaluation=found.evaluation,
            step=step,
            gradient=found.gradient,
            memory=self._memory[name],
        )

    def _evaluation(
        self, name: str, batches: tuple[Any, ...], *, states: tuple[RandomState, ...], copy: bool
    ) -> Evaluation:
        """Describes an evaluation of a problem's loss at its current parameters.

        Args:
            name: the problem.
            batches: its batches.
            states: the random state before each.
            copy: whether the live parameters will move while the evaluation is still needed.
        """
        problem = self.problems[name]

        def held(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if copy else tensor.detach()

        return Evaluation(
            problem=problem,
            module=self._modules[name],
            reads=self.graph.reads[name],
            parameters={key: held(parameter) for key, parameter in problem.parameters.items()},
            batches=batches,
            random_states=states,
            modes=self._modules[name].modes,
            versions=tuple(map(batch_versions, batches)),
            buffers={
                other: {key: buffer.detach().clone() for key, buffer in self.problems[other].module.named_buffers()}
                for other in (name, *self.graph.reads[name])
            },
            uppers={
                other: {key: held(parameter) for key, parameter in self.problems[other].parameters.items()}
                for other in self.graph.values(name)
            },
            lowers={lower: self._solution(lower) for lower in self.graph.responses(name)},
        )

    def _batches(self, name: str) -> tuple[Any, ...]:
        """The batches of the problem's last update, or those that it will draw first."""
        current = self._current.get(name)
        return current.batches if current is not None else self._streams[name].peek(self.problems[name].accumulate)

    def _keeps_step(self, name: str) -> bool:
        return name in self._differentiated and self.engines[name].differentiates_step


class _Sums:
    """Averages over the batches of one update.

    Attributes:
        losses: player → loss.
        direct: player → direct gradient of its parameters (None: the loss does not depend on one).
        cotangents: player → cotangent of every leaf that stands for a response.
    """

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self.losses: dict[str, Tensor] = {}
        self.direct: dict[str, list[Tensor | None]] = {}
        self.cotangents: dict[str, list[Tensor | None]] = {}
        self.metrics: dict[str, Any] = {}

    def add(
        self, player: str, loss: Tensor, own: Sequence[Tensor], leaves: Sequence[Tensor], *, retain_graph: bool
    ) -> None:
        """Adds one batch's loss of a player, and its gradients."""
        share = loss / self._batches
        inputs = [*own, *leaves]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if share.requires_grad:
            found = torch.autograd.grad(share, inputs, allow_unused=True, retain_graph=retain_graph)
        _add_to(self.direct, player, found[: len(own)])
        _add_to(self.cotangents, player, found[len(own) :])
        detached = share.detach()
        self.losses[player] = self.losses[player] + detached if player in self.losses else detached

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds one batch's metrics: floating-point ones are averaged, of others the last stays."""
        for key, value in metrics.items():
            number = isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
            share = value / self._batches if number else value
            self.metrics[key] = self.metrics[key] + share if number and key in self.metrics else share


def _check_state(problem: Problem, saved: Mapping[str, Any]) -> None:
    """Checks that a saved state fits its problem.

    Raises:
        CheckpointError: naming what differs.
    """
    own = problem.module.state_dict()
    theirs = saved.get("module", {})
    wrong = [
        key
        for key in own
        if key not in theirs or getattr(theirs[key], "shape", None) != getattr(own[key], "shape", None)
    ]
    wrong += [key for key in theirs if key not in own]
    for part, mine in (("optimizers", problem.optimizers), ("schedulers", problem.schedulers)):
        wrong += [f"{part}.{key}" for key in set(mine) ^ set(saved.get(part, {}))]
    wrong += [part for part in ("data", "updates", "memory") if part not in saved]
    if wrong:
        raise CheckpointError(
            f"The state of problem {problem.name!r} does not fit: {', '.join(map(repr, wrong[:3]))} "
            f"{'differ' if len(wrong) > 1 else 'differs'} in name or shape. It is of another model or declaration."
        )


def _add_to(total: dict[str, list[Tensor | None]], player: str, terms: Sequence[Tensor | None]) -> None:
    known = total.get(player)
    if known is None:
        total[player] = list(terms)
        return
    total[player] = [b if a is None else a if b is None else a + b for a, b in zip(known, terms, strict=True)]


def _copied(value: Any) -> Any:
    """A nested state with every tensor in it copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(entry) for entry in value)
    return value
