"""A cell of the supernet: a directed acyclic graph whose every edge is a weighted mix of its candidate operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.operations import FactorizedReduce, OperationStyle, ReLUConvNorm, make_operation
from lfmcw_app.search_space.pcdarts import PartialChannels

__all__ = ["Cell", "MixedOp", "edge_count", "edge_index"]


def edge_count(nodes: int) -> int:
    """Edges of a cell with `nodes` intermediate nodes: node i reads the two inputs and the i nodes before it."""
    return sum(2 + node for node in range(nodes))


def edge_index(node: int, source: int) -> int:
    """Row of α of the edge into intermediate `node` from state `source` (0, 1: the cell's inputs; 2 + i: node i)."""
    return edge_count(node) + source


class MixedOp(nn.Module):
    """An edge: Σ_o weight_o · o(x) over the primitives (DARTS, Eq. 2)."""

    def __init__(self, channels: int, stride: int, primitives: Sequence[str], style: OperationStyle) -> None:
        super().__init__()
        # `none` adds zero to the sum and to every gradient: it takes part in the softmax only.
        self.columns = tuple(column for column, primitive in enumerate(primitives) if primitive != "none")
        self.operations = nn.ModuleList(
            make_operation(primitives[column], channels, stride, style) for column in self.columns
        )

    def forward(self, x: Tensor, weights: Tensor, skip_drop_probability: float = 0.0) -> Tensor:
        """Mixes the operations on `x` [B, C, H, W] with `weights` [primitives].

        While training, entries of an identity's output are zeroed with `skip_drop_probability` and the others scaled by
        1 / (1 − probability): an identity has nothing to learn, and would win while the other operations are untrained
        (Chen et al., P-DARTS (2019), section 3.3.2).
        """
        terms = []
        for column, operation in zip(self.columns, self.operations, strict=True):
            out = operation(x)
            if isinstance(operation, nn.Identity) and skip_drop_probability > 0.0:
                out = F.dropout(out, skip_drop_probability, self.training)
            terms.append(weights[column] * out)
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


class Cell(nn.Module):
    """One cell of the supernet.

    Args:
        channels_before: channels of the outputs of the cell before the last and of the last cell.
        channels: channels of each node; the cell returns nodes · channels.
        nodes: intermediate nodes.
        reduces: whether this cell halves the resolution.
        reduced_before: whether the last cell did.
        primitives: names of the candidate operations of each edge.
        style: norms and activation.
        partial_channels: K; the operations of an edge see the first 1 / K of the channels (PC-DARTS), all of them for 1.

    Raises:
        ValueError: if `channels` is not a multiple of `partial_channels`.
    """

    def __init__(
        self,
        channels_before: tuple[int, int],
        channels: int,
        *,
        nodes: int,
        reduces: bool,
        reduced_before: bool,
        primitives: Sequence[Sequence[str]],
        style: OperationStyle,
        partial_channels: int = 1,
    ) -> None:
        super().__init__()
        if channels % partial_channels:
            raise ValueError(
                f"{channels} channels cannot be split into {partial_channels} equal parts (partial_channels)."
            )
        self.reduces = reduces
        self.nodes = nodes
        first, second = channels_before
        make_first = FactorizedReduce if reduced_before else ReLUConvNorm
        self.preprocess0 = make_first(first, channels, style)
        self.preprocess1 = ReLUConvNorm(second, channels, style)
        self.edges = nn.ModuleList()
        for node in range(nodes):
            for source in range(2 + node):
                stride = 2 if reduces and source < 2 else 1
                edge = MixedOp(channels // partial_channels, stride, primitives[edge_index(node, source)], style)
                self.edges.append(edge if partial_channels == 1 else PartialChannels(edge, partial_channels, stride))

    def forward(self, before_last: Tensor, last: Tensor, weights: Tensor, skip_drop_probability: float = 0.0) -> Tensor:
        """Returns the concatenation of the intermediate nodes, [B, nodes · channels, H', W'].

        Args:
            before_last: output of the cell before the last.
            last: output of the last cell.
            weights: mixing weights, [edges, primitives].
            skip_drop_probability: of the mixed ops.
        """
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        for node in range(self.nodes):
            rows = [edge_index(node, source) for source in range(len(states))]
            incoming = [
                self.edges[row](state, weights[row], skip_drop_probability)
                for row, state in zip(rows, states, strict=True)
            ]
            states.append(torch.stack(incoming).sum(0))
        return torch.cat(states[2:], dim=1)
