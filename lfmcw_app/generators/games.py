"""The games by name: a generator, its loss, and the discriminator that belongs to them.

A new one is one entry of `GAMES`, here or in another package (docs/adding-an-operation.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lfmcw_app.generators.adversarial import AdversarialLoss, hinge, non_saturating, wasserstein_gp
from lfmcw_app.generators.base import ImageGenerator
from lfmcw_app.generators.biggan import ConditionalBigGAN
from lfmcw_app.generators.dcgan import ConditionalDCGAN
from lfmcw_app.generators.discriminator import SpectralNorm
from lfmcw_app.generators.wgan_gp import ConditionalWGANGP
from lfmcw_app.plugins import Table
from lfmcw_app.search_space.layers import Norm

__all__ = ["GAMES", "REAL", "Game", "register_generator"]

REAL = "real"
"""The name for no game: real images that the search does not use replace the generated ones."""


@dataclass(frozen=True, kw_only=True)
class Game:
    """A generator with its loss and its discriminator's design.

    Attributes:
        generator: its class; all take num_classes, image_size, image_channels, mean, std, noise_dim
            and channels.
        loss: the adversarial loss.
        head: the discriminator's head.
        spectral_norm: of the discriminator, for a trunk with the first of `trunk_norms`.
        trunk_norms: the norms that the discriminator's trunk may have, the recommended one first.
        coin_loss: the discriminator's loss if it cannot tell real from generated images; None if
            there is no such value.
        penalizes_gradient: whether the loss contains a gradient of the discriminator, which
            therefore cannot be compiled.
    """

    generator: Callable[..., ImageGenerator]
    loss: AdversarialLoss
    head: Literal["flatten", "sum"]
    spectral_norm: SpectralNorm
    trunk_norms: tuple[Norm, ...]
    coin_loss: float | None
    penalizes_gradient: bool = False


GAMES: Table[Game] = Table(
    "generator",
    "lfmcw_app.generators",
    Game,
    {
        "dcgan": Game(
            generator=ConditionalDCGAN,
            loss=non_saturating,
            head="flatten",
            spectral_norm="none",
            trunk_norms=("group", "instance", "batch"),
            coin_loss=2.0 * math.log(2.0),
        ),
        # DCGAN's game with the residual generator of WGAN-GP, whose norms know the class.
        "resnet": Game(
            generator=ConditionalWGANGP,
            loss=non_saturating,
            head="flatten",
            spectral_norm="none",
            trunk_norms=("group", "instance", "batch"),
            coin_loss=2.0 * math.log(2.0),
        ),
        "wgan_gp": Game(
            generator=ConditionalWGANGP,
            loss=wasserstein_gp,
            head="flatten",
            spectral_norm="none",
            trunk_norms=("group", "instance", "none"),
            coin_loss=None,
            penalizes_gradient=True,
        ),
        "biggan": Game(
            generator=ConditionalBigGAN,
            loss=hinge,
            head="sum",
            spectral_norm="all",
            trunk_norms=("none", "group", "instance"),
            coin_loss=2.0,
        ),
    },
)
"""Name → game."""

register_generator = GAMES.register
