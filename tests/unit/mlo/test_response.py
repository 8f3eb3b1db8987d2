"""Responses: solutions as functions of what they depend on."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from quadratics import POSITIVE, quadratic

import mlo
from mlo import response
from mlo.levels import Levels
from mlo.testing import layered, relative_error


def test_a_round_makes_each_response_once(monkeypatch):
    """Only the gradient of x flows through responses: of 2L problems, not of the L² pairs that read
    each other.
    """
    made = []
    apply = response._Response.apply
    monkeypatch.setattr(
        response._Response, "apply", lambda *arguments: made.append(1) or apply(*arguments)
    )
    for layers in (3, 6):
        optimizer = layered(layers=layers).optimizer("one_step")
        made.clear()
        optimizer.step()
        assert len(made) == 2 * layers


ETA = 0.4
FREE = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)


def with_projected_step(monkeypatch, engine, free=FREE):
    """The quadratic problem, whose solution satisfies F = θ − P(θ − η ∇L) = 0 instead of ∇L = 0.

    P keeps the entries that are not free at zero.
    """

    @contextmanager
    def residual(evaluation, parameters, reads):
        with evaluation.losses(parameters, reads) as losses:
            (gradient,) = torch.autograd.grad(losses["w"], [parameters["v"]], create_graph=True)
            yield {"v": parameters["v"] - free * (parameters["v"] - ETA * gradient)}

    stationary = Levels._stationary
    monkeypatch.setattr(
        Levels, "_stationary", lambda *given: replace(stationary(*given), residual=residual)
    )
    return quadratic(POSITIVE, engine)


@pytest.mark.parametrize("engine", ["gmres", "direct", {"name": "neumann", "num_terms": 500}])
def test_a_solution_may_carry_another_condition(monkeypatch, engine):
    optimizer, b, v = with_projected_step(monkeypatch, engine)
    # w* solves P (M w − B x) = 0 and (I − P) w = 0.
    free = FREE.bool()
    expected = b[free].T @ torch.linalg.solve(POSITIVE[free][:, free], v[free])
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-5


@pytest.mark.parametrize("engine", ["cg", "minres"])
def test_a_jacobian_that_is_not_symmetric_is_warned_of_once(monkeypatch, engine):
    optimizer, *_ = with_projected_step(monkeypatch, {"name": engine, "max_steps": 1, "tol": 10.0})
    with pytest.warns(mlo.SolveWarning, match=f"not symmetric, which the engine '{engine}' needs"):
        optimizer.gradient("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.gradient("x")


def test_a_symmetric_jacobian_is_not_warned_of(monkeypatch):
    optimizer, b, v = with_projected_step(monkeypatch, "cg", free=torch.ones_like(FREE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = optimizer.gradient("x")["v"]
    assert relative_error(found, b.T @ torch.linalg.solve(POSITIVE, v)) < 1e-6


@pytest.mark.parametrize("engine", ["penalty", {"name": "cg", "products": "finite_difference"}])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_engines_that_need_a_loss_refuse_another_condition(monkeypatch, engine):
    optimizer, *_ = with_projected_step(monkeypatch, engine)
    with pytest.raises(mlo.EngineError, match="a condition other than a vanishing gradient"):
        optimizer.gradient("x")


def test_weight_decay_is_not_added_to_another_condition(monkeypatch):
    optimizer, b, v = with_projected_step(monkeypatch, "direct")
    problem = optimizer.problems["w"]
    problem.optimizers["w"].param_groups[0]["weight_decay"] = 10.0
    free = FREE.bool()
    expected = b[free].T @ torch.linalg.solve(POSITIVE[free][:, free], v[free])
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-12
