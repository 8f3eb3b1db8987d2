"""Pixels in memory or in files, by how much memory there is."""

from __future__ import annotations

import os

import pytest
import torch
from small_pictures import load, write_classes

from lfmcw_app import memory
from lfmcw_app.data import Batches, in_order, load_dataset
from lfmcw_app.image_files import ImageFiles
from lfmcw_app.recipe import Augmentation


@pytest.fixture
def pictures(tmp_path):
    write_classes(tmp_path / "pictures", {"a": 20, "bb": 12})
    return tmp_path / "pictures"


def test_pixels_that_fit_are_decoded_and_others_stay_in_files(pictures, monkeypatch):
    size = 32 * 3 * 8 * 8  # bytes of all pixels, both parts
    monkeypatch.setattr(memory, "total_memory", lambda: size / memory.SHARE)
    data = load(pictures)
    assert isinstance(data.train.pixels, torch.Tensor)
    assert data.reading == "held in memory"
    monkeypatch.setattr(memory, "total_memory", lambda: size / memory.SHARE - 4)
    data = load(pictures)
    assert isinstance(data.train.pixels, ImageFiles)
    assert isinstance(data.test.pixels, ImageFiles)
    assert data.reading == "read from files as needed"


def test_what_is_wanted_goes_before_what_fits(pictures, monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda: 0.0)
    held = load_dataset(f"folder:{pictures}", in_memory=True)
    assert isinstance(held.train.pixels, torch.Tensor)
    monkeypatch.undo()
    lazy = load_dataset(f"folder:{pictures}", in_memory=False)
    assert isinstance(lazy.train.pixels, ImageFiles)


def test_both_ways_give_the_same_numbers(pictures, monkeypatch):
    """Mean, deviation, training batches and test batches agree bit for bit."""
    monkeypatch.setattr("lfmcw_app.data.STATISTICS_IMAGES", 10)  # fewer than there are
    held, lazy = (
        load_dataset(f"folder:{pictures}", in_memory=in_memory) for in_memory in (True, False)
    )
    assert (held.mean, held.std) == (lazy.mean, lazy.std)
    how = Augmentation(crop_padding=1, flip=True, color_jitter=(0.4, 0.4, 0.4, 0.1))
    streams = [
        Batches(data.train, data, batch_size=6, seed=3, augmentation=how) for data in (held, lazy)
    ]
    for k in (0, 1, 2, 7):
        for one, other in zip(*(stream.batch(k) for stream in streams), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(*(in_order(data.test, data, 4) for data in (held, lazy)), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_the_memory_is_what_limits_the_process(tmp_path, monkeypatch):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.total_memory() <= machine
    alone = memory.total_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.total_memory() == alone / 4
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (10**6, 10**6))
    assert memory.total_memory() == 10**6


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/job/step", "job/memory.max"),
        ("4:cpu,memory:/job/step", "memory/job/memory.limit_in_bytes"),
    ],
)
def test_limits_of_control_groups_count(line, file, tmp_path):
    """The limit of a job holds for its steps; groups of other controllers have none."""
    groups = tmp_path / "groups"
    groups.write_text(f"7:pids:/elsewhere\n{line}\n")
    path = tmp_path / "root" / file
    (path.parent / "step").mkdir(parents=True)
    path.write_text("12345\n")
    (path.parent / "step" / path.name).write_text("max\n")
    assert list(memory._group_limits(groups, tmp_path / "root")) == [12345]
    assert list(memory._group_limits(tmp_path / "none", tmp_path / "root")) == []
