"""What a loss may return, and the numbers that its players' functions draw."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from noisy_regression import regression
from torch import nn
from torch.optim import SGD

import mlo
from mlo.loss_results import call_deferred


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)


SOURCES = {
    "torch": lambda generator: float(torch.rand(3)[0]),
    "generator": lambda generator: float(torch.rand(3, generator=generator)[0]),
    "numpy": lambda generator: float(np.random.rand(3)[0]),  # noqa: NPY002
    "python": lambda generator: random.random(),
}


def noisy_game(functions, engine="one_step", **options):
    """A game whose players a and b draw numbers in functions, and all that was drawn.

    Args:
        functions: player → its source of numbers; None: it draws nothing.
        engine: of the problem above it.
        options: of the game.
    """
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    pair = nn.ModuleDict({"a": nn.ParameterDict({"x": torch.ones(2)}), "b": nn.Linear(1, 1)})

    def pair_loss(pair, batch, *, up):
        def of(player):
            def loss():
                draw = functions[player]
                number = 0.0 if draw is None else SOURCES[draw](generator)
                drawn.append((player, number))
                return sum(p.square().sum() for p in pair[player].parameters()) * (
                    number + up["x"].sum()
                )

            return loss

        return {player: of(player) for player in functions}

    def up_loss(up, batch, *, pair):
        return pair["a"]["x"].sum() * up["x"].sum()

    up = nn.ParameterDict({"x": torch.ones(1)})
    problems = [
        mlo.Problem(
            "pair",
            module=pair,
            loss=pair_loss,
            players={player: player for player in functions},
            optimizer=SGD(pair.parameters(), lr=0.01),
            generators=[generator],
            **options,
        ),
        mlo.Problem("up", module=up, loss=up_loss, optimizer=SGD(up.parameters(), lr=0.0)),
    ]
    return mlo.MultilevelOptimizer(problems, engine), drawn


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_functions_draw_new_numbers_at_each_evaluation(source, order):
    """A player's function draws new numbers at each step, whichever function is called last."""
    optimizer, drawn = noisy_game({player: source if player == "a" else None for player in order})
    live = []
    for _ in range(4):
        drawn.clear()
        optimizer.step()
        live.append(dict(reversed(drawn))["a"])  # a replay repeats it
        assert {number for player, number in drawn if player == "a"} == {live[-1]}
    assert len(set(live)) == 4


def test_functions_draw_new_numbers_for_each_batch():
    optimizer, drawn = noisy_game({"a": "torch", "b": None}, accumulate=3, engine="first_order")
    optimizer.step()
    assert len({number for player, number in drawn if player == "a"}) == 3


def test_a_function_draws_what_it_would_draw_alone():
    """Functions start from one state, so what one draws does not depend on the others."""
    optimizer, drawn = noisy_game({"a": "torch", "b": "torch"}, player_steps={"b": 2})
    optimizer.step()
    # The first move is of b alone, the second of both. A check repeats what was drawn.
    (first, alone), (second, with_b), (third, with_a) = list(dict.fromkeys(drawn))[:3]
    assert (first, second, third) == ("b", "a", "b")
    assert alone != with_b == with_a


def test_a_single_function_draws_from_the_common_stream():
    """What the only function of a loss draws is what comes next in the common stream."""
    value = {"a": torch.ones(()), "b": lambda: torch.rand(())}
    torch.manual_seed(0)
    call_deferred(value)
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), torch.stack([value["b"], after]))


def test_a_resumed_game_draws_the_same_numbers():
    optimizer, drawn = noisy_game({"a": "torch", "b": None})
    optimizer.step()
    state = optimizer.state_dict()
    drawn.clear()
    optimizer.step()
    other, others = noisy_game({"a": "torch", "b": None})
    other.load_state_dict(state)
    other.step()
    assert drawn == others


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
    with pytest.raises(mlo.ProblemError, match="whose second part is a int"):
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
    with pytest.raises(mlo.ProblemError, match="declare them with players="):
        mlo.MultilevelOptimizer([problem]).step()


@pytest.mark.parametrize(
    ("others", "advice"),
    [
        ({"loss": 1.0, "logits": torch.ones(2)}, "Return its entry 'loss', or with metrics a pair"),
        ({"box": 2.0, "class": 1.0}, r"parts of one loss, return their sum\. Return .*as a pair"),
        ({"box": 2.0, "scores": torch.ones(2)}, r"'scores'\. Return .*as a pair"),
    ],
)
def test_a_loss_in_a_dict_says_what_to_return(others, advice):
    """Models of transformers return a mapping with the loss in it, detectors one of losses."""
    optimizer = regression()
    optimizer.problems["net"].loss = lambda net, batch, *, decay: {
        key: net(batch[0]).mean() * part for key, part in others.items()
    }
    with pytest.raises(mlo.ProblemError, match=f"got a dict of {', '.join(map(repr, others))}"):
        optimizer.step()
    with pytest.raises(mlo.ProblemError, match=advice):
        optimizer.step()
