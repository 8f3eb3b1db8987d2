"""The genotype: the discrete cells derived from the architecture's mixing weights, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lfmcw_app.bounded_files import parse_json, text_of
from lfmcw_app.errors import InputError, shown
from lfmcw_app.near_paths import near_paths
from lfmcw_app.run_files import EVALUATED, GENOTYPE
from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.cell import edge_index
from lfmcw_app.search_space.darts_notation import is_notation, read_notation, write_notation
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES, PRIMITIVES, primitive_named
from lfmcw_app.search_space.supernet import MixingWeights
from mlo.errors import nearest

__all__ = [
    "EDGES_PER_NODE", "Cells", "Edge", "Genotype", "derive_genotype",
    "random_genotype",
]  # fmt: skip

EDGES_PER_NODE = 2

LONGEST = 2**20
"""Largest size of a genotype's file in bytes; one of 64 nodes has some 10,000."""


@dataclass(frozen=True)
class Edge:
    """An edge of a derived cell: its primitive, and the state that it reads.

    The states 0 and 1 are the cell's inputs, 2 + i is node i.
    """

    primitive: str
    source: int


class Cells:
    """Derived cells of any search space, as data; equal ones compare equal.

    A space whose cells are others than DARTS's has a subclass of its own.

    Attributes:
        inputs: states that a cell reads from outside; its nodes are counted after them.
        output: what leaves a cell: its "last" node, or "all" nodes side by side; None if a picture
            of the cell should not say.
    """

    inputs: ClassVar[int] = 1
    output: ClassVar[Literal["last", "all"] | None] = None

    def to_data(self) -> dict[str, list[list[list[str | int]]]]:
        """Returns kind of cell → for each node its edges as [primitive, source]."""
        raise NotImplementedError

    def notation(self) -> str:
        """Returns the cells on one line, as the space's authors write them."""
        raise NotImplementedError

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Reads what `to_json` or `notation` wrote.

        Raises:
            InputError: if the text is neither; the message names the first thing that is wrong.
        """
        raise NotImplementedError

    @staticmethod
    def state_name(source: int) -> str:
        """What the number of a state means, for people."""
        raise NotImplementedError

    @property
    def primitives(self) -> frozenset[str]:
        """The names of the operations."""
        return frozenset(str(primitive) for primitive, _ in _edges_of(self.to_data()))

    @property
    def skip_share(self) -> float:
        """The share of skip connections among the edges of the first kind of cell."""
        kind, nodes = next(iter(self.to_data().items()))
        edges = _edges_of({kind: nodes})
        return sum(primitive == "skip_connect" for primitive, _ in edges) / len(edges)

    def _repr_html_(self) -> str:
        """What a notebook shows: a picture of each kind of cell."""
        from lfmcw_app.search_space.cell_html import cells_html

        return cells_html(self)

    def to_json(self) -> str:
        """Returns the cells as JSON, one line per node."""
        kinds = []
        for kind, nodes in self.to_data().items():
            lines = ",\n".join(f"  {json.dumps(node)}" for node in nodes)
            kinds.append(f' "{kind}": [\n{lines}\n ]')
        return "{\n" + ",\n".join(kinds) + "\n}\n"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a genotype file, in JSON or in its notation, or that of a run folder.

        Raises:
            InputError: if the file is missing or not a genotype.
        """
        path = Path(path)
        file = _file_of(path) if path.is_dir() else path
        try:
            text = text_of(file, LONGEST, encoding="utf-8-sig", pipes=True)
        except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
            why = getattr(error, "strerror", None) or error
            raise InputError(
                f"The genotype file {file} cannot be read ({why}).{near_paths(path)}"
            ) from None
        try:
            return cls.from_text(text)
        except InputError as error:
            raise InputError(f"{file} is not a genotype. {error}") from None


def _edges_of(cells: Mapping[str, list[list[list[str | int]]]]) -> list[list[str | int]]:
    return [edge for nodes in cells.values() for node in nodes for edge in node]


@dataclass(frozen=True)
class Genotype(Cells):
    """The two derived cells: for each kind two edges per node, in the order of the nodes."""

    normal: tuple[Edge, ...]
    reduction: tuple[Edge, ...]

    inputs: ClassVar[int] = 2
    output: ClassVar[Literal["last", "all"] | None] = "all"

    @property
    def nodes(self) -> int:
        """Intermediate nodes of a cell."""
        return len(self.normal) // EDGES_PER_NODE

    def to_data(self) -> dict[str, list[list[list[str | int]]]]:
        """Returns kind of cell → for each node its two edges as [primitive, source]."""
        return {"normal": _nodes(self.normal), "reduction": _nodes(self.reduction)}

    def notation(self) -> str:
        """Returns DARTS's notation."""
        return self.to_darts()

    def to_darts(self) -> str:
        """Returns the genotype on one line in DARTS's notation: Genotype(normal=[…], …)."""
        cells = {"normal": self.normal, "reduction": self.reduction}
        return write_notation(
            {kind: [(e.primitive, e.source) for e in edges] for kind, edges in cells.items()}
        )

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Reads a genotype in JSON or in DARTS's notation.

        Raises:
            InputError: if the text is neither; the message names the first thing that is wrong.
        """
        return cls.from_darts(text) if is_notation(text) else cls.from_json(text)

    @classmethod
    def from_darts(cls, text: str) -> Self:
        """Reads DARTS's notation, with or without `NAME =` before it.

        Raises:
            InputError: if the text is not one genotype; the message names the first thing that is
                wrong.
        """
        cells = read_notation(text)
        return cls._of({kind: _by_node(edges) for kind, edges in cells.items()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            InputError: if the text is not a genotype; the message names the first thing that is
                wrong.
        """
        # A ValueError comes from text that is not JSON, and from an integer of too many digits.
        try:
            data = parse_json(text)
        except ValueError as error:
            raise InputError(f"A genotype must be JSON, but this is not ({error}).") from None
        if not isinstance(data, dict) or set(data) != {"normal", "reduction"}:
            raise InputError("A genotype is a JSON object with the keys 'normal' and 'reduction'.")
        return cls._of(data)

    @classmethod
    def _of(cls, data: dict[str, Any]) -> Self:
        """Checks what `to_data` describes, and makes a genotype of it."""
        genotype = cls(
            normal=_cell("normal", data["normal"]), reduction=_cell("reduction", data["reduction"])
        )
        if len(genotype.normal) != len(genotype.reduction):
            raise InputError(
                "The genotype's normal and reduction cells have different numbers of nodes."
            )
        return genotype

    @staticmethod
    def state_name(source: int) -> str:
        """The cell's inputs are the outputs of the last two cells."""
        return ("c(k-2)", "c(k-1)")[source] if source < 2 else f"node {source - 2}"


def _file_of(folder: Path) -> Path:
    """The genotype in a run folder: the one that was found, or that was given to evaluate."""
    for name in (GENOTYPE, EVALUATED):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder} holds no genotype ({GENOTYPE}). If it is a run whose search has not ended, "
        "resume it first. Otherwise name a genotype's file."
    )


def _by_node(edges: list[list[Any]]) -> list[list[list[Any]]]:
    """Edges in the order of the nodes, as one group per node."""
    starts = range(0, len(edges), EDGES_PER_NODE)
    return [edges[start : start + EDGES_PER_NODE] for start in starts]


def _nodes(cell: Sequence[Edge]) -> list[list[list[str | int]]]:
    """For each node of a cell its two edges as [primitive, source]."""
    return _by_node([[edge.primitive, edge.source] for edge in cell])


def _cell(kind: str, nodes: Any) -> tuple[Edge, ...]:
    """Reads a cell's edges from plain data, and checks them."""
    if not isinstance(nodes, list) or not nodes:
        raise InputError(
            f"The genotype's {kind!r} cell is a list with one entry per node, got {shown(nodes)}."
        )
    edges: list[Edge] = []
    for node, incoming in enumerate(nodes):
        if not isinstance(incoming, list) or len(incoming) != EDGES_PER_NODE:
            raise InputError(
                f"Node {node} of the genotype's {kind!r} cell needs {EDGES_PER_NODE} edges, got "
                f"{shown(incoming)}."
            )
        for edge in incoming:
            if not isinstance(edge, list) or len(edge) != 2:
                raise InputError(
                    f"An edge of the genotype is a pair [primitive, source], got {shown(edge)}."
                )
            primitive, source = edge
            known = isinstance(primitive, str) and primitive in PRIMITIVES
            if not known or primitive == "none":
                raise InputError(
                    f"Unknown primitive {shown(primitive)} in the genotype. "
                    f"{nearest(shown(primitive), [name for name in PRIMITIVES if name != 'none'])} "
                    "If it belongs to another package, install that package."
                )
            primitive_named(primitive)  # of a package: whether it can be loaded
            is_number = isinstance(source, int) and not isinstance(source, bool)
            if not is_number or not 0 <= source < 2 + node:
                raise InputError(
                    f"Node {node} of the genotype's {kind!r} cell reads state {shown(source)}; it "
                    f"can read 0 to {1 + node}."
                )
            edges.append(Edge(primitive, source))
    return tuple(edges)


def derive_genotype(
    mixing: MixingWeights, primitives: Sequence[str] | Candidates = DARTS_PRIMITIVES
) -> Genotype:
    """Derives the discrete cells: the two strongest edges per node, each with its best primitive.

    The primitive `none` does not count.

    If edges or primitives tie, the first is taken. With edge weights (PC-DARTS) the mixing weights,
    and so a primitive's strength, are softmax(α) · softmax(β).

    Args:
        mixing: the mixing weights, [edges, primitives] of each kind of cell.
        primitives: names of the columns, of all edges or of each.

    Reference: Liu et al., DARTS (2019), section 2.4.
    """
    if not isinstance(primitives, Candidates):
        every = tuple(primitives)
        primitives = Candidates(
            normal=(every,) * len(mixing.normal), reduction=(every,) * len(mixing.reduction)
        )
    return Genotype(
        normal=_derive_cell(mixing.normal.detach(), primitives.normal),
        reduction=_derive_cell(mixing.reduction.detach(), primitives.reduction),
    )


def _derive_cell(weights: Tensor, primitives: Sequence[Sequence[str]]) -> tuple[Edge, ...]:
    """The edges of a cell from its mixing weights, [edges, primitives]."""
    if not bool(torch.isfinite(weights).all()):
        raise ValueError("No cell can be derived: the mixing weights are not finite.")
    values = weights.tolist()
    edges: list[Edge] = []
    node = 0
    while edge_index(node, 0) < len(values):
        # The strongest primitive of each edge into the node, then the two strongest edges.
        strongest: list[tuple[float, Edge]] = []
        for source in range(2 + node):
            row, names = values[edge_index(node, source)], primitives[edge_index(node, source)]
            columns = [column for column, name in enumerate(names) if name != "none"]
            best = max(columns, key=row.__getitem__)
            strongest.append((row[best], Edge(names[best], source)))
        strongest.sort(key=lambda entry: -entry[0])  # stable: ties keep the order of the sources
        kept = [edge for _, edge in strongest[:EDGES_PER_NODE]]
        edges += sorted(kept, key=lambda edge: edge.source)
        node += 1
    return tuple(edges)


def random_genotype(
    nodes: int, seed: int, primitives: Sequence[str] | Candidates = DARTS_PRIMITIVES
) -> Genotype:
    """Draws a genotype uniformly: two different sources per node, a primitive per edge.

    The primitive `none` is never drawn.

    Args:
        nodes: intermediate nodes of a cell.
        seed: decides which.
        primitives: names to draw from, for all edges or for each.
    """
    # A separate generator makes the genotype a function of the seed alone.
    generator = torch.Generator().manual_seed(seed)
    candidates = as_candidates(primitives, nodes)

    def cell(names: Sequence[Sequence[str]]) -> tuple[Edge, ...]:
        edges: list[Edge] = []
        for node in range(nodes):
            drawn = torch.randperm(2 + node, generator=generator)[:EDGES_PER_NODE]
            for source in sorted(drawn.tolist()):
                operations = [n for n in names[edge_index(node, source)] if n != "none"]
                choice = int(torch.randint(len(operations), (), generator=generator))
                edges.append(Edge(operations[choice], source))
        return tuple(edges)

    return Genotype(normal=cell(candidates.normal), reduction=cell(candidates.reduction))
