"""The search spaces: what is searched, in which stages, and how a cell is derived from it.

A new one is a class here, or in another package, and an entry of `SPACES`
(docs/adding-an-operation.md). If it has its own settings for a preset, they are in
recipes/PRESET.NAME.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from lfmcw_app.errors import InputError
from lfmcw_app.plugins import Table
from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.cell import edge_count
from lfmcw_app.search_space.genotype import (
    EDGES_PER_NODE,
    Cells,
    Genotype,
    derive_genotype,
    random_genotype,
)
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.nasbench201 import (
    MOST_NODES,
    OPERATIONS,
    SumCandidates,
    SumCell,
    all_cells,
    derive_sum_cell,
    random_sum_cell,
    sum_edges,
)
from lfmcw_app.search_space.nasbench201_network import (
    STAGES,
    SumArchitecture,
    SumMixing,
    SumNetwork,
    SumSupernet,
)
from lfmcw_app.search_space.network import DerivedNetwork, ImageNetwork
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES, PRIMITIVES
from lfmcw_app.search_space.pdarts import (
    PDartsStage,
    derive_restricted_genotype,
    pdarts_stages,
    surviving,
)
from lfmcw_app.search_space.supernet import Architecture, MixingWeights, Supernet

__all__ = ["SPACES", "Place", "SearchStage", "Settings", "Space", "register_space", "space_named"]

Place = tuple[int, int]
"""Position of an edge: (target node, source state), each counted from 0."""


class Settings(Protocol):
    """The settings that a space reads from a recipe's section `search`."""

    space: str
    primitives: tuple[str, ...] | Mapping[str, tuple[tuple[str, ...], ...]]
    channels: int
    layers: int
    nodes: int
    stem: Literal["cifar", "imagenet"]
    partial_channels: int
    progressive: Any
    checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class SearchStage:
    """A stage of a search, with its own modules and optimizers: the only one, or P-DARTS's.

    Attributes:
        name: of the phase.
        layers: cells of its supernets.
        skip_dropout: initial dropout on identities.
        drops: how many operations each edge loses at its end; None if the search ends with a
            genotype.
    """

    name: str
    layers: int
    skip_dropout: float = 0.0
    drops: PDartsStage | None = None


@dataclass(frozen=True, kw_only=True)
class Space:
    """The space of DARTS; others override what they do differently.

    Attributes:
        title: its name for people.
        drops_out: whether its supernets have dropout.

    Reference: Liu et al., DARTS: Differentiable Architecture Search (2019).
    """

    title: str
    drops_out: bool = False

    def check(self, how: Settings) -> None:
        """Refuses settings that do not fit the space.

        Raises:
            ValueError: naming the key.
        """
        self.candidates(how)

    def stages(self, how: Settings) -> tuple[SearchStage, ...]:
        """The stages of a search, in their order."""
        return (SearchStage(name="search", layers=how.layers),)

    def candidates(self, how: Settings) -> Candidates:
        """The operations of each edge with which the search begins.

        Raises:
            ValueError: for unknown names, or a set that holds no operation.
        """
        names = how.primitives
        if isinstance(names, Mapping):
            of_edges = Candidates(normal=names["normal"], reduction=names["reduction"])
            return as_candidates(of_edges, how.nodes)
        return as_candidates(names, how.nodes)

    def operations(self, how: Settings) -> frozenset[str]:
        """The names of all operations that some edge can have."""
        candidates = self.candidates(how)
        return frozenset().union(*candidates.normal, *candidates.reduction)

    def draws(self, how: Settings) -> bool:
        """Whether its supernets draw random numbers, with separate ones for each process."""
        return self.drops_out or any(PRIMITIVES[name].draws for name in self.operations(how))

    def partial_channels(self, how: Settings) -> int:
        """K: the operations see the first 1 / K of a node's channels."""
        return 1

    def supernet(
        self,
        how: Settings,
        candidates: Candidates,
        *,
        layers: int,
        in_channels: int,
        num_classes: int,
        style: OperationStyle,
    ) -> Supernet:
        """Weights W1 or W2, or the trunk of the discriminator; called with (images, mixing)."""
        return Supernet(
            in_channels=in_channels,
            num_classes=num_classes,
            channels=how.channels,
            layers=layers,
            nodes=how.nodes,
            primitives=candidates,
            style=style,
            stem=how.stem,
            partial_channels=self.partial_channels(how),
            checkpointing=how.checkpointing,
        )

    def architecture(self, how: Settings, candidates: Candidates) -> Architecture:
        """The architecture A; called without arguments it returns the mixing weights."""
        return Architecture(how.nodes, candidates)

    def surviving(
        self, mixing: MixingWeights, candidates: Candidates, stage: SearchStage
    ) -> Candidates:
        """The candidates for the stage after `stage`."""
        return candidates if stage.drops is None else surviving(mixing, candidates, stage.drops)

    def derive(self, how: Settings, mixing: MixingWeights, candidates: Candidates) -> Cells:
        """The genotype at the end of the last stage."""
        return derive_genotype(mixing, candidates)

    def derive_now(self, mixing: MixingWeights, candidates: Candidates) -> Cells:
        """The cells of the current weights, shown while a stage runs."""
        return derive_genotype(mixing, candidates)

    def edge_places(self, edges: int) -> Sequence[Place] | None:
        """Where the edge of each row of α lies in a cell, for the report.

        Here nodes follow one another, and each reads the inputs and all nodes before it.

        Args:
            edges: how many rows α has.

        Returns:
            A place per row; None where that many edges are none of such a cell.
        """
        places: list[Place] = []
        node = 0
        while len(places) < edges:
            places += [(node, source) for source in range(self.genotype.inputs + node)]
            node += 1
        return places if len(places) == edges else None

    def random(self, how: Settings, seed: int) -> Cells:
        """A genotype drawn from the space."""
        return random_genotype(how.nodes, seed, self.candidates(how))

    def all_cells(self, nodes: int) -> Iterator[Cells] | None:
        """Every cell with so many nodes, once; None if there are too many for a table."""
        return None

    @property
    def genotype(self) -> type[Cells]:
        """The class of its cells, which also reads them."""
        return Genotype

    @property
    def network_of(self) -> str:
        """The name of the space that builds its networks: its own if it has other cells."""
        return "darts"

    def network(self, genotype: Any, **sizes: Any) -> ImageNetwork:
        """The network of its cells; see `DerivedNetwork` for the sizes."""
        return DerivedNetwork(genotype, **sizes)

    def draw(self, genotype: Any, path: Path, title: str) -> None:
        """Draws its cells into an image file (PNG or SVG, by its ending)."""
        from lfmcw_app.search_space.draw import draw_genotype  # matplotlib is slow to import

        draw_genotype(genotype, path, title)


@dataclass(frozen=True, kw_only=True)
class PDarts(Space):
    """P-DARTS: deeper supernets with fewer operations from stage to stage.

    Reference: Chen et al., Progressive Differentiable Architecture Search (2019).
    """

    drops_out: bool = True

    def check(self, how: Settings) -> None:
        super().check(how)
        if how.layers + min(how.progressive.added_layers) < 3:
            raise ValueError("layers + progressive.added_layers must be at least 3 in each stage")
        candidates = self.candidates(how)
        edges = (*candidates.normal, *candidates.reduction)
        drops = how.progressive.dropped_operations
        fewest = min(map(len, edges))
        if sum(drops) >= fewest:
            raise ValueError(
                f"progressive.dropped_operations drops {sum(drops)} of {fewest}, but must leave one"
            )
        # Otherwise the derived cells could have more skip connections than allowed.
        last = fewest - sum(drops[:-1])
        limited = how.progressive.max_skips < EDGES_PER_NODE * how.nodes
        if limited and any(last <= len({"none", "skip_connect"} & set(edge)) for edge in edges):
            raise ValueError(
                f"progressive.dropped_operations leaves {last} operations per edge to the last "
                "stage, which may be none and skip_connect alone; drop fewer, or give more "
                "primitives"
            )

    def stages(self, how: Settings) -> tuple[SearchStage, ...]:
        progressive = how.progressive
        planned = pdarts_stages(
            how.layers, progressive.added_layers, progressive.dropped_operations
        )
        return tuple(
            SearchStage(
                name=f"search-{index + 1}",
                layers=stage.layers,
                skip_dropout=rate,
                drops=None if stage.drops_none else stage,
            )
            for index, (stage, rate) in enumerate(
                zip(planned, progressive.skip_dropout, strict=True)
            )
        )

    def derive(self, how: Settings, mixing: MixingWeights, candidates: Candidates) -> Genotype:
        return derive_restricted_genotype(mixing, candidates, how.progressive.max_skips)


@dataclass(frozen=True, kw_only=True)
class PCDarts(Space):
    """PC-DARTS: operations on some of the channels, and weights for the edges.

    Reference: Xu et al., PC-DARTS: Partial Channel Connections (2020).
    """

    def check(self, how: Settings) -> None:
        super().check(how)
        if how.channels % how.partial_channels:
            raise ValueError(
                f"channels ({how.channels}) must be a multiple of partial_channels "
                f"({how.partial_channels})"
            )

    def partial_channels(self, how: Settings) -> int:
        return how.partial_channels

    def architecture(self, how: Settings, candidates: Candidates) -> Architecture:
        return Architecture(how.nodes, candidates, edge_weights=True)


@dataclass(frozen=True, kw_only=True)
class Restricted(Space):
    """The space of DARTS with its own candidates.

    Attributes:
        normal: of each edge of the normal cell, or one tuple for all edges.
        reduction: likewise of the reduction cell.

    Reference: Zela et al., Understanding and Robustifying Differentiable Architecture Search
    (2020), section 3.1: S1 to S4.
    """

    normal: Sequence[tuple[str, ...]]
    reduction: Sequence[tuple[str, ...]]

    def check(self, how: Settings) -> None:
        super().check(how)
        if how.primitives != DARTS_PRIMITIVES:
            raise ValueError(
                f"the space {self.title} has its own operations, so primitives would have no "
                "effect; drop it, or set space to darts"
            )

    def candidates(self, how: Settings) -> Candidates:
        edges = edge_count(how.nodes)

        def of_cell(names: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
            if len(names) not in (1, edges):
                raise ValueError(
                    f"the space {self.title} has candidates for cells of 4 nodes; nodes is "
                    f"{how.nodes}"
                )
            return tuple(names) * (edges if len(names) == 1 else 1)

        return Candidates(normal=of_cell(self.normal), reduction=of_cell(self.reduction))


@dataclass(frozen=True, kw_only=True)
class NASBench201(Space):
    """The space of NAS-Bench-201: one cell whose nodes are the sums of what comes in.

    `nodes` counts the states of a cell with its input: 4 in the paper.

    Reference: Dong and Yang, NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture
    Search (2020).
    """

    def check(self, how: Settings) -> None:
        super().check(how)
        if how.layers % STAGES:
            raise ValueError(
                f"{self.title} has {STAGES} stages of equally many cells: layers must be a "
                f"multiple of {STAGES}, got {how.layers}"
            )
        if how.stem != "cifar":
            raise ValueError(f"{self.title} has its own stem; set stem to cifar")

    def candidates(self, how: Settings) -> SumCandidates:  # type: ignore[override]
        if not 2 <= how.nodes <= MOST_NODES:
            raise ValueError(
                f"a cell of {self.title} has 2 to {MOST_NODES} nodes, including its input; nodes "
                f"is {how.nodes}"
            )
        names = how.primitives
        if isinstance(names, Mapping):
            raise ValueError(  # noqa: TRY004 - pydantic's rule
                f"{self.title} has one cell; give primitives as one list of names"
            )
        if names == DARTS_PRIMITIVES:  # none were chosen
            names = OPERATIONS
        # The checks of names are those of the other spaces.
        Candidates(normal=(names,), reduction=(names,))
        return SumCandidates(cell=(names,) * len(sum_edges(how.nodes)))

    def operations(self, how: Settings) -> frozenset[str]:
        return frozenset().union(*self.candidates(how).cell)

    def supernet(  # type: ignore[override]
        self,
        how: Settings,
        candidates: SumCandidates,
        *,
        layers: int,
        in_channels: int,
        num_classes: int,
        style: OperationStyle,
    ) -> SumSupernet:
        return SumSupernet(
            in_channels=in_channels,
            num_classes=num_classes,
            channels=how.channels,
            layers=layers,
            candidates=candidates,
            style=style,
            checkpointing=how.checkpointing,
        )

    def architecture(  # type: ignore[override]
        self, how: Settings, candidates: SumCandidates
    ) -> SumArchitecture:
        return SumArchitecture(candidates)

    def derive(  # type: ignore[override]
        self, how: Settings, mixing: SumMixing, candidates: SumCandidates
    ) -> SumCell:
        return derive_sum_cell(mixing.cell, candidates)

    def derive_now(  # type: ignore[override]
        self, mixing: SumMixing, candidates: SumCandidates
    ) -> SumCell:
        return derive_sum_cell(mixing.cell, candidates)

    def random(self, how: Settings, seed: int) -> SumCell:
        return random_sum_cell(self.candidates(how).cell, seed)

    @property
    def genotype(self) -> type[Cells]:
        return SumCell

    @property
    def network_of(self) -> str:
        return "nasbench201"

    def network(self, genotype: Any, **sizes: Any) -> ImageNetwork:
        """The network of a cell.

        Raises:
            InputError: for an auxiliary head or the stem for ImageNet, which it does not have, or a
                number of cells that its stages cannot share.
        """
        if sizes.pop("auxiliary", False):
            raise InputError(
                f"The networks of {self.title} have no auxiliary head. Set "
                "evaluation.auxiliary_weight to 0."
            )
        if sizes.pop("stem", "cifar") != "cifar":
            raise InputError(f"{self.title} has its own stem. Set evaluation.stem to cifar.")
        return SumNetwork(genotype, **sizes)

    def all_cells(self, nodes: int) -> Iterator[Cells]:
        return all_cells(nodes)


def _with_skip(*names: str) -> list[tuple[str, ...]]:
    return [("skip_connect", name) for name in names]


POOLS = ("max_pool_3x3", "avg_pool_3x3")
S1_NORMAL = (
    *_with_skip("dil_conv_3x3", "dil_conv_5x5", "dil_conv_5x5", "sep_conv_3x3", "dil_conv_3x3"),
    ("max_pool_3x3", "skip_connect"),
    *_with_skip("sep_conv_3x3", "sep_conv_3x3", "dil_conv_3x3", "sep_conv_3x3"),
    ("max_pool_3x3", "skip_connect"),
    *_with_skip("dil_conv_3x3"),
    ("dil_conv_3x3", "dil_conv_5x5"),
    ("dil_conv_3x3", "dil_conv_5x5"),
)
S1_REDUCTION = (
    POOLS,
    ("max_pool_3x3", "dil_conv_3x3"),
    POOLS,
    POOLS,
    *_with_skip("dil_conv_5x5"),
    POOLS,
    ("max_pool_3x3", "sep_conv_3x3"),
    *_with_skip("dil_conv_3x3", "dil_conv_5x5"),
    POOLS,
    POOLS,
    *_with_skip("dil_conv_5x5", "dil_conv_5x5", "dil_conv_5x5"),
)


def _same(title: str, *names: str) -> Restricted:
    return Restricted(title=title, normal=[names], reduction=[names])


SPACES: Table[Space] = Table(
    "search space",
    "lfmcw_app.spaces",
    Space,
    {
        "darts": Space(title="DARTS"),
        "pdarts": PDarts(title="P-DARTS"),
        "pcdarts": PCDarts(title="PC-DARTS"),
        "s1": Restricted(title="S1", normal=S1_NORMAL, reduction=S1_REDUCTION),
        "s2": _same("S2", "skip_connect", "sep_conv_3x3"),
        "s3": _same("S3", "none", "skip_connect", "sep_conv_3x3"),
        "s4": _same("S4", "noise", "sep_conv_3x3"),
        "nasbench201": NASBench201(title="NAS-Bench-201"),
    },
)
"""Name → space."""

register_space = SPACES.register


def space_named(name: str) -> Space:
    """The space of a name.

    Raises:
        InputError: for an unknown name.
    """
    try:
        return SPACES.named(name)
    except ValueError as error:
        raise InputError(str(error)) from None
