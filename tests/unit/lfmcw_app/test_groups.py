"""The file of groups: images of a patient stay together."""

from __future__ import annotations

import pytest
import torch
from small_pictures import load, write_classes

from lfmcw_app.data import load_dataset, search_split
from lfmcw_app.errors import DataWarning, InputError


def write_groups(folder, patients=10, *, prefix=""):
    """Each class has 20 images, of `patients` patients that both classes have."""
    rows = [
        f"{prefix}{label}/{index:03d}.png,patient {index % patients}"
        for label in ("a", "bb")
        for index in range(20)
    ]
    path = folder / "groups.csv"
    path.write_text("file,group\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def patients_of(dataset, images, patients=10):
    """The patients of images; which one an image is of is told by its pixels."""
    whole = load_dataset(dataset.name)
    every = torch.cat([whole.train.pixels, whole.test.pixels]).flatten(1)
    names = whole.fingerprint.parts
    files = [
        int(name[:3]) % patients
        for part in ("train", "test")
        for of_class in names[part].values()
        for name in of_class.files
    ]
    of_pixels = {tuple(row.tolist()): file for row, file in zip(every, files, strict=True)}
    return {of_pixels[tuple(row.tolist())] for row in images.pixels.flatten(1)}


def test_a_patient_is_in_one_part_only(tmp_path):
    write_classes(tmp_path, {"a": 20, "bb": 20})
    path = write_groups(tmp_path)
    data = load_dataset(f"folder:{tmp_path}", groups=str(path))
    train, validation = search_split(data, None, 0)
    parts = [patients_of(data, images) for images in (train, validation, data.test)]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == list(range(10))
    assert all(parts)
    alone = load(tmp_path)
    assert patients_of(alone, alone.train) & patients_of(alone, alone.test)


def test_the_file_is_also_looked_for_in_the_folder(tmp_path):
    write_classes(tmp_path, {"a": 20, "bb": 20})
    path = write_groups(tmp_path, prefix="./")
    relative = load_dataset(f"folder:{tmp_path}", groups="groups.csv")
    assert torch.equal(
        relative.test.pixels, load_dataset(f"folder:{tmp_path}", groups=str(path)).test.pixels
    )
    with pytest.raises(InputError, match=r"no file patients\.csv, here or in .* --set data"):
        load_dataset(f"folder:{tmp_path}", groups="patients.csv")


def test_files_without_group_and_lines_without_file_are_named(tmp_path):
    write_classes(tmp_path, {"a": 20, "bb": 21})
    path = write_groups(tmp_path)
    with pytest.raises(InputError, match=r"no group of 1 image: bb/020\.png"):
        load_dataset(f"folder:{tmp_path}", groups=str(path))
    (tmp_path / "bb" / "020.png").unlink()
    path.write_text(path.read_text() + "bb/x.png,y\n")
    with pytest.warns(DataWarning, match=r"has lines of 1 file not among .*: bb/x\.png"):
        load_dataset(f"folder:{tmp_path}", groups=str(path))


def test_a_group_in_two_parts_is_refused_by_name(tmp_path):
    for part, count in {"train": 8, "val": 4, "Test": 4}.items():
        write_classes(tmp_path / part, {"a": count, "bb": count})
    rows = [
        f"{path.relative_to(tmp_path).as_posix()},{path.relative_to(tmp_path).parts[0]}{path.stem}"
        for path in tmp_path.rglob("*.png")
    ]
    path = tmp_path / "groups.csv"
    path.write_text("\ufefffile, group \n" + "\n".join(rows))
    data = load_dataset(f"folder:{tmp_path}", groups=str(path))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [16, 8, 8]
    for part in ("val", "Test"):
        both = [row.replace(f"{part}001", "train001") for row in rows]
        path.write_text("file,group\n" + "\n".join(both))
        with pytest.raises(InputError, match=f"1 group is in train and in {part}: train001"):
            load_dataset(f"folder:{tmp_path}", groups=str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has none"),
        ("name,patient\n", "has name, patient"),
        ("file|group\na/000.png|1\n", r"separated by commas, and has file\|group"),
        ("file,group,group\na/000.png,1,2\n", "names the column group twice"),
        ("file,group\na/000.png,Smith, 3\n", "line 2 of .* has 3 fields, and the first line 2"),
        ("file;group\na/000.png;Smith; 3\n", "Put a name with ';' in it between double quotes"),
        ("file,group\na/000.png,\n", "line 2 of .* lacks a file or a group"),
        ("file,group\na/000.png\n", "line 2 of .* lacks a file or a group"),
        ("file,group\na/000.png,1\na/000.png,2\n", "line 3 .* the group '2'; an earlier .* '1'"),
    ],
)
def test_a_file_that_is_no_list_of_groups_is_refused(tmp_path, text, words):
    write_classes(tmp_path, {"a": 2, "bb": 2})
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        load_dataset(f"folder:{tmp_path}", groups="groups.csv")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_groups_may_be_separated_by_other_signs(tmp_path, separator):
    write_classes(tmp_path, {"a": 20, "bb": 20})
    path = write_groups(tmp_path)
    expected = load_dataset(f"folder:{tmp_path}", groups=str(path))
    path.write_text(path.read_text().replace(",", separator))
    found = load_dataset(f"folder:{tmp_path}", groups=str(path))
    assert found.fingerprint == expected.fingerprint


def test_an_image_whose_name_cannot_be_shown_has_its_group(tmp_path):
    write_classes(tmp_path, {"a": 20, "bb": 20})
    path = write_groups(tmp_path)
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "0\n0.png")
    path.write_text(path.read_text().replace("\na/000.png,", '\n"a/0\n0.png",'))
    data = load_dataset(f"folder:{tmp_path}", groups=str(path))
    assert len(data.train) + len(data.test) == 40


def test_empty_fields_at_the_end_of_a_line_are_none(tmp_path):
    write_classes(tmp_path, {"a": 20, "bb": 20})
    path = write_groups(tmp_path)
    expected = load_dataset(f"folder:{tmp_path}", groups=str(path))
    path.write_text(path.read_text().replace("t 1\n", "t 1,,\n"))
    assert load_dataset(f"folder:{tmp_path}", groups=str(path)).fingerprint == expected.fingerprint


@pytest.mark.parametrize("by_class", [True, False])
def test_groups_that_leave_none_for_testing_are_refused(tmp_path, by_class):
    write_classes(tmp_path, {"a": 5, "bb": 5})
    names = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.png"))]
    groups = [name.split("/")[0] if by_class else "all" for name in names]
    rows = [f"{name},{group}\n" for name, group in zip(names, groups, strict=True)]
    (tmp_path / "groups.csv").write_text("file,group\n" + "".join(rows))
    with pytest.raises(InputError, match="No image is left for testing: each class has only one g"):
        load_dataset(f"folder:{tmp_path}", groups="groups.csv")


def test_a_file_of_other_bytes_is_refused(tmp_path):
    write_classes(tmp_path, {"a": 2, "bb": 2})
    (tmp_path / "groups.csv").write_bytes(b"file,group\n\xff\xfe\n")
    with pytest.raises(InputError, match="cannot be read"):
        load_dataset(f"folder:{tmp_path}", groups="groups.csv")


def test_only_folders_have_groups():
    with pytest.raises(InputError, match=r"data\.groups is for the images of a folder"):
        load_dataset("digits", groups="groups.csv")
