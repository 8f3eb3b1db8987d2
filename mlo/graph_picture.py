"""A dependency graph as SVG text, for notebooks: offline, and in the colours of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Arrow", "graph_svg"]

BOX_WIDTH, BOX_HEIGHT = 132, 44
GAP_X, GAP_Y, MARGIN = 36, 56, 12
LANE = 12
"""Between two arrows that pass a level on the same side, and from the first one to its boxes."""

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
    """A drawn arrow: a quadratic Bézier curve, which stays in the triangle of its three points."""

    start: Place
    control: Place
    end: Place
    dashed: bool


def graph_svg(
    levels: Sequence[Sequence[str]],
    arrows: Sequence[Arrow],
    *,
    subtitles: Mapping[str, str],
    description: str,
) -> str:
    """Draws one box per name, lower levels below, arrows between them, and a legend.

    Args:
        levels: the names on each level, the lowest level first.
        arrows: edges between names.
        subtitles: name → the small text in its box.
        description: what a screen reader says.
    """
    # The picture is as large as its boxes and the legend, or larger where a curve leaves them.
    places = _places(levels)
    curves = _curves(levels, arrows, places)
    points = [*places.values(), *[point for curve in curves for point in _extremes(curve)]]
    reach_x = MARGIN + BOX_WIDTH / 2
    left = min([0.0, *[x - MARGIN for x, _ in points]])
    right = max([x + MARGIN for x, _ in points] + [x + reach_x for x, _ in places.values()])
    top = min([0.0, *[y - MARGIN for _, y in points]])
    bottom = max(y for _, y in places.values()) + BOX_HEIGHT / 2 + MARGIN
    legend = ""
    if arrows:
        missing = max(0.0, LEGEND_WIDTH + 2 * MARGIN - (right - left))
        left, right = left - missing / 2, right + missing / 2
        legend = _legend((right - left - LEGEND_WIDTH) / 2, bottom - top + LEGEND_HEIGHT / 3)
        bottom += LEGEND_HEIGHT

    # Moved so that the picture begins at zero.
    places = {name: (x - left, y - top) for name, (x, y) in places.items()}
    drawn = [_arrow(curve) for curve in _curves(levels, arrows, places)]
    drawn += [_box(name, place, subtitles[name]) for name, place in places.items()]
    width, height = right - left, bottom - top
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" role="img" '
        f'style="max-width:100%;height:auto;font-family:sans-serif" '
        f'aria-label="{escape(description)}">{"".join(drawn)}{legend}</svg>'
    )


def _places(levels: Sequence[Sequence[str]]) -> dict[str, Place]:
    """The centre of every box."""
    # Each level is a centred row; y grows downwards in SVG, levels upwards.
    width = max(map(len, levels)) * (BOX_WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    height = len(levels) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    places: dict[str, Place] = {}
    for level, names in enumerate(levels):
        row = len(names) * (BOX_WIDTH + GAP_X) - GAP_X
        for index, name in enumerate(names):
            x = (width - row) / 2 + index * (BOX_WIDTH + GAP_X) + BOX_WIDTH / 2
            places[name] = x, height - MARGIN - BOX_HEIGHT / 2 - level * (BOX_HEIGHT + GAP_Y)
    return places


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
        corners: list[Place] = []  # of the outer boxes that are passed, with the lane's distance
        for level in between:
            x, y = max((places[name] for name in levels[level]), key=lambda place: side * place[0])
            x += side * (BOX_WIDTH / 2 + LANE * (lane + 1))
            corners += [(x, y - BOX_HEIGHT / 2), (x, y + BOX_HEIGHT / 2)]
        found[arrow] = _long(start, end, side, lane, corners, dashed=arrow.dashed)
    return [found[arrow] for arrow in arrows]


def _short(start: Place, end: Place, *, dashed: bool) -> _Curve:
    """A curve from border to border, bent aside so that no arrow lies on another."""
    # Values bend, to keep off the solutions.
    y0, y1 = _borders(start, end)
    if start[1] == end[1]:  # within a level: over the top
        y0 = y1 = start[1] - BOX_HEIGHT / 2
        control = (start[0] + end[0]) / 2, y0 - GAP_Y * 0.7
    else:
        control = (start[0] + end[0]) / 2 + (26 if dashed else 0), (y0 + y1) / 2
    shift = 14 if dashed else -14
    return _Curve(
        start=(start[0] + shift, y0), control=control, end=(end[0] + shift, y1), dashed=dashed
    )


def _long(
    start: Place, end: Place, side: int, lane: int, corners: Sequence[Place], *, dashed: bool
) -> _Curve:
    """A curve around the boxes in between, which passes their corners on one side.

    With the control point at half the height, y is linear in the curve's parameter t, and
    x(t) = (1 − t)² x0 + 2 t (1 − t) c + t² x1 is a parabola that is bent to that side. So it passes
    a whole box if it passes both of its corners, which gives the least c.
    """
    shift = side * min(26 + 8 * lane, BOX_WIDTH / 2 - 8)
    x0, x1 = start[0] + shift, end[0] + shift
    y0, y1 = _borders(start, end)
    needed = []
    for x, y in corners:
        t = (y - y0) / (y1 - y0)
        needed.append((x - (1 - t) ** 2 * x0 - t**2 * x1) / (2 * t * (1 - t)))
    c = max(needed, key=lambda c: side * c)
    return _Curve(start=(x0, y0), control=(c, (y0 + y1) / 2), end=(x1, y1), dashed=dashed)


def _borders(start: Place, end: Place) -> tuple[float, float]:
    """The heights at which an arrow leaves one box and reaches the other."""
    side = 1 if start[1] > end[1] else -1
    return start[1] - side * BOX_HEIGHT / 2, end[1] + side * BOX_HEIGHT / 2


def _extremes(curve: _Curve) -> list[Place]:
    """Points between which the curve stays, in x and in y: its ends and its turning points."""
    found = [curve.start, curve.end]
    for axis in (0, 1):
        a, b, c = curve.start[axis], curve.control[axis], curve.end[axis]
        if a - 2 * b + c and 0 < (t := (a - b) / (a - 2 * b + c)) < 1:
            points = zip(curve.start, curve.control, curve.end, strict=True)
            x, y = ((1 - t) ** 2 * p + 2 * t * (1 - t) * q + t**2 * r for p, q, r in points)
            found.append((x, y))
    return found


def _arrow(curve: _Curve) -> str:
    (x0, y0), control, (x1, y1) = curve.start, curve.control, curve.end
    # The end of a quadratic curve points away from its control point, and so does the head.
    dx, dy = x1 - control[0], y1 - control[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    dx, dy = dx / length, dy / length
    head = " ".join(
        f"{x1 - 9 * dx + side * 4 * dy:.1f},{y1 - 9 * dy - side * 4 * dx:.1f}" for side in (1, -1)
    )
    dashes = ' stroke-dasharray="4 4"' if curve.dashed else ""
    return (
        f'<path d="M{x0:g} {y0:g}Q{control[0]:g} {control[1]:g} {x1:g} {y1:g}" fill="none" '
        f'stroke="currentColor"{dashes}/><polygon points="{x1:g},{y1:g} {head}" '
        'fill="currentColor"/>'
    )
