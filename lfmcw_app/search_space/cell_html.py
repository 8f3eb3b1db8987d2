"""Derived cells as a notebook shows them: pictures on a card of their own, light or dark."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from lfmcw_app.search_space.cell_cards import Drawn, graphs_of
from lfmcw_app.search_space.cell_svg import CELL_STYLE, cell_svg, primitive_label
from lfmcw_app.search_space.operations import primitive_named

__all__ = ["cells_html"]

LIGHT = {
    "text": "#1b1f24", "muted": "#626b77", "card": "#ffffff",
    "input": "#dcefdc", "node": "#dbe7fb", "output": "#f8e9bd",
}  # fmt: skip
DARK = {
    "text": "#e7eaee", "muted": "#9aa4b1", "card": "#1b2028",
    "input": "#28452c", "node": "#2a3d5e", "output": "#54471f",
}  # fmt: skip

LAYOUT = """\
.lfmcw-cells { display: flex; flex-wrap: wrap; gap: 8px 24px; padding: 12px 16px; }
.lfmcw-cells { background: var(--card); color: var(--text); border-radius: 8px; }
.lfmcw-cells figure { margin: 0; flex: 1 1 260px; max-width: 400px; font: 13px sans-serif; }
.lfmcw-cells svg { width: 100%; height: auto; font-family: sans-serif; }
"""


def cells_html(cells: Drawn) -> str:
    """Draws cells side by side, or lists their edges where they cannot be drawn.

    The card has a background of its own, so that it is readable on any page; its colours follow
    the page's colour scheme where a browser knows `light-dark()`.
    """
    try:
        graphs = graphs_of(cells)
    except ValueError:  # of another package, whose states are numbered in another way
        return _table(cells)
    figures = [
        Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(
            graph.title, cell_svg(graph)
        )
        for graph in graphs
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


def _table(cells: Drawn) -> str:
    """Lists edges in a table."""
    rows = [Markup("<tr><th>cell</th><th>node</th><th>reads</th></tr>")]
    row = Markup("<tr><td>{}</td><td>{}</td><td>{}</td></tr>")
    for kind, nodes in cells.to_data().items():
        for node, edges in enumerate(nodes):
            named = ", ".join(
                [
                    f"{primitive_label(str(p))} of {cells.state_name(int(source))}"
                    for p, source in edges
                ]
            )
            rows.append(row.format(kind, node, named))
    return str(Markup("<table>{}</table>").format(Markup("").join(rows)))
