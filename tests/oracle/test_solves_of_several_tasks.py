"""`accumulate_solves`: an update by the mean of the gradients at the solutions of several tasks."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from learned_starts import LR, META, Net, momentum_steps, oracle, task_data, values
from torch import nn

import mlo
from mlo.testing import Vector, relative_error

TASKS, STEPS = 3, 2


class Tasks:
    """Support sets, each as often as a task has steps; or query sets."""

    def __init__(self, part, count, *, bad=()):
        self.part, self.count, self.bad = part, count, bad

    def __iter__(self):
        for number in range(12):
            x, y = task_data(seed=number)[self.part : self.part + 2]
            scale = float("nan") if number in self.bad else 1.0
            for _ in range(self.count):
                yield x, y * scale


def make(engine="unroll", *, bad_support=(), bad_query=(), solves=TASKS, upper=None, **options):
    init, task = Net(0), Net(1)

    def error(net, batch):
        return ((net(batch[0]) - batch[1]) ** 2).mean()

    def query(init, batch, *, task):
        loss = error(task, batch)
        return loss, {"root": loss.detach().sqrt(), "kind": "query", "size": 8.0}

    problems = [
        mlo.Problem(
            "task",
            module=task,
            optimizer=torch.optim.SGD(task.parameters(), lr=LR, momentum=0.9),
            loss=lambda task, batch: error(task, batch),
            data=Tasks(0, STEPS, bad=bad_support),
            steps=STEPS,
            restart_from="init",
        ),
        mlo.Problem(
            "init",
            module=init,
            optimizer=(upper or partial(torch.optim.SGD, lr=META))(init.parameters()),
            loss=query,
            data=Tasks(2, 1, bad=bad_query),
            accumulate_solves=solves,
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine, **options), init, task


def expected(value, numbers):
    total = {name: torch.zeros_like(tensor) for name, tensor in value.items()}
    for number in numbers:
        descend = partial(momentum_steps, count=STEPS, momentum=0.9)
        found = oracle(value, descend, data=task_data(seed=number))
        total = {name: total[name] + found[name] / len(numbers) for name in total}
    return total


def check(optimizer, init, numbers):
    before = values(init)
    record = optimizer.step()
    for name, gradient in expected(before, numbers).items():
        found = (before[name] - values(init)[name]) / META
        assert relative_error(found, gradient) < 1e-10
    return record


def test_the_mean_over_tasks_moves_the_problem_once():
    optimizer, init, _ = make()
    block = ("task",) * STEPS + ("init",)
    assert optimizer.graph.schedule() == block * TASKS
    check(optimizer, init, [0, 1, 2])
    check(optimizer, init, [3, 4, 5])


def test_losses_metrics_and_norms_are_of_the_mean():
    optimizer, init, _ = make()
    value = values(init)
    record = optimizer.step()
    single, losses = make(solves=1)[0], []
    for _ in range(TASKS):
        single.problems["init"].module.load_state_dict(value)
        losses.append(single.step().losses["init"])
    assert record.losses["init"] == pytest.approx(sum(losses) / TASKS, rel=1e-12)
    roots = sum(loss**0.5 for loss in losses) / TASKS
    assert record.metrics["init"]["root"] == pytest.approx(roots, rel=1e-12)
    assert record.metrics["init"]["kind"] == "query"
    assert record.metrics["init"]["size"] == 8.0
    norm = torch.cat([g.flatten() for g in expected(value, [0, 1, 2]).values()]).norm()
    assert record.gradient_norms["init"] == pytest.approx(float(norm), rel=1e-10)


def test_only_updates_are_yielded():
    optimizer, init, _ = make()
    start = values(init)
    names = []
    for update in optimizer.updates(1):
        names.append(update.problem)
        if update.problem == "task":
            assert all(torch.equal(start[name], values(init)[name]) for name in start)
    assert names == ["task"] * STEPS * TASKS + ["init"]


@pytest.mark.parametrize("upper", [None, partial(torch.optim.Adam, lr=0.01)])
@pytest.mark.parametrize("made", range(1, STEPS * TASKS + 1))
def test_a_state_within_a_round_resumes_bit_for_bit(made, upper):
    optimizer, init, _ = make("first_order", upper=upper)
    optimizer.step()
    updates = optimizer.updates(1)
    for _ in range(made):
        next(updates)
    state = copy.deepcopy(optimizer.state_dict())
    *_, last = updates
    other, other_init, _ = make("first_order", upper=upper)
    other.load_state_dict(state)
    record = other.step()
    other.step(), optimizer.step()
    assert all(torch.equal(values(init)[k], values(other_init)[k]) for k in values(init))
    assert record.losses["init"] == last.record.losses["init"]
    assert record.metrics["init"] == last.record.metrics["init"]


def test_a_solve_that_is_not_finite_is_left_out_of_the_mean():
    optimizer, init, _ = make(bad_query=(1, 5), on_nonfinite="skip")
    record = check(optimizer, init, [0, 2])
    assert "init" in record.skipped
    assert record.losses["init"] > 0.0
    record = check(optimizer, init, [3, 4])  # the last solve of the round, which moves the problem
    assert "init" in record.skipped
    assert not check(optimizer, init, [6, 7, 8]).skipped


def test_an_update_of_which_no_solve_is_finite_is_left_out():
    optimizer, init, _ = make(bad_query=(0, 1, 2), on_nonfinite="skip")
    before = values(init)
    record = optimizer.step()
    assert all(torch.equal(before[name], values(init)[name]) for name in before)
    assert "init" in record.skipped
    assert "init" not in record.losses
    check(optimizer, init, [3, 4, 5])


@pytest.mark.parametrize("bad", [{"bad_query": (1,)}, {"bad_support": (1,)}])
def test_a_round_that_stops_leaves_nothing_of_its_sums(bad):
    optimizer, init, _ = make(**bad)
    before = values(init)
    with pytest.raises(mlo.NonFiniteError):
        optimizer.step()
    assert all(torch.equal(before[name], values(init)[name]) for name in before)
    check(optimizer, init, [3, 4, 5])


def test_a_rollback_begins_the_mean_anew():
    optimizer, init, _ = make(bad_query=(4,), on_nonfinite="rollback")
    value = values(init)
    record = optimizer.step()
    record = optimizer.step()  # goes back to the first round, with the batches that come next
    assert record.rolled_back is not None
    assert optimizer.round == 1
    for name, gradient in expected(value, [6, 7, 8]).items():
        found = (value[name] - values(init)[name]) / META
        assert relative_error(found, gradient) < 1e-10


def test_parameters_that_some_solve_uses_move():
    # The first loss does not depend on b, the second one does; neither on c, which never moves.
    module = nn.ParameterDict({k: nn.Parameter(torch.ones(1).double()) for k in "abc"})
    adam = torch.optim.AdamW(module.parameters(), lr=0.1)
    lower = Vector(torch.ones(1).double())

    def loss(module, batch, *, low):
        return (module["a"] * low.v).sum() + (module["b"].sum() if batch == "b" else 0.0)

    problems = [
        mlo.Problem(
            "low",
            module=lower,
            optimizer=torch.optim.SGD(lower.parameters(), lr=0.1),
            loss=lambda low, _: (low.v**2).sum(),
        ),
        mlo.Problem(
            "up", module=module, optimizer=adam, loss=loss, data=["a", "b"], accumulate_solves=2
        ),
    ]
    mlo.MultilevelOptimizer(problems, "first_order").step()
    assert float(module["c"].detach()) == 1.0
    assert float(module["b"].detach()) < 1.0


# ------------------------------ refusals


def chain(engine, **options):
    a, b, c = (Vector(torch.ones(1)) for _ in range(3))

    def problem(name, module, loss, **more):
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        return mlo.Problem(name, module=module, optimizer=sgd, loss=loss, **more)

    problems = [
        problem("a", a, lambda a, _, *, b: ((a.v - b.v) ** 2).sum()),
        problem("b", b, lambda b, _, *, a, c: ((a.v - c.v) ** 2).sum(), **options),
        problem("c", c, lambda c, _, *, b: (b.v * c.v).sum(), steps=2),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


@pytest.mark.parametrize("engine", ["one_step", "unroll", "cg"])
def test_a_problem_whose_solution_is_differentiated_is_refused(engine):
    with pytest.raises(mlo.EngineError, match="mean of its gradients over 3 solves"):
        chain({"a": "one_step", "b": engine}, accumulate_solves=3)


def test_a_middle_problem_by_first_order():
    optimizer = chain({"a": "one_step", "b": "first_order"}, accumulate_solves=3)
    assert optimizer.graph.schedule() == (("a", "b") * 3 + ("c",)) * 2
    optimizer.step()
    assert optimizer._history.updates == {"a": 6, "b": 2, "c": 2}


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_the_number_of_solves_is_a_count(count):
    with pytest.raises(mlo.ProblemError, match="accumulate_solves must be an integer"):
        chain("one_step", accumulate_solves=count)


def test_extra_moves_of_players_are_refused():
    net = Net()
    with pytest.raises(mlo.ProblemError, match="accumulate_solves averages"):
        mlo.Problem(
            "net",
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            loss=lambda net, _: {"body": 0.0, "head": 0.0},
            players={"body": "body", "head": "head"},
            player_steps={"body": 2},
            accumulate_solves=2,
        )
