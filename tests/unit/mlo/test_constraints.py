"""Projections and proximal steps: their values against their definitions, and two derivatives."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize

import mlo
from mlo import constraints

POINT = torch.tensor([0.9, -0.4, 0.25, 0.7, -1.3], dtype=torch.float64)


def closest(point, violations, start):
    """argmin ‖x − point‖² where all `violations` are equal to zero or not negative, by SLSQP."""
    found = minimize(
        lambda x: ((x - point.numpy()) ** 2).sum(),
        start,
        constraints=violations,
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return torch.tensor(found.x)


INSIDE = [{"type": "ineq", "fun": lambda x: x}]
CASES = {
    "nonnegative": (constraints.nonnegative, INSIDE),
    "box": (
        lambda x: constraints.box(x, -0.5, 0.5),
        [{"type": "ineq", "fun": lambda x: x + 0.5}, {"type": "ineq", "fun": lambda x: 0.5 - x}],
    ),
    "simplex": (
        lambda x: constraints.simplex(x, 1.5),
        [*INSIDE, {"type": "eq", "fun": lambda x: x.sum() - 1.5}],
    ),
    "l2_ball": (
        lambda x: constraints.l2_ball(x, 0.8),
        [{"type": "ineq", "fun": lambda x: 0.8**2 - (x**2).sum()}],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_projection_is_the_closest_point_of_its_set(name):
    project, violations = CASES[name]
    expected = closest(POINT, violations, [0.1] * 5)
    torch.testing.assert_close(project(POINT), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_projection_leaves_its_own_points(name):
    project, _ = CASES[name]
    once = project(POINT)
    torch.testing.assert_close(project(once), once, atol=1e-15, rtol=0)


def test_soft_threshold_is_the_proximal_step_of_the_l1_norm():
    found = constraints.soft_threshold(POINT, 0.5)
    # argmin ½ (x − p)² + ½ |x|, on a grid around it
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    values = 0.5 * (grid[:, None] - POINT) ** 2 + 0.5 * grid[:, None].abs()
    torch.testing.assert_close(found, grid[values.argmin(0)], atol=1e-5, rtol=0)
    assert found[2] == 0.0
    assert found[1] == 0.0


def scalars(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


FUNCTIONS = {
    "nonnegative": (constraints.nonnegative, ()),
    "box": (constraints.box, (scalars(-0.5), scalars(0.5))),
    "simplex": (constraints.simplex, (scalars(1.5),)),
    "simplex by rows": (lambda x, total: constraints.simplex(x, total, dim=1), (scalars(0.7),)),
    "l2_ball outside": (constraints.l2_ball, (scalars(0.8),)),
    "l2_ball inside": (constraints.l2_ball, (scalars(8.0),)),
    "l2_ball by rows": (lambda x, radius: constraints.l2_ball(x, radius, dim=1), (scalars(0.9),)),
    "soft_threshold": (constraints.soft_threshold, (scalars(0.5),)),
    "soft_threshold of each": (
        constraints.soft_threshold,
        (torch.linspace(0.1, 0.6, 5, dtype=torch.float64, requires_grad=True),),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_derivatives_are_those_of_the_value(name):
    """In what is projected, and in bounds, totals, radii and thresholds."""
    function, settings = FUNCTIONS[name]
    x = torch.stack([POINT, POINT.flip(0) * 1.1]).requires_grad_()
    # (A smooth function around it, so that the second derivative is not zero everywhere.)
    assert torch.autograd.gradcheck(lambda *a: function(*a).sin(), (x, *settings))
    assert torch.autograd.gradgradcheck(lambda *a: function(*a).sin(), (x, *settings))


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (constraints.nonnegative, [0.0, 1.0], [0.0, 1.0]),
        (lambda x: constraints.box(x, 0.0, 1.0), [0.0, 1.0], [0.0, 0.0]),
        (lambda x: constraints.soft_threshold(x, 1.0), [1.0, -1.0], [0.0, 0.0]),
        (lambda x: constraints.l2_ball(x, 1.0), [0.0, 0.0], [1.0, 1.0]),
    ],
)
def test_at_a_kink_the_constrained_side_counts(function, x, expected):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(function, x)
    assert jacobian.diagonal().tolist() == expected


def test_a_ball_of_radius_zero_is_its_centre():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(constraints.l2_ball(x, 0.0).sum(), x)
    assert constraints.l2_ball(x + 1.0, 0.0).tolist() == [0.0] * 3
    assert gradient.isfinite().all()


def test_rows_and_columns_are_projected_by_themselves():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        constraints.simplex(x, dim=0), torch.stack([constraints.simplex(c) for c in x.T], 1)
    )
    torch.testing.assert_close(
        constraints.l2_ball(x, 0.5, dim=-1),
        torch.stack([constraints.l2_ball(r, 0.5) for r in x]),
    )


def test_the_dtype_of_what_is_projected_stays():
    x = POINT.float()
    for function in (
        constraints.nonnegative,
        constraints.simplex,
        lambda t: constraints.box(t, torch.tensor(-1.0, dtype=torch.float64), 1),
        lambda t: constraints.l2_ball(t, torch.tensor(0.5, dtype=torch.float64)),
        lambda t: constraints.soft_threshold(t, torch.tensor(0.5, dtype=torch.float64)),
    ):
        assert function(x).dtype == torch.float32


def test_a_number_that_is_none_stays_none():
    x = torch.tensor([1.0, float("nan")])
    for function in (
        constraints.nonnegative,
        constraints.simplex,
        constraints.l2_ball,
        lambda t: constraints.box(t, -1.0, 1.0),
        lambda t: constraints.soft_threshold(t, 0.5),
    ):
        assert function(x)[1].isnan()


def test_large_numbers_are_projected_onto_the_simplex():
    """The total is less than the rounding of the entries."""
    assert constraints.simplex(torch.tensor([1e9, 1e9, 0.0])).tolist() == [0.5, 0.5, 0.0]


def test_a_dict_is_projected_entry_by_entry():
    x = {"a": POINT, "b": -POINT}
    found = constraints.simplex(x)
    assert {key: round(float(t.sum()), 12) for key, t in found.items()} == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: constraints.box(POINT, 1.0, 0.0), "lower must not be above upper"),
        (lambda: constraints.simplex(POINT, 0.0), "total must be positive"),
        (lambda: constraints.l2_ball(POINT, -1.0), "radius must not be negative"),
        (lambda: constraints.soft_threshold(POINT, -1.0), "threshold must not be negative"),
    ],
)
def test_what_is_no_set_is_refused(call, message):
    with pytest.raises(mlo.ProblemError, match=message):
        call()
