"""The picture of a graph in a notebook."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
import torch

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


def bezier(points, t):
    """De Casteljau's algorithm."""
    while len(points) > 1:
        points = [((1 - t) * a + t * c, (1 - t) * b + t * d) for (a, b), (c, d) in pairwise(points)]
    return points[0]


def on_path(path):
    """Points along the `d` of a path of M and Q."""
    at, found = None, []
    for letter, numbers in re.findall(r"([MQ])([^MQ]+)", path):
        values = [float(number) for number in numbers.split()]
        points = list(zip(values[::2], values[1::2], strict=True))
        if letter != "M":
            found += [bezier([at, *points], step / 50) for step in range(51)]
        at = points[-1]
    return found


LEVELS = {
    "chain": [["a"], ["b"], ["c"], ["d"]],
    "narrow": [["a", "b", "c"], ["d"], ["e", "f"]],
    "wide": [["a"], ["b", "c", "d"], ["e"]],
    "row": [["a", "b"]],
}


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_arrows_stay_in_the_picture_and_off_the_boxes_of_others(levels):
    """Arrows of both kinds between all pairs of boxes."""
    names = [name for row in levels for name in row]
    arrows = [
        Arrow(start=start, end=end, dashed=dashed)
        for start in names
        for end in names
        for dashed in (False, True)
        if start != end
    ]
    subtitles = dict.fromkeys(names, "")
    picture = ET.fromstring(graph_svg(levels, arrows, subtitles=subtitles, description=""))
    left, top, width, height = map(float, picture.attrib["viewBox"].split())
    boxes = {}
    for group in picture.iter(f"{SVG}g"):
        attributes = group.find(f"{SVG}rect").attrib
        boxes[group.find(f"{SVG}title").text] = [
            float(attributes[key]) for key in ("x", "y", "width", "height")
        ]
    paths = [path.attrib["d"] for path in picture.iter(f"{SVG}path")]
    assert len(set(paths)) == len(paths) == len(arrows)
    for arrow, path in zip(arrows, paths, strict=True):
        for x, y in on_path(path):
            assert left <= x <= left + width and top <= y <= top + height
            inside = {
                name
                for name, (x0, y0, w, h) in boxes.items()
                if x0 < x < x0 + w and y0 < y < y0 + h
            }
            assert not inside, f"{arrow} lies on {inside}"


def test_a_chains_arc_is_not_clipped():
    """The value of the last of three problems, which the first one reads."""

    def problem(name, loss):
        net = torch.nn.Linear(1, 1)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        return mlo.Problem(name, module=net, optimizer=sgd, loss=loss)

    graph = mlo.DependencyGraph(
        [
            problem("pre", lambda m, b, *, top: 0),
            problem("fine", lambda m, b, *, pre: 0),
            problem("top", lambda m, b, *, fine: 0),
        ]
    )
    picture = ET.fromstring(graph.to_svg())
    left, _, width, _ = map(float, picture.attrib["viewBox"].split())
    (arc,) = [p for p in picture.iter(f"{SVG}path") if "stroke-dasharray" in p.attrib]
    assert max(x for x, _ in on_path(arc.attrib["d"])) < left + width
    assert float(picture.attrib["width"]) == width


def test_a_legend_says_what_the_arrows_mean():
    picture = ET.fromstring(optimizer().graph.to_svg())
    left, top, width, height = map(float, picture.attrib["viewBox"].split())
    words = [text.text for text in picture.iter(f"{SVG}text")][-2:]
    assert words == ["solution", "value"]
    lines = list(picture.iter(f"{SVG}line"))
    assert ["stroke-dasharray" in line.attrib for line in lines] == [False, True]
    bottom = max(
        float(b.attrib["y"]) + float(b.attrib["height"]) for b in picture.iter(f"{SVG}rect")
    )
    for line in lines:
        assert bottom < float(line.attrib["y1"]) < top + height
        assert left <= float(line.attrib["x1"]) < float(line.attrib["x2"]) <= left + width
    lonely = graph_svg([["a"]], [], subtitles={"a": ""}, description="")
    assert not list(ET.fromstring(lonely).iter(f"{SVG}line"))
