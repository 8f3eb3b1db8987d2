"""The residual of a fixed point of projected steps: its value, by parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from mlo.projected_step import ProjectedStep
from mlo.testing import Vector


def problem(**groups):
    module = nn.ParameterDict({"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])})
    rates = {"a": {"lr": 0.1, "weight_decay": 0.5}, "b": {"lr": 0.2}} | groups
    optimizer = torch.optim.SGD(
        [{"params": [module[k]], **options} for k, options in rates.items()]
    )
    return mlo.Problem(
        "w",
        module=module,
        optimizer=optimizer,
        loss=lambda w, _: (w["a"] ** 2).sum() + 3 * w["b"].sum(),
        after_step=lambda p: {"a": mlo.constraints.nonnegative(p["a"])},
    )


def residual_of(declared):
    """F where the problem stands, below an upper problem that reads it."""
    x = Vector(torch.ones(1))
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, w: w["a"].sum() * x.v.sum(),
    )
    optimizer = mlo.MultilevelOptimizer([declared, upper], "gmres")
    solution = optimizer._now.find("w")
    theta = {k: t.clone().requires_grad_() for k, t in solution.evaluation.parameters.items()}
    with torch.enable_grad(), solution.residual(solution.evaluation, theta, {}) as found:
        return {key: entry.detach() for key, entry in found.items()}


def test_each_parameter_has_its_rate_and_decay():
    found = residual_of(problem())
    # a: u = a − 0.1 (2 a + 0.5 a) = 0.75 a, projected to (0.75, 0); b: u = 0.5 − 0.2 · 3
    torch.testing.assert_close(found["a"], torch.tensor([0.25, -2.0]))
    torch.testing.assert_close(found["b"], torch.tensor([0.6]))


def test_a_maximizing_group_steps_upwards():
    found = residual_of(problem(a={"lr": 0.1, "weight_decay": 0.5, "maximize": True}))
    # u = a + 0.1 (2 a − 0.5 a) = 1.15 a
    torch.testing.assert_close(found["a"], torch.tensor([-0.15, -2.0]))


def test_momentum_that_never_rests_is_refused():
    with pytest.raises(mlo.EngineError, match="momentum of 1 its steps never converge"):
        ProjectedStep.of(problem(b={"lr": 0.1, "momentum": 1.0}))


def test_a_rate_of_zero_is_refused():
    with pytest.raises(mlo.EngineError, match="learning rate of 'b' is zero"):
        ProjectedStep.of(problem(b={"lr": 0.0}))
