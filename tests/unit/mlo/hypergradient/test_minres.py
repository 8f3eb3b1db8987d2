"""`minres`: minimal residuals for symmetric Jacobians of either sign."""

from __future__ import annotations

import pytest
import torch
from quadratics import INDEFINITE, POSITIVE, krylov, quadratic

import mlo
from mlo.testing import relative_error


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("matrix", [POSITIVE, INDEFINITE], ids=["positive", "indefinite"])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_truncated_minres_minimises_the_residual(matrix, steps):
    """Truncated MINRES minimises the residual over its Krylov space."""
    optimizer, b, v = quadratic(matrix, mlo.Minres(max_steps=steps))
    basis = krylov(matrix, v, steps)
    q = basis @ torch.linalg.lstsq(matrix @ basis, v.unsqueeze(1)).solution.squeeze(1)
    assert relative_error(optimizer.gradient("x")["v"], b.T @ q) < 1e-9
    report = optimizer.step().solves["w"]
    assert report.residual == pytest.approx(float((v - matrix @ q).norm() / v.norm()), rel=1e-6)


def test_an_indefinite_jacobian_is_solved():
    optimizer, b, v = quadratic(INDEFINITE, mlo.Minres(tol=1e-12))
    assert optimizer.step().solves["w"].converged
    expected = b.T @ torch.linalg.solve(INDEFINITE, v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-10


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_the_residual_never_grows_with_the_steps():
    """That holds on an indefinite Jacobian too."""
    residuals = []
    for steps in range(1, len(INDEFINITE) + 1):
        optimizer, *_ = quadratic(INDEFINITE, mlo.Minres(max_steps=steps))
        residuals.append(optimizer.step().solves["w"].residual)
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e7])
def test_a_singular_jacobian_is_told_at_any_scale(size, dtype):
    """It stops with the least residual: what the Jacobian does not reach."""
    singular = size * torch.diag(torch.tensor([0.0, 1.0, -2.0, 4.0], dtype=dtype))
    b = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=dtype)
    found = mlo.Minres().iterate(lambda u: singular @ u, b, 2.0, None)
    assert found.residual == pytest.approx(0.5, rel=1e-3)
    assert float(found.x.norm()) < 10.0 / size
    assert not found.converged and "is singular" in found.advice


def test_a_right_hand_side_within_the_tolerance_needs_no_step():
    b = torch.tensor([1e-9, 0.0])
    for entry in (b, torch.zeros(2)):
        found = mlo.Minres().iterate(lambda u: u * torch.nan, entry, 1.0, None)
        assert found.converged and float(found.x.norm()) == 0.0
