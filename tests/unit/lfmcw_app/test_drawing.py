"""Text in pictures: whatever a class or a folder is called."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lfmcw_app.drawing import as_label, drawing

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
def test_any_name_is_drawn_without_a_warning(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
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
