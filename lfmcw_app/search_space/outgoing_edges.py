"""All edges that leave one state of a cell: their operations, evaluated bank by bank.

The edges read the same maps. Their activation and pools are computed once, and the operations of
one kind together (`batched_operations.py`). Banks of convolutions on the same edges are evaluated
together as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lfmcw_app.search_space.batched_operations import (
    Bank,
    ConvolutionBank,
    JointConvolutions,
    SharedMaps,
)
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
        count: number of all edges.
        pools: primitive without weights → its maps of the state, the same on all edges.
        shared: the names of these.
        order: (primitive, edge) of every mixing weight of a bank, in the order in which `forward`
            takes them.
    """

    def __init__(
        self, channels: int, stride: int, primitives: Sequence[Sequence[str]], style: OperationStyle
    ) -> None:
        super().__init__()
        # `none` adds zero to every sum and gradient, so it takes part only in the softmax.
        found = {name for edge in primitives for name in edge if name != "none"}
        self.edges: dict[str, tuple[int, ...]] = {}
        for name in sorted(found):
            self.edges[name] = tuple(e for e, names in enumerate(primitives) if name in names)

        self.channels, self.stride, self.count = channels, stride, len(primitives)
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

        # Convolutions on the same edges are one group, and every other bank is one.
        grouped: dict[object, list[str]] = {}
        for name, bank in self.banks.items():
            joins = type(bank) is ConvolutionBank
            grouped.setdefault(self.edges[name] if joins else name, []).append(name)
        self.groups = tuple(map(tuple, grouped.values()))
        self.joint = nn.ModuleDict()
        for names in self.groups:
            members = [self.banks[name] for name in names]
            if len(members) > 1:
                self.joint[names[0]] = JointConvolutions(members, channels, style)  # type: ignore[arg-type]
        parts = sorted({edges for edges in self.edges.values() if len(edges) < self.count})
        self._parts = {edges: f"edges_{number}" for number, edges in enumerate(parts)}
        for edges, buffer in self._parts.items():
            self.register_buffer(buffer, torch.tensor(edges), persistent=False)
        self.order = tuple(
            (name, edge) for names in self.groups for name in names for edge in self.edges[name]
        )

    def forward(
        self, state: Tensor, gain: Tensor
    ) -> tuple[list[tuple[tuple[int, ...], Tensor]], dict[str, Tensor]]:
        """Evaluates the operations.

        Args:
            state: [B, C, H, W].
            gain: the mixing weights in `order`, each once per channel, [len(order) · C].

        Returns:
            (edges, maps with their weights) of the operations that have weights, [B, m·E·C, H',
            W'], where m banks on E edges stand side by side and are to be added up; and primitive →
            what it makes of the state, for those without weights.
        """
        # Operations with weights: the weights of a bank are applied by its norm.
        weighted: list[tuple[tuple[int, ...], Tensor]] = []
        if self.banks:
            activated = self.activation(state)
            repeated: dict[tuple[int, ...], Tensor] = {}
            for names, own_gain in zip(self.groups, self._split(gain), strict=True):
                bank, edges = self.banks[names[0]], self.edges[names[0]]
                assert isinstance(bank, Bank)
                given = state if bank.reads == "state" else activated
                if bank.reads == "repeated":
                    if edges not in repeated:
                        repeated[edges] = _repeated(activated, len(edges))
                    given = repeated[edges]
                if names[0] in self.joint:
                    members = [self.banks[name] for name in names]
                    out = self.joint[names[0]](members, given, own_gain)
                else:
                    out = bank(given, own_gain)
                weighted.append((edges, out))

        # The others give every edge the same maps; each edge's weights are applied in its node.
        return weighted, {name: self.pools[name](state) for name in self.shared}

    def _split(self, gain: Tensor) -> Sequence[Tensor]:
        """The gains of each group."""
        if len(self.groups) == 1:  # whose gradient needs no copy
            return [gain]
        edges = [len(names) * len(self.edges[names[0]]) for names in self.groups]
        return torch.split(gain, [count * self.channels for count in edges])

    @property
    def rows(self) -> dict[tuple[int, ...], Tensor]:
        """Proper subsets of the edges → their positions as a tensor."""
        return {edges: self.get_buffer(name) for edges, name in self._parts.items()}


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
