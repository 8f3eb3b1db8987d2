"""Which images a folder holds; folders that cannot be used are refused with advice."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image
from small_pictures import load, write, write_classes

from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.folders import image_suffixes, in_one_spelling, list_folder


def write_parts(folder, *names, classes=("a", "b"), count=2):
    for name in names:
        write_classes(folder / name, dict.fromkeys(classes, count))


@pytest.mark.parametrize("held_out", ["test", "Testing", "val", "VALID", "validation", "dev"])
@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
def test_a_split_folder_is_read_as_it_is(tmp_path, train, held_out):
    write_classes(tmp_path / train, {"dog": 3, "cat": 2})
    write_classes(tmp_path / held_out, {"cat": 1, "dog": 2})
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 1, 1]
    assert (data.channels, data.image_size, data.num_classes) == (3, 8, 2)
    for images, part in ((data.train, train), (data.test, held_out)):
        expected = np.asarray(Image.open(tmp_path / part / "cat" / "000.png"))
        assert np.array_equal(images.pixels[0].permute(1, 2, 0).numpy(), expected)
    pixels = data.train.pixels.double() / 255.0
    assert data.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-14)
    assert data.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=1e-14)
    told = f"{held_out} is the test part" in data.summary
    assert told == (held_out not in ("test", "Testing"))


def test_validation_images_are_a_part_beside_test_images(tmp_path):
    write_parts(tmp_path, "Train", count=4)
    write_parts(tmp_path, "dev", count=3)
    write_parts(tmp_path, "testing", count=1)
    data = load(tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 6, 2]
    assert "16 images, 2 classes, 8 train / 6 validation / 2 test" in data.summary
    assert data.left_out == ""


def test_a_class_may_be_called_train_and_hidden_folders_are_none(tmp_path):
    write_classes(tmp_path, {"bus": 5, "train": 5, ".cache": 1, "__MACOSX": 1})
    (tmp_path / "train" / "more").mkdir()
    write(tmp_path / "train" / "more" / "1.png")
    data = load(tmp_path)
    assert data.class_names == ("bus", "train")
    assert "2 folders skipped: .cache, __MACOSX" in data.summary


def test_nested_folders_belong_to_their_class(tmp_path):
    write_classes(tmp_path, {"a": 3, "b": 3})
    write(tmp_path / "a" / "batch2" / "deep" / "000.png")
    found = list_folder(tmp_path).parts["train"]
    flat = ("000.png", "001.png", "002.png")
    assert found.names == (*flat, "batch2/deep/000.png", *flat)
    assert found.labels.tolist() == [0] * 4 + [1] * 3
    assert found.sizes.tolist() == [os.path.getsize(path) for path in found.paths]
    assert (
        "1 of the images are in folders within class folders"
        in list_folder(tmp_path).describe_left_out()
    )


def test_what_is_left_out_is_counted_by_kind(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2})
    for name in ("a/notes.txt", "b/labels.TXT", "a/.hidden.png", "b/Thumbs.db", "a/noending"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "b" / "sub").mkdir()
    (tmp_path / "b" / "sub" / "x.txt").write_text("x")
    (tmp_path / "b" / ".ipynb_checkpoints").mkdir()
    write(tmp_path / "lonely.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "a" / "gone.png")
    said = load(tmp_path).summary
    assert (
        "9 files skipped: 3 .txt, 1 .md, 1 .png outside of class folders, 1 hidden, 1 linked to "
        "nothing, 1 of the system and 1 more; 1 folder skipped: .ipynb_checkpoints"
    ) in said


def test_all_that_pillow_reads_is_read(tmp_path):
    suffixes = ("jfif", "jpe", "JPG", "jp2", "tif", "TIFF", "webp", "bmp", "pgm", "apng", "avif")
    for suffix in suffixes:
        if f".{suffix.lower()}" in image_suffixes():
            write(tmp_path / "a" / f"1.{suffix}", (16, 16), mode="L" if suffix == "pgm" else "RGB")
    write(tmp_path / "b" / "1.png", (16, 16))
    write(tmp_path / "b" / "2.png", (16, 16))
    found = list_folder(tmp_path)
    assert found.skipped == {}
    assert {".jfif", ".jpe", ".jp2", ".tif", ".webp"} <= image_suffixes()
    assert len(found.parts["train"]) >= 2 + 10
    assert not {".mpg", ".h5", ".eps", ".pdf"} & image_suffixes()
    assert load(tmp_path).num_classes == 2


def test_links_are_followed_and_loops_end(tmp_path):
    write_classes(tmp_path / "real", {"a": 3, "b": 3})
    linked = tmp_path / "linked"
    (linked / "b").mkdir(parents=True)
    os.symlink(tmp_path / "real" / "a", linked / "a")
    for path in (tmp_path / "real" / "b").iterdir():
        os.symlink(path, linked / "b" / path.name)
    expected = list_folder(linked).parts["train"]
    assert [expected.names[i] for i in (0, 3)] == ["000.png", "000.png"]
    assert len(expected) == 6
    # To itself, to the folder of the data, to what holds it, and to another class.
    for name, target in {"i": linked / "b", "d": linked, "up": tmp_path, "a": linked / "a"}.items():
        os.symlink(target, linked / "b" / name)
    os.symlink(linked / "b" / "self.png", linked / "b" / "self.png")
    found = list_folder(linked)
    assert found.parts["train"].names == expected.names
    assert found.skipped == {"linked to nothing": 1}
    assert found.skipped_folders == ("a", "d", "i", "up")


def test_a_folder_is_read_once_although_it_has_two_names(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2})
    write(tmp_path / "a" / "more" / "x.png")
    os.symlink(tmp_path / "a" / "more", tmp_path / "a" / "same")
    os.symlink(tmp_path / "a" / "more", tmp_path / "a" / "more" / "again")
    flat = ("000.png", "001.png")
    assert list_folder(tmp_path).parts["train"].names == (*flat, "more/x.png", *flat)
    os.symlink(tmp_path / "a", tmp_path / "kitten")
    with pytest.raises(InputError, match=r"a and .*kitten are one folder under two names"):
        load(tmp_path)


def test_training_images_cannot_be_the_test_images_too(tmp_path):
    write_parts(tmp_path, "train")
    os.symlink(tmp_path / "train", tmp_path / "test")
    with pytest.raises(InputError, match="one folder under two names"):
        load(tmp_path)


def test_names_have_one_spelling_on_all_systems(tmp_path):
    for form in ("NFC", "NFD"):
        write(tmp_path / form / unicodedata.normalize(form, "é") / "ü.png")
        write(tmp_path / form / "z" / unicodedata.normalize(form, "ö.png"))
    one, other = (list_folder(tmp_path / form).parts["train"] for form in ("NFC", "NFD"))
    assert one.class_names == other.class_names == ("z", "é")
    assert one.names == other.names


def test_a_file_in_place_of_a_folder_is_told_what_it_is(tmp_path):
    for name, advice in {
        "pets.zip": "Unpack it",
        "pets.tar.gz": "Unpack it",
        "pets.npz": "register_dataset",
        "train.csv": "register_dataset",
    }.items():
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=f"{name} is a file, and not a folder .*{advice}"):
            list_folder(tmp_path / name)


def test_a_table_beside_images_without_folders_is_pointed_out(tmp_path):
    write(tmp_path / "images" / "1.png")
    with pytest.raises(InputError) as plain:
        list_folder(tmp_path)
    assert "register_dataset" not in str(plain.value)
    (tmp_path / "train.csv").write_text("id,label")
    (tmp_path / "images" / "metadata.jsonl").write_text("{}")
    (tmp_path / "._train.csv").write_text("hidden")
    with pytest.raises(InputError, match=r"are in train\.csv, metadata\.jsonl, write a function"):
        list_folder(tmp_path)
    for part in ("train", "test"):  # as Hugging Face has its folders of images
        write(tmp_path / "parts" / part / "1.png")
        (tmp_path / "parts" / part / "metadata.csv").touch()
    with pytest.raises(InputError, match=r"no class folders.* are in metadata\.csv, write a func"):
        list_folder(tmp_path / "parts")


def test_a_table_beside_class_folders_is_told(tmp_path):
    """The folders could be images and masks, and the table tell the classes."""
    write_classes(tmp_path, {"images": 3, "masks": 3})
    assert "the classes are" not in list_folder(tmp_path).describe_left_out()
    (tmp_path / "train.csv").touch()
    told = list_folder(tmp_path).describe_left_out()
    assert told.endswith("the classes are the folders images, masks, not from train.csv")


def test_a_missing_relative_folder_is_told_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_dataset("folder:nowhere")
    assert f"There is no folder nowhere in {tmp_path}." in str(caught.value)


def test_an_unusable_folder_is_refused_with_advice(tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="needs the path"):
        load_dataset("folder:")
    with pytest.raises(
        InputError, match=r"at least two folders of images, one per class, .* has 0"
    ):
        load(tmp_path)
    write_classes(tmp_path, {"a": 2})
    with pytest.raises(InputError, match="has 1"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "1.heic").write_text("x")
    with pytest.raises(InputError, match=r"class folder .*empty has no images \(but 1 \.heic\)"):
        load(tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"class folders .*bare, .*empty have no images"):
        load(tmp_path)


def test_a_folder_around_the_folder_is_recognised(tmp_path):
    write_parts(tmp_path / "archive", "train", "test")
    with pytest.raises(InputError, match=r"has 1\. .*Did you mean folder:.*archive\?"):
        load(tmp_path)


def test_parts_need_the_same_classes(tmp_path):
    write_parts(tmp_path, "train", "test", classes="abcd")
    shutil.rmtree(tmp_path / "test" / "c")
    with pytest.raises(InputError, match=r"train and test \(4 and 3\): 'c' is in train and not in"):
        load(tmp_path)
    shutil.rmtree(tmp_path / "train" / "c")
    shutil.rmtree(tmp_path / "train" / "d")
    shutil.rmtree(tmp_path / "train" / "a")
    with pytest.raises(InputError, match="needs at least two folders"):
        load(tmp_path)
    write_parts(tmp_path, "train", classes="e")
    with pytest.raises(InputError, match=r"'e' is in train and not in test"):
        load(tmp_path)
    shutil.rmtree(tmp_path / "train" / "e")
    write_parts(tmp_path, "train", classes="a")
    with pytest.raises(InputError, match=r"'d' is in test and not in train"):
        load(tmp_path)
    write_parts(tmp_path, "train", "val", classes="abd")
    shutil.rmtree(tmp_path / "val" / "b")
    (tmp_path / "val" / "b").mkdir()
    with pytest.raises(InputError, match=r"class folder .*val/b has no images"):
        load(tmp_path)


def test_parts_that_cannot_be_understood_are_refused(tmp_path):
    def refused(words, *names, flat=()):
        folder = tmp_path / "-".join([*names, *flat])
        write_parts(folder, *names)
        for name in flat:
            write(folder / name / "1.png")
        with pytest.raises(InputError, match=words):
            load(folder)

    refused("no folder test or val beside it", "train")
    refused("no folder train beside it", "test")
    refused("no folder train beside it", "test", "val")
    refused("two folders for one part: test and testing", "train", "test", "testing")
    refused("two folders for one part: Train and train", "Train", "train", "test")
    refused("test has no class folders, so that no image", "train", "val", flat=["test"])
    refused("test, train has no class folders", flat=["train", "test"])
    refused(r"parts \(test, train\) beside other .*\(more\)", "train", "test", flat=["more"])


@pytest.mark.parametrize(
    "names",
    [
        ("seg_train", "seg_test"),
        ("train", "eval"),
        ("train", "holdout"),
        ("trainval", "test"),
        ("fold1", "fold2", "fold3"),
        ("images", "masks"),
        ("train", "test1"),
    ],
    ids=" ".join,
)
def test_parts_of_other_names_are_not_taken_for_classes(tmp_path, names):
    write_parts(tmp_path, *names, classes=("cat", "dog"), count=3)
    shutil.rmtree(tmp_path / names[-1] / "dog")  # one has a class less, and one more
    write_classes(tmp_path / names[-1], {"cow": 2, "dog": 2})
    with pytest.raises(InputError, match=r"may be parts .*\(cat, dog\).*list their names in a fi"):
        list_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("\ufeff" + "\r\n".join(names[::-1]))
    assert list_folder(tmp_path).parts["train"].class_names == tuple(sorted(names))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match="may be parts"):
        list_folder(tmp_path)


@pytest.mark.parametrize(
    "names",
    [("train", "test1"), ("Train images", "val_images"), ("seg_train/seg_train", "seg_test/1")],
    ids=" ".join,
)
def test_parts_without_class_folders_are_not_classes(tmp_path, names):
    write_classes(tmp_path, dict.fromkeys(names, 3))
    with pytest.raises(InputError, match="their names are like those of parts"):
        list_folder(tmp_path)


def test_one_part_beside_pictures_without_classes_is_refused(tmp_path):
    write_parts(tmp_path, "train")
    write_classes(tmp_path, {"unlabelled": 3})
    with pytest.raises(InputError, match=r"train holds only folders \(a, b\)"):
        list_folder(tmp_path)


@pytest.mark.parametrize(
    ("train", "test"), [("training_set", "test_set"), ("train ", "test"), ("TrainSet", "val-set")]
)
def test_parts_may_be_called_sets_and_end_in_a_blank(tmp_path, train, test):
    write_parts(tmp_path, train, test)
    found = list_folder(tmp_path)
    assert found.folders == {"train": train, "test": test}
    assert found.parts["train"].class_names == ("a", "b")


def test_folders_within_classes_may_share_some_names(tmp_path):
    for name, inner in {"cat": "2023 2024 2025", "dog": "2023 2026", "train": "2024 2026"}.items():
        write_parts(tmp_path, name, classes=inner.split())
        write(tmp_path / name / "1.png")
    assert len(list_folder(tmp_path).parts["train"].class_names) == 3
    (tmp_path / "cat" / "1.png").unlink()
    (tmp_path / "dog" / "1.png").unlink()
    assert len(list_folder(tmp_path).parts["train"].class_names) == 3


def test_a_path_as_in_a_browser_or_a_shell_gets_advice(tmp_path):
    with pytest.raises(InputError, match="without file://"):
        load_dataset(f"folder:file://{tmp_path}")
    with pytest.raises(InputError, match=r"\$PWD/x.*Variables are not replaced"):
        load_dataset("folder:$PWD/x")


def test_folders_without_images_beside_the_parts_are_left_out(tmp_path):
    write_parts(tmp_path, "train", "test")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "1.json").write_text("{}")
    (tmp_path / "labels.csv").write_text("x")
    said = load(tmp_path).summary
    assert "8 images, 2 classes, 4 train / 4 test" in said
    assert "1 file skipped: 1 .csv; 1 folder skipped: annotations" in said


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_classes(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "locked").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"locked cannot be read \(Permission denied\)"):
        load(tmp_path)


def test_folders_may_be_deeper_than_functions_may_call(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2})
    deep = tmp_path / "a" / "/".join("d" * 300)
    deep.mkdir(parents=True)
    write(deep / "deep.png")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        found = list_folder(tmp_path)
    finally:
        sys.setrecursionlimit(before)
    assert found.parts["train"].names[-3].endswith("d/d/deep.png")


def test_names_of_classes_are_one_printable_line(tmp_path):
    write_classes(tmp_path, {"a\nb\x1b[2J": 2, "c": 2})
    shown = "\N{REPLACEMENT CHARACTER}"
    assert list_folder(tmp_path).parts["train"].class_names == (f"a{shown}b{shown}[2J", "c")


def test_text_has_one_spelling_whatever_the_systems_encoding(monkeypatch):
    def lacks_it(name):
        raise UnicodeEncodeError("ascii", name, 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr(os, "fsencode", lacks_it)
    assert in_one_spelling("e\u0301te\u0301 猫") == "été 猫"
    assert in_one_spelling("a\udcff\n") == "a\ufffd\ufffd"


def test_classes_that_look_alike_are_refused(tmp_path):
    for name in (b"x\xff", b"x\xfe"):
        write_classes(tmp_path, {os.fsdecode(name): 2})
    with pytest.raises(InputError, match="have one name in text"):
        list_folder(tmp_path)
