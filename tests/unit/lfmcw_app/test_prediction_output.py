"""Predictions as text, data and pictures: all say the same."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from lfmcw_app.classifier import load_network
from lfmcw_app.prediction import ImageFile, Prediction, Predictions, find_images, predict
from lfmcw_app.prediction_output import (
    as_csv,
    as_data,
    describe_trained_on,
    draw,
    print_predictions,
)

NAMES = ("cat", "[bold]dog", "cost $x^$")


def made(*labels, trained_on=None):
    done = tuple(
        Prediction(
            image=ImageFile(
                path=Path(f"[red] {number}, a.png"),
                label=label,
                trained_on=None if trained_on is None else number in trained_on,
            ),
            probabilities=torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64),
        )
        for number, label in enumerate(labels)
    )
    return Predictions(class_names=NAMES, done=done, failed={Path("bad.png"): "it is empty"})


def printed(predictions, count=2):
    console = Console(width=120, record=True, file=io.StringIO())
    print_predictions(predictions, count, console)
    return console.export_text()


def test_a_table_has_a_row_per_image():
    text = printed(made(None, None))
    assert "[red] 0, a.png" in text
    assert "[bold]dog 50.0%" in text
    assert "cat 25.0%" in text
    assert "error" not in text
    assert "cost" not in text


def test_errors_are_printed_where_classes_are_known():
    text = printed(made(0, 1, 1, None))
    assert "error 33.33% on 3 images" in text
    assert "100.00%" in text
    assert "cost" not in text.partition("wrong")[2]  # a class without images


def test_mistakes_come_first_and_are_marked():
    rows = [line for line in printed(made(1, 0, 1, 2)).splitlines() if "a.png" in line]
    assert [row.split(", a.png")[0].split()[-1] for row in rows] == ["1", "3", "0", "2"]
    assert ["wrong" in row for row in rows] == [True, True, False, False]


def test_a_narrow_terminal_cuts_no_name():
    names = ("a_very_long_name_of_a_class_" * 3, "\N{CJK UNIFIED IDEOGRAPH-732B}" * 30, "dog")
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    print_predictions(replace(made(0, 1), class_names=names), 3, console)
    text = console.file.getvalue()
    assert "…" not in text
    assert text.count("\N{CJK UNIFIED IDEOGRAPH-732B}") >= 4 * 30  # a class, and two predictions


def test_data_hold_what_the_table_says():
    data = json.loads(json.dumps(as_data(made(0, None), 2), allow_nan=False))
    assert data["class_names"] == list(NAMES)
    first, second = data["images"]
    assert (first["class"], second["class"]) == ("cat", None)
    assert [entry["class"] for entry in first["top"]] == ["[bold]dog", "cat"]
    assert first["top"][0]["probability"] == 0.5
    assert data["failed"] == [{"path": "bad.png", "reason": "it is empty"}]
    assert data["error"]["error_percent"] == 100.0
    assert data["error"]["classes"] == {"cat": {"images": 1, "wrong": 1, "error_percent": 100.0}}
    assert as_data(made(None), 2)["error"] is None


def test_csv_has_the_same_columns_in_every_line():
    rows = list(csv.reader(as_csv(made(0, None), 5).splitlines()))
    assert rows[0] == [
        "path", "class", "class_1", "probability_1", "class_2", "probability_2", "class_3",
        "probability_3", "trained_on",
    ]  # fmt: skip
    best = [NAMES[1], "0.5", "cat", "0.25", NAMES[2], "0.25"]
    assert rows[1] == ["[red] 0, a.png", "cat", *best, ""]
    assert rows[3] == ["bad.png", *[""] * 8]
    assert {len(row) for row in rows} == {9}


def test_how_many_images_were_trained_on_is_said():
    """With the error on the others, which is all that a test may count."""
    some, held_out = describe_trained_on(made(0, 1, 1, trained_on={1}), ""), "--held-out predicts"
    assert "trained on 1 of these 3 images, so this error says little" in some
    assert "On the 2 others it is 50.00%" in some
    assert held_out in some
    everything = describe_trained_on(made(0, 1, trained_on={0, 1}), "")
    assert "trained on 2 of these 2 images" in everything
    assert held_out not in everything
    assert "trained on none of these 1 images" in describe_trained_on(made(0, trained_on=()), "")
    assert describe_trained_on(made(None, trained_on=()), "") == ""
    assert "more certain" in describe_trained_on(made(None, trained_on={0}), "")
    assert "is unknown. The reason." in describe_trained_on(made(0), "The reason.")


def test_data_and_csv_say_which_images_were_trained_on():
    predictions = made(0, 0, trained_on={1})
    data = as_data(predictions, 1)["images"]
    assert [entry["trained_on"] for entry in data] == [False, True]
    rows = list(csv.reader(as_csv(predictions, 1).splitlines()))
    assert [row[-1] for row in rows] == ["trained_on", "false", "true", ""]


def test_a_row_is_one_line_where_there_is_no_terminal():
    """Neither wrapped nor cut, however long its names are."""
    predictions = replace(made(0, 1), class_names=("a a " * 30 + "a", "b" * 200, "c"))
    output = io.StringIO()
    print_predictions(predictions, 3, Console(file=output, width=80))
    (line,) = (line for line in output.getvalue().splitlines() if "0, a.png" in line)
    for name in predictions.class_names:
        assert name in line


@pytest.mark.parametrize("count", [1, 3])
def test_a_picture_shows_images_with_names_as_they_are(count, trained, tmp_path):
    """A dollar begins no formula."""
    network, preprocess, _ = load_network(trained.path)
    names = ("a $ b $ c", "_{", "\\frac")
    images = find_images([trained.pictures / "test"], names).images[:4]
    predictions = predict(network, preprocess, names, images)
    draw(predictions, preprocess, count, tmp_path / "picture.part")
    with Image.open(tmp_path / "picture.part") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > picture.size[1]
        assert len(picture.convert("RGB").getcolors(2**20)) > 50
