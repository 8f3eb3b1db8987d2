"""Charts as SVG text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from lfmcw_app.report.charts import MOST_POINTS, Series, line_chart, short


def line(values, label="loss"):
    return Series(label=label, points=[(float(k + 1), y) for k, y in enumerate(values)])


def places(html, kind="mean"):
    """The points of the first line of a kind, in pixels."""
    text = re.search(rf'class="{kind}"[^>]*points="([^"]*)"', html)[1]
    return [tuple(map(float, point.split(","))) for point in text.split()]


def test_a_chart_without_values_is_empty():
    assert line_chart("Loss", []) == ""
    assert line_chart("Loss", [line([])]) == ""
    assert line_chart("Loss", [line([math.nan, math.inf])]) == ""
    assert line_chart("Loss", [line([-1.0, 0.0])], log=True) == ""


def test_a_chart_is_well_formed_and_names_what_it_shows():
    html = line_chart("Loss <of> W1", [line([1.0, 2.0], "W1 & W2")], unit="%")
    root = ET.fromstring(str(html))
    assert root.find("svg").attrib["aria-label"] == ("Loss <of> W1 (%); last values: W1 & W2 2")
    (entry,) = root.iter("li")
    assert entry.attrib["data-label"] == "W1 & W2"
    assert float(entry.attrib["data-value"]) == 2.0


def test_larger_values_stand_higher():
    """Larger values stand higher, and later rounds further right."""
    points = places(line_chart("Loss", [line([1.0, 3.0, 2.0])]))
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs)
    assert ys[1] < ys[2] < ys[0]  # pixels are counted from above


@pytest.mark.parametrize("log", [False, True])
def test_all_points_lie_inside_of_the_box(log):
    html = line_chart("Loss", [line([10.0**k for k in range(8)])], log=log)
    left, top, right, bottom = map(float, re.search(r'data-box="([^"]*)"', html)[1].split())
    for x, y in places(html):
        assert left <= x <= right
        assert top <= y <= bottom


def test_equal_ratios_are_equal_steps_on_a_logarithmic_axis():
    points = places(line_chart("Loss", [line([1.0, 10.0, 100.0])], log=True, smooth=False))
    steps = [points[0][1] - points[1][1], points[1][1] - points[2][1]]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)


def test_many_rounds_are_smoothed_and_thinned():
    values = [float(k % 7) for k in range(3000)]
    html = line_chart("Loss", [line(values)])
    assert "thick: mean of 120" in html
    assert len(places(html, "raw")) <= MOST_POINTS + 2
    mean = sum(values[-120:]) / 120
    assert f'data-value="{mean:.6g}"' in html


def test_a_single_value_is_a_dot():
    html = line_chart("Loss", [line([2.0])])
    assert html.count("<circle") == 1


def test_stages_have_boundaries():
    html = line_chart("Loss", [line([1.0, 2.0, 3.0])], boundaries=[(1.0, "one"), (3.0, "two")])
    assert html.count('class="boundary"') == 2
    assert ">two</text>" in html


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (0.000123, "1.2e-4"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (12_345.0, "12.3k"),
        (2_000_000.0, "2e6"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_short(value, expected):
    assert short(value) == expected


def test_a_line_that_ends_before_another_is_marked_and_named():
    long, short_one = line([1.0] * 30, "long"), line([2.0] * 12, "short & sweet")
    html = line_chart("Loss", [long, short_one], mark_ends=True)
    assert html.count("<circle") == 1
    assert "ends earlier: short &amp; sweet at round 12" in html
    end = places(str(line_chart("Loss", [short_one, long], mark_ends=True)))[-1]
    across, down = re.search(r'cx="([^"]*)%" cy="([^"]*)"', html).groups()
    assert (10 * float(across), float(down)) == pytest.approx(end, abs=0.11)  # of thousandths
    assert "<circle" not in line_chart("Loss", [long, line([2.0] * 30, "equal")], mark_ends=True)
    assert "ends earlier" not in line_chart("Loss", [long, short_one])


def test_lines_of_different_length_stand_at_their_rounds():
    """The same round is at the same place, whatever the length of a run."""
    html = str(line_chart("Loss", [line([1.0] * 12, "short"), line([1.0] * 30, "long")]))
    both = re.findall(r'class="mean"[^>]*points="([^"]*)"', html)
    first, second = ([point.split(",")[0] for point in points.split()] for points in both)
    assert first == second[:12]


def test_a_note_says_of_how_many_rounds_the_means_are():
    html = line_chart("Loss", [line([1.0] * 100, "a"), line([1.0] * 250, "b")])
    assert "thick: mean of 4 to 10" in html


@pytest.mark.parametrize("values", [[0.83, 1.08], [1.04, 1.53], [0.92, 1.17], [0.0, 100.0], [3, 7]])
def test_an_axis_has_three_values_or_more(values):
    html = str(line_chart("Loss", [line(list(map(float, values)))]))
    beside = re.findall(r'<text class="tick" text-anchor="end" x="-5"[^>]*>([^<]*)<', html)
    assert len(set(beside)) == len(beside) >= 3
