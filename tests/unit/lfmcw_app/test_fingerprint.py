"""Data are known again, and what changed is said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from small_pictures import load, write, write_classes

from lfmcw_app.data import load_dataset
from lfmcw_app.errors import DataWarning, InputError
from lfmcw_app.fingerprint import Fingerprint, check_unchanged, differences
from lfmcw_app.folders import list_folder


@pytest.fixture
def folder(tmp_path):
    write_classes(tmp_path / "data", {"cat": 24, "dog": 24})
    return tmp_path / "data"


def fingerprint(folder):
    return load(folder).fingerprint


def test_a_moved_folder_is_the_same_data(folder, tmp_path):
    before = fingerprint(folder)
    shutil.move(folder, tmp_path / "elsewhere")
    after = fingerprint(tmp_path / "elsewhere")
    assert after == before
    assert after.digest
    assert differences(before, after) == []


def add(folder):
    write(folder / "cat" / "new.png", seed=7)


def remove(folder):
    (folder / "cat" / "003.png").unlink()
    (folder / "cat" / "004.png").unlink()


def rename_class(folder):
    (folder / "cat").rename(folder / "ant")


def add_class(folder):
    write_classes(folder, {"eel": 3})


def rename_file(folder):
    (folder / "dog" / "001.png").rename(folder / "dog" / "one.png")


def replace_file(folder):
    write(folder / "dog" / "001.png", size=(16, 16))


def give_to_another_class(folder):
    (folder / "dog" / "001.png").rename(folder / "cat" / "x.png")


CHANGES = {
    add: ["1 image added to class 'cat' (new.png)"],
    remove: ["2 images removed from class 'cat' (003.png, 004.png)"],
    rename_class: ["class 'ant' is new", "class 'cat' is gone"],
    add_class: ["class 'eel' is new"],
    rename_file: [
        "1 image added to class 'dog' (one.png)", "1 image removed from class 'dog' (001.png)",
    ],
    replace_file: ["1 image of another size in class 'dog' (001.png)"],
    give_to_another_class: [
        "1 image added to class 'cat' (x.png)", "1 image removed from class 'dog' (001.png)",
    ],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_is_said(folder, change):
    before = load_dataset(f"folder:{folder}", image_size=8).fingerprint
    change(folder)
    after = load_dataset(f"folder:{folder}", image_size=8).fingerprint
    assert differences(before, after) == CHANGES[change]
    assert after.digest != before.digest


def test_an_image_that_moves_to_another_part_is_named(tmp_path):
    for part in ("train", "test"):
        write_classes(tmp_path / part, {"a": 3, "b": 3})
    write(tmp_path / "test" / "a" / "x.png")
    before = fingerprint(tmp_path)
    (tmp_path / "test" / "a" / "x.png").rename(tmp_path / "train" / "a" / "x.png")
    assert differences(before, fingerprint(tmp_path)) == [
        "1 image in another part of class 'a' (x.png)"
    ]
    (tmp_path / "train" / "a" / "x.png").rename(tmp_path / "test" / "a" / "x.png")
    assert differences(before, fingerprint(tmp_path)) == []


def test_other_groups_are_other_data(folder):
    def grouped(shift):
        rows = [
            f"{name}/{i:03d}.png,{(i + shift) // 2}" for name in ("cat", "dog") for i in range(24)
        ]
        (folder / "groups.csv").write_text("file,group\n" + "\n".join(rows))
        return load_dataset(f"folder:{folder}", groups="groups.csv").fingerprint

    assert grouped(0) == grouped(0)
    assert differences(grouped(0), grouped(1))
    parts = list_folder(folder).parts  # the same files, in the same part
    one, other = (
        Fingerprint.of_files(parts, {"train": ["a"] * 24 + [last] * 24}) for last in ("a", "b")
    )
    assert differences(one, other) == ["the images of class 'dog' have other groups (data.groups)"]


def test_many_files_are_counted_without_their_names(folder, monkeypatch):
    monkeypatch.setattr("lfmcw_app.fingerprint.MOST_LETTERS", 100)
    before = fingerprint(folder)
    assert "000.png" not in json.dumps(before.to_data())
    add(folder)
    assert differences(before, fingerprint(folder)) == ["class 'cat' has 25 images instead of 24"]
    remove(folder)
    write(folder / "cat" / "y.png")
    assert differences(before, fingerprint(folder)) == ["class 'cat' has other images"]


def test_images_in_memory_are_known_by_their_pixels():
    labels = torch.arange(6) % 2
    pixels = torch.randint(256, (6, 1, 4, 4), dtype=torch.uint8)

    def of(pixels, labels, names=("a", "b")):
        return Fingerprint.of_pixels({"train": (pixels, labels)}, names)

    before = of(pixels, labels)
    assert of(pixels.clone(), labels.clone()) == before
    other = pixels.clone()
    other[3, 0, 0, 0] += 1
    assert differences(before, of(other, labels)) == ["class 'b' has other images"]
    assert differences(before, of(pixels[:5], labels[:5])) == [
        "class 'b' has 2 images instead of 3"
    ]
    order = labels.argsort(stable=True)  # by class, which the split depends on
    assert differences(before, of(pixels[order], labels[order]))
    assert differences(before, of(pixels, labels, ("b", "a")))


def test_the_data_sets_of_the_application_have_one():
    one, other = (load_dataset("digits", image_size=size).fingerprint for size in (None, 8))
    assert one == other
    assert one.digest
    assert load_dataset("random:cifar10").fingerprint.digest
    assert load_dataset("random:cifar10").fingerprint != load_dataset("random:cifar100").fingerprint


def test_a_run_is_refused_other_data(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    before = fingerprint(folder)
    check_unchanged(run, before)  # it has not begun
    (run / "dataset.json").write_text(json.dumps({"fingerprint": before.to_data()}))
    check_unchanged(run, before)
    add(folder)
    with pytest.raises(
        InputError, match=r"1 image added to class 'cat' \(new\.png\).*Put the file"
    ):
        check_unchanged(run, fingerprint(folder))


def test_a_run_of_an_earlier_version_is_warned_of(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "search.pt").write_bytes(b"x")
    with pytest.warns(DataWarning, match="cannot be checked"):
        check_unchanged(run, fingerprint(folder))
    (run / "search.pt").unlink()
    (run / "dataset.json").write_text("{}")
    with pytest.warns(DataWarning, match="cannot be checked"):
        check_unchanged(run, fingerprint(folder))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"fingerprint": 3}', '{"fingerprint": {"digest": "x", "parts": {"a": 1}}}']
)
def test_a_damaged_description_is_refused(folder, tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"dataset\.json cannot be read"):
        check_unchanged(tmp_path, fingerprint(folder))
