"""A dependency graph as SVG text, for notebooks: offline, and in the colours of the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Arrow", "graph_svg"]

BOX_WIDTH, BOX_HEIGHT = 132, 44
GAP_X, GAP_Y, MARGIN = 36, 56, 12
LANE = 12
"""Between the boxes of a row and the first arrow that passes them, and between two such arrows."""

LEGEND_HEIGHT, LEGEND_WIDTH = 22, 162

Place = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """An edge from one box to another; dashed ones are values, solid ones solutions."""

    start: str
    end: str
    dashed: bool


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """A drawn arrow.

    Attributes:
        path: the `d` of an SVG path.
        points: its points, control points included: a curve stays within their hull.
        dashed: see `Arrow`.
    """

    path: str
    points: Sequence[Place]
    dashed: bool


def graph_svg(
    levels: Sequence[Sequence[str]],
    arrows: Sequence[Arrow],
    *,
    subtitles: Mapping[str, str],
    description: str,
) -> str:
    """Draws a box per name, lower levels below, arrows between them, and what the arrows mean.

    Args:
        levels: the names on each level, the lowest level first.
        arrows: edges between names.
        subtitles: name → the small text in its box.
        description: what a screen reader says.
    """
    width = max(map(len, levels)) * (BOX_WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    height = len(levels) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    # Each level is a centred row; y grows downwards in SVG, levels upwards.
    places: dict[str, Place] = {}
    for level, names in enumerate(levels):
        row = len(names) * (BOX_WIDTH + GAP_X) - GAP_X
        for index, name in enumerate(names):
            x = (width - row) / 2 + index * (BOX_WIDTH + GAP_X) + BOX_WIDTH / 2
            places[name] = x, height - MARGIN - BOX_HEIGHT / 2 - level * (BOX_HEIGHT + GAP_Y)

    curves = _curves(levels, arrows, places)
    boxes = [_box(name, place, subtitles[name]) for name, place in places.items()]
    # The picture is as large as its boxes, or larger where a curve leaves them.
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    left = min([0.0, *[x - MARGIN for x in xs]])
    right = max([width, *[x + MARGIN for x in xs]])
    top = min([0.0, *[y - MARGIN for y in ys]])
    legend = ""
    if arrows:
        missing = max(0.0, LEGEND_WIDTH + 2 * MARGIN - (right - left))
        left, right = left - missing / 2, right + missing / 2
        legend = _legend((left + right - LEGEND_WIDTH) / 2, height + LEGEND_HEIGHT / 3)
        height += LEGEND_HEIGHT
    drawn = "".join([*map(_drawn, curves), *boxes])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:g} {top:g} {right - left:g} '
        f'{height - top:g}" width="{right - left:g}" role="img" '
        f'style="max-width:100%;height:auto;font-family:sans-serif" '
        f'aria-label="{escape(description)}">{drawn}{legend}</svg>'
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


def _legend(x: float, y: float) -> str:
    """What the two kinds of arrows mean, from the place of its left end."""
    text = ""
    for shift, word, dashes in ((0, "solution", ""), (96, "value", ' stroke-dasharray="4 4"')):
        text += (
            f'<line x1="{x + shift:g}" y1="{y:g}" x2="{x + shift + 28:g}" y2="{y:g}" '
            f'stroke="currentColor"{dashes}/><text x="{x + shift + 34:g}" y="{y + 4:g}" '
            f'font-size="11" fill="currentColor">{word}</text>'
        )
    return text


# ------------------------------ arrows


def _curves(
    levels: Sequence[Sequence[str]], arrows: Sequence[Arrow], places: Mapping[str, Place]
) -> list[_Curve]:
    """The arrows between neighbouring levels, and around the boxes of the levels in between."""
    level_of = {name: level for level, names in enumerate(levels) for name in names}
    middle = sum(x for x, _ in places.values()) / len(places)

    def passed(arrow: Arrow) -> range:
        low, high = sorted((level_of[arrow.start], level_of[arrow.end]))
        return range(low + 1, high)

    # Arrows that pass few levels lie inside of those that pass more; two that pass the same level
    # on the same side have lanes of their own.
    found: dict[Arrow, _Curve] = {}
    taken: dict[tuple[int, int], set[int]] = {}  # side and lane → the levels that are passed in it
    for arrow in sorted(arrows, key=lambda arrow: len(passed(arrow))):
        start, end, between = places[arrow.start], places[arrow.end], passed(arrow)
        if not between:
            found[arrow] = _short(start, end, dashed=arrow.dashed)
            continue
        towards = (start[0] + end[0]) / 2 - middle
        side = 1 if towards > 1 or (abs(towards) <= 1 and arrow.dashed) else -1
        lane = 0
        while taken.setdefault((side, lane), set()).intersection(between):
            lane += 1
        taken[side, lane].update(between)
        edges = [places[name][0] * side for level in between for name in levels[level]]
        at = side * (max(edges) + BOX_WIDTH / 2 + LANE * (lane + 1))
        port = side * min(26 + 8 * lane, BOX_WIDTH / 2 - 8)
        found[arrow] = _long(start, end, at, port, dashed=arrow.dashed)
    return [found[arrow] for arrow in arrows]


def _short(start: Place, end: Place, *, dashed: bool) -> _Curve:
    """A curve from border to border, bent aside so that no arrow lies on another."""
    # Values bend, to keep off the solutions.
    side = 1 if start[1] > end[1] else -1
    y0, y1 = start[1] - side * BOX_HEIGHT / 2, end[1] + side * BOX_HEIGHT / 2
    if start[1] == end[1]:  # within a level: over the top
        y0 = y1 = start[1] - BOX_HEIGHT / 2
        control = (start[0] + end[0]) / 2, y0 - GAP_Y * 0.7
    else:
        control = (start[0] + end[0]) / 2 + (26 if dashed else 0), (y0 + y1) / 2
    shift = 14 if dashed else -14
    points = (start[0] + shift, y0), control, (end[0] + shift, y1)
    return _Curve(
        path=f"M{_pair(points[0])}Q{_pair(control)} {_pair(points[2])}",
        points=points,
        dashed=dashed,
    )


def _long(start: Place, end: Place, at: float, port: float, *, dashed: bool) -> _Curve:
    """A curve past the levels in between: out to x = `at`, straight, and in again.

    It is upright where it passes a level, and bends in the gaps only: so it touches no box.
    """
    side = 1 if start[1] > end[1] else -1
    x0, x1 = start[0] + port, end[0] + port
    y0, y1 = start[1] - side * BOX_HEIGHT / 2, end[1] + side * BOX_HEIGHT / 2
    ya, yb = y0 - side * GAP_Y, y1 + side * GAP_Y
    out = (x0, y0), (x0, (y0 + ya) / 2), (at, (y0 + ya) / 2), (at, ya)
    back = (at, yb), (at, (yb + y1) / 2), (x1, (yb + y1) / 2), (x1, y1)
    path = f"M{_pair(out[0])}C{_pairs(out[1:])}L{_pair(back[0])}C{_pairs(back[1:])}"
    return _Curve(path=path, points=(*out, *back), dashed=dashed)


def _pair(place: Place) -> str:
    return f"{place[0]:g} {place[1]:g}"


def _pairs(places: Iterable[Place]) -> str:
    return " ".join(map(_pair, places))


def _drawn(curve: _Curve) -> str:
    # The end of a curve points away from its last control point, and so does the head.
    control, (x1, y1) = curve.points[-2:]
    dx, dy = x1 - control[0], y1 - control[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    dx, dy = dx / length, dy / length
    head = " ".join(
        f"{x1 - 9 * dx + side * 4 * dy:.1f},{y1 - 9 * dy - side * 4 * dx:.1f}" for side in (1, -1)
    )
    dashes = ' stroke-dasharray="4 4"' if curve.dashed else ""
    return (
        f'<path d="{curve.path}" fill="none" stroke="currentColor"{dashes}/>'
        f'<polygon points="{x1:g},{y1:g} {head}" fill="currentColor"/>'
    )
