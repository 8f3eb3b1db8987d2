"""The supernet: a stack of cells whose edges mix all primitives by the architecture's weights, and the architecture α."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lfmcw_app.search_space.cell import Cell, edge_count
from lfmcw_app.search_space.operations import PRIMITIVES, OperationStyle

__all__ = ["Architecture", "MixingWeights", "Supernet", "reduction_layers"]


class MixingWeights(NamedTuple):
    """The architecture as the cells read it: softmax(α), [edges, primitives], of the two kinds of cell."""

    normal: Tensor
    reduction: Tensor


class Architecture(nn.Module):
    """The architecture A: the logits α of the two kinds of cell, one row an edge and one column a primitive.

    Args:
        nodes: intermediate nodes of a cell.
        primitives: names of the candidate operations.
        scale: standard deviation of the initial values (DARTS: 1e-3).
    """

    def __init__(self, nodes: int = 4, primitives: Sequence[str] = PRIMITIVES, scale: float = 1e-3) -> None:
        super().__init__()
        self.primitives = tuple(primitives)
        self.nodes = nodes
        shape = (edge_count(nodes), len(self.primitives))
        self.normal = nn.Parameter(scale * torch.randn(shape))
        self.reduction = nn.Parameter(scale * torch.randn(shape))

    def forward(self) -> MixingWeights:
        """Returns softmax(α) over the primitives of each edge."""
        return MixingWeights(normal=self.normal.softmax(dim=-1), reduction=self.reduction.softmax(dim=-1))


def reduction_layers(layers: int) -> tuple[int, int]:
    """Positions of the two cells that halve the resolution and double the channels: ⌊L/3⌋ and ⌊2L/3⌋."""
    return layers // 3, 2 * layers // 3


class Supernet(nn.Module):
    """A stack of cells over a stem, with a linear classifier; it holds weights only, the architecture is an argument.

    Args:
        in_channels: channels of an image.
        num_classes: size of the logits.
        channels: channels of a node in the first cell.
        layers: number of cells.
        nodes: intermediate nodes of a cell.
        primitives: names of the candidate operations.
        style: norms and activation.
        stem_multiplier: the stem has stem_multiplier · channels channels.

    Reference: Liu et al., DARTS (2019), section 3.1.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        channels: int = 16,
        layers: int = 8,
        nodes: int = 4,
        primitives: Sequence[str] = PRIMITIVES,
        style: OperationStyle | None = None,
        stem_multiplier: int = 3,
    ) -> None:
        super().__init__()
        style = style or OperationStyle()
        width = stem_multiplier * channels
        stem_style = OperationStyle(norm=style.norm, affine=True)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), stem_style.make_norm(width))
        self.cells = nn.ModuleList()
        before, reduced_before = (width, width), False
        for layer in range(layers):
            reduces = layer in reduction_layers(layers)
            channels *= 2 if reduces else 1
            self.cells.append(
                Cell(
                    before,
                    channels,
                    nodes=nodes,
                    reduces=reduces,
                    reduced_before=reduced_before,
                    primitives=primitives,
                    style=style,
                )
            )
            before, reduced_before = (before[1], nodes * channels), reduces
        self.out_channels = before[1]
        self.classifier: nn.Module = nn.Linear(self.out_channels, num_classes)

    def features(self, images: Tensor, mixing: MixingWeights) -> Tensor:
        """Returns the last cell's output, [B, out_channels, H/4, W/4]."""
        last: Tensor = self.stem(images)
        before_last = last
        for cell in self.cells:
            weights = mixing.reduction if cell.reduces else mixing.normal
            before_last, last = last, cell(before_last, last, weights)
        return last

    def forward(self, images: Tensor, mixing: MixingWeights) -> Tensor:
        """Returns logits [B, num_classes] of `images` [B, C, H, W]."""
        logits: Tensor = self.classifier(self.features(images, mixing).mean(dim=(2, 3)))
        return logits
