"""Data sets without their pixels: of the right number and shape, and next to nothing is read."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.augmentation import sent
from lfmcw_app.blank_data import blank
from lfmcw_app.data import Batches, load_dataset, resident
from lfmcw_app.image_files import ImageFiles, NoiseImages
from lfmcw_app.readers import Images
from lfmcw_app.recipe import Augmentation
from lfmcw_app.testing import noise_dataset

META = torch.device("meta")


def never():
    raise AssertionError("the data were read")


def test_a_known_data_set_is_not_read():
    dataset = blank("cifar100", None, in_memory=None, read=never)
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (50_000, 10_000, 100)
    assert (dataset.image_size, dataset.channels) == (32, 3)
    assert dataset.train.pixels.untyped_storage().nbytes() == 1
    assert blank("cifar10", 16, in_memory=None, read=never).image_size == 16
    assert blank("cifar10", 64, in_memory=None, read=never).image_size == 32
    assert isinstance(blank("imagenet", None, in_memory=None, read=never).train.pixels, NoiseImages)


def test_others_keep_their_shape_and_their_labels():
    dataset = load_dataset("digits")
    found = blank("digits", None, in_memory=None, read=lambda: dataset)
    assert torch.equal(found.train.labels, dataset.train.labels)
    assert found.train.pixels.shape == dataset.train.pixels.shape
    assert found.mean == dataset.mean


@pytest.mark.parametrize(
    ("count", "in_memory", "stays"), [(10, None, False), (10, False, True), (2_000_000, None, True)]
)
def test_files_become_black_images_where_a_gpu_holds_them(count, in_memory, stays):
    whole = noise_dataset()
    files = Images(pixels=NoiseImages.many(count, 32), labels=torch.zeros(count, dtype=torch.long))
    of_files = type(whole)(**{**vars(whole), "train": files})
    found = blank("folder:x", None, in_memory=in_memory, read=lambda: of_files).train
    assert isinstance(found.pixels, ImageFiles) == stays
    assert found.pixels.shape == files.pixels.shape
    assert torch.equal(found.labels, files.labels)


def test_batches_of_black_images_come_from_the_device():
    dataset = blank("cifar10", None, in_memory=None, read=never)
    how = Augmentation(crop_padding=4, flip=True, cutout=16)
    few = dataset.train[torch.arange(100)]
    images = resident(few, how, META)
    assert images.pixels.device == META
    batches = Batches(images, dataset, batch_size=8, seed=0, augmentation=how, device=META)
    pixels, labels = batches.batch(3)
    assert (pixels.shape, pixels.device, labels.shape) == ((8, 3, 32, 32), META, (8,))
    windows = Augmentation(resized_crop=True)
    assert resident(few, windows, META) is few
    assert sent(labels, META) is labels
