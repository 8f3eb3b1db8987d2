"""Data sets that are wrong, on the command line: exit code 2, one paragraph that names what, no
folder of a run.

What is wrong with single images and files is tried in tests/unit/lfmcw_app: test_image_files.py and
test_readers.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from lfmcw_app.commands.run import run


def images(folder, count=8, size=16, mode="RGB"):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{index}.png")


def corrupt(folder):
    path = folder / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    return "dog/3.png"


def not_an_image(folder):
    (folder / "cat" / "0.png").write_text("no image")
    return "cat/0.png"


def another_shape(folder):
    Image.new("RGB", (20, 16)).save(folder / "dog" / "0.png")
    return "dog/0.png has 20×16"


def nan(folder):
    Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(folder / "dog" / "nan.tiff")
    return "dog/nan.tiff. Save all of them alike"


def empty_class(folder):
    (folder / "eel").mkdir()
    return "eel has no images"


def one_class(folder):
    (folder / "dog").rename(folder.parent / "away")
    return "at least two folders"


@pytest.mark.parametrize(
    "harm", [corrupt, not_an_image, another_shape, nan, empty_class, one_class]
)
def test_a_folder_of_images_with_a_fault_is_refused(harm, tmp_path):
    images(tmp_path / "images")
    words = harm(tmp_path / "images")
    assert words in refused(
        tmp_path, f"folder:{tmp_path / 'images'}", "--preset=smoke", "--set=data.image_size=null"
    )


def test_too_few_images_for_any_batch_are_refused(tmp_path):
    images(tmp_path / "images", count=2)
    assert "a single image of folder" in refused(
        tmp_path, f"folder:{tmp_path / 'images'}", "--preset=smoke"
    )


def test_labels_out_of_range_are_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        label = 10 if name == "data_batch_3" else 3
        pixels = np.random.default_rng(0).integers(0, 256, 3072, dtype=np.uint8)
        (folder / f"{name}.bin").write_bytes(bytes([label]) + pixels.tobytes())
    assert "labels of cifar10 range from 3 to 10" in refused(
        tmp_path, "cifar10", "--data", tmp_path
    )


def refused(tmp_path, *arguments):
    """What is said; checks that it is said as it should be."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    result = CliRunner().invoke(app, [*map(str, arguments), f"--out={tmp_path / 'run'}"])
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().startswith("Error:")
    assert result.stderr.strip().count("\n") == 0
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()
    return result.output
