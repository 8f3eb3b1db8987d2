"""Tables as a notebook shows them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from mlo.notebook_table import table_html


def test_rows_headings_and_title_are_shown():
    root = ET.fromstring(table_html("Title", ("a", "b"), [(1, None), ("x", "y")]))
    assert root.find("caption").text == "Title"
    assert [[cell.text for cell in row] for row in root.iter("tr")] == [
        ["a", "b"], ["1", None], ["x", "y"],
    ]  # fmt: skip
    assert len(list(ET.fromstring(table_html("", (), [("x",)])).iter("tr"))) == 1


def test_nothing_in_a_table_becomes_markup():
    name = "<script>alert('x') & more</script>"
    html = table_html(name, (name,), [(name,)])
    assert "<script>" not in html
    assert list(ET.fromstring(html).itertext()) == [name] * 3
