"""Hooks and losses may not move a solution where its derivative would miss the move."""

from __future__ import annotations

import pytest
import torch
from two_levels import two_levels

import mlo
from mlo.testing import Vector, identical, relative_error


def test_hooks_run_around_every_step_and_see_its_gradient():
    seen = []

    def before(problem):
        seen.append(("before", problem.name, problem.parameters["v"].grad.clone()))

    def after(problem):
        seen.append(("after", problem.name, problem.parameters["v"].grad))

    hooks = {"before_update": before, "after_update": after}
    optimizer = two_levels(lower=hooks, upper=hooks, steps=2)
    expected = optimizer.gradient("w")["v"]
    optimizer.step()
    assert [entry[:2] for entry in seen] == [
        (when, name) for name in ("w", "w", "x") for when in ("before", "after")
    ]
    assert torch.equal(seen[0][2], expected)
    assert all(gradient is None for when, _, gradient in seen if when == "after")


def test_hooks_that_change_nothing_leave_the_run_as_it_is():
    hooks = {"before_update": lambda problem: None, "after_update": lambda problem: None}
    states = []
    for options in ({}, {"lower": hooks, "upper": hooks}):
        optimizer = two_levels(**options)
        list(optimizer.run(3))
        states.append(optimizer.state_dict())
    assert identical(*states)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("engine", ["one_step", "darts", {"name": "unroll", "steps": 2}])
def test_a_gradient_changed_where_its_step_is_differentiated(engine, in_place):
    def halve(problem):
        gradient = problem.parameters["v"].grad
        if in_place:
            gradient.data.mul_(0.5)  # which autograd's version counter does not see
        else:
            problem.parameters["v"].grad = gradient / 2

    with pytest.raises(mlo.ProblemError, match=r"before_update of problem 'w' changed.*'neumann'"):
        two_levels(engine, lower={"before_update": halve}).step()


def test_a_gradient_may_change_where_no_step_is_differentiated():
    def halve(problem):
        problem.parameters["v"].grad.mul_(0.5)

    plain, halved = (
        two_levels("cg", steps=1),
        two_levels("cg", steps=1, lower={"before_update": halve}),
    )
    start = plain.problems["w"].parameters["v"].detach().clone()
    for optimizer in (plain, halved):
        next(optimizer.updates(rounds=1))
    whole, half = (opt.problems["w"].parameters["v"] - start for opt in (plain, halved))
    assert torch.allclose(half, whole / 2)
    # The outermost problem's step is never differentiated.
    two_levels("one_step", upper={"before_update": halve}).step()


def test_a_solution_moved_after_its_update_is_refused():
    """A projection behind the engine's back would be missing in the derivative."""

    @torch.no_grad()
    def clamp(problem):
        problem.parameters["v"].data.clamp_(min=0.0)
        problem.parameters["v"].data.add_(1.0)

    for engine in ("one_step", "cg"):
        with pytest.raises(mlo.ProblemError, match=r"after_update of problem 'w' changed its"):
            two_levels(engine, lower={"after_update": clamp}).step()
    two_levels({"w": "first_order"}, lower={"after_update": clamp}, direct=1.0).step()
    two_levels("one_step", upper={"after_update": clamp}).step()


@torch.no_grad()
def moves_own(problem):
    problem.parameters["v"].mul_(0.5)


@torch.no_grad()
def moves_own_data(problem):
    problem.parameters["v"].data.mul_(0.5)  # which autograd's version counter does not see


@pytest.mark.parametrize("move", [moves_own, moves_own_data])
@pytest.mark.parametrize(
    "engine",
    [
        "one_step",
        {"name": "one_step", "keep_graph": False},
        "darts",
        {"name": "unroll", "steps": 2},
    ],
)
def test_weights_moved_before_a_differentiated_step(engine, move):
    with pytest.raises(mlo.ProblemError, match=r"before_update of problem 'w' changed its param"):
        two_levels(engine, lower={"before_update": move}).step()


def test_weights_may_move_before_a_step_that_nothing_reads():
    two_levels("cg", lower={"before_update": moves_own}).step()
    two_levels({"w": "first_order"}, lower={"before_update": moves_own}, direct=1.0).step()
    two_levels("one_step", upper={"before_update": moves_own}).step()


def clamped(v):
    with torch.no_grad():
        v.clamp_(-0.1, 0.1)
    return v


def clamped_data(v):
    v.data.clamp_(-0.1, 0.1)
    return v


def bounded_rows(v):
    rows = torch.nn.functional.embedding(torch.tensor([0]), v[None], max_norm=0.1)
    return rows[0]


def bounded(move, engine, steps):
    """w goes from a start that its loss moves towards x, and x is judged by w."""
    w, x = (Vector(torch.tensor(start).double()) for start in ([0.9, 0.05], [1.0, 2.0]))
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=0.1),
            loss=lambda w, _, *, x: ((move(w.v) - x.v) ** 2).sum(),
            steps=steps,
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
            loss=lambda x, _, *, w: (w.v**2).sum() + 0.0 * x.v.sum(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


MOVES = pytest.mark.parametrize("move", [clamped, clamped_data, bounded_rows])


@MOVES
@pytest.mark.parametrize("engine", ["cg", {"name": "unroll", "steps": 2}])
def test_a_loss_may_not_move_what_is_differentiated(move, engine):
    optimizer = bounded(move, engine, steps=2)
    with pytest.raises(mlo.ProblemError, match="loss of problem 'w' changes its parameter 'v'"):
        optimizer.step()


def looked_up(v):
    torch.nn.functional.embedding(torch.tensor([0]), v[None], max_norm=100.0)
    return v


def restored(v):
    with torch.no_grad():
        old = v.clone()
        v.add_(1.0)
        v.copy_(old)
    return v


@pytest.mark.parametrize("write", [looked_up, restored])
@pytest.mark.parametrize("engine", ["cg", {"name": "unroll", "steps": 2}])
def test_a_loss_may_write_what_is_there_already(write, engine):
    optimizer = bounded(write, engine, steps=2)
    for _ in range(3):
        optimizer.step()


def test_a_bound_that_is_reached_between_looks_is_refused():
    """v goes to 2 by 2 − 1.95 · 0.8ᵏ, and values are looked at in the updates 1, 2, 4, 8."""

    def bound(v):
        with torch.no_grad():
            v.clamp_(-1.3, 1.3)
        return v

    optimizer = bounded(bound, {"name": "unroll", "steps": 2}, steps=2)
    list(optimizer.run(2))
    with pytest.raises(mlo.ProblemError, match="loss of problem 'w' changes its parameter 'v'"):
        optimizer.step()


def test_a_number_that_is_not_one_has_not_moved():
    optimizer = bounded(lambda v: torch.where(v.isnan(), 0.0, v), "cg", steps=2)
    with torch.no_grad():
        optimizer.problems["w"].module.v[1] = torch.nan
    next(optimizer.updates(rounds=1))


@MOVES
@pytest.mark.parametrize("engine", ["one_step", "first_order"])
def test_one_step_from_where_a_loss_moved_is_exact(move, engine):
    """The start c is a constant, moved or not: w = c − 2 lr (c − x), so dΣw²/dx = 4 lr w."""
    optimizer = bounded(move, engine, steps=1)
    optimizer.step()
    w, x = (optimizer.problems[name].module.v.detach() for name in ("w", "x"))
    start = move(torch.tensor([0.9, 0.05]).double())
    assert relative_error({"v": w}, {"v": start - 0.2 * (start - x)}) < 1e-12
    if engine == "one_step":
        assert relative_error(optimizer.gradient("x"), {"v": 0.4 * w}) < 1e-12


@pytest.mark.parametrize("hook", ["before_update", "after_update"])
def test_a_hook_that_moves_what_its_problem_reads(hook):
    found = {}

    @torch.no_grad()
    def clamp(problem):
        found["x"].v.clamp_(max=0.5)

    optimizer = two_levels("one_step", lower={hook: clamp})
    found["x"] = optimizer.problems["x"].module
    message = rf"{hook} of problem 'w' changed the parameter 'v' of problem 'x', which it reads"
    with pytest.raises(mlo.ProblemError, match=message):
        optimizer.step()


@pytest.mark.parametrize("hook", ["before_update", "after_update"])
def test_a_hook_that_leaves_a_nan_alone_changes_nothing(hook):
    """A parameter that the loss does not use may hold one (a row that is not filled yet)."""
    seen = []
    optimizer = two_levels("one_step", lower={hook: lambda problem: seen.append(problem.name)})
    with torch.no_grad():
        optimizer.problems["x"].module.v[0] = torch.nan
    optimizer.problems["w"].loss = lambda w, batch, *, x: ((w.v - x.v.nan_to_num()) ** 2).sum()
    next(optimizer.updates(rounds=1))
    assert seen == ["w"]
