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


def diagonal(entries):
    """A product with a diagonal matrix, which counts as an operator."""
    return lambda u: entries.to(u.dtype) * u


def residual_of(entries, b, x):
    """‖b − A x‖ / ‖b‖ in float64."""
    b, x = b.double(), x.double()
    return float((b - entries * x).norm() / b.norm())


def test_in_float32_it_reaches_the_least_residual():
    """A least-squares solution on vectors of this length would drop directions as rounding."""
    entries = torch.linspace(1.0, 50.0, 5000, dtype=torch.float64)
    b = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    least = mlo.Gmres(tol=1e-12).iterate(diagonal(entries), b, float(b.norm()), None)
    found = mlo.Gmres(tol=1e-12).iterate(diagonal(entries), b.float(), float(b.norm()), None)
    least, exact = residual_of(entries, b, least.x), least.residual
    assert least == pytest.approx(exact, rel=1e-6)
    assert residual_of(entries, b, found.x) < 1.1 * least
    assert found.residual == pytest.approx(least, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("restart", [2, 40])
@pytest.mark.parametrize("part", [0.0, 1.0], ids=["within reach", "out of reach"])
def test_a_singular_jacobian_ends_the_basis(part, restart, dtype):
    """What A reaches is solved; of the rest it is said that A does not reach it."""
    entries = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    b = torch.tensor([part, 1.0, 1.0, 1.0], dtype=dtype)
    made = []

    def product(u):
        made.append(u)
        return diagonal(entries)(u)

    found = mlo.Gmres(restart=restart).iterate(product, b, float(b.norm()), None)
    assert found.residual == pytest.approx(part / float(b.norm()), abs=1e-3 if part else 1e-6)
    assert found.converged == (part == 0.0)
    if restart == 40:
        assert float(found.x.norm()) < 2.0
        assert len(made) <= 4
        assert ("is singular" in found.advice) == (part == 1.0)


def test_a_cycle_that_reaches_nothing_is_the_last_one():
    """GMRES(1) stands still on a rotation, whose images are orthogonal to their vectors."""
    rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    made = []

    def product(u):
        made.append(u)
        return rotation @ u

    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = mlo.Gmres(restart=1).iterate(product, b, float(b.norm()), None)
    assert len(made) == 1
    assert not found.converged and "restart" in found.advice
    whole = mlo.Gmres(restart=2).iterate(product, b, float(b.norm()), None)
    assert relative_error(rotation @ whole.x, b) < 1e-12
