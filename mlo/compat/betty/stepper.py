"""Steps a program's problems in Betty's order, by the updates of a `MultilevelOptimizer`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlo
from mlo.compat.betty.configs import EngineConfig
from mlo.compat.betty.driver import Driver
from mlo.compat.betty.methods import engine_of
from mlo.compat.betty.problems import Problem
from mlo.compat.betty.rounds import Member, Plan, plan
from mlo.errors import ConfigurationError, ProblemError
from mlo.hypergradient import AbstractEngine

__all__ = ["Stepper"]


class Stepper:
    """The optimizer behind an engine, and what is due in its round.

    Args:
        problems: in Betty's order, initialized, with their children, parents and paths.
        u2l: upper problem → those whose losses read it.
        config: of the engine.
        rounds_before: rounds that were made before problems were exchanged.
        distributed: as `MultilevelOptimizer` takes it.

    Attributes:
        optimizer: of all problems.
        last_record: the record of the last update; None before the first.

    Raises:
        ConfigurationError: if Betty's order is not one repeated round.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        u2l: Mapping[Problem, Sequence[Problem]],
        config: EngineConfig,
        *,
        rounds_before: int = 0,
        distributed: str | None = None,
    ) -> None:
        self._problems, self._rounds_before = list(problems), rounds_before
        self._due: deque[str] = deque()
        self.last_record: mlo.Record | None = None
        order = _lower_first(problems)
        engines = {problem.name: self._engine_of(problem, config.formulas) for problem in order}
        self._drivers: dict[str, Driver] = {}
        for problem in order:
            reads = _reads(problem, order, u2l)
            self._drivers[problem.name] = Driver(problem, reads, engines[problem.name])

        common: dict[str, Any] = {"on_nonfinite": config.on_nonfinite, "distributed": distributed}
        declared = [driver.declare() for driver in self._drivers.values()]
        rounds = self._give_steps(declared)
        self.optimizer = mlo.MultilevelOptimizer(declared, engines, **common)
        self._schedule = self.optimizer.graph.schedule()
        # A roll-back repeats steps in separate rounds, in which the outermost problems rest.
        self._again: mlo.MultilevelOptimizer | None = None
        if config.roll_back and any(problem.parents for problem in problems):
            _check_roll_back(problems, rounds.iterations)
            lower = [
                driver.declare(again=True, rests=not driver.problem.parents)
                for driver in self._drivers.values()
            ]
            self._again = mlo.MultilevelOptimizer(lower, engines, **common)

    def _engine_of(self, problem: Problem, formulas: str) -> AbstractEngine:
        uppers = [
            upper for upper in self._problems if any(problem in path[1:-1] for path in upper.paths)
        ]
        if not uppers:  # problems that read it treat it as constant
            return mlo.FirstOrder()
        return engine_of(problem, problem.config.formulas or formulas, uppers)

    def _give_steps(self, declared: Sequence[mlo.Problem]) -> Plan:
        """Gives the problems their `steps` and `warmup_steps`."""
        graph = mlo.DependencyGraph(declared)

        def schedule(steps: Mapping[str, int]) -> tuple[str, ...]:
            for problem in declared:
                problem.steps = steps[problem.name]
            return graph.schedule()

        members = [_member(problem, graph.level[problem.name]) for problem in self._problems]
        rounds = plan(members, schedule, graph.reads)
        for problem in declared:
            resting = rounds.warmup_rounds[problem.name] - self._rounds_before
            problem.warmup_steps = max(0, resting)
        return rounds

    # ------------------------------ steps

    def step(self, leaf: Problem) -> None:
        """Makes a step of a leaf, and of the problems above that are due then.

        Raises:
            ProblemError: if another leaf is due.
        """
        driver = self._drivers[leaf.name]
        moves = (leaf.count + 1) % leaf.gas == 0
        if moves and self._next_due() != leaf.name:
            raise ProblemError(
                f"The leaf {leaf.name!r} was stepped, but {self._next_due()!r} is due. Leaves "
                "step once per iteration, in the order of engine.leaves."
            )
        driver.begin()
        if not moves:
            driver.gather()
            return
        self._update(driver)
        while self._due and not self._drivers[self._due[0]].problem.leaf:
            driver = self._drivers[self._due[0]]
            driver.begin()
            self._update(driver)

    def _next_due(self) -> str:
        """The problem that moves next."""
        if not self._due:
            round_, problems = self.optimizer.round, self.optimizer.problems
            self._due.extend(n for n in self._schedule if round_ >= problems[n].warmup_steps)
        return self._due[0]

    def _update(self, driver: Driver) -> None:
        """Makes the next update, which is of this problem."""
        update = next(self.optimizer.updates(rounds=1))
        assert update.problem == driver.problem.name == self._due[0]
        self._due.popleft()
        self.last_record = update.record
        driver.finish(update.record)
        # While a leaf warms up, nothing above has moved, so there is no reason to roll back.
        leaves = [each for each in self._problems if each.leaf]
        warm = all(leaf.count > leaf.warmup_steps for leaf in leaves)
        if update.ends_round and self._again is not None and warm:
            self._step_again(self._again)

    def _step_again(self, again: mlo.MultilevelOptimizer) -> None:
        """Rolls back: each lower problem makes one step from where its cycle began."""
        updates = again.updates(rounds=1)
        for name in again.graph.schedule():
            driver = self._drivers[name]
            if driver.problem.parents:
                driver.go_back()
                driver.finish_again(next(updates).record)

    def leave(self) -> int:
        """Releases the problems; returns the total number of rounds made.

        Raises:
            ProblemError: within a round.
        """
        if self._due or any(driver.gathered for driver in self._drivers.values()):
            raise ProblemError(
                "Modules, optimizers and dependencies can be exchanged only between rounds, and "
                f"a round is under way: {' → '.join(self._due) or 'a leaf that accumulates'} is "
                "due. Do it after the outermost problem has stepped."
            )
        return self._rounds_before + self.optimizer.round

    # ------------------------------ the state of a run

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to resume, as tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "problems": {name: driver.state_dict() for name, driver in self._drivers.items()},
            "due": list(self._due),
            "rounds_before": self._rounds_before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state_dict` returned.

        Raises:
            CheckpointError: if it is of another program.
        """
        for name, driver in self._drivers.items():
            driver.load_state_dict(state["problems"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self._due = deque(state["due"])
        self._rounds_before = state["rounds_before"]


def _reads(
    problem: Problem, order: Iterable[Problem], u2l: Mapping[Problem, Sequence[Problem]]
) -> list[str]:
    """The names of the problems that a loss reads, by the dependencies."""
    return [
        other.name for other in order if other in problem.children or problem in u2l.get(other, ())
    ]


def _lower_first(problems: Sequence[Problem]) -> list[Problem]:
    """The problems with each after those below it, and otherwise in the given order."""
    order: list[Problem] = []
    while len(order) < len(problems):
        left = [problem for problem in problems if problem not in order]
        order += [p for p in left if all(child in order for child in p.children)]
    return order


def _member(problem: Problem, level: int) -> Member:
    return Member(
        name=problem.name,
        children=tuple([child.name for child in problem.children]),
        parents=tuple([parent.name for parent in problem.parents]),
        unroll=problem.config.unroll_steps,
        accumulate=problem.gas,
        warmup=problem.warmup_steps,
        level=level,
    )


def _check_roll_back(problems: Sequence[Problem], iterations: int) -> None:
    """Refuses cycles that end while others continue: a roll-back needs a common end."""
    for problem in problems:
        counts = problem.config.unroll_steps * problem.gas
        expected = iterations if problem.leaf else 1
        if problem.parents and counts != expected:
            raise ConfigurationError(
                f"roll_back=True: problem {problem.name!r} has a cycle of {counts} counts (its "
                f"unroll_steps times gradient_accumulation), but needs {expected}: leaves end "
                "their cycles together, and problems between a leaf and the outermost step once "
                "per cycle. Change its configuration, or use roll_back=False."
            )
