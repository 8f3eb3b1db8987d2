"""Images in files: decoding, sizes, random crops, every error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_pictures import IMAGENET, load, write, write_classes
from torchvision.transforms import functional as TF

from lfmcw_app.augmentation import CROP_DRAWS, crop_box
from lfmcw_app.data import Batches, in_order, load_dataset, subset
from lfmcw_app.errors import InputError
from lfmcw_app.image_files import ImageFiles, random_crops
from lfmcw_app.listing import list_folder


def test_images_of_any_kind_become_rgb(tmp_path):
    write_classes(tmp_path / "train", {"a": 1, "b": 1}, "jpg")
    write_classes(tmp_path / "test", {"a": 1, "b": 1})
    folder = tmp_path / "train" / "a"
    grey = np.asarray(write(folder / "grey.png", mode="L"))
    write(folder / "alpha.PNG", mode="RGBA")
    write(folder / "cmyk.jpeg", mode="CMYK")
    write(folder / "palette.gif").quantize(16).save(folder / "palette.gif")
    Image.fromarray(np.full((8, 8), 0x1234, dtype=np.uint16)).save(folder / "sixteen.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    data = load(tmp_path)
    names = ["000.jpg", "alpha.PNG", "cmyk.jpeg", "grey.png", "palette.gif", "sixteen.png"]
    assert len(data.train) == len(names) + 1
    assert torch.equal(data.train.pixels[3], torch.from_numpy(grey.copy()).expand(3, 8, 8))
    assert data.train.pixels[5].unique().tolist() == [0x12]


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (37, 23), (16, 16), (6, 5)])
def test_images_are_resized_and_cut_as_torchvision_does(tmp_path, size):
    write_classes(tmp_path, {"a": 2, "b": 2}, size=size)
    listing = list_folder(tmp_path).parts["train"]
    for margin in (1.0, 256 / 224):
        files = ImageFiles.of(listing, 16, margin)
        for path, pixels in zip(listing.paths, files[files.rows], strict=True):
            image = TF.center_crop(TF.resize(Image.open(path), round(16 * margin)), [16, 16])
            assert torch.equal(pixels, TF.pil_to_tensor(image))


def test_sizes_that_differ_need_one(tmp_path):
    write_classes(tmp_path, {"a": 5}, size=(8, 8))
    write_classes(tmp_path, {"b": 5}, size=(12, 8))
    with pytest.raises(InputError, match=r"no common square size .*12×8.*8×8.*data\.image_size"):
        load(tmp_path)
    assert load(tmp_path, 12).image_size == 12
    write_classes(tmp_path, {"a": 5}, size=(12, 8))
    with pytest.raises(InputError, match=r"no common square size .*12×8.*12×8"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", None])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, content, suffix):
    write_classes(tmp_path, {"a": 3, "b": 3}, suffix)
    path = tmp_path / "b" / f"001.{suffix}"
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    for size in (None, 8):
        with pytest.raises(InputError, match=rf"b.001\.{suffix} cannot be read"):
            load(tmp_path, size)


def test_pixels_of_unknown_range_are_refused(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2})
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "a" / "float.tiff")
    with pytest.raises(InputError, match=r"float\.tiff cannot be read .*32 bits"):
        load(tmp_path)


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
