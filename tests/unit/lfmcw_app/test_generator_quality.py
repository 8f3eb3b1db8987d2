"""What a generator is worth, on generators that are good or bad in one way."""

from __future__ import annotations

import json
import math

import pytest
import torch
from made_generators import (
    CLASSES,
    Made,
    bars,
    constant,
    drawn,
    marked_noise,
    one_per_class,
    wrong_class,
)

from lfmcw_app.data import search_split
from lfmcw_app.generator_quality import LARGEST_SIZE, Judge, Quality
from lfmcw_app.generators import GAMES
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.testing import noise_dataset

UNEQUAL = (40, 8, 6, 6)
"""Pictures of each class in a set of unequal classes."""


@pytest.fixture(scope="module")
def judge():
    dataset = bars()
    return Judge(*search_split(dataset, None, 0), dataset)


@pytest.fixture
def quick(monkeypatch):
    """Trainings of a few steps, for tests that do not depend on what is learned."""
    monkeypatch.setattr("lfmcw_app.generator_quality.STEPS", 5)


def test_real_pictures_are_worth_what_the_ceiling_says(judge):
    found = judge.measure(Made(drawn))
    assert found.real > 95
    assert found.gan_test > 95
    assert found.gan_train > 95
    assert found.variety == pytest.approx(1.0, abs=0.1)
    assert found.chance == 25.0


def test_one_picture_per_class_has_no_variety(judge):
    """A classifier of real pictures knows them nevertheless."""
    found = judge.measure(Made(one_per_class))
    assert found.gan_test == 100.0
    assert found.variety == 0.0
    assert found.by_class.variety == (0.0,) * CLASSES


def test_marks_of_a_class_teach_nothing_about_real_pictures(judge):
    found = judge.measure(Made(marked_noise))
    assert found.gan_test < 50
    assert found.gan_train < 60
    assert found.variety > 0.3


def test_a_constant_is_at_chance(judge):
    found = judge.measure(Made(constant))
    assert found.gan_test == 25.0
    assert sorted(found.by_class.gan_test) == [0.0, 0.0, 0.0, 100.0]
    assert found.variety == 0.0


def test_a_constant_answer_is_at_chance_of_unequal_classes(quick):
    """Not at the share of the largest class, which is two thirds here."""
    dataset = bars()
    few = torch.cat([(dataset.train.labels == k).nonzero()[:n, 0] for k, n in enumerate(UNEQUAL)])
    judge = Judge(dataset.train[few], dataset.test, dataset)
    found = judge.measure(Made(constant))
    assert sorted(found.by_class.gan_test) == [0.0, 0.0, 0.0, 100.0]
    assert found.gan_test == found.chance == 25.0
    assert found.largest == pytest.approx(66.667)


def test_measures_of_earlier_versions_become_means_over_classes():
    """They were written over all pictures, without chance and the largest class."""
    column = [90.0, 0.0, 0.0, None]
    by_class = dict.fromkeys(("gan_test", "gan_train", "real", "variety"), column)
    old = {"gan_test": 75.0, "gan_train": 75.0, "real": 75.0, "variety": 0.5}
    found = Quality.from_data({**old, "by_class": by_class})
    assert (found.gan_test, found.gan_train, found.real) == (30.0, 30.0, 30.0)
    assert found.largest is None


def test_pictures_of_another_class_are_wrong_both_ways(judge):
    found = judge.measure(Made(wrong_class))
    assert found.gan_test < 5
    assert found.gan_train < 5
    assert found.variety == pytest.approx(1.0, abs=0.1)


def test_variety_is_the_distance_of_two_pictures(quick, judge):
    """Half of each picture's distance from the mean of its class is half of the variety."""
    mean = drawn(torch.arange(CLASSES).repeat(500)).view(500, CLASSES, 1, 8, 8).mean(0)

    def half_as_far(labels):
        return mean[labels] + 0.5 * (drawn(labels) - mean[labels])

    assert judge.measure(Made(half_as_far)).variety == pytest.approx(0.5, abs=0.06)


def test_grain_is_no_variety(quick, judge):
    """Pictures are compared by means over a coarse grid."""

    def grainy(labels):
        checks = torch.ones(8, 8)
        checks[::2, ::2] = checks[1::2, 1::2] = -1.0
        sign = torch.randint(2, (len(labels), 1, 1, 1)) * 2.0 - 1.0
        return one_per_class(labels) + 0.3 * sign * checks

    assert judge.measure(Made(grainy)).variety < 0.01


def test_a_measurement_repeats_itself_and_leaves_no_trace(quick):
    """Random state and generator stay as they were; a new judge finds the same."""
    torch.manual_seed(3)
    dataset = bars()
    how = {
        "num_classes": CLASSES, "image_size": 8, "image_channels": 1, "mean": (0.3,),
        "std": (0.25,), "noise_dim": 8, "channels": 4,
    }  # fmt: skip
    generator = GAMES["biggan"].generator(**how)
    weights = {name: value.clone() for name, value in generator.state_dict().items()}
    state = torch.get_rng_state()
    first = Judge(*search_split(dataset, None, 0), dataset).measure(generator)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = Judge(*search_split(dataset, None, 0), dataset).measure(generator)
    assert first == again
    now = generator.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_real_pictures_in_place_of_generated_ones_are_as_good(quick):
    dataset = bars()
    train, held_out = search_split(dataset, None, 0)
    found = Judge(train, held_out, dataset).measure(held_out)
    assert found.gan_test == found.real
    assert found.variety == pytest.approx(1.0, abs=0.1)


def test_a_judge_of_a_recipe_has_the_halves_of_its_search(quick):
    dataset = bars()
    recipe = load_recipe("smoke", overrides={"data.search_images": 120, "seed": 4})
    train, held_out = search_split(dataset, 120, 4)
    alike = Judge(train, held_out, dataset, seed=4)
    assert Judge.of(dataset, recipe).measure(Made(drawn)) == alike.measure(Made(drawn))


def test_the_judge_of_mislabelled_images_knows_right_labels(quick):
    """A generator is measured by the class that its pictures show, whatever the search is told."""
    dataset = bars()
    names = dataset.class_names
    wrong = {"of": names[0], "as": [names[1]], "share": 0.9, "in": "both"}
    right = {"data.search_images": 120}
    plain, mislabelled = (
        load_recipe("smoke", overrides=right | more)
        for more in ({}, {"data.wrong_labels": [wrong]})
    )
    expected = Judge.of(dataset, plain).measure(Made(drawn))
    assert Judge.of(dataset, mislabelled).measure(Made(drawn)) == expected


def test_quality_is_plain_data_and_back(quick):
    dataset = bars()
    found = Judge(dataset.train, dataset.test, dataset).measure(Made(drawn))
    assert Quality.from_data(json.loads(json.dumps(found.to_data()))) == found
    assert "GAN-test" in str(found)


def test_lost_numbers_are_wrong_answers(quick, judge):
    """They are no answer, not the first class."""
    found = judge.measure(Made(lambda labels: torch.full((len(labels), 1, 8, 8), math.nan)))
    assert (found.gan_test, found.gan_train, found.variety) == (0.0, 0.0, None)
    json.dumps(found.to_data(), allow_nan=False)


def test_classes_without_enough_pictures_have_no_measure(quick):
    """A class of one picture has no distance, and one of none no picture."""
    dataset = bars()
    train = dataset.train[torch.cat([torch.arange(0, 200, 4), torch.tensor([1])])]
    found = Judge(train, dataset.test, dataset).measure(Made(drawn))
    assert [value is None for value in found.by_class.variety] == [False, True, True, True]
    assert [value is None for value in found.by_class.gan_test] == [False, False, True, True]
    assert found.variety == found.by_class.variety[0]


def test_real_pictures_that_are_all_equal_have_no_variety(quick):
    dataset = noise_dataset(classes=2)
    dataset.train.pixels.fill_(9)
    generator = Made(drawn)
    found = Judge(dataset.train, dataset.test, dataset).measure(generator)
    assert found.variety is None
    assert "variety within a class –" in str(found)


def test_large_pictures_are_reduced():
    size = 2 * LARGEST_SIZE
    dataset = noise_dataset(classes=2, size=size, per_class=4)

    def grey(labels):
        return torch.rand(len(labels), 1, size, size)

    judge = Judge(dataset.train, dataset.test, dataset)
    assert judge._real.images.shape == (8, 1, LARGEST_SIZE, LARGEST_SIZE)
    assert judge._drawn(Made(grey), dataset.train.labels).images.shape[-1] == LARGEST_SIZE
