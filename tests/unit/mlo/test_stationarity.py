"""How far a lower problem is from a solution, as a gradient's report says it."""

from __future__ import annotations

import pytest
import torch
from noisy_regression import lines, regression

import mlo
from mlo.testing import Vector, bilevel_quadratic, identical, snapshot, trilevel_quadratic

EXACT = ["direct", "minres", "neumann", "identity"]


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_solved_problem_is_stationary_and_a_moved_one_is_not(engine, weight_decay):
    # (A quadratic's problems are declared at their solution.)
    optimizer = bilevel_quadratic(weight_decay=weight_decay).optimizer(engine)
    assert optimizer.gradient("x", report=True).stationarity["w"] < 1e-12
    with torch.no_grad():
        for parameter in optimizer.problems["w"].parameters.values():
            parameter.add_(1.0)
    assert optimizer.gradient("x", report=True).stationarity["w"] > 0.05


def ratio(factor, *, moved=0.5, engine="direct"):
    """The relative ‖F‖ of a scaled loss, whose solution is moved by a part of itself."""
    start = torch.tensor([2.0, 6.0], dtype=torch.float64) * (1.0 + moved)
    w, x = Vector(start), Vector(torch.tensor([1.0, 3.0], dtype=torch.float64))
    lower = mlo.Problem(
        "w",
        module=w,
        loss=lambda w, _, *, x: factor * (w.v - 2.0 * x.v).square().sum(),
        optimizer=torch.optim.SGD(w.parameters(), lr=1e-9),
    )
    upper = mlo.Problem(
        "x",
        module=x,
        loss=lambda x, _, *, w: w.v.square().sum(),
        optimizer=torch.optim.SGD(x.parameters(), lr=1e-9),
    )
    return mlo.MultilevelOptimizer([lower, upper], engine).gradient("x", report=True).stationarity


def test_the_ratio_has_no_units():
    # F = 2 (w − 2 x) with w = 2 x (1 + d): d · 2 |x| against 2 |x| · √((1 + d)² + 1).
    for moved in (0.01, 0.5):
        expected = moved / ((1.0 + moved) ** 2 + 1.0) ** 0.5
        for factor in (1.0, 1e6):
            assert ratio(factor, moved=moved)["w"] == pytest.approx(expected)
    assert ratio(1.0, engine={"name": "identity", "products": "finite_difference"})["w"] == (
        pytest.approx(0.5 / 3.25**0.5, rel=1e-3)
    )


def test_only_what_a_gradient_takes_for_a_solution_is_reported():
    assert bilevel_quadratic().optimizer("one_step").gradient("x", report=True).stationarity == {}
    optimizer = trilevel_quadratic().optimizer({"w": "direct", "m": "one_step"})
    assert set(optimizer.gradient("x", report=True).stationarity) == {"w"}
    optimizer = trilevel_quadratic().optimizer("direct")
    # F of the middle problem contains the response of the lowest.
    found = optimizer.gradient("x", report=True).stationarity
    assert set(found) == {"w", "m"}
    assert max(found.values()) < 1e-12
    held = optimizer.gradient("x", held_constant=["w"], report=True).stationarity
    assert set(held) == {"m"}


def test_the_report_changes_nothing():
    plain = regression(hypergradient="identity")
    expected, found = lines(plain.run(4)), []
    asked = regression(hypergradient="identity")
    for _ in range(4):
        found += lines(asked.run(1))
        asked.gradient("decay", report=True)
    assert found == expected
    assert identical(snapshot(asked), snapshot(plain))
