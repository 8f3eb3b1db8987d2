"""Restarts: what they set, what is refused, and that a saved or skipped round keeps its blocks."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from learned_starts import (
    LR,
    META,
    Net,
    adam_steps,
    bilevel,
    meta_gradients,
    momentum_steps,
    oracle,
    task_data,
    values,
)
from torch import nn

import mlo
from mlo.restart import restarts_in, starts_of
from mlo.testing import Vector, relative_error

ADAM = partial(torch.optim.Adam, lr=LR)


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------ what a restart does


def test_a_block_begins_in_place_with_fresh_optimizers():
    optimizer, init, task = bilevel("unroll", steps=2, make=ADAM)
    identities = [id(parameter) for parameter in task.parameters()]
    adam = optimizer.problems["task"].optimizers["task"]
    for turn in range(2):
        start = values(init)
        updates = optimizer.updates(1)
        next(updates)
        counts = [float(adam.state[parameter]["step"]) for parameter in task.parameters()]
        assert counts == [1.0] * 4, turn
        moved = values(task)
        assert all(float((moved[k] - start[k]).abs().max()) < 1.01 * LR for k in start)
        list(updates)
    assert [id(parameter) for parameter in task.parameters()] == identities


def test_an_optimizer_that_counts_in_its_groups_is_refused():
    class Slowing(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["made"] = group.get("made", 0) + 1
            return super().step(closure)

    optimizer, _, _ = bilevel("first_order", steps=2, make=partial(Slowing, lr=LR))
    with pytest.raises(mlo.ProblemError, match="has changed 'made' of a group"):
        optimizer.step()


def test_adagrad_restarts_with_its_initial_accumulator():
    def make(parameters):
        return torch.optim.Adagrad(parameters, lr=LR, initial_accumulator_value=0.5)

    optimizer, init, task = bilevel("first_order", steps=2, make=make)
    optimizer.step()
    start = values(init)
    list(optimizer.updates(1))
    theta, x, y = start, *task_data()[:2]
    total = {name: torch.full_like(tensor, 0.5) for name, tensor in theta.items()}
    for _ in range(2):
        net = Net(5)
        net.load_state_dict(theta)
        found = torch.autograd.grad(((net(x) - y) ** 2).mean(), list(net.parameters()))
        for name, g in zip(theta, found, strict=True):
            total[name] = total[name] + g**2
            theta = {**theta, name: theta[name] - LR * g / (total[name].sqrt() + 1e-10)}
    assert all(torch.allclose(values(task)[name], theta[name], rtol=1e-12) for name in theta)


def vector(name, loss, value, **options):
    module = Vector(torch.full((1,), value).double())
    sgd = torch.optim.SGD(module.parameters(), lr=LR)
    return mlo.Problem(name, module=module, optimizer=sgd, loss=loss, **options)


def test_every_block_of_a_round_begins_anew():
    # The middle problem moves twice a round, each time after a block of the lower one.
    problems = [
        vector("t", lambda t, _: (t.v**2).sum(), 5.0, steps=3, restart_from="m"),
        vector("m", lambda m, _, *, t: (m.v - 1.0).square().sum() + t.v.sum(), 3.0, steps=2),
        vector("u", lambda u, _, *, m: (m.v * u.v).sum(), 1.0),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, {"t": "first_order", "m": "one_step"})
    assert optimizer.graph.schedule() == ("t", "t", "t", "m") * 2 + ("u",)
    t, m, _ = (problem.module for problem in problems)
    start, ends = m.v.item(), []
    for update in optimizer.updates(2):
        if update.problem == "m":
            ends.append((start * (1.0 - 2.0 * LR) ** 3, t.v.item()))
        start = m.v.item()
    assert len(ends) == 4
    for expected, found in ends:
        assert found == pytest.approx(expected, rel=1e-12)


# ------------------------------ the graph


def test_the_graph_shows_where_a_problem_begins():
    optimizer, _, _ = bilevel("unroll", steps=2, reads=False)
    graph = optimizer.graph
    assert graph.reads["task"] == ("init",)
    assert "values: init, starts from init" in str(graph)
    assert "init -.->|start| task" in graph.to_mermaid()
    assert "begins at init" in graph.to_svg()


def test_a_problem_follows_the_one_of_its_level_it_begins_at():
    problems = [
        vector("a", lambda a, _: a.v.sum(), 0.0, steps=2, restart_from="b"),
        vector("b", lambda b, _: b.v.sum(), 0.0, steps=2, restart_from="c"),
        vector("c", lambda c, _: c.v.sum(), 0.0, steps=3),
        vector("d", lambda d, _, *, a: (a.v * d.v).sum(), 0.0),
    ]
    graph = mlo.DependencyGraph(problems)
    assert graph.schedule() == (*"cccbbaa", "d")
    assert graph.schedule("outermost_first") == ("d", *"cccbbaa")


@pytest.mark.parametrize(
    ("source", "message"), [("nobody", "not a problem"), ("a", "listed after"), ("b", "after")]
)
def test_a_start_is_a_problem_listed_later(source, message):
    problems = [
        vector("a", lambda a, _: a.v.sum(), 0.0),
        vector("b", lambda b, _: b.v.sum(), 0.0, restart_from=source),
        vector("c", lambda c, _, *, b: b.v.sum(), 0.0),
    ]
    with pytest.raises(mlo.GraphError, match=message):
        mlo.DependencyGraph(problems)


@pytest.mark.parametrize("value", [3, "", "a b", ["init"]])
def test_a_start_is_named(value):
    with pytest.raises(mlo.ProblemError, match="restart_from must be the name"):
        vector("a", lambda a, _: a.v.sum(), 0.0, restart_from=value)


# ------------------------------ names and shapes


def with_modules(task, init, source="init"):
    def sgd(module):
        return torch.optim.SGD(module.parameters(), lr=LR)

    def of(module):
        return sum(parameter.sum() for parameter in module.parameters())

    problems = [
        mlo.Problem(
            "task",
            module=task,
            optimizer=sgd(task),
            loss=lambda task, _: of(task),
            restart_from=source,
        ),
        mlo.Problem(
            "init", module=init, optimizer=sgd(init), loss=lambda init, _, *, task: of(task)
        ),
    ]
    return mlo.MultilevelOptimizer(problems, "one_step")


class Pair(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(shape)) for shape in shapes)


def test_modules_that_a_start_can_be():
    with_modules(Pair((2,), (3, 1)), Pair((2,), (3, 1)))
    with_modules(Pair((5, 2), (5, 3, 1)), Pair((2,), (3, 1)))
    with_modules(nn.Linear(4, 1), Net(), source="init.head")


@pytest.mark.parametrize(
    ("task", "init", "source", "message"),
    [
        (Vector(torch.zeros(2)), nn.Linear(2, 1), "init", "no parameter 'v'.*frozen parameter"),
        (Pair((2,), (3,)), Pair((2,), (4,)), "init", r"'b' has the shape \(4,\)"),
        (Pair((5, 2), (3,)), Pair((2,), (3,)), "init", "different numbers of copies"),
        (Pair((5, 2), (6, 3)), Pair((2,), (3,)), "init", "different numbers of copies"),
        (nn.Linear(4, 1), Net(), "init.tail", "Submodules: body, head"),
    ],
)
def test_modules_that_a_start_cannot_be(task, init, source, message):
    with pytest.raises(mlo.ProblemError, match=message):
        with_modules(task, init, source)


def test_personal_layers_start_from_a_frozen_copy():
    """The gradient of the shared layers, where the personal ones start from a constant."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 2).double(), torch.randn(6, 1).double()
    task, shared = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double() for _ in range(2))
    shared[1].requires_grad_(False)

    def error(net, batch=None):
        return ((net(x) - y) ** 2).mean()

    up = torch.optim.SGD([p for p in shared.parameters() if p.requires_grad], lr=0.0)
    problems = [
        mlo.Problem(
            "task",
            module=task,
            optimizer=torch.optim.SGD(task.parameters(), lr=0.1),
            loss=error,
            restart_from="shared",
        ),
        mlo.Problem("shared", module=shared, optimizer=up, loss=lambda _, b, *, task: error(task)),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, "one_step")
    optimizer.step()
    start = {k: p.detach().clone().requires_grad_() for k, p in shared.named_parameters()}

    def value(parameters):
        return error(lambda x: torch.func.functional_call(task, parameters, (x,)))

    slopes = torch.autograd.grad(value(start), list(start.values()), create_graph=True)
    moved = {k: p - 0.1 * g for (k, p), g in zip(start.items(), slopes, strict=True)}
    body = [start["0.weight"], start["0.bias"]]
    expected = torch.autograd.grad(value(moved), body)
    found = optimizer.gradient("shared")
    assert list(found) == ["0.weight", "0.bias"]
    for entry, exact in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(entry, exact, rtol=1e-12, atol=0.0)


# ------------------------------ engines


class Halves(mlo.Unroll):
    """An engine of steps that knows nothing of starts."""

    takes_start = False


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("one_step", {"steps": 3}, r"Unroll\(steps=3\)"),
        ("darts", {"steps": 2}, r"Unroll\(steps=2\)"),
        (mlo.Unroll(steps=2), {"steps": 3}, r"Unroll\(steps=3\)"),
        (Halves(steps=3), {"steps": 3}, "does not differentiate"),
        ("cg", {"steps": 3, "reads": False}, "does not read"),
        (mlo.OneStep(plain=True), {"steps": 1}, "Drop plain=True"),
        (mlo.OneStep(keep_graph=True), {"steps": 1}, "without keep_graph"),
        ("one_step", {"steps": 1, "order": "outermost_first"}, "lower_first"),
        ("first_order", {"steps": 3, "order": "outermost_first"}, "lower_first"),
    ],
)
def test_engines_that_would_lose_the_start_are_refused(engine, options, message):
    with pytest.raises(mlo.EngineError, match=message):
        bilevel(engine, pull=0.1, **options)


def test_a_game_with_extra_moves_is_refused():
    with pytest.raises(mlo.EngineError, match="player_steps"):
        game("one_step")
    game("first_order")


def game(engine):
    net, init = Net(0), Net(1)
    players = {"body": "body", "head": "head"}

    def losses(net, _):
        return {player: net(task_data()[0]).square().mean() for player in players}

    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=LR),
            loss=losses,
            players=players,
            player_steps={"body": 2},
            restart_from="init",
        ),
        mlo.Problem(
            "init",
            module=init,
            optimizer=torch.optim.SGD(init.parameters(), lr=LR),
            loss=lambda init, _, *, net: net(task_data()[2]).mean(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


# ------------------------------ questions


@pytest.mark.parametrize("engine", ["unroll", "one_step", "first_order"])
def test_a_question_before_the_first_round_is_refused(engine):
    optimizer, init, _ = bilevel(engine, steps=1)
    with pytest.raises(mlo.ProblemError, match="has not moved yet"):
        optimizer.gradient("init")
    before = values(init)
    optimizer.step()
    found = optimizer.gradient("init")
    for name, value in before.items():
        assert torch.allclose(value - META * found[name], values(init)[name], rtol=1e-12)


@pytest.mark.parametrize("engine", ["unroll", "first_order"])
def test_weights_set_since_are_no_function_of_the_start(engine):
    optimizer, _, task = bilevel(engine, steps=2)
    optimizer.step()
    with torch.no_grad():
        task.head.bias += 1.0
    with pytest.raises(mlo.ProblemError, match="set from outside"):
        optimizer.gradient("init")
    optimizer.step()
    optimizer.gradient("init")


def test_a_chain_that_was_broken_is_no_function_of_the_start():
    optimizer, _, task = bilevel("unroll", steps=3)
    updates = optimizer.updates(2)
    next(updates)
    with torch.no_grad():
        task.head.bias += 1.0
    next(updates), next(updates)
    with pytest.raises(mlo.ProblemError, match="set from outside"):
        next(updates)


def test_a_question_within_a_block_is_of_the_steps_made():
    optimizer, init, _ = bilevel("unroll", steps=3)
    updates = optimizer.updates(1)
    for made in (1, 2, 3):
        next(updates)
        found = optimizer.gradient("init")
        expected = oracle(values(init), partial(momentum_steps, count=made))
        for name in expected:
            assert relative_error(found[name], expected[name]) < 1e-10


# ------------------------------ updates that are left out


def test_a_step_left_out_leaves_the_others_in_the_chain():
    # The second of three steps has a bad batch: θ_2 = θ_1, and the chain has two steps.
    optimizer, init, _ = with_batches([1.0, float("nan"), 1.0])
    check_steps(optimizer, init, made=2)


def test_a_block_of_which_no_step_is_made_ends_at_the_start():
    optimizer, init, task = with_batches([float("nan")] * 3)
    with pytest.warns(mlo.SolveWarning, match="through 0 of the 3 steps .* seen where it starts"):
        check_steps(optimizer, init, made=0)
    assert not equal(values(init), values(task))  # init has moved since


def test_blocks_keep_their_places_where_updates_are_left_out():
    # Of the first block one step is left out; the second one begins anew all the same.
    optimizer, init, _ = with_batches([1.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    check_steps(optimizer, init, made=2)
    check_steps(optimizer, init, made=3)


def with_batches(batches):
    x, y, xq, yq = task_data()
    init, task = Net(0), Net(1)
    problems = [
        mlo.Problem(
            "task",
            module=task,
            optimizer=torch.optim.SGD(task.parameters(), lr=LR),
            loss=lambda task, scale: scale * ((task(x) - y) ** 2).mean(),
            data=[torch.tensor(batch).double() for batch in batches],
            steps=3,
            restart_from="init",
        ),
        mlo.Problem(
            "init",
            module=init,
            optimizer=torch.optim.SGD(init.parameters(), lr=META),
            loss=lambda init, _, *, task: ((task(xq) - yq) ** 2).mean(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, "unroll", on_nonfinite="skip"), init, task


def check_steps(optimizer, init, made):
    for value, found in meta_gradients(optimizer, init, rounds=1):
        expected = oracle(value, partial(momentum_steps, count=made))
        for name in expected:
            assert relative_error(found[name], expected[name]) < 1e-10


# ------------------------------ a problem in the middle


def in_the_middle(engine, *, inner=2, middle=3, momentum=0.9, order="lower_first", **options):
    """w restarts from m, and m from t; returns the optimizer and their vectors."""
    w, m, t = (Vector(torch.full((3,), start).double()) for start in (-1.0, 5.0, 0.5))
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=LR, momentum=momentum),
            loss=lambda w, _, *, m, t: lowest(w.v, m.v, t.v),
            steps=inner,
            restart_from="m",
        ),
        mlo.Problem(
            "m",
            module=m,
            optimizer=torch.optim.SGD(m.parameters(), lr=LR, momentum=momentum),
            loss=lambda m, _, *, w, t: between(m.v, w.v, t.v),
            steps=middle,
            restart_from="t",
        ),
        mlo.Problem(
            "t",
            module=t,
            optimizer=torch.optim.SGD(t.parameters(), lr=META),
            loss=lambda t, _, *, m, w: highest(t.v, m.v, w.v),
            **options,
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine, order=order), w, m, t


def lowest(w, m, t):
    return ((w - m) ** 2).sum() + (torch.tanh(w) * (1.0 + t)).sum()


def between(m, w, t):
    return ((w - 1.0) ** 2).sum() + 0.2 * (m**2).sum() + (t * m).sum() + torch.sin(m * w).sum()


def highest(t, m, w):
    return ((m - 1.0) ** 2).sum() + ((w + 0.3) ** 2).sum() + (t * w * m).sum()


def descend(loss, start, count, momentum):
    """`count` steps from another tensor than `start`, differentiable."""
    value, buffer = start * 1.0, 0.0
    for _ in range(count):
        value = value * 1.0
        (g,) = torch.autograd.grad(loss(value), value, create_graph=True)
        buffer = momentum * buffer + g
        value = value - LR * buffer
    return value


def nested_loops(t, inner, middle, momentum):
    """The loss of t, with m and w: each solution is a function of the values above."""

    def solved(m):
        return descend(lambda w: lowest(w, m, t), m, inner, momentum)

    m, buffer = t * 1.0, 0.0
    for _ in range(middle):
        m = m * 1.0
        last = m
        (g,) = torch.autograd.grad(between(m, solved(m), t), m, create_graph=True)
        buffer = momentum * buffer + g
        m = m - LR * buffer
    # t sees w where it was made, as a function of the m that is there now.
    w = solved(last.detach() + (m - m.detach()))
    return highest(t, m, w), m, w


@pytest.mark.parametrize(("inner", "middle"), [(1, 1), (2, 3), (3, 2)])
def test_a_problem_in_the_middle_starts_before_those_below(inner, middle):
    engines = {"w": mlo.Unroll(steps=inner), "m": mlo.Unroll(steps=middle)}
    optimizer, w, m, t = in_the_middle(engines, inner=inner, middle=middle)
    for _ in range(2):
        start = t.v.detach().clone().requires_grad_()
        optimizer.step()
        loss, reached, solved = nested_loops(start, inner, middle, 0.9)
        (gradient,) = torch.autograd.grad(loss, start)
        assert relative_error(m.v, reached) < 1e-12
        assert relative_error(w.v, solved) < 1e-12
        found = (start - t.v).detach() / META
        assert relative_error(found, gradient) < 1e-12


def restarts(order="lower_first", **options):
    """The round in words: each update's problem, after those that restart before it."""
    optimizer, _, _, _ = in_the_middle("cg", order=order, **options)
    graph = optimizer.graph
    updates = graph.schedule(order)
    turns = [updates[:place].count(name) for place, name in enumerate(updates)]
    ahead = graph.outermost if order == "outermost_first" else ()
    starts = starts_of(graph.problems)
    found = restarts_in(
        graph.problems, graph.solutions_in, starts, updates, turns, looks_ahead=ahead
    )
    rows = zip(updates, found, strict=True)
    return " ".join(f"({'+'.join(names)}){name}" if names else name for name, names in rows)


def test_a_source_restarts_before_what_restarts_from_it():
    assert restarts(inner=2, middle=2) == "(m+w)w w m (w)w w m t"


def test_a_block_begins_after_the_value_it_starts_from_has_moved():
    assert restarts("outermost_first", inner=1, middle=2) == "t (m+w)w m (w)w m"


def test_a_block_leaves_the_one_before_to_those_that_read_it():
    found = restarts(inner=1, middle=2, accumulate_solves=2)
    assert found == "(m+w)w m (w)w m t (m+w)w m (w)w m t"


@pytest.mark.parametrize("made", [1, 2])
def test_a_load_in_a_middle_block_does_not_begin_it_anew(made):
    def values_of(vectors):
        return [vector.v.detach().clone() for vector in vectors]

    # The chain of m begins at its start, although no step of it was made when the state was saved.
    engines = {"w": "first_order", "m": mlo.Unroll(steps=2)}
    optimizer, *vectors = in_the_middle(engines, inner=2, middle=2)
    updates = optimizer.updates(1)
    for _ in range(made):
        next(updates)
    state = copy.deepcopy(optimizer.state_dict())
    list(updates)
    other, *others = in_the_middle(engines, inner=2, middle=2)
    other.load_state_dict(state)
    other.step()
    assert all(map(torch.equal, values_of(vectors), values_of(others)))


# ------------------------------ states


@pytest.mark.parametrize("engine", ["unroll", "first_order"])
def test_a_round_after_a_load_is_the_round_without_it(engine):
    optimizer, init, task = bilevel(engine, steps=3, make=ADAM)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    other, other_init, other_task = bilevel(engine, steps=3, make=ADAM)
    other.load_state_dict(state)
    other.step()
    assert equal(values(init), values(other_init))
    assert equal(values(task), values(other_task))


@pytest.mark.parametrize("made", [1, 2, 3])
def test_a_load_within_a_block_does_not_begin_it_anew(made):
    optimizer, init, task = bilevel("first_order", steps=3, make=ADAM)
    optimizer.step()
    updates = optimizer.updates(1)
    for _ in range(made):
        next(updates)
    state = copy.deepcopy(optimizer.state_dict())
    list(updates)
    other, other_init, other_task = bilevel("first_order", steps=3, make=ADAM)
    other.load_state_dict(state)
    other.step()
    assert equal(values(init), values(other_init))
    assert equal(values(task), values(other_task))


@pytest.mark.parametrize("made", [1, 3])
def test_steps_that_a_state_does_not_hold_pass_the_gradient_on(made):
    # Of the block the last 3 − made steps are differentiated; those before count as constant moves.
    optimizer, init, task = bilevel("unroll", steps=3)
    updates = optimizer.updates(1)
    for _ in range(made):
        next(updates)
    with pytest.warns(mlo.CheckpointWarning, match="inside round 1"):
        state = copy.deepcopy(optimizer.state_dict())
    start, reached = values(init), values(task)
    other, other_init, _ = bilevel("unroll", steps=3)
    other.load_state_dict(state)
    with pytest.warns(mlo.SolveWarning, match=f"through {3 - made} of the 3 steps"):
        other.step()

    def descend(loss, theta):
        begun = {name: theta[name] + reached[name] - start[name] for name in theta}
        return momentum_steps(loss, begun, 3 - made)

    expected = oracle(start, descend)
    for name, gradient in expected.items():
        found = (start[name] - values(other_init)[name]) / META
        assert relative_error(found, gradient) < 1e-10


def test_a_rollback_begins_the_round_with_a_restart():
    optimizer, init, _ = bilevel("unroll", steps=3, make=ADAM)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    start = values(init)
    optimizer.step()
    optimizer.roll_back(state)
    ((value, found),) = meta_gradients(optimizer, init, rounds=1)
    assert equal(value, start)
    expected = oracle(start, partial(adam_steps, count=3))
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-10


# ------------------------------ comparisons


def test_engines_are_compared_where_the_start_is_known():
    optimizer, init, _ = bilevel("unroll", steps=3, pull=0.5)
    optimizer.problems["init"].optimizers["init"].param_groups[0]["lr"] = 0.0
    optimizer.step()
    engines = ["unroll", "first_order", "one_step", mlo.Unroll(steps=2), {"name": "cg"}]
    rows = {row.label: row for row in mlo.compare_engines(optimizer, "init", engines).rows}
    refused = [label for label, row in rows.items() if row.failure]
    assert len(refused) == 2
    assert all("would be lost" in rows[label].failure for label in refused)
    for label, first_order in (("unroll", False), ("first_order", True)):
        descend = partial(momentum_steps, count=3, first_order=first_order)
        expected = oracle(values(init), descend, pull=0.5)
        assert rows[label].notes == ()
        for name in expected:
            assert relative_error(rows[label].gradient[name], expected[name]) < 1e-10


def test_a_comparison_needs_the_steps_from_the_start():
    optimizer, _, _ = bilevel("first_order", steps=3)
    optimizer.step()
    rows = mlo.compare_engines(optimizer, "init", ["unroll", "first_order"]).rows
    assert {row.label: "No step" in row.failure for row in rows if row.failure} == {"unroll": True}
