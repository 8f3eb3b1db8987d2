"""Pictures of derived cells, without Graphviz: boxes for states, labelled arrows for operations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from lfmcw_app.drawing import as_label, drawing
from lfmcw_app.search_space.cell_layout import (
    COLUMN,
    Place,
    cell_places,
    control_point,
    edge_bend,
)
from lfmcw_app.search_space.genotype import EDGES_PER_NODE, Edge, Genotype
from lfmcw_app.search_space.nasbench201 import SumCell, sum_edges
from lfmcw_app.search_space.operations import primitive_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_genotype", "draw_sum_cell"]

LEVEL = 1.0
"""Height of an edge over each node that it passes."""

INPUT_COLOUR, NODE_COLOUR, OUTPUT_COLOUR = "#cfe8cf", "#cfe0f5", "#f5e3b3"


@drawing()
def draw_genotype(genotype: Genotype, path: Path, title: str = "") -> None:
    """Draws the normal and the reduction cell into an image file (PNG, SVG or PDF by its name)."""
    figure = Figure(figsize=(2.2 + COLUMN * (genotype.nodes + 1), 8.2), layout="constrained")
    axes = figure.subplots(2, 1)
    cells = {"normal": genotype.normal, "reduction": genotype.reduction}
    for ax, (kind, edges) in zip(axes, cells.items(), strict=True):
        _draw_cell(ax, edges)
        ax.set_title(f"{kind} cell", fontsize=13, loc="left")
    _finish(figure, path, title)


def _draw_cell(ax: Axes, edges: tuple[Edge, ...]) -> None:
    nodes = len(edges) // EDGES_PER_NODE
    *places, output = cell_places(nodes)
    for index, edge in enumerate(edges):
        start, end = places[edge.source], places[2 + index // EDGES_PER_NODE]
        bend, slot = edge_bend(start, end), index % EDGES_PER_NODE
        _arrow(ax, start, end, edge.primitive, bend=bend, slot=slot)
    for place in places[2:]:
        _arrow(ax, place, output, None, bend=0.0, slot=0)

    # The boxes are drawn over the ends of the arrows.
    names = ["c(k−2)", "c(k−1)", *(str(node) for node in range(nodes)), "c(k)"]
    colours = [INPUT_COLOUR] * 2 + [NODE_COLOUR] * nodes + [OUTPUT_COLOUR]
    _draw_states(ax, [*places, output], names, colours)
    ax.set_xlim(-0.6, output[0] + 0.6)
    ax.set_ylim(-2.2, 2.2)


def _arrow(
    ax: Axes, start: Place, end: Place, primitive: str | None, *, bend: float, slot: int
) -> None:
    colour = primitive_named(primitive).colour if primitive else "#bbbbbb"
    ax.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=13,
            color=colour, linewidth=1.7 if primitive else 1.0, linestyle="-" if primitive else ":",
            shrinkA=20, shrinkB=15, zorder=2,
        )
    )  # fmt: skip
    if primitive is None:
        return

    # The label stands on the Bézier curve; those of a node's two edges at different places.
    control = control_point(start, end, bend)
    t = 0.4 if slot == 0 else 0.62
    x, y = (
        (1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b
        for a, c, b in zip(start, control, end, strict=True)
    )
    box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
    ax.text(
        x, y, as_label(primitive.replace("_", " ")), ha="center", va="center", fontsize=8.5,
        color=colour, zorder=5, bbox=box,
    )  # fmt: skip


@drawing()
def draw_sum_cell(cell: SumCell, path: Path, title: str = "") -> None:
    """Draws a cell of NAS-Bench-201 into an image file (PNG, SVG or PDF by its name).

    Edges without an operation are left out; the last node is the output.
    """
    nodes = cell.nodes or 0
    places = [(1.9 * COLUMN * state, 0.0) for state in range(nodes)]
    size = (2.0 + places[-1][0], 2.2 + LEVEL * nodes)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    edges = zip(sum_edges(nodes), cell.operations, strict=True)
    for (node, source), operation in edges:
        if operation != "none":
            # An edge goes around the nodes that it passes, the higher the more they are.
            passed, length = node - source - 1, places[node][0] - places[source][0]
            below = passed == 1 and source % 2 == 0
            bend = (1.0 if below else -1.0) * 2.0 * LEVEL * passed / length
            _arrow(ax, places[source], places[node], operation, bend=bend, slot=0)
    names = ["input", *(str(node) for node in range(nodes - 2)), "output"]
    colours = [INPUT_COLOUR, *[NODE_COLOUR] * (nodes - 2), OUTPUT_COLOUR]
    _draw_states(ax, places, names, colours)
    ax.set_xlim(-0.8, places[-1][0] + 0.8)
    ax.set_ylim(-LEVEL - 0.4, LEVEL * max(1, nodes - 2) + 0.4)
    _finish(figure, path, title)


def _draw_states(ax: Axes, places: list[Place], names: list[str], colours: list[str]) -> None:
    for (x, y), name, colour in zip(places, names, colours, strict=True):
        ax.text(
            x, y, name, ha="center", va="center", fontsize=11, zorder=4,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "#444444"},
        )  # fmt: skip
    ax.set_aspect("equal")
    ax.axis("off")


def _finish(figure: Figure, path: Path, title: str) -> None:
    if title:
        figure.suptitle(as_label(title, longest=90), fontsize=13)
    # Equal cells give equal files: SVG would hold the date, and identifiers drawn at random.
    with rc_context({"svg.hashsalt": "lfmcw"}):
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
