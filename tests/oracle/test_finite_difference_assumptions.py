"""Where finite differences lie about a loss, a warning says so with both numbers; else none comes.

The oracle is plain autograd through one step of the algorithm.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from squares import SquareOnce
from torch import nn

import mlo
from mlo.testing import relative_error

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FINITE = ["darts", {"name": "identity", "products": "finite_difference"}, "penalty"]


class Net(nn.Module):
    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.head, self.other = nn.Linear(3, 6), nn.Linear(6, 1), nn.Linear(6, 1)
        self.activation = activation
        self.double()

    def forward(self, x):
        return self.activation(self.features(x))


class Reversal(torch.autograd.Function):
    """The identity, with the gradient of its opposite (domain adversarial training)."""

    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, cotangent):
        return -cotangent


def fit(net, hidden, a):
    return (a.exp() * (net.head(hidden)[:, 0] - Y) ** 2).mean()


def smooth(net, a):
    return fit(net, net(X), a)


def straight_through(net, a):
    hidden = 2.0 * net(X)
    return fit(net, hidden + (hidden.round() - hidden).detach(), a)


def reversal(net, a):
    hidden = net(X)
    other = net.other(Reversal.apply(hidden))[:, 0]
    return fit(net, hidden, a) + (a.exp() * (other - Y) ** 2).mean()


def detached_target(net, a):
    hidden = net(X)
    target = net.other(hidden)[:, 0].detach()
    return (a.exp() * (net.head(hidden)[:, 0] - target) ** 2).mean()


def weights_of_losses(net, a):
    """Meta-Weight-Net's own form: weights are a function of detached losses."""
    losses = (net.head(net(X))[:, 0] - Y) ** 2
    return (torch.sigmoid(a * losses.detach()) * losses).mean()


def shared_target(net, a):
    hidden = net(X)
    target = mlo.once(lambda: net.other(net(X))[:, 0].detach())
    return (a.exp() * (net.head(hidden)[:, 0] - target) ** 2).mean()


def shared_weights(net, a):
    losses = (net.head(net(X))[:, 0] - Y) ** 2
    weights = mlo.once(lambda: torch.sigmoid(a * losses.detach()))
    return (weights * losses).mean()


LYING = [straight_through, reversal, detached_target, weights_of_losses]
HONEST = [smooth, shared_target, shared_weights]


def make(loss, engine, *, activation=torch.tanh, lr=0.1):
    net, upper = Net(activation), nn.ParameterDict({"a": torch.zeros(20).double()})
    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=lr),
            loss=lambda net, _, *, a: loss(net, a["a"]),
        ),
        mlo.Problem(
            "a",
            module=upper,
            optimizer=torch.optim.SGD(upper.parameters(), lr=0.0),
            loss=lambda a, _, *, net: (net.head(net(X))[:, 0] - Y.flip(0)).square().mean(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


def exact(loss, *, activation=torch.tanh, lr=0.1):
    """The gradient of the upper loss through one step of SGD, by autograd as users write it."""
    net, a = Net(activation), torch.zeros(20).double().requires_grad_()
    parameters = dict(net.named_parameters())
    found = torch.autograd.grad(
        loss(net, a), list(parameters.values()), create_graph=True, allow_unused=True
    )
    moved = {
        name: p if g is None else p - lr * g
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }
    hidden = activation(nn.functional.linear(X, moved["features.weight"], moved["features.bias"]))
    answer = nn.functional.linear(hidden, moved["head.weight"], moved["head.bias"])[:, 0]
    (gradient,) = torch.autograd.grad((answer - Y.flip(0)).square().mean(), a)
    return gradient


@pytest.mark.parametrize("loss", LYING, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("engine", FINITE, ids=str)
def test_what_a_difference_sees_through_is_warned_of(loss, engine):
    with pytest.warns(mlo.SolveWarning, match=r"finite difference.*away from the exact.*mlo\.once"):
        make(loss, engine).gradient("a")


@pytest.mark.parametrize("loss", LYING, ids=lambda loss: loss.__name__)
def test_the_exact_engine_takes_the_gradient_that_the_user_wrote(loss):
    assert relative_error(make(loss, "one_step").gradient("a")["a"], exact(loss)) < 1e-10


@pytest.mark.parametrize("loss", HONEST, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("engine", FINITE, ids=str)
def test_an_honest_loss_gives_no_warning(loss, engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(loss, engine).gradient("a")


@pytest.mark.parametrize("loss", [shared_target, shared_weights], ids=lambda loss: loss.__name__)
def test_once_is_the_cure_for_what_is_detached(loss):
    assert relative_error(make(loss, "darts").gradient("a")["a"], exact(loss)) < 1e-5


def test_kinks_are_warned_of():
    with pytest.warns(mlo.SolveWarning, match="measure the kinks of ReLU"):
        make(smooth, {"name": "one_step", "products": {"name": "finite_difference", "step": 3.0}},
             activation=torch.relu).gradient("a")  # fmt: skip


def test_the_comparison_is_made_once():
    optimizer = make(weights_of_losses, "darts")
    with pytest.warns(mlo.SolveWarning, match="away from the exact") as seen:
        list(optimizer.run(4))
    assert len(seen) == 1


def test_values_are_compared_where_there_is_no_second_derivative():
    def lying(net, a):
        losses = SquareOnce.apply(net.head(net(X))[:, 0] - Y)
        return (torch.sigmoid(3.0 * losses.detach() - 3.0) * a.exp() * losses).mean()

    def honest(net, a):
        return (a.exp() * SquareOnce.apply(net.head(net(X))[:, 0] - Y)).mean()

    with pytest.warns(mlo.SolveWarning, match=r"its loss changes by .* gradient says"):
        make(lying, "darts").gradient("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(honest, "darts").gradient("a")
