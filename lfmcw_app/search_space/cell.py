"""A cell of the supernet: a directed acyclic graph whose edges mix their candidate operations.

Written edge by edge a cell is  node t = Σ_s Σ_o weight[s→t, o] · o(state s)  (DARTS, Eq. 2). It is
evaluated state by state: work that all edges out of a state share is done once, their convolutions
are batched (`batched_operations.py`), and the sums of the nodes fill up as the states become known.
Values and gradients equal those of the sum as written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.layers import FactorizedReduce, OperationStyle, ReLUConvNorm
from lfmcw_app.search_space.node_sums import (
    CellWeights,
    add_dropped,
    add_source,
    take_node,
)
from lfmcw_app.search_space.outgoing_edges import OutgoingEdges
from lfmcw_app.search_space.pcdarts import channel_shuffle

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

        # Both inputs are brought to the cell's channels, and the first one to the size of the
        # second.
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

        def place(source: int, edge: int, name: str) -> int:
            # A row of the weights has as many columns as its edge has primitives.
            row = self._rows(source)[edge]
            return row * len(primitives[row]) + primitives[row].index(name)

        self.weights = CellWeights(list(self.fans), place, len(primitives) * len(primitives[0]))  # type: ignore[arg-type]
        if partial_channels > 1:
            rows = [row for source in range(1 + nodes) for row in self._rows(source)]
            self.register_buffer("positions", torch.tensor(rows), persistent=False)

    def _rows(self, source: int) -> list[int]:
        """Rows of α of the edges that leave a state, in the order of the nodes at their ends."""
        return [edge_index(node, source) for node in range(max(0, source - 1), self.nodes)]

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
        # A state is sent on as soon as it is known, so the sums of later nodes fill up meanwhile.
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        passes = self._passes(weights)
        sums: Tensor | None = None
        passed: Tensor | None = None
        for source, (gain, shared_weights) in enumerate(self.weights(weights)):
            outgoing = self.fans[source]
            assert isinstance(outgoing, OutgoingEdges)
            if source >= 2:
                state, sums, passed = self._node(sums, passed)
                states.append(state)
            state = states[source]
            if self.partial_channels > 1:
                state, passed = self._pass(state, passed, next(passes), outgoing.stride)
            sums = self._send(outgoing, state, gain, shared_weights, sums, skip_drop_probability)
        states.append(self._node(sums, passed)[0])
        return torch.cat(states[2:], dim=1)

    def _send(
        self,
        outgoing: OutgoingEdges,
        state: Tensor,
        gain: Tensor,
        shared_weights: Tensor,
        sums: Tensor | None,
        skip_drop_probability: float,
    ) -> Tensor:
        """Adds what a state sends over its edges to the sums of the nodes at their ends."""
        weighted, shared = outgoing(state, gain)
        if self.training and skip_drop_probability > 0.0 and "skip_connect" in shared:
            columns = dict(zip(shared, torch.split(shared_weights, 1, dim=1), strict=True))
            skip, of_skip = shared.pop("skip_connect"), columns.pop("skip_connect")
            sums = add_dropped(sums, skip, of_skip, skip_drop_probability)
            if columns:
                shared_weights = torch.cat(list(columns.values()), dim=1)
        maps = list(shared.values())
        return add_source(sums, weighted, maps, shared_weights, outgoing.rows, self.seen)

    def _pass(
        self, state: Tensor, passed: Tensor | None, edge_weights: Tensor, stride: int
    ) -> tuple[Tensor, Tensor]:
        """PC-DARTS: the operations see the first channels, and the others bypass them.

        Returns the first channels, and the sums of the others.
        """
        state, others = torch.split(state, [self.seen, state.shape[1] - self.seen], dim=1)
        if stride == 2:
            others = F.max_pool2d(others, 2)
        state = state.contiguous(memory_format=torch.channels_last)
        return state, add_source(passed, [], [others], edge_weights, {}, others.shape[1])

    def _passes(self, weights: Tensor) -> Iterator[Tensor]:
        """The weights of the edges out of each state, [edges, 1]; none without a bypass.

        Those of an edge's operations sum to them: softmax(α) to one, and β · softmax(α) to β.
        """
        if self.partial_channels == 1:
            return iter(())
        of_edges = weights.sum(1, keepdim=True).index_select(0, self.positions)
        return iter(torch.split(of_edges, [len(self._rows(s)) for s in range(1 + self.nodes)]))

    def _node(
        self, sums: Tensor | None, passed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The value of the next node, [B, channels, H', W'], and the remaining sums."""
        assert sums is not None
        mixed, sums = take_node(sums)
        if passed is None:
            return mixed, sums, None
        others, passed = take_node(passed)
        mixed = channel_shuffle(torch.cat([mixed, others], dim=1), self.partial_channels)
        return mixed, sums, passed
