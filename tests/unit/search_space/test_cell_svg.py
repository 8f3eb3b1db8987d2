"""Derived cells as SVG text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from lfmcw_app.search_space.cell_cards import graphs_of
from lfmcw_app.search_space.cell_svg import cell_svg, primitive_label
from lfmcw_app.search_space.genotype import Edge, Genotype, random_genotype
from lfmcw_app.search_space.nasbench201 import SumCell

CELL = (
    Edge("sep_conv_3x3", 0), Edge("skip_connect", 1), Edge("max_pool_3x3", 1),
    Edge("sep_conv_5x5", 2),
)  # fmt: skip


def pictures(cells):
    return [cell_svg(graph) for graph in graphs_of(cells)]


def test_names_are_for_people():
    assert primitive_label("sep_conv_3x3") == "sep conv 3×3"
    assert primitive_label("dil_conv_5x5") == "dil conv 5×5"
    assert primitive_label("nor_conv_1x1") == "nor conv 1×1"
    assert primitive_label("skip_connect") == "skip connect"


def test_a_cell_says_what_each_node_reads():
    normal, _ = pictures(Genotype(normal=CELL, reduction=CELL))
    root = ET.fromstring(normal)
    description = root.attrib["aria-label"]
    assert description.startswith("normal cell: node 0 reads sep conv 3×3 of c(k-2)")
    assert "node 1 reads sep conv 5×5 of node 0" in description
    assert root.attrib["data-edges"] == "4"


def test_every_edge_has_its_label_and_one_head():
    genotype = random_genotype(4, 1)
    root = ET.fromstring(pictures(genotype)[0])
    labels = [text.text for text in root.iter("text") if text.attrib["class"] == "op"]
    assert sorted(labels) == sorted(primitive_label(edge.primitive) for edge in genotype.normal)
    heads = [path for path in root.iter("path") if path.attrib["class"] == "head"]
    assert len(heads) == len(labels) + 1  # that of the output


def test_all_states_are_drawn():
    svg = pictures(random_genotype(3, 0))[1]
    shown = re.findall(r'class="state" [^>]*>([^<]*)<', svg)
    assert shown == [
        "c(k-2)", "c(k-1)", "node 0", "node 1", "node 2", "output: all nodes, side by side",
    ]  # fmt: skip


def test_a_cell_of_nasbench201_is_drawn():
    (svg,) = pictures(SumCell(("nor_conv_3x3", "none", "skip_connect")))
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"] == (
        "cell: node 0 reads nor conv 3×3 of the input; output reads skip connect of node 0"
    )
    assert re.findall(r'class="state" [^>]*>([^<]*)<', svg) == ["the input", "node 0", "output"]


def test_a_hostile_operation_cannot_become_part_of_the_page():
    graph = graphs_of(Genotype(normal=CELL, reduction=CELL))[0]
    name, ((_, source), other) = graph.nodes[0]
    bad = '<script>"&'
    hostile = type(graph)(
        kind=bad, inputs=graph.inputs, nodes=((name, ((bad, source), other)),), joined=bad
    )
    root = ET.fromstring(cell_svg(hostile))
    assert not list(root.iter("script"))
    assert bad in [text.text for text in root.iter("text")]
