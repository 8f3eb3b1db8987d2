"""Readers of data sets: files of the real formats, with made-up pixels."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile

import numpy as np
import pytest
import torch
from small_pictures import load, write_classes

from lfmcw_app.data import Images, load_dataset, stratified
from lfmcw_app.errors import InputError
from lfmcw_app.readers import FASHION_MNIST_FILES, read_folder


def test_stratified_takes_every_class_in_proportion():
    labels = torch.cat([torch.zeros(60), torch.ones(30), torch.full((10,), 2)]).long()
    first, second = stratified(labels, 50, seed=3)
    assert labels[first].bincount().tolist() == [30, 15, 5]
    assert sorted(torch.cat([first, second]).tolist()) == list(range(100))


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


def cifar_record(label_bytes, labels):
    rng = np.random.default_rng(1)
    return b"".join(
        bytes(label_bytes) + rng.integers(0, 256, 3072, dtype=np.uint8).tobytes()
        for label_bytes in labels
    )


def test_cifar_is_read_from_its_folder_and_its_archive(tmp_path):
    """CIFAR is read from its folder and from its archive without unpickling."""
    files = {
        f"cifar-10-batches-bin/data_batch_{k}.bin": cifar_record(1, [[k], [9]]) for k in range(1, 6)
    }
    files["cifar-10-batches-bin/test_batch.bin"] = cifar_record(1, [[3]])
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    archived = load_dataset("cifar10", tmp_path)
    assert archived.train.labels.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
    assert archived.train.pixels.shape == (10, 3, 32, 32)
    for name, content in files.items():
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / name).write_bytes(content)
    plain = load_dataset("cifar10", tmp_path / "plain")
    assert torch.equal(plain.train.pixels, archived.train.pixels)


def test_cifar100_takes_the_fine_label(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "train.bin").write_bytes(cifar_record(2, [[19, 99], [0, 7]]))
    (folder / "test.bin").write_bytes(cifar_record(2, [[1, 2]]))
    (folder / "fine_label_names.txt").write_text("\n".join(f"name{k}" for k in range(100)) + "\n")
    data = load_dataset("cifar100", tmp_path)
    assert data.train.labels.tolist() == [99, 7]
    assert data.class_names[99] == "name99"
    (folder / "train.bin").write_bytes(cifar_record(2, [[19, 200]]))
    with pytest.raises(InputError, match="must lie in 0 to 99"):
        load_dataset("cifar100", tmp_path)
    (folder / "train.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="whole records"):
        load_dataset("cifar100", tmp_path)


def test_images_index_together():
    images = Images(pixels=torch.arange(4).view(4, 1, 1, 1).byte(), labels=torch.arange(4))
    chosen = images[torch.tensor([2, 0])]
    assert chosen.pixels.flatten().tolist() == chosen.labels.tolist() == [2, 0]


def test_an_unsplit_folder_has_a_stratified_fifth_held_out(tmp_path):
    write_classes(tmp_path, {"a": 20, "bb": 10})
    data, again = load(tmp_path), load(tmp_path)
    assert data.train.labels.bincount().tolist() == [16, 8]
    assert data.test.labels.bincount().tolist() == [4, 2]
    assert torch.equal(data.train.pixels, again.train.pixels)
    everything = torch.cat([data.train.pixels, data.test.pixels]).flatten(1)
    assert len(everything.unique(dim=0)) == 30


def test_imagenet_must_be_unpacked(tmp_path):
    with pytest.raises(InputError, match="cannot be downloaded without an account"):
        load_dataset("imagenet", tmp_path)
    write_classes(tmp_path / "imagenet", {"n01": 1, "n02": 1}, "JPEG")
    with pytest.raises(InputError, match="Unpack ImageNet's archives"):
        load_dataset("imagenet", tmp_path)


def test_the_split_is_the_one_that_earlier_versions_made():
    # The definition, written out: a class's k-th of n examples, in shuffled order, has the position
    # (k + 1/2) / n.
    labels = torch.randint(7, (500,), generator=torch.Generator().manual_seed(5)) ** 2
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(labels), generator=generator)
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels[order] == label).nonzero().squeeze(1)
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    by_position = torch.argsort(position, stable=True)
    first = order[by_position[:200]]
    assert torch.equal(
        stratified(labels, 200, 3)[0], first[torch.randperm(200, generator=generator)]
    )


def test_read_folder_gives_images_in_memory(tmp_path):
    write_classes(tmp_path, {"a": 5, "b": 5})
    train, test, names = read_folder(tmp_path, None)
    assert isinstance(train, Images)
    assert isinstance(train.pixels, torch.Tensor)
    assert (len(train), len(test), names) == (8, 2, ("a", "b"))
