"""Readers of data sets: files of the real formats, with made-up pixels."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from modes_obeyed import with_mode
from small_pictures import write_classes

from lfmcw_app.data import Images, load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.readers import FASHION_MNIST_FILES, read_folder


def write_fashion(folder, count=20):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in FASHION_MNIST_FILES:
        shape = (count, 28, 28) if "images" in name else (count,)
        values = rng.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8)
        header = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
        (folder / name).write_bytes(gzip.compress(header + values.tobytes()))


def test_fashion_mnist_is_read_from_the_data_folder_and_reduced(tmp_path):
    write_fashion(tmp_path / "fashion-mnist")
    data = load_dataset("fashion-mnist", tmp_path, image_size=16)
    assert data.train.pixels.shape == (20, 1, 16, 16)
    assert data.class_names[9] == "ankle boot"


def test_a_damaged_file_is_named(tmp_path):
    write_fashion(tmp_path / "fashion-mnist")
    path = tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    for content in (path.read_bytes()[:100], gzip.compress(b"\0" * 20), b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz is damaged"):
            load_dataset("fashion-mnist", tmp_path)


def test_a_file_that_unpacks_to_any_size_is_refused(tmp_path, monkeypatch):
    write_fashion(tmp_path / "fashion-mnist")
    monkeypatch.setattr("lfmcw_app.readers.LARGEST_IDX", 1000)
    with pytest.raises(InputError, match=r"is damaged \(it has more than 1,000 bytes\)"):
        load_dataset("fashion-mnist", tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    write_fashion(tmp_path / "fashion-mnist")
    path = tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz"
    with (
        with_mode(path, 0),
        pytest.raises(InputError, match=r"ubyte\.gz cannot be read \(Permission denied\)"),
    ):
        load_dataset("fashion-mnist", tmp_path)


def test_fashion_mnist_is_read_as_torchvision_keeps_it(tmp_path):
    """torchvision's raw folder holds the files gzipped, unpacked, or both."""
    write_fashion(tmp_path / "fashion-mnist")
    expected = load_dataset("fashion-mnist", tmp_path)
    raw = tmp_path / "vision" / "FashionMNIST" / "raw"
    write_fashion(raw)
    for path in sorted(raw.glob("t*-images*.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    data = load_dataset("fashion-mnist", tmp_path / "vision")
    assert torch.equal(data.train.pixels, expected.train.pixels)
    assert torch.equal(data.test.labels, expected.test.labels)
    assert data.source == str(raw)


def test_images_index_together():
    images = Images(pixels=torch.arange(4).view(4, 1, 1, 1).byte(), labels=torch.arange(4))
    chosen = images[torch.tensor([2, 0])]
    assert chosen.pixels.flatten().tolist() == chosen.labels.tolist() == [2, 0]


def test_imagenet_must_be_unpacked(tmp_path):
    with pytest.raises(InputError, match="cannot be downloaded without an account"):
        load_dataset("imagenet", tmp_path)
    write_classes(tmp_path / "imagenet", {"n01": 1, "n02": 1}, "JPEG")
    with pytest.raises(InputError, match="Unpack ImageNet's archives"):
        load_dataset("imagenet", tmp_path)


def test_read_folder_gives_images_in_memory(tmp_path):
    write_classes(tmp_path, {"a": 5, "b": 5})
    train, test, names, *_ = read_folder(tmp_path, None)
    assert isinstance(train, Images)
    assert isinstance(train.pixels, torch.Tensor)
    assert (len(train), len(test), names) == (8, 2, ("a", "b"))
