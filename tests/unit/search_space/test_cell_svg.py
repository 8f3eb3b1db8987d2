"""Derived cells as SVG text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from lfmcw_app.search_space.cell_svg import WIDTH, cell_svg, primitive_label, state_label
from lfmcw_app.search_space.genotype import Edge, random_genotype

CELL = (Edge("sep_conv_3x3", 0), Edge("skip_connect", 1), Edge("max_pool_3x3", 1), Edge("none", 2))


def test_names_are_for_people():
    assert primitive_label("sep_conv_3x3") == "sep conv 3×3"
    assert primitive_label("dil_conv_5x5") == "dil conv 5×5"
    assert primitive_label("skip_connect") == "skip connect"
    assert [state_label(source) for source in range(4)] == [
        "c(k−2)", "c(k−1)", "node 0", "node 1",
    ]  # fmt: skip


def test_a_cell_says_what_each_node_reads():
    root = ET.fromstring(cell_svg("normal", CELL))
    description = root.attrib["aria-label"]
    assert description.startswith("normal cell: node 0 reads sep conv 3×3 of c(k−2)")
    assert "node 1 reads max pool 3×3 of c(k−1)" in description
    assert root.attrib["data-edges"] == "4"


@pytest.mark.parametrize("seed", range(5))
def test_every_edge_has_a_label_inside_of_the_picture(seed):
    edges = random_genotype(4, seed).normal
    svg = cell_svg("normal", edges)
    root = ET.fromstring(svg)
    labels = [text for text in root.iter("text") if text.attrib["class"] == "op"]
    assert sorted(label.text for label in labels) == sorted(
        primitive_label(edge.primitive) for edge in edges
    )
    height = float(root.attrib["viewBox"].split()[3])
    for label in labels:
        assert 0 < float(label.attrib["x"]) < WIDTH
        assert 0 < float(label.attrib["y"]) < height


def test_all_states_are_drawn():
    svg = cell_svg("reduction", random_genotype(3, 0).reduction)
    shown = re.findall(r'class="state" [^>]*>([^<]*)<', svg)
    assert shown == ["c(k−2)", "c(k−1)", "0", "1", "2", "c(k)"]
