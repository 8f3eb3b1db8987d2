"""The sums of a cell's nodes, filled source by source: node t = Σ_s Σ_o weight[s→t, o] · o(s).

An operation without weights makes the same maps on all edges out of a state: their part of all
nodes is one product of matrices, [edges, maps] times [maps, B·H·W·C].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.outgoing_edges import OutgoingEdges

__all__ = ["CellWeights", "add_dropped", "add_source", "take_node"]


class CellWeights(nn.Module):
    """Where a cell's mixing weights are, in the order in which its sources need them.

    One gather serves all sources.

    Args:
        sources: the edges out of each source.
        place: (source, edge, primitive) → the weight's place in the flattened mixing weights.
        count: of the mixing weights.
    """

    positions: Tensor

    def __init__(
        self,
        sources: Sequence[OutgoingEdges],
        place: Callable[[int, int, str], int],
        count: int,
    ) -> None:
        super().__init__()
        self.channels = sources[0].channels
        gains: list[int] = []
        shared: list[int] = []
        for source, outgoing in enumerate(sources):
            gains += [place(source, edge, name) for name, edge in outgoing.order]
            for edge in range(outgoing.count):
                for name in outgoing.shared:
                    # If it is not a candidate, its weight is the zero after all weights.
                    absent = edge not in outgoing.edges[name]
                    shared.append(count if absent else place(source, edge, name))
        self.has_absent = count in shared
        self.sizes = [len(gains), len(shared)]
        self.gains = [len(outgoing.order) * self.channels for outgoing in sources]
        self.shapes = [(outgoing.count, len(outgoing.shared)) for outgoing in sources]
        positions = torch.tensor(gains + shared, dtype=torch.long)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns for each source its gains, once per channel, and [edges, shared maps].

        Args:
            weights: mixing weights, [edges, primitives].
        """
        flat = weights.flatten()
        if self.has_absent:
            flat = F.pad(flat, (0, 1))
        gains, shared = torch.split(flat.index_select(0, self.positions), self.sizes)
        parts = torch.split(gains.repeat_interleave(self.channels), self.gains)
        rows = torch.split(shared, [edges * maps for edges, maps in self.shapes])
        matrices = [row.view(shape) for row, shape in zip(rows, self.shapes, strict=True)]
        return zip(parts, matrices, strict=True)


def add_source(
    sums: Tensor | None,
    weighted: Sequence[tuple[tuple[int, ...], Tensor]],
    shared: Sequence[Tensor],
    weights: Tensor,
    rows: Mapping[tuple[int, ...], Tensor],
    channels: int,
) -> Tensor:
    """Adds what a state sends over its edges to the sums at their ends.

    Args:
        sums: the sums so far of the nodes that its edges lead to, [edges, B, H, W, C]; None: zeros.
        weighted: edges, and maps with their weights, [B, m · edges · C, H, W], of which m are to
            be added up.
        shared: maps [B, C, H, W] that all edges share.
        weights: of these, [edges, maps].
        rows: edges → their numbers as a tensor, for sets that are not all edges.
        channels: C.
    """
    if shared:
        stacked = torch.stack([maps.permute(0, 2, 3, 1) for maps in shared])
        flat = stacked.flatten(1)
        if sums is None:
            mixed = torch.mm(weights, flat)
        else:
            mixed = torch.addmm(sums.flatten(1), weights, flat)
        sums = mixed.view(-1, *stacked.shape[1:])
    for edges, maps in weighted:
        size = -1, len(edges), channels
        pixels = torch.unflatten(maps.permute(0, 2, 3, 1), 3, size)
        pixels = pixels.squeeze(3) if pixels.shape[3] == 1 else pixels.sum(3)
        pixels = pixels.movedim(3, 0)
        if edges not in rows:
            sums = pixels.contiguous() if sums is None else sums + pixels
        else:
            before = pixels.new_zeros(len(weights), *pixels.shape[1:]) if sums is None else sums
            sums = before.index_add(0, rows[edges], pixels.to(before.dtype))
    assert sums is not None
    return sums


def add_dropped(sums: Tensor | None, maps: Tensor, weights: Tensor, probability: float) -> Tensor:
    """Adds maps that all edges share, each edge with its own dropout mask.

    Args:
        sums: as of `add_source`.
        maps: [B, C, H, W].
        weights: of the maps on each edge, [edges, 1].
        probability: of a zero; the other entries are scaled by 1 / (1 − probability).
    """
    pixels = maps.permute(0, 2, 3, 1).expand(len(weights), -1, -1, -1, -1)
    sent = F.dropout(pixels, probability) * weights.view(-1, 1, 1, 1, 1)
    return sent if sums is None else sums + sent


def take_node(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first node, [B, C, H, W], and the sums of the others."""
    first, others = torch.split(sums, [1, len(sums) - 1])
    return first.squeeze(0).permute(0, 3, 1, 2), others
