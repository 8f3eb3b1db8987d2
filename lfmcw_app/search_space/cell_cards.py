"""Where the boxes, labels and lines of a cell's picture stand, so that no line meets a label.

Each node is a card in the middle of the picture: the operations on the edges into it, two in a row,
and below them its name. Lines run beside the cards only. They leave a card at the height of its
name, follow a lane downwards, and enter a card at the height of an operation. So a line can cross
another line, but no label, with any number of nodes and edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, Protocol

from lfmcw_app.units import text_units

__all__ = [
    "ARROW", "Box", "CellGraph", "Drawn", "Label", "Layout", "Line", "graphs_of", "kind_title",
    "layout_of", "rounded",
]  # fmt: skip

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""

Place = tuple[float, float]

NARROWEST = 360.0
LETTER_WIDTH = 7.4
CHIP_HEIGHT, NAME_HEIGHT = 24.0, 24.0
PADDING, GAP, ROW_GAP = 6.0, 8.0, 16.0
LANE, LEAST_LANE, MARGIN = 11.0, 7.0, 14.0
ARROW = 7.0
SIDES = (-1, 1)
"""Left and right of the cards."""

CORNER = 5.0
"""Radius of the corners of lines; two lines of one lane are at least four of them apart."""


class Drawn(Protocol):
    """What is asked of derived cells: see `Cells` of genotype.py."""

    inputs: ClassVar[int]
    output: ClassVar[Literal["last", "all"] | None]

    @property
    def primitives(self) -> frozenset[str]:
        """The names of the operations."""
        ...

    def to_data(self) -> dict[str, list[list[list[str | int]]]]:
        """Returns kind of cell → for each node its edges as [primitive, source]."""
        ...

    def state_name(self, source: int, /) -> str:
        """What the number of a state means, for people."""
        ...


@dataclass(frozen=True, kw_only=True)
class CellGraph:
    """A cell as a graph, whose states are its inputs and after them its nodes.

    Attributes:
        kind: of cell.
        inputs: their names.
        nodes: name of each node → what comes in, as (operation, state).
        joined: the name of the output, if it is all nodes side by side.
    """

    kind: str
    inputs: tuple[str, ...]
    nodes: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
    joined: str | None

    @property
    def title(self) -> str:
        """The name of its kind, for people."""
        return kind_title(self.kind)


@dataclass(frozen=True, kw_only=True)
class Label:
    """A text in a box.

    Attributes:
        group: "input", "node", "output", or "op" of an operation.
        operation: its name, of an operation.
    """

    box: Box
    text: str
    group: str
    operation: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line along straight pieces, with round corners.

    Attributes:
        group: "bus" from a state down its lane, "tap" from there to an operation, or "join" to the
            output.
        places: its corners.
        operation: the name of the operation that a tap leads to.
        has_head: whether an arrow's head ends it.
    """

    group: str
    places: tuple[Place, ...]
    operation: str = ""
    has_head: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A cell's picture.

    Attributes:
        cards: the boxes of nodes, behind their labels.
    """

    width: float
    height: float
    cards: Sequence[Box]
    labels: Sequence[Label]
    lines: Sequence[Line]


def kind_title(kind: str) -> str:
    """The name of a kind of cell, for people."""
    return kind if kind.endswith("cell") else f"{kind} cell"


def graphs_of(cells: Drawn) -> list[CellGraph]:
    """The graphs of all kinds of cell; edges without an operation are left out.

    Raises:
        ValueError: if a node reads a state that does not come before it.
    """
    graphs = []
    count = cells.inputs
    for kind, nodes in cells.to_data().items():
        named: list[tuple[str, tuple[tuple[str, int], ...]]] = []
        for node, edges in enumerate(nodes):
            read = [(str(operation), int(source)) for operation, source in edges]
            if late := [source for _, source in read if not 0 <= source < count + node]:
                raise ValueError(f"node {node} of {kind!r} reads state {late[0]}")
            is_output = cells.output == "last" and node == len(nodes) - 1
            name = "output" if is_output else cells.state_name(count + node)
            named.append((name, tuple(one for one in read if one[0] != "none")))
        graphs.append(
            CellGraph(
                kind=kind,
                inputs=tuple(map(cells.state_name, range(count))),
                nodes=tuple(named),
                joined="output: all nodes, side by side" if cells.output == "all" else None,
            )
        )
    return graphs


def rounded(places: Sequence[Place]) -> list[tuple[Place, Place, Place]]:
    """Where the corners of a line begin, where they are, and where they end."""
    return [
        (_towards(corner, start), corner, _towards(corner, end))
        for (start, corner), (_, end) in pairwise(pairwise(places))
    ]


def _towards(place: Place, other: Place) -> Place:
    """The place `CORNER` pixels from one place to another, or all the way if that is shorter."""
    length = abs(other[0] - place[0]) + abs(other[1] - place[1])  # pieces are straight or upright
    share = min(1.0, CORNER / length) if length else 0.0
    return place[0] + share * (other[0] - place[0]), place[1] + share * (other[1] - place[1])


def layout_of(graph: CellGraph, labels: dict[str, str]) -> Layout:
    """Places the parts of a graph.

    Args:
        graph: of a cell.
        labels: operation → what its label says.
    """
    return _Placing(graph, labels).layout()


@dataclass(kw_only=True)
class _Bus:
    """What leads from a state down one side of the cards: its lane, and the heights of its taps."""

    source: int
    side: int
    top: float
    taps: list[tuple[float, Label]]
    lane: int = 0

    @property
    def bottom(self) -> float:
        return max(height for height, _ in self.taps)


class _Placing:
    """Places the cards from above to below, and then the lines beside them."""

    def __init__(self, graph: CellGraph, labels: dict[str, str]) -> None:
        self._graph, self._labels = graph, labels
        used = [labels[operation] for _, edges in graph.nodes for operation, _ in edges]
        names = [*graph.inputs, *(name for name, _ in graph.nodes), graph.joined or ""]
        chip = max(map(_width, used), default=0.0)
        self._chip = max(chip, (max(map(_width, names)) - GAP) / 2)
        self._card = 2 * self._chip + GAP + 2 * PADDING
        self._cards: list[Box] = []
        self._placed: list[Label] = []
        self._buses: dict[tuple[int, int], _Bus] = {}
        self._outlets: list[float] = []  # of each state, the height of its name
        self._y = PADDING

    def layout(self) -> Layout:
        for name in self._graph.inputs:
            self._place_name(name, "input")
            self._y += GAP
        self._y += ROW_GAP - GAP
        for index, (name, edges) in enumerate(self._graph.nodes, start=1):
            ends = self._graph.joined is None and index == len(self._graph.nodes)
            self._place_node(name, edges, "output" if ends else "node")
        if self._graph.joined is not None:
            self._place_name(self._graph.joined, "output")
            self._y += PADDING
        return self._finished()

    def _place_name(self, name: str, group: str) -> None:
        box = (0.0, self._y, self._card, self._y + NAME_HEIGHT)
        self._placed.append(Label(box=box, text=name, group=group))
        self._outlets.append(self._y + NAME_HEIGHT / 2)
        self._y += NAME_HEIGHT

    def _place_node(self, name: str, edges: Sequence[tuple[str, int]], group: str) -> None:
        """A card: two operations in a row, the first half of them read from the left."""
        top, rows = self._y, (len(edges) + 1) // 2
        for index, (operation, source) in enumerate(edges):
            right, row = divmod(index, rows)
            left = PADDING + right * (self._chip + GAP)
            y = top + PADDING + row * (CHIP_HEIGHT + PADDING)
            box = (left, y, left + self._chip, y + CHIP_HEIGHT)
            text = self._labels[operation]
            label = Label(box=box, text=text, group="op", operation=operation)
            self._placed.append(label)
            self._tap(source, SIDES[right], y + CHIP_HEIGHT / 2, label)
        self._y = top + rows * (CHIP_HEIGHT + PADDING) + (PADDING if rows else 0.0)
        self._place_name(name, group)
        self._cards.append((0.0, top, self._card, self._y))
        self._y += ROW_GAP

    def _tap(self, source: int, side: int, height: float, label: Label) -> None:
        top = self._outlets[source]
        bus = self._buses.setdefault(
            (source, side), _Bus(source=source, side=side, top=top, taps=[])
        )
        bus.taps.append((height, label))

    def _finished(self) -> Layout:
        """Gives lanes to the lines, and moves everything beside the lanes at the left."""
        counts = {side: self._lanes(side) for side in SIDES}
        joins = self._graph.joined is not None
        most = max(counts[-1], counts[1] + joins, 1)
        free = (NARROWEST - self._card) / 2 - MARGIN
        step = min(LANE, max(LEAST_LANE, free / most))
        margin = max((NARROWEST - self._card) / 2, MARGIN + most * step)
        edges = {-1: margin, 1: margin + self._card}

        lines = []
        if joins:
            lines += self._joins(edges[1], edges[1] + PADDING + (counts[1] + 1) * step)
        for bus in self._buses.values():
            x = edges[bus.side] + bus.side * (PADDING + (bus.lane + 1) * step)
            lines += _bus_lines(bus, x, edges[bus.side], margin)
        labels = [
            Label(box=_moved(one.box, margin), text=one.text, group=one.group,
                  operation=one.operation)
            for one in self._placed
        ]  # fmt: skip
        return Layout(
            width=2 * margin + self._card,
            height=self._y,
            cards=[_moved(box, margin) for box in self._cards],
            labels=labels,
            lines=lines,
        )

    def _lanes(self, side: int) -> int:
        """Gives each line of a side a lane, short lines inside; returns how many there are."""
        buses = [bus for bus in self._buses.values() if bus.side == side]
        lanes: list[list[_Bus]] = []
        for bus in sorted(buses, key=lambda one: (one.bottom - one.top, one.top)):
            bus.lane = next(
                (index for index, lane in enumerate(lanes) if all(_apart(bus, o) for o in lane)),
                len(lanes),
            )
            if bus.lane == len(lanes):
                lanes.append([])
            lanes[bus.lane].append(bus)
        return len(lanes)

    def _joins(self, edge: float, lane: float) -> list[Line]:
        """The line from the first node to the output, and those that join it on its way."""
        *nodes, end = self._outlets[len(self._graph.inputs) :]
        first = ((edge, nodes[0]), (lane, nodes[0]), (lane, end), (edge, end))
        return [
            Line(group="join", places=first, has_head=True),
            *(Line(group="join", places=((edge, y), (lane, y))) for y in nodes[1:]),
        ]


def _apart(one: _Bus, other: _Bus) -> bool:
    return one.top >= other.bottom + 4 * CORNER or other.top >= one.bottom + 4 * CORNER


def _bus_lines(bus: _Bus, x: float, edge: float, margin: float) -> list[Line]:
    """The line from a state down its lane, and from there to the operations that read it."""
    # Taps begin above their corners, so that the line to the last one is round.
    down = ((edge, bus.top), (x, bus.top), (x, bus.bottom - CORNER))
    lines = [Line(group="bus", places=down)]
    for height, label in bus.taps:
        end = margin + label.box[0 if bus.side < 0 else 2]
        places = ((x, height - CORNER), (x, height), (end, height))
        lines.append(Line(group="tap", places=places, operation=label.operation, has_head=True))
    return lines


def _moved(box: Box, across: float) -> Box:
    return box[0] + across, box[1], box[2] + across, box[3]


def _width(text: str) -> float:
    return LETTER_WIDTH * text_units(text) + 10.0
