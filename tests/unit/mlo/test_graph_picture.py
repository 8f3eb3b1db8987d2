"""The picture of a graph in a notebook."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import mlo
from mlo.graph_picture import Arrow, graph_svg
from mlo.testing import diamond

SVG = "{http://www.w3.org/2000/svg}"


def optimizer():
    return mlo.MultilevelOptimizer(diamond().problems, "cg")


def test_a_notebook_shows_the_graph_with_all_problems_and_arrows():
    graph = optimizer().graph
    picture = ET.fromstring(graph._repr_html_())
    assert [title.text for title in picture.iter(f"{SVG}title")] == list(graph.problems)
    solutions = sum(len(graph.reads_below[name]) for name in graph.problems)
    values = sum(len(graph.reads_above[name]) for name in graph.problems)
    paths = list(picture.iter(f"{SVG}path"))
    assert len(paths) == solutions + values
    assert sum("stroke-dasharray" in path.attrib for path in paths) == values
    assert solutions > 0
    width, height = (float(part) for part in picture.attrib["viewBox"].split()[2:])
    for box in picture.iter(f"{SVG}rect"):
        x, y, w, h = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


def test_lower_problems_stand_below_those_above_them():
    graph = optimizer().graph
    picture = ET.fromstring(graph._repr_html_())
    heights = {
        group.find(f"{SVG}title").text: float(group.find(f"{SVG}rect").attrib["y"])
        for group in picture.iter(f"{SVG}g")
    }
    for name in graph.problems:
        assert all(heights[lower] > heights[name] for lower in graph.reads_below[name])


def test_names_cannot_become_part_of_the_picture():
    """Names of problems are identifiers, but the function draws any text."""
    name = '<script>alert("x")</script>'
    svg = graph_svg([[name]], [], subtitles={name: "1 parameter"}, description=name)
    picture = ET.fromstring(svg)
    assert [title.text for title in picture.iter(f"{SVG}title")] == [name]
    assert not list(picture.iter(f"{SVG}script"))
    assert picture.attrib["aria-label"] == name


def test_a_long_name_is_shortened_in_its_box_only():
    name = "a_problem_with_a_long_name"
    picture = ET.fromstring(graph_svg([[name]], [], subtitles={name: ""}, description=""))
    shown = next(picture.iter(f"{SVG}text")).text
    assert shown == "a_problem_with_…"
    assert next(picture.iter(f"{SVG}title")).text == name


def test_each_level_has_a_row_and_the_widest_one_fits():
    levels = [["a", "b", "c"], ["d"]]
    arrows = [Arrow(start="a", end="d", dashed=False), Arrow(start="d", end="c", dashed=True)]
    subtitles = dict.fromkeys("abcd", "game")
    picture = ET.fromstring(graph_svg(levels, arrows, subtitles=subtitles, description=""))
    rows = {}
    for group in picture.iter(f"{SVG}g"):
        box = group.find(f"{SVG}rect").attrib
        rows.setdefault(float(box["y"]), []).append((float(box["x"]), float(box["width"])))
    assert sorted(len(boxes) for boxes in rows.values()) == [1, 3]
    for boxes in rows.values():
        ends = [x + width for x, width in sorted(boxes)]
        assert all(end < x for end, (x, _) in zip(ends, sorted(boxes)[1:], strict=False))
    dashed = ["stroke-dasharray" in path.attrib for path in picture.iter(f"{SVG}path")]
    assert dashed == [False, True]
