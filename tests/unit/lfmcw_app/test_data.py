"""Data sets, the stratified split, batches as a function of seed and position, augmentation."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lfmcw_app.data import Batches, Images, load_dataset, search_split, stratified
from lfmcw_app.errors import InputError
from lfmcw_app.readers import FASHION_MNIST_FILES
from lfmcw_app.recipe import Augmentation, load_recipe
from lfmcw_app.trainer import read_data


def test_digits_are_embedded_and_normalised():
    digits = load_dataset("digits")
    assert digits.train.pixels.shape[1:] == (1, 8, 8)
    assert len(digits.train) + len(digits.test) == 1797
    images, labels = next(iter(Batches(digits.train, digits, batch_size=len(digits.train), seed=0)))
    assert float(images.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(images.std()) == pytest.approx(1.0, abs=1e-3)
    assert labels.unique().tolist() == list(range(10))


def test_the_search_split_is_stratified_disjoint_and_seeded():
    digits = load_dataset("digits")
    train, validation = search_split(digits, None, seed=0)
    assert abs(len(train) - len(validation)) <= 1
    difference = train.labels.bincount() - validation.labels.bincount()
    assert int(difference.abs().max()) <= 1
    again, _ = search_split(digits, None, seed=0)
    other, _ = search_split(digits, None, seed=1)
    assert torch.equal(train.pixels, again.pixels)
    assert not torch.equal(train.pixels, other.pixels)


def test_stratified_takes_every_class_in_proportion():
    labels = torch.cat([torch.zeros(60), torch.ones(30), torch.full((10,), 2)]).long()
    first, second = stratified(labels, 50, seed=3)
    assert labels[first].bincount().tolist() == [30, 15, 5]
    assert sorted(torch.cat([first, second]).tolist()) == list(range(100))


def test_a_batch_is_a_function_of_seed_and_position():
    digits = load_dataset("digits")
    how = Augmentation(crop_padding=1, flip=True)

    def stream(seed=0):
        return Batches(digits.train, digits, batch_size=100, seed=seed, augmentation=how)

    one = stream()
    expected = [batch for batch, _ in zip(one, range(40), strict=False)]
    other = stream()
    other.load_state_dict({"position": 33})
    assert torch.equal(next(iter(other))[0], expected[33][0])
    assert not torch.equal(stream(1).batch(0)[0], expected[0][0])
    state = torch.get_rng_state()
    stream().batch(5)
    assert torch.equal(state, torch.get_rng_state())


def test_a_pass_shows_every_image_once():
    digits = load_dataset("digits")
    stream = Batches(digits.train, digits, batch_size=7, seed=0)
    seen = torch.cat([stream.batch(k)[0] for k in range(stream.per_epoch)])
    assert len(seen.flatten(1).unique(dim=0)) == len(
        torch.cat([stream.batch(k)[0] for k in range(stream.per_epoch)]).flatten(1).unique(dim=0)
    )
    counts = torch.cat([stream.batch(k)[1] for k in range(stream.per_epoch)]).bincount()
    total = digits.train.labels.bincount()
    assert int((total - counts).min()) >= 0
    assert int((total - counts).sum()) == len(digits.train) % 7


def test_augmentation_crops_mirrors_and_cuts():
    digits = load_dataset("digits")
    plain = Batches(digits.train, digits, batch_size=64, seed=0).batch(0)[0]
    flipped = Batches(
        digits.train, digits, batch_size=64, seed=0, augmentation=Augmentation(flip=True)
    ).batch(0)[0]
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 10 < int(mirrored.sum()) < 54
    cropped = Batches(
        digits.train, digits, batch_size=64, seed=0, augmentation=Augmentation(crop_padding=2)
    ).batch(0)[0]
    black = float(plain.min())  # a pixel of 0, which is what a crop sees outside the image
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2), value=black)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).reshape(64, 25, 8, 8)
    assert bool((windows == cropped).flatten(2).all(2).any(1).all())
    cut = Batches(
        digits.train, digits, batch_size=64, seed=0, augmentation=Augmentation(cutout=4)
    ).batch(0)[0]
    changed = (cut != plain).flatten(1).sum(1)
    assert int(changed.max()) <= 16
    assert bool((cut[cut != plain] == 0).all())


@pytest.mark.parametrize(
    ("fractions", "images", "batch"), [([0.6, 0.4], 99, 40), ([0.29, 0.71], 100, 29)]
)
def test_a_batch_as_large_as_the_smaller_part_of_the_search_images_is_accepted(
    fractions, images, batch
):
    """59 and 40 of 99 images: the second part gets the rest; 0.29 · 100 is 28.999999999999996."""
    settings = {
        "dataset": "digits",
        "data.search_images": images,
        "data.search_fractions": fractions,
    }
    read_data(load_recipe("smoke", overrides=settings | {"search.batch_size": batch}), Path("data"))
    with pytest.raises(InputError, match=f"leaves only {batch} images"):
        read_data(
            load_recipe("smoke", overrides=settings | {"search.batch_size": batch + 1}),
            Path("data"),
        )


def test_random_images_have_the_shape_and_number_of_a_data_set_and_take_no_memory():
    noise = load_dataset("random:imagenet")
    assert (len(noise.train), len(noise.test), noise.num_classes) == (1_281_167, 50_000, 1000)
    train, validation = search_split(noise, None, 0, (0.1, 0.025))
    assert (len(train), len(validation)) == (128_116, 32_029)
    images, labels = Batches(train, noise, batch_size=2, seed=0).batch(0)
    assert images.shape == (2, 3, 224, 224)
    assert not torch.equal(images[0], images[1])
    again = Batches(train, noise, batch_size=2, seed=0).batch(0)
    assert torch.equal(again[0], images)
    assert torch.equal(again[1], labels)
    crop = Batches(
        noise.train, noise, batch_size=2, seed=0, augmentation=Augmentation(resized_crop=True)
    ).batch(0)[0]
    assert crop.shape == (2, 3, 224, 224)
    small = load_dataset("random:cifar100", image_size=16)
    assert Batches(small.train, small, batch_size=3, seed=0).batch(0)[0].shape == (3, 3, 16, 16)


def test_fewer_images_than_a_batch_are_refused():
    digits = load_dataset("digits")
    with pytest.raises(InputError, match="fewer than one batch of 5000"):
        Batches(digits.train, digits, batch_size=5000, seed=0)


# ------------------------------ files of the real formats, with made-up pixels


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


def test_cifar_is_read_from_its_folder_and_from_its_archive_without_unpickling(tmp_path):
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
