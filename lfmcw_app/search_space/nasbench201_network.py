"""The networks of NAS-Bench-201's cells: its macro skeleton, as a supernet and derived.

A stem, then three stages of equal cells with C, 2C and 4C channels, a residual block of stride 2
between two stages, and a linear classifier on the mean of the last maps.

Reference: Dong and Yang, NAS-Bench-201 (2020), section 2.1 and figure 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.checkpointing import checkpointed
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.nasbench201 import SumCandidates, SumCell, sum_edges
from lfmcw_app.search_space.network import STYLE, ImageNetwork, drop_path
from lfmcw_app.search_space.node_sums import CellWeights, add_source, take_node
from lfmcw_app.search_space.operations import make_operation
from lfmcw_app.search_space.outgoing_edges import OutgoingEdges

__all__ = ["STAGES", "SumArchitecture", "SumMixing", "SumNetwork", "SumSupernet"]

STAGES = 3
DIVISOR = 2 ** (STAGES - 1)


class SumMixing(NamedTuple):
    """The architecture as the cells read it, [edges, operations]; a row sums to one."""

    cell: Tensor


class SumArchitecture(nn.Module):
    """The architecture A: the logits α of the one cell, [edges, operations].

    Args:
        candidates: the operations of each edge.
        scale: standard deviation of the initial values, as in DARTS.
    """

    def __init__(self, candidates: SumCandidates, scale: float = 1e-3) -> None:
        super().__init__()
        shape = len(candidates.cell), len(candidates.cell[0])
        self.cell = nn.Parameter(scale * torch.randn(shape))

    def forward(self) -> SumMixing:
        """Returns the mixing weights: a softmax of α over each edge's operations."""
        return SumMixing(cell=self.cell.softmax(dim=-1))


class ResidualReduction(nn.Module):
    """A residual block of stride 2: [B, C, H, W] → [B, 2C, H/2, W/2].

    Two 3×3 convolutions, each behind an activation and before a norm, beside average pooling and a
    1×1 convolution.
    """

    def __init__(self, channels: int, style: OperationStyle) -> None:
        super().__init__()

        def convolution(channels_in: int, stride: int) -> list[nn.Module]:
            return [
                style.make_activation(),
                nn.Conv2d(channels_in, 2 * channels, 3, stride, padding=1, bias=False),
                style.make_norm(2 * channels),
            ]

        self.residual = nn.Sequential(*convolution(channels, 2), *convolution(2 * channels, 1))
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(channels, 2 * channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reduces `x`."""
        out: Tensor = self.shortcut(x) + self.residual(x)
        return out


class MixedSumCell(nn.Module):
    """A cell of the supernet: node t = Σ_s Σ_o weight[s→t, o] · o(state s).

    Work that all edges out of a state share is done once, and their convolutions are batched.

    Args:
        channels: of every state.
        candidates: the operations of each edge.
        style: norms and activation.
    """

    def __init__(self, channels: int, candidates: SumCandidates, style: OperationStyle) -> None:
        super().__init__()
        # As in the authors' programs, no norm follows a pool.
        style = replace(style, pools_with_norm=False)
        edges = sum_edges(candidates.nodes)
        self.outgoing = nn.ModuleList()
        # The edges out of each state, in the order of the nodes at their ends.
        leaving: list[list[int]] = []
        for source in range(candidates.nodes - 1):
            leaving.append([row for row, (_, start) in enumerate(edges) if start == source])
            names = [candidates.cell[row] for row in leaving[-1]]
            self.outgoing.append(OutgoingEdges(channels, 1, names, style))

        def place(source: int, edge: int, name: str) -> int:
            row = leaving[source][edge]
            names = candidates.cell[row]
            return row * len(names) + names.index(name)

        self.weights = CellWeights(
            list(self.outgoing),  # type: ignore[arg-type]
            place,
            len(candidates.cell) * len(candidates.cell[0]),
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Returns the last node, [B, C, H, W].

        Args:
            x: the input, [B, C, H, W].
            weights: mixing weights, [edges, operations].
        """
        # A state is sent on as soon as it is known: the sums of later nodes fill up meanwhile.
        state, sums = x, None
        for outgoing, (gain, shared_weights) in zip(
            self.outgoing, self.weights(weights), strict=True
        ):
            assert isinstance(outgoing, OutgoingEdges)
            weighted, shared = outgoing(state, gain)
            maps = list(shared.values())
            sums = add_source(
                sums, weighted, maps, shared_weights, outgoing.rows, outgoing.channels
            )
            # The first edge out of a state leads to the next node.
            state, sums = take_node(sums)
        return state


class _Skeleton(nn.Module):
    """The shared part of supernets and derived networks: everything but the cells.

    Args:
        in_channels: channels of an image.
        num_classes: size of the logits.
        channels: C, of the first stage.
        layers: cells, of all three stages.
        style: norms, affine here, and activation.

    Raises:
        InputError: for a number of cells that three stages cannot share.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        channels: int,
        layers: int,
        style: OperationStyle,
    ) -> None:
        super().__init__()
        if layers % STAGES:
            raise InputError(
                f"NAS-Bench-201 has {STAGES} stages of equally many cells: layers must be a "
                f"multiple of {STAGES}, got {layers}."
            )
        style = replace(style, affine=True)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), style.make_norm(channels)
        )
        widths = [channels * 2**stage for stage in range(STAGES)]
        self.reductions = nn.ModuleList(ResidualReduction(width, style) for width in widths[:-1])
        self.out_channels = widths[-1]
        self.last = nn.Sequential(style.make_norm(self.out_channels), style.make_activation())
        self.classifier: nn.Module = nn.Linear(self.out_channels, num_classes)
        self.widths = [width for width in widths for _ in range(layers // STAGES)]

    def reduced_before(self, layer: int, x: Tensor) -> Tensor:
        """The input of a cell: reduced where a stage begins."""
        per_stage = len(self.widths) // STAGES
        if layer and layer % per_stage == 0:
            x = self.reductions[layer // per_stage - 1](x)
        return x


class SumSupernet(_Skeleton):
    """A stack of cells that mix the candidate operations; the architecture is an argument.

    As in `Supernet`, BatchNorms keep no running statistics.

    Args:
        in_channels: channels of an image.
        num_classes: size of the logits.
        channels: C, of the first stage.
        layers: cells, of all three stages.
        candidates: the operations of each edge.
        style: norms and activation.
        checkpointing: whether cells are recomputed in backward passes instead of keeping
            activations.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        channels: int,
        layers: int,
        candidates: SumCandidates,
        style: OperationStyle,
        checkpointing: bool = False,
    ) -> None:
        style = replace(style, running_statistics=False)
        super().__init__(
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            layers=layers,
            style=style,
        )
        self.checkpointing = checkpointing
        self.cells = nn.ModuleList(MixedSumCell(width, candidates, style) for width in self.widths)

    def features(self, images: Tensor, mixing: SumMixing) -> Tensor:
        """Returns the last maps, [B, 4C, H/4, W/4]."""
        # On a CPU, convolutions and norms are faster on maps whose channels come last in memory.
        x: Tensor = self.stem(images.contiguous(memory_format=torch.channels_last))
        for layer, cell in enumerate(self.cells):
            x = self.reduced_before(layer, x)
            x = checkpointed(cell, x, mixing.cell) if self.checkpointing else cell(x, mixing.cell)
        out: Tensor = self.last(x)
        return out

    def forward(self, images: Tensor, mixing: SumMixing) -> Tensor:
        """Returns logits [B, num_classes] of `images` [B, C, H, W]."""
        logits: Tensor = self.classifier(self.features(images, mixing).mean(dim=(2, 3)))
        return logits


class DerivedSumCell(nn.Module):
    """One cell of the derived network.

    Args:
        cell: the operation of each edge.
        channels: of every state.
    """

    def __init__(self, cell: SumCell, channels: int) -> None:
        super().__init__()
        edges = zip(sum_edges(cell.nodes or 0), cell.operations, strict=True)
        self.kept = [(node, source, name) for (node, source), name in edges if name != "none"]
        self.nodes = cell.nodes or 0
        self.operations = nn.ModuleList(
            make_operation(name, channels, 1, STYLE) for _, _, name in self.kept
        )

    def forward(self, x: Tensor, drop_probability: float = 0.0) -> Tensor:
        """Returns the last node, [B, C, H, W]; while training, edges drop out by drop-path."""
        # A node that nothing leads to is zero.
        states: list[Tensor | None] = [x, *([None] * (self.nodes - 1))]
        for (node, source, _), operation in zip(self.kept, self.operations, strict=True):
            out = operation(_or_zero(states[source], x))
            if self.training and drop_probability > 0.0 and not isinstance(operation, nn.Identity):
                out = drop_path(out, drop_probability)
            before = states[node]
            states[node] = out if before is None else before + out
        return _or_zero(states[-1], x)


def _or_zero(state: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if state is None else state


class SumNetwork(_Skeleton, ImageNetwork):
    """The network of a cell.

    Args:
        cell: the cell.
        in_channels: channels of an image.
        num_classes: size of the logits.
        channels: C, of the first stage.
        layers: cells, of all three stages.

    Raises:
        InputError: for a number of cells that three stages cannot share.
    """

    divisor = DIVISOR

    def __init__(
        self, cell: SumCell, *, in_channels: int, num_classes: int, channels: int, layers: int
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            layers=layers,
            style=STYLE,
        )
        self.auxiliary = None
        self.cells = nn.ModuleList(DerivedSumCell(cell, width) for width in self.widths)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Returns the logits [B, num_classes] of `images` [B, C, H, W]; there is no auxiliary head.

        Raises:
            InputError: if height or width is not divisible by `divisor`.
        """
        self.check_size(images)
        # As in the supernet: on a CPU this takes a third less time.
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for layer, cell in enumerate(self.cells):
            x = cell(self.reduced_before(layer, x), self.drop_probability)
        return self.classifier(self.last(x).mean(dim=(2, 3))), None
