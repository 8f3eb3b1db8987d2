"""Folders of image files: reading, laziness, splits, random views as a function of seed and
position, every error.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from lfmcw_app import folders
from lfmcw_app.augmentation import CROP_DRAWS, adjust_colors, crop_box
from lfmcw_app.data import (
    Batches,
    Images,
    check_dataset,
    in_order,
    load_dataset,
    search_split,
    short_name,
    stratified,
    subset,
)
from lfmcw_app.errors import InputError
from lfmcw_app.folders import ImageFiles, random_crops
from lfmcw_app.readers import read_folder
from lfmcw_app.recipe import Augmentation

IMAGENET = Augmentation(flip=True, resized_crop=True, color_jitter=(0.4, 0.4, 0.4, 0.2))


def write(path, size=(8, 8), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(
        0, 256, size[0] * size[1] * len(mode), dtype=np.uint8
    )
    image = Image.frombytes(mode, size, values.tobytes())
    image.save(path)
    return image


def write_classes(folder, counts, suffix="png", size=(8, 8)):
    for name, count in counts.items():
        for index in range(count):
            write(folder / name / f"{index:03d}.{suffix}", size, seed=len(name) * 1000 + index)


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened."""
    names = []
    original = Image.open

    def spy(path, *args, **kwargs):
        names.append(str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(folders.Image, "open", spy)
    return names


def load(folder, size=None):
    return load_dataset(f"folder:{folder}", image_size=size)


# ------------------------------ folder:PATH


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_a_split_folder_is_read_as_it_is(tmp_path, held_out):
    write_classes(tmp_path / "train", {"dog": 3, "cat": 2})
    write_classes(tmp_path / held_out, {"cat": 1, "dog": 2})
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 1, 1]
    assert (data.channels, data.image_size, data.num_classes) == (3, 8, 2)
    for images, part in ((data.train, "train"), (data.test, held_out)):
        expected = np.asarray(Image.open(tmp_path / part / "cat" / "000.png"))
        assert np.array_equal(images.pixels[0].permute(1, 2, 0).numpy(), expected)
    pixels = data.train.pixels.double() / 255.0
    assert data.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-14)
    assert data.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=1e-14)


def test_an_unsplit_folder_has_a_stratified_fifth_held_out(tmp_path):
    write_classes(tmp_path, {"a": 20, "bb": 10})
    data, again = load(tmp_path), load(tmp_path)
    assert data.train.labels.bincount().tolist() == [16, 8]
    assert data.test.labels.bincount().tolist() == [4, 2]
    assert torch.equal(data.train.pixels, again.train.pixels)
    everything = torch.cat([data.train.pixels, data.test.pixels]).flatten(1)
    assert len(everything.unique(dim=0)) == 30


def test_a_class_may_be_called_train_and_hidden_folders_are_none(tmp_path):
    write_classes(tmp_path, {"bus": 5, "train": 5, ".cache": 1})
    assert load(tmp_path).class_names == ("bus", "train")


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
    listing, _ = folders.list_split(tmp_path)
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


def test_a_size_that_two_cells_cannot_halve_is_refused(tmp_path):
    write_classes(tmp_path, {"a": 5, "b": 5}, size=(10, 10))
    with pytest.raises(InputError, match=r"10 pixels wide.*divisible by 4.*data\.image_size"):
        load(tmp_path)


def test_an_unusable_folder_is_refused_with_advice(tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="needs the path"):
        load_dataset("folder:")
    with pytest.raises(InputError, match="at least two folders of images, one a class, and has 0"):
        load(tmp_path)
    write_classes(tmp_path, {"a": 2})
    with pytest.raises(InputError, match="has 1"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"class folder .*empty has no images"):
        load(tmp_path)


def test_training_images_need_test_images_of_the_same_classes(tmp_path):
    write_classes(tmp_path / "train", {"a": 2, "b": 2})
    with pytest.raises(InputError, match="none in test, val, validation"):
        load(tmp_path)
    write_classes(tmp_path / "test", {"a": 2, "c": 2, "b": 1})
    with pytest.raises(
        InputError, match=r"train \(2\) and test \(3\): 'c' is in test and not in train"
    ):
        load(tmp_path)
    (tmp_path / "test" / "c").rename(tmp_path / "c")
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "d")
    with pytest.raises(InputError, match="'b' is in train and not in test"):
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


def test_images_without_contrast_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(5):
            Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / name / f"{index}.png")
    with pytest.raises(InputError, match="one colour in channel 0"):
        load(tmp_path)


def test_names_of_data_sets():
    check_dataset("digits")
    check_dataset("folder:pictures/pets")
    with pytest.raises(InputError, match=r"Did you mean 'imagenet'.*folder:PATH"):
        check_dataset("imagnet")
    assert short_name("digits") == "digits"
    assert short_name("folder:pictures/pets/") == "pets"


# ------------------------------ ImageNet: files that are read when they are needed


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "imagenet"
    write_classes(root / "train", {"n01": 20, "n0002": 40}, "JPEG", size=(40, 30))
    write_classes(root / "val", {"n01": 3, "n0002": 4}, "JPEG", size=(30, 40))
    return tmp_path


def test_imagenet_is_listed_without_reading_an_image(imagenet, opened):
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


def test_imagenet_must_be_unpacked(tmp_path):
    with pytest.raises(InputError, match="cannot be downloaded without an account"):
        load_dataset("imagenet", tmp_path)
    write_classes(tmp_path / "imagenet", {"n01": 1, "n02": 1}, "JPEG")
    with pytest.raises(InputError, match="Unpack ImageNet's archives"):
        load_dataset("imagenet", tmp_path)


# ------------------------------ the search's split


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


# ------------------------------ random views


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


def test_windows_have_the_areas_and_ratios_of_inception():
    draws = torch.rand(500, *CROP_DRAWS, generator=torch.Generator().manual_seed(0))
    boxes = [crop_box(400, 300, draw) for draw in draws]
    left, top, right, bottom = torch.tensor(boxes).unbind(1)
    assert bool(((left >= 0) & (top >= 0) & (right <= 400) & (bottom <= 300)).all())
    areas, ratios = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert 0.075 < float(areas.min()) < 0.12
    assert 0.9 < float(areas.max()) <= 1.0
    assert 0.74 < float(ratios.min()) < 0.78
    assert 1.28 < float(ratios.max()) < 1.35
    # What no attempt fits: the central window of the nearest ratio.
    assert crop_box(1000, 3, torch.full(CROP_DRAWS, 0.99)) == (498, 0, 502, 3)
    assert crop_box(3, 1000, torch.full(CROP_DRAWS, 0.99)) == (0, 498, 3, 502)


def test_colours_are_adjusted_as_torchvision_does():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 9, 9, generator=generator)
    images[0] = images[0, :1]  # grey: no hue
    images[1].zero_()
    factors = torch.cat(
        [
            0.6 + 0.8 * torch.rand(24, 3, generator=generator),
            torch.rand(24, 1, generator=generator) - 0.5,
        ],
        1,
    )
    order = torch.rand(24, 4, generator=generator).argsort(1)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    before = images.clone()
    result = adjust_colors(images, factors, order)
    assert torch.equal(images, before)
    for image, factor, kinds, out in zip(
        images, factors.tolist(), order.tolist(), result, strict=True
    ):
        for kind in kinds:
            image = adjust[kind](image, factor[kind])
        assert torch.allclose(out, image, atol=2e-6)
    unchanged = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(24, 4)
    assert torch.equal(adjust_colors(images, unchanged, order), images)
    grey = adjust_colors(images[:, :1], factors, order)
    assert grey.shape == (24, 1, 9, 9)


def test_jitter_stays_within_its_strength(imagenet):
    data = load_dataset("imagenet", imagenet, image_size=16)
    how = Augmentation(color_jitter=(0.4, 0.0, 0.0, 0.0))
    plain = Batches(data.train, data, batch_size=60, seed=0).batch(0)[0]
    bright = Batches(data.train, data, batch_size=60, seed=0, augmentation=how).batch(0)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    ratio = (bright * std + mean).flatten(1).mean(1) / (plain * std + mean).flatten(1).mean(1)
    assert 0.6 <= float(ratio.min()) < 0.75
    assert 1.1 < float(ratio.max()) <= 1.4001


def test_read_folder_gives_images_in_memory(tmp_path):
    write_classes(tmp_path, {"a": 5, "b": 5})
    train, test, names = read_folder(tmp_path, None)
    assert isinstance(train, Images)
    assert isinstance(train.pixels, torch.Tensor)
    assert (len(train), len(test), names) == (8, 2, ("a", "b"))
