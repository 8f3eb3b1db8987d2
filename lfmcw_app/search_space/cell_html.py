"""Derived cells as a notebook shows them: pictures on a card of their own, light or dark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from markupsafe import Markup

from lfmcw_app.search_space.cell_layout import Edge
from lfmcw_app.search_space.cell_svg import CELL_STYLE, cell_svg, primitive_label
from lfmcw_app.search_space.operations import primitive_named

__all__ = ["cells_html", "edges_html"]

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


def cells_html(cells: Mapping[str, Sequence[Edge]]) -> str:
    """Draws cells side by side.

    The card has a background of its own, so that it is readable on any page; its colours follow
    the page's colour scheme where a browser knows `light-dark()`.

    Args:
        cells: kind of cell → its edges.
    """
    primitives = {edge.primitive for edges in cells.values() for edge in edges}
    figures = [
        Markup("<figure><figcaption>{} cell</figcaption>{}</figure>").format(
            kind, cell_svg(kind, edges)
        )
        for kind, edges in cells.items()
    ]
    card = Markup('<div class="lfmcw-cells"><style>{}</style>{}</div>')
    return str(card.format(_style(primitives), Markup("").join(figures)))


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


def edges_html(
    cells: Mapping[str, Sequence[Sequence[Sequence[str | int]]]], state_name: Callable[[int], str]
) -> str:
    """Lists edges in a table, for cells of which there is no picture as text.

    Args:
        cells: kind of cell → for each node its edges as [primitive, source].
        state_name: number of a state → its name.
    """
    rows = [Markup("<tr><th>cell</th><th>node</th><th>reads</th></tr>")]
    row = Markup("<tr><td>{}</td><td>{}</td><td>{}</td></tr>")
    for kind, nodes in cells.items():
        for node, edges in enumerate(nodes):
            named = ", ".join(
                [f"{primitive_label(str(p))} of {state_name(int(source))}" for p, source in edges]
            )
            rows.append(row.format(kind, node, named))
    return str(Markup("<table>{}</table>").format(Markup("").join(rows)))
