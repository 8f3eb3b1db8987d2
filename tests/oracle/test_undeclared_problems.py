"""A loss that uses another problem without naming it is refused, whatever way it got hold of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mlo
from mlo.testing import Vector


def make(lower_loss, upper_loss, *, engine="one_step", accumulate=1):
    w, x = Vector(torch.ones(2).double()), Vector(torch.full((2,), 0.5).double())
    problems = [
        mlo.Problem(
            name,
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            loss=loss(w, x),
            accumulate=accumulate,
        )
        for name, module, loss in (("w", w, lower_loss), ("x", x, upper_loss))
    ]
    return mlo.MultilevelOptimizer(problems, engine)


def named_lower(w, x):
    return lambda w, _, *, x: ((w.v - x.v) ** 2).sum()


def named_upper(w, x):
    return lambda x, _, *, w: (w.v**2).sum() + 0.01 * (x.v**2).sum()


class WithAttribute:
    """A loss that is an object, with the other module as an attribute."""

    def __init__(self, other):
        self.other = other

    def __call__(self, module, batch):
        return ((module.v - self.other.v) ** 2).sum()


def reads_in_a_checkpoint(w, x):
    def loss(own, _):
        return checkpoint(lambda v: (v * x.v).cos().sum(), own.v, use_reentrant=False)

    return loss


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: lambda own, _: ((own.v - x.v) ** 2).sum(),
        lambda w, x: WithAttribute(x),
        lambda w, x: lambda own, _: ((own.v - x.get_parameter("v") * 2.0) ** 2).sum(),
        lambda w, x: lambda own, _: (own.v * torch.func.functional_call(Reading(x), {}, ())).sum(),
        reads_in_a_checkpoint,
    ],
    ids=["closure", "attribute", "a parameter of it", "a module that holds it", "checkpoint"],
)
@pytest.mark.parametrize("engine", ["one_step", "darts", "cg", "first_order"])
def test_a_lower_loss_that_uses_an_upper_problem(loss, engine):
    optimizer = make(loss, named_upper, engine=engine)
    with pytest.raises(mlo.GraphError, match=r"'w' uses parameter 'v' of problem 'x'.*\*, x\)"):
        optimizer.step()


class Reading(nn.Module):
    """Holds another module."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self):
        return self.other.v


@pytest.mark.parametrize("direct", [0.0, 1.0])
def test_an_upper_loss_that_uses_a_lower_problem(direct):
    """Its gradient would be zero, or miss the implicit term."""
    optimizer = make(
        named_lower, lambda w, x: lambda x, _: (w.v**2).sum() + direct * (x.v**2).sum()
    )
    for action in (lambda: optimizer.gradient("x"), optimizer.step):
        with pytest.raises(mlo.GraphError, match=r"'x' uses parameter 'v' of problem 'w'.*\*, w\)"):
            action()


def test_each_player_of_a_game_is_looked_at():
    a, b, x = (Vector(torch.ones(1).double()) for _ in range(3))
    game = nn.ModuleDict({"a": a, "b": b})
    problems = [
        mlo.Problem(
            "game",
            module=game,
            optimizer=torch.optim.SGD(game.parameters(), lr=0.1),
            loss=lambda game, _: {
                "a": (game["a"].v * game["b"].v).sum(),
                "b": lambda: (game["b"].v ** 2 - game["a"].v * x.v).sum(),
            },
            players={"a": "a", "b": "b"},
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
            loss=lambda x, _, *, game: game["a"].v.sum(),
        ),
    ]
    with pytest.raises(mlo.GraphError, match=r"'game' uses parameter 'v' of problem 'x'"):
        mlo.MultilevelOptimizer(problems).step()


def test_constants_and_declared_problems_stay_allowed():
    """A detached value is a constant; a declared module may be reached by any way."""
    optimizer = make(
        lambda w, x: lambda own, _: ((own.v - x.v.detach()) ** 2).sum(),
        lambda w, x: lambda own, _, *, w: (own.v**2).sum() + (w.v**2).sum(),
    )
    optimizer.step()
    closed_over = make(
        lambda w, x: lambda own, _, *, x: ((w.v - x.v) ** 2).sum(),
        lambda w, x: lambda own, _, *, w: (w.v**2).sum(),
    )
    reference = make(named_lower, lambda w, x: lambda own, _, *, w: (w.v**2).sum())
    assert torch.equal(closed_over.gradient("x")["v"], reference.gradient("x")["v"])
