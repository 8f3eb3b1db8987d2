"""`soba`: one step of the linear system per upper update."""

from __future__ import annotations

import pytest
import torch
from quadratics import INDEFINITE, POSITIVE, quadratic
from small_blocks import Blocks

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
    with pytest.warns(mlo.SolveWarning, match="diverged and starts over"):
        list(optimizer.run(200))
    assert all(torch.isfinite(value).all() for value in optimizer.gradient("x").values())


def test_a_step_size_may_be_a_function_of_the_update():
    optimizer, b, v = quadratic(POSITIVE, mlo.Soba(step_size=lambda t: 0.4 / (t + 1)))
    q = torch.zeros_like(v)
    for t in range(4):
        q = q + 0.4 / (t + 1) * (v - POSITIVE @ q)
        assert relative_error(optimizer.gradient("x")["v"], b.T @ q) < 1e-12
        optimizer.step()


def test_several_steps_per_update():
    optimizer, b, v = quadratic(POSITIVE, mlo.Soba(step_size=0.3, steps=3, damping=0.2))
    q = torch.zeros_like(v)
    for k in range(3):
        for _ in range(3):
            q = q + 0.3 * (v - POSITIVE @ q - 0.2 * q)
        assert relative_error(optimizer.gradient("x")["v"], b.T @ q) < 1e-12
        assert optimizer.step().solves["w"].iterations == (2 if k == 0 else 3)


def test_the_step_size_is_the_lower_learning_rate():
    """That of its last update, before its scheduler moved on."""
    blocks = Blocks()
    optimizer = blocks.optimizer(
        mlo.Soba(step_size="lower"),
        [0],
        [0],
        alpha=lambda t: 0.1 * 0.5**t,
        gamma=0.0,
        order="lower_first",
    )
    q = torch.zeros(4, dtype=torch.float64)
    for t in range(3):
        optimizer.step()
        z = optimizer.problems["z"].module.v.detach()
        down = blocks.dF(0, z, blocks.x0)[0]
        q = q + 0.1 * 0.5**t * (down - blocks.products(0, z, blocks.x0, q)[0])
        kept = optimizer.state_dict()["problems"]["z"]["memory"]["x:q"]
        assert relative_error(kept, q) < 1e-12


def test_several_learning_rates_are_no_step_size():
    optimizer = Blocks().optimizer(
        mlo.Soba(step_size="lower"), [0], [0], alpha=0.1, gamma=0.0, order="lower_first"
    )
    optimizer.problems["z"].optimizers["z"].add_param_group(
        {"params": [torch.zeros(1, requires_grad=True)], "lr": 0.3}
    )
    with pytest.raises(mlo.EngineError, match=r"which has \[0\.1, 0\.3\]"):
        optimizer.step()
