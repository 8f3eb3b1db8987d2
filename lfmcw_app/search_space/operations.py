"""The primitives: the candidate operations of edges, and what the program knows about each.

A new one is one entry of `PRIMITIVES`, here or by `register_primitive` in a package of one's own
(docs/adding-an-operation.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from lfmcw_app.plugins import Table
from lfmcw_app.search_space.batched_operations import (
    Bank,
    ConvolutionBank,
    FullConvolutionBank,
    LayerBank,
    ReduceBank,
    SharedMaps,
    pooled,
)
from lfmcw_app.search_space.layers import (
    FactorizedReduce,
    GaussianNoise,
    OperationStyle,
    dilated,
    pool,
    separable,
)

__all__ = [
    "DARTS_PRIMITIVES", "PRIMITIVES", "Primitive", "make_operation", "primitive_named",
    "register_primitive",
]  # fmt: skip

Layer = Callable[[int, int, OperationStyle], nn.Module]
"""(channels C, stride s, style) → the layer of one edge, [B, C, H, W] → [B, C, H/s, W/s]."""

OfSupernet = Callable[[int, int, int, OperationStyle], Bank | SharedMaps]
"""(channels, edges, stride, style) → the operation on several edges of a supernet."""


@dataclass(frozen=True, kw_only=True)
class Primitive:
    """A candidate operation.

    Attributes:
        layer: the operation on one edge; in a derived network it is the edge. None for `none`.
        supernet: the operation on several edges of a supernet: a bank, or maps that are the same
            on all edges. None makes a bank of the layer, edge by edge: correct, but not fast.
        colour: in pictures on white.
        dark_colour: in pictures on black; None is the same.
        draws: whether it draws random numbers, as dropout does: processes that share a batch then
            have a stream of their own.

    What it costs is counted from its layer (search_space/cost.py).
    """

    layer: Layer | None
    supernet: OfSupernet | None = None
    colour: str
    dark_colour: str | None = None
    draws: bool = False

    def in_supernet(
        self, channels: int, edges: int, stride: int, style: OperationStyle
    ) -> Bank | SharedMaps:
        """The operation on `edges` edges of a supernet.

        Raises:
            ValueError: for `none`, which a supernet leaves out.
        """
        if self.supernet is not None:
            return self.supernet(channels, edges, stride, style)
        if self.layer is None:
            raise ValueError("'none' is not an operation that can be evaluated.")
        return LayerBank(self.layer, channels, edges, stride, style)


def _pool(kind: Literal["max", "avg"], colour: str, dark_colour: str) -> Primitive:
    return Primitive(
        layer=lambda channels, stride, style: pool(kind, stride),
        supernet=lambda channels, edges, stride, style: pooled(kind, channels, stride, style),
        colour=colour,
        dark_colour=dark_colour,
    )


def _convolution(kernel: int, dilation: int, colour: str, dark_colour: str) -> Primitive:
    """A separable convolution, twice in a row, or a dilated one."""
    made = separable if dilation == 1 else dilated
    return Primitive(
        layer=lambda channels, stride, style: made(channels, kernel, stride, style),
        supernet=partial(ConvolutionBank, kernel, dilation),
        colour=colour,
        dark_colour=dark_colour,
    )


def _full_convolution(kernel: int, colour: str, dark_colour: str) -> Primitive:
    """Activation, full convolution, norm."""

    def layer(channels: int, stride: int, style: OperationStyle) -> nn.Module:
        return nn.Sequential(
            style.make_activation(),
            nn.Conv2d(channels, channels, kernel, stride, padding=kernel // 2, bias=False),
            style.make_norm(channels),
        )

    return Primitive(
        layer=layer,
        supernet=partial(FullConvolutionBank, kernel),
        colour=colour,
        dark_colour=dark_colour,
    )


def _skip_layer(channels: int, stride: int, style: OperationStyle) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, style)


def _skips(channels: int, edges: int, stride: int, style: OperationStyle) -> Bank | SharedMaps:
    return SharedMaps() if stride == 1 else ReduceBank(channels, edges, style)


PRIMITIVES: Table[Primitive] = Table(
    "primitive",
    "lfmcw_app.primitives",
    Primitive,
    {
        "none": Primitive(layer=None, colour="#9aa2ad", dark_colour="#77808c"),
        "max_pool_3x3": _pool("max", "#8c564b", "#d39a8d"),
        "avg_pool_3x3": _pool("avg", "#9b4f96", "#dd9bd8"),
        "skip_connect": Primitive(
            layer=_skip_layer, supernet=_skips, colour="#5d6570", dark_colour="#b4bcc6"
        ),
        "sep_conv_3x3": _convolution(3, 1, "#1f77b4", "#6db8ee"),
        "sep_conv_5x5": _convolution(5, 1, "#0b3f78", "#9ecbff"),
        "dil_conv_3x3": _convolution(3, 2, "#d65f00", "#ff9d4d"),
        "dil_conv_5x5": _convolution(5, 2, "#8a3d00", "#ffc48f"),
        "conv_3x3": _full_convolution(3, "#2c7a3f", "#7ed494"),
        "nor_conv_1x1": _full_convolution(1, "#b8860b", "#f0c75e"),
        "nor_conv_3x3": _full_convolution(3, "#2c7a3f", "#7ed494"),
        "noise": Primitive(
            layer=lambda channels, stride, style: GaussianNoise(stride),
            colour="#b00020",
            dark_colour="#ff8a9a",
            draws=True,
        ),
    },
    reserved=dir(nn.ModuleDict()),  # whose keys they are in supernets
)
"""Name → primitive. The first eight are DARTS's; nor_conv is the name in NAS-Bench-201."""

DARTS_PRIMITIVES = tuple(PRIMITIVES)[:8]
"""The candidates of DARTS, in the order of the columns of α."""

register_primitive = PRIMITIVES.register


def primitive_named(name: str) -> Primitive:
    """The primitive of a name.

    Raises:
        ValueError: for an unknown name.
    """
    return PRIMITIVES.named(name)


def make_operation(primitive: str, channels: int, stride: int, style: OperationStyle) -> nn.Module:
    """Builds a primitive other than `none` for one edge of a derived network.

    It maps [B, C, H, W] → [B, C, H / stride, W / stride].

    Raises:
        ValueError: for an unknown name, and for `none`.
    """
    layer = primitive_named(primitive).layer
    if layer is None:
        raise ValueError(f"{primitive!r} is not an operation of a derived network.")
    return layer(channels, stride, style)
