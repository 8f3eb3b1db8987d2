"""Losses that differentiate inside, by `torch.func`: as in physics-informed networks.

The oracle is the same loss with `torch.autograd.grad` in place of the transform.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import mlo


class Network(nn.Module):
    """A small network, and the derivative of its summed outputs by its inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.0)
        self.double()

    def forward(self, x):
        return self.last(self.first(x).tanh())

    def total(self, row):
        return self(row).sum()


def by_autograd(net, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]


def by_jvp(net, x):
    return torch.stack(
        [jvp(net, (x,), (one.expand_as(x),))[1].sum(1) for one in torch.eye(3).double()], 1
    )


SLOPES = {
    "grad": lambda net, x: vmap(grad(net.total))(x),
    "jacrev": lambda net, x: vmap(jacrev(net))(x).sum(1),
    "jacfwd": lambda net, x: vmap(jacfwd(net))(x).sum(1),
    "jvp": by_jvp,
}


def run(slope, engine, *, share=0.0, rounds=2):
    """The upper gradient after some rounds."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    net, reg = Network(), nn.ParameterDict({"log": torch.tensor(-1.0).double()})
    net.drop.p = share

    def lower(net, *, reg):
        return (net(net.drop(x)) - y).square().mean() + reg["log"].exp() * slope(
            net, x
        ).square().mean()

    def upper(reg, *, net):
        return (net(x[:3]) - y[:3]).square().mean() + slope(net, x[:3]).square().mean()

    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=torch.optim.Adam(net.parameters(), lr=0.05),
            loss=lambda net, batch, *, reg: lower(net, reg=reg),
        ),
        mlo.Problem(
            "reg",
            module=reg,
            optimizer=torch.optim.SGD(reg.parameters(), lr=0.1),
            loss=lambda reg, batch, *, net: upper(reg, net=net),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, engine)
    for _ in range(rounds):
        optimizer.step()
    return optimizer.gradient("reg")["log"]


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("engine", ["one_step", "darts", "direct"])
def test_a_loss_may_differentiate_inside(name, engine):
    exact = run(by_autograd, engine)
    assert float(exact.abs()) > 1e-6
    torch.testing.assert_close(run(SLOPES[name], engine), exact, rtol=1e-9, atol=1e-13)


def test_second_derivatives_inside_by_hessian():
    def by_hessian(net, x):
        return vmap(hessian(net.total))(x).diagonal(dim1=1, dim2=2)

    def diagonal(net, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        columns = [
            torch.autograd.grad(slope[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(3)
        ]
        return torch.stack(columns, 1)

    exact = run(diagonal, "one_step")
    torch.testing.assert_close(run(by_hessian, "one_step"), exact, rtol=1e-9, atol=1e-13)


def test_the_noise_of_such_a_loss_is_drawn_once():
    """Its first evaluation is repeated, since it cannot be counted, with the same noise."""
    plain = {"name": "one_step", "keep_graph": False}  # counts nothing
    found = run(SLOPES["jacrev"], "one_step", share=0.5)
    assert torch.equal(found, run(SLOPES["jacrev"], plain, share=0.5))
