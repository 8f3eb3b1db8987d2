"""An upper problem that warms up waits for N rounds, in every order of a round.

The oracle is the algorithm as a plain loop. The lower optimizer has momentum, so the rounds in
which it moves alone leave their mark on the steps that are differentiated later.
"""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo.testing import Vector, relative_error

LR, MOMENTUM, ROUNDS = 0.1, 0.6, 6
START = {"w": torch.tensor([0.3, 0.2, -0.4]).double(), "x": torch.tensor([0.7, 0.6, 0.9]).double()}


def lower_loss(w, x):
    return ((w - x * torch.tensor([1.0, -2.0, 0.5]).double()) ** 2).sum() + 0.1 * (w**4).sum()


def upper_loss(w):
    return ((w - 1.0) ** 2).sum()


def program(engine="one_step", warmup=0, steps=1, **options):
    w, x = Vector(START["w"]), Vector(START["x"])
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=LR, momentum=MOMENTUM),
        loss=lambda w, _, *, x: lower_loss(w.v, x.v),
        steps=steps,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=LR),
        loss=lambda x, _, *, w: upper_loss(w.v),
        warmup_steps=warmup,
    )
    return mlo.MultilevelOptimizer([lower, upper], engine, **options), w, x


def oracle(order, warmup, steps):
    """Where both end."""
    w, x, m = START["w"], START["x"].requires_grad_(), torch.zeros(3).double()

    def moved(w, m):
        for _ in range(steps):
            w = w.requires_grad_() if w.is_leaf else w
            (g,) = torch.autograd.grad(lower_loss(w, x), w, create_graph=True)
            m = MOMENTUM * m + g
            w = w - LR * m
        return w, m

    for round_ in range(ROUNDS):
        w, m = w.detach(), m.detach()
        after, after_m = moved(w, m)
        if round_ >= warmup:
            (g,) = torch.autograd.grad(upper_loss(after), x)
            x = (x - LR * g).detach().requires_grad_()
        if order == "outermost_first":
            # The step was made ahead; the one that counts sees the upper problem's new value.
            after, after_m = moved(w.detach(), m.detach())
        w, m = after, after_m
    return w.detach(), x.detach()


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize(
    ("order", "engine", "steps"),
    [
        ("lower_first", "one_step", 1),
        ("lower_first", mlo.Unroll(steps=3), 3),
        ("outermost_first", "one_step", 1),
    ],
    ids=["lower first", "unroll", "outermost first"],
)
def test_an_upper_problem_waits_for_rounds(order, engine, steps, warmup):
    optimizer, w, x = program(engine, warmup, steps, order=order)
    records = list(optimizer.run(ROUNDS))
    expected_w, expected_x = oracle(order, warmup, steps)
    assert relative_error(x.v.detach(), expected_x) < 1e-12
    assert relative_error(w.v.detach(), expected_w) < 1e-12
    assert ["x" in record.losses for record in records] == [k >= warmup for k in range(ROUNDS)]


@pytest.mark.parametrize("order", ["lower_first", "outermost_first"])
def test_a_run_resumes_while_an_upper_problem_waits(order):
    whole, w, x = program(warmup=4, order=order)
    list(whole.run(ROUNDS))
    first, _, _ = program(warmup=4, order=order)
    list(first.run(2))
    second, resumed_w, resumed_x = program(warmup=4, order=order)
    second.load_state_dict(first.state_dict())
    list(second.run(ROUNDS - 2))
    assert torch.equal(resumed_w.v, w.v) and torch.equal(resumed_x.v, x.v)


def test_a_problem_in_the_middle_that_waits_is_a_constant_above():
    """Three levels: while the middle one rests, the outermost sees the direct term only."""
    losses = {
        "w": lambda w, _, *, m: ((w.v - m.v) ** 2).sum(),
        "m": lambda m, _, *, w, x: ((w.v - x.v) ** 2).sum() + (m.v**2).sum(),
        "x": lambda x, _, *, m: ((m.v - 1.0) ** 2).sum() + (x.v**2).sum(),
    }
    problems = []
    for name, loss in losses.items():
        module = Vector(torch.tensor([0.5, -0.3]).double())
        sgd = torch.optim.SGD(module.parameters(), lr=0.0)
        warmup = 2 if name == "m" else 0
        problems.append(
            mlo.Problem(name, module=module, optimizer=sgd, loss=loss, warmup_steps=warmup)
        )
    optimizer = mlo.MultilevelOptimizer(problems, "direct")
    norms = [record.gradient_norms["x"] for record in optimizer.run(4)]
    x = problems[2].parameters["v"].detach()
    direct = 2.0 * x
    # w* = m, so m* minimises (m − x)² + m², with the Jacobian 4 and the mixed derivative −2.
    total = direct + 0.5 * 2.0 * (problems[1].parameters["v"].detach() - 1.0)
    assert norms[:2] == pytest.approx([float(direct.norm())] * 2)
    assert norms[2:] == pytest.approx([float(total.norm())] * 2)
