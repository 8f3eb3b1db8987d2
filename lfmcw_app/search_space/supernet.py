"""The supernet, a stack of cells that mix candidate operations, and the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.cell import Cell
from lfmcw_app.search_space.checkpointing import checkpointed
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.pcdarts import edge_softmax
from lfmcw_app.search_space.stem import make_stem

__all__ = ["Architecture", "MixingWeights", "Supernet", "reduction_layers"]


class MixingWeights(NamedTuple):
    """The architecture as the cells read it, [edges, primitives] of each kind of cell.

    A row is softmax(α), and sums to one; with edge weights it is β · softmax(α), and sums to the
    edge's weight β.
    """

    normal: Tensor
    reduction: Tensor


class Architecture(nn.Module):
    """The architecture A: per kind of cell the logits α, a row per edge, a column per primitive.

    Args:
        nodes: intermediate nodes of a cell.
        primitives: names of the candidate operations: of all edges, or (P-DARTS) of each.
        scale: standard deviation of the initial values (DARTS: 1e-3).
        edge_weights: whether there are logits β of the edges as well, one per edge (PC-DARTS).

    Attributes:
        normal: α of the normal cell, [edges, primitives].
        reduction: α of the reduction cell, [edges, primitives].
        normal_edges: β of the normal cell, [edges], or None.
        reduction_edges: β of the reduction cell, [edges], or None.
    """

    def __init__(
        self,
        nodes: int = 4,
        primitives: Sequence[str] | Candidates = DARTS_PRIMITIVES,
        scale: float = 1e-3,
        *,
        edge_weights: bool = False,
    ) -> None:
        super().__init__()
        self.primitives = primitives if isinstance(primitives, Candidates) else tuple(primitives)
        self.nodes = nodes
        candidates = as_candidates(primitives, nodes)

        def logits(*shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape))

        self.normal = logits(len(candidates.normal), len(candidates.normal[0]))
        self.reduction = logits(len(candidates.reduction), len(candidates.reduction[0]))
        self.normal_edges = logits(len(candidates.normal)) if edge_weights else None
        self.reduction_edges = logits(len(candidates.reduction)) if edge_weights else None

    def forward(self) -> MixingWeights:
        """Returns the mixing weights.

        They are a softmax of α over each edge's primitives, times one of β over each node's edges.
        """
        return MixingWeights(
            normal=self._mixing(self.normal, self.normal_edges),
            reduction=self._mixing(self.reduction, self.reduction_edges),
        )

    def _mixing(self, alpha: Tensor, beta: Tensor | None) -> Tensor:
        mixing = alpha.softmax(dim=-1)
        return mixing if beta is None else edge_softmax(beta, self.nodes).unsqueeze(1) * mixing


def reduction_layers(layers: int) -> tuple[int, int]:
    """Positions of the two cells that halve the resolution: ⌊L/3⌋ and ⌊2L/3⌋.

    They double the channels.
    """
    return layers // 3, 2 * layers // 3


class Supernet(nn.Module):
    """A stack of cells over a stem, with a linear classifier.

    It holds weights only; the architecture is an argument. Its BatchNorms keep no running
    statistics: a search never reads them, and copies and moves all buffers in each evaluation.

    Args:
        in_channels: channels of an image.
        num_classes: size of the logits.
        channels: channels of a node in the first cell.
        layers: number of cells.
        nodes: intermediate nodes of a cell.
        primitives: names of the candidate operations: of all edges, or (P-DARTS) of each.
        style: norms and activation.
        stem_multiplier: the stem has stem_multiplier · channels channels.
        stem: "cifar", or "imagenet": to an eighth of the resolution before the cells.
        partial_channels: K; the operations see the first 1 / K of a node's channels (PC-DARTS: 4,
            on ImageNet 2).
        checkpointing: whether cells are recomputed in backward passes instead of keeping
            activations: less memory, more time.

    Attributes:
        skip_drop_probability: current probability of the dropout on identities (P-DARTS); set by
            the training loop.

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
        primitives: Sequence[str] | Candidates = DARTS_PRIMITIVES,
        style: OperationStyle | None = None,
        stem_multiplier: int = 3,
        stem: Literal["cifar", "imagenet"] = "cifar",
        partial_channels: int = 1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.skip_drop_probability = 0.0
        self.checkpointing = checkpointing
        candidates = as_candidates(primitives, nodes)
        style = replace(style or OperationStyle(), running_statistics=False)
        width = stem_multiplier * channels
        self.stem, self.second_stem = make_stem(stem, in_channels, width, style)
        self.cells = nn.ModuleList()

        # A cell reads the outputs of the two cells before it, at first those of the stem; that of
        # ImageNet makes maps of two sizes, as a reduction does.
        before, reduced_before = (width, width), stem == "imagenet"
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
                    primitives=candidates.reduction if reduces else candidates.normal,
                    style=style,
                    partial_channels=partial_channels,
                )
            )
            before, reduced_before = (before[1], nodes * channels), reduces
        self.out_channels = before[1]
        self.classifier: nn.Module = nn.Linear(self.out_channels, num_classes)

    def features(self, images: Tensor, mixing: MixingWeights) -> Tensor:
        """Returns the last cell's output, [B, out_channels, H/4, W/4].

        With the ImageNet stem it is [B, out_channels, H/32, W/32].
        """
        # On a CPU, convolutions, norms and pools are several times faster on maps whose channels
        # come last in memory.
        before_last: Tensor = self.stem(images.contiguous(memory_format=torch.channels_last))
        last: Tensor = self.second_stem(before_last)
        for cell in self.cells:
            weights = mixing.reduction if cell.reduces else mixing.normal
            args = before_last, last, weights, self.skip_drop_probability
            made = checkpointed(cell, *args) if self.checkpointing else cell(*args)
            before_last, last = last, made
        return last

    def forward(self, images: Tensor, mixing: MixingWeights) -> Tensor:
        """Returns logits [B, num_classes] of `images` [B, C, H, W]."""
        logits: Tensor = self.classifier(self.features(images, mixing).mean(dim=(2, 3)))
        return logits
