"""The layers before the cells: one convolution on small images, three of stride 2 on large ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from lfmcw_app.search_space.layers import OperationStyle

__all__ = ["image_divisor", "make_stem"]


def image_divisor(kind: Literal["cifar", "imagenet"]) -> int:
    """The number by which height and width of images must be divisible.

    The two reduction cells halve the resolution, and so does each of the three convolutions of the
    stem for ImageNet.
    """
    return 4 if kind == "cifar" else 32


def make_stem(
    kind: Literal["cifar", "imagenet"], in_channels: int, width: int, style: OperationStyle
) -> tuple[nn.Module, nn.Module]:
    """Builds the two stems, which make the inputs of the first cell.

    The second one reads the output of the first.

    Args:
        kind: "cifar" keeps the resolution, and both inputs are equal. "imagenet" gives a quarter
            and an eighth of it, so that the first cell has to reduce its first input.
        in_channels: channels of an image.
        width: channels of both inputs.
        style: norms, which are always affine here, and activation.

    Raises:
        ValueError: if the kind is unknown.

    Reference: for ImageNet, Liu et al., DARTS (2019), appendix A.3, and Xu et al., PC-DARTS (2020),
        section 4.3.
    """
    style = replace(style, affine=True)

    def convolution(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            style.make_norm(channels_out),
        ]

    # For CIFAR both inputs of the first cell are the same maps.
    if kind == "cifar":
        return nn.Sequential(*convolution(in_channels, width, 1)), nn.Identity()
    if kind != "imagenet":
        raise ValueError(f"The stem must be 'cifar' or 'imagenet', got {kind!r}.")
    first = [
        *convolution(in_channels, width // 2, 2),
        style.make_activation(),
        *convolution(width // 2, width, 2),
    ]
    second = [style.make_activation(), *convolution(width, width, 2)]
    return nn.Sequential(*first), nn.Sequential(*second)
