"""`neumann`: the truncated series."""

from __future__ import annotations

import pytest
import torch
from quadratics import DIM, POSITIVE, quadratic, symmetric

import mlo
import mlo.testing
from mlo.testing import bilinear_game, relative_error, trilevel_quadratic


def test_the_terms_are_differentiated_in_a_trilevel_graph():
    """In the lowest of three levels the gradient of the middle one contains the series."""
    problem = trilevel_quadratic()
    engines = {"w": {"name": "neumann", "num_terms": 100}, "m": "direct"}
    found = problem.optimizer(engines).gradient("x")["v"]
    assert relative_error(found, problem.exact) < 1e-8


@pytest.mark.parametrize("graph", ["weight decay", "diamond"])
def test_the_series_converges_with_its_own_step_size(graph):
    """With "auto" the series converges to the closed form."""
    problem = mlo.testing.GRAPHS[graph]()
    found = problem.optimizer(mlo.Neumann(num_terms=400)).gradient(problem.upper)["v"]
    assert relative_error(found, problem.exact) < 1e-9


def test_games_are_solved_by_the_transposed_jacobian():
    problem = bilinear_game(dim=4, coupling=0.5)
    found = problem.optimizer(mlo.Neumann(num_terms=700)).gradient("x")["v"]
    assert relative_error(found, problem.exact) < 1e-8
    jacobian = problem.jacobians["game"]  # the untransposed one would be far off
    assert relative_error(problem.swept(lambda a, v: torch.linalg.solve(a, v)), problem.exact) > 0.1
    assert float((jacobian - jacobian.T).norm()) > 0.1


@pytest.mark.filterwarnings("ignore:.*hardly begun")
@pytest.mark.parametrize("terms", [1, 2, 5, 20])
def test_neumann_is_its_truncated_series(terms):
    optimizer, b, v = quadratic(POSITIVE, mlo.Neumann(num_terms=terms, step_size=0.3))
    q = sum(
        0.3 * torch.linalg.matrix_power(torch.eye(DIM).double() - 0.3 * POSITIVE, k) @ v
        for k in range(terms)
    )
    assert relative_error(optimizer.gradient("x")["v"], b.T @ q) < 1e-12
    assert optimizer.step().solves["w"].iterations == terms - 1


def test_neumann_detects_divergence_and_auto_prevents_it():
    optimizer, *_ = quadratic(POSITIVE, mlo.Neumann(num_terms=200, step_size=1.5))
    with pytest.warns(mlo.SolveWarning, match="diverges at step_size 1.5"):
        report = optimizer.step().solves["w"]
    assert not report.converged
    assert report.iterations < 200
    auto, *_ = quadratic(POSITIVE, mlo.Neumann(num_terms=200))
    assert auto.step().solves["w"].residual < 1e-3


def test_a_series_that_has_hardly_begun_to_converge_is_said():
    optimizer, *_ = quadratic(symmetric([1e-4] * 7 + [1.0]), mlo.Neumann(num_terms=5))
    with pytest.warns(mlo.SolveWarning, match="hardly begun to converge: raise num_terms"):
        assert optimizer.step().solves["w"].residual > 0.5


@pytest.mark.parametrize("options", [{"step_size": "auto"}, {"step_size": 0.1, "warm_start": True}])
def test_fresh_batches_go_with_a_number_and_a_cold_start(options):
    with pytest.raises(mlo.EngineError, match="fresh_batches=True needs a number"):
        mlo.Neumann(fresh_batches=True, **options)


def test_fresh_batches_of_one_matrix_are_the_series_with_damping():
    engine = mlo.Neumann(num_terms=4, step_size=0.3, fresh_batches=True, damping=0.1, tol=9.0)
    optimizer, b, v = quadratic(POSITIVE, engine, solve_data=[torch.zeros(1)])
    matrix = POSITIVE + 0.1 * torch.eye(DIM).double()
    total, term = torch.zeros_like(v), v
    for _ in range(4):
        total, term = total + 0.3 * term, term - 0.3 * matrix @ term
    assert relative_error(optimizer.gradient("x")["v"], b.T @ total) < 1e-12
