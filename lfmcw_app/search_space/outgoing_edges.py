"""All edges that leave one state of a cell: their operations, evaluated bank by bank.

The edges read the same maps. Their activation and pools are computed once, and the operations of
one kind together (`batched_operations.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lfmcw_app.search_space.batched_operations import Bank, SharedMaps
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.operations import primitive_named

__all__ = ["OutgoingEdges", "blocks_of_convolutions"]


class OutgoingEdges(nn.Module):
    """All edges that leave one state of a cell.

    Args:
        channels: C, of the state.
        stride: of the edges.
        primitives: the candidates of each edge.
        style: norms and activation.

    Raises:
        ValueError: for an unknown primitive.

    Attributes:
        banks: primitive → the weights of it on all edges that have it.
        edges: primitive → the positions of these edges.
        pools: primitive without weights → what it makes of the state, the same on all edges.
        shared: the names of these.
    """

    def __init__(
        self, channels: int, stride: int, primitives: Sequence[Sequence[str]], style: OperationStyle
    ) -> None:
        super().__init__()
        # `none` adds zero to every sum and gradient: it takes part in the softmax only.
        found = {name for edge in primitives for name in edge if name != "none"}
        self.edges: dict[str, tuple[int, ...]] = {}
        for name in sorted(found):
            self.edges[name] = tuple(e for e, names in enumerate(primitives) if name in names)

        self.channels, self.stride = channels, stride
        self.activation = style.make_activation()
        self.banks = nn.ModuleDict()
        self.pools = nn.ModuleDict()
        for name, edges in self.edges.items():
            made = primitive_named(name).in_supernet(channels, len(edges), stride, style)
            if isinstance(made, SharedMaps):
                self.pools[name] = made
            else:
                self.banks[name] = made
        self.shared = tuple(name for name in self.edges if name not in self.banks)

    def forward(
        self, state: Tensor, weights: Sequence[Tensor]
    ) -> tuple[dict[tuple[int, ...], Tensor], dict[str, Tensor]]:
        """Evaluates the operations.

        Args:
            state: [B, C, H, W].
            weights: for every bank the mixing weights of its edges.

        Returns:
            edges → the weighted sum of the operations that have weights, for every set of edges
            that some of them are on, [B, len(edges)·C, H', W']; and primitive → what it makes of
            the state, for those without weights.
        """
        # Operations with weights: the weights of a bank are applied by its norm, and banks on the
        # same edges are added up.
        sums: dict[tuple[int, ...], Tensor] = {}
        if self.banks:
            activated = self.activation(state)
            repeated: dict[tuple[int, ...], Tensor] = {}
            for (name, bank), chosen in zip(self.banks.items(), weights, strict=True):
                assert isinstance(bank, Bank)
                edges = self.edges[name]
                given = state if bank.reads == "state" else activated
                if bank.reads == "repeated":
                    if edges not in repeated:
                        repeated[edges] = _repeated(activated, len(edges))
                    given = repeated[edges]
                out = bank(given, chosen.repeat_interleave(self.channels))
                sums[edges] = sums[edges] + out if edges in sums else out

        # The others give every edge the same maps; each edge's weights are applied in its node.
        return sums, {name: self.pools[name](state) for name in self.shared}


def blocks_of_convolutions(root: nn.Module) -> dict[nn.Module, int]:
    """Returns, for every convolution of a bank in `root`, how many edges' weights are in its own.

    They stand below one another.
    """
    return {
        layer: bank.blocks
        for bank in root.modules()
        if isinstance(bank, Bank)
        for layer in bank.modules()
        if isinstance(layer, nn.Conv2d)
    }


def _repeated(x: Tensor, times: int) -> Tensor:
    """[B, C, H, W] → [B, times·C, H, W], with the channels last in memory.

    (`Tensor.repeat` would put them first.)
    """
    if times == 1:
        return x
    pixels = x.permute(0, 2, 3, 1).unsqueeze(3)
    return pixels.expand(-1, -1, -1, times, -1).flatten(3).permute(0, 3, 1, 2)
