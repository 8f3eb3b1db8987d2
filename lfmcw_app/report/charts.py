"""Charts as SVG text in the page's colours, which need no script and can be read out.

A chart is as wide as its place. Its height, its lines and its letters keep their size: horizontally
all is in thousandths of the width, and vertically in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

__all__ = ["Point", "Series", "line_chart", "short"]

Point = tuple[float, float]

WIDTH, HEIGHT = 1000, 220
"""Thousandths of the place for the lines, whose margins are the page's; pixels."""

TOP, BOTTOM = 20, 34
MOST_POINTS = 150
SMOOTHING = 25
"""A running mean over a 25th of the rounds is drawn thick."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart.

    Attributes:
        label: in the legend.
        points: (x, y), x ascending.
        colour: a CSS variable of the page, without its dashes.
    """

    label: str
    points: Sequence[Point]
    colour: str = "series-1"


Drawn = tuple[Series, Sequence[Point], Sequence[Point], int]
"""A line, its values, their running mean, and of how many rounds that is."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_label: str = "round",
    log: bool = False,
    boundaries: Sequence[tuple[float, str]] = (),
    smooth: bool = True,
    mark_ends: bool = False,
) -> Markup:
    """Draws lines over rounds: each value thin, a running mean thick.

    The legend has the last value of the mean.

    Args:
        title: above the chart.
        series: its lines; empty ones are left out, and a chart without lines is the empty string.
        unit: of the values.
        x_label: of the horizontal axis.
        log: whether the vertical axis is logarithmic; values that are not positive are left out.
        boundaries: where something begins on the horizontal axis, and what.
        smooth: whether a running mean is taken.
        mark_ends: whether lines that end before the longest are marked there, and named.
    """
    lines = []
    for one in series:
        points = [(x, y) for x, y in one.points if math.isfinite(y) and (y > 0 or not log)]
        if points:
            window = max(1, len(points) // SMOOTHING) if smooth else 1
            lines.append((one, points, _running_mean(points, window), window))
    if not lines:
        return Markup("")

    # What is drawn later lies on top: the grid, where stages begin, then the lines.
    scale = _Scale.of([(raw, mean) for _, raw, mean, _ in lines], log)
    body = [_grid(scale, x_label)]
    for x, label in boundaries:
        place = _percent(scale.x(x))
        begin = Markup('<line class="boundary" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>')
        name = Markup('<text class="tick" x="{}" dx="2" y="{}">{}</text>')
        body.append(begin.format(place, TOP, HEIGHT - BOTTOM) + name.format(place, TOP - 6, label))
    for one, raw, mean, window in lines:
        drawn = _polyline(one, raw, scale, "raw") if window > 1 else Markup("")
        body.append(_stretched(drawn + _polyline(one, mean, scale, "mean")))
        if len(mean) == 1 or (mark_ends and mean[-1][0] < scale.high_x):
            # (A line of one point would be invisible.)
            dot = Markup('<circle r="3" cx="{}" cy="{:.1f}" style="fill:var(--{})"/>')
            place = _percent(scale.x(mean[-1][0]))
            body.append(dot.format(place, scale.y(mean[-1][1]), one.colour))

    entry = Markup(
        '<li data-label="{0}" data-value="{1:.6g}"><i style="background:var(--{2})"></i>{0} '
        "<b>{3}</b></li>"
    )
    legend = Markup("").join(
        entry.format(one.label, mean[-1][1], one.colour, short(mean[-1][1]))
        for one, _, mean, _ in lines
    )
    notes = _means(lines)
    notes += _early_ends(lines, scale.high_x, x_label) if mark_ends else []
    notes += ["logarithmic"] if log else []
    values = ", ".join(f"{one.label} {short(mean[-1][1])}" for one, _, mean, _ in lines)
    described = f"{title}{f' ({unit})' if unit else ''}; last values: {values}"
    return Markup(
        '<figure class="chart"><figcaption>{title}{unit}</figcaption>'
        '<svg height="{h}" role="img" tabindex="0" aria-label="{described}" '
        'data-domain="{x0:g} {x1:g} {y0:g} {y1:g}" data-box="0 {t} {w} {b}" data-log="{log}">'
        '{body}</svg>'
        '<ul class="legend">{legend}</ul><p class="note">{note}</p></figure>'
    ).format(
        title=title,
        unit=Markup(' <span class="unit">{}</span>').format(unit) if unit else "",
        described=described,
        w=WIDTH, h=HEIGHT, t=TOP, b=HEIGHT - BOTTOM,
        x0=scale.low_x, x1=scale.high_x, y0=scale.low_y, y1=scale.high_y, log=int(log),
        body=Markup("").join(body), legend=legend, note="; ".join(notes),
    )  # fmt: skip


def _means(lines: Sequence[Drawn]) -> list[str]:
    """What the thick lines are, in words, if they are means of several rounds."""
    windows = sorted({window for _, _, _, window in lines})
    counts = " to ".join(dict.fromkeys((str(windows[0]), str(windows[-1]))))
    return [f"thin: each round; thick: mean of {counts} rounds"] if windows[-1] > 1 else []


def _early_ends(lines: Sequence[Drawn], last: float, x_label: str) -> list[str]:
    """Which lines end before the longest, and where, in words."""
    early = [
        f"{one.label} at {x_label} {mean[-1][0]:,.0f}"
        for one, _, mean, _ in lines
        if mean[-1][0] < last
    ]
    return [f"ends earlier: {', '.join(early)}"] if early else []


def short(value: float) -> str:
    """A number of at most four digits, for people."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 100_000 or abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Maps values to places in the picture."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float
    log: bool

    @classmethod
    def of(cls, lines: Sequence[tuple[Sequence[Point], Sequence[Point]]], log: bool) -> _Scale:
        """Fits all running means, and all values but the outermost hundredths, which are cut."""
        xs = [x for raw, _ in lines for x, _ in raw]
        ys = [y for _, mean in lines for _, y in mean]
        for raw, _ in lines:
            values = sorted(y for _, y in raw)
            cut = len(values) // 100
            ys += [values[cut], values[-1 - cut]]
        low, high = min(ys), max(ys)
        if log:
            spread = max(high / low, 1.5) ** 0.04
            low, high = low / spread, high * spread
        else:
            spread = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
            low, high = (0.0 if 0 <= low < spread * 4 else low - spread), high + spread
        return cls(low_x=min(xs), high_x=max(xs), low_y=low, high_y=high, log=log)

    def x(self, value: float) -> float:
        span = self.high_x - self.low_x
        return WIDTH * ((value - self.low_x) / span if span else 0.5)

    def y(self, value: float) -> float:
        low, high = self.low_y, self.high_y
        value = min(max(value, low), high)
        share = (value - low) / (high - low)
        if self.log:
            share = math.log(value / low) / math.log(high / low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def ticks_y(self) -> list[float]:
        if not self.log:
            return _nice(self.low_y, self.high_y, 5)
        decades = range(math.floor(math.log10(self.low_y)), math.ceil(math.log10(self.high_y)) + 1)
        steps = (1,) if len(decades) > 4 else (1, 2, 5)
        possible = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in possible if self.low_y <= tick <= self.high_y]
        return ticks if len(ticks) > 1 else _nice(self.low_y, self.high_y, 4)


def _nice(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two others."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    base = 10.0 ** math.floor(math.log10(rough))
    steps = [s * base for s in (0.5, 1, 2, 5, 10)]
    largest = next(place for place, step in enumerate(steps) if step >= rough * 0.999)
    found: list[float] = []
    for step in (steps[largest], steps[max(0, largest - 1)]):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found = [index * step for index in range(first, last + 1)]
        if len(found) > 2:  # two of them say little of what lies between
            break
    return found


def _grid(scale: _Scale, x_label: str) -> Markup:
    """Horizontal lines with their values, ticks below, the axis and its label."""
    parts = []
    line = Markup('<line class="grid" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
    at_line = Markup('<text class="tick" text-anchor="end" x="-5" y="{:.1f}">{}</text>')
    for value in scale.ticks_y():
        y = scale.y(value)
        parts.append(line.format(y=y))
        parts.append(at_line.format(y + 4, short(value)))

    below = Markup('<text class="tick" text-anchor="middle" x="{}" y="{}">{}</text>')
    parts += [
        below.format(_percent(scale.x(value)), HEIGHT - BOTTOM + 16, short(value))
        for value in _nice(scale.low_x, scale.high_x, 5)
        if value == round(value)  # rounds are whole numbers
    ]
    axis = Markup('<line class="axis" x2="100%" y1="{y}" y2="{y}"/>')
    parts.append(axis.format(y=HEIGHT - BOTTOM))
    name = Markup('<text class="tick" text-anchor="end" x="100%" y="{}">{}</text>')
    parts.append(name.format(HEIGHT - 3, x_label))
    return Markup("").join(parts)


def _percent(place: float) -> str:
    """A place in thousandths of the width, as SVG takes it."""
    return f"{100 * place / WIDTH:.2f}%"


def _stretched(lines: Markup) -> Markup:
    """Lines whose places are in thousandths of the width."""
    inner = Markup('<svg viewBox="0 0 {} {h}" height="{h}" preserveAspectRatio="none">{}</svg>')
    return inner.format(WIDTH, lines, h=HEIGHT)


def _polyline(series: Series, points: Sequence[Point], scale: _Scale, kind: str) -> Markup:
    places = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in _thinned(points))
    line = Markup('<polyline class="{}" data-label="{}" style="stroke:var(--{})" points="{}"/>')
    return line.format(kind, escape(series.label), series.colour, places)


def _running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of the last `window` values at each point (of fewer at the beginning)."""
    result, total = [], 0.0
    for index, (x, y) in enumerate(points):
        total += y
        if index >= window:
            total -= points[index - window][1]
        result.append((x, total / min(index + 1, window)))
    return result


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points: the lowest and highest of each stretch, so no peak is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretches = MOST_POINTS // 2
    edges = [round(part * len(points) / stretches) for part in range(stretches + 1)]
    kept = []
    for begin, end in pairwise(edges):
        stretch = points[begin:end]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    if kept[-1][0] >= points[-1][0]:
        kept.pop()  # the last point takes its place
    return [*kept, points[-1]]
