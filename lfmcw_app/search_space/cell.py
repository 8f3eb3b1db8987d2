"""A cell of the supernet: a directed acyclic graph whose edges mix their candidate operations.

Written edge by edge a cell is  node t = Σ_s Σ_o weight[s→t, o] · o(state s)  (DARTS, Eq. 2). It is
evaluated state by state: what all edges out of a state share is computed once, their convolutions
are batched (`batched_operations.py`), and the sums of the nodes are filled as the states become
known. The values and gradients are those of the sum as written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.layers import FactorizedReduce, OperationStyle, ReLUConvNorm
from lfmcw_app.search_space.outgoing_edges import OutgoingEdges
from lfmcw_app.search_space.pcdarts import channel_shuffle
from lfmcw_app.search_space.weighted_sum import weighted_sum

__all__ = ["Cell", "edge_count", "edge_index"]


def edge_count(nodes: int) -> int:
    """Edges of a cell with `nodes` intermediate nodes.

    Node i reads the two inputs and the i nodes before it.
    """
    return sum(2 + node for node in range(nodes))


def edge_index(node: int, source: int) -> int:
    """Row of α of the edge into intermediate `node` from state `source`.

    The states 0 and 1 are the cell's inputs, 2 + i is node i.
    """
    return edge_count(node) + source


@dataclass
class _Incoming:
    """What flows into a node: weighted maps, and maps that still wait for their weights."""

    terms: list[Tensor] = field(default_factory=list)
    shared: list[Tensor] = field(default_factory=list)
    passed: list[Tensor] = field(default_factory=list)


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
        partial_channels: K; the operations of an edge see the first 1 / K of the channels and the
            others bypass them (PC-DARTS); all of them for 1.

    Raises:
        ValueError: if `channels` is not a multiple of `partial_channels`.
    """

    positions: Tensor

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
                f"{channels} channels cannot be split into {partial_channels} equal parts "
                "(partial_channels)."
            )
        self.reduces = reduces
        self.nodes = nodes
        self.partial_channels = partial_channels
        self.seen = channels // partial_channels

        # Both inputs come to the cell's channels, and the first one to the size of the second.
        first, second = channels_before
        make_first = FactorizedReduce if reduced_before else ReLUConvNorm
        self.preprocess0 = make_first(first, channels, style)
        self.preprocess1 = ReLUConvNorm(second, channels, style)

        # Named so in the checkpoints of earlier versions: one entry for each state.
        self.fans = nn.ModuleList()
        for source in range(1 + nodes):
            names = [primitives[row] for row in self._rows(source)]
            stride = 2 if reduces and source < 2 else 1
            self.fans.append(OutgoingEdges(self.seen, stride, names, style))
        self._order_weights(primitives)

    def _rows(self, source: int) -> list[int]:
        """Rows of α of the edges that leave a state, in the order of the nodes at their ends."""
        return [edge_index(node, source) for node in range(max(0, source - 1), self.nodes)]

    def _order_weights(self, primitives: Sequence[Sequence[str]]) -> None:
        """Sets where the weights of each bank, then those of each node's shared operations, are.

        The places are those in the flattened weights.
        """
        banks: list[list[int]] = []
        shared: list[list[int]] = [[] for _ in range(self.nodes)]
        for source, outgoing in enumerate(self.fans):
            assert isinstance(outgoing, OutgoingEdges)
            rows = self._rows(source)
            for name, edges in outgoing.edges.items():
                # A row of the weights has as many columns as its edge has primitives.
                places = []
                for row in (rows[edge] for edge in edges):
                    names = primitives[row]
                    places.append(row * len(names) + names.index(name))
                if name in outgoing.banks:
                    banks.append(places)
                else:
                    for e, place in zip(edges, places, strict=True):
                        shared[max(0, source - 1) + e].append(place)
        groups = banks + shared
        self.sizes = [len(group) for group in groups]
        positions = torch.tensor([place for group in groups for place in group], dtype=torch.long)
        self.register_buffer("positions", positions, persistent=False)

    def forward(
        self, before_last: Tensor, last: Tensor, weights: Tensor, skip_drop_probability: float = 0.0
    ) -> Tensor:
        """Returns the concatenation of the intermediate nodes, [B, nodes · channels, H', W'].

        While training, entries of an identity's output are zeroed with `skip_drop_probability` and
        the others scaled by 1 / (1 − probability). An identity has nothing to learn, and would win
        while the other operations are untrained (Chen et al., P-DARTS (2019), section 3.3.2).

        Args:
            before_last: output of the cell before the last.
            last: output of the last cell.
            weights: mixing weights, [edges, primitives].
            skip_drop_probability: of the identities.
        """
        # One gather for all mixing weights, in the order in which they are needed.
        chosen = torch.split(weights.flatten().index_select(0, self.positions), self.sizes)
        of_banks, of_nodes = iter(chosen[: -self.nodes]), chosen[-self.nodes :]
        # The weights of an edge sum to its own: softmax(α) to one, and β · softmax(α) to β.
        of_edges = torch.split(weights.sum(1), [2 + node for node in range(self.nodes)])

        # A state is sent on as soon as it is known: the sums of later nodes fill up meanwhile.
        incoming = [_Incoming() for _ in range(self.nodes)]
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        for source, outgoing in enumerate(self.fans):
            assert isinstance(outgoing, OutgoingEdges)
            if source >= 2:
                node = source - 2
                states.append(self._node(incoming[node], of_nodes[node], of_edges[node]))
            ahead = incoming[max(0, source - 1) :]
            own_weights = [next(of_banks) for _ in outgoing.banks]
            self._spread(outgoing, states[source], own_weights, ahead, skip_drop_probability)
        states.append(self._node(incoming[-1], of_nodes[-1], of_edges[-1]))
        return torch.cat(states[2:], dim=1)

    def _spread(
        self,
        outgoing: OutgoingEdges,
        state: Tensor,
        weights: list[Tensor],
        ahead: list[_Incoming],
        skip_drop_probability: float,
    ) -> None:
        """Adds what a state sends over its edges to what flows into the nodes at their ends."""
        # PC-DARTS: the operations see the first channels, and the others bypass them.
        if self.partial_channels > 1:
            state, others = torch.split(state, [self.seen, state.shape[1] - self.seen], dim=1)
            state = state.contiguous(memory_format=torch.channels_last)
            passed = F.max_pool2d(others, 2) if outgoing.stride == 2 else others
            for node in ahead:
                node.passed.append(passed)

        sums, shared = outgoing(state, weights)
        for edges, maps in sums.items():
            for edge, part in zip(edges, torch.split(maps, self.seen, dim=1), strict=True):
                ahead[edge].terms.append(part)
        for name, maps in shared.items():
            drops = name == "skip_connect" and skip_drop_probability > 0.0
            for edge in outgoing.edges[name]:  # each edge has a mask of its own
                sent = F.dropout(maps, skip_drop_probability, self.training) if drops else maps
                ahead[edge].shared.append(sent)

    def _node(self, incoming: _Incoming, shared_weights: Tensor, edge_weights: Tensor) -> Tensor:
        """The value of a node, [B, channels, H', W']."""
        mixed = weighted_sum(incoming.terms, shared_weights, incoming.shared)
        if self.partial_channels == 1:
            return mixed
        passed = weighted_sum([], edge_weights, incoming.passed)
        return channel_shuffle(torch.cat([mixed, passed], dim=1), self.partial_channels)
