"""The command that predicts images: what it prints, where, and its exit codes."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from lfmcw_app import prediction_output
from lfmcw_app.commands.predict import predict


def invoke(*arguments, given=None):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(predict)
    return CliRunner().invoke(app, list(map(str, arguments)), input=given)


def words(text):
    return " ".join(text.split())


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return path


def test_the_error_on_a_test_folder_is_the_runs(trained):
    result = invoke(trained.path, trained.pictures / "test")
    assert result.exit_code == 0
    error = json.loads((trained.path / "result.json").read_text("utf-8"))["test_error_percent"]
    assert f"error {error:.2f}% on 12 images" in words(result.stdout)
    assert result.stderr == ""


def test_a_large_image_is_read_without_a_warning(trained, tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    result = invoke(trained.path, tmp_path)
    assert result.exit_code == 0
    assert result.stderr == ""


def test_an_image_in_the_folders_of_two_classes_is_told(trained, tmp_path):
    shutil.copytree(trained.pictures / "test", tmp_path, dirs_exist_ok=True)
    image = next((tmp_path / "cat").iterdir())
    other = next(path for path in tmp_path.iterdir() if path.name != "cat")
    (other / "same.png").symlink_to(image)
    result = invoke(trained.path, tmp_path, tmp_path / "cat")
    assert "on 11 images" in words(result.stdout)
    assert f"several classes, under several names: {tmp_path}" in words(result.stderr)


def test_images_that_were_trained_on_are_told(trained, tmp_path):
    """Under whatever name, and only by their contents."""
    copies = tmp_path / "cat"
    copies.mkdir()
    for place, file in enumerate(sorted((trained.pictures / "train" / "cat").iterdir())[:3]):
        shutil.copy(file, copies / f"renamed {place}.png")
    for file in sorted((trained.pictures / "test" / "cat").iterdir()):
        shutil.copy(file, copies / file.name)
    result = invoke(trained.path, tmp_path)
    assert "trained on 3 of these 7 images" in result.stdout
    assert "On the 4 others it is " in result.stdout
    alone = invoke(trained.path, tmp_path, "--held-out", "--json")
    found = json.loads(alone.stdout)["images"]
    assert [entry["trained_on"] for entry in found] == [False] * 4
    assert all("renamed" not in entry["path"] for entry in found)


def test_held_out_alone_is_the_runs_own_test(trained):
    result = invoke(trained.path, "--held-out")
    error = json.loads((trained.path / "result.json").read_text("utf-8"))["test_error_percent"]
    assert f"error {error:.2f}% on 12 images" in words(result.stdout)
    assert "trained on none of these 12 images" in result.stdout


def test_nothing_held_out_is_said(trained):
    result = invoke(trained.path, trained.pictures / "train", "--held-out")
    assert result.exit_code == 2
    assert "trained on all of these 27 images" in words(result.stderr)


def test_a_network_without_its_run_cannot_tell(trained, tmp_path):
    network = shutil.copy(trained.path / "network.pt", tmp_path)
    told = invoke(network, trained.pictures / "test")
    assert told.exit_code == 0
    assert "Whether the network was trained on these images is unknown." in told.stdout
    refused = invoke(network, trained.pictures / "test", "--held-out")
    assert refused.exit_code == 2
    assert "it is unknown which images the network was trained on" in words(refused.stderr)


def test_json_is_alone_on_standard_output(trained, broken):
    """With warnings and errors elsewhere; images that fail give exit code 1."""
    good = sorted((trained.pictures / "test" / "cat").iterdir())[0]
    result = invoke(trained.path / "network.pt", good, broken, "--json", "--top", 1)
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert [entry["path"] for entry in data["images"]] == [str(good)]
    assert len(data["images"][0]["top"]) == 1
    assert [entry["path"] for entry in data["failed"]] == [str(broken)]
    assert data["error"] is None
    assert "Not predicted:" in result.stderr
    assert "broken.png" in words(result.stderr)


def test_nothing_predicted_is_exit_code_2(trained, broken):
    result = invoke(trained.path, broken, "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "None of the 1 images can be read: " in words(result.stderr)


def test_images_can_be_listed_in_a_file(trained, tmp_path):
    files = sorted((trained.pictures / "test" / "dog").iterdir())
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)) + "\n\n")
    result = invoke(trained.path, "--list", tmp_path / "list.txt", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)["images"]
    assert [entry["path"] for entry in found] == list(map(str, files))
    piped = (tmp_path / "list.txt").read_text()
    assert invoke(trained.path, "--list", "-", "--json", given=piped).stdout == result.stdout


def test_a_list_has_the_names_of_files_as_they_are(trained, tmp_path):
    """Those with blanks at their ends, that are no text, and after `find -print0` all others."""
    good = sorted((trained.pictures / "test" / "cat").iterdir())[0]
    names = [b" a.png ", b"b\xff.png", "猫\u2028.png".encode()]
    images = [os.fsencode(tmp_path) + b"/" + name for name in names]

    def found(content):
        (tmp_path / "list").write_bytes(content)
        result = invoke(trained.path, "--list", tmp_path / "list", "--json")
        assert result.exit_code == 0, result.stderr
        paths = [os.fsencode(entry["path"]) for entry in json.loads(result.stdout)["images"]]
        return [path.rpartition(b"/")[2] for path in paths]

    for image in images:
        Path(os.fsdecode(image)).write_bytes(good.read_bytes())
    assert found(b"\xef\xbb\xbf" + b"\r\n".join(images)) == names
    assert found(b"  %s  \n\n" % images[1]) == [names[1]]
    (tmp_path / "two\nlines.png").write_bytes(good.read_bytes())
    images.append(os.fsencode(tmp_path / "two\nlines.png"))
    assert found(b"\0".join(images) + b"\0") == [*names, b"two\nlines.png"]


def test_a_list_that_cannot_be_read_is_told_why(trained, tmp_path):
    (tmp_path / "list1").write_text("a.png", encoding="utf-16")
    (tmp_path / "list2").mkdir()
    for name, why in (("list1", "is text in UTF-16. Save it in UTF-8"), ("list2", "Is a direc")):
        result = invoke(trained.path, "--list", tmp_path / name)
        assert result.exit_code == 2
        assert why in words(result.stderr)
        assert "Did you mean" not in words(result.stderr)


def test_a_list_in_another_encoding_is_told_on_windows(trained, tmp_path, monkeypatch):
    """Names of files are text there, in UTF-8 for Python."""
    (tmp_path / "list").write_bytes(b"caf\xe9.png")
    monkeypatch.setattr("lfmcw_app.commands.predict.os.fsdecode", lambda line: line.decode("utf-8"))
    result = invoke(trained.path, "--list", tmp_path / "list")
    assert result.exit_code == 2
    assert "is no text in UTF-8. Save it in UTF-8." in words(result.stderr)


def test_tables_and_pictures_are_written_whole(trained, tmp_path):
    table, picture = tmp_path / "table.csv", tmp_path / "picture.png"
    arguments = [trained.path, trained.pictures / "test", "--csv", table, "--picture", picture]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert len(list(csv.reader(table.read_text("utf-8").splitlines()))) == 13
    with Image.open(picture) as image:
        assert image.format == "PNG"
    again = invoke(*arguments)
    assert again.exit_code == 2
    assert "nothing is overwritten" in words(again.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "table.csv"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Name images or folders"),
        (["nowhere.png"], "There is no file or folder nowhere.png"),
        (["--list", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["x", "--device", "tpu"], "--device must be cpu, cuda or auto"),
        (["x", "--picture", "x.jpg"], "it is drawn as PNG, so name it FILE.png"),
    ],
)
def test_what_cannot_be_done_is_one_paragraph(arguments, said, trained):
    result = invoke(trained.path, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in words(result.stderr)
    assert "Traceback" not in result.stderr


def test_names_of_files_steer_no_terminal(trained, tmp_path, broken):
    image = tmp_path / "a\x1b[2J.png"
    bad = tmp_path / "b\x1b[2J.png"
    good = sorted((trained.pictures / "test" / "cat").iterdir())[0]
    image.write_bytes(good.read_bytes())
    bad.write_bytes(broken.read_bytes())
    result = invoke(trained.path, image, bad)
    assert result.exit_code == 1
    assert "\x1b" not in result.stdout + result.stderr


def test_a_table_has_the_names_of_files_as_they_are(trained, tmp_path):
    """Also those that are no text: each byte of a name is in the table."""
    image = Path(os.fsdecode(bytes(tmp_path / "x") + b"\xff.png"))
    good = sorted((trained.pictures / "test" / "cat").iterdir())[0]
    image.write_bytes(good.read_bytes())
    result = invoke(trained.path, image, "--json", "--csv", tmp_path / "table.csv")
    assert result.exit_code == 0
    assert bytes(image) in (tmp_path / "table.csv").read_bytes()


def test_a_picture_that_fails_costs_nothing_else(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prediction_output, "draw", full)
    table, picture = tmp_path / "table.csv", tmp_path / "picture.png"
    arguments = [trained.pictures / "test", "--csv", table, "--picture", picture, "--json"]
    result = invoke(trained.path, *arguments)
    assert result.exit_code == 2
    assert f"{picture} cannot be written (No space left on device)" in words(result.stderr)
    assert len(json.loads(result.stdout)["images"]) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


@pytest.fixture
def with_a_damaged_picture(trained, tmp_path):
    """A run that was told to skip damaged files, and its folder with one."""
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(trained.pictures, pictures)
    shutil.copytree(trained.path, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("on_damaged: stop", "on_damaged: skip"))
    described = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps({**described, "path": str(pictures)}))
    (pictures / "test" / "cat" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return run, pictures


def test_what_the_run_skips_is_no_failure(with_a_damaged_picture):
    run, _ = with_a_damaged_picture
    result = invoke(run, "--held-out")
    assert result.exit_code == 0, result.stderr
    assert "Skipped, as in the run: " in result.stderr
    assert "damaged.png" in words(result.stderr)
    assert "error" in result.stdout


def test_a_damaged_file_from_elsewhere_is_a_failure(with_a_damaged_picture, broken):
    run, pictures = with_a_damaged_picture
    result = invoke(run, pictures / "test", broken)
    assert result.exit_code == 1
    assert "Skipped, as in the run: " in result.stderr
    assert words(result.stderr).partition("Not predicted: ")[2].count(".png") == 1


def test_more_classes_than_there_are_is_told(trained):
    result = invoke(trained.path, trained.pictures / "test", "--top", 9, "--json")
    assert result.exit_code == 0
    assert "--top 9: the network has 3 classes; all are given." in result.stderr
    assert len(json.loads(result.stdout)["images"][0]["top"]) == 3
