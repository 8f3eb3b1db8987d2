"""Games whose players move differently often: BigGAN's and WGAN's several discriminator steps a
generator step.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from mlo.testing import Vector, relative_error

LR = {"generator": 0.05, "discriminator": 0.1}
MOMENTUM = 0.5
BATCHES = [
    torch.randn(3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    for k in range(7)
]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = Vector(torch.linspace(-1, 1, 3).double())
        self.discriminator = Vector(torch.linspace(0.5, -0.5, 3).double())


def losses(g, d, batch, x):
    fake = torch.tanh(g * x)
    return -(d * fake).sum().sigmoid(), (d * fake).sum().sigmoid() - (d * batch).sum().sigmoid() + (
        d**2
    ).sum()


def game_loss(pair, batch, *, x):
    return dict(zip(LR, losses(pair.generator.v, pair.discriminator.v, batch, x.v), strict=True))


def upper_loss(x, _, *, pair):
    return (torch.sin(pair.generator.v) * x.v).sum() + pair.discriminator.v.cos().sum()


def make(engine="one_step", player_steps=None, schedulers=False, data=BATCHES, **options):
    pair, x = Pair(), Vector(torch.linspace(0.1, 0.4, 3).double())
    optimizers = {
        player: torch.optim.SGD(getattr(pair, player).parameters(), lr=lr, momentum=MOMENTUM)
        for player, lr in LR.items()
    }
    schedule = (
        {p: torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for p, o in optimizers.items()}
        if schedulers
        else None
    )
    problems = [
        mlo.Problem(
            "pair",
            module=pair,
            players={player: player for player in LR},
            player_steps={"discriminator": 4} if player_steps is None else player_steps,
            optimizer=optimizers,
            scheduler=schedule,
            loss=game_loss,
            data=data,
            **options,
        ),
        mlo.Problem(
            "x", module=x, optimizer=torch.optim.SGD(x.parameters(), lr=0.3), loss=upper_loss
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine), pair, x


def test_three_moves_of_the_discriminator_go_before_one_of_both():
    optimizer, pair, x = make()
    g, d, u = (t.detach().clone() for t in (pair.generator.v, pair.discriminator.v, x.v))
    mg = md = None
    position = 0
    for _ in range(5):
        for move in range(4):
            batch = BATCHES[position % len(BATCHES)]
            position += 1
            g, d, u = (t.detach().requires_grad_() for t in (g, d, u))
            generator_loss, discriminator_loss = losses(g, d, batch, u)
            (grad_d,) = torch.autograd.grad(discriminator_loss, d, create_graph=True)
            md = grad_d if md is None else MOMENTUM * md + grad_d
            after_d, after_g = d - LR["discriminator"] * md, g
            if move == 3:
                (grad_g,) = torch.autograd.grad(generator_loss, g, create_graph=True)
                mg = grad_g if mg is None else MOMENTUM * mg + grad_g
                after_g = g - LR["generator"] * mg
                value = (torch.sin(after_g) * u).sum() + after_d.cos().sum()
                (gradient,) = torch.autograd.grad(value, u)
                mg = mg.detach()
            g, d, md = after_g.detach(), after_d.detach(), md.detach()
        optimizer.step()
        u = u.detach() - 0.3 * gradient
        for found, expected in ((pair.generator.v, g), (pair.discriminator.v, d), (x.v, u)):
            assert relative_error(found, expected) < 1e-12


def test_a_record_is_of_the_last_move():
    optimizer, *_ = make()
    record = optimizer.step()
    assert set(record.losses["pair"]) == set(LR)
    assert optimizer.state_dict()["problems"]["pair"]["updates"] == 4


@pytest.mark.parametrize("listed", [False, True], ids=["by player", "in a list"])
def test_a_resting_players_schedule_rests(listed):
    optimizer, *_ = make(schedulers=True)
    if listed:
        schedulers = optimizer.problems["pair"].schedulers
        ordered = list(schedulers.values())
        schedulers.clear()
        schedulers.update({str(index): scheduler for index, scheduler in enumerate(ordered)})
    optimizer.step()
    rates = {
        player: o.param_groups[0]["lr"]
        for player, o in optimizer.problems["pair"].optimizers.items()
    }
    assert rates == pytest.approx(
        {"generator": LR["generator"] / 2, "discriminator": LR["discriminator"] / 16}
    )


def test_a_run_resumes_where_its_state_was_saved():
    whole, pair, x = make()
    list(whole.run(5))
    first, *_ = make()
    list(first.run(2))
    second, pair2, x2 = make()
    second.load_state_dict(first.state_dict())
    list(second.run(3))
    assert torch.equal(x.v, x2.v)
    assert torch.equal(pair.discriminator.v, pair2.discriminator.v)


@pytest.mark.parametrize("bad_move", [0, 3])
def test_a_lost_number_leaves_the_data_at_the_rounds_end(bad_move):
    """A lost number in any move leaves the data at the end of the round."""
    broken = [batch.clone() for batch in BATCHES]
    broken[bad_move][0] = float("nan")
    optimizer, *_ = make(data=broken)
    with pytest.raises(mlo.NonFiniteError, match="Round 1, problem 'pair'"):
        optimizer.step()
    assert optimizer.state_dict()["problems"]["pair"]["data"]["taken"] == 4


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"critic": 4}, "player_steps names 'critic', which is not one of its players"),
        ({"generator": 0}, r"player_steps\['generator'\] must be an integer of at least 1"),
        (
            {"generator": 2, "discriminator": 4},
            "every player makes 2 moves or more per update; use steps=2",
        ),
    ],
)
def test_wrong_declarations_say_what_to_change(steps, message):
    with pytest.raises(mlo.ProblemError, match=message):
        make(player_steps=steps)


def test_unrolling_over_moves_of_single_players_is_refused():
    with pytest.raises(mlo.EngineError, match="player_steps"):
        make(mlo.Unroll(steps=2))
