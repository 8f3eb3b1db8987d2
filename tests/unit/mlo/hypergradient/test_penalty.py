"""`penalty`: the response by first gradients only."""

from __future__ import annotations

import pytest
import torch
from quadratics import DIM, POSITIVE, quadratic

import mlo
import mlo.testing
from mlo.testing import relative_error

SMALL = {"name": "penalty", "steps": 3, "step_size": 0.3, "tol": 1.0}


def series(terms):
    """The sum of the first terms of the Neumann series of `POSITIVE`, at the step size 0.3."""
    shrunk = torch.eye(DIM).double() - 0.3 * POSITIVE
    return sum(0.3 * torch.linalg.matrix_power(shrunk, k) for k in range(terms))


@pytest.mark.parametrize(("graph", "tolerance"), [("weight decay", 1e-7), ("diamond", 1e-6)])
def test_the_copies_converge_with_their_own_step_size(graph, tolerance):
    """With "auto" the tilted copies converge to the closed form."""
    problem = mlo.testing.GRAPHS[graph]()
    found = problem.optimizer(mlo.Penalty(steps=150)).gradient(problem.upper)["v"]
    assert relative_error(found, problem.exact) < tolerance


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_warm_start_continues_the_series():
    """On a quadratic loss K steps from rest are K terms, and each later solve adds K more."""
    optimizer, b, v = quadratic(POSITIVE, SMALL)
    for rounds in range(3):
        expected = b.T @ (series(3 * (rounds + 1)) @ v)
        assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-6
        optimizer.step()


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_cold_start_begins_at_rest_each_time():
    optimizer, b, v = quadratic(POSITIVE, {**SMALL, "warm_start": False})
    optimizer.step()
    assert relative_error(optimizer.gradient("x")["v"], b.T @ (series(3) @ v)) < 1e-6


def test_exact_products_are_refused():
    with pytest.raises(mlo.EngineError, match="'penalty' does not take these options"):
        mlo.engine_from({"name": "penalty", "products": "autograd"})
