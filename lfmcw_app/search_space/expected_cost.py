"""The cost of a derived network as an expectation under the architecture's mixing weights.

The cost of a derived network is linear in its cells: what stem, preprocessing and classifier cost,
and for each kept edge what its operation costs in all cells of its kind. An operation's cost is
that of the layer which the derived network has, so own operations need no formula.

The derivation keeps the largest mixing weight of a node, then the largest one among its other
edges, `none` left out (`genotype.py`). Its softened form draws instead of taking the largest: an
entry (e, o), edge and operation, with a probability proportional to w[e, o], then another one from
the remaining edges. Here w = m^(1/τ), of the mixing weights m and a temperature τ. That is the
derivation from log m with Gumbel noise of scale τ added to each entry; its likeliest outcome is the
derivation itself, and for τ → 0 its only one. With s_e = Σ_o w[e, o] and q_e = s_e / Σ_f s_f,

    P(o | e) = w[e, o] / s_e                                  which operation a kept edge has
    π_e      = q_e + Σ_{f≠e} q_f · s_e / Σ_{g≠f} s_g          whether an edge is kept; Σ_e π_e = 2
    E[cost]  = base + Σ_nodes Σ_e π_e Σ_o P(o | e) cost[e, o].

This is exact, differentiable and needs no sample. With PC-DARTS m is β · softmax(α).

Reference: Kool et al., Stochastic Beams and Where to Find Them (2019), section 2: the largest
entries of logits with Gumbel noise are a sample without replacement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.cell import edge_count
from lfmcw_app.search_space.cost import network_cost
from lfmcw_app.search_space.genotype import EDGES_PER_NODE
from lfmcw_app.search_space.network import STYLE, DerivedCell, DerivedNetwork
from lfmcw_app.search_space.operations import make_operation
from lfmcw_app.search_space.supernet import MixingWeights, reduction_layers

__all__ = [
    "UNITS", "CellCosts", "cell_costs", "cost_range", "expected_cost", "present_cost",
    "strength_spread",
]  # fmt: skip

UNITS = ("parameters", "multiply_adds")
"""What is counted, in millions: attributes of `Cost`."""

Places = list[tuple[int, int, int]]
"""For each cell the channels, the size of the maps that an operation reads, and its stride."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CellCosts:
    """What the operations of a derived network cost, in millions of one unit.

    Attributes:
        base: cost of all that does not depend on the cells.
        normal: cost of each primitive on each edge, summed over the normal cells,
            [edges, primitives]; NaN for `none`, which no derived cell has.
        reduction: likewise of the reduction cells.
    """

    base: float
    normal: Tensor
    reduction: Tensor

    def to(self, device: torch.device | str) -> CellCosts:
        """The same on a device."""
        return CellCosts(
            base=self.base, normal=self.normal.to(device), reduction=self.reduction.to(device)
        )


# ------------------------------ costs of operations


def cell_costs(
    network: DerivedNetwork,
    image_size: int,
    in_channels: int,
    candidates: Candidates | Sequence[str],
) -> dict[str, CellCosts]:
    """Measures unit → costs of the networks that differ from a given one in their operations.

    Nothing is computed: layers only say which shapes they make.

    Args:
        network: of any genotype, on the meta device; its operations are replaced.
        image_size: height and width of the images.
        in_channels: channels of an image.
        candidates: names of the columns, of all edges or of each.
    """
    nodes = len(_cells(network)[0].operations) // EDGES_PER_NODE
    candidates = as_candidates(candidates, nodes)
    _remove_operations(network)
    base = network_cost(network, image_size, in_channels)
    places = _places(network, image_size, in_channels)

    @cache
    def cost(primitive: str, channels: int, size: int, stride: int) -> Tensor:
        """[units]."""
        with torch.device("meta"):
            operation = make_operation(primitive, channels, stride, STYLE)
        found = network_cost(operation, size, channels)
        return torch.tensor([getattr(found, unit) for unit in UNITS], dtype=torch.float64)

    def summed(kind: str) -> Tensor:
        """[units, edges, primitives], of all cells of a kind."""
        names: tuple[tuple[str, ...], ...] = getattr(candidates, kind)
        total = torch.zeros(len(UNITS), len(names), len(names[0]), dtype=torch.float64)
        for row, source in enumerate(_sources(nodes)):
            for column, primitive in enumerate(names[row]):
                if primitive == "none":
                    total[:, row, column] = math.nan
                    continue
                for place in places[kind, source < 2]:
                    total[:, row, column] += cost(primitive, *place)
        return total

    normal, reduction = summed("normal"), summed("reduction")
    return {
        unit: CellCosts(base=getattr(base, unit), normal=of_normal, reduction=of_reduction)
        for unit, of_normal, of_reduction in zip(UNITS, normal, reduction, strict=True)
    }


def _remove_operations(network: DerivedNetwork) -> None:
    """Puts pools of one pixel for the operations, without parameters and multiply-adds."""
    for layer, cell in enumerate(_cells(network)):
        reduces = layer in reduction_layers(len(network.cells))
        cell.operations = nn.ModuleList(
            nn.MaxPool2d(1, 2 if reduces and source < 2 else 1) for source in cell.sources
        )


def _cells(network: DerivedNetwork) -> list[DerivedCell]:
    return [cell for cell in network.cells if isinstance(cell, DerivedCell)]


def _places(
    network: DerivedNetwork, image_size: int, in_channels: int
) -> dict[tuple[str, bool], Places]:
    """(Kind of cell, whether its input is read) → where its operations stand."""
    shapes: list[torch.Size] = []
    for cell in _cells(network):
        cell.preprocess1.register_forward_hook(lambda *args: shapes.append(args[-1].shape))
    with torch.no_grad():
        network.eval()(torch.empty(1, in_channels, image_size, image_size, device="meta"))

    found: dict[tuple[str, bool], Places] = {
        (kind, of_input): [] for kind in ("normal", "reduction") for of_input in (True, False)
    }
    for layer, (_, channels, size, _) in enumerate(shapes):
        reduces = layer in reduction_layers(len(shapes))
        kind, stride = ("reduction", 2) if reduces else ("normal", 1)
        found[kind, True].append((channels, size, stride))
        found[kind, False].append((channels, size // stride, 1))
    return found


def _sources(nodes: int) -> list[int]:
    """The state that each edge reads, in the order of the rows of α."""
    return [source for node in range(nodes) for source in range(2 + node)]


def _nodes(edges: int) -> Iterator[slice]:
    """The rows of α of each node's edges."""
    node = 0
    while edge_count(node) < edges:
        yield slice(edge_count(node), edge_count(node + 1))
        node += 1


# ------------------------------ costs of cells


def expected_cost(
    mixing: MixingWeights, costs: CellCosts, temperature: Tensor | float = 1.0
) -> Tensor:
    """The expected cost under the mixing weights, a scalar in millions; see the head of this file.

    Args:
        mixing: [edges, primitives] of each kind of cell, not negative.
        costs: of the same shape, on the same device.
        temperature: τ, positive.
    """
    total = mixing.normal.new_full((), costs.base)
    for weights, table in zip(mixing, (costs.normal, costs.reduction), strict=True):
        for rows in _nodes(len(weights)):
            total = total + _expected_of_node(weights[rows], table[rows].to(weights), temperature)
    return total


def _expected_of_node(weights: Tensor, costs: Tensor, temperature: Tensor | float) -> Tensor:
    """E[cost] of a node's two edges, from weights and costs of its edges [edges, primitives]."""
    # Logarithms, since a softmax may have put nearly all weight on one entry, or on `none`.
    none = costs.isnan()
    logits = (_log(weights) / temperature).masked_fill(none, -math.inf)
    of_edge = (logits.softmax(1) * costs.masked_fill(none, 0.0)).sum(1)

    # The first edge is drawn among all, the second among the others: one row for each first edge.
    strength = logits.logsumexp(1)
    first = strength.softmax(0)
    itself = torch.eye(len(strength), dtype=torch.bool, device=strength.device)
    second = strength.expand(itself.shape).masked_fill(itself, -math.inf).softmax(1)
    kept = first + (first.unsqueeze(1) * second).sum(0)
    return (kept * of_edge).sum()


def strength_spread(mixing: MixingWeights, costs: CellCosts) -> Tensor:
    """How far the entries are apart among which a node chooses, a scalar without gradient.

    It is the standard deviation of log m from its mean in each node, `none` left out. On a
    temperature in its proportion the expected cost is near that of the derived cells at any time of
    a search, from the first rounds, when all mixing weights are nearly equal, on.
    """
    squares, count = mixing.normal.new_zeros(()), 0
    for weights, table in zip(mixing, (costs.normal, costs.reduction), strict=True):
        for rows in _nodes(len(weights)):
            entries = _log(weights[rows].detach())[~table[rows].isnan()]
            squares = squares + (entries - entries.mean()).square().sum()
            count += len(entries)
    return (squares / count).sqrt()


def _log(weights: Tensor) -> Tensor:
    """The logarithm, finite also where a softmax has left nothing of an entry."""
    return weights.clamp(min=torch.finfo(weights.dtype).tiny).log()


def present_cost(mixing: MixingWeights, costs: CellCosts) -> Tensor:
    """The cost of the cells that `derive_genotype` makes of the mixing weights, a scalar.

    P-DARTS may replace skip connections after that, which is not counted here.
    """
    total = mixing.normal.new_full((), costs.base)
    for weights, table in zip(mixing, (costs.normal, costs.reduction), strict=True):
        for rows in _nodes(len(weights)):
            of_node = table[rows].to(weights)
            best, column = weights[rows].detach().masked_fill(of_node.isnan(), -1.0).max(1)
            kept = best.sort(descending=True, stable=True).indices[:EDGES_PER_NODE]
            total = total + of_node.gather(1, column.unsqueeze(1))[kept].sum()
    return total


def cost_range(costs: CellCosts) -> tuple[float, float]:
    """The costs of the smallest and of the largest network, in millions."""
    low = high = costs.base
    for table in (costs.normal, costs.reduction):
        for rows in _nodes(len(table)):
            cheapest = table[rows].nan_to_num(nan=math.inf).amin(1).sort().values
            dearest = table[rows].nan_to_num(nan=-math.inf).amax(1).sort(descending=True).values
            low += float(cheapest[:EDGES_PER_NODE].sum())
            high += float(dearest[:EDGES_PER_NODE].sum())
    return low, high
