"""Images in files: read like a tensor of pixels, whole or as random crops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_pictures import IMAGENET, load, write_classes
from torchvision.transforms import functional as TF

from lfmcw_app.augmentation import CROP_DRAWS, crop_box
from lfmcw_app.data import Batches, in_order, load_dataset, subset
from lfmcw_app.decoding import Decoding
from lfmcw_app.errors import InputError
from lfmcw_app.folders import list_folder
from lfmcw_app.image_files import ImageFiles, all_pixels, random_crops


def test_files_are_read_in_the_order_of_the_listing(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2}, size=(40, 20))
    listing = list_folder(tmp_path).parts["train"]
    decoding = Decoding(size=16, margin=256 / 224)
    files = ImageFiles.of(listing, decoding)
    assert files.shape == (4, 3, 16, 16)
    expected = torch.stack([decoding.decode(path) for path in listing.paths])
    assert torch.equal(files[files.rows], expected)
    assert torch.equal(all_pixels([files])[0], expected)
    small = files.at_size(8).select(torch.tensor([3, 1]))
    eight = replace(decoding, size=8)
    assert torch.equal(small[torch.tensor([0])][0], eight.decode(listing.paths[3]))
    assert ImageFiles.of(listing, Decoding(size=8, channels=1))[torch.tensor([0])].shape[1] == 1


def test_all_files_that_cannot_be_read_are_named_at_once(tmp_path):
    for part in ("train", "test"):
        write_classes(tmp_path / part, {"a": 3, "b": 3}, size=(40, 40))
    truncated = [tmp_path / "train" / "a" / "001.png", tmp_path / "test" / "b" / "002.png"]
    for path in truncated:
        path.write_bytes(path.read_bytes()[:-3000])
    decoding = Decoding(size=8)
    parts = list_folder(tmp_path).parts
    files = [ImageFiles.of(parts[part], decoding) for part in ("train", "test")]
    for read in (lambda: all_pixels(files), lambda: load(tmp_path)):
        with pytest.raises(InputError, match=r"^2 images cannot be read") as caught:
            read()
        assert all(str(path) in str(caught.value) for path in truncated)
    rows, draws = torch.arange(6), torch.rand(6, *CROP_DRAWS)
    for read in (lambda: files[0][rows], lambda: files[0].random_crops(rows, draws)):
        with pytest.raises(InputError, match=r"a.001\.png cannot be read .*truncated"):
            read()


def test_images_in_files_are_used_like_a_tensor_of_pixels(imagenet):
    data = load_dataset("imagenet", imagenet, image_size=16)
    members = data.train.pixels[(data.train.labels == 1).nonzero()[:2, 0]]
    assert torch.equal(members, data.train[torch.tensor([40, 41])].pixels[torch.tensor([0, 1])])
    assert torch.equal(members, data.train.pixels[torch.arange(60) // 2 == 20])
    assert len(subset(data.train, 6, 0).pixels) == 6


def test_a_damaged_file_is_named_when_it_is_read(imagenet):
    (imagenet / "imagenet" / "train" / "n01" / "007.JPEG").write_bytes(b"damaged")
    data = load_dataset("imagenet", imagenet, image_size=16)
    with pytest.raises(InputError, match=r"n01.007\.JPEG cannot be read"):
        next(in_order(data.train, data, 60))


def test_random_crops_are_windows_of_the_original_image(imagenet):
    data = load_dataset("imagenet", imagenet, image_size=16)
    draws = torch.rand(6, *CROP_DRAWS, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([0, 5, 9, 41, 42, 43])
    crops = random_crops(data.train.pixels, indices, draws)
    for crop, row, draw in zip(crops, indices, draws, strict=True):
        with Image.open(data.train.pixels.paths[row]) as image:
            left, top, right, bottom = crop_box(*image.size, draw)
            expected = TF.resized_crop(image, top, left, bottom - top, right - left, [16, 16])
        assert torch.equal(crop, TF.pil_to_tensor(expected))


def test_random_crops_of_images_in_memory():
    digits = load_dataset("digits")
    draws = torch.rand(5, *CROP_DRAWS, generator=torch.Generator().manual_seed(0))
    crops = random_crops(digits.train.pixels, torch.arange(5), draws)
    assert crops.shape == (5, 1, 8, 8)
    assert crops.dtype == torch.uint8
    rgb = random_crops(digits.train.pixels.expand(-1, 3, 8, 8), torch.arange(5), draws)
    assert torch.equal(rgb, crops.expand(5, 3, 8, 8))
    stream = Batches(digits.train, digits, batch_size=32, seed=0, augmentation=IMAGENET)
    assert bool(torch.isfinite(stream.batch(3)[0]).all())
