"""Which steps are checked, and code around them that would be missing in a derivative."""

from __future__ import annotations

import pytest
import torch
from small_graphs import problem

import mlo
from mlo.step_checks import StepChecks
from mlo.testing import Vector


class Foreign(torch.optim.SGD):
    """An optimizer whose class is not torch.optim's."""


def checked(declared, steps=9):
    """Which of the next steps are checked, counted from 1."""
    checks = StepChecks()
    return [step for step in range(1, steps + 1) if checks.are_due(declared)]


def moved_by(kind, device=None):
    module = Vector(torch.ones(2, device=device))
    return problem("w", module=module, optimizer=kind(module.parameters(), lr=0.1))


def test_of_torch_optim_only_the_first_step_is_checked():
    assert checked(moved_by(torch.optim.SGD)) == [1]


def test_steps_of_other_classes_are_checked_at_powers_of_two():
    assert checked(moved_by(Foreign)) == [1, 2, 4, 8]


def test_every_step_with_hooks_is_checked():
    declared = moved_by(torch.optim.SGD)
    declared.optimizers["w"].register_step_post_hook(lambda *_: None)
    assert checked(declared, 5) == [1, 2, 3, 4, 5]


def test_where_there_are_no_numbers_no_step_is_checked():
    assert checked(moved_by(Foreign, "meta")) == []


# ------------------------------ steps by formula


def learning(settings, *, scheduler_of=None, **options):
    """An optimizer of one problem with `settings`, and with a scheduler."""
    module = Vector(torch.ones(2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, **options)
    scheduler = scheduler_of(optimizer) if scheduler_of else None
    declared = problem(
        "w", module=module, optimizer=optimizer, scheduler=scheduler, settings=lambda: settings
    )
    return mlo.MultilevelOptimizer([declared])


def test_hooks_around_a_step_by_formula_are_refused():
    optimizer = learning({"lr": 0.1})
    optimizer.problems["w"].optimizers["w"].register_step_post_hook(lambda *_: None)
    with pytest.raises(mlo.ProblemError, match="hooks around its step"):
        optimizer.step()


def test_a_setting_of_a_scheduler_is_refused():
    optimizer = learning(
        {"lr": 0.1}, scheduler_of=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)
    )
    with pytest.raises(mlo.ProblemError, match="both its scheduler and settings= set 'lr'"):
        optimizer.step()


@pytest.mark.filterwarnings("error")
def test_momentum_that_a_scheduler_cycles_is_refused():
    optimizer = learning(
        {"momentum": 0.5},
        momentum=0.9,
        scheduler_of=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=10
        ),
    )
    with pytest.raises(mlo.ProblemError, match="both its scheduler and settings= set 'momentum'"):
        optimizer.step()
