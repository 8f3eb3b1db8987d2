"""`cg`: conjugate gradients."""

from __future__ import annotations

import math
import re

import pytest
import torch
from quadratics import INDEFINITE, POSITIVE, krylov, quadratic

import mlo
from mlo.advice import EngineAdvice
from mlo.hypergradient.cg import conjugate_gradients
from mlo.testing import relative_error


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


def test_cg_reports_negative_curvature_with_a_remedy():
    """CG reports negative curvature, and names a remedy that works."""
    optimizer, b, v = quadratic(INDEFINITE, mlo.ConjugateGradient(max_steps=50))
    with pytest.warns(mlo.SolveWarning, match="curvature is -.*'minres'"):
        report = optimizer.step().solves["w"]
    assert not report.converged
    assert report.curvature < 0
    remedy, *_ = quadratic(INDEFINITE, "minres")
    assert relative_error(remedy.gradient("x")["v"], b.T @ torch.linalg.solve(INDEFINITE, v)) < 1e-5
    damped, *_ = quadratic(INDEFINITE, mlo.ConjugateGradient(damping=1.1, max_steps=50))
    assert damped.step().solves["w"].converged


def test_too_few_steps_warn_once():
    optimizer, *_ = quadratic(POSITIVE, mlo.ConjugateGradient(max_steps=2))
    with pytest.warns(mlo.SolveWarning, match="Raise max_steps") as caught:
        list(optimizer.run(1))
    assert caught[0].filename == __file__
    assert not optimizer.step().solves["w"].converged  # silent: a warning would be an error


def test_cg_stops_at_its_tolerance():
    optimizer, *_ = quadratic(POSITIVE, mlo.ConjugateGradient(tol=1e-2))
    report = optimizer.step().solves["w"]
    assert report.converged
    assert report.residual <= 1e-2
    assert report.iterations < len(POSITIVE)


def test_the_smallest_curvature_that_was_met_is_reported():
    """It lies between the smallest and the largest eigenvalue."""
    optimizer, *_ = quadratic(POSITIVE, mlo.ConjugateGradient())
    curvature = optimizer.step().solves["w"].curvature
    assert 0.1 < curvature < 2.0


def test_only_engines_that_serve_are_advised():
    """Damping always helps; another engine may be refused."""

    def advice(*names):
        found = conjugate_gradients(
            lambda u: -2.0 * u,
            torch.ones(2),
            math.sqrt(2.0),
            max_steps=3,
            tol=1e-6,
            others=EngineAdvice(serves=lambda name: name in names),
        )
        return found.advice

    damping = "add damping above 2 (other directions may need more)"
    assert advice("gmres").endswith(f"{damping}, or use 'gmres'.")
    assert advice().endswith(f"{damping}.")


@pytest.mark.parametrize("damping", [0.0, 10.0])
def test_the_advised_damping_is_the_total_that_is_needed(damping):
    """Along the only direction of curvature −12.4444, three digits must not round it down."""

    def solved(damping):
        return conjugate_gradients(
            lambda u: (-12.4444 + damping) * u,
            torch.ones(2).double(),
            math.sqrt(2.0),
            max_steps=3,
            tol=1e-6,
            others=EngineAdvice(),
            damping=damping,
        )

    advised = float(re.search(r"above ([\d.]+)", solved(damping).advice)[1])
    assert advised == 12.5
    assert solved(advised).converged
    assert f"from 10 to above {advised}" in solved(10.0).advice
    assert not solved(advised - 0.1).converged
    reported = quadratic(INDEFINITE, mlo.ConjugateGradient(damping=0.25, max_steps=50))[0]
    with pytest.warns(mlo.SolveWarning, match=r"raise damping from 0\.25 to above"):
        reported.step()


def test_a_direction_without_curvature_is_reported():
    found = conjugate_gradients(
        lambda u: 0.0 * u,
        torch.ones(2).double(),
        math.sqrt(2.0),
        max_steps=3,
        tol=1e-6,
        others=EngineAdvice(),
    )
    assert not found.converged
    assert "add damping above 0 " in found.advice
