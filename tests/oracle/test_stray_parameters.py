"""A loss that reaches parameters past its modules is refused where stand-ins would not be seen."""

from __future__ import annotations

import pytest
import torch
from penalised_fit import lower, upper
from torch import nn
from torch.autograd.function import once_differentiable

import mlo
from mlo.testing import relative_error

ENGINES = ["one_step", "darts", "cg", "penalty", {"name": "unroll", "steps": 2}]


class Net(nn.Module):
    """Two halves of a vector, one of them also in a Python list."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
        self.listed = [self.a]
        self.registered = nn.ParameterList([self.a])

    def forward(self):
        return torch.cat([self.a, self.b])


def make(engine, penalty, of_upper=lambda w: 0.0):
    """`penalty(net)`, decayed by exp(x), is part of the lower loss; `of_upper` of the upper one."""
    net, h = Net(), nn.ParameterDict({"x": torch.tensor(-1.0, dtype=torch.float64)})
    fit = torch.optim.SGD(net.parameters(), lr=0.01)
    penalty, of_upper = penalty(net, fit), of_upper(net)
    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=fit,
            loss=lambda net, _, *, h: lower(net(), h["x"], penalty(net)),
            steps=2,
        ),
        mlo.Problem(
            "h",
            module=h,
            optimizer=torch.optim.SGD(h.parameters(), lr=0.0),
            loss=lambda h, _, *, net: upper(net(), h["x"]) + (of_upper(net) if of_upper else 0.0),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine), net


def squares(parameters):
    return torch.stack([p.square().sum() for p in parameters]).sum()


def by_list_of_module(net, fit):
    return lambda net: squares(net.listed)


def by_list_outside(net, fit):
    parameters = list(net.parameters())[:1]
    return lambda net: squares(parameters)


def by_optimizer(net, fit):
    return lambda net: squares(fit.param_groups[0]["params"][:1])


@pytest.mark.parametrize("penalty", [by_list_of_module, by_list_outside, by_optimizer])
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_own_parameters_from_a_list_are_refused(penalty, engine):
    """With a kept graph even the trained values would miss the penalty."""
    optimizer, net = make(engine, penalty)
    with pytest.raises(mlo.ProblemError, match=r"'net' uses its own parameter 'a' by another way"):
        optimizer.step()
    assert torch.equal(net.a, torch.ones_like(net.a))


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_parameters_read_from_a_list_are_refused(engine):
    """The upper loss would miss the implicit term of what it reads so."""
    optimizer, _ = make(
        engine, lambda net, fit: lambda net: 0.0, lambda net: lambda net: squares(net.listed)
    )
    with pytest.raises(mlo.GraphError, match=r"'h' uses parameter 'a' of problem 'net' by"):
        optimizer.step()


def test_a_list_is_allowed_where_nothing_stands_in():
    """With `first_order` the lower loss is evaluated where its parameters are."""
    optimizer, net = make("first_order", by_list_outside)
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
    list(optimizer.run(3))
    x = torch.tensor(-1.0, dtype=torch.float64)
    for _ in range(6):
        (g,) = torch.autograd.grad(lower(theta, x, theta[:2].square().sum()), theta)
        theta = (theta - 0.01 * g).detach().requires_grad_()
    assert relative_error(net(), theta) < 1e-12


@pytest.mark.parametrize("engine", ["one_step", {"name": "unroll", "steps": 2}], ids=str)
@pytest.mark.parametrize(
    "penalty",
    [
        lambda net: squares(net.registered),
        lambda net: squares([net.a]),
        lambda net: squares(list(net.parameters())[:1]),
    ],
    ids=["ParameterList", "attribute", "parameters()"],
)
def test_a_list_made_of_the_module_is_differentiated(penalty, engine):
    optimizer, net = make(engine, lambda *_: penalty)
    list(optimizer.run(3))
    optimizer.step()
    x = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
    differentiated = 1 if engine == "one_step" else 2
    for step in range(8):
        if step == 8 - differentiated:
            theta = theta.detach().requires_grad_()
        g = torch.autograd.grad(
            lower(theta, x, theta[:2].square().sum()), theta, create_graph=True
        )[0]
        theta = theta - 0.01 * g
    assert relative_error(net(), theta.detach()) < 1e-12
    (expected,) = torch.autograd.grad(upper(theta, x), x)
    assert relative_error(optimizer.gradient("h")["x"], expected) < 1e-9


@pytest.mark.parametrize("engine", ["one_step", "cg"])
def test_a_list_that_comes_into_use_later_is_refused(engine):
    """At the updates 2, 4, 8, …"""
    used = []
    optimizer, _ = make(
        engine, lambda net, fit: lambda net: squares(net.listed if used else [net.a])
    )
    optimizer.step()
    used.append(True)
    with pytest.raises(mlo.ProblemError, match="its own parameter 'a' by another way"):
        list(optimizer.run(2))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0] ** 2


def test_a_missing_derivative_that_comes_later_is_refused():
    used = []
    optimizer, _ = make(
        "one_step", lambda *_: lambda net: (Cube.apply(net.a) if used else net.a**3).sum()
    )
    optimizer.step()
    used.append(True)
    with pytest.raises(mlo.EngineError, match=r"Cube\.backward is once_differentiable"):
        list(optimizer.run(2))
