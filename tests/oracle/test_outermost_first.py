"""The order of DARTS's program: the architecture moves first, at weights that are one step ahead,
and the weights after it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from mlo.testing import Vector, check_gradient_changes_nothing, relative_error

LR, MOMENTUM, DECAY, UPPER_LR = 0.1, 0.9, 0.05, 0.3
TRAIN = [
    torch.randn(4, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    for k in range(5)
]
VALID = [
    torch.randn(4, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    for k in range(10, 13)
]


def train_loss(w, batch, x):
    return (torch.tanh(batch @ w) * torch.exp(x)).pow(2).mean() + torch.cosh(w - x.sum()).sum()


def valid_loss(w, batch, x):
    return torch.sin(batch @ w).sum() + 0.1 * (x**2).sum()


def make(engine="one_step", order="outermost_first", **options):
    w, x = Vector(torch.linspace(-1, 1, 3).double()), Vector(torch.linspace(0.1, 0.4, 4).double())
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
            loss=lambda w, batch, *, x: train_loss(w.v, batch, x.v),
            data=TRAIN,
            **options,
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=UPPER_LR),
            loss=lambda x, batch, *, w: valid_loss(w.v, batch, x.v),
            data=VALID,
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine, order=order), w, x


def darts(rounds):
    """Algorithm 1 of DARTS as its program has it: the unrolled step of SGD with momentum and decay,
    then the real one.
    """
    w, x = torch.linspace(-1, 1, 3).double(), torch.linspace(0.1, 0.4, 4).double()
    buffer = None
    path = []
    for k in range(rounds):
        train, valid = TRAIN[k % len(TRAIN)], VALID[k % len(VALID)]

        def step(w, x, train, buffer):
            (g,) = torch.autograd.grad(train_loss(w, train, x), w, create_graph=True)
            g = g + DECAY * w
            moved = g if buffer is None else MOMENTUM * buffer + g
            return w - LR * moved, moved

        start, upper = w.clone().requires_grad_(), x.clone().requires_grad_()
        unrolled, _ = step(start, upper, train, buffer)
        (g,) = torch.autograd.grad(valid_loss(unrolled, valid, upper), upper)
        x = x - UPPER_LR * g
        w, buffer = (t.detach() for t in step(start, x, train, buffer))
        path.append((w, x))
    return path


def test_the_rounds_are_those_of_darts_program():
    optimizer, w, x = make()
    for expected_w, expected_x in darts(7):
        optimizer.step()
        assert relative_error(w.v, expected_w) < 1e-12
        assert relative_error(x.v, expected_x) < 1e-12


def test_a_round_after_a_skipped_one_looks_at_its_own_batch():
    """A round after one that was skipped looks ahead at its own batch.

    The lower problem's update is left out once, so nothing but its batch has moved.
    """
    optimizer, *_ = make()
    optimizer.on_nonfinite = "skip"
    whole, seen = optimizer.problems["w"].loss, []

    def lost_on_the_first_batch(w, batch, *, x):
        seen.append(batch)
        return whole(w, batch, x=x) * (float("nan") if batch is TRAIN[0] else 1.0)

    optimizer.problems["w"].loss = lost_on_the_first_batch
    first, second = optimizer.run(2)
    assert set(first.skipped) == {"w", "x"} and not second.skipped
    assert all(batch is TRAIN[1] for batch in seen[-2:])


def test_the_order_matters():
    """Otherwise the test above would show nothing of the order."""
    optimizer, _, x = make(order="lower_first")
    list(optimizer.run(3))
    assert relative_error(x.v, darts(3)[-1][1]) > 1e-3


def test_first_order_sees_weights_that_have_not_moved():
    """First order takes the gradient at the weights that have not moved."""
    optimizer, w, x = make("first_order")
    optimizer.step()
    start, upper = w.v.detach().clone(), x.v.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(valid_loss(start, VALID[1], upper), upper)
    optimizer.step()
    assert relative_error(x.v, upper - UPPER_LR * g) < 1e-12


def test_an_implicit_engine_solves_at_the_batch_that_comes_next():
    optimizer, w, x = make(mlo.Direct())
    optimizer.step()
    start, upper = w.v.detach().clone(), x.v.detach().clone()

    def stationarity(w, x):
        w, x = w.requires_grad_(), x.requires_grad_()
        (g,) = torch.autograd.grad(train_loss(w, TRAIN[1], x), w, create_graph=True)
        return g + DECAY * w

    a, b = torch.autograd.functional.jacobian(stationarity, (start, upper))
    w0, x0 = start.clone().requires_grad_(), upper.clone().requires_grad_()
    v, direct = torch.autograd.grad(valid_loss(w0, VALID[1], x0), (w0, x0))
    expected = upper - UPPER_LR * (direct - b.T @ torch.linalg.solve(a.T, v))
    optimizer.step()
    assert relative_error(x.v, expected) < 1e-10


def test_several_lower_steps_follow_each_outermost_move():
    """Several lower steps follow each move of the outermost problem."""
    optimizer, *_ = make(steps=3)
    record = optimizer.step()
    assert optimizer.graph.schedule("outermost_first") == ("x", "w", "w", "w")
    assert set(record.losses) == {"w", "x"}


def test_a_gradient_is_the_one_of_the_next_update():
    """A gradient changes nothing, and is the one of the next update."""
    optimizer, *_ = make()
    optimizer.step()
    check_gradient_changes_nothing(optimizer, "x")


def test_a_run_resumes_where_its_state_was_saved():
    whole, w, x = make()
    list(whole.run(5))
    first, *_ = make()
    list(first.run(2))
    second, w2, x2 = make()
    second.load_state_dict(first.state_dict())
    list(second.run(3))
    assert torch.equal(w.v, w2.v)
    assert torch.equal(x.v, x2.v)


def middle_loss(m, batch, w, x):
    return ((m - w) ** 2).sum() + torch.cosh(m * x.mean()).sum() + (batch @ m).tanh().pow(2).mean()


def test_only_the_outermost_problem_looks_ahead():
    """Problems below the outermost see solutions that were made.

    w → m → x: x looks ahead through both steps; m, when it moves, reads the w that has just
    moved.
    """
    w, m, x = (
        Vector(torch.linspace(a, b, n).double())
        for a, b, n in ((-1, 1, 3), (0.5, -0.5, 3), (0.1, 0.4, 4))
    )

    def sgd(module):
        return torch.optim.SGD(module.parameters(), lr=LR)

    optimizer = mlo.MultilevelOptimizer(
        [
            mlo.Problem(
                "w",
                module=w,
                optimizer=sgd(w),
                data=TRAIN,
                loss=lambda w, batch, *, x: train_loss(w.v, batch, x.v),
            ),
            mlo.Problem(
                "m",
                module=m,
                optimizer=sgd(m),
                data=VALID,
                loss=lambda m, batch, *, w, x: middle_loss(m.v, batch, w.v, x.v),
            ),
            mlo.Problem(
                "x", module=x, optimizer=sgd(x), loss=lambda x, _, *, m: (m.v.sin() * x.v[:3]).sum()
            ),
        ],
        order="outermost_first",
    )
    assert optimizer.graph.schedule("outermost_first") == ("x", "w", "m")
    a, b, c = (module.v.detach().clone() for module in (w, m, x))
    for k in range(4):
        train, valid = TRAIN[k % 5], VALID[k % 3]

        def steps(a, b, c, train, valid):
            a, b = a.requires_grad_(), b.requires_grad_()
            a1 = a - LR * torch.autograd.grad(train_loss(a, train, c), a, create_graph=True)[0]
            b1 = b - LR * torch.autograd.grad(middle_loss(b, valid, a1, c), b, create_graph=True)[0]
            return a1, b1

        upper = c.clone().requires_grad_()
        _, b1 = steps(a.clone(), b.clone(), upper, train, valid)
        (g,) = torch.autograd.grad((b1.sin() * upper[:3]).sum(), upper)
        c = c - LR * g
        a, b = (t.detach() for t in steps(a.clone(), b.clone(), c, train, valid))
        optimizer.step()
        assert relative_error(x.v, c) < 1e-12
        assert relative_error(w.v, a) < 1e-12
        assert relative_error(m.v, b) < 1e-12


def test_engines_of_several_steps_are_refused():
    with pytest.raises(
        mlo.EngineError, match="'x' moves first in a round and looks one step ahead"
    ):
        make(mlo.Unroll(steps=3), steps=3)


def test_a_mistyped_order_is_answered_with_the_valid_ones():
    with pytest.raises(
        mlo.ConfigurationError, match=r"order is 'outermost'. Did you mean 'outermost_first'"
    ):
        make(order="outermost")


def test_noise_of_the_look_ahead_leaves_updates_alone():
    """It does not make updates depend on how often gradients were taken."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def build():
        torch.manual_seed(4)
        w, x = Noisy(), Noisy()
        sgd = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (w, x)]
        problems = [
            mlo.Problem(
                "w",
                module=w,
                optimizer=sgd[0],
                loss=lambda w, _, *, x: ((w.v - x.v * torch.rand(3)) ** 2).sum(),
            ),
            mlo.Problem(
                "x", module=x, optimizer=sgd[1], loss=lambda x, _, *, w: (w.v * torch.rand(3)).sum()
            ),
        ]
        return mlo.MultilevelOptimizer(problems, order="outermost_first"), x

    plain, x = build()
    list(plain.run(3))
    torch.manual_seed(4)
    other, x2 = build()
    for _ in range(3):
        other.gradient("x")
        other.step()
    assert torch.equal(x.v, x2.v)
