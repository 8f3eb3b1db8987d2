"""The games of a generator and a discriminator, as one loss per player.

Each loss is differentiated in its own player's weights only.

One pass of the discriminator on the generated images serves both players. A function computes what
only the discriminator's loss needs, so that evaluating the generator's loss alone does not compute
it. Nothing is detached, because engines for games need the derivative of each player's gradient in
the other's weights. Each loss first calls the generator's `track`, which averages weights: with
accumulated batches, once per batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.errors import InputError
from lfmcw_app.generators.base import ImageGenerator
from lfmcw_app.generators.discriminator import mixes_the_batch
from lfmcw_app.search_space.supernet import MixingWeights
from mlo.distributed import rank_and_size, shard

__all__ = [
    "AdversarialLoss",
    "PlayerLosses",
    "check_per_image",
    "gradient_penalty",
    "hinge",
    "non_saturating",
    "wasserstein_gp",
]

PlayerTerms = dict[str, Tensor | Callable[[], tuple[Tensor, dict[str, Any]]]]
"""Player → its loss, a scalar, or a function that returns it with metrics."""

PlayerLosses = tuple[PlayerTerms, dict[str, Any]]
"""The players' losses, and metrics."""

AdversarialLoss = Callable[[nn.Module, ImageGenerator, Tensor, Tensor, MixingWeights], PlayerLosses]
"""(discriminator, generator, real images [B, C, H, W], their labels [B], mixing) → losses.

The discriminator maps (images, labels, mixing) to scores [B]. The players are "generator" and
"discriminator".
"""

PENALTY = 10.0
"""λ of the gradient penalty (Gulrajani et al., section 4)."""


def non_saturating(
    discriminator: nn.Module,
    generator: ImageGenerator,
    images: Tensor,
    labels: Tensor,
    mixing: MixingWeights,
) -> PlayerLosses:
    """The logistic game: D minimises -log σ(D(x)) - log(1 - σ(D(x̂))), G minimises -log σ(D(x̂)).

    Reference: Goodfellow et al., GAN (2014), section 3.
    """
    fake, _ = _generated_scores(discriminator, generator, labels, mixing)

    def discriminator_loss() -> tuple[Tensor, dict[str, Any]]:
        real = discriminator(images, labels, mixing)
        return F.softplus(-real).mean() + F.softplus(fake).mean(), {"real_score": real.mean()}

    losses: PlayerTerms = {
        "generator": F.softplus(-fake).mean(),
        "discriminator": discriminator_loss,
    }
    return losses, {"fake_score": fake.mean()}


def hinge(
    discriminator: nn.Module,
    generator: ImageGenerator,
    images: Tensor,
    labels: Tensor,
    mixing: MixingWeights,
) -> PlayerLosses:
    """BigGAN's game: D minimises max(0, 1 - D(x)) + max(0, 1 + D(x̂)), G minimises -D(x̂).

    Reference: Lim and Ye, geometric GAN (2017); Miyato et al. (2018), Eqs. 16-17; Brock et al.,
    BigGAN (2019).
    """
    fake, _ = _generated_scores(discriminator, generator, labels, mixing)

    def discriminator_loss() -> tuple[Tensor, dict[str, Any]]:
        real = discriminator(images, labels, mixing)
        return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean(), {"real_score": real.mean()}

    losses: PlayerTerms = {"generator": -fake.mean(), "discriminator": discriminator_loss}
    return losses, {"fake_score": fake.mean()}


def wasserstein_gp(
    discriminator: nn.Module,
    generator: ImageGenerator,
    images: Tensor,
    labels: Tensor,
    mixing: MixingWeights,
) -> PlayerLosses:
    """WGAN-GP's game: D minimises D(x̂) - D(x) + 10 · `gradient_penalty`, G minimises -D(x̂).

    Raises:
        InputError: for a discriminator with BatchNorm.

    Reference: Gulrajani et al., Improved Training of Wasserstein GANs (2017), Eq. 3.
    """
    check_per_image(discriminator)
    fake, generated = _generated_scores(discriminator, generator, labels, mixing)

    def discriminator_loss() -> tuple[Tensor, dict[str, Any]]:
        real = discriminator(images, labels, mixing)
        penalty = gradient_penalty(lambda x: discriminator(x, labels, mixing), images, generated)
        metrics = {"real_score": real.mean(), "gradient_penalty": penalty}
        return fake.mean() - real.mean() + PENALTY * penalty, metrics

    losses: PlayerTerms = {"generator": -fake.mean(), "discriminator": discriminator_loss}
    return losses, {"fake_score": fake.mean()}


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, generated: Tensor) -> Tensor:
    """The mean of (‖∇_x D(x)‖₂ - 1)² over points drawn evenly between real and generated images.

    It keeps its graph: the discriminator's gradient of it is a second derivative, and a
    hypergradient takes a third.

    Args:
        critic: images [B, C, H, W] → scores [B], each of its own image only.
        real: real images [B, C, H, W].
        generated: generated images [B, C, H, W], the b-th of the same class as the b-th real one.

    Returns:
        a scalar, differentiable in the critic's weights and in `generated`.

    Reference: Gulrajani et al., Improved Training of Wasserstein GANs (2017), Eq. 3, algorithm 1.
    """
    # Drawn for the whole batch, as a generator's noise is.
    count = len(real) * rank_and_size(of_loss=True)[1]
    share = shard(torch.rand(count, 1, 1, 1, device=real.device, dtype=real.dtype))
    between = share * real + (1.0 - share) * generated
    if not between.requires_grad:
        between.requires_grad_()

    # The scores are of single images, so the gradient of their sum holds the gradient of each.
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    squared = slope.flatten(1).square().sum(1)

    # √ has no derivative at 0, which a critic with dead ReLUs can reach. Such an image contributes
    # 1, and no gradient.
    flat = squared == 0
    norm = torch.where(flat, 0.0, torch.where(flat, 1.0, squared).sqrt())
    return (norm - 1.0).square().mean()


def check_per_image(discriminator: nn.Module) -> None:
    """Refuses a discriminator whose score of an image depends on other images of its batch.

    The gradient penalty is not defined for it.

    Raises:
        InputError: saying what to use.
    """
    if mixes_the_batch(discriminator):
        raise InputError(
            "WGAN-GP's gradient penalty bounds the slope of the score of each single image, but "
            "with BatchNorm a discriminator's score of an image depends on the others of its "
            "batch. Build its trunk with group or instance norm, or without norm."
        )


def _generated_scores(
    discriminator: nn.Module, generator: ImageGenerator, labels: Tensor, mixing: MixingWeights
) -> tuple[Tensor, Tensor]:
    """Returns the scores [B] of generated images of the classes `labels`, and these images."""
    generator.track()
    generated = generator.sample(labels)
    return discriminator(generated, labels, mixing), generated
