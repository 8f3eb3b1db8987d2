"""The class-weighted losses, the class weights of W2, the generator and the discriminator."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lfmcw_app.data import load_dataset
from lfmcw_app.generators import ConditionalDCGAN
from lfmcw_app.modules import WeightedLearner, build_modules
from lfmcw_app.ops import class_weighted_cross_entropy, classwise_cross_entropy
from lfmcw_app.problems import make_gan_loss
from lfmcw_app.recipe import load_recipe
from lfmcw_app.search_space.supernet import Supernet
from mlo.testing import evaluated


def test_classwise_cross_entropy_is_the_mean_of_each_class():
    logits = torch.randn(9, 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])
    means, counts = classwise_cross_entropy(logits, labels)
    assert counts.tolist() == [3, 2, 0, 4]
    for label in (0, 1, 3):
        expected = F.cross_entropy(logits[labels == label], labels[labels == label])
        assert torch.allclose(means[label], expected)
    assert means[2] == 0


def test_the_losses_are_twice_differentiable_in_all_they_take():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    class_weights = torch.rand(3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 2, 0, 0])

    def weighted(x, w):
        return class_weighted_cross_entropy(x, labels, w)

    def by_class(x):
        return classwise_cross_entropy(x, labels)[0]

    assert torch.autograd.gradcheck(weighted, (logits, class_weights))
    assert torch.autograd.gradgradcheck(weighted, (logits, class_weights))
    assert torch.autograd.gradcheck(by_class, (logits,))
    assert torch.autograd.gradgradcheck(by_class, (logits,))


def test_the_size_of_the_class_weights_matters():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    ones = torch.ones(3)
    plain = F.cross_entropy(logits, labels)
    assert torch.allclose(class_weighted_cross_entropy(logits, labels, ones), plain)
    assert torch.allclose(class_weighted_cross_entropy(logits, labels, 3 * ones), 3 * plain)


def learner(classes=3):
    return WeightedLearner(
        Supernet(in_channels=1, num_classes=classes, channels=2, layers=3, nodes=1), classes
    )


def test_a_class_missing_from_the_batch_takes_its_running_loss_as_a_constant():
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


@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_the_generator_draws_images_of_the_data_sets_size_in_its_range(size):
    generator = ConditionalDCGAN(
        num_classes=10,
        image_size=size,
        image_channels=3,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        channels=4,
    )
    images = generator.sample(torch.arange(10))
    assert images.shape == (10, 3, size, size)
    assert float(images.detach().abs().max()) <= 2.0  # (1 - mean) / std


def gan_parts():
    torch.manual_seed(0)
    modules = build_modules(load_recipe("smoke").search, load_dataset("digits"))
    return modules, (torch.randn(8, 1, 8, 8), torch.arange(8))


def test_the_discriminator_has_the_searched_architecture():
    """Its scores depend on A, through the same α as the classifiers'."""
    modules, (images, labels) = gan_parts()
    score = modules.gan.discriminator(images, labels, modules.arch()).sum()
    grads = torch.autograd.grad(score, [modules.arch.normal, modules.arch.reduction])
    assert all(bool(g.abs().sum() > 0) for g in grads)
    assert not any("arch" in name or "normal" in name for name, _ in modules.gan.named_parameters())


def test_each_player_goes_down_its_own_loss():
    modules, batch = gan_parts()
    losses, _ = evaluated(*make_gan_loss("dcgan")(modules.gan, batch, arch=modules.arch))
    fake_up = torch.autograd.grad(
        losses["generator"], list(modules.gan.generator.parameters()), retain_graph=True
    )
    assert any(bool(g.abs().sum() > 0) for g in fake_up)
    before = {name: float(loss.detach()) for name, loss in losses.items()}
    for player in ("generator", "discriminator"):
        modules, batch = gan_parts()
        torch.manual_seed(1)
        losses, _ = evaluated(*make_gan_loss("dcgan")(modules.gan, batch, arch=modules.arch))
        params = list(getattr(modules.gan, player).parameters())
        grads = torch.autograd.grad(losses[player], params, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                if g is not None:
                    p -= 1e-2 * g
        torch.manual_seed(1)
        after, _ = evaluated(*make_gan_loss("dcgan")(modules.gan, batch, arch=modules.arch))
        assert float(after[player]) < float(losses[player])
    assert set(before) == {"generator", "discriminator"}
