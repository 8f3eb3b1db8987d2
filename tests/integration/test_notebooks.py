"""The notebooks of docs/notebooks run, and show what this code shows."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from executed_notebooks import NOTEBOOKS, ROOT, execute, shown, split_numbers, varies

LARGEST = 150_000
"""Bytes of a notebook with its outputs."""

WIDEST = 88
"""Columns of code that a page shows without scrolling."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [
        cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"
    ]


def test_there_is_a_notebook_for_each_beginning():
    assert [path.stem for path in NOTEBOOKS] == [
        "comparing_engines", "first_bilevel_problem", "own_pictures",
    ]  # fmt: skip


@every_notebook
def test_a_notebook_is_small_and_was_executed_in_order(path):
    assert path.stat().st_size < LARGEST
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for line in "".join(cell["source"]).splitlines():
            assert len(line) <= WIDEST, line
        for kind, text in shown(cell):
            assert kind != "stderr", text
            assert "Traceback" not in text
            assert str(ROOT) not in text
            assert "/tmp/" not in text


@every_notebook
def test_pages_that_a_notebook_links_exist(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text("utf-8"))
    assert links
    for link in links:
        assert (path.parent / link).is_file(), link


def page_of(notebook, name):
    """The page that the site has of a notebook."""
    path = ROOT / "docs" / "hooks" / "notebook_pages.py"
    spec = importlib.util.spec_from_file_location("notebook_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page_of(notebook, name)


@every_notebook
def test_the_page_of_a_notebook_has_all_that_it_shows(path):
    page = page_of(json.loads(path.read_text("utf-8")), path.stem)
    cells = code_cells(path)
    assert page.count("```python\n") >= len(cells)
    for cell in cells:
        assert "".join(cell["source"]) in page
        for output in cell["outputs"]:
            kinds = output.get("data", {})
            if "image/png" in kinds:
                assert "".join(kinds["image/png"].split()) in page
            elif "text/html" in kinds:
                assert " ".join("".join(kinds["text/html"]).split()) in page
            else:
                assert "".join(output["text"]).rstrip() in page
    assert re.findall(r"\(\w+\.ipynb\)", page) == [f"({path.stem}.ipynb)"]


def test_code_that_holds_a_fence_stays_one_block():
    cell = {"cell_type": "code", "source": ['text = """\n', "```\n", '"""'], "outputs": []}
    page = page_of({"cells": [cell]}, "name")
    assert page.startswith('````python\ntext = """\n```\n"""\n````\n')


@pytest.mark.slow
@every_notebook
def test_a_notebook_shows_what_this_code_shows(path, tmp_path):
    """Of cells that vary only the kinds of outputs; numbers as far as processors agree."""
    pytest.importorskip("nbclient", reason="pip install -e '.[test]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[test]'")
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, tmp_path)
    made = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for here, there in zip(made, code_cells(path), strict=True):
        outputs = shown(here), shown(there)
        kinds, expected = ([kind for kind, _ in one] for one in outputs)
        assert kinds == expected, here["source"]
        if varies(here):
            continue
        for (_, new), (_, old) in zip(*outputs, strict=True):
            (words, numbers), (said, figures) = split_numbers(new), split_numbers(old)
            assert words == said
            assert numbers == pytest.approx(figures, rel=0.02, abs=0.002)
