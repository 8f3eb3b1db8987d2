"""Data sets, the split for the search, batches as a function of seed and position."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from small_pictures import IMAGENET, load, write_classes
from torchvision.transforms import functional as TF

import mlo
from lfmcw_app import image_files
from lfmcw_app.data import (
    Batches,
    Images,
    PairedBatches,
    check_dataset,
    in_order,
    load_dataset,
    search_places,
    search_split,
    short_name,
    subset,
    subset_places,
)
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Augmentation


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


def test_random_images_stand_for_a_data_set():
    """Random images have the shape and number of a data set, and take no memory."""
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


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened."""
    names = []
    original = Image.open

    def spy(path, *args, **kwargs):
        names.append(str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(image_files.Image, "open", spy)
    return names


def test_a_size_that_two_cells_cannot_halve_is_refused(tmp_path):
    write_classes(tmp_path, {"a": 5, "b": 5}, size=(10, 10))
    with pytest.raises(InputError, match=r"10 pixels wide.*divisible by 4.*data\.image_size"):
        load(tmp_path)


def test_images_without_contrast_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(5):
            Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / name / f"{index}.png")
    with pytest.raises(InputError, match="All pixels of the training images"):
        load(tmp_path)


def test_names_of_data_sets():
    check_dataset("digits")
    check_dataset("folder:pictures/pets")
    with pytest.raises(InputError, match=r"Did you mean 'imagenet'.*folder:PATH"):
        check_dataset("imagnet")
    assert short_name("digits") == "digits"
    assert short_name("folder:pictures/pets/") == "pets"


def test_a_folder_without_its_prefix_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    with pytest.raises(InputError, match="To use the folder of that name, write folder:pets"):
        check_dataset("pets")
    with pytest.raises(InputError) as refused:
        check_dataset("pest")
    assert "To use the folder" not in str(refused.value)


def test_imagenet_is_listed_without_reading_an_image(imagenet, opened, monkeypatch):
    monkeypatch.setattr("lfmcw_app.data.DEPTH", 0)
    data = load_dataset("imagenet", imagenet)
    assert data.class_names == ("n0002", "n01")
    assert data.train.pixels.shape == (60, 3, 224, 224)
    assert (data.channels, data.image_size, len(data.test)) == (3, 224, 7)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    small = load_dataset("imagenet", imagenet, image_size=32)
    train, validation = search_split(small, 30, seed=0, fractions=(0.5, 0.25))
    stream = Batches(train, small, batch_size=5, seed=0)
    assert opened == []
    images, _ = stream.batch(2)
    assert images.shape == (5, 3, 32, 32)
    assert len(opened) == 5
    assert len(validation[torch.arange(3)]) == 3
    assert len(opened) == 5


def test_the_test_transform_is_resize_and_centre_crop(imagenet):
    data = load_dataset("imagenet", imagenet, image_size=28)
    batches = list(in_order(data.test, data, 5))
    assert [len(labels) for _, labels in batches] == [5, 2]
    image = Image.open(imagenet / "imagenet" / "val" / "n0002" / "001.JPEG")
    pixels = TF.to_tensor(TF.center_crop(TF.resize(image, 32), [28, 28]))
    assert torch.allclose(batches[0][0][1], TF.normalize(pixels, data.mean, data.std), atol=1e-6)
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_the_search_takes_fractions_of_every_class(imagenet):
    data = load_dataset("imagenet", imagenet)
    train, validation = search_split(data, None, seed=0, fractions=(0.1, 0.05))
    assert train.labels.bincount().tolist() == [4, 2]
    assert validation.labels.bincount().tolist() == [2, 1]
    taken = torch.cat([train.pixels.rows, validation.pixels.rows])
    assert len(taken.unique()) == len(taken) == 9
    again, _ = search_split(data, None, seed=0, fractions=(0.1, 0.05))
    other, _ = search_split(data, None, seed=1, fractions=(0.1, 0.05))
    assert torch.equal(train.pixels.rows, again.pixels.rows)
    assert not torch.equal(train.pixels.rows, other.pixels.rows)


@pytest.mark.parametrize("fractions", [(0.0, 0.5), (0.5, -0.1), (0.6, 0.5)])
def test_fractions_that_cannot_be_taken_are_refused(fractions):
    with pytest.raises(InputError, match="sum to at most 1"):
        search_split(load_dataset("digits"), None, 0, fractions)


def test_fractions_are_not_rounded_down_by_their_representation():
    train, validation = search_split(load_dataset("digits"), 100, 0, (0.29, 0.71))
    assert (len(train), len(validation)) == (29, 71)


@pytest.mark.parametrize("position", [None, -1, 1.5, {}, True, 10**20])
def test_a_position_that_is_none_is_refused(position):
    batches = PairedBatches()
    with pytest.raises(mlo.CheckpointError, match="position of a stream of batches is a count"):
        batches.load_state_dict({"position": position})
    assert batches.position == 0


def test_photographs_are_a_function_of_seed_and_position(imagenet):
    data = load_dataset("imagenet", imagenet, image_size=16)

    def stream(seed=0, how=IMAGENET):
        return Batches(data.train, data, batch_size=8, seed=seed, augmentation=how)

    one = stream()
    expected = [batch for batch, _ in zip(one, range(10), strict=False)]
    other = stream()
    other.load_state_dict({"position": 9})
    images, labels = next(iter(other))
    assert torch.equal(images, expected[9][0])
    assert torch.equal(labels, expected[9][1])
    assert not torch.equal(stream(1).batch(0)[0], expected[0][0])
    plain = stream(how=Augmentation()).batch(0)
    assert torch.equal(plain[0], Batches(data.train, data, batch_size=8, seed=0).batch(0)[0])
    assert torch.equal(plain[1], expected[0][1])
    # Views of one image differ within a batch and from batch to batch.
    copies = data.train[torch.zeros(4, dtype=torch.long)]
    views = Batches(
        copies, data, batch_size=4, seed=0, augmentation=Augmentation(resized_crop=True)
    )
    assert len(torch.cat([views.batch(0)[0], views.batch(1)[0]]).flatten(1).unique(dim=0)) == 8
    state = torch.get_rng_state()
    stream().batch(5)
    assert torch.equal(state, torch.get_rng_state())


def test_the_validation_batch_can_match_the_training_batch():
    """The validation batch can have the classes of the training batch."""
    dataset = load_dataset("digits")
    train, validation = search_split(dataset, 300, seed=0)
    training = Batches(train, dataset, batch_size=16, seed=5)
    matched = Batches(validation, dataset, batch_size=16, seed=5, matched_to=training)
    paired = list(islice(PairedBatches(training, matched), 4))
    for _, labels, images, validation_labels in paired:
        assert torch.equal(labels, validation_labels)
        assert len(torch.unique(images.flatten(1), dim=0)) > 8
    again = Batches(validation, dataset, batch_size=16, seed=5, matched_to=training)
    assert torch.equal(again.batch(2)[0], paired[2][2])
    assert torch.equal(again.batch(0)[0], paired[0][2])
    # Each is an image of D_val with that label.
    everything = Batches(validation, dataset, batch_size=len(validation), seed=0).batch(0)
    for image, label in zip(paired[0][2], paired[0][3], strict=True):
        same = (everything[0] == image).flatten(1).all(1)
        assert (everything[1][same] == label).any()


def test_a_class_without_validation_images_cannot_be_matched():
    dataset = load_dataset("digits")
    images = dataset.train[dataset.train.labels != 4]
    training = Batches(dataset.train, dataset, batch_size=64, seed=0)
    matched = Batches(images, dataset, batch_size=64, seed=0, matched_to=training)
    with pytest.raises(InputError, match="Class 4 of the training batch"):
        matched.batch(0)


def test_validation_images_of_a_folder_are_d_val(tmp_path):
    for part, count in {"train": 12, "val": 6, "test": 3}.items():
        write_classes(tmp_path / part, {"a": count, "bb": count})
    data = load(tmp_path)
    train, validation = search_split(data, None, seed=0)
    for found, whole in ((train, data.train), (validation, data.validation)):
        assert sorted(found.pixels.flatten(1).tolist()) == sorted(whole.pixels.flatten(1).tolist())
    train, validation = search_split(data, 18, seed=0)
    assert train.labels.bincount().tolist() == [6, 6]
    assert validation.labels.bincount().tolist() == [3, 3]
    first, second = search_places(data, 18, seed=0)
    assert torch.equal(data.train.labels[first], train.labels)
    assert torch.equal(data.validation.labels[second], validation.labels)
    with pytest.raises(InputError, match="there is nothing to split"):
        search_split(data, None, 0, (0.8, 0.2))


def test_one_line_says_what_was_read(tmp_path):
    write_classes(tmp_path, {"a": 3, "bb": 3})
    (tmp_path / "a" / "notes.txt").write_text("x")
    assert load(tmp_path).summary == (
        "6 images, 2 classes, 4 train / 2 test, 8×8, 3 channels, values 0–255; 1 file skipped: "
        "1 .txt"
    )
    assert load_dataset("random:cifar10").summary == (
        "60,000 images, 10 classes, 50,000 train / 10,000 test, 32×32, 3 channels"
    )


def test_a_subset_has_every_class():
    digits = load_dataset("digits")
    labels = torch.cat([torch.zeros(500), torch.arange(1, 10)]).long()
    few = Images(pixels=digits.train.pixels[:509], labels=labels)
    for seed in range(5):
        chosen = subset(few, 40, seed)
        assert chosen.labels.unique().tolist() == list(range(10))
        assert torch.equal(chosen.labels, few.labels[subset_places(few.labels, 40, seed)])


def test_a_channel_that_is_empty_in_all_images_is_left_at_zero(tmp_path):
    """Two stains of three: torchvision's users train on such pictures."""
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        for k in range(4):
            pixels = np.random.default_rng(k).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            pixels[:, :, 2] = 0
            Image.fromarray(pixels).save(folder / f"{k}.png")
    data = load_dataset(f"folder:{tmp_path}")
    assert data.std[2] == 1.0
    assert data.mean[2] == 0.0
    images, _ = next(in_order(data.train, data, 4))
    assert bool((images[:, 2] == 0.0).all())


def test_a_home_that_nobody_has_is_no_folder():
    with pytest.raises(InputError, match="There is no folder ~nobody-of-this-name/pictures"):
        load_dataset("folder:~nobody-of-this-name/pictures")
