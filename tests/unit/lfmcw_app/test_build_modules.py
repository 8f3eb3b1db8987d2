"""The modules of the problems of a search."""

from __future__ import annotations

import math

import pytest
import torch

from lfmcw_app.build_modules import WeightedLearner
from lfmcw_app.search_space.supernet import Supernet


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
