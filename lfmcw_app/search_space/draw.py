"""Pictures of derived cells as files, without Graphviz, by the layout of cell_cards.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Outline

from lfmcw_app.drawing import as_label, drawing
from lfmcw_app.search_space.cell_cards import (
    ARROW,
    Box,
    Drawn,
    Label,
    Layout,
    Line,
    graphs_of,
    layout_of,
    rounded,
)
from lfmcw_app.search_space.cell_svg import primitive_label
from lfmcw_app.search_space.operations import primitive_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_genotype"]

INCH = 60.0
"""Pixels of the layout per inch of a picture."""

POINT = 72.0 / INCH
TITLES = 0.6
"""Inches above the cells."""

COLOURS = {"input": "#cfe8cf", "node": "#cfe0f5", "output": "#f5e3b3"}
GREY, FRAME = "#626b77", "#444444"
WIDTHS = {"bus": 1.2, "tap": 1.8, "join": 0.9}
LONGEST_LABEL = 200


@drawing()
def draw_genotype(cells: Drawn, path: Path, title: str = "") -> None:
    """Draws cells of any space side by side into an image file (PNG, SVG or PDF by its name).

    Raises:
        ValueError: if a node reads a state that does not come before it.
    """
    graphs = graphs_of(cells)
    labels = {name: as_label(primitive_label(name), LONGEST_LABEL) for name in cells.primitives}
    layouts = [layout_of(graph, labels) for graph in graphs]
    widths = [layout.width for layout in layouts]
    height = max(layout.height for layout in layouts)
    figure = Figure(figsize=(sum(widths) / INCH, height / INCH + TITLES), layout="constrained")
    axes = figure.subplots(1, len(graphs), squeeze=False, width_ratios=widths)[0]
    for ax, graph, layout in zip(axes, graphs, layouts, strict=True):
        _draw_cell(ax, layout, height)
        ax.set_title(as_label(graph.title), fontsize=13)
    _finish(figure, path, title)


def _draw_cell(ax: Axes, layout: Layout, height: float) -> None:
    # What is drawn later lies on top.
    for box in layout.cards:
        ax.add_patch(_box(box, 7.0, facecolor="#f1f3f6", edgecolor="#dfe3e8"))
    for line in layout.lines:
        _draw_line(ax, line)
    for label in layout.labels:
        _draw_label(ax, label)
    ax.set_xlim(0.0, layout.width)
    ax.set_ylim(height, 0.0)  # downwards, as on a page
    ax.set_aspect("equal")
    ax.axis("off")


def _box(box: Box, radius: float, *, facecolor: str, edgecolor: str) -> FancyBboxPatch:
    left, top, right, bottom = box
    return FancyBboxPatch(
        (left, top), right - left, bottom - top, boxstyle=f"round,pad=0,rounding_size={radius}",
        facecolor=facecolor, edgecolor=edgecolor,
    )  # fmt: skip


def _draw_label(ax: Axes, label: Label) -> None:
    is_op = label.group == "op"
    edge = primitive_named(label.operation).colour if is_op else FRAME
    box = _box(label.box, 6.0, facecolor=COLOURS.get(label.group, "white"), edgecolor=edge)
    box.set_linewidth(1.4 if is_op else 0.9)
    ax.add_patch(box)
    left, top, right, bottom = label.box
    ax.text(
        (left + right) / 2, (top + bottom) / 2, label.text, ha="center", va="center",
        fontsize=(11.0 if is_op else 12.0) * POINT * 0.92,
        fontweight="bold" if is_op else "normal",
    )  # fmt: skip


def _draw_line(ax: Axes, line: Line) -> None:
    """A line with round corners, and its head if it has one."""
    colour = primitive_named(line.operation).colour if line.operation else GREY
    places, codes = [line.places[0]], [Outline.MOVETO]
    for before, corner, after in rounded(line.places):
        places += [before, corner, after]
        codes += [Outline.LINETO, Outline.CURVE3, Outline.CURVE3]
    places.append(line.places[-1])
    codes.append(Outline.LINETO)
    outline = PathPatch(Outline(places, codes), fill=False, edgecolor=colour)
    outline.set_linewidth(WIDTHS[line.group] * POINT)
    outline.set_linestyle(":" if line.group == "join" else "-")
    ax.add_patch(outline)
    if line.has_head:
        (before_x, _), (x, y) = line.places[-2:]
        back = x + (ARROW if before_x > x else -ARROW)
        head = [(x, y), (back, y - 3.6), (back, y + 3.6)]
        ax.add_patch(Polygon(head, closed=True, facecolor=colour, edgecolor="none"))


def _finish(figure: Figure, path: Path, title: str) -> None:
    if title:
        figure.suptitle(as_label(title, longest=90), fontsize=13)
    # Equal cells give equal files: SVG would hold the date, and identifiers drawn at random.
    with rc_context({"svg.hashsalt": "lfmcw"}):
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
