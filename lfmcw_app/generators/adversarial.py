"""The games of a generator and a discriminator: each loss is differentiated in its own player's weights only.

One pass of the discriminator on the generated images serves both players. Nothing is detached: engines for games need the
derivative of each player's gradient in the other's weights. Each loss first calls the generator's `track`, which averages
weights: with accumulated batches, once a batch.
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
from mlo.distributed import processes, shard

__all__ = ["AdversarialLoss", "check_per_image", "gradient_penalty", "hinge", "non_saturating", "wasserstein_gp"]

AdversarialLoss = Callable[
    [nn.Module, ImageGenerator, Tensor, Tensor, MixingWeights], tuple[dict[str, Tensor], dict[str, Any]]
]
"""(discriminator, generator, real images [B, C, H, W], their labels [B], mixing) → (player → scalar, metrics).

The discriminator maps (images, labels, mixing) to scores [B]; the players are "generator" and "discriminator".
"""

PENALTY = 10.0
"""λ of the gradient penalty (Gulrajani et al., section 4)."""


def non_saturating(
    discriminator: nn.Module, generator: ImageGenerator, images: Tensor, labels: Tensor, mixing: MixingWeights
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The logistic game: D minimises -log σ(D(x)) - log(1 - σ(D(x̂))), G minimises -log σ(D(x̂)).

    Reference: Goodfellow et al., GAN (2014), section 3.
    """
    real, fake, _ = _scores(discriminator, generator, images, labels, mixing)
    losses = {
        "generator": F.softplus(-fake).mean(),
        "discriminator": F.softplus(-real).mean() + F.softplus(fake).mean(),
    }
    return losses, _metrics(real, fake)


def hinge(
    discriminator: nn.Module, generator: ImageGenerator, images: Tensor, labels: Tensor, mixing: MixingWeights
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """BigGAN's game: D minimises max(0, 1 - D(x)) + max(0, 1 + D(x̂)), G minimises -D(x̂).

    Reference: Lim and Ye, geometric GAN (2017); Miyato et al. (2018), Eqs. 16-17; Brock et al., BigGAN (2019).
    """
    real, fake, _ = _scores(discriminator, generator, images, labels, mixing)
    losses = {"generator": -fake.mean(), "discriminator": F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()}
    return losses, _metrics(real, fake)


def wasserstein_gp(
    discriminator: nn.Module, generator: ImageGenerator, images: Tensor, labels: Tensor, mixing: MixingWeights
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """WGAN-GP's game: D minimises D(x̂) - D(x) + λ · `gradient_penalty` with λ = 10, G minimises -D(x̂).

    Raises:
        InputError: for a discriminator with BatchNorm.

    Reference: Gulrajani et al., Improved Training of Wasserstein GANs (2017), Eq. 3.
    """
    check_per_image(discriminator)
    real, fake, generated = _scores(discriminator, generator, images, labels, mixing)
    penalty = gradient_penalty(lambda x: discriminator(x, labels, mixing), images, generated)
    losses = {"generator": -fake.mean(), "discriminator": fake.mean() - real.mean() + PENALTY * penalty}
    return losses, _metrics(real, fake) | {"gradient_penalty": penalty}


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, generated: Tensor) -> Tensor:
    """The mean of (‖∇_x D(x)‖₂ - 1)² over points drawn evenly between real and generated images.

    It keeps its graph: the discriminator's gradient of it is a second derivative, and a hypergradient a third.

    Args:
        critic: images [B, C, H, W] → scores [B], each of its own image only.
        real: real images [B, C, H, W].
        generated: generated images [B, C, H, W], the b-th of the same class as the b-th real one.

    Returns:
        a scalar, differentiable in the critic's weights and in `generated`.

    Reference: Gulrajani et al., Improved Training of Wasserstein GANs (2017), Eq. 3 and algorithm 1.
    """
    # Drawn for the whole batch, as a generator's noise is.
    share = shard(torch.rand(len(real) * processes()[1], 1, 1, 1, device=real.device, dtype=real.dtype))
    between = share * real + (1.0 - share) * generated
    if not between.requires_grad:
        between.requires_grad_()
    # The scores are of single images, so the gradient of their sum holds the gradient of each.
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    squared = slope.flatten(1).square().sum(1)
    # √ has no derivative at 0, where a critic with dead ReLUs can be: such an image counts 1 and asks for nothing.
    flat = squared == 0
    norm = torch.where(flat, 0.0, torch.where(flat, 1.0, squared).sqrt())
    return (norm - 1.0).square().mean()


def check_per_image(discriminator: nn.Module) -> None:
    """Refuses a discriminator for the gradient penalty whose score of an image depends on others of the batch.

    Raises:
        InputError: saying what to use.
    """
    if mixes_the_batch(discriminator):
        raise InputError(
            "WGAN-GP's gradient penalty bounds the slope of the score of each single image, and a discriminator with "
            "BatchNorm scores an image by the others of its batch. Build its trunk with group or instance norm, or without "
            "norm."
        )


def _scores(
    discriminator: nn.Module, generator: ImageGenerator, images: Tensor, labels: Tensor, mixing: MixingWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the scores [B] of the real and of as many generated images, and the generated images."""
    generator.track()
    real = discriminator(images, labels, mixing)
    generated = generator.sample(labels)
    return real, discriminator(generated, labels, mixing), generated


def _metrics(real: Tensor, fake: Tensor) -> dict[str, Any]:
    return {"real_score": real.mean(), "fake_score": fake.mean()}
