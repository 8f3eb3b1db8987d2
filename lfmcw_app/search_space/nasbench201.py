"""The cells of NAS-Bench-201 as data: an operation on every edge of a small directed graph.

A cell has a state for its input and one for each node after it. An edge leads from every state to
every later node, and a node is the sum of its inputs; the last node is the output. With 4 states
and 5 operations there are 5⁶ = 15,625 cells, with 3 states 125.

Reference: Dong and Yang, NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture
    Search (2020), section 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lfmcw_app.bounded_files import parse_json
from lfmcw_app.errors import InputError, shown
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.operations import primitive_named
from mlo.errors import nearest

__all__ = [
    "MOST_NODES", "OPERATIONS", "SumCandidates", "SumCell", "all_cells", "cell_count",
    "derive_sum_cell",
    "random_sum_cell", "sum_edges",
]  # fmt: skip

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""The operations of an edge, in the order of the authors' programs and of the columns of α."""

MOST_NODES = 16
EDGE = re.compile(r"([A-Za-z0-9_]+)~(\d{1,2})")


def sum_edges(nodes: int) -> list[tuple[int, int]]:
    """The edges of a cell with so many states, as (node, source), in the order of the rows of α."""
    return [(node, source) for node in range(1, nodes) for source in range(node)]


@dataclass(frozen=True, kw_only=True)
class SumCandidates:
    """The candidate operations of each edge: entry [row][column] names that entry of α.

    Attributes:
        cell: one tuple per edge, all of one length.
    """

    cell: tuple[tuple[str, ...], ...]

    @property
    def nodes(self) -> int:
        """States of a cell, the input included."""
        return _states(len(self.cell)) or 0


@dataclass(frozen=True)
class SumCell(Cells):
    """A cell: the operation of each of its edges, in the order of `sum_edges`.

    Raises:
        InputError: if there are not as many as a cell of some number of states has, or one is
            unknown.
    """

    operations: tuple[str, ...]

    output: ClassVar[Literal["last", "all"] | None] = "last"

    def __post_init__(self) -> None:
        if self.nodes is None:
            raise InputError(
                f"A cell with n states has n(n − 1)/2 edges: 3, 6, 10, …; got "
                f"{len(self.operations)} operations."
            )
        for name in self.operations:
            try:
                primitive_named(name)
            except ValueError:
                raise InputError(
                    f"Unknown operation {shown(name)} in the cell. {nearest(name, OPERATIONS)}"
                ) from None

    @property
    def nodes(self) -> int | None:
        """Its states, the input included."""
        return _states(len(self.operations))

    def _by_node(self) -> Iterator[list[tuple[str, int]]]:
        """For each node its edges as (operation, source)."""
        start = 0
        for node in range(1, self.nodes or 0):
            incoming = self.operations[start : start + node]
            yield list(zip(incoming, range(node), strict=True))
            start += node

    def to_data(self) -> dict[str, list[list[list[str | int]]]]:
        """Returns {"cell": for each node its edges as [operation, source]}."""
        return {"cell": [list(map(list, incoming)) for incoming in self._by_node()]}

    def notation(self) -> str:
        """Returns the authors' notation, such as |none~0|+|none~0|skip_connect~1|."""
        nodes = (_joined(f"{name}~{source}" for name, source in edges) for edges in self._by_node())
        return "+".join(nodes)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Reads a cell in JSON or in the authors' notation.

        Raises:
            InputError: if the text is neither; the message names the first thing that is wrong.
        """
        return cls._of(_from_json(text) if text.lstrip().startswith("{") else _from_notation(text))

    @classmethod
    def _of(cls, nodes: list[Any]) -> Self:
        names: list[str] = []
        for node, edges in enumerate(nodes, start=1):
            if not isinstance(edges, list) or not all(map(_is_edge, edges)):
                raise InputError(
                    f"Node {node} of the cell is a list of edges [operation, source], got "
                    f"{shown(edges)}."
                )
            sources = [source for _, source in edges]
            if sources != list(range(node)):
                raise InputError(
                    f"Node {node} of the cell reads the states 0 to {node - 1}, each once and in "
                    f"this order; got {shown(sources)}."
                )
            names += [name for name, _ in edges]
        return cls(tuple(names))

    @staticmethod
    def state_name(source: int) -> str:
        """State 0 is the cell's input, and nodes are counted from 0 as in other spaces."""
        return "the input" if source == 0 else f"node {source - 1}"


def _states(edges: int) -> int | None:
    """States of a cell with so many edges; None if no cell has so many."""
    sizes = (n for n in range(2, MOST_NODES + 1) if len(sum_edges(n)) == edges)
    return next(sizes, None)


def _joined(edges: Iterator[str]) -> str:
    return f"|{'|'.join(edges)}|"


def _is_edge(edge: Any) -> bool:
    return (
        isinstance(edge, list)
        and len(edge) == 2
        and isinstance(edge[0], str)
        and isinstance(edge[1], int)
        and not isinstance(edge[1], bool)
    )


def _from_json(text: str) -> list[Any]:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise InputError(f"A cell must be JSON, but this is not ({error}).") from None
    if not isinstance(data, dict) or set(data) != {"cell"} or not isinstance(data["cell"], list):
        raise InputError('A cell is a JSON object {"cell": [[[operation, source], …], …]}.')
    nodes: list[Any] = data["cell"]
    return nodes


def _from_notation(text: str) -> list[Any]:
    nodes: list[Any] = []
    for part in text.strip().split("+"):
        whole = part.strip()
        edges = [EDGE.fullmatch(edge) for edge in whole[1:-1].split("|")]
        if not (whole.startswith("|") and whole.endswith("|")) or None in edges:
            raise InputError(
                "A cell is written |operation~source|+|operation~source|operation~source|+…, as in "
                f"|none~0|+|none~0|skip_connect~1|; got {shown(part)}."
            )
        nodes.append([[edge[1], int(edge[2])] for edge in edges if edge is not None])
    return nodes


def all_cells(nodes: int) -> Iterator[SumCell]:
    """All cells with so many states, the last edge varying fastest."""
    return map(SumCell, product(OPERATIONS, repeat=len(sum_edges(nodes))))


def cell_count(nodes: int) -> int:
    """How many cells with so many states there are."""
    count: int = len(OPERATIONS) ** len(sum_edges(nodes))
    return count


def derive_sum_cell(mixing: Tensor, candidates: SumCandidates) -> SumCell:
    """The strongest operation of each edge, including `none`; if operations tie, the first.

    Args:
        mixing: [edges, operations].
        candidates: names of the columns.

    Raises:
        ValueError: if the mixing weights are not finite.

    Reference: Dong and Yang (2020): their programs keep `none` in DARTS's argmax.
    """
    if not bool(torch.isfinite(mixing).all()):
        raise ValueError("No cell can be derived: the mixing weights are not finite.")
    columns = mixing.detach().argmax(dim=1).tolist()
    pairs = zip(candidates.cell, columns, strict=True)
    return SumCell(tuple(names[column] for names, column in pairs))


def random_sum_cell(candidates: Sequence[Sequence[str]], seed: int) -> SumCell:
    """A cell drawn uniformly from all cells of the candidates, a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (int(torch.randint(len(names), (), generator=generator)) for names in candidates)
    return SumCell(tuple(names[column] for names, column in zip(candidates, drawn, strict=True)))
