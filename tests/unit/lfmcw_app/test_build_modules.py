"""The modules of the problems of a search."""

from __future__ import annotations

import math

import pytest
import torch

from lfmcw_app.build_modules import WeightedLearner, generator_for
from lfmcw_app.errors import InputError
from lfmcw_app.generators import GAMES, Game, ImageGenerator, hinge
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.supernet import Supernet
from lfmcw_app.testing import noise_dataset


def learner(classes=3):
    return WeightedLearner(
        Supernet(in_channels=1, num_classes=classes, channels=2, layers=3, nodes=1), classes
    )


def test_a_missing_class_takes_its_running_loss():
    """A class missing from the batch takes its running loss as a constant."""
    w2 = learner()
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    weights = w2.class_weights(logits, labels)
    assert float(weights[2].detach()) == pytest.approx(math.log(3))  # never seen: a uniform guess
    means = weights.detach().clone()
    (grad,) = torch.autograd.grad(weights[2], logits, retain_graph=True, allow_unused=True)
    assert grad is None or not grad.any()
    assert torch.autograd.grad(weights[0], logits)[0].any()
    # Next batch: class 0 is missing now and takes what it had; class 1 moves by a tenth.
    second = w2.class_weights(torch.zeros(2, 3), torch.tensor([1, 2]))
    assert second[0] == pytest.approx(float(means[0]))
    assert w2.class_losses[1] == pytest.approx(0.9 * float(means[1]) + 0.1 * math.log(3), rel=1e-5)
    assert bool(w2.seen.all())


def test_a_missing_class_can_count_nothing():
    assert learner().class_weights(torch.randn(2, 3), torch.tensor([0, 1]), "zero")[2] == 0


def test_class_weights_follow_the_class_losses():
    """The class that W1 gets wrong weighs most."""
    logits = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [4.0, 0, 0]])
    weights = learner().class_weights(logits, torch.tensor([0, 1, 2]))
    assert int(weights.argmax()) == 2
    assert float(weights[2]) > 10 * float(weights[:2].max())


def test_a_missing_class_can_take_the_mean_of_the_others():
    """A missing class can take the mean of the others differentiably."""
    w2 = WeightedLearner(Supernet(in_channels=1, num_classes=4, channels=2, layers=3, nodes=1), 4)
    logits = torch.randn(5, 4, requires_grad=True)
    weights = w2.class_weights(logits, torch.tensor([0, 0, 0, 1, 3]), "batch_mean")
    assert float(weights[2].detach()) == pytest.approx(float(weights[[0, 1, 3]].detach().mean()))
    (grad,) = torch.autograd.grad(weights[2], logits, retain_graph=True)
    (expected,) = torch.autograd.grad(weights[[0, 1, 3]].mean(), logits)
    assert torch.allclose(grad, expected)


# ------------------------------ generators of other packages


class Squares(ImageGenerator):
    """Images of one value, of a size of their own."""

    def __init__(self, value, size, **shared):
        super().__init__(**shared)
        self.value, self.made = torch.nn.Parameter(torch.tensor(value)), size

    def pixels(self, noise, labels):
        return self.value.expand(len(labels), *self.made)


@pytest.fixture
def generator_of(monkeypatch):
    monkeypatch.setattr(GAMES, "_entries", dict(GAMES._entries))

    def make(value, size):
        def squares(*, channels, image_size, num_classes, **shared):
            return Squares(value, size, **shared)

        game = Game(
            generator=squares, loss=hinge, head="flatten", spectral_norm="none",
            trunk_norms=("group",), coin_loss=None,
        )  # fmt: skip
        GAMES.register("squares", game)
        how = load_recipe("smoke", overrides={"search.generator.name": "squares"}).search.generator
        return generator_for(how, noise_dataset(size=8, channels=3))

    return make


def test_a_generator_of_the_datas_images_is_taken(generator_of):
    before = torch.get_rng_state()
    assert isinstance(generator_of(-1.0, (3, 8, 8)), Squares)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("value", "size", "why"),
    [
        (0.5, (1, 8, 8), r"draws \[2, 1, 8, 8\] for 2 labels.* \[2, 3, 8, 8\]"),
        (0.5, (3, 16, 16), r"draws \[2, 3, 16, 16\]"),
        (255.0, (3, 8, 8), r"draws values of up to 255\..* torch\.tanh"),
        (math.nan, (3, 8, 8), "draws values of up to nan"),
    ],
)
def test_a_generator_of_other_images_is_refused(value, size, why, generator_of):
    """Networks take images of any size, and one channel stands for three by broadcasting."""
    with pytest.raises(InputError, match=f"The generator 'squares' {why}"):
        generator_of(value, size)
