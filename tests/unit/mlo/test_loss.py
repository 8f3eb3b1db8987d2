"""Losses as they are called: the players of a game, autocast, and notes on what was missing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mlo
from mlo.randomness import forked
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
        with forked(0):
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
    optimizer.gradient("up")  # (pull-backs 1 and 2 also look whether all losses repeat themselves)
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


def test_a_batch_that_a_loss_misses_is_told_of_data():
    def noted(loss):
        net = nn.Linear(2, 1)
        problem = mlo.Problem("net", module=net, optimizer=SGD(net.parameters(), lr=0.1), loss=loss)
        with pytest.raises((TypeError, AttributeError)) as caught:
            mlo.MultilevelOptimizer([problem]).step()
        return "Problem 'net' has no data=, so its batch is None." in caught.value.__notes__

    assert noted(lambda net, batch: net(batch[0]).sum())
    assert noted(lambda net, batch: net(batch.x).sum())
    assert not noted(lambda net, batch: net.missing.sum())
    assert not noted(lambda net, batch: net.weight.sum(axes=1))


def test_an_argument_that_cannot_be_learned_is_told():
    """The weights of cross_entropy, for example; the note has the formula, which is the same."""
    torch.manual_seed(0)
    net, up, x, y = nn.Linear(3, 4), nn.Linear(4, 1), torch.randn(6, 3), torch.arange(6) % 4
    cross_entropy = nn.functional.cross_entropy

    def in_words(net, up):
        weight = up.weight[0].exp()
        losses = weight[y] * cross_entropy(net(x), y, reduction="none")
        return losses.sum() / weight[y].sum()

    def learned(net, _, *, up):
        return cross_entropy(net(x), y, weight=up.weight[0].exp())

    def smoothed(net, _, *, up):
        return cross_entropy(net(x), y, label_smoothing=up.weight[0, 0].sigmoid())

    with torch.no_grad():
        assert torch.allclose(in_words(net, up), learned(net, None, up=up))
    for loss in (learned, smoothed):
        lower = mlo.Problem("net", module=net, optimizer=SGD(net.parameters(), lr=0.1), loss=loss)
        upper = mlo.Problem(
            "up",
            module=up,
            optimizer=SGD(up.parameters(), lr=0.1),
            loss=lambda up, _, *, net: cross_entropy(net(x), y),
        )
        with pytest.raises((RuntimeError, TypeError)) as caught:
            mlo.MultilevelOptimizer([lower, upper]).step()
        whose, advice = caught.value.__notes__
        assert whose == "It was raised in the loss of problem 'net'."
        assert "(weight[y] * cross_entropy(output, y, reduction='none')).sum()" in advice


def test_autocast_around_rounds_casts_weights_that_have_moved():
    """Autocast keeps casts until its outermost region ends: a loop inside would train on them."""

    def trained(around):
        torch.manual_seed(0)
        net, x = nn.Linear(3, 2), torch.randn(5, 3)
        decay = nn.ParameterDict({"v": torch.tensor(0.1)})
        problems = [
            mlo.Problem(
                "net",
                module=net,
                optimizer=SGD(net.parameters(), lr=0.1),
                loss=lambda net, batch, *, decay: (
                    net(x).float().square().mean() + decay["v"] * net.weight.square().sum()
                ),
                steps=3,
                precision=None if around else "bf16",
            ),
            mlo.Problem(
                "decay",
                module=decay,
                optimizer=SGD(decay.parameters(), lr=0.1),
                loss=lambda decay, batch, *, net: net(x).float().square().mean(),
                precision=None if around else "bf16",
            ),
        ]
        optimizer = mlo.MultilevelOptimizer(problems, "one_step")
        seen = []
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for _ in optimizer.updates(rounds=3):
                # The program may look at the network, and move it.
                with torch.autocast("cpu", torch.bfloat16):
                    seen.append(net(x).float())
                with torch.no_grad():
                    net.weight.mul_(0.9)
        return [*seen, net.weight.detach(), decay["v"].detach()]

    for ours, plain in zip(trained(True), trained(False), strict=True):
        assert torch.equal(ours, plain)
