"""Derived cells of any space as SVG text in the page's colours, from inputs above to outputs below.

They are narrow enough for a phone.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lfmcw_app.search_space.cell_cards import (
    ARROW,
    NARROWEST,
    Box,
    CellGraph,
    Label,
    Layout,
    Line,
    Place,
    layout_of,
    rounded,
)

__all__ = ["CELL_STYLE", "cell_layout", "cell_svg", "primitive_label"]

TEXT_DROP = 4
"""Pixels from the middle of a line of text down to its base line."""

CELL_STYLE = """\
.cell .bus { fill: none; stroke-width: 1.6; }
.cell .tap { fill: none; stroke-width: 2.2; }
.cell .join { fill: none; stroke-width: 1.2; stroke-dasharray: 2 4; }
.cell rect { stroke: var(--muted); stroke-width: 1; }
.cell .card { fill: var(--muted); fill-opacity: .09; stroke-opacity: .35; }
.cell .input { fill: var(--input); }
.cell .node { fill: var(--node); }
.cell .output { fill: var(--output); }
.cell rect.op { stroke-width: 1.5; }
.cell text.state { fill: var(--text); font-size: 12px; text-anchor: middle; }
.cell text.op { fill: var(--text); font-size: 11.5px; font-weight: 600; text-anchor: middle; }
"""
"""Rules for the pictures. A page defines the colours: --text, --muted, --card, --input, --node,
--output, and --op-PRIMITIVE of each primitive."""


def primitive_label(primitive: str) -> str:
    """A primitive's name for people: sep_conv_3x3 → sep conv 3×3."""
    named = primitive.replace("_1x1", " 1×1").replace("_3x3", " 3×3").replace("_5x5", " 5×5")
    return named.replace("_", " ")


def cell_layout(graph: CellGraph) -> Layout:
    """Where the parts of a cell's picture are, in pixels."""
    used = {operation for _, edges in graph.nodes for operation, _ in edges}
    return layout_of(graph, {operation: primitive_label(operation) for operation in used})


def cell_svg(graph: CellGraph) -> Markup:
    """Draws one derived cell."""
    layout = cell_layout(graph)
    states = [*graph.inputs, *(name for name, _ in graph.nodes)]
    reads = [
        f"{name} reads {primitive_label(operation)} of {states[source]}"
        for name, edges in graph.nodes
        for operation, source in edges
    ]

    # What is drawn later lies on top.
    parts = [_box("card", box, 9) for box in layout.cards]
    parts += [_line(line) for line in layout.lines]
    parts += [_label(label) for label in layout.labels]
    wide = Markup(' style="min-width:{:.0f}px"').format(layout.width)
    return Markup(
        '<svg class="cell" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}: {}" '
        'data-cell="{}" data-edges="{}"{}>{}</svg>'
    ).format(
        layout.width, layout.height, graph.title, "; ".join(reads), graph.kind, len(reads),
        wide if layout.width > NARROWEST else "", Markup("").join(parts),
    )  # fmt: skip


def _box(classes: str, box: Box, radius: int, style: str = "") -> Markup:
    left, top, right, bottom = box
    rect = Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="{}"{}/>'
    )
    return rect.format(classes, left, top, right - left, bottom - top, radius, style)


def _label(label: Label) -> Markup:
    """A text in the middle of its box."""
    left, top, right, bottom = label.box
    is_op = label.group == "op"
    colours = Markup(' style="stroke:var(--op-{0});fill:var(--op-{0});fill-opacity:.13"')
    style = colours.format(label.operation) if is_op else Markup("")
    text = Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
        "op" if is_op else "state", (left + right) / 2, (top + bottom) / 2 + TEXT_DROP, label.text
    )
    kind = "op" if is_op else f"state {label.group}"
    return _box(kind, label.box, 6 if is_op else 7, style) + text


def _line(line: Line) -> Markup:
    """A line with round corners, and its head if it has one."""
    colour = f"op-{line.operation}" if line.operation else "muted"
    path = Markup('<path class="{}" style="stroke:var(--{})" d="{}"/>').format(
        line.group, colour, _rounded(line.places)
    )
    if not line.has_head:
        return path
    (before, _), (x, y) = line.places[-2:]
    back = ARROW if before > x else -ARROW
    head = Markup('<path class="head" style="fill:var(--{})" d="M{:.1f} {:.1f}l{} -3.6v7.2z"/>')
    return path + head.format(colour, x, y, back)


def _rounded(places: Sequence[Place]) -> str:
    """The path along straight pieces, whose corners are cut to arcs."""
    data = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    for before, corner, after in rounded(places):
        data += (
            f"L{before[0]:.1f} {before[1]:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {after[0]:.1f} "
            f"{after[1]:.1f}"
        )
    return f"{data}L{places[-1][0]:.1f} {places[-1][1]:.1f}"
