"""Problems that begin anew from an upper problem's value, against plain autograd in float64."""

from __future__ import annotations

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
)
from torch import nn

import mlo
from mlo.testing import Vector, relative_error


def check(optimizer, init, descend, *, pull=0.0, tolerance=1e-10):
    for value, found in meta_gradients(optimizer, init):
        expected = oracle(value, descend, pull=pull)
        for name in expected:
            assert relative_error(found[name], expected[name]) < tolerance, name


ADAM = partial(torch.optim.Adam, lr=LR)
MOMENTUM = partial(torch.optim.SGD, lr=LR, momentum=0.9)


@pytest.mark.parametrize("pull", [0.0, 0.3])
@pytest.mark.parametrize("recorded", [3, 5])
def test_unrolled_steps_of_adam_know_where_they_began(pull, recorded):
    optimizer, init, _ = bilevel(mlo.Unroll(steps=recorded), steps=3, make=ADAM, pull=pull)
    check(optimizer, init, partial(adam_steps, count=3), pull=pull)


def test_momentum_begins_anew_in_each_round():
    optimizer, init, _ = bilevel(mlo.Unroll(steps=4), steps=4, make=MOMENTUM)
    check(optimizer, init, partial(momentum_steps, count=4, momentum=0.9))


@pytest.mark.parametrize("make", [None, MOMENTUM])
@pytest.mark.parametrize("reads", [True, False])
def test_one_step_is_differentiated_in_where_it_began(make, reads):
    optimizer, init, _ = bilevel("one_step", steps=1, make=make, reads=reads)
    check(optimizer, init, partial(momentum_steps, count=1, momentum=0.9))


def test_one_clipped_step():
    def clipped(loss, theta):
        found = torch.autograd.grad(loss(theta), list(theta.values()), create_graph=True)
        norm = torch.stack([g.square().sum() for g in found]).sum().sqrt()
        pairs = zip(theta.items(), found, strict=True)
        return {name: tensor - LR * g * 0.1 / (norm + 1e-6) for (name, tensor), g in pairs}

    optimizer, init, _ = bilevel("one_step", steps=1, grad_clip=0.1, pull=0.3)
    check(optimizer, init, clipped, pull=0.3)


@pytest.mark.parametrize("pull", [0.0, 0.3])
def test_finite_differences_know_where_a_step_began(pull):
    optimizer, init, _ = bilevel("darts", steps=1, pull=pull)
    check(optimizer, init, partial(momentum_steps, count=1), pull=pull, tolerance=1e-7)


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_maml_is_the_gradient_at_adapted_weights(steps):
    optimizer, init, _ = bilevel("first_order", steps=steps, make=ADAM)
    check(optimizer, init, partial(adam_steps, count=steps, first_order=True))


def test_implicit_maml_reads_the_proximal_term():
    # Quadratic, so that the solution is exact: θ* = (A + λ)⁻¹ (b + λ x).
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]).double())
    b, goal = torch.tensor([1.0, 1.0, 1.0]).double(), torch.tensor([0.2, 0.1, -0.4]).double()
    task, init = Vector(torch.zeros(3).double()), Vector(torch.tensor([1.0, -1.0, 0.5]).double())

    def fit(task, _, *, init):
        quadratic = 0.5 * task.v @ matrix @ task.v - b @ task.v
        return quadratic + 0.25 * ((task.v - init.v) ** 2).sum()

    sgd = torch.optim.SGD(task.parameters(), lr=0.3)
    problems = [
        mlo.Problem("task", module=task, optimizer=sgd, loss=fit, steps=150, restart_from="init"),
        mlo.Problem(
            "init",
            module=init,
            optimizer=torch.optim.SGD(init.parameters(), lr=META),
            loss=lambda init, _, *, task: ((task.v - goal) ** 2).sum(),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, {"name": "cg", "tol": 1e-12})
    for value, found in meta_gradients(optimizer, init):
        x = value["v"].clone().requires_grad_()
        solution = torch.linalg.solve(matrix + 0.5 * torch.eye(3).double(), b + 0.5 * x)
        (expected,) = torch.autograd.grad(((solution - goal) ** 2).sum(), x)
        assert relative_error(found["v"], expected) < 1e-10


class Linear(nn.Module):
    """One linear model, or a model per task."""

    def __init__(self, *tasks):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((*tasks, 3)).double())
        self.b = nn.Parameter(torch.zeros(tasks).double())

    def forward(self, x):  # [tasks, points, 3]
        return (x * self.w.unsqueeze(-2)).sum(-1) + self.b.unsqueeze(-1)


@pytest.mark.parametrize("engine", ["unroll", "first_order", "one_step", "darts"])
def test_copies_for_many_tasks_sum_their_gradients(engine):
    tasks, steps = 5, 1 if engine in ("one_step", "darts") else 3
    noise = torch.Generator().manual_seed(3)
    x, y, xq, yq = (
        torch.randn(*shape, generator=noise).double()
        for shape in ((tasks, 6, 3), (tasks, 6), (tasks, 6, 3), (tasks, 6))
    )
    init, stacked = Linear(), Linear(tasks)
    problems = [
        mlo.Problem(
            "tasks",
            module=stacked,
            optimizer=torch.optim.SGD(stacked.parameters(), lr=LR),
            loss=lambda tasks, _: ((tasks(x) - y) ** 2).mean(1).sum(),
            steps=steps,
            restart_from="init",
        ),
        mlo.Problem(
            "init",
            module=init,
            optimizer=torch.optim.SGD(init.parameters(), lr=META),
            loss=lambda init, _, *, tasks: ((tasks(xq) - yq) ** 2).mean(),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, engine)
    for value, found in meta_gradients(optimizer, init):
        start = {name: tensor.clone().requires_grad_() for name, tensor in value.items()}
        total = 0.0
        for task in range(tasks):

            def fit(theta, task=task):
                return ((x[task] @ theta["w"] + theta["b"] - y[task]) ** 2).mean()

            adapted = momentum_steps(fit, dict(start), steps, first_order=engine == "first_order")
            errors = (xq[task] @ adapted["w"] + adapted["b"] - yq[task]) ** 2
            total = total + errors.mean() / tasks
        expected = torch.autograd.grad(total, list(start.values()))
        for name, gradient in zip(start, expected, strict=True):
            assert relative_error(found[name], gradient) < 1e-8, name


def test_a_head_begins_at_a_submodule_and_the_body_is_shared():
    x, y, xq, yq = task_data()
    net, head = Net(0), nn.Linear(4, 1).double()

    def predicted(net, head, inputs):
        return head(torch.tanh(net.body(inputs)))[:, 0]

    problems = [
        mlo.Problem(
            "head",
            module=head,
            optimizer=torch.optim.SGD(head.parameters(), lr=LR),
            loss=lambda head, _, *, net: ((predicted(net, head, x) - y) ** 2).mean(),
            steps=3,
            restart_from="net.head",
        ),
        mlo.Problem(
            "net",
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=META),
            loss=lambda net, _, *, head: ((predicted(net, head, xq) - yq) ** 2).mean(),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, "unroll")

    def descend(loss, theta):
        body = {name: tensor for name, tensor in theta.items() if name.startswith("body")}
        own = {name: tensor for name, tensor in theta.items() if name.startswith("head")}
        return {**body, **momentum_steps(lambda moved: loss({**body, **moved}), own, 3)}

    check(optimizer, net, descend)


# ------------------------------ three levels: the start is itself a solution


def lower_loss(t, i, h):
    return ((t - 0.5) ** 4).sum() + (h.exp() * (t - i) ** 2).sum() + (t * i).sum()


def middle_loss(i, t, h):
    return ((t - 1.0) ** 2).sum() + (h * i**2).sum() + (t**2 * i).sum()


def upper_loss(h, t, i):
    return ((t - 1) ** 2).sum() + (i**3).sum() + (h * t).sum()


@pytest.mark.parametrize(
    ("engines", "steps"),
    [
        ({"t": "unroll", "i": "one_step"}, 2),
        ({"t": "unroll", "i": mlo.Unroll(steps=1)}, 2),
        ({"t": "one_step", "i": "one_step"}, 1),
        ({"t": "first_order", "i": "one_step"}, 2),
    ],
)
def test_a_start_that_is_a_solution_is_differentiated_twice(engines, steps):
    t, i = Vector(torch.zeros(3).double()), Vector(torch.tensor([0.7, -0.4, 0.2]).double())
    h = Vector(torch.tensor([0.1, 0.2, 0.3]).double())

    def sgd(module, lr):
        return torch.optim.SGD(module.parameters(), lr=lr)

    problems = [
        mlo.Problem(
            "t",
            module=t,
            optimizer=sgd(t, LR),
            loss=lambda t, _, *, i, h: lower_loss(t.v, i.v, h.v),
            steps=steps,
            restart_from="i",
        ),
        mlo.Problem(
            "i",
            module=i,
            optimizer=sgd(i, 0.1),
            loss=lambda i, _, *, t, h: middle_loss(i.v, t.v, h.v),
        ),
        mlo.Problem(
            "h",
            module=h,
            optimizer=sgd(h, META),
            loss=lambda h, _, *, t, i: upper_loss(h.v, t.v, i.v),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, engines)
    first_order = engines["t"] == "first_order"
    for _ in range(2):
        begun = i.v.detach().clone()
        ((value, found),) = meta_gradients(optimizer, h, rounds=1)
        x, start = value["v"].requires_grad_(), begun.requires_grad_()

        def solution(at, x=x):
            theta = {"t": at}
            found = momentum_steps(
                lambda moved: lower_loss(moved["t"], at, x), theta, steps, first_order=first_order
            )
            return found["t"]

        theta = solution(start)
        (step,) = torch.autograd.grad(middle_loss(start, theta, x), start, create_graph=True)
        after = start - 0.1 * step
        # The upper loss sees θ as it was made: at the middle value before its step, with the
        # derivative of that value after it.
        seen = solution(start.detach() + after - after.detach())
        (expected,) = torch.autograd.grad(upper_loss(x, seen, after), x)
        assert relative_error(found["v"], expected) < 1e-10


# ------------------------------ Betty's roll_back


@pytest.mark.parametrize(
    ("steps", "of_betty"),
    [(1, (0.9971212500000002, 0.5504087500000001)), (3, (0.9052569580078123, 0.5031876220703124))],
)
def test_steps_on_a_copy_before_the_real_one(steps, of_betty):
    # The upper problem moves by what the lower one reaches in some steps. The lower one then goes
    # back to where it was and makes one step with the new upper value: roll_back=True of Betty
    # 0.2.1, which ends four rounds at these numbers.
    copy, real, up = (Vector(torch.full((1,), v, dtype=torch.float64)) for v in (0.0, 0.0, 0.1))

    def inner(w, _, *, up):
        return (0.25 * w.v**2 - up.v * w.v).sum()

    def sgd(module, lr):
        return torch.optim.SGD(module.parameters(), lr=lr)

    problems = [
        mlo.Problem(
            "copy",
            module=copy,
            optimizer=sgd(copy, 1.0),
            loss=inner,
            steps=steps,
            restart_from="real",
        ),
        mlo.Problem("real", module=real, optimizer=sgd(real, 1.0), loss=inner, warmup_steps=1),
        mlo.Problem(
            "up",
            module=up,
            optimizer=sgd(up, 0.3),
            loss=lambda up, _, *, copy: (0.5 * (copy.v - 1.0) ** 2).sum(),
        ),
    ]
    engines = {"copy": "one_step", "real": "first_order"}
    optimizer = mlo.MultilevelOptimizer(problems, engines)
    assert optimizer.graph.schedule() == ("real", *["copy"] * steps, "up")
    for _ in optimizer.run(4):
        pass
    learned = float(up.v.detach())
    next(optimizer.updates(1))  # the real step that follows begins the next round
    assert (float(real.v.detach()), learned) == pytest.approx(of_betty, rel=1e-13)
