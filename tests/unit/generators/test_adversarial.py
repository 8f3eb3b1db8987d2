"""The adversarial losses."""

from __future__ import annotations

import math

import pytest
import torch
from generator_cases import make_discriminator, make_generator
from torch import nn

from lfmcw_app.errors import InputError
from lfmcw_app.generators import gradient_penalty, hinge, non_saturating, wasserstein_gp
from mlo.testing import evaluated


class LinearCritic(nn.Module):
    """D(x) = ⟨w, x⟩, whose slope is w everywhere."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1, 8, 8), slope / 8.0, dtype=torch.float64))

    def forward(self, images, labels, mixing):
        return (images * self.slope).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("slope", [0.0, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic(slope):
    """The penalty of a linear critic is the square of its slope minus one."""
    critic = LinearCritic(slope)
    real, generated = (torch.randn(5, 1, 8, 8, dtype=torch.float64) for _ in range(2))
    penalty = gradient_penalty(lambda x: critic(x, None, None), real, generated)
    assert float(penalty.detach()) == pytest.approx((slope - 1.0) ** 2)
    (grad,) = torch.autograd.grad(penalty, critic.slope)
    # d (‖w‖ - 1)² / dw = 2 (‖w‖ - 1) w / ‖w‖, and w / ‖w‖ is 1/8 in every entry; at w = 0 nothing
    # is asked for.
    expected = 2.0 * (slope - 1.0) / 8.0 if slope else 0.0
    assert torch.allclose(grad, torch.full_like(grad, expected))


def test_the_penalty_is_taken_between_two_images():
    """The penalty is taken between each real image and its generated one."""
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    gradient_penalty(critic, torch.zeros(200, 1, 2, 2), torch.ones(200, 1, 2, 2))
    # An image has one share.
    assert bool((seen[0].flatten(1).amax(1) == seen[0].flatten(1).amin(1)).all())
    assert 0.0 <= float(seen[0].min()) < 0.1
    assert 0.9 < float(seen[0].max()) <= 1.0


def test_the_penalty_is_differentiable_in_the_generated_images():
    """Engines for games need the derivative of the critic's gradient in the generator's weights."""
    real, generated = (
        torch.randn(3, 1, 2, 2, dtype=torch.float64),
        torch.randn(3, 1, 2, 2, dtype=torch.float64),
    )
    critic = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 1)).double()

    def penalty(x):
        torch.manual_seed(0)
        return gradient_penalty(lambda between: critic(between).squeeze(1), real, x)

    assert torch.autograd.gradcheck(penalty, (generated.requires_grad_(),))
    assert torch.autograd.gradgradcheck(penalty, (generated,))


class ScoresOf(nn.Module):
    """A discriminator with given scores of the images `real`, and of all others."""

    def __init__(self, images, real, fake):
        super().__init__()
        self.images, self.real, self.fake = images, real, fake

    def forward(self, images, labels, mixing):
        return self.real if images is self.images else self.fake


def test_the_losses_are_their_formulas():
    real, fake, images, labels = (
        [0.5, -2.0],
        [0.25, 3.0],
        torch.randn(2, 1, 8, 8),
        torch.tensor([0, 1]),
    )

    def players(loss):
        critic = ScoresOf(images, torch.tensor(real), torch.tensor(fake))
        losses, metrics = evaluated(*loss(critic, make_generator("dcgan"), images, labels, None))
        assert float(metrics["real_score"]) == pytest.approx(sum(real) / 2)
        assert float(metrics["fake_score"]) == pytest.approx(sum(fake) / 2)
        return {player: float(value) for player, value in losses.items()}

    def log1pexp(x):
        return math.log1p(math.exp(x))

    assert players(hinge) == pytest.approx(
        {"generator": -3.25 / 2, "discriminator": (0.5 + 3.0) / 2 + (1.25 + 4.0) / 2}
    )
    assert players(non_saturating) == pytest.approx(
        {
            "generator": sum(log1pexp(-s) for s in fake) / 2,
            "discriminator": sum(log1pexp(-s) for s in real) / 2
            + sum(log1pexp(s) for s in fake) / 2,
        }
    )


def test_the_wasserstein_loss_weighs_the_penalty_by_ten():
    critic, generator = LinearCritic(3.0), make_generator("wgan_gp").double()
    images, labels = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)
    losses, metrics = evaluated(*wasserstein_gp(critic, generator, images, labels, None))
    assert float(metrics["gradient_penalty"].detach()) == pytest.approx(4.0)
    distance = float((metrics["real_score"] - metrics["fake_score"]).detach())
    assert float(losses["discriminator"].detach()) == pytest.approx(40.0 - distance)
    assert float(losses["generator"].detach()) == pytest.approx(
        -float(metrics["fake_score"].detach())
    )


def test_a_critic_with_batch_norm_is_refused():
    discriminator, arch = make_discriminator("batch")
    with pytest.raises(InputError, match="each single image"):
        wasserstein_gp(
            discriminator,
            make_generator("wgan_gp"),
            torch.randn(4, 1, 8, 8),
            torch.arange(4),
            arch(),
        )
