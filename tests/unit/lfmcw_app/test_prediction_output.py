"""Predictions as text, data and pictures: all say the same."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from lfmcw_app.classifier import load_network
from lfmcw_app.prediction import ImageFile, Prediction, Predictions, find_images, predict
from lfmcw_app.prediction_output import as_csv, as_data, draw, print_predictions

NAMES = ("cat", "[bold]dog", "cost $x^$")


def made(*labels):
    done = tuple(
        Prediction(
            image=ImageFile(path=Path(f"[red] {number}, a.png"), label=label),
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
        "probability_3",
    ]  # fmt: skip
    assert rows[1] == ["[red] 0, a.png", "cat", NAMES[1], "0.5", "cat", "0.25", NAMES[2], "0.25"]
    assert rows[3] == ["bad.png", *[""] * 7]
    assert {len(row) for row in rows} == {8}


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
