"""The rules that say that a search has collapsed, on sequences made by hand."""

from __future__ import annotations

import math

import pytest

from lfmcw_app.collapse import LOST, SKIP_SHARE, WON, CollapseDetector, Observation, observe
from lfmcw_app.generators import GAMES, REAL
from lfmcw_app.search_space.genotype import Edge, Genotype
from mlo import Record
from mlo.testing import evaluated

HEALTHY = {"skip_share": 0.25, "discriminator_loss": 1.2, "score_gap": 0.5, "generator_norm": 1.0}


def told(sequence, game="dcgan", window=5):
    """The rounds in which something is said of observations that differ from a healthy one, and
    what.
    """
    detector = CollapseDetector(game=game, window=window)
    found = []
    for number, changes in enumerate(sequence):
        found += [(number, text) for text in detector.update(Observation(**{**HEALTHY, **changes}))]
    return found


def only(found, number, words):
    assert [entry[0] for entry in found] == [number], found
    assert words in found[0][1]


def test_a_healthy_search_is_left_alone():
    assert told([{}] * 50) == []


def test_skips_in_more_than_half_of_the_cell_are_told_once():
    """Skips that take more than half of the cell are told of once."""
    rising = [
        {"skip_share": share}
        for share in (0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875)
    ]
    only(
        told([*rising, *[{"skip_share": 0.875}] * 20]),
        6,
        "75% of the normal cell's edges are skip connections",
    )
    assert told([{"skip_share": SKIP_SHARE}] * 20) == []


def test_skips_that_fell_and_rise_again_are_told_again():
    low, high = [{"skip_share": 0.25}] * 6, [{"skip_share": 0.75}] * 6
    assert [number for number, _ in told([*low, *high, *low, *high])] == [6, 18]


def test_a_cell_that_began_with_many_skips_is_no_collapse():
    """A cell that began with many skips is not called collapsing."""
    assert told([{"skip_share": 0.75}] * 20) == []


@pytest.mark.parametrize(("game", "coin"), [("dcgan", 2 * math.log(2)), ("biggan", 2.0)])
def test_a_discriminator_that_won_is_told_after_a_whole_window(game, coin):
    won = {"discriminator_loss": 0.9 * WON * coin}
    only(told([{}] * 10 + [won] * 10, game), 14, "the generator learns nothing more")
    assert told(([won] * 4 + [{}]) * 5, game) == []
    assert told([{"discriminator_loss": 1.1 * WON * coin}] * 20, game) == []


def test_the_losses_of_a_coin_are_those_of_the_games():
    """At scores of zero each loss with a lower end must be what the table says."""
    import torch

    class Generator(torch.nn.Module):
        def track(self):
            pass

        def sample(self, labels):
            return torch.zeros(len(labels), 1, 4, 4)

    def discriminator(images, labels, mixing):
        return torch.zeros(len(images))

    for name, game in GAMES.items():
        coin = game.coin_loss
        if coin is not None:
            returned = GAMES[name].loss(
                discriminator, Generator(), torch.zeros(3, 1, 4, 4), torch.zeros(3).long(), None
            )
            losses, _ = evaluated(*returned)
            assert float(losses["discriminator"]) == pytest.approx(coin)
    assert {name for name, game in GAMES.items() if game.coin_loss is None} == {"wgan_gp"}


def test_a_critic_whose_loss_is_negative_has_not_won():
    assert told([{"discriminator_loss": -30.0}] * 20, "wgan_gp") == []


def test_a_discriminator_that_tells_nothing_apart_is_told():
    for sign in (1, -1):
        only(
            told([{}] * 10 + [{"score_gap": sign * 0.5 * LOST}] * 10),
            14,
            "scored real and generated images alike",
        )


def test_a_generator_without_a_gradient_is_told():
    only(
        told([{}] * 10 + [{"generator_norm": 1e-7}] * 10),
        14,
        "generator's gradient was below 1e-06",
    )
    # Small from the beginning is a matter of scale.
    assert told([{"generator_norm": 1e-7}] * 20) == []
    only(told([{"generator_norm": 0.0}] * 20), 4, "generator's gradient")


def test_a_search_without_a_generator_is_judged_by_its_cell_only():
    none = {"discriminator_loss": None, "score_gap": None, "generator_norm": None}
    assert told([none] * 20) == []
    assert told([none] * 20, game=REAL) == []
    only(told([none] * 10 + [none | {"skip_share": 0.75}] * 10, REAL), 10, "skip-connection")


def test_two_rules_are_told_apart():
    found = told([{}] * 10 + [{"score_gap": 0.0, "generator_norm": 0.0}] * 10)
    assert [number for number, _ in found] == [14, 14]


def test_an_observation_is_taken_from_record_and_genotype():
    cell = (
        Edge("skip_connect", 0),
        Edge("sep_conv_3x3", 1),
        Edge("skip_connect", 1),
        Edge("skip_connect", 2),
    )
    genotype = Genotype(normal=cell, reduction=cell[:2] * 2)
    record = Record(round=1)
    assert observe(record, genotype) == Observation(skip_share=0.75)
    import torch

    record.add(
        "gan",
        loss={"generator": torch.tensor(0.5), "discriminator": torch.tensor(1.5)},
        metrics={"real_score": torch.tensor(2.0), "fake_score": torch.tensor(-1.0)},
        gradient_norm=torch.tensor(5.0),
        player_norms={"generator": torch.tensor(3.0), "discriminator": torch.tensor(4.0)},
    )
    assert observe(record, genotype) == Observation(
        skip_share=0.75, discriminator_loss=1.5, score_gap=3.0, generator_norm=3.0
    )
