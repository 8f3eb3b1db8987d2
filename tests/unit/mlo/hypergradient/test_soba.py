"""`soba`: one step of the linear system per upper update."""

from __future__ import annotations

import pytest
import torch
from quadratics import INDEFINITE, POSITIVE, quadratic

import mlo
from mlo.testing import identical, relative_error, snapshot


def test_q_moves_by_one_step_per_update():
    """q ← q + α (v − Aᵀ q), from q = 0."""
    optimizer, b, v = quadratic(POSITIVE, mlo.Soba(step_size=0.3))
    q = torch.zeros_like(v)
    for _ in range(4):
        q = q + 0.3 * (v - POSITIVE @ q)
        assert relative_error(optimizer.gradient("x")["v"], b.T @ q) < 1e-12
        optimizer.step()


def test_an_update_costs_one_product():
    optimizer, *_ = quadratic(POSITIVE, mlo.Soba(step_size=0.3))
    products = [optimizer.step().solves["w"].iterations for _ in range(3)]
    assert products == [0, 1, 1]


def test_damping_is_added_to_the_jacobian():
    optimizer, b, v = quadratic(POSITIVE, mlo.Soba(step_size=0.3, damping=0.5))
    list(optimizer.run(200))
    damped = POSITIVE + 0.5 * torch.eye(len(POSITIVE)).double()
    expected = b.T @ torch.linalg.solve(damped, v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-10


def test_gradient_does_not_move_q():
    optimizer, *_ = quadratic(POSITIVE, "soba")
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.gradient("x")
    assert identical(before, snapshot(optimizer))


def test_an_automatic_step_size_is_below_the_stable_one():
    """The largest eigenvalue is 2, so 1 / λmax is 0.5; ten products estimate it nearly."""
    optimizer, b, v = quadratic(POSITIVE, "soba")
    first = optimizer.gradient("x")["v"]
    alpha = float(first.norm() / (b.T @ v).norm())
    assert alpha == pytest.approx(0.5, rel=0.1)


def test_a_solve_that_diverges_starts_again_and_says_so():
    optimizer, *_ = quadratic(INDEFINITE, mlo.Soba(step_size=1.9))
    with pytest.warns(mlo.SolveWarning, match="diverged and starts again"):
        list(optimizer.run(200))
    assert all(torch.isfinite(value).all() for value in optimizer.gradient("x").values())
