"""`nystrom`: the inverse of a low-rank approximation."""

from __future__ import annotations

import pytest
import torch
from quadratics import DIM, INDEFINITE, POSITIVE, quadratic

import mlo
from mlo.testing import relative_error


def test_full_rank_is_the_inverse_and_low_rank_is_reported():
    """A low rank reports how wrong it is."""
    full, b, v = quadratic(POSITIVE, mlo.Nystrom(rank=DIM, max_steps=0, ridge=0.05))
    expected = b.T @ torch.linalg.solve(POSITIVE + 0.05 * torch.eye(DIM).double(), v)
    assert relative_error(full.gradient("x")["v"], expected) < 1e-8
    low, *_ = quadratic(POSITIVE, mlo.Nystrom(rank=2, max_steps=0, ridge=0.001))
    with pytest.warns(mlo.SolveWarning, match="misses much of the Jacobian"):
        report = low.step().solves["w"]
    assert not report.converged
    assert report.residual > 1.0


def test_the_approximation_is_a_preconditioner():
    """With it fewer steps reach the tolerance than without."""
    steps = []
    for engine in (mlo.Nystrom(rank=DIM, tol=1e-6), mlo.ConjugateGradient(tol=1e-6)):
        optimizer, *_ = quadratic(POSITIVE, engine)
        report = optimizer.step().solves["w"]
        assert report.converged
        steps.append(report.iterations - getattr(engine, "rank", 0))
    assert steps[0] < steps[1]


def test_the_sketch_is_the_same_each_time():
    first, second = (quadratic(POSITIVE, mlo.Nystrom(rank=3))[0].gradient("x") for _ in range(2))
    assert torch.equal(first["v"], second["v"])


def test_a_jacobian_that_is_not_semidefinite_is_refused():
    optimizer, *_ = quadratic(INDEFINITE, mlo.Nystrom(rank=DIM))
    with pytest.raises(mlo.EngineError, match="not positive semidefinite"):
        optimizer.gradient("x")
