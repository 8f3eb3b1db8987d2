"""Small generators and discriminators of every kind."""

from __future__ import annotations

import torch

from lfmcw_app.generators import (
    ConditionalBigGAN,
    ConditionalDCGAN,
    ConditionalWGANGP,
    Discriminator,
)
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.supernet import Architecture, Supernet

GRAY = {"image_channels": 1, "mean": (0.5,), "std": (0.25,)}

COLOUR = {"image_channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}

PAPER_OPTIONS = {
    "shared_dim": 3,
    "hierarchical": True,
    "noise_dim": 8,
    "initialization": "orthogonal",
}

OPTIONS = {
    "dcgan": (ConditionalDCGAN, {}),
    "wgan_gp": (ConditionalWGANGP, {}),
    "biggan": (ConditionalBigGAN, {}),
    "biggan-paper": (ConditionalBigGAN, {**PAPER_OPTIONS, "attention": 8}),
}


def make_generator(kind, *, classes=4, size=8, **changes):
    cls, options = OPTIONS[kind]
    settings = {"noise_dim": 6, "channels": 2, **GRAY, **options, **changes}
    return cls(num_classes=classes, image_size=size, **settings)


def make_trunk(norm, *, activation="relu"):
    style = OperationStyle(norm=norm, activation=activation)
    primitives = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3")
    trunk = Supernet(
        in_channels=1,
        num_classes=4,
        channels=4,
        layers=3,
        nodes=1,
        primitives=primitives,
        style=style,
    )
    return trunk, Architecture(1, primitives, scale=0.5)


def make_discriminator(norm="group", *, head="flatten", spectral_norm="none"):
    trunk, arch = make_trunk(norm)
    return Discriminator(
        trunk, num_classes=4, feature_size=2, head=head, spectral_norm=spectral_norm
    ), arch


def largest_singular_value(weight):
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2))
