"""What the iterative engines share: damping, precision, warm starts."""

from __future__ import annotations

import math

import pytest
import torch
from quadratics import DIM, POSITIVE, quadratic

import mlo
from mlo.testing import bilevel_quadratic, identical, relative_error, snapshot


@pytest.mark.parametrize(
    "engine",
    [
        "cg",
        "minres",
        "gmres",
        "normal_cg",
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
    "engine",
    ["cg", "minres", "gmres", "normal_cg", "nystrom", {"name": "neumann", "num_terms": 300}],
    ids=str,
)
def test_solves_reach_what_the_dtype_allows(engine, dtype):
    options = {"name": engine} if isinstance(engine, str) else dict(engine)
    if options["name"] == "nystrom":
        options |= {"max_steps": 30}
    optimizer, b, v = quadratic(POSITIVE, options, dtype=dtype)
    expected = b.T @ torch.linalg.solve(POSITIVE.to(dtype), v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 2e-5


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_warm_start_continues_from_the_last_solution():
    warm, *_ = quadratic(POSITIVE, mlo.ConjugateGradient(max_steps=2, warm_start=True))
    residuals = [warm.step().solves["w"].residual for _ in range(8)]
    assert residuals[-1] < 0.1 * residuals[0]
    cold, *_ = quadratic(POSITIVE, mlo.ConjugateGradient(max_steps=2))
    assert math.isclose(cold.step().solves["w"].residual, residuals[0], rel_tol=1e-9)


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_warm_start_is_part_of_the_state(tmp_path):
    """A warm start is part of the state, and `gradient` leaves it alone."""
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
