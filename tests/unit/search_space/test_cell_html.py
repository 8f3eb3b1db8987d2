"""Genotypes as a notebook shows them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from lfmcw_app.search_space.cell_html import cells_html
from lfmcw_app.search_space.genotype import Cells, random_genotype
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
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    plain, both = re.findall(r"\.lfmcw-cells \{ (--[^}]*)\}", html)
    for colours in (plain, both):
        assert used <= set(re.findall(r"--([\w-]+):", colours))
    name = min(genotype.primitives)
    assert f"--op-{name}: {PRIMITIVES[name].colour};" in plain
    assert f"--op-{name}: light-dark({PRIMITIVES[name].colour}, " in both


def test_a_cell_of_another_space_is_drawn_too():
    cell = random_sum_cell([("skip_connect", "nor_conv_3x3")] * 6, 0)
    root = ET.fromstring(cell._repr_html_())
    assert [caption.text for caption in root.iter("figcaption")] == ["cell"]
    assert len([text for text in root.iter("text") if text.attrib["class"] == "op"]) == 6


@dataclass(frozen=True)
class Foreign(Cells):
    """A cell with given names, that counts its states in another way."""

    name: str

    def to_data(self):
        return {self.name: [[[self.name, 7]]]}

    def state_name(self, source):
        return f"{self.name} {source}"


def test_cells_that_cannot_be_drawn_are_a_table():
    rows = list(ET.fromstring(Foreign("strange")._repr_html_()).iter("tr"))
    assert len(rows) == 2
    assert "strange of strange 7" in "".join(rows[1].itertext())


def test_a_name_is_text_wherever_it_comes_from():
    html = Foreign("<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 3
