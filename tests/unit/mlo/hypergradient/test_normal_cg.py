"""`normal_cg`: conjugate gradients on the normal equations."""

from __future__ import annotations

import pytest
import torch
from quadratics import DIM, INDEFINITE, POSITIVE, krylov, quadratic, symmetric

import mlo
from mlo.testing import bilinear_game, relative_error


@pytest.mark.parametrize("coupling", [0.5, 4.0, 20.0], ids=["weak", "strong", "stronger"])
def test_games_are_solved_by_the_transposed_jacobian(coupling):
    problem = bilinear_game(dim=4, coupling=coupling)
    optimizer = problem.optimizer(mlo.NormalConjugateGradient(tol=1e-12, max_steps=30))
    assert relative_error(optimizer.gradient("x")["v"], problem.exact) < 1e-8
    assert optimizer.step().solves["game"].converged


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("kind", ["positive", "indefinite", "game"])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_truncated_it_minimises_the_residual_over_its_space(kind, steps):
    """K steps minimise ‖v − Aᵀq‖ over span{Av, (AAᵀ)Av, …}, and the report has that residual."""
    engine = mlo.NormalConjugateGradient(max_steps=steps, tol=1e-12)
    if kind == "game":
        problem = bilinear_game(dim=4)
        optimizer, a = problem.optimizer(engine), problem.jacobians["game"]
        b, v, lower = -problem.mixed["game"]["x"], problem.direct["game"], "game"
    else:
        a = POSITIVE if kind == "positive" else INDEFINITE
        (optimizer, b, v), lower = quadratic(a, engine), "w"
    basis = krylov(a @ a.T, a @ v, steps)
    q = basis @ torch.linalg.lstsq(a.T @ basis, v.unsqueeze(1)).solution.squeeze(1)
    assert relative_error(optimizer.gradient("x")["v"], b.T @ q) < 1e-8
    report = optimizer.step().solves[lower]
    assert report.residual == pytest.approx(float((v - a.T @ q).norm() / v.norm()), rel=1e-6)
    assert report.iterations == 2 * steps + 1  # and one to begin
    assert not report.converged and "Raise max_steps" in report.advice


def test_it_stops_at_its_tolerance():
    optimizer, *_ = quadratic(POSITIVE, mlo.NormalConjugateGradient(tol=1e-2))
    report = optimizer.step().solves["w"]
    assert report.converged
    assert report.residual <= 1e-2


def test_a_singular_jacobian_gives_least_squares_and_says_so():
    singular = symmetric([0.0, 0.0, 0.4, 0.5, 0.7, 1.0, 1.5, -2.0])
    optimizer, b, v = quadratic(singular, mlo.NormalConjugateGradient(tol=1e-12, max_steps=40))
    expected = b.T @ (torch.linalg.pinv(singular, atol=1e-10) @ v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-8
    with pytest.warns(mlo.SolveWarning, match="The Jacobian is singular"):
        report = optimizer.step().solves["w"]
    assert report.iterations < 2 * DIM + 10  # it does not continue in vain


def test_a_zero_jacobian_moves_nothing():
    optimizer, *_ = quadratic(torch.zeros(DIM, DIM).double(), "normal_cg")
    assert float(optimizer.gradient("x")["v"].norm()) == 0.0


def test_fixed_points_of_projected_steps_are_solved():
    """Their Jacobian is not symmetric, and neither is that of a stationarity map."""
    engine = {"name": "normal_cg", "tol": 1e-12}
    found, exact = (
        quadratic(
            POSITIVE,
            choice,
            lr=0.5,
            after_step=lambda p, *, x: {"v": 0.5 * p["v"].roll(1) - x.v.sum().sin()},
        )[0].gradient("x")["v"]
        for choice in (engine, "direct")
    )
    assert relative_error(found, exact) < 1e-9


def test_a_stationarity_map_of_ones_own_is_solved():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    solution = mlo.implicit_solution(
        torch.linalg.solve(a, x.detach()),
        x,
        stationarity=lambda theta, x: a @ theta - x,
        engine={"name": "normal_cg", "tol": 1e-13},
    )
    weights = torch.linspace(1.0, 2.0, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad(solution @ weights, x)
    assert relative_error(found, torch.linalg.solve(a.T, weights)) < 1e-8
