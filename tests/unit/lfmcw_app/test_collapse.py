"""The rules that say that a search has collapsed, on sequences made by hand."""

from __future__ import annotations

import math

import pytest
from made_generators import Made, bars, constant, drawn, marked_noise, one_per_class, wrong_class

from lfmcw_app.collapse import (
    ALIKE,
    LOST,
    SKIP_SHARE,
    WINDOW,
    WON,
    CollapseDetector,
    Observation,
    advised,
    doubts_about_pictures,
    last_quality,
    observe,
    what_is_known,
)
from lfmcw_app.data import search_split
from lfmcw_app.generator_quality import Judge, Quality, QualityByClass
from lfmcw_app.generators import GAMES, REAL
from lfmcw_app.recipe_loading import load_recipe
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


# ------------------------------ pictures

MEASURED = {"gan_test": 45.0, "gan_train": 40.0, "real": 50.0, "variety": 0.9}


def quality(classes=10, **changes):
    none = (None,) * classes
    by_class = QualityByClass(gan_test=none, gan_train=none, real=none, variety=none)
    return Quality(**{**MEASURED, **changes}, by_class=by_class)


def doubts(generated_accuracy=0.9, **changes):
    return set(doubts_about_pictures(quality(**changes), generated_accuracy))


def test_pictures_that_show_their_class_are_not_doubted():
    assert doubts() == set()
    assert doubts(generated_accuracy=None) == set()


def test_pictures_that_are_all_alike_are_doubted():
    """Also where a classifier of real ones knows them, and where there is no W2."""
    assert doubts(variety=0.9 * ALIKE) == {"alike"}
    assert doubts(None, variety=0.0) == {"alike"}
    assert doubts(variety=1.1 * ALIKE) == doubts(variety=None) == set()


def test_marks_are_what_w2_knows_and_a_judge_does_not():
    """Of a judge that knows 50% of real pictures, chance being 10%, a quarter is 20%."""
    assert doubts(0.87, gan_test=19.9) == {"marks"}
    assert doubts(0.87, gan_test=20.1) == set()
    assert doubts(0.54, gan_test=9.0) == {"unlike"}
    assert doubts(0.56, gan_test=9.0) == {"marks"}
    assert doubts(None, gan_test=9.0) == {"unlike"}


def test_a_judge_that_knows_nothing_doubts_nothing():
    """Of a thousand classes, or of too few images; the printed ceiling says so."""
    assert doubts(0.87, gan_test=10.0, real=18.0) == set()
    assert doubts(0.87, gan_test=10.0, real=20.0) == {"marks"}


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (drawn, set()),
        (one_per_class, {"alike"}),
        (marked_noise, {"marks"}),
        (constant, {"alike", "unlike"}),
        (wrong_class, {"marks"}),
    ],
)
def test_made_generators_are_doubted_as_they_should_be(draw, expected, bar_judge):
    """W2 learns to name them all, but of a constant it can know no more than one class."""
    accuracy = 0.25 if draw is constant else 0.97
    assert set(doubts_about_pictures(bar_judge.measure(Made(draw)), accuracy)) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            "A classifier trained on real pictures recognises 45% of the generated ones and 50% of "
            "other real ones (means over the classes; chance is 10%).",
        ),
        (
            {"gan_test": 12.0},
            "The generated pictures do not show their classes: a classifier trained on real "
            "pictures recognises only 12% of them and 50% of other real ones (means over the "
            "classes; chance is 10%).",
        ),
        (
            {"variety": 0.02},
            "The generator has collapsed: its pictures of a class are all alike (their variety is "
            "0.02, and that of real pictures is 1).",
        ),
        (
            {"gan_test": 12.0, "real": 18.0},
            "Whether the generated pictures show their classes is not known: a classifier trained "
            "on real pictures recognises only 18% even of other real ones (means over the classes; "
            "chance is 10%).",
        ),
    ],
)
def test_what_was_measured_is_told_without_advice(changes, said):
    """No more is said than was measured: a judge that knows nothing leaves it open."""
    found = quality(**changes)
    doubts = list(doubts_about_pictures(found, None).values())
    assert what_is_known(found, doubts) == said
    told = advised(doubts, load_recipe("small"))
    assert all("Train the generator longer" in doubt for doubt in told)


def test_two_doubts_have_one_advice():
    found = doubts_about_pictures(quality(gan_test=12.0, variety=0.02), None)
    recipe = load_recipe("small", overrides={"search.generator.name": "biggan"})
    first, second = advised(list(found.values()), recipe)
    assert first.endswith("that of real pictures is 1).")
    assert second.endswith(
        "(search.generator.warmup_rounds=4000; this run has 2000), or choose another "
        f"search.generator.name ({', '.join(name for name in GAMES if name != 'biggan')})."
    )


def test_the_advice_of_a_smoke_run_is_another_preset():
    """It cannot train a generator; one that was warmed up there is advised as any other."""
    short = load_recipe("smoke")
    assert advised(["Bad."], short) == [
        "Bad. Preset smoke is too short to train a generator, so this is to be expected. For "
        "pictures that show their classes, leave out --preset."
    ]
    warm = load_recipe("smoke", overrides={"search.generator.warmup_rounds": 300})
    assert "search.generator.warmup_rounds=2000; this run has 300)" in advised(["Bad."], warm)[0]
    assert advised([], short) == []


def test_one_answer_for_all_is_at_chance_of_unequal_classes():
    """W2 that names the largest class alone knows no mark, however large that class is."""
    mostly = {"classes": 4, "gan_test": 25.0, "real": 90.0, "largest": 80.0}
    assert doubts(0.8, **mostly) == {"unlike"}
    assert doubts(0.95, **mostly) == {"marks"}


@pytest.fixture(scope="module")
def bar_judge():
    dataset = bars()
    return Judge(*search_split(dataset, None, 0), dataset)


def test_doubts_are_told_once_until_they_were_gone():
    detector = CollapseDetector(window=3)
    for accuracy in (0.0, 0.9, 0.9, 0.9):  # the first one is out of the window
        detector.update(Observation(**HEALTHY, generated_accuracy=accuracy))
    (text,) = detector.measured(quality(gan_test=10.0))
    assert (
        "W2 recognises 90% of them, but a classifier trained on real pictures recognises only"
        in text
    )
    assert detector.measured(quality(gan_test=11.0)) == []
    assert detector.measured(quality()) == []
    assert len(detector.measured(quality(gan_test=10.0))) == 1


def line(number, accuracy=None, measured=None):
    w2 = {} if accuracy is None else {"w2": {"generated_accuracy": accuracy}}
    found = {"round": number, "metrics": w2}
    return found if measured is None else {**found, "quality": measured.to_data()}


def test_the_last_measures_are_found_in_the_lines_of_a_phase():
    """W2's accuracy is a mean over the rounds before; later rounds do not count."""
    marked, plain = quality(gan_test=10.0), quality()
    lines = [line(1, 0.9), line(2, 0.9, marked), line(3, 0.1), line(4, 0.1, plain)]
    number, found, texts = last_quality(lines)
    assert (number, found, texts) == (4, plain, [])
    number, found, texts = last_quality(lines, rounds=3)
    assert (number, found) == (2, marked)
    assert "W2 recognises 90%" in texts[0]
    assert last_quality(lines, rounds=1) is None
    assert last_quality([line(1, None, quality(variety=0.0))])[2][0].startswith("The generator has")


def test_only_the_window_before_a_measurement_counts():
    lines = [line(n, 0.0) for n in range(1, 51)]
    lines += [line(n, 0.9) for n in range(51, 51 + WINDOW - 1)]
    lines.append(line(51 + WINDOW - 1, 0.9, quality(gan_test=10.0)))
    assert "W2 recognises 90%" in last_quality(lines)[2][0]
