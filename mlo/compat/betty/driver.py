"""Moves one of Betty's problems by updates of `MultilevelOptimizer`, with Betty's callbacks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import mlo
from mlo.betty.engines import BettySama
from mlo.compat.betty.problems import Problem
from mlo.compat.betty.steps import OwnStep, call
from mlo.errors import ProblemError
from mlo.hypergradient import AbstractEngine, StepEngine

__all__ = ["Driver"]


class Driver:
    """What one problem needs to be moved.

    Args:
        problem: one of Betty's, initialized.
        reads: the problems that its loss reads.
        engine: how its solution is differentiated.

    Attributes:
        gathered: batches of an accumulating leaf that were drawn and not used.
        recent: the batches of the last update.
        counts: counts of a cycle.
    """

    def __init__(self, problem: Problem, reads: Sequence[str], engine: AbstractEngine) -> None:
        self.problem, self.reads, self.engine = problem, tuple(reads), engine
        self.gathered: list[Any] = []
        self.recent: list[Any] = []
        self._start: dict[str, Any] | None = None
        self._last_gradients: dict[nn.Parameter, Tensor] = {}
        # The engine counts where an upper problem differentiates its solution.
        self._steps_differentiated = bool(problem.parents) and isinstance(engine, StepEngine)
        # A leaf accumulates batches, at one place; a problem above it accumulates solves. (With
        # `accumulate_solves` a round would hold all of them, and `roll_back` goes back after each.)
        self.accumulate = problem.gas if problem.leaf else 1
        solves = 1 if problem.leaf else problem.gas
        self.counts = problem.config.unroll_steps * problem.gas
        self.own_step: OwnStep | None = None
        if solves > 1 or problem.is_implemented("custom_optimizer_step"):
            if self._steps_differentiated:
                what = "gradient_accumulation" if solves > 1 else "custom_optimizer_step"
                raise ProblemError(
                    f"Problem {problem.name!r} has {what}, but the engine {engine.label!r} "
                    "differentiates its optimizer's own steps. Give it type 'darts', 'neumann' "
                    "or 'cg', which differentiate its solution instead."
                )
            self.own_step = OwnStep(problem, solves)

    # ------------------------------ the declaration

    def declare(self, *, again: bool = False, rests: bool = False) -> mlo.Problem:
        """The problem as one of mlo's.

        Args:
            again: whether it repeats the step on the batches of its last update.
            rests: whether it never moves.
        """
        problem = self.problem
        clip: float | None = problem.gradient_clipping or None
        if self.own_step is not None or self._clips_itself:
            clip = None
        return mlo.Problem(
            problem.name,
            module=problem.module,
            optimizer=self.own_step or problem.optimizer,
            loss=self._loss(),
            data=_Repeated(self) if again else _Drawn(self),
            grad_clip=clip,
            precision="bf16" if problem.precision == "bf16" else None,
            accumulate=self.accumulate,
            warmup_steps=FOREVER if rests else 0,
            before_update=self._before_update,
        )

    def _loss(self) -> Any:
        """`training_step` as a loss that names the problems it reads."""
        problem = self.problem

        # It finds the problems as its attributes, and mlo has put the right tensors into their
        # modules.
        def loss(module: nn.Module, batch: Any, **others: nn.Module) -> Any:
            value = problem.training_step_exec(batch)
            metrics: dict[str, Any] = {}
            if isinstance(value, dict):
                metrics = {key: _detached(entry) for key, entry in value.items() if key != "loss"}
                value = value["loss"]
            # Betty takes a loss of shape [1] as well.
            return value.reshape(()) if value.numel() == 1 else value, metrics

        positional = [Parameter(name, Parameter.POSITIONAL_ONLY) for name in ("_own", "_batch")]
        keywords = [Parameter(name, Parameter.KEYWORD_ONLY) for name in self.reads]
        loss.__signature__ = Signature([*positional, *keywords])  # type: ignore[attr-defined]
        return loss

    @property
    def _clips_itself(self) -> bool:
        """Whether gradients are clipped after the user's callback, as in Betty."""
        called = self.problem.is_implemented("grad_callback")
        return called and not self._steps_differentiated

    def _before_update(self, declared: mlo.Problem) -> None:
        """Calls the user's `grad_callback`; the gradients are in `parameter.grad`."""
        problem = self.problem
        if self.own_step is None:
            call(problem, "grad_callback")
            if self._clips_itself and problem.gradient_clipping > 0.0:
                torch.nn.utils.clip_grad_norm_(
                    declared.parameters.values(), problem.gradient_clipping
                )
        if isinstance(self.engine, BettySama):
            self._last_gradients = {
                p: p.grad.clone() for p in declared.parameters.values() if p.grad is not None
            }

    # ------------------------------ around an update

    def draw(self) -> Any:
        """The next batch of an update."""
        batch = self.gathered.pop(0) if self.gathered else self._draw_new()
        self.recent = [*self.recent, batch][-self.accumulate :]
        return batch

    def _draw_new(self) -> Any:
        self.problem.cur_batch = self.problem.get_batch()
        return self.problem.cur_batch

    def begin(self) -> None:
        """Counts, and begins a cycle if it is time."""
        problem = self.problem
        if problem._inner_loop_start:
            call(problem, "on_inner_loop_start")
            problem._inner_loop_start = False
        # A problem can return to the start of every cycle. (Betty first returns to the start of the
        # run, when a warm-up is over.)
        if problem._roll_back and problem.count % self.counts == 0:
            states = problem.module.state_dict(), problem.optimizer.state_dict()
            self._start = copy.deepcopy(dict(zip(("module", "optimizer"), states, strict=True)))
        problem._count += 1

    def gather(self) -> None:
        """Draws a batch for a later update, as an accumulating leaf does between its steps."""
        self.gathered.append(self._draw_new())

    def finish(self, record: mlo.Record) -> None:
        """Does what follows an update: callback, scheduler, log, and the end of the cycle."""
        problem = self.problem
        # A scheduler moves with every batch, and after a roll-back with the step that stays.
        self._after_step(record, schedule=0 if problem._roll_back else self.accumulate)
        every = problem.log_step
        # Of several batches in one update, any may be the one that is due.
        due = every > 0 and problem.count // every > (problem.count - self.accumulate) // every
        skipped = problem.name in record.skipped
        if due and not skipped and problem.is_rank_zero():
            stats = {"loss": record.losses[problem.name], **record.metrics[problem.name]}
            problem.log(stats, problem._global_step)
        if problem.count % self.counts == 0 and problem.count > problem.warmup_steps:
            problem._inner_loop_start = True

    def finish_again(self, record: mlo.Record) -> None:
        """Does what follows a step that a problem repeats after a roll-back."""
        self._after_step(record, schedule=1)

    def go_back(self) -> None:
        """Restores module and optimizer to the start of the cycle."""
        assert self._start is not None
        self.problem.module.load_state_dict(self._start["module"])
        self.problem.optimizer.load_state_dict(self._start["optimizer"])
        self._start = None

    def _after_step(self, record: mlo.Record, *, schedule: int) -> None:
        problem = self.problem
        for parameter, gradient in self._last_gradients.items():
            state = problem.optimizer.state[parameter]
            if state:  # where Betty's sama looks for it
                state["last_grad"] = gradient
        self._last_gradients = {}
        if problem.leaf or problem.count % problem.gas == 0:
            self._call_param_callback()
        for _ in range(schedule if problem.scheduler is not None else 0):
            if not isinstance(problem.scheduler, ReduceLROnPlateau):
                problem.scheduler.step()
            elif problem.name not in record.skipped:
                problem.scheduler.step(record.losses[problem.name])

    def _call_param_callback(self) -> None:
        problem = self.problem
        if not self._steps_differentiated:
            call(problem, "param_callback")
            return
        if not problem.is_implemented("param_callback"):
            return
        before = [parameter.detach().clone() for parameter in problem.parameters()]
        call(problem, "param_callback")
        for old, new in zip(before, problem.parameters(), strict=True):
            if not torch.equal(old, new):
                raise ProblemError(
                    f"param_callback of problem {problem.name!r} changed its parameters, but the "
                    f"engine {self.engine.label!r} differentiates the steps that led to them, so "
                    "the change would be missing. Give it type 'darts', 'neumann' or 'cg', which "
                    "differentiate its solution instead."
                )

    # ------------------------------ its state

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to resume, besides the state of `MultilevelOptimizer`."""
        problem = self.problem
        own, scheduler = self.own_step, problem.scheduler
        sums = None
        if own is not None:
            sums = {
                name: own.summed[parameter].clone()
                for name, parameter in problem.module.named_parameters()
                if parameter in own.summed
            }
        return {
            "count": problem._count,
            "inner_loop_start": problem._inner_loop_start,
            "epochs": list(problem.epoch_counter),
            "scheduler": None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
            "sums": sums,
            "start": copy.deepcopy(self._start),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to what `state_dict` returned."""
        problem = self.problem
        problem._count, problem._inner_loop_start = state["count"], state["inner_loop_start"]
        problem.epoch_counter = list(state["epochs"])
        if problem.scheduler is not None:
            problem.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        if self.own_step is not None:
            parameters = dict(problem.module.named_parameters())
            self.own_step.summed = {
                parameters[name]: total.to(parameters[name].device, copy=True)
                for name, total in state["sums"].items()
            }
        self._start = copy.deepcopy(state["start"])


FOREVER = 2**62
"""Rounds for which a problem rests that never moves."""


class _Drawn:
    """The batches of a problem, one by one, for `mlo.Problem(data=)`."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._driver.draw()

    def state_dict(self) -> dict[str, Any]:
        """The loaders' positions, and batches that were drawn and not used."""
        passes = self._driver.problem.train_data_iterator
        return {
            "loaders": [loader.state_dict() for loader in passes],
            "gathered": list(self._driver.gathered),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to what `state_dict` returned."""
        passes = self._driver.problem.train_data_iterator
        for loader, saved in zip(passes, state["loaders"], strict=True):
            loader.load_state_dict(saved)
        self._driver.gathered = list(state["gathered"])


class _Repeated:
    """The batches of a problem's last update, once more."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._taken = driver, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        recent = self._driver.recent
        self._taken += 1
        return recent[(self._taken - 1) % len(recent)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
