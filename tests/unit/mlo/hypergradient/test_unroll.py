"""`unroll`: reverse mode through the last steps of the optimizer."""

from __future__ import annotations

import contextlib

import pytest
import torch
from noisy_regression import regression

import mlo
from mlo.testing import bilevel_quadratic, identical, relative_error, snapshot


@pytest.mark.parametrize("steps", [1, 3])
def test_a_resumed_unroll_is_bit_identical_or_warns(steps):
    """It is where a round makes all of its steps, and says so where not."""

    def run(rounds, state=None):
        optimizer = regression(hypergradient={"name": "unroll", "steps": 3}, steps=steps)
        if state is not None:
            optimizer.load_state_dict(state)
        list(optimizer.run(rounds))
        return optimizer

    whole, half = run(4), run(2)
    with contextlib.ExitStack() as stack:
        if steps == 1:
            for message in ("holds none of them, and a round makes 1", "through 1 of the 3 steps"):
                stack.enter_context(pytest.warns(mlo.SolveWarning, match=message))
        resumed = run(2, half.state_dict())
    assert identical(snapshot(resumed), snapshot(whole)) == (steps == 3)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_the_last_steps_are_differentiated(kept):
    """Four steps of gradient descent are made, and θ before the kept ones is a constant."""
    problem = bilevel_quadratic()
    lower, upper = problem.losses["w"], problem.losses["x"]
    problem.problems[0].steps = 4
    w, x = problem.value("w").clone() + 1.0, problem.value("x").clone().requires_grad_()
    with torch.no_grad():
        problem.problems[0].parameters["v"].add_(1.0)
    for step in range(4):
        w = w.detach() if step <= 4 - kept else w
        w = w.requires_grad_()
        w = w - 0.1 * torch.autograd.grad(lower(w, x), w, create_graph=True)[0]
    (expected,) = torch.autograd.grad(upper(x, w), x)
    before = problem.value("x").clone()
    problem.optimizer(mlo.Unroll(steps=kept)).step()
    assert relative_error((before - problem.value("x")) / 0.1, expected) < 1e-10


def test_finite_differences_are_refused():
    with pytest.raises(mlo.EngineError, match="'unroll' does not take these options"):
        mlo.engine_from({"name": "unroll", "products": "finite_difference"})


def test_before_the_first_round_missing_steps_are_said():
    """It is that of one step ahead; after a round the steps are there, and nothing is said."""
    optimizer = bilevel_quadratic().optimizer(mlo.Unroll(steps=4))
    with pytest.warns(
        mlo.SolveWarning,
        match=r"through 1 of the 4 steps.*'unroll' of problem 'w'.*one step ahead.*optimizer.step",
    ):
        early = optimizer.gradient("x", report=True)
    assert [report.iterations for report in early.reports] == [1]
    ahead = bilevel_quadratic().optimizer("one_step").gradient("x")
    assert identical(early.gradient, ahead)
    optimizer.gradient("x")  # said once
    optimizer.step()
    assert optimizer.gradient("x").keys() == ahead.keys()


@pytest.mark.parametrize("engine", ["one_step", {"name": "unroll", "steps": 1}])
def test_one_step_ahead_is_all_that_an_engine_of_one_step_has(engine):
    bilevel_quadratic().optimizer(engine).gradient("x")  # a warning would be an error


def test_parameters_set_from_outside_leave_no_steps():
    problem = bilevel_quadratic()
    problem.problems[0].steps = 3
    optimizer = problem.optimizer(mlo.Unroll(steps=3))
    optimizer.step()
    optimizer.gradient("x")
    with torch.no_grad():
        problem.problems[0].parameters["v"].add_(1.0)
    with pytest.warns(mlo.SolveWarning, match="through 1 of the 3 steps"):
        optimizer.gradient("x")
