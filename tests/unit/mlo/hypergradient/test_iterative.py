"""Iterative inverses: their own truncated formulas, warm starts, and what they say when they
fail.
"""

from __future__ import annotations

import math

import pytest
import torch

import mlo
from mlo.testing import Vector, bilevel_quadratic, identical, relative_error, snapshot

DIM = 8


def quadratic(matrix, engine, *, seed=2, dtype=torch.float64, **options):
    """½ wᵀSw + wᵀKw' … a stationarity map F = M w − B x with the Jacobian M, and the cotangent v of
    its solution.
    """
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(DIM, 3, generator=generator, dtype=torch.float64).to(dtype)
    v = torch.randn(DIM, generator=generator, dtype=torch.float64).to(dtype)
    m = matrix.to(dtype)
    w, x = Vector(torch.zeros(DIM, dtype=dtype)), Vector(torch.zeros(3, dtype=dtype))
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=0.0),
        loss=lambda w, _, *, x: 0.5 * w.v @ m @ w.v - w.v @ (b @ x.v),
        **options,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: w.v @ v,
    )
    return mlo.MultilevelOptimizer([lower, upper], engine), b, v


def symmetric(eigenvalues):
    generator = torch.Generator().manual_seed(5)
    basis, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))
    return (basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


POSITIVE = symmetric([0.1, 0.2, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0])
INDEFINITE = symmetric([-1.0, -0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0])


def krylov(matrix, v, steps):
    columns = [v]
    for _ in range(steps - 1):
        columns.append(matrix @ columns[-1])
    basis, _ = torch.linalg.qr(torch.stack(columns, 1))
    return basis


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


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_truncated_cg_minimises_the_energy_over_its_krylov_space(steps):
    optimizer, b, v = quadratic(POSITIVE, mlo.ConjugateGradient(max_steps=steps))
    basis = krylov(POSITIVE, v, steps)
    q = basis @ torch.linalg.solve(basis.T @ POSITIVE @ basis, basis.T @ v)
    assert relative_error(optimizer.gradient("x")["v"], b.T @ q) < 1e-10
    report = optimizer.step().solves["w"]
    assert report.residual == pytest.approx(float((v - POSITIVE @ q).norm() / v.norm()), rel=1e-8)
    assert (report.iterations, report.converged) == (steps, False)


@pytest.mark.parametrize("engine", [mlo.Minres, mlo.Gmres])
@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("matrix", [POSITIVE, INDEFINITE], ids=["positive", "indefinite"])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_truncated_minres_and_gmres_minimise_the_residual_over_their_krylov_space(
    matrix, steps, engine
):
    optimizer, b, v = quadratic(matrix, engine(max_steps=steps))
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


def test_nystrom_of_full_rank_is_the_inverse_and_of_low_rank_reports_how_wrong_it_is():
    full, b, v = quadratic(POSITIVE, mlo.Nystrom(rank=DIM, max_steps=0, ridge=0.05))
    expected = b.T @ torch.linalg.solve(POSITIVE + 0.05 * torch.eye(DIM).double(), v)
    assert relative_error(full.gradient("x")["v"], expected) < 1e-8
    low, *_ = quadratic(POSITIVE, mlo.Nystrom(rank=2, max_steps=0, ridge=0.001))
    with pytest.warns(mlo.SolveWarning, match="misses much of the Jacobian"):
        report = low.step().solves["w"]
    assert not report.converged
    assert report.residual > 1.0


@pytest.mark.parametrize(
    "engine",
    [
        "cg",
        "minres",
        "gmres",
        "direct",
        {"name": "nystrom", "max_steps": 30, "tol": 1e-10},
        "neumann",
    ],
    ids=str,
)
def test_damping_is_added_to_the_jacobian(engine):
    options = {"name": engine} if isinstance(engine, str) else dict(engine)
    if engine == "neumann":
        options["num_terms"] = 300
    optimizer, b, v = quadratic(POSITIVE, {**options, "damping": 0.2})
    expected = b.T @ torch.linalg.solve(POSITIVE + 0.2 * torch.eye(DIM).double(), v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "engine", ["cg", "minres", "gmres", "nystrom", {"name": "neumann", "num_terms": 300}], ids=str
)
def test_solves_reach_what_the_dtype_allows(engine, dtype):
    options = {"name": engine} if isinstance(engine, str) else dict(engine)
    if options["name"] == "nystrom":
        options |= {"max_steps": 30}
    optimizer, b, v = quadratic(POSITIVE, options, dtype=dtype)
    expected = b.T @ torch.linalg.solve(POSITIVE.to(dtype), v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 2e-5


# ------------------------------ failures are data, and said once


def test_cg_reports_negative_curvature_and_names_a_remedy_that_works():
    optimizer, b, v = quadratic(INDEFINITE, mlo.ConjugateGradient(max_steps=50))
    with pytest.warns(mlo.SolveWarning, match="curvature is -.*'minres'"):
        report = optimizer.step().solves["w"]
    assert not report.converged
    assert report.curvature < 0
    remedy, *_ = quadratic(INDEFINITE, "minres")
    assert relative_error(remedy.gradient("x")["v"], b.T @ torch.linalg.solve(INDEFINITE, v)) < 1e-5
    damped, *_ = quadratic(INDEFINITE, mlo.ConjugateGradient(damping=1.1, max_steps=50))
    assert damped.step().solves["w"].converged


def test_neumann_detects_divergence_and_auto_prevents_it():
    optimizer, *_ = quadratic(POSITIVE, mlo.Neumann(num_terms=200, step_size=1.5))
    with pytest.warns(mlo.SolveWarning, match="diverges at step_size 1.5"):
        report = optimizer.step().solves["w"]
    assert not report.converged
    assert report.iterations < 200
    auto, *_ = quadratic(POSITIVE, mlo.Neumann(num_terms=200))
    report = auto.step().solves["w"]
    assert report.converged
    assert report.residual < 1e-3


def test_too_few_steps_warn_once():
    optimizer, *_ = quadratic(POSITIVE, mlo.ConjugateGradient(max_steps=2))
    with pytest.warns(mlo.SolveWarning, match="Raise max_steps") as caught:
        list(optimizer.run(1))
    assert caught[0].filename == __file__
    assert not optimizer.step().solves["w"].converged  # silent: a warning would be an error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "neumann", "num_terms": 0}, "num_terms must be an integer of at least 1"),
        ({"name": "neumann", "step_size": "big"}, "step_size must be 'auto'"),
        ({"name": "cg", "max_steps": 2.5}, "max_steps must be an integer"),
        ({"name": "gmres", "restart": 0}, "restart must be"),
        ({"name": "cg", "damping": -1.0}, "damping must not be negative"),
        ({"name": "nystrom", "ridge": 0.0}, "ridge must be positive"),
        ({"name": "nystrom", "rank": 0}, "rank must be"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(mlo.EngineError, match=message):
        mlo.engine_from(options)


def test_a_series_that_has_hardly_begun_to_converge_is_said():
    optimizer, *_ = quadratic(symmetric([1e-4] * 7 + [1.0]), mlo.Neumann(num_terms=5))
    with pytest.warns(mlo.SolveWarning, match="hardly begun to converge: raise num_terms"):
        assert optimizer.step().solves["w"].residual > 0.5


# ------------------------------ warm starts


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_warm_start_goes_on_from_the_last_solution():
    warm, *_ = quadratic(POSITIVE, mlo.ConjugateGradient(max_steps=2, warm_start=True))
    residuals = [warm.step().solves["w"].residual for _ in range(8)]
    assert residuals[-1] < 0.1 * residuals[0]
    cold, *_ = quadratic(POSITIVE, mlo.ConjugateGradient(max_steps=2))
    assert math.isclose(cold.step().solves["w"].residual, residuals[0], rel_tol=1e-9)


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_warm_start_is_part_of_the_state_and_gradient_leaves_it_alone(tmp_path):
    engine = mlo.ConjugateGradient(max_steps=2, warm_start=True)
    whole = bilevel_quadratic().optimizer(engine)
    list(whole.run(3))
    before = snapshot(whole)
    whole.gradient("x")
    assert identical(before, snapshot(whole))
    mlo.save_checkpoint(whole.state_dict(), tmp_path / "s.pt")
    resumed = bilevel_quadratic().optimizer(engine)
    resumed.load_state_dict(mlo.load_checkpoint(tmp_path / "s.pt"))
    assert whole.step().solves == resumed.step().solves
    assert identical(snapshot(whole), snapshot(resumed))
