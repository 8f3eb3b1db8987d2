"""Derived cells as SVG text in the page's colours, from inputs above to the output below.

They are narrow enough for a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from lfmcw_app.search_space.cell_layout import (
    EDGES_PER_NODE,
    Edge,
    Place,
    cell_places,
    control_point,
    edge_bend,
)

__all__ = ["CELL_STYLE", "cell_svg", "primitive_label", "state_label"]

WIDTH = 360
ACROSS, ALONG, TOP = 88.0, 56.0, 24.0
"""Pixels per unit of the picture's layout, and above the inputs."""
NODE_WIDTH, NODE_HEIGHT = 46.0, 24.0
LABEL_PLACES = (0.42, 0.55, 0.3, 0.66, 0.2, 0.76)
LETTER_WIDTH, LINE_HEIGHT = 7.4, 15.0

Box = tuple[float, float, float, float]

CELL_STYLE = """\
.cell .edge { fill: none; stroke-width: 2; }
.cell .join { fill: none; stroke-width: 1.2; stroke-dasharray: 2 4; }
.cell rect { stroke: var(--muted); }
.cell .input { fill: var(--input); }
.cell .node { fill: var(--node); }
.cell .output { fill: var(--output); }
.cell text.state { fill: var(--text); font-size: 12px; text-anchor: middle; }
.cell .op { font-size: 11.5px; font-weight: 600; text-anchor: middle; }
.cell .op { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
"""
"""Rules for the pictures. A page defines the colours: --text, --muted, --card, --input, --node,
--output, and --op-PRIMITIVE of each primitive."""


def primitive_label(primitive: str) -> str:
    """A primitive's name for people: sep_conv_3x3 → sep conv 3×3."""
    return primitive.replace("_3x3", " 3×3").replace("_5x5", " 5×5").replace("_", " ")


def state_label(source: int) -> str:
    """The name of a state of a cell: 0 and 1 are outputs of cells before, 2 + i is node i."""
    return ("c(k−2)", "c(k−1)")[source] if source < 2 else f"node {source - 2}"


def cell_svg(kind: str, edges: Sequence[Edge]) -> Markup:
    """Draws one derived cell.

    Args:
        kind: "normal" or "reduction".
        edges: two per node.
    """
    nodes = len(edges) // EDGES_PER_NODE
    layout = cell_places(nodes)
    *places, output = [_pixels(place) for place in layout]
    height = output[1] + TOP

    # Labels keep clear of the boxes, and of the labels placed before them.
    taken = [_box(place, NODE_WIDTH + 16, NODE_HEIGHT + 8) for place in (*places, output)]
    arrows, labels = [], []
    for index, edge in enumerate(edges):
        ends = layout[edge.source], layout[2 + index // EDGES_PER_NODE]
        curve = _pixels(ends[0]), _pixels(control_point(*ends, edge_bend(*ends))), _pixels(ends[1])
        arrows.append(_arrow(curve, f"op-{edge.primitive}", "edge"))
        text = primitive_label(edge.primitive)
        x, y = _free_place(curve, LETTER_WIDTH * len(text), taken)
        label = Markup('<text class="op" x="{:.1f}" y="{:.1f}" style="fill:var(--op-{})">{}</text>')
        labels.append(label.format(x, y + 4, edge.primitive, text))
    joins = [
        _arrow((place, _middle(place, output), output), "muted", "join") for place in places[2:]
    ]

    names = ["c(k−2)", "c(k−1)", *map(str, range(nodes)), "c(k)"]
    groups = ["input", "input", *["node"] * nodes, "output"]
    boxes = [
        _state(place, name, group)
        for place, name, group in zip((*places, output), names, groups, strict=True)
    ]

    description = "; ".join(
        f"node {index // EDGES_PER_NODE} reads {primitive_label(edge.primitive)} of "
        f"{state_label(edge.source)}"
        for index, edge in enumerate(edges)
    )
    picture = Markup(
        '<svg class="cell" viewBox="0 0 {} {:.0f}" role="img" aria-label="{} cell: {}" '
        'data-cell="{}" data-edges="{}">{}</svg>'
    )
    parts = Markup("").join([*joins, *arrows, *boxes, *labels])
    return picture.format(WIDTH, height, kind, description, kind, len(edges), parts)


def _state(place: Place, name: str, group: str) -> Markup:
    """The box of a state, with its name."""
    x, y = place
    box = Markup(
        '<rect class="state {0}" x="{1:.1f}" y="{2:.1f}" width="{3}" height="{4}" rx="7"/>'
        '<text class="state" x="{5:.1f}" y="{6:.1f}">{7}</text>'
    )
    left, top = x - NODE_WIDTH / 2, y - NODE_HEIGHT / 2
    return box.format(group, left, top, NODE_WIDTH, NODE_HEIGHT, x, y + 4, name)


def _pixels(place: Place) -> Place:
    """The layout runs from left to right, the page's cells from above to below."""
    along, across = place
    return WIDTH / 2 - ACROSS * across, TOP + ALONG * along


def _middle(start: Place, end: Place) -> Place:
    return (start[0] + end[0]) / 2, (start[1] + end[1]) / 2


def _on(curve: tuple[Place, Place, Place], t: float) -> Place:
    """A point of a quadratic Bézier curve."""
    x, y = (
        (1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b for a, c, b in zip(*curve, strict=True)
    )
    return x, y


def _box(middle: Place, width: float, height: float) -> Box:
    x, y = middle
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _free_place(curve: tuple[Place, Place, Place], width: float, taken: list[Box]) -> Place:
    """The place along a curve where a label covers least; it is taken afterwards."""

    def place(t: float) -> Place:
        x, y = _on(curve, t)
        return min(max(x, width / 2 + 2), WIDTH - width / 2 - 2), y

    def cost(t: float) -> float:
        return sum(_overlap(_box(place(t), width, LINE_HEIGHT), box) for box in taken)

    best = place(min(LABEL_PLACES, key=cost))
    taken.append(_box(best, width, LINE_HEIGHT))
    return best


def _arrow(curve: tuple[Place, Place, Place], colour: str, kind: str) -> Markup:
    """A curve with its head where it meets the box at its end; boxes are drawn over the ends."""
    # The head stands where the curve enters the box, and points as the curve does just before.
    start, control, end = curve
    box = _box(end, NODE_WIDTH + 4, NODE_HEIGHT + 4)
    t = next(t / 100 for t in range(100, 0, -1) if not _inside(_on(curve, t / 100), box))
    tip, before = _on(curve, t), _on(curve, max(t - 0.04, 0.0))
    angle = math.degrees(math.atan2(tip[1] - before[1], tip[0] - before[0]))
    path = (
        f"M{start[0]:.1f} {start[1]:.1f}Q{control[0]:.1f} {control[1]:.1f} {end[0]:.1f} "
        f"{end[1]:.1f}"
    )
    return Markup(
        '<path class="{}" style="stroke:var(--{c})" d="{}"/>'
        '<path style="fill:var(--{c})" transform="translate({:.1f} {:.1f}) rotate({:.0f})" d="M0 '
        '0L-8 -3.6L-8 3.6Z"/>'
    ).format(kind, path, tip[0], tip[1], angle, c=colour)


def _inside(place: Place, box: Box) -> bool:
    return box[0] <= place[0] <= box[2] and box[1] <= place[1] <= box[3]
