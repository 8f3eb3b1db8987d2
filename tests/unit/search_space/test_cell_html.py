"""Genotypes as a notebook shows them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from lfmcw_app.search_space.cell_html import cells_html
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.nasbench201 import random_sum_cell
from lfmcw_app.search_space.operations import PRIMITIVES


def test_a_genotype_shows_both_of_its_cells():
    genotype = random_genotype(3, 0)
    root = ET.fromstring(genotype._repr_html_())
    assert [caption.text for caption in root.iter("figcaption")] == [
        "normal cell",
        "reduction cell",
    ]
    pictures = list(root.iter("svg"))
    assert [picture.attrib["data-cell"] for picture in pictures] == ["normal", "reduction"]
    labels = [text for text in root.iter("text") if text.attrib["class"] == "op"]
    assert len(labels) == len(genotype.normal) + len(genotype.reduction)
    assert repr(genotype).startswith("Genotype(normal=(Edge(primitive=")


def test_every_colour_is_defined_for_light_and_for_dark():
    genotype = random_genotype(4, 1)
    html = cells_html(genotype)
    own = set(re.findall(r'style="--([\w-]+):', html))  # what an element defines for itself
    used = set(re.findall(r"var\(--([\w-]+)\)", html)) - own
    plain, both = re.findall(r"\.lfmcw-cells \{ (--[^}]*)\}", html)
    for colours in (plain, both):
        assert used <= set(re.findall(r"--([\w-]+):", colours))
    name = min(genotype.primitives)
    assert f"--op-{name}: {PRIMITIVES[name].colour};" in plain
    assert f"--op-{name}: light-dark({PRIMITIVES[name].colour}, " in both


def test_a_space_of_other_cells_shows_a_picture_too():
    cell = random_sum_cell([("skip_connect", "nor_conv_3x3")] * 6, 0)
    (picture,) = ET.fromstring(cell._repr_html_()).iter("svg")
    labels = [text for text in picture.iter("text") if text.attrib["class"] == "op"]
    assert len(labels) == 6
