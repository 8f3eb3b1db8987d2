"""The errors of a trained network, class by class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfmcw_app.assessment import MOST_CLASSES, answers_of, assessed
from lfmcw_app.data import Dataset, Images
from lfmcw_app.recipe import Augmentation

CPU = torch.device("cpu")


class ByBrightness(nn.Module):
    """Says class k of an image whose pixels are k, but for what it is told to say instead."""

    def __init__(self, classes, instead=()):
        super().__init__()
        self.classes, self.instead = classes, dict(instead)

    def forward(self, images):
        shown = images[:, 0, 0, 0].mul(255.0).round().long()
        said = torch.tensor([self.instead.get(int(value), int(value)) for value in shown])
        logits = nn.functional.one_hot(said.clamp(min=0), self.classes).float()
        logits[said < 0] = float("nan")
        return logits, None


def pictures(values, labels):
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    return Images(pixels=pixels.contiguous(), labels=torch.tensor(labels))


def dataset(train, test, classes=3):
    return Dataset(
        name="made",
        train=train,
        test=test,
        class_names=tuple(map(str, range(classes))) if classes > 3 else ("a", "b", "c"),
        mean=(0.0,),
        std=(1.0,),
    )


TEST = pictures([0, 0, 1, 1, 2, 7, 7], [0, 0, 1, 1, 2, 2, 2])  # a picture of 7 is one of class 2
TRAIN = pictures([0, 1, 2], [0, 1, 2])


def measure(instead, train=TRAIN, test=TEST, classes=3):
    network = ByBrightness(classes, instead)
    return assessed(network, train, test, dataset(train, test, classes), CPU)


def test_errors_are_told_by_class():
    found = measure({7: 0, 1: 1})
    assert found["test_error_percent"] == pytest.approx(100 * 2 / 7)
    assert [entry["error_percent"] for entry in found["classes"]] == [0.0, 0.0, 100 * 2 / 3]
    assert [entry["images"] for entry in found["classes"]] == [2, 2, 3]
    assert found["balanced_error_percent"] == pytest.approx(100 * 2 / 9)
    assert found["confusion"] == [[2, 0, 0], [0, 2, 0], [2, 0, 1]]
    assert found["training_error_percent"] == 0.0
    assert found["test_top5_error_percent"] is None


def test_the_classes_make_up_the_whole():
    """To the last bit: the counts of all classes give the test error."""
    found = measure({7: 1, 0: 2})
    wrong = sum(round(entry["error_percent"] * entry["images"] / 100) for entry in found["classes"])
    assert found["test_error_percent"] == 100.0 * (wrong / found["test_images"])
    confused = torch.tensor(found["confusion"])
    assert int(confused.sum() - confused.diagonal().sum()) == wrong
    assert confused.sum(1).tolist() == [entry["images"] for entry in found["classes"]]


def test_of_many_classes_only_mistakes_are_listed():
    """The commonest first; a matrix would have the square of the number of classes."""
    count = MOST_CLASSES + 1
    values = [0, 1, 1, 2, 2, 100, 100]
    found = measure(
        {1: 100, 2: 7, 100: -1},
        train=pictures([0], [0]),
        test=pictures(values, values),
        classes=count,
    )
    assert "confusion" not in found
    assert found["mistakes"] == [[1, 100, 2], [2, 7, 2]]
    assert [found["classes"][k]["error_percent"] for k in (0, 1, 2, 100)] == [0, 100, 100, 100]
    few = measure({7: 0}, classes=MOST_CLASSES)
    assert "mistakes" not in few
    assert len(few["confusion"]) == MOST_CLASSES


def test_logits_that_are_no_numbers_are_wrong():
    found = measure({7: -1, 0: -1})
    assert [entry["error_percent"] for entry in found["classes"]] == [100.0, 0.0, 100 * 2 / 3]
    assert found["confusion"] == [[0, 0, 0], [0, 2, 0], [0, 0, 1]]


def test_of_equal_logits_the_first_class_is_the_answer():
    class Undecided(nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 3), None

    answers = answers_of(Undecided(), TEST, dataset(TRAIN, TEST), CPU)
    assert answers.predictions.tolist() == [0] * 7
    assert answers.ranks.tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_a_class_without_test_images_has_no_error():
    found = measure({}, test=pictures([0, 1], [0, 1]))
    assert found["classes"][2] == {
        "name": "c", "images": 0, "error_percent": None, "interval_percent": [0.0, 100.0],
    }  # fmt: skip
    assert found["balanced_error_percent"] == 0.0


@pytest.mark.parametrize(
    ("instead", "doubtful"),
    [
        ({10: 1, 11: 2, 12: 0}, True),  # knows its images, and no other ones
        ({10: 0, 11: 1, 12: 0}, False),  # wrong on a third
        ({0: 1, 1: 2, 2: 0, 10: 1, 11: 2, 12: 0}, False),  # has not learned anything
    ],
)
def test_a_network_that_knows_only_its_images_is_doubted(instead, doubtful):
    test = pictures([10, 11, 12] * 4, [0, 1, 2] * 4)
    found = measure(instead, test=test)
    assert ("doubt" in found) is doubtful
    if doubtful:
        assert "0.0% of its training images and on 100.0% of the 12 test" in found["doubt"]
        assert "would give 66.7%" in found["doubt"]


class ByNormalised(nn.Module):
    """Tells three classes apart by their normalised brightness."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1, affine=False)

    def forward(self, images):
        brightness = self.norm(images).mean((1, 2, 3))
        return -torch.cdist(brightness[:, None], torch.tensor([[-1.2], [0.0], [1.2]])), None


SHADES = pictures([10, 100, 190] * 100, [0, 1, 2] * 100)


def test_statistics_are_settled_before_anything_is_measured():
    """With initial ones, mean 0 and variance 1, a class is wrong."""
    found = assessed(ByNormalised(), SHADES, SHADES, dataset(SHADES, SHADES), CPU)
    assert (found["test_error_percent"], found["training_error_percent"]) == (0.0, 0.0)
    assert answers_of(ByNormalised(), SHADES, dataset(SHADES, SHADES), CPU).error > 33.0


def test_statistics_are_those_of_the_trainings_images():
    """Augmented as in training: a square of 4 of 8 by 8 pixels, partly outside, is cut out."""
    means = []
    for how in (Augmentation(cutout=4), Augmentation(cutout=4), None):
        network = ByNormalised()
        assessed(network, SHADES, SHADES, dataset(SHADES, SHADES), CPU, augmentation=how)
        means.append(float(network.norm.running_mean))
    assert means[2] == pytest.approx(100 / 255)  # of all pixels
    assert means[0] == means[1]
    assert 0.75 < means[0] / means[2] < 0.9


def test_in_a_set_of_mostly_one_class_chance_is_small():
    """To name the class of 9 of 10 images gives 10%: an error of 10% is no better."""
    test = pictures([10] * 9 + [11], [0] * 9 + [1])
    assert "doubt" in measure({10: 0, 11: 0}, test=test)
    assert "doubt" not in measure({10: 0, 11: 1}, test=test)
    one_class = pictures([10] * 4, [0] * 4)  # nothing can be told from it
    assert "doubt" not in measure({10: 1}, test=one_class)
