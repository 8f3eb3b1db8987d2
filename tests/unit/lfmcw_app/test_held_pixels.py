"""Pixels in memory or in files, by how much memory there is."""

from __future__ import annotations

import pytest
import torch
from small_pictures import load, write_classes

from lfmcw_app import held_pixels
from lfmcw_app.data import Batches, in_order, load_dataset
from lfmcw_app.image_files import ImageFiles
from lfmcw_app.recipe import Augmentation


@pytest.fixture
def pictures(tmp_path):
    write_classes(tmp_path / "pictures", {"a": 20, "bb": 12})
    return tmp_path / "pictures"


def test_pixels_that_fit_are_decoded_and_others_stay_in_files(pictures, monkeypatch):
    size = 32 * 3 * 8 * 8  # bytes of all pixels, both parts
    monkeypatch.setattr(held_pixels, "total_memory", lambda: size / held_pixels.SHARE)
    data = load(pictures)
    assert isinstance(data.train.pixels, torch.Tensor)
    assert "read from files" not in data.summary
    monkeypatch.setattr(held_pixels, "total_memory", lambda: size / held_pixels.SHARE - 4)
    data = load(pictures)
    assert isinstance(data.train.pixels, ImageFiles)
    assert isinstance(data.test.pixels, ImageFiles)
    assert ", read from files as needed" in data.summary


def test_what_is_wanted_goes_before_what_fits(pictures, monkeypatch):
    monkeypatch.setattr(held_pixels, "total_memory", lambda: 0.0)
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


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    alone = held_pixels.total_memory()
    assert alone > 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert held_pixels.total_memory() == alone / 4
