"""Derived cells as a notebook shows them: pictures on a card of their own, light or dark."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from markupsafe import Markup

from lfmcw_app.search_space.cell_cards import graphs_of
from lfmcw_app.search_space.cell_svg import CELL_STYLE, cell_svg
from lfmcw_app.search_space.operations import primitive_named

if TYPE_CHECKING:  # cells show themselves by this module
    from lfmcw_app.search_space.genotype import Cells

__all__ = ["cells_html"]

LIGHT = {
    "text": "#1b1f24", "muted": "#626b77", "card": "#ffffff", "page": "#f6f7f9", "line": "#dfe3e8",
    "input": "#dcefdc", "node": "#dbe7fb", "output": "#f8e9bd",
}  # fmt: skip
DARK = {
    "text": "#e7eaee", "muted": "#9aa4b1", "card": "#1b2028", "page": "#12161b", "line": "#323a45",
    "input": "#28452c", "node": "#2a3d5e", "output": "#54471f",
}  # fmt: skip

LAYOUT = """\
.lfmcw-cells { display: flex; flex-wrap: wrap; gap: 8px 24px; padding: 12px 16px; }
.lfmcw-cells { background: var(--card); color: var(--text); border-radius: 8px; }
.lfmcw-cells figure { margin: 0; flex: 0 1 360px; font: 13px sans-serif; }
.lfmcw-cells svg { width: 100%; height: auto; font-family: sans-serif; }
"""


def cells_html(cells: Cells) -> str:
    """Draws all kinds of cell side by side.

    The card has a background of its own, so that it is readable on any page; its colours follow
    the page's colour scheme where a browser knows `light-dark()`.
    """
    figures = [
        Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(
            graph.title, cell_svg(graph)
        )
        for graph in graphs_of(cells)
    ]
    card = Markup('<div class="lfmcw-cells"><style>{}</style>{}</div>')
    return str(card.format(_style(cells.primitives), Markup("").join(figures)))


def _style(primitives: Iterable[str]) -> Markup:
    """Rules and colours; the colours of the light scheme alone for browsers that know no other."""
    light, dark = dict(LIGHT), dict(DARK)
    for name in sorted(primitives):
        primitive = primitive_named(name)
        light[f"op-{name}"] = primitive.colour
        dark[f"op-{name}"] = primitive.dark_colour or primitive.colour
    plain = "".join([f"--{name}: {colour};" for name, colour in light.items()])
    both = "".join(
        [f"--{name}: light-dark({colour}, {dark[name]});" for name, colour in light.items()]
    )
    return Markup(
        f"{CELL_STYLE}{LAYOUT}.lfmcw-cells {{ {plain} }}\n"
        f"@supports (color: light-dark(#000, #fff)) {{ .lfmcw-cells {{ {both} }} }}"
    )
