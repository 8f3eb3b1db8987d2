"""Class-conditional image generators, their discriminator, and the games between them."""

from lfmcw_app.generators.adversarial import (
    AdversarialLoss,
    PlayerLosses,
    check_per_image,
    gradient_penalty,
    hinge,
    non_saturating,
    wasserstein_gp,
)
from lfmcw_app.generators.base import ImageGenerator
from lfmcw_app.generators.biggan import ConditionalBigGAN
from lfmcw_app.generators.dcgan import ConditionalDCGAN
from lfmcw_app.generators.discriminator import Discriminator
from lfmcw_app.generators.games import GAMES, REAL, Game, register_generator
from lfmcw_app.generators.wgan_gp import ConditionalWGANGP

__all__ = [
    "GAMES",
    "REAL",
    "AdversarialLoss",
    "ConditionalBigGAN",
    "ConditionalDCGAN",
    "ConditionalWGANGP",
    "Discriminator",
    "Game",
    "ImageGenerator",
    "PlayerLosses",
    "check_per_image",
    "gradient_penalty",
    "hinge",
    "non_saturating",
    "register_generator",
    "wasserstein_gp",
]
