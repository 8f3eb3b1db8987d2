"""`unroll`: reverse mode through the last steps of the optimizer."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import pytest
import torch
from noisy_regression import regression

import mlo
from mlo.testing import Vector, bilevel_quadratic, identical, relative_error, snapshot


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


# ------------------------------ optimizers that are not torch.optim's


class Own(torch.optim.Optimizer):
    """An optimizer whose step is one function of g, a parameter's state and its group."""

    def __init__(self, parameters, direction):
        super().__init__(parameters, {"lr": 0.1, "differentiable": False})
        self.direction = direction

    def step(self, closure=None):
        for group in self.param_groups:
            with torch.set_grad_enabled(group["differentiable"]):
                for p in group["params"]:
                    p.sub_(group["lr"] * self.direction(p.grad, self.state[p], group))


def momentum_under(key):
    def direction(g, state, _):
        state[key] = 0.9 * state.get(key, 0.0 * g) + g
        return state[key]

    return direction


def momenta_in_a_list(g, state, _):
    (first, second) = state.get("all", [0.0 * g, 0.0 * g])
    state["all"] = [0.9 * first + g, 0.5 * second + first]
    return state["all"][0] + state["all"][1]


def momenta_in_a_named_tuple(g, state, _):
    kept = state.get("pair", Pair(0.0 * g, 0.0 * g))
    state["pair"] = Pair(0.9 * kept.slow + g, 0.5 * kept.fast + g)
    return state["pair"].slow + state["pair"].fast


def by_the_norm_of_all_gradients(g, state, _):
    state["sum"] = state.get("sum", torch.zeros(()).double()) + g.square().sum()
    return g / state["sum"].sqrt()


def by_a_full_matrix(g, state, _):
    state["m"] = state.get("m", torch.eye(len(g)).double()) + torch.outer(g, g)
    return torch.linalg.solve(state["m"], g)


def by_a_sum_of_the_group(g, _, group):
    group["sum"] = group.get("sum", torch.zeros(()).double()) + g.square().sum()
    return g / group["sum"].sqrt()


class Pair(NamedTuple):
    """Two momenta."""

    slow: torch.Tensor
    fast: torch.Tensor


DIRECTIONS = [
    momentum_under("mu"),
    momentum_under("eta"),
    momentum_under("step"),
    momenta_in_a_list,
    momenta_in_a_named_tuple,
    by_the_norm_of_all_gradients,
    by_a_full_matrix,
    by_a_sum_of_the_group,
]


def fit(w, h):
    return ((w - h) ** 2).sum() + (w * h).sin().sum() + w.pow(4).sum()


def fitted(w, h, optimizer, *, steps, lr=0.0):
    """w fits h by an optimizer and all its steps are differentiated; h moves by `lr`."""
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=optimizer,
            loss=lambda w, _, *, h: fit(w.v, h.v),
            steps=steps,
        ),
        mlo.Problem(
            "h",
            module=h,
            optimizer=torch.optim.SGD(h.parameters(), lr=lr),
            loss=lambda h, _, *, w: (w.v - 1.0).pow(2).sum(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, mlo.Unroll(steps=steps))


@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda found: found.__name__)
def test_all_tensors_of_an_own_optimizers_state_count(direction):
    w, h = Vector(torch.linspace(-1, 1, 3).double()), Vector(torch.linspace(0, 1, 3).double())
    optimizer = fitted(w, h, Own(w.parameters(), direction), steps=4)
    begun = w.v.detach().clone()
    optimizer.step()
    found = optimizer.gradient("h")["v"]

    x, value, state, group = h.v.detach().requires_grad_(), begun, {}, {}
    for _ in range(4):
        value = value.requires_grad_() if value.is_leaf else value * 1.0
        (g,) = torch.autograd.grad(fit(value, x), value, create_graph=True)
        value = value - 0.1 * direction(g, state, group)
    (expected,) = torch.autograd.grad((value - 1.0).pow(2).sum(), x)
    assert relative_error(w.v.detach(), value.detach()) < 1e-12
    assert relative_error(found, expected) < 1e-12


def lagging_without_a_graph(g, state, _):
    before = state.get("last", 0.0 * g)
    state["last"] = g.detach()
    return g + before


def lagging_as_a_number(g, _, group):
    before = group.get("last", 0.0)
    group["last"] = float(g.detach().sum())
    return g * (1.0 + before)


@pytest.mark.parametrize("direction", [lagging_without_a_graph, lagging_as_a_number])
def test_a_state_that_loses_its_derivative_is_refused(direction):
    # One step alone has the right derivative: the state acts on the next one.
    w, h = Vector(torch.ones(3).double()), Vector(torch.ones(3).double())
    with pytest.raises(mlo.ProblemError, match="or of the two with the next"):
        fitted(w, h, Own(w.parameters(), direction), steps=2).step()


# ------------------------------ changes from outside between steps


def changed(change, after):
    """The gradient of a round of three steps, where `change` is made after one of them."""
    w, h = Vector(torch.ones(3).double()), Vector(torch.linspace(0, 1, 3).double())
    sgd = torch.optim.SGD(w.parameters(), lr=0.1, momentum=0.9)
    optimizer = fitted(w, h, sgd, steps=3, lr=1.0)
    begun = h.v.detach().clone()
    for made, _ in enumerate(optimizer.updates(1), start=1):
        if made == after:
            with torch.no_grad():
                change(w.v, sgd.state[w.v])
    return begun - h.v.detach()


@pytest.mark.parametrize(
    "change",
    [
        lambda w, _: w.add_(0.1),
        lambda w, _: w.data.mul_(0.5),
        lambda w, _: w.clamp_(max=0.1),
        lambda _, state: state["momentum_buffer"].zero_(),
    ],
)
def test_a_change_that_cuts_a_chain_of_steps_warns(change):
    with pytest.warns(mlo.SolveWarning, match="through 2 of the 3 steps .* between two of them"):
        changed(change, after=1)


@pytest.mark.parametrize("change", [lambda w, _: w.add_(0.1), lambda w, _: w.data.mul_(0.5)])
def test_a_change_after_the_last_step_warns(change):
    with pytest.warns(mlo.SolveWarning, match="through 1 of the 3 steps .* one step ahead"):
        changed(change, after=3)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_clamp_that_changes_nothing_cuts_no_chain(after):
    found = changed(lambda w, _: w.clamp_(max=10.0), after=after)
    assert torch.equal(found, changed(lambda w, _: None, after=after))
