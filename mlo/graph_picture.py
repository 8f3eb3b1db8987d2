"""A dependency graph as SVG text, for notebooks: offline, and in the colours of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Arrow", "graph_svg"]

BOX_WIDTH, BOX_HEIGHT = 132, 44
GAP_X, GAP_Y, MARGIN = 36, 56, 12

Place = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """An edge from one box to another; dashed ones are values, solid ones solutions."""

    start: str
    end: str
    dashed: bool


def graph_svg(
    levels: Sequence[Sequence[str]],
    arrows: Sequence[Arrow],
    *,
    subtitles: Mapping[str, str],
    description: str,
) -> str:
    """Draws a box per name, lower levels below, and arrows between them.

    Args:
        levels: the names on each level, the lowest level first.
        arrows: edges between names.
        subtitles: name → the small text in its box.
        description: what a screen reader says.
    """
    widest = max(map(len, levels))
    width = widest * (BOX_WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    height = len(levels) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    # Each level is a centred row; y grows downwards in SVG, levels upwards.
    places: dict[str, Place] = {}
    for level, names in enumerate(levels):
        row = len(names) * (BOX_WIDTH + GAP_X) - GAP_X
        for index, name in enumerate(names):
            x = (width - row) / 2 + index * (BOX_WIDTH + GAP_X) + BOX_WIDTH / 2
            places[name] = x, height - MARGIN - BOX_HEIGHT / 2 - level * (BOX_HEIGHT + GAP_Y)
    curves = [_arrow(places[a.start], places[a.end], dashed=a.dashed) for a in arrows]
    boxes = [_box(name, place, subtitles[name]) for name, place in places.items()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img" style="max-width:100%;height:auto;font-family:sans-serif" '
        f'aria-label="{escape(description)}">{"".join(curves)}{"".join(boxes)}</svg>'
    )


def _box(name: str, place: Place, subtitle: str) -> str:
    x, y = place
    shown = name if len(name) <= 16 else f"{name[:15]}…"
    return (
        f"<g><title>{escape(name)}</title>"
        f'<rect x="{x - BOX_WIDTH / 2:g}" y="{y - BOX_HEIGHT / 2:g}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="8" fill="#7da7e8" fill-opacity=".25" stroke="currentColor"/>'
        f'<text x="{x:g}" y="{y - 3:g}" text-anchor="middle" font-size="14" font-weight="600" '
        'fill="currentColor">'
        f"{escape(shown)}</text>"
        f'<text x="{x:g}" y="{y + 14:g}" text-anchor="middle" font-size="11" '
        f'fill="currentColor">{subtitle}</text></g>'
    )


def _arrow(start: Place, end: Place, *, dashed: bool) -> str:
    """A curve from border to border, bent aside so that no arrow lies on another."""
    # Values bend, to keep off the solutions; so does what passes a level, to keep off its boxes.
    upwards = start[1] > end[1]
    side = 1 if upwards else -1
    y0, y1 = start[1] - side * BOX_HEIGHT / 2, end[1] + side * BOX_HEIGHT / 2
    if start[1] == end[1]:  # within a level: over the top
        y0 = y1 = start[1] - BOX_HEIGHT / 2
        control = (start[0] + end[0]) / 2, y0 - GAP_Y * 0.7
    else:
        passed = abs(start[1] - end[1]) / (BOX_HEIGHT + GAP_Y) - 1
        aside = (0.9 * BOX_WIDTH if passed > 0 else 0.0) + (26 if dashed else 0)
        control = (
            (start[0] + end[0]) / 2 + (-aside if passed > 0 and end[0] < start[0] else aside),
            (y0 + y1) / 2,
        )
    shift = 14 if dashed else -14
    x0, x1 = start[0] + shift, end[0] + shift
    # The end of a quadratic curve points away from its control point, and so does the head.
    dx, dy = x1 - control[0], y1 - control[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    dx, dy = dx / length, dy / length
    head = " ".join(
        f"{x1 - 9 * dx + side_ * 4 * dy:.1f},{y1 - 9 * dy - side_ * 4 * dx:.1f}"
        for side_ in (1, -1)
    )
    dashes = ' stroke-dasharray="4 4"' if dashed else ""
    return (
        f'<path d="M{x0:g} {y0:g}Q{control[0]:g} {control[1]:g} {x1:g} {y1:g}" fill="none" '
        f'stroke="currentColor"{dashes}/><polygon points="{x1:g},{y1:g} {head}" '
        'fill="currentColor"/>'
    )
