"""The candidate operations of every edge.

In DARTS all edges have the same; P-DARTS drops some, different ones on each edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lfmcw_app.search_space.cell import edge_count
from lfmcw_app.search_space.operations import primitive_named

__all__ = ["Candidates", "as_candidates"]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """For each kind of cell the primitives of each edge: entry [row][column] names that entry of α.

    Attributes:
        normal: of the normal cell, one tuple per edge, all of one length.
        reduction: of the reduction cell, likewise.

    Raises:
        ValueError: if a name is unknown or given twice, edges have different numbers of
            primitives, or an edge could only be `none`.
    """

    normal: tuple[tuple[str, ...], ...]
    reduction: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for kind, edges in (("normal", self.normal), ("reduction", self.reduction)):
            # α is one matrix: all its rows have the same number of columns.
            sizes = sorted({len(edge) for edge in edges})
            if len(sizes) != 1:
                raise ValueError(
                    f"All edges of the {kind} cell need the same number of primitives, got {sizes}."
                )
            for row, edge in enumerate(edges):
                for primitive in edge:
                    primitive_named(primitive)
                if len(set(edge)) < len(edge):
                    raise ValueError(
                        f"Edge {row} of the {kind} cell names a primitive twice, got {edge}."
                    )
                if set(edge) <= {"none"}:
                    raise ValueError(
                        f"Edge {row} of the {kind} cell needs a primitive other than 'none', got "
                        f"{edge}."
                    )


def as_candidates(primitives: Sequence[str] | Candidates, nodes: int) -> Candidates:
    """Returns `primitives` themselves, or the candidates of a cell with them on every edge.

    Raises:
        ValueError: if candidates for another number of nodes are given.
    """
    edges = edge_count(nodes)
    if not isinstance(primitives, Candidates):
        every = (tuple(primitives),) * edges
        return Candidates(normal=every, reduction=every)
    if len(primitives.normal) != edges or len(primitives.reduction) != edges:
        raise ValueError(
            f"A cell with {nodes} nodes has {edges} edges, but the candidates are for "
            f"{len(primitives.normal)} (normal) and {len(primitives.reduction)} (reduction). Give "
            "one tuple of primitives per edge."
        )
    return primitives
