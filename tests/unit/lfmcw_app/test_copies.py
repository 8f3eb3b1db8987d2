"""Test images that are copies of training images are told, in memory and in files."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from small_pictures import write

import lfmcw_app
from lfmcw_app import copies, own_datasets
from lfmcw_app.copies import copies_in_files, copies_in_memory
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import DataWarning
from lfmcw_app.folders import list_folder


def write_folder(folder):
    """Ten training and four test images of equal size in bytes; two test images are copies."""
    seeds = {"train/a": range(5), "train/b": range(5, 10), "test/a": (3, 11), "test/b": (12, 0)}
    for name, of_part in seeds.items():
        for place, seed in enumerate(of_part):
            write(folder / name / f"{place}.bmp", seed=seed)


@pytest.mark.parametrize("in_memory", [True, False])
def test_copies_in_a_folder_are_told(tmp_path, in_memory):
    write_folder(tmp_path)
    words = r"2 of the 4 test images .* training images \(.*a/0\.bmp, .*b/1\.bmp\).* the copies\.$"
    with pytest.warns(DataWarning, match=words):
        load_dataset(f"folder:{tmp_path}", in_memory=in_memory)
    for name in ("a/0.bmp", "b/1.bmp"):
        (tmp_path / "test" / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset(f"folder:{tmp_path}", in_memory=in_memory)


def test_copies_that_a_name_held_out_can_be_kept_together(tmp_path):
    for place in range(20):
        write(tmp_path / "a" / f"{place}.bmp")
        write(tmp_path / "b" / f"{place}.bmp", seed=1 + place)
    with pytest.warns(DataWarning, match=r"or keep them in one part with data\.groups\.$"):
        load_dataset(f"folder:{tmp_path}")


def test_only_files_of_sizes_in_both_parts_are_read(tmp_path, monkeypatch):
    write_folder(tmp_path)
    write(tmp_path / "test" / "a" / "large.bmp", (16, 16))
    write(tmp_path / "train" / "a" / "larger.bmp", (24, 24))
    shutil.copy(tmp_path / "train" / "a" / "larger.bmp", tmp_path / "test" / "b" / "copy.bmp")
    parts = list_folder(tmp_path).parts
    read, contents = [], copies.digest_of_contents
    monkeypatch.setattr(
        copies, "digest_of_contents", lambda path: (read.append(path), contents(path))[1]
    )
    assert copies_in_files(parts["train"], parts["test"]) == [0, 4, 5]
    assert len(read) == 10 + 4 + 2
    read.clear()
    monkeypatch.setattr(copies, "MOST_FILES", 15)  # room for the rarer size only
    assert copies_in_files(parts["train"], parts["test"]) == [5]
    assert len(read) == 2


def test_copies_in_memory_are_told(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 1, 8, 8), generator=generator).byte()
    assert copies_in_memory(pixels[:15], pixels[12:].flip(0)) == [5, 6, 7]
    labels = torch.arange(20) % 2
    returned = ((pixels, labels), (pixels[:3].clone(), labels[:3]), ("a", "b"))
    monkeypatch.setattr(own_datasets, "_REGISTERED", {})
    lfmcw_app.register_dataset("mine", lambda root: returned)
    with pytest.warns(DataWarning, match="3 of the 3 test images of the data set mine are also"):
        load_dataset("mine")
