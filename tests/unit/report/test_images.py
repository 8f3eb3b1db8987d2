"""Pictures of a report: class weights and sheets of generated images."""

from __future__ import annotations

import base64
import io
import json
import struct
from zlib import compress, crc32

import numpy as np
import pytest
from made_run_folders import make_folder
from PIL import Image

from lfmcw_app.report.images import (
    MOST_ROWS,
    class_names,
    class_weights,
    gradient_bar,
    sheets,
    tile_size,
)
from lfmcw_app.report.page import run_page
from lfmcw_app.report.reading import read_run


def opened(source):
    """The picture of a data URL."""
    kind, _, text = source.partition(";base64,")
    assert kind.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(text)))


def run_of(tmp_path, rounds=4, **options):
    return read_run(make_folder(tmp_path / "run", {"search": (8, rounds)}, **options))


def test_class_weights_are_a_picture_of_classes_and_rounds(tmp_path):
    found = class_weights(run_of(tmp_path))
    assert list(found.names) == ["cat", "dog", "cow"]
    assert found.last == pytest.approx([4.0, 0.5, 2.5])  # the first one is the round's number
    assert (found.low, found.high, found.classes) == (0.5, 4.0, 3)
    assert [opened(source).size for source in found.sources] == [(4, 1)] * 3
    assert found.first == pytest.approx([1.0, 0.5, 2.5])
    pixels = [opened(source).convert("RGB").getpixel((3, 0)) for source in found.sources]
    assert len(set(pixels)) == 3  # 4.0, 0.5 and 2.5


def test_the_heaviest_of_many_classes_are_shown(tmp_path):
    run = run_of(tmp_path, names=[f"class {k}" for k in range(50)])
    for entry in run.searched[0].entries:
        entry["metrics"]["w2"]["class_weights"] = list(map(float, range(50)))
    found = class_weights(run)
    assert len(found.names) == MOST_ROWS
    assert found.names[0] == "class 20"
    assert found.classes == 50


def test_a_search_without_a_generator_has_no_class_weights(tmp_path):
    assert class_weights(run_of(tmp_path, settings=("search.method=darts",))) is None


def test_classes_without_names_have_numbers(tmp_path):
    run = run_of(tmp_path)
    assert class_names(run, 3) == ["cat", "dog", "cow"]
    assert class_names(run, 2) == ["0", "1"]


def test_the_last_sheet_is_first_beside_real_images(tmp_path):
    names, found = sheets(run_of(tmp_path))
    assert names == ["cat", "dog", "cow"]
    assert [sheet.label for sheet in found] == ["4", "real", "1", "2", "3"]
    assert {(sheet.rows, sheet.columns) for sheet in found} == {(3, 2)}
    assert [sheet.real for sheet in found] == [False, True, False, False, False]
    colours = [np.asarray(opened(sheet.source))[:, :, :3].max() for sheet in found]
    assert colours == [100, 200, 100, 100, 100]


def test_images_of_a_sheet_have_gaps(tmp_path):
    """To the right of each and below it, as wide as a 16th of an image, the page shows through."""
    _, found = sheets(run_of(tmp_path))
    alpha = np.asarray(opened(found[0].source))[:, :, 3]
    assert alpha.shape == (3 * 9, 2 * 9)
    image = np.pad(np.full((8, 8), 255), (0, 1))
    assert np.array_equal(alpha, np.tile(image, (3, 2)))


def test_large_images_are_reduced(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 1)})
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"image_size": 80}))
    for path in (folder / "samples").iterdir():
        Image.new("L", (160, 240)).save(path)
    _, found = sheets(read_run(folder))
    assert opened(found[0].source).size == (2 * 42, 3 * 42)


def test_without_real_images_there_are_no_sheets(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 1)})
    (folder / "samples" / "real.png").unlink()
    assert sheets(read_run(folder)) == ([], [])


def test_the_bar_has_the_colours_of_the_map():
    text = gradient_bar()
    assert text.startswith("linear-gradient(90deg,rgb(68,1,84)")  # viridis begins in violet
    assert text.count("rgb(") == 9


def test_tiles_are_as_high_as_the_longest_name():
    assert tile_size([]) == tile_size(["cat", "dog"]) == 28
    assert tile_size(["cat", "a name of forty letters, a bit more or so"]) >= 4 * 15
    assert tile_size(["猫" * 15]) == tile_size(["c" * 30]) == 45
    assert tile_size(["c" * 20_000]) < 400


def test_a_picture_that_unpacks_to_a_bomb_is_left_out_and_named(tmp_path):
    """900 million pixels in a file of some hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    folder = make_folder(tmp_path / "run", {"search": (8, 3)})
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    bomb = chunk(b"IHDR", head) + chunk(b"IDAT", compress(bytes(1000))) + chunk(b"IEND", b"")
    (folder / "samples" / "search-000001.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    page = run_page(read_run(folder))
    assert "search-000001.png cannot be read (it has more than" in page
