"""Text in pictures: whatever a class or a folder is called."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lfmcw_app import drawing as drawing_module
from lfmcw_app.drawing import as_label, as_lines, drawing, set_row_names
from lfmcw_app.errors import DataWarning

NAMES = {
    "prices": "$10_$20",
    "formula": r"$\frac{a}{b$",
    "one dollar": "cost $",
    "Chinese": "猫と犬",
    "Arabic": "قطة",
    "emoji": "🐈",
    "lines": "a\nb\tc\x00\x1b[31m",
    "long": "x" * 200,
    "lone surrogate": "a\udcff",
    "directions": "\u202ea\u200bb",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_is_drawn(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="No installed font")
        with drawing():
            figure = Figure(figsize=(4, 2), layout="constrained")
            ax = figure.subplots()
            ax.set_yticks([0.5], labels=[as_label(name)])
            ax.set_title(as_label(name))
            figure.savefig(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert np.array(image.convert("L")).min() < 128  # something is there


def test_a_dollar_is_a_letter(tmp_path):
    pictures = []
    for text in ("$x$", "x"):
        with drawing():
            figure = Figure(figsize=(2, 1))
            figure.text(0.1, 0.5, text)
            figure.savefig(tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as image:
            pictures.append((np.array(image.convert("L")) < 128).sum())
    assert pictures[0] > 2 * pictures[1]


def test_a_label_is_one_line_of_bounded_length():
    assert as_label("häß 猫") == "häß 猫"
    assert as_label("a\nb\u2028c") == "a�b�c"
    assert as_label("\u202ea\u200b") == "a"
    assert as_label("a\udcff") == "a�"
    assert as_label("x" * 41) == "x" * 39 + "…"


def test_a_name_in_lines_is_whole():
    assert as_lines("cat", 10) == "cat"
    assert as_lines("a long name of a class", 10) == "a long\nname of a\nclass"
    assert as_lines("one_two_three", 8) == "one_two_\nthree"
    assert as_lines("x" * 12, 5) == "xxxxx\nxxxxx\nxx"
    assert as_lines("狸猫狸猫", 4) == "狸猫\n狸猫"
    assert as_lines("a\nb\u200b", 9) == "a�b"


def drawn(text, path):
    with drawing():
        figure = Figure(figsize=(2, 1))
        figure.text(0.1, 0.5, text)
        figure.savefig(path)


def test_letters_that_no_font_has_are_told_once(tmp_path, monkeypatch):
    """Private letters, which no font in use here has."""
    monkeypatch.setattr(drawing_module, "_told", set())
    with pytest.warns(DataWarning, match="No installed font has the letters \ue123, \ue124"):
        drawn("a\ue124\ue123", tmp_path / "picture.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn("b\ue123", tmp_path / "picture.png")


def test_other_warnings_of_a_drawing_are_kept():
    with pytest.warns(RuntimeWarning, match="of something else"), drawing():
        warnings.warn("of something else", RuntimeWarning, stacklevel=1)


def test_a_row_has_the_whole_name_of_its_class():
    names = ["cat", "a long name of a class " * 10]
    ax = Figure().subplots()
    set_row_names(ax, [1.0, 2.0], names)
    labels = ax.get_yticklabels()
    assert [" ".join(label.get_text().split()) for label in labels] == ["cat", names[1].strip()]
    assert labels[0].get_fontsize() * 1.3 * 6 <= 0.6 * 72
