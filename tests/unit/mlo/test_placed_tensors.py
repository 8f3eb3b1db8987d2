"""What modules hold while a loss runs, and their training flags after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mlo
from mlo.testing import relative_error


class Cached(nn.Module):
    """A module that makes a buffer when it first runs, unless it is `made` at once."""

    def __init__(self, made):
        super().__init__()
        self.inner, self.made = nn.Linear(3, 3), made
        if made == "at once":
            self.register_buffer("mask", torch.linspace(0.0, 1.0, 3))
        elif made == "in a place":
            self.register_buffer("mask", None, persistent=False)

    def forward(self, x):
        if getattr(self, "mask", None) is None:
            mask = torch.linspace(0.0, 1.0, 3).to(x)
            if self.made == "late":
                self.register_buffer("mask", mask)
            else:
                self.mask = mask
        return torch.tanh(self.inner(x)) * self.mask


@pytest.mark.parametrize("engine", ["one_step", mlo.Unroll(steps=2), "cg", "darts"])
@pytest.mark.parametrize("made", ["late", "in a place"])
def test_a_module_may_make_buffers_when_it_runs(engine, made):
    """A buffer that a module makes itself acts as if it had been there from the start."""
    found = []
    for way in ("at once", made):
        torch.manual_seed(0)
        net, up, x = Cached(way).double(), Cached(way).double(), torch.randn(4, 3).double()
        problems = [
            mlo.Problem(
                "net",
                module=net,
                loss=lambda net, x, *, up: (net(x) - up(x)).square().sum() + net(x).cosh().sum(),
                data=[x],
                steps=2,
                optimizer=SGD(net.parameters(), lr=0.1),
            ),
            mlo.Problem(
                "up",
                module=up,
                loss=lambda up, x, *, net: (net(x) - 2.0 * up(x)).square().sum(),
                data=[x],
                optimizer=SGD(up.parameters(), lr=0.1),
            ),
        ]
        optimizer = mlo.MultilevelOptimizer(problems, engine)
        optimizer.step(), optimizer.step()
        found.append(optimizer.gradient("up"))
    assert relative_error(found[1], found[0]) == 0.0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("offset", torch.linspace(-1.0, 1.0, 3))

    def forward(self, x):
        return self.inner(x) + self.offset


def by_attribute(net, x):
    return torch.tanh(x @ net.inner.weight.T + net.inner.bias + net.offset)


def by_get_parameter(net, x):
    weight, bias = net.get_parameter("inner.weight"), net.inner.get_parameter("bias")
    return torch.tanh(x @ weight.T + bias + net.get_buffer("offset"))


def by_named_parameters(net, x):
    named, (offset,) = dict(net.named_parameters()), net.buffers()
    return torch.tanh(x @ named["inner.weight"].T + named["inner.bias"] + offset)


def by_parameters(net, x):
    weight, bias = (p for p in net.parameters() if isinstance(p, nn.Parameter))
    return torch.tanh(x @ weight.T + bias + dict(net.named_buffers())["offset"])


def by_state_dict(net, x):
    state = net.state_dict(keep_vars=True)
    return torch.tanh(x @ state["inner.weight"].T + state["inner.bias"] + state["offset"])


def by_functional_call(net, x):
    named = {key: tensor * 1.0 for key, tensor in net.named_parameters()}
    return torch.tanh(torch.func.functional_call(net, named, x))


WAYS = [by_get_parameter, by_named_parameters, by_parameters, by_state_dict, by_functional_call]


def read_by(way, engine):
    """Gradient of `up`, where both losses reach the parameters of both modules in a given way."""
    torch.manual_seed(0)
    net, up = Scaled().double(), Scaled().double()
    x = torch.randn(8, 3, dtype=torch.float64)
    options = {"lr": 0.1, "momentum": 0.5}

    def net_loss(net, x, *, up):
        return (way(net, x) - way(up, x)).square().mean() + 0.1 * net.inner.weight.square().sum()

    problems = [
        mlo.Problem(
            "net", module=net, loss=net_loss, data=[x], optimizer=SGD(net.parameters(), **options)
        ),
        mlo.Problem(
            "up",
            module=up,
            loss=lambda up, x, *, net: (way(net, x) * way(up, x) - 1.0).square().mean(),
            data=[x],
            optimizer=SGD(up.parameters(), **options),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, engine)
    list(optimizer.run(2))
    return optimizer.gradient("up")


ENGINES = ["one_step", "darts", mlo.ConjugateGradient(damping=1.0), mlo.Unroll(steps=2)]


@pytest.mark.parametrize("engine", ENGINES, ids=["one_step", "darts", "cg", "unroll"])
@pytest.mark.parametrize("way", WAYS)
def test_modules_give_their_parameters_inside_a_loss(way, engine):
    expected = read_by(by_attribute, engine)
    assert relative_error(read_by(way, engine), expected) < 1e-12
    assert all(float(tensor.norm()) > 0 for tensor in expected.values())


def test_a_plain_state_dict_inside_a_loss_holds_constants():
    """As outside of one: `state_dict()` detaches what it returns."""

    def constants(net, x):
        return torch.tanh(x @ net.state_dict()["inner.weight"].T) + by_attribute(net, x)

    def detached(net, x):
        return torch.tanh(x @ net.inner.weight.detach().T) + by_attribute(net, x)

    assert relative_error(read_by(constants, "one_step"), read_by(detached, "one_step")) == 0.0


def dropout_regression(engine, *, mode_set_by=(), lower_sets=None):
    """Dropout and BatchNorm below a decay; which losses set the mode, and the modes they found."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    net, decay = net.double(), nn.ParameterDict({"log": torch.zeros((), dtype=torch.float64)})
    x = torch.randn(8, 3, dtype=torch.float64)
    found = []

    def net_loss(net, batch, *, decay):
        found.append(net.training)
        if lower_sets is not None:
            net.train(lower_sets)
        penalty = decay["log"].exp() * sum(p.square().sum() for p in net.parameters())
        return (net(batch) - batch[:, :1]).square().mean() + 0.1 * penalty

    def decay_loss(decay, batch, *, net):
        if "decay" in mode_set_by:
            net.eval()
        return (net(batch) - batch[:, :1]).square().mean()

    problems = [
        mlo.Problem(
            "net", module=net, loss=net_loss, data=[x], optimizer=SGD(net.parameters(), lr=0.1)
        ),
        mlo.Problem(
            "decay",
            module=decay,
            loss=decay_loss,
            data=[x + 1.0],
            optimizer=SGD(decay.parameters(), lr=0.1),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine), found


@pytest.mark.parametrize("engine", ["one_step", {"name": "unroll", "steps": 1}, "identity"])
def test_a_mode_that_a_loss_sets_ends_with_that_loss(engine):
    optimizer, found = dropout_regression(engine, mode_set_by=("decay",))
    losses = [record.losses for record in optimizer.run(3)]
    net = optimizer.problems["net"].module
    assert net.training
    assert all(found)
    assert net[1].num_batches_tracked == 3
    # As if each loss set the mode that it needs.
    other, _ = dropout_regression(engine, mode_set_by=("decay",), lower_sets=True)
    assert [record.losses for record in other.run(3)] == losses
    # And not what a loss without a mode of its own computes.
    plain, _ = dropout_regression(engine)
    assert [record.losses for record in plain.run(3)] != losses


@pytest.mark.parametrize("engine", ["one_step", {"name": "unroll", "steps": 1}, "identity"])
def test_a_mode_set_in_a_loss_evaluated_again_ends_with_it(engine):
    optimizer, found = dropout_regression(engine, lower_sets=False)
    optimizer.step()
    optimizer.gradient("decay")
    assert all(found)
    assert all(module.training for module in optimizer.problems["net"].module.modules())


def test_a_mode_ends_with_a_loss_that_fails():
    optimizer, _ = dropout_regression("one_step", mode_set_by=("decay",))
    optimizer.problems["decay"].data[0] = torch.zeros(2, 7, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shapes"):
        optimizer.step()
    assert optimizer.problems["net"].module.training
