"""Steps that only Betty has: summed over solves, or defined by the user."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OwnStep", "call", "give_groups"]


class OwnStep(Optimizer):
    """Steps a problem with the mean gradient of several solves, using its own step if it has one.

    Betty's `gradient_accumulation` of an upper problem sums the gradients of that many solves of
    the problems below, each with its own batch.

    Args:
        problem: whose `optimizer` (or `custom_optimizer_step`) makes the step.
        solves: gradients of which the mean is taken.
    """

    def __init__(self, problem: Any, solves: int) -> None:
        self._problem, self._solves = problem, solves
        self._groups_of_a_copy: list[dict[str, Any]] | None = None
        self.summed: dict[Tensor, Tensor] = {}
        inner: Optimizer = problem.optimizer
        parameters = [p for group in inner.param_groups for p in group["params"]]
        self._inner = inner
        super().__init__(parameters, inner.defaults)
        self._groups_of_a_copy = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the problem's optimizer, so that its scheduler is seen."""
        copied = self._groups_of_a_copy
        return self._inner.param_groups if copied is None else copied

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups_of_a_copy = groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Adds a gradient; with the last of them makes the step.

        Raises:
            RuntimeError: for a copy, whose step would move the original's parameters.
        """
        if self._groups_of_a_copy is not None:
            raise RuntimeError("The step of this optimizer cannot be tried on a copy.")
        problem = self._problem
        members = [p for group in self.param_groups for p in group["params"]]
        for parameter in members:
            summed = self.summed.get(parameter)
            if parameter.grad is not None:
                share = parameter.grad / self._solves
                summed = share if summed is None else summed + share
            parameter.grad = summed
        call(problem, "grad_callback")
        if problem.count % self._solves:
            self.summed = {p: p.grad.clone() for p in members if p.grad is not None}
            return
        self.summed = {}
        if problem.gradient_clipping > 0.0:
            torch.nn.utils.clip_grad_norm_(members, problem.gradient_clipping)
        if not call(problem, "custom_optimizer_step"):
            self._inner.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of the problem's optimizer. (`Engine.state_dict` saves the sums.)"""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of the problem's optimizer."""
        self._inner.load_state_dict(state_dict)


def call(problem: Any, name: str) -> bool:
    """Calls a method that the user may have defined; returns whether there is one."""
    method = getattr(problem, name, None)
    if not callable(method):
        return False
    method()
    return True


def give_groups(optimizer: Optimizer, scheduler: Any, groups: Any) -> None:
    """Gives an optimizer other groups of parameters, and its scheduler the same number.

    Args:
        optimizer: keeps its class and defaults.
        scheduler: of the optimizer, or None.
        groups: as the constructor of an optimizer takes them.
    """
    optimizer.param_groups.clear()
    optimizer.state.clear()
    for group in groups:
        optimizer.add_param_group(dict(group) if isinstance(group, dict) else {"params": group})
    if scheduler is None:
        return
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    # Schedulers keep one entry per group.
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    if len(getattr(scheduler, "lr_lambdas", ())) == 1:
        scheduler.lr_lambdas = list(scheduler.lr_lambdas) * len(optimizer.param_groups)
