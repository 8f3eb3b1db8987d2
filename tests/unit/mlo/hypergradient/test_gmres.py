"""`gmres`: minimal residuals for Jacobians that are not symmetric."""

from __future__ import annotations

import pytest
import torch
from quadratics import INDEFINITE, POSITIVE, krylov, quadratic

import mlo
from mlo.testing import bilinear_game, relative_error


@pytest.mark.parametrize("coupling", [0.5, 4.0], ids=["weak", "strong"])
def test_games_are_solved_by_the_transposed_jacobian(coupling):
    problem = bilinear_game(dim=4, coupling=coupling)
    found = problem.optimizer(mlo.Gmres(tol=1e-12)).gradient("x")["v"]
    assert relative_error(found, problem.exact) < 1e-8
    jacobian = problem.jacobians["game"]  # the untransposed one would be far off
    assert relative_error(problem.swept(lambda a, v: torch.linalg.solve(a, v)), problem.exact) > 0.1
    assert float((jacobian - jacobian.T).norm()) > 0.1


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("matrix", [POSITIVE, INDEFINITE], ids=["positive", "indefinite"])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_truncated_gmres_minimises_the_residual(matrix, steps):
    """Truncated GMRES minimises the residual over its Krylov space."""
    optimizer, b, v = quadratic(matrix, mlo.Gmres(max_steps=steps))
    basis = krylov(matrix, v, steps)
    q = basis @ torch.linalg.lstsq(matrix @ basis, v.unsqueeze(1)).solution.squeeze(1)
    assert relative_error(optimizer.gradient("x")["v"], b.T @ q) < 1e-9
    report = optimizer.step().solves["w"]
    assert report.residual == pytest.approx(float((v - matrix @ q).norm() / v.norm()), rel=1e-6)


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_restarted_gmres_is_gmres_on_the_residual():
    optimizer, b, v = quadratic(POSITIVE, mlo.Gmres(max_steps=6, restart=3))
    q = torch.zeros_like(v)
    for _ in range(2):
        r = v - POSITIVE @ q
        basis = krylov(POSITIVE, r, 3)
        q = q + basis @ torch.linalg.lstsq(POSITIVE @ basis, r.unsqueeze(1)).solution.squeeze(1)
    assert relative_error(optimizer.gradient("x")["v"], b.T @ q) < 1e-9


def test_gmres_stops_at_its_tolerance():
    optimizer, *_ = quadratic(POSITIVE, mlo.Gmres(tol=1e-2))
    report = optimizer.step().solves["w"]
    assert report.converged
    assert report.residual <= 1e-2
    assert report.iterations < len(POSITIVE)


def test_a_solve_that_ends_early_says_what_to_raise():
    optimizer, *_ = quadratic(POSITIVE, mlo.Gmres(max_steps=2))
    with pytest.warns(mlo.SolveWarning, match="Raise max_steps and restart"):
        assert not optimizer.step().solves["w"].converged
