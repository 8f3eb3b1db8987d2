"""Losses: what they may return, and what of a game's loss is not evaluated."""

from __future__ import annotations

import pytest
import torch
from noisy_regression import regression
from torch import nn
from torch.optim import SGD

import mlo
from mlo.testing import relative_error


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)


def game(deferred, engine="darts"):
    """A game of a and b, both noisy, below a problem that reads a only; and how often b's loss was
    evaluated.
    """
    torch.manual_seed(0)
    pair, up = Pair().double(), nn.Linear(3, 3).double()
    calls = [0]

    def pair_loss(pair, x, *, up):
        def a_loss():
            return (pair.a(x + torch.randn_like(x)) * pair.b(x) + up(x)).square().mean()

        def b_loss():
            calls[0] += 1
            return (pair.b(x + torch.randn_like(x)) - pair.a(x) * up(x)).square().mean(), {"b": 1.0}

        if deferred:
            return {"a": a_loss, "b": b_loss}, {"both": 2.0}
        state = torch.get_rng_state()
        first = a_loss()
        torch.set_rng_state(state)
        second, metrics = b_loss()
        return {"a": first, "b": second}, {"both": 2.0, **metrics}

    def up_loss(up, x, *, pair):
        return (pair.a(x) - up(x)).square().mean()

    x = torch.randn(4, 3, dtype=torch.float64)
    problems = [
        mlo.Problem(
            "pair",
            module=pair,
            loss=pair_loss,
            data=[x],
            players={"a": "a", "b": "b"},
            optimizer=SGD(pair.parameters(), lr=0.1),
        ),
        mlo.Problem(
            "up", module=up, loss=up_loss, data=[x], optimizer=SGD(up.parameters(), lr=0.1)
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, engine)
    record = optimizer.step()
    calls[0] = 0
    return optimizer.gradient("up"), calls[0], record


def test_a_loss_that_is_a_function_is_for_its_player_only():
    """A loss that is a function is evaluated only for its player."""
    expected, _, expected_record = game(deferred=False)
    found, calls, record = game(deferred=True)
    assert relative_error(found, expected) == 0.0
    assert calls == 0
    assert record.losses == expected_record.losses
    assert record.metrics == expected_record.metrics == {"pair": {"both": 2.0, "b": 1.0}, "up": {}}


def test_engines_that_couple_the_players_evaluate_both():
    expected, _, _ = game(deferred=False, engine="direct")
    found, calls, _ = game(deferred=True, engine="direct")
    assert calls > 0
    assert relative_error(found, expected) == 0.0


def test_a_functions_metrics_must_be_a_mapping():
    pair, up = Pair(), nn.Linear(3, 3)
    problems = [
        mlo.Problem(
            "pair",
            module=pair,
            loss=lambda pair, x, *, up: {"a": lambda: (pair.a(x).sum(), 3), "b": pair.b(x).sum()},
            data=[torch.ones(1, 3)],
            players={"a": "a", "b": "b"},
            optimizer=SGD(pair.parameters(), lr=0.1),
        ),
        mlo.Problem(
            "up",
            module=up,
            loss=lambda up, x, *, pair: pair.a(up(x)).sum(),
            data=[torch.ones(1, 3)],
            optimizer=SGD(up.parameters(), lr=0.1),
        ),
    ]
    with pytest.raises(mlo.ProblemError, match="the second part is a int"):
        mlo.MultilevelOptimizer(problems).step()


def test_the_loss_must_be_a_scalar():
    optimizer = regression()
    optimizer.problems["net"].loss = lambda net, batch, *, decay: net(batch[0])
    with pytest.raises(mlo.ProblemError, match="'net' must be a floating-point scalar"):
        optimizer.step()


def test_losses_of_players_that_are_not_declared_say_how():
    net = nn.Linear(2, 1)
    problem = mlo.Problem(
        "net",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        loss=lambda net, _: {"a": net.bias.sum()},
    )
    with pytest.raises(mlo.ProblemError, match="declare them by players="):
        mlo.MultilevelOptimizer([problem]).step()
