"""Edges of a derived cell, where its states stand in pictures, and how its arrows bend."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "COLUMN", "EDGES_PER_NODE", "Edge", "Place", "cell_places", "control_point", "edge_bend",
]  # fmt: skip

EDGES_PER_NODE = 2


@dataclass(frozen=True)
class Edge:
    """An edge of a derived cell: its primitive, and the state that it reads.

    The states 0 and 1 are the cell's inputs, 2 + i is node i.
    """

    primitive: str
    source: int


Place = tuple[float, float]
"""Along the cell, and across it."""

COLUMN = 1.75
ROWS = (0.0, 0.95, -0.95, 0.0)


def cell_places(nodes: int) -> list[Place]:
    """Where the states of a cell stand: inputs at the left, one column per node, the output."""
    places = [(0.0, 1.35), (0.0, -1.35)]
    places += [(COLUMN * (node + 1), ROWS[node % len(ROWS)]) for node in range(nodes)]
    return [*places, (COLUMN * (nodes + 1) + 0.2, 0.0)]


def edge_bend(start: Place, end: Place) -> float:
    """How far an arrow bends around the nodes that it passes, as a part of its length."""
    upwards = start[1] > 0.0 or (start[1] == 0.0 and end[1] >= 0.0)
    bend = 0.14 + 0.045 * (end[0] - start[0]) / COLUMN  # wider around more nodes
    return -bend if upwards else bend


def control_point(start: Place, end: Place, bend: float) -> Place:
    """The control point of an arrow's quadratic Bézier curve, as Matplotlib's arc3 has it.

    It is off the middle by bend · length.
    """
    (x0, y0), (x1, y1) = start, end
    return (x0 + x1) / 2 + bend * (y1 - y0), (y0 + y1) / 2 - bend * (x1 - x0)
