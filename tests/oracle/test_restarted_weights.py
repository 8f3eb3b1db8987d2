"""Weights that are set back, loaded or clamped between steps: a chain of steps ends there.

The oracle is plain autograd through the steps since the last restart.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import mlo
from mlo.testing import Vector, relative_error

TARGET = torch.tensor([1.0, -2.0, 0.5]).double()
START = torch.tensor([0.3, 0.2, -0.4]).double()
LR, MOMENTUM = 0.1, 0.9


def lower_loss(w, x):
    return ((w - x * TARGET) ** 2).sum() + 0.1 * (w**4).sum()


def make(engine, *, steps=3):
    w, x = Vector(START), Vector(torch.tensor([0.7, 0.6, 0.9]).double())
    sgd = torch.optim.SGD(w.parameters(), lr=LR, momentum=MOMENTUM)
    problems = [
        mlo.Problem(
            "w", module=w, optimizer=sgd, loss=lambda w, _, *, x: lower_loss(w.v, x.v), steps=steps
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.05),
            loss=lambda x, _, *, w: ((w.v - 1.0) ** 2).sum(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine), w, x, sgd


def oracle(x, steps):
    """The total gradient through `steps` steps from the start, with fresh momentum."""
    w, x = START.clone(), x.detach().clone().requires_grad_()
    w.requires_grad_()
    buffer = torch.zeros(3).double()
    for _ in range(steps):
        (g,) = torch.autograd.grad(lower_loss(w, x), w, create_graph=True)
        buffer = MOMENTUM * buffer + g
        w = w - LR * buffer
    (found,) = torch.autograd.grad(((w - 1.0) ** 2).sum(), x)
    return found


def by_copy(w, sgd):
    with torch.no_grad():
        w.v.copy_(START)
    sgd.state.clear()


def by_data(w, sgd):
    w.v.data = START.clone()
    sgd.state.clear()


def by_data_copy(w, sgd):
    w.v.data.copy_(START)
    sgd.state.clear()


def by_loading(w, sgd):
    w.load_state_dict({"v": START})
    sgd.state.clear()


RESTARTS = [by_copy, by_data, by_data_copy, by_loading]


@pytest.mark.parametrize("restart", RESTARTS, ids=lambda restart: restart.__name__)
def test_a_chain_ends_where_weights_were_set_back(restart):
    """Every task begins anew: an engine of five steps sees the three of this round."""
    optimizer, w, x, sgd = make({"name": "unroll", "steps": 5})
    for _ in range(3):
        before = x.v.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        assert relative_error((before - x.v.detach()) / 0.05, oracle(before, 3)) < 1e-12
        restart(w, sgd)


def test_a_chain_ends_where_only_the_optimizer_was_reset():
    optimizer, _, _, sgd = make({"name": "unroll", "steps": 2}, steps=1)
    list(optimizer.run(2))
    assert len(optimizer._now.find("w").history) == 2
    sgd.state.clear()
    optimizer.step()
    assert len(optimizer._now.find("w").history) == 1


def test_a_chain_that_nobody_touched_is_whole():
    optimizer, *_ = make({"name": "unroll", "steps": 5}, steps=2)
    list(optimizer.run(3))
    assert len(optimizer._now.find("w").history) == 5


@pytest.mark.filterwarnings("ignore:A gradient goes through 1 of the 3 steps")
@pytest.mark.parametrize("engine", ["one_step", {"name": "unroll", "steps": 3}], ids=str)
def test_a_question_after_a_restart_looks_one_step_ahead(engine):
    """The last step is not how the weights came to be where they are."""
    optimizer, w, x, sgd = make(engine)
    optimizer.step()
    by_copy(w, sgd)
    assert relative_error(optimizer.gradient("x")["v"], oracle(x.v, 1)) < 1e-12


def test_after_a_load_the_first_gradient_says_what_is_missing():
    optimizer, *_ = make({"name": "unroll", "steps": 3})
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.warns(mlo.SolveWarning, match=r"through 1 of the 3 steps.*'unroll'.*'w'"):
        optimizer.gradient("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.gradient("x")  # once is enough
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()  # a round makes all three
        optimizer.gradient("x")
