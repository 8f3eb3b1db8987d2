"""The closed forms that the engines are tested against."""

from __future__ import annotations

import pytest
import torch

import mlo
import mlo.testing
from mlo.testing import Vector, bilevel_quadratic, identical, relative_error, snapshot


@pytest.mark.parametrize("name", mlo.testing.GRAPHS)
def test_the_sweep_equals_the_closed_forms(name):
    """The sweep, which stands for engines, equals the closed forms."""
    problem = mlo.testing.GRAPHS[name]()
    exact = problem.swept(lambda jacobian, v: torch.linalg.solve(jacobian.T, v))
    assert relative_error(exact, problem.exact) < 1e-12


@pytest.mark.parametrize("name", ["bilevel", "weight decay", "chain", "diamond", "layered"])
def test_the_lower_problems_stand_at_their_solutions(name):
    """The optimizer's weight decay is part of the gradient that is zero there."""
    closed = mlo.testing.GRAPHS[name]()
    optimizer = closed.optimizer("direct")
    for problem in closed.problems:
        if problem.name != closed.upper:
            decay = problem.optimizers[problem.name].param_groups[0]["weight_decay"]
            gradient = optimizer.gradient(problem.name)["v"] + decay * closed.value(problem.name)
            assert float(gradient.norm()) < 1e-12


def test_a_seed_makes_the_same_problem_again():
    one, same, other = bilevel_quadratic(), bilevel_quadratic(), bilevel_quadratic(seed=1)
    assert torch.equal(one.exact, same.exact)
    assert not torch.equal(one.exact, other.exact)


def test_the_condition_is_that_of_the_jacobian():
    jacobian = bilevel_quadratic(condition=50.0).jacobians["w"]
    assert float(torch.linalg.cond(jacobian)) == pytest.approx(50.0)


def test_the_relative_error_is_over_all_tensors_together():
    exact = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    found = {"a": torch.tensor([3.0]), "b": torch.tensor([4.5])}
    assert relative_error(found, exact) == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="against"):
        relative_error({"a": torch.ones(1)}, exact)


def test_states_are_compared_bit_by_bit():
    state = {"x": [torch.ones(2), 1], "y": (None, "text")}
    assert identical(state, {"x": [torch.ones(2), 1], "y": (None, "text")})
    assert not identical(state, {"x": [torch.ones(2).double(), 1], "y": (None, "text")})
    assert not identical(state, {"x": [torch.ones(2), 1], "y": (None, "other")})
    assert not identical(state, {"x": [torch.ones(2), 1]})


def test_a_gradient_that_moves_something_is_found():
    closed = bilevel_quadratic()
    optimizer = closed.optimizer("direct")
    mlo.testing.check_gradient_changes_nothing(optimizer, "x")
    gradient = optimizer.gradient

    def moving(name):
        with torch.no_grad():
            closed.problems[0].parameters["v"].add_(1.0)
        return gradient(name)

    optimizer.gradient = moving
    with pytest.raises(AssertionError):
        mlo.testing.check_gradient_changes_nothing(optimizer, "x")


def test_a_snapshot_holds_copies():
    optimizer = bilevel_quadratic().optimizer("direct")
    before = snapshot(optimizer)
    optimizer.step()
    assert not identical(before, snapshot(optimizer))
    assert int(before["round"]) == 0


def test_a_vector_is_a_copy_of_its_value():
    value = torch.ones(2)
    module = Vector(value)
    value.zero_()
    assert module.v.tolist() == [1.0, 1.0]
