"""A loss that is another one at its second evaluation has no derivative that means anything."""

from __future__ import annotations

import itertools
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from small_graphs import problem
from torch import nn

import mlo

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ENGINES = ["one_step", "darts", "identity", "penalty", {"name": "unroll", "steps": 2}]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.double()

    def forward(self, x):
        return self.head(self.layers(x))[:, 0]


def make(engine, factor):
    """The lower loss is a mean square, times `factor(net)`; x weights the examples."""
    net, upper = Net(), nn.ParameterDict({"x": torch.zeros(16).double()})

    def lower(net, _, *, x):
        return factor(net) * (x["x"].exp() * (net(X) - 1.0) ** 2).mean()

    def outer(x, _, *, net):
        return (net.head.weight**2).sum() + net(X).square().mean()

    return mlo.MultilevelOptimizer([problem("net", lower, net), problem("x", outer, upper)], engine)


def counting():
    calls = []

    def factor(net):
        calls.append(None)
        return 1.0 / len(calls)

    return factor


def running_mean():
    kept = {"mean": 0.0}

    def factor(net):
        kept["mean"] = 0.9 * kept["mean"] + 0.1 * float(net.head.weight.detach().norm())
        return 1.0 + kept["mean"]

    return factor


def generator_of_ones_own():
    generator = np.random.default_rng(0)
    return lambda net: generator.random()


def unnamed_generator():
    generator = torch.Generator().manual_seed(0)
    return lambda net: torch.rand((), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "stateful", [counting, running_mean, generator_of_ones_own, unnamed_generator]
)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_loss_that_keeps_state_is_warned_of_once(stateful, engine):
    optimizer = make(engine, stateful())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")  # finite differences say more
        for _ in range(3):
            optimizer.gradient("x")
    messages = [str(warning.message) for warning in seen]
    (message,) = [text for text in messages if "evaluated again" in text]
    assert message.startswith("The loss of problem 'net' is ")


def in_a_buffer(net):
    net.mean.mul_(0.9).add_(0.1 * net.head.weight.detach().norm())
    return 1.0 + net.mean


def global_noise(net):
    return float(np.random.rand()) + torch.rand((), dtype=torch.float64)  # noqa: NPY002


@pytest.mark.parametrize("factor", [in_a_buffer, global_noise])
@pytest.mark.parametrize(
    "engine", ["one_step", "identity", {"name": "unroll", "steps": 2}], ids=str
)
def test_buffers_and_global_noise_repeat_themselves(factor, engine):
    """BatchNorm and dropout included."""
    optimizer = make(engine, factor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(optimizer.run(3))


def gradient_penalty(net):
    """A loss that takes gradients itself."""
    points = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    return 1.0 + slope.square().mean()


@pytest.mark.parametrize("engine", ["one_step", "identity", "darts", "penalty"])
def test_a_loss_may_take_gradients_itself(engine):
    make(engine, gradient_penalty).gradient("x")


def test_a_kept_graph_is_not_evaluated_again():
    calls = []

    def factor(net):
        calls.append(None)
        return 1.0

    optimizer = make({"name": "one_step", "keep_graph": True}, factor)
    list(optimizer.run(10))
    checks = 4  # at the updates 1, 2, 4 and 8, whether stand-ins for parameters change the loss
    assert len(calls) == 10 + checks


# ------------------------------ what changes between a step and its derivative


@pytest.mark.parametrize("where", ["before_update", "after_update", "the loop"])
@pytest.mark.parametrize(
    "engine",
    [{"name": "one_step", "keep_graph": False}, "darts", {"name": "unroll", "steps": 2}],
    ids=str,
)
def test_a_value_that_changes_after_the_step_is_warned_of(where, engine):
    """A temperature in Python, annealed at every update."""
    kept = {"temperature": 1.0}

    def anneal(_=None):
        kept["temperature"] *= 0.9

    optimizer = make(engine, lambda net: kept["temperature"])
    if where != "the loop":
        setattr(optimizer.problems["net"], where, anneal)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for update in optimizer.updates(3):
            if where == "the loop" and update.problem == "net":
                anneal()
    messages = [str(warning.message) for warning in seen]
    (message,) = [text for text in messages if "evaluated again" in text]
    assert message.startswith("The loss of problem 'net' was 0.")
    assert "Something else that it reads has changed meanwhile" in message


def test_a_value_that_changes_between_rounds_is_followed():
    kept = {"temperature": 1.0}
    optimizer = make({"name": "one_step", "keep_graph": False}, lambda net: kept["temperature"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            optimizer.step()
            kept["temperature"] *= 0.9


@pytest.mark.parametrize("begins", [1, 3])
def test_state_that_begins_later_is_warned_of(begins):
    """At the pull-backs 1, 2, 4, 8, …"""
    calls, round_now = [], [0]

    def factor(net):
        if round_now[0] >= begins:
            calls.append(None)
        return 1.0 + len(calls)

    optimizer = make({"name": "one_step", "keep_graph": False}, factor)
    for _ in range(begins):
        optimizer.step()
        round_now[0] += 1
    with pytest.warns(mlo.SolveWarning, match="evaluated again at the same point"):
        optimizer.step()


def test_a_step_is_differentiated_by_the_loss_that_made_it():
    """`problem.loss` may be replaced between rounds."""
    optimizer = make({"name": "one_step", "keep_graph": False}, lambda net: 1.0)
    optimizer.step()
    before = optimizer.gradient("x")["x"]
    problem = optimizer.problems["net"]
    problem.loss = lambda net, _, *, x: 3.0 * (x["x"].exp() * (net(X) - 1.0) ** 2).mean()
    assert torch.equal(optimizer.gradient("x")["x"], before)
    optimizer.step()
    assert not torch.allclose(optimizer.gradient("x")["x"], before)


# ------------------------------ losses that are not evaluated again keep their state


class Counter:
    """A term that is annealed by the number of calls."""

    warns = True

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return 0.9**self.calls

    def updated(self):
        """What the loop does after an update."""


class Meter(Counter):
    """Counts, and leaves the loss as it is."""

    warns = False

    def __call__(self):
        super().__call__()
        return 1.0


class Batches(Counter):
    """`next(iterator)`."""

    def __init__(self):
        super().__init__()
        self.batches = itertools.cycle([0.5, 1.5, 1.0, 2.0, 0.7])

    def __call__(self):
        super().__call__()
        return next(self.batches)


class Noise(Counter):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def __call__(self):
        super().__call__()
        return self.generator.random()


class Queue(Counter):
    """The mean of the last three of its numbers."""

    def __init__(self):
        super().__init__()
        self.kept = deque(maxlen=3)

    def __call__(self):
        super().__call__()
        self.kept.append(float(self.calls))
        return sum(self.kept) / len(self.kept)


class Cached(Counter):
    """A tensor that the first call makes."""

    warns, made = False, None

    def __call__(self):
        super().__call__()
        if self.made is None:
            self.made = torch.tensor(1.0 / self.calls, dtype=torch.float64)
        return self.made


class Temperature(Counter):
    """A Python variable that is annealed after each update."""

    warns = False

    def __call__(self):
        super().__call__()
        return self.now

    now = 1.0

    def updated(self):
        self.now *= 0.9


KINDS = [Counter, Meter, Batches, Noise, Queue, Cached, Temperature]
PLACES = [("x", "first_order"), ("x", "one_step"), ("x", "darts"), ("w", "first_order")]
TURNS = 9


def below(w, x):
    return (w - x).square().sum() + 0.1 * w.exp().sum()


def above(w, x):
    return ((w - 1.0).square() * x.exp()).sum()


def by_loop(keeper, where, engine):
    """w and x after the turns; the first one evaluates the loss with the keeper once more."""
    w, x = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def factor(of, turn):
        if of != where:
            return 1.0
        found = keeper()
        if turn == 0:
            keeper()
        keeper.updated()
        return found

    for turn in range(TURNS):
        w, x = w.detach().requires_grad_(), x.detach().requires_grad_()
        loss = factor("w", turn) * below(w, x)
        (g,) = torch.autograd.grad(loss, w, create_graph=engine != "first_order")
        w = w - 0.1 * g
        (g,) = torch.autograd.grad(factor("x", turn) * above(w, x), x)
        x = x - 0.1 * g
    return w.detach(), x.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("where", "engine"), PLACES)
def test_state_of_a_loss_that_is_not_replayed_is_kept(kind, where, engine):
    keeper, expected = kind(), by_loop(kind(), where, engine)
    modules = {
        "w": nn.ParameterDict({"v": torch.zeros(2, dtype=torch.float64)}),
        "x": nn.ParameterDict({"v": torch.ones(2, dtype=torch.float64)}),
    }
    losses = {
        "w": lambda w, _, *, x: (keeper() if where == "w" else 1.0) * below(w["v"], x["v"]),
        "x": lambda x, _, *, w: (keeper() if where == "x" else 1.0) * above(w["v"], x["v"]),
    }
    hooks = {where: lambda _: keeper.updated()}
    problems = [
        problem(name, losses[name], module, after_update=hooks.get(name))
        for name, module in modules.items()
    ]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        list(mlo.MultilevelOptimizer(problems, engine).run(TURNS))
    assert keeper.calls == TURNS + 1
    exact = 1e-6 if engine == "darts" else 1e-12
    for module, value in zip(modules.values(), expected, strict=True):
        assert (module["v"] - value).abs().max() < exact
    messages = [text for w in seen if "evaluated again" in (text := str(w.message))]
    assert len(messages) == kind.warns
    assert all("by calling the loss once more than its updates do" in text for text in messages)


@pytest.mark.parametrize("left_out", [0, 1])
def test_an_update_that_is_left_out_is_not_checked_again(left_out):
    calls = []

    def factor():
        calls.append(None)
        return float("nan") if len(calls) <= 2 * left_out else 1.0

    x = nn.ParameterDict({"v": torch.ones(2, dtype=torch.float64)})
    w = nn.ParameterDict({"v": torch.ones(2, dtype=torch.float64)})
    problems = [
        problem("w", lambda w, _, *, x: below(w["v"], x["v"]), w),
        problem("x", lambda x, _, *, w: factor() * above(w["v"], x["v"]), x),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, "one_step", on_nonfinite="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(optimizer.run(3))
    assert len(calls) == 4


def test_every_player_is_evaluated_once_more():
    calls = {"a": 0, "b": 0}
    game = nn.ModuleDict({name: nn.Linear(1, 1, bias=False).double() for name in calls})
    w = nn.ParameterDict({"v": torch.ones(1, 1, dtype=torch.float64)})

    def of(name, game, w):
        def loss():
            calls[name] += 1
            return (game[name].weight - w["v"]).square().sum()

        return loss

    problems = [
        problem("w", lambda w, _, *, game: (w["v"] - game["a"].weight).square().sum(), w),
        problem(
            "game",
            lambda game, _, *, w: {name: of(name, game, w) for name in calls},
            game,
            players={name: name for name in calls},
            player_steps={"a": 3},
        ),
    ]
    list(mlo.MultilevelOptimizer(problems, "first_order").run(5))
    assert calls == {"a": 15 + 1, "b": 5 + 1}


def test_a_loss_known_to_keep_state_is_not_checked_again():
    """Its step is differentiated by one evaluation, as before."""
    calls = []

    def factor(net):
        calls.append(None)
        return 1.0 + len(calls)

    optimizer = make({"name": "one_step", "keep_graph": False}, factor)
    with pytest.warns(mlo.SolveWarning, match="It keeps state between calls"):
        list(optimizer.run(TURNS))
    checks = 2  # at the first update: it differs, and differs again
    assert len(calls) == 2 * TURNS + checks
